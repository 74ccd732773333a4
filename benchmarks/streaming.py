"""Does the device wait for pictures? Decoding by itself, and a ResNet-50 at 224 pixels fed by worker processes.

    python benchmarks/streaming.py --workers=2 --batch_size=16 --steps=12

Makes JPEGs of 500 x 375 pixels, times what becomes of one of them (in this process: milliseconds a picture; in worker
processes: pictures a second), and trains with `data.resident_mb=0` and `augment.crop=resized`. What is printed last is
the part of the training time, validation apart, in which the loop waited for pictures; the first steps, with the start
of the processes, are in it, compilation is not. There are pictures enough for one epoch of all the steps.
"""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from PIL import Image

from mfm_jax import config as config_lib
from mfm_jax.data import augment, pictures, streaming
from mfm_jax.training import train

_WORKERS = flags.DEFINE_integer("workers", 2, "Processes that decode.")
_BATCH = flags.DEFINE_integer("batch_size", 16, "Pictures in a batch.")
_STEPS = flags.DEFINE_integer("steps", 12, "Steps of training, a quarter of which are meta-steps.")
_MODEL = flags.DEFINE_string("model", "resnet50", "The network.")

SIDE, WHOLE, CLASSES = 224, 256, 4
_STARTED = 20  # batches, after which every process has started


def main(argv: Sequence[str]) -> None:
    del argv
    logging.set_verbosity(logging.FATAL)  # Orbax tells every step of every save
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "pictures"
        paths = make(root, max(60 * CLASSES, 2 * _STEPS.value * _BATCH.value))
        for what, milliseconds in one_by_one(paths[:40]).items():
            print(f"{what:<58}{milliseconds:8.2f} ms a picture")
        for workers in dict.fromkeys((0, 1, _WORKERS.value)):
            print(f"decoded in {workers} worker processes{'':<33}{rate(root, paths, workers):8.0f} pictures a second")
        results, seconds = trained(root, Path(name) / "run")
    print(f"{_MODEL.value} at {SIDE}, batch {_BATCH.value}: {seconds:.2f} s a step", end=", ")
    print(f"{results['input_wait']:.1%} of it spent waiting for pictures")


def make(root: Path, count: int) -> list[Path]:
    """Returns the paths of `count` JPEGs of 500 x 375 pixels with the detail of photographs, in class folders."""
    rng, paths = np.random.default_rng(0), []
    for i in range(count):
        path = root / f"class{i % CLASSES}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        coarse = blocks.resize((500, 375), Image.Resampling.BICUBIC)
        noise = rng.normal(0, 6, (375, 500, 3))
        Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)).save(path, quality=90)
        paths.append(path)
    return paths


def one_by_one(paths: Sequence[Path]) -> dict[str, float]:
    """Returns milliseconds a picture of each way to make a training picture of it."""
    rng = np.random.default_rng(0)
    whole = np.stack([pictures.read(path, WHOLE, 3, "crop") for path in paths])
    boxes = jnp.asarray(rng.uniform(0, 16, (len(paths), 2)), jnp.float32)
    part = jax.jit(jax.vmap(_part))
    jitter = jax.jit(jax.vmap(lambda key, image: augment.color_jitter(key, image, 0.4)))
    keys = jax.random.split(jax.random.key(0), len(paths))
    return {
        f"decode a random part, scaled to {SIDE}": _each(lambda p: pictures.read_part(p, SIDE, 3, rng, 0.08), paths),
        f"decode the whole, scaled to {WHOLE}": _each(lambda p: pictures.read(p, WHOLE, 3, "crop"), paths),
        f"random part of {WHOLE}, scaled to {SIDE}, on the device": _together(lambda: part(whole, boxes), len(paths)),
        "colour jitter on the device": _together(lambda: jitter(keys, whole[:, :SIDE, :SIDE]), len(paths)),
    }


def _part(image: jax.Array, corner: jax.Array) -> jax.Array:
    scale = jnp.full(2, SIDE / (WHOLE - 16.0))
    shape = (SIDE, SIDE, 3)
    return jax.image.scale_and_translate(image.astype(jnp.float32), shape, (0, 1), scale, -corner * scale, "linear")


def _each(function: Callable[[Path], object], paths: Sequence[Path]) -> float:
    began = time.perf_counter()
    for path in paths:
        function(path)
    return 1e3 * (time.perf_counter() - began) / len(paths)


def _together(function: Callable[[], jax.Array], count: int) -> float:
    function().block_until_ready()
    began = time.perf_counter()
    function().block_until_ready()
    return 1e3 * (time.perf_counter() - began) / count


def rate(root: Path, paths: Sequence[Path], workers: int) -> float:
    """Returns pictures a second, random parts, once all processes have started."""
    names = streaming.paths([str(path.relative_to(root)) for path in paths])
    files = streaming.Files(root, names, SIDE, 3, "crop", pictures.WHITE, np.zeros(len(names), "S64"))
    order = list(np.random.default_rng(0).integers(0, len(paths), (_STARTED + 80, _BATCH.value)))
    picks = streaming.Picks(files, order, streaming.RandomPart(0.08, (0,), np.arange(_BATCH.value)))
    with contextlib.closing(streaming.stream([picks], workers=workers)) as steps:
        for _ in range(_STARTED):
            next(steps)
        began = time.perf_counter()
        for _ in steps:
            pass
    return (len(order) - _STARTED) * _BATCH.value / (time.perf_counter() - began)


def trained(root: Path, workdir: Path) -> tuple[dict, float]:
    """Returns the results of a short run, and its seconds a step; a run before it compiles."""
    for _ in range(2):
        config = config_lib.default()
        config.data.update(source="folder", root=str(root), protocol="natural", imbalance_factor=1.0, image_size=SIDE)
        config.data.update(resident_mb=0, workers=_WORKERS.value)
        config.augment.update(crop="resized", color_jitter=0.4)
        config.model.name = _MODEL.value
        config.meta.update(batch_size=_BATCH.value, every=4)
        config.train.update(batch_size=_BATCH.value, max_steps=_STEPS.value, epochs=10)
        config.eval.batch_size = _BATCH.value
        workdir = workdir.with_name(workdir.name + "_")
        with contextlib.redirect_stdout(io.StringIO()):
            results = train.train_and_evaluate(config, workdir)
    return results, results["train_seconds"] / _STEPS.value


if __name__ == "__main__":
    app.run(main)
