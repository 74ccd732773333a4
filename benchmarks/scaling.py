"""What a step computes, says to other devices and reads, by the model of docs/scaling.md and by the lowered program.

    python benchmarks/scaling.py                  # all tables; a few minutes on one core
    python benchmarks/scaling.py --collectives    # the content of tests/golden/collectives.json

Nothing is trained: the programs are lowered for 1, 2, 4 and 8 fake CPU devices and read. The chips' figures are public
specifications (`CHIPS`), those of ResNet-50 and ViT-B/16 published counts (`NETWORKS`); the time to decode an image is
measured here, on one core.
"""

import argparse
import io
import json
import re
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contenders import PUBLISHED_FORWARD, Spec, step_flops
from PIL import Image
from rich.console import Console
from rich.table import Table

from mfm_jax import config as config_lib
from mfm_jax.data import longtail
from mfm_jax.machine import parallel
from mfm_jax.methods.table import BUILT_IN
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.types import Batch

_BYTES = {"f64": 8, "f32": 4, "bf16": 2, "i32": 4, "ui32": 4}
_QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
EVERY = config_lib.Meta().every


@dataclass(frozen=True)
class Network:
    """A published network at 224 pixels: a forward pass's multiplications and additions, and what is averaged."""

    name: str
    forward: float  # operations an image, a multiply-add counted as two
    parameters: float
    norms: int  # batch norms
    channels: int  # of all of them together
    slots: int  # arrays like the parameters that its optimizer keeps


@dataclass(frozen=True)
class Chip:
    """An accelerator as its maker specifies it, rates a second."""

    name: str
    operations: float  # bfloat16, dense
    memory: float  # bytes
    near: float  # bytes that a ring passes on from chip to chip, one way, among `domain` chips
    far: float  # the same, among more
    domain: int


NETWORKS = (
    Network("ResNet-50", PUBLISHED_FORWARD["resnet50"], 25.56e6, 53, 26_560, 1),
    Network("ViT-B/16", PUBLISHED_FORWARD["vit_b16"], 86.57e6, 0, 0, 2),
)
# cloud.google.com/tpu/docs/v4: 275 TFLOP/s, 32 GiB; all-reduce 1.1 PB/s for a pod of 4096.
# NVIDIA's datasheets of H100 and DGX H100: 989 TFLOP/s dense, 80 GB; NVLink 900 GB/s both ways together; eight adapters
# of 400 Gb/s a machine, which a ring through machines uses side by side.
CHIPS = (
    Chip("TPU v4", 275e12, 32 * 2**30, 1.1e15 / 4096, 1.1e15 / 4096, 4096),
    Chip("H100 SXM", 989e12, 80e9, 450e9, 8 * 50e9, 8),
)
UTILIZATION = 0.4  # of the peak, assumed
LATENCY = 20e-6  # seconds of a collective beside its bytes, assumed


def collectives_of(method: str) -> dict[str, dict[str, int]]:
    """Returns what the devices say to each other in each kind of a method's step: ResNet-8, width 2, eight devices.

    `arrays` and `bytes` of the lowered program's all-reduces, and `collectives`, what XLA merges them into.
    """
    found = {}
    for kind, lowered in programs(Spec("", model="resnet8", width=2, image_size=8, batch=96, meta_batch=96), method, 8):
        sizes = reduced_bytes(lowered)
        compiled = lowered.compile(compiler_options=_QUICKLY).as_text()
        merged = len(re.findall(r" all-reduce(?:-start)?\(", compiled))
        found[kind] = {"arrays": len(sizes), "bytes": sum(sizes), "collectives": merged}
    return found


