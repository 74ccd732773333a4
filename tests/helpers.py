"""What several test files build: a tiny network, configs, states as numbers, pictures, folders, a run's files."""

import atexit
import contextlib
import dataclasses
import functools
import importlib
import io
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from own_parts import Tiny
from PIL import Image

from mfm_jax import config as config_lib
from mfm_jax import models
from mfm_jax.bilevel import modulation
from mfm_jax.config import Checkpoint
from mfm_jax.data.listing import Listing
from mfm_jax.evaluation import gallery, metrics
from mfm_jax.models.convolution import convolution
from mfm_jax.types import BilevelState, no_modulation

STRANGE_NAMES = ["<b>bold</b>", 'quo"te & co', "$\\notmath$", "猫"]
REPOSITORY = Path(__file__).parents[1]


class Small(nn.Module):
    """Two convolutions with batch norm, and a head: what a residual network has, and compiled several times faster."""

    num_classes: int
    width: int
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image, *, train=False, modulate=no_modulation, weight=None):
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), dtype=self.dtype, conv_general_dilated=convolution)
        norm = functools.partial(models.BatchNorm, not train, axis_name=self.axis_name, dtype=self.dtype)
        x = modulate("stem", nn.relu(norm()(conv(self.width, name="stem")(image), weight)))
        x = modulate("stage1", nn.relu(norm()(conv(2 * self.width, strides=2, name="stage1")(x), weight)))
        x = modulate("pooled", x.mean((1, 2)))
        return modulate("logits", nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x))


