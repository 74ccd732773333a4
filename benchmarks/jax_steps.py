"""The JAX contenders: each `Spec` as a compiled, donated step on batches that stay on the device."""

import contextlib
import dataclasses
import functools
import importlib.util
import re
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contenders import MATMUL_SIZE, Program, Spec
from forms import FORMS
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mfm_jax import bilevel, models
from mfm_jax import config as config_lib
from mfm_jax.bilevel import hypergrad, losses, modulation, optim, outer
from mfm_jax.bilevel.passes import Pass
from mfm_jax.data import augment, longtail
from mfm_jax.data import batches as batches_lib
from mfm_jax.machine import parallel
from mfm_jax.methods.learners import meta_weight_net
from mfm_jax.models import lowering, native
from mfm_jax.training import experiment, inputs, loop
from mfm_jax.types import Batch, BilevelState

TRACING = threading.Lock()  # Python traces one program at a time in any case; so the first is compiled the sooner


def build(spec: Spec) -> Program:
    """Compiles the contender's step, and where not every step is a meta-step, the plain one between."""
    makers = {"matmul": _matmul, "copy": _copy, "input": _input, "loop": _loop}
    if spec.step in makers:
        return makers[spec.step](spec)
    with TRACING, _form(spec):
        if spec.step == "recipe":
            state, meta_step, plain_step, decided = _recipe(spec)
        else:
            state, meta_step, plain_step = _explicit(spec)
            decided = {}
        every = decided.get("every", spec.every)
        batches = [_batch(key, size, spec) for key, size in ((1, spec.batch), (2, spec.meta_batch))]
        if spec.seeds > 1:
            state, *batches = (loop.stack([one] * spec.seeds) for one in (state, *batches))
            meta_step, plain_step = meta_step and jax.vmap(meta_step), jax.vmap(plain_step)
        if spec.devices > 1:
            mesh = _mesh(spec)
            batches = [jax.device_put(batch, NamedSharding(mesh, P(parallel.AXIS))) for batch in batches]
            state = jax.device_put(state, parallel.replicated(mesh))
        began, lowered = time.perf_counter(), {}
        jit = functools.partial(jax.jit, donate_argnums=0, compiler_options=parallel.compiler_options())
        if meta_step:
            lowered["meta"] = jit(meta_step).lower(state, *batches)
        if not meta_step or every > 1:
            lowered["plain"] = jit(plain_step).lower(state, batches[0])
        traced = time.perf_counter() - began
    programs, facts = _compiled(lowered, traced)
    facts |= {"unit": every, "spec": decided}
    if len(programs) == 1:
        (program,) = programs.values()
        facts["bytes"] = (program.cost_analysis() or {}).get("bytes accessed")
    return _program(state, programs.get("meta"), programs.get("plain"), batches, every, facts)


@contextlib.contextmanager
def _form(spec: Spec) -> Iterator[None]:
    """Has the convolutions of several seeds lowered in the spec's form."""
    shipped = lowering.over_seeds
    if spec.form:
        lowering.over_seeds = FORMS[spec.form]
    try:
        yield
    finally:
        lowering.over_seeds = shipped