def programs(spec: Spec, method: str, devices: int, **overrides: Any) -> list[tuple[str, jax.stages.Lowered]]:
    """Returns the kinds of a method's steps, lowered for the first `devices`."""
    config = config_lib.default()
    config.model.update(name=spec.model, width=spec.width)
    config.method.name, config.meta.lagged = method, method != "l2rw"
    config.train.batch_size, config.meta.batch_size = spec.batch, spec.meta_batch
    config.update_from_flattened_dict(overrides)
    resolved = config_lib.resolve(config)
    counts = longtail.class_counts(500, spec.classes, config.data.imbalance_factor)
    # Of the data, `experiment.build` reads only shapes, counts and names.
    each = -(-spec.meta_batch // spec.classes)
    splits = {"train": {"class_counts": counts.tolist()}, "meta": {"class_counts": [each] * spec.classes}}
    images = np.broadcast_to(np.zeros((), np.uint8), (counts.sum(), spec.image_size, spec.image_size, 3))
    data: Any = SimpleNamespace(
        train_images=images,
        train_labels=images[:, 0, 0, 0],
        counts=counts,
        num_classes=spec.classes,
        class_names=tuple(map(str, range(spec.classes))),
        val_labels=np.zeros(0, np.int32),
        manifest={"splits": splits, "meta_images_per_class": each},
    )
    mesh = parallel.data_mesh(jax.devices()[:devices])
    experiment = experiment_lib.build(resolved, data, mesh)
    state = jax.eval_shape(experiment.init)

    def batch(size: int) -> Batch:
        image = (size, *images.shape[1:])
        return Batch(jax.ShapeDtypeStruct(image, jnp.float32), jax.ShapeDtypeStruct((size,), jnp.int32))

    training = batch(spec.batch)
    if resolved.method.second_view:
        training = training._replace(second=training)
    given = {"plain": [training], "meta": [training, batch(spec.meta_batch)]}
    features = batch(spec.batch)._replace(image=jax.ShapeDtypeStruct((spec.batch, 4 * spec.width), jnp.float32))
    given["retrain"] = [features] if experiment.synthetic else given["plain"]
    steps = {kind: getattr(experiment, f"{kind}_step") for kind in given}
    return [(kind, jax.jit(step).lower(state, *given[kind])) for kind, step in steps.items() if step]


def reduced_bytes(lowered: jax.stages.Lowered) -> list[int]:
    """Returns the bytes of each array that the program averages or sums over the devices; none are moved otherwise."""
    sizes = []

    def walk(operation: Any) -> None:
        name = operation.name
        if name == "stablehlo.all_reduce":
            sizes.extend(_bytes(str(result.type)) for result in operation.results)
        elif name in ("stablehlo.all_gather", "stablehlo.all_to_all", "stablehlo.collective_permute"):
            raise ValueError(f"{name}: not a sum over devices")
        for region in operation.regions:
            for block in region:
                for inner in block.operations:
                    walk(inner.operation)

    walk(lowered.compiler_ir("stablehlo").operation)
    return sizes


def _bytes(kind: str) -> int:
    """Returns the bytes of a type such as `tensor<2x16xf32>`."""
    *shape, dtype = kind.removeprefix("tensor<").removesuffix(">").split("x")
    return int(np.prod([int(size) for size in shape], initial=1)) * _BYTES[dtype]


def step_bytes(parameters: float, channels: float, meta: bool, phi: float = 0) -> float:
    """Returns the bytes that a step sums over the devices, by the derivation in `parallel`.

    Gradients of the parameters; of batch norm, for each channel, two moments forward and their two transposes
    backward, which stand for the gradients of its scale and bias; loss and accuracy. A meta-step adds u, two moments'
    tangents, two fresh moments, the meta-gradient and the meta loss.
    """
    plain = parameters + 2 * channels + 2
    return 4 * (plain + meta * (parameters + 4 * channels + phi + 1))


def programs_table(quick: bool) -> Table:
    """Returns the model beside the lowered programs of a network that exists."""
    columns = "step", "devices", "GFLOP", "model", "ratio", "arrays", "KB", "model", "ratio"
    spec = Spec("", model="resnet8" if quick else "resnet32", sites=("pooled",), batch=128, meta_batch=128, bn="fresh")
    table = Table(*columns, title=f"{spec.model}, 32 pixels, batch {spec.batch}: one device's part of a step")
    form = {"modulation.form": "direct", "modulation.sites": "pooled"}
    for devices in (1, 2, 4, 8):
        for kind, lowered in programs(spec, "mfm", devices, **form):
            flops, model_flops = lowered.cost_analysis()["flops"], _flops(spec, kind) / devices
            sent, model_sent = sum(sizes := reduced_bytes(lowered)), _network_bytes(spec, kind)
            numbers = (flops / 1e9, model_flops / 1e9, flops / model_flops)
            said = (sent / 1e3, model_sent / 1e3, sent / model_sent)
            cells = [f"{x:.3f}" for x in numbers] + [str(len(sizes))] + [f"{x:.3f}" for x in said]
            table.add_row(kind, str(devices), *cells)
    return table


def _flops(spec: Spec, kind: str) -> float:
    return step_flops(replace(spec, step="mfm" if kind == "meta" else "plain"))


def _network_bytes(spec: Spec, kind: str) -> float:
    blocks, width = (int(spec.model.removeprefix("resnet")) - 2) // 6, spec.width
    channels = width + sum(2 * blocks * width * 2**stage for stage in range(3))
    kernels, before = 9 * 3 * width, width
    for stage in range(3):
        after = width * 2**stage
        kernels += 9 * after * (before + (2 * blocks - 1) * after)
        before = after
    parameters = kernels + 2 * channels + (before + 1) * spec.classes
    return step_bytes(parameters, channels, kind == "meta", phi=2 * before)


def scaling_table(chip: Chip, decoded: float) -> Table:
    """Returns where a step's time goes on 8, 64 and 512 chips, without overlap, meta-step every `EVERY` steps."""
    columns = "network", "chips", "batch a chip", "compute", "bytes", "latency", "share", "images/s", "cores a chip"
    title = f"{chip.name}: milliseconds of a step; the collectives' share; images read, cores to decode them"
    table = Table(*columns, title=title)
    for network in NETWORKS:
        for chips in (8, 64, 512):
            for part in sorted({128, max(4096 // chips, 1)}, reverse=True):
                table.add_row(network.name, str(chips), str(part), *_row(network, chip, chips, part, decoded))
    return table


def _row(network: Network, chip: Chip, chips: int, part: int, decoded: float) -> list[str]:
    compute = (3 + 6 / EVERY) * network.forward * part / (chip.operations * UTILIZATION)
    plain, meta = (step_bytes(network.parameters, network.channels, which) for which in (False, True))
    rate = chip.near if chips <= chip.domain else chip.far
    moved = 2 * (chips - 1) / chips * (plain + (meta - plain) / EVERY) / rate
    waits = 2 * network.norms + 1 + (2 * network.norms + 2) / EVERY
    latency = waits * LATENCY
    images = (1 + 1 / EVERY) * part * chips / (compute + moved + latency)
    share = (moved + latency) / (compute + moved + latency)
    times = [f"{1e3 * x:.2f}" for x in (compute, moved, latency)]
    return [*times, f"{share:.0%}", f"{images:,.0f}", f"{images / decoded / chips:.1f}"]


def memory_table() -> Table:
    """Returns the bytes of parameters and optimizer state: at rest, divided by eight, and beside g, u and v."""
    table = Table(
        "network", "at rest", "fsdp = 8", "in a meta-step", title="GB of parameters and optimizer state a chip"
    )
    for network in NETWORKS:
        rest = 4 * network.parameters * (1 + network.slots)
        # The old state and the new, and three trees like the parameters.
        meta = 2 * rest + 3 * 4 * network.parameters
        table.add_row(network.name, *(f"{size / 1e9:.2f}" for size in (rest, rest / 8, meta)))
    return table


def decoded_a_second(images: int = 100) -> float:
    """Returns how many photographs a core decodes and scales to 224 pixels in a second: JPEG, 500x375, about 110 kB."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
    noisy = np.clip(np.asarray(coarse, np.int16) + rng.normal(0, 12, (375, 500, 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=90)
    print(f"the JPEG has {len(file.getvalue()) / 1e3:.0f} kB")
    began = time.process_time()
    for _ in range(images):
        np.asarray(Image.open(file).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR, reducing_gap=2.0))
    return images / (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collectives", action="store_true", help="print the golden file and nothing else")
    parser.add_argument("--quick", action="store_true", help="check the model on ResNet-8, not on ResNet-32")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    if options.collectives:
        print(json.dumps({name: collectives_of(name) for name in BUILT_IN}, indent=1))
        return
    console = Console(width=120)
    console.print(programs_table(options.quick))
    decoded = decoded_a_second()
    print(f"a core decodes {decoded:.0f} images a second")
    for chip in CHIPS:
        console.print(scaling_table(chip, decoded))
    console.print(memory_table())


if __name__ == "__main__":
    main()