@contextlib.contextmanager
def quick_runs() -> Iterator[None]:
    """Has runs train a network of two layers on one of the fake devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        patch.setattr(models, "create", lambda name, classes, width, dtype, **_: Tiny(classes, dtype))
        yield


def overridden(config, **overrides):
    """Returns `config`, a `ConfigDict`, with fields set as `group__field=value`."""
    for path, value in overrides.items():
        group, field = path.split("__")
        config[group][field] = value
    return config


def tiny(**overrides):
    """Returns the config of a run of a few seconds, a `ConfigDict`; overrides as `group__field=value`."""
    config = config_lib.default()
    config.data.update(source="digits", name="digits", imbalance_factor=10.0, val_images_per_class=5)
    config.augment.update(pad=1, flip=False)
    config.model.update(name="resnet8", width=4)
    config.meta.batch_size = 20
    config.optim.learning_rate = 0.05
    config.train.update(epochs=2, batch_size=64)
    return overridden(config, **overrides)


def changed(config, **groups):
    """Returns `config`, a resolved one, with fields changed as `group={field: value}`."""
    return dataclasses.replace(config, **{g: dataclasses.replace(getattr(config, g), **v) for g, v in groups.items()})


def shift(config, counts, channels):
    """A meta learner of the user's own: gamma and beta of each class's logit."""
    return modulation.direct({"logits": channels["logits"]})


# What the methods that read a part of the user's own are tested with.
OWN = {"own_loss": {"loss": "mfm_jax.bilevel.losses:cross_entropy"}, "own_learner": {"learner": "helpers:shift"}}


@functools.cache
def teacher() -> Path:
    """Returns the folder of a finished run on the digits of `configured`, made once a process: what others learn from.

    Its classifier is modulated while it is trained.
    """
    from mfm_jax.training import train

    folder = Path(tempfile.mkdtemp()) / "teacher"
    atexit.register(shutil.rmtree, folder.parent)
    with quick_runs(), contextlib.redirect_stderr(io.StringIO()):
        config = configured("mfm", model__name="own_parts:Tiny", model__width=0, train__epochs=1)
        train.train_and_evaluate(config, folder, pages=False)
    return folder


def configured(name: str, **overrides):
    """Returns the config of two epochs of two steps; a second stage, and deferred weights, have the second epoch."""
    config = tiny(data__imbalance_factor=100.0, data__val_images_per_class=0, train__batch_size=100)
    config.method.update(name=name, first_stage=0.5, **OWN.get(name, {}))
    if name == "tgeo_kd":
        config.method.teacher = str(teacher())
    config.meta.update(batch_size=40, every=2, lagged=name != "l2rw")
    return config_lib.resolve(overridden(config, **overrides))


def png(rows: list[bytes], width: int, depth: int, color: int, **chunks: bytes) -> bytes:
    """Returns a PNG file from its raw rows and further `chunks`: kinds that Pillow reads but does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, color, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    further = b"".join(chunk(kind.encode(), content) for kind, content in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + further + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def file_of(picture: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """Returns the content of a picture's file."""
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, kind, **options)
    return buffer.getvalue()


def shipped(name: str):
    """Returns the content of `configs/NAME.py`."""
    return runpy.run_path(str(REPOSITORY / "configs" / f"{name}.py"))["get_config"]()


@contextlib.contextmanager
def stopped_at(number: int) -> Iterator[list[Any]]:
    """Has SIGTERM precede the call of that number, from 1, of each run's compiled steps; yields what is compiled."""
    from mfm_jax.training import loop as loop_lib

    make_call, made = loop_lib.make_call, []

    def make(*built: Any) -> Any:
        compiled, numbers = make_call(*built), itertools.count(1)
        made.append(compiled)

        def call(*arguments: Any) -> Any:
            if next(numbers) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return compiled(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_lib, "make_call", make)
        yield made


def to_double(tree: Any) -> Any:
    """Returns `tree` with its floating-point arrays in float64."""
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def slow(*values: Any) -> Any:
    """Returns a case of a matrix that the slow tier alone has."""
    return pytest.param(*values, marks=pytest.mark.slow)


def logged(workdir: Path) -> list[dict[str, Any]]:
    """Returns the metric rows in a run's folder."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def stored(workdir: Path) -> BilevelState:
    """Returns what the last checkpoint of a run has of its classifier, as numbers."""
    from mfm_jax.workdir import checkpoint
    from mfm_jax.workdir.files import Workdir

    with checkpoint.reading(Workdir(workdir), Checkpoint()) as (checkpoints, step):
        return arrays(checkpoints.restore_tested(step)[0])


def environment(devices: int = 1) -> dict[str, str]:
    """Returns that of a process with so many devices, the `python` of these tests, this package and what lies here."""
    flags = re.sub(r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    modules = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"XLA_FLAGS": flags, "PATH": path, "PYTHONPATH": modules}


def arrays(tree: Any) -> Any:
    """Returns `tree` with its PRNG keys as numbers, on the host."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.device_get(jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree))


def tree(root: Path, *files: str) -> Path:
    """Makes empty files, and returns `root`."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def written(root: Path, text: str | bytes, name: str = "train.txt") -> dict[str, Path]:
    """Writes a list file, and returns the argument of `listing.lists` that names it."""
    (root / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return {"train": root / name}


def listed(found: Listing) -> list[tuple[str, str, str]]:
    """Returns path, class and split of each picture of a listing."""
    return [
        (path, found.class_names[label], str(split))
        for path, label, split in zip(found.paths, found.labels, found.splits, strict=True)
    ]


def write_run(
    workdir: Path,
    classes: int = 10,
    *,
    best: bool = True,
    trained: bool = True,
    modulated: bool = True,
    channels: int = 64,
    images: int = 40,
) -> dict[str, Any]:
    """Writes the files of a finished run with plausible values; returns its results."""
    rng = np.random.default_rng(0)
    counts = [int(5000 * 0.01 ** (c / (classes - 1))) for c in range(classes)]
    names = (STRANGE_NAMES + [f"a class of the name {c}" for c in range(classes)])[:classes]

    def evaluation(skill: float) -> dict[str, Any]:
        labels = np.repeat(np.arange(classes), images)
        logits = rng.normal(size=(len(labels), classes)) + skill * np.eye(classes)[labels] + 0.2 * np.log(counts)
        probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        return metrics.evaluate(probs.astype(np.float32), labels, np.array(counts))

    rows: list[dict[str, Any]] = []
    for step in range(100, 4001, 100) if trained else ():
        loss = 2.3 * np.exp(-step / 1500) + 0.05 * rng.random()
        train = {"loss": loss, "accuracy": 1 - loss / 3, "learning_rate": 0.1, "meta_loss": loss + 0.3}
        learned = {"hypergrad_norm": 0.01, "hypergrad_agreement": 0.3}
        rows.append({"kind": "train", "step": step, "epoch": step // 400, **train, **learned})
        if step % 400 == 0:
            value = 0.6 - loss / 5
            scores = {"balanced_accuracy": value, "accuracy": value, "nll": loss + 0.5}
            rows.append({"kind": "val", "step": step, "epoch": step // 400, **scores})
    for step in range(400, 4001, 400) if modulated else ():
        direct = {"gamma": (step * 1e-4 * rng.normal(size=channels)).tolist(), "beta": [step * 1e-4] * channels}
        logits = {"gamma": [0.0] * classes, "beta": (step * 1e-4 * np.linspace(0, -1, classes)).tolist()}
        sites = {"pooled": direct, "logits": logits}
        rows.append({"kind": "modulation", "step": step, "epoch": step // 400, "sites": sites})

    warnings = {"a": "<a>; look at x", "b": "<b>; look at x"} if trained and modulated else {}
    told = [{"code": code, "sentence": sentence} for code, sentence in warnings.items()]
    rows += [{"kind": "warning", "step": 4000, "epoch": 10, **one} for one in told]

    results = {
        "method": "mfm",
        "split": "test",
        "seed": 3,
        "last": {"step": 4000, "epoch": 10, "test": evaluation(2.6), "val": evaluation(2.5)},
        "best": {"step": 3200, "epoch": 8, "test": evaluation(2.7), "val": evaluation(2.8)} if best else None,
        "versions": {"jax": "0.10.2", "mfm_jax": "0.1.0", "devices": "1 x cpu", "convolutions": "native"},
        "train_seconds": 1234.5,
        "provenance": {"date": "2026-01-02 03:04:05+00:00", "command": "python -m mfm_jax.main", "commit": "0123abc"},
    }
    manifest = {
        "dataset": "cifar10",
        "version": "3.0.2",
        "protocol": "meta_held_out",
        "imbalance_factor": 100,
        "seed": 7,
        "class_names": names,
        "splits": {
            "train": {"pool": "train", "class_counts": counts, "ids": []},
            "test": {"pool": "test", "class_counts": [images] * classes, "ids": []},
        },
        "hash": "sha256:0123abcd",
    }
    config = {"method": "mfm", "data": {"name": "cifar10"}, "meta": {"loss": "ce"}}
    config["note"] = "</pre><script>alert(1)</script>"
    for name, value in (("config", config), ("manifest", manifest), ("results", results)):
        (workdir / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    wrong = np.array([classes - 1, classes - 1, 0])
    pictures = rng.integers(0, 255, (3, 8, 8, 3), np.uint8)
    shown = gallery.Gallery(pictures, np.array([classes - 1, classes - 2, 1]), wrong, np.array([0.9, 0.8, 0.7]))
    np.savez(workdir / "gallery.npz", **shown._asdict())
    (workdir / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return results


@contextlib.contextmanager
def benchmark(name: str) -> Iterator[ModuleType]:
    """Gives the module of the script `benchmarks/NAME.py`; its neighbours can be imported meanwhile."""
    importlib.import_module("mfm_jax.main")  # whose flags must not be those of the script
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(REPOSITORY / "benchmarks"))