def _compiled(lowered: dict[str, jax.stages.Lowered], traced: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the compiled programs and their facts; `traced` are the seconds that tracing took."""
    began = time.perf_counter()
    programs = {kind: one.compile() for kind, one in lowered.items()}
    memory = [program.memory_analysis() for program in programs.values()]
    return programs, {
        "trace_seconds": traced,
        "compile_seconds": traced + time.perf_counter() - began,
        "temp_mb": max(m.temp_size_in_bytes for m in memory if m) / 1e6,
        "programs": len(programs),
        "operations": sum(len(re.findall(r" = .*stablehlo\.", one.as_text())) for one in lowered.values()),
        "transposes": sum(len(re.findall(r" (?:transpose|copy)\(", one.as_text())) for one in programs.values()),
        **_device(),
    }


def _program(state, meta, plain, batches: list[Batch], every: int, facts: dict[str, Any]) -> Program:
    done, loss = 0, jnp.zeros(())

    def run(steps: int) -> None:
        nonlocal state, done, loss
        for _ in range(steps):
            is_meta = meta is not None and done % every == 0
            state, metrics = meta(state, *batches) if is_meta else plain(state, batches[0])
            loss, done = metrics["loss"], done + 1
        jax.block_until_ready(state)

    def finish() -> dict[str, Any]:
        if not np.isfinite(loss).all():
            raise FloatingPointError(f"the loss is {loss} after {done} steps")
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return {"device_mb": peak / 1e6} if peak else {}

    return Program(run, finish, facts)


def _device() -> dict[str, Any]:
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "version": f"jax {jax.__version__}",
        "convolutions": native.lowering(),
    }


def _batch(seed: int, size: int, spec: Spec) -> Batch:
    image = np.random.default_rng(seed).normal(size=(size, spec.image_size, spec.image_size, 3))
    return Batch(jnp.asarray(image, jnp.float32), jnp.asarray(np.arange(size) % spec.classes, jnp.int32))


def _drawn(init: Callable[[], BilevelState]) -> BilevelState:
    """Returns a state like `init()`, filled in by NumPy: compiling an initialisation takes seconds a worker.

    Kernels are drawn as `init` draws them; scales and variances are one, all else zero.
    """
    rng = np.random.default_rng(0)

    def draw(path: tuple, like: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if path[0].name == "params" and like.ndim > 1:
            return jnp.array(rng.normal(0, (2 / np.prod(like.shape[:-1])) ** 0.5, like.shape), like.dtype)
        ones = path[0].name in ("params", "batch_stats") and path[-1].key in ("scale", "var")
        return jnp.array(np.full(like.shape, float(ones)), like.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init))


def _mesh(spec: Spec):
    return parallel.data_mesh(jax.devices()[: spec.devices])


def _explicit(spec: Spec) -> tuple[BilevelState, Callable | None, Callable]:
    """Returns (state, meta-step, plain step) put together from the library's parts as the spec says."""
    module = models.create(spec.model, spec.classes, spec.width, jnp.dtype(spec.dtype))
    image = jnp.zeros((1, spec.image_size, spec.image_size, 3))
    defaults = config_lib.Config()
    tx, phi_tx = optim.classifier(defaults.optim, defaults.optim.learning_rate), optim.outer(1e-2)
    key, learner = jax.random.key(0), None
    if spec.step == "mfm":
        channels = modulation.site_channels(lambda film: module.init(key, image, modulate=film), spec.sites)
        learner = outer.of(modulation.direct(channels))
    elif spec.step == "meta_weight_net":
        learner = meta_weight_net()
    of_phi = (learner.init, phi_tx) if learner else ()
    state = _drawn(lambda: bilevel.init_state(key, module.init(key, image), tx, *of_phi))
    forward = Pass.of(module)
    plain_step = bilevel.make_plain_step(forward, losses.cross_entropy, tx, learner)
    meta_step: Callable | None = None
    if learner:
        rule = bilevel.MetaRule(
            hypergrad=getattr(hypergrad, spec.route),
            lagged=spec.lagged,
            virtual_groups=models.virtual_groups(spec.model, spec.virtual),
            bn=spec.bn,
        )
        meta_step = bilevel.make_step(forward, losses.cross_entropy, tx, learner, phi_tx, rule)
    return state, meta_step, plain_step


def _recipe(spec: Spec) -> tuple[BilevelState, Callable | None, Callable, dict[str, Any]]:
    """Returns what `experiment.build` makes of the config file, and the fields of `Spec` that the file decides.

    Model, images, classes and batches are the spec's; all else is what someone who runs the config gets.
    """
    config = _config(spec)
    # Of the data, `experiment.build` reads only shapes and counts.
    built = experiment.build(config, _data(spec, config), _mesh(spec) if spec.devices > 1 else None)
    return _drawn(built.init), built.meta_step, built.plain_step, _decided(config, built)


def _data(spec: Spec, config: config_lib.Config) -> Any:
    """Returns long-tailed data of blank images, in the form of `data.LongTailData`."""
    counts = longtail.class_counts(5000, spec.classes, config.data.imbalance_factor)
    shape = (spec.image_size, spec.image_size, 3)

    def images(number: int) -> np.ndarray:
        return np.broadcast_to(np.zeros((), np.uint8), (number, *shape))

    each = max(config.meta.images_per_class, -(-spec.meta_batch // spec.classes))
    meta, splits = each * spec.classes, {"train": counts.tolist(), "meta": [each] * spec.classes}
    return SimpleNamespace(
        manifest={
            "splits": {name: {"class_counts": of_each} for name, of_each in splits.items()},
            "meta_images_per_class": each,
        },
        train_images=images(counts.sum()),
        train_labels=np.repeat(np.arange(spec.classes, dtype=np.int32), counts),
        meta_images=images(meta),
        meta_labels=np.arange(meta, dtype=np.int32) % spec.classes,
        counts=counts,
        val_labels=np.zeros(0, np.int32),
        num_classes=spec.classes,
        class_names=tuple(map(str, range(spec.classes))),
        mean=np.full(3, 127.5, np.float32),
        std=np.full(3, 127.5, np.float32),
    )


def _decided(config: config_lib.Config, built: experiment.Experiment) -> dict[str, Any]:
    learns = built.meta_step is not None
    return {
        "sites": config.sites if learns else (),
        "every": config.meta.every if learns else 1,
        "lagged": config.meta.lagged,
        "virtual": config.meta.virtual,
        "bn": config.meta.bn,
    }


def _config(spec: Spec) -> config_lib.Config:
    source = importlib.util.spec_from_file_location("benchmark_config", spec.config)
    assert source, spec.config
    assert source.loader, spec.config
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    config = module.get_config()
    fixed = {
        "model.name": spec.model,
        "model.width": spec.width,
        "train.batch_size": spec.batch,
        "meta.batch_size": spec.meta_batch,
        "train.dtype": spec.dtype,
    }
    config.update_from_flattened_dict(fixed | dict(spec.overrides))
    return config_lib.resolve(config)


def _start(spec: Spec, config: config_lib.Config) -> tuple[experiment.Experiment, loop.LoopState, inputs.ResidentSet]:
    """Returns the experiment, its loop state and its data on the device, of all seeds; images are noise."""
    data, rng = _data(spec, config), np.random.default_rng(0)
    data.train_images, data.meta_images = (
        rng.integers(0, 256, images.shape, np.uint8) for images in (data.train_images, data.meta_images)
    )
    built = experiment.build(config, data)
    one = loop.initial(dataclasses.replace(built, init=lambda: _drawn(built.init)), config.train)
    order = rng.integers(0, len(data.train_labels), (built.steps_per_epoch, spec.batch), np.int32)
    table = np.arange(len(data.meta_labels), dtype=np.int32).reshape(-1, spec.classes).T
    resident = inputs.to_device(data).replace(order=jnp.asarray(order), meta_table=jnp.asarray(table))
    state = loop.stack([one] * spec.seeds)
    resident = inputs.stack([resident] * spec.seeds) if spec.seeds > 1 else resident
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return built, parallel.place(state, place), parallel.place(resident, place)


def _loop(spec: Spec) -> Program:
    """Training as `mfm_jax.main` runs it: its compiled call on resident data, sampling and augmentation included.

    `unit` steps have their whole share of meta-steps.
    """
    config = _config(spec)
    each = loop.steps_per_call(config)
    with TRACING, _form(spec):
        built, state, resident = _start(spec, config)
        decided = _decided(config, built)
        kinds = ("plain", "meta") if built.meta_step is not None else ("plain",)
        began = time.perf_counter()
        call, one = loop.make_call(built, config, spec.seeds), jax.device_put(np.int32(1))
        lowered = {kind: call.lower(state, resident, one, kind) for kind in kinds}
        traced = time.perf_counter() - began
    programs, facts = _compiled(lowered, traced)
    facts |= {"unit": decided["every"], "steps_per_call": each, "spec": decided}
    done = 0

    def run(steps: int) -> None:
        nonlocal state, done
        end = done + steps
        while done < end:
            kind, count = loop.next_steps(built, config, done, min(done + each, end))
            state = programs[kind](state, resident, jax.device_put(np.int32(count)))
            done += count
        jax.block_until_ready(state)

    def finish() -> dict[str, Any]:
        if not np.isfinite(losses := np.asarray(state.sums["loss"])).all():
            raise FloatingPointError(f"the sum of losses is {losses} after {done} steps")
        return {}

    return Program(run, finish, facts)


def _input(spec: Spec) -> Program:
    """What the loop does before each step: gather a batch of resident images, pad, crop, flip and normalise it."""
    settings, mean, std = config_lib.Augment(), jnp.zeros(3), jnp.ones(3)
    images = jnp.zeros((10_000, spec.image_size, spec.image_size, 3), jnp.uint8)
    index = jnp.arange(spec.batch, dtype=jnp.int32)

    @jax.jit
    def sample(key: jax.Array) -> jax.Array:
        pictures = augment.augment_batch(key, batches_lib.gather(images, index), settings)
        return augment.normalize(pictures, mean, std)

    began = time.perf_counter()
    jax.block_until_ready(sample(jax.random.key(0)))
    compile_seconds = time.perf_counter() - began

    def run(steps: int) -> None:
        jax.block_until_ready([sample(jax.random.key(0)) for _ in range(steps)])

    return Program(run, dict, {"compile_seconds": compile_seconds, "temp_mb": None, "spec": {}, **_device()})


def _matmul(spec: Spec) -> Program:
    """A square matrix product, the yardstick for shares of the device's rate: one step is one product.

    Each is multiplied by the same matrix again, whose eigenvalues are at most about one.
    """
    size = MATMUL_SIZE.get(jax.default_backend(), 8192)
    drawn = np.random.default_rng(0).random((size, size), np.float32) - np.float32(0.5)
    value = right = jnp.asarray(drawn * np.float32((12 / size) ** 0.5), jnp.dtype(spec.dtype))
    product = jax.jit(functools.partial(jnp.matmul, precision=spec.precision))

    def run(steps: int) -> None:
        nonlocal value
        for _ in range(steps):
            value = product(value, right)
        jax.block_until_ready(value)

    return Program(run, dict, {"spec": {"batch": size}, **_device()})


def _copy(spec: Spec) -> Program:
    """One addition to each element of a large array, the yardstick for bandwidth: one step reads and writes it once."""
    value = jnp.zeros(2**24 if jax.default_backend() == "cpu" else 2**28, jnp.dtype(spec.dtype))
    bytes_moved = 2.0 * value.nbytes
    add = jax.jit(lambda x: x + 1)

    def run(steps: int) -> None:
        nonlocal value
        for _ in range(steps):
            value = add(value)
        jax.block_until_ready(value)

    return Program(run, dict, {"bytes": bytes_moved, "spec": {}, **_device()})
