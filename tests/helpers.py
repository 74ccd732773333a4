"""What several test files build: a tiny network, configs with fields set, states as numbers, pictures, benchmarks."""

import contextlib
import dataclasses
import importlib
import runpy
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mfm_jax import config as config_lib
from mfm_jax import models
from mfm_jax.data.listing import Listing
from mfm_jax.types import no_modulation

REPOSITORY = Path(__file__).parents[1]


class Tiny(nn.Module):
    """A layer, batch norm and a head, with the sites that every method may ask for."""

    num_classes: int
    dtype: jnp.dtype
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image, *, train: bool = False, modulate=no_modulation, weight=None):
        x = image.reshape(len(image), -1).astype(self.dtype)
        x = nn.Dense(8, dtype=self.dtype, name="stage3")(x)
        x = models.BatchNorm(not train, axis_name=self.axis_name, dtype=self.dtype)(x, weight)
        x = modulate("pooled", modulate("stage3", nn.relu(x)))
        logits = nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)
        return modulate("logits", logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))


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


def configured(name: str, **overrides):
    """Returns the config of two epochs of two steps; a second stage, and deferred weights, have the second epoch."""
    config = tiny(data__imbalance_factor=100.0, data__val_images_per_class=0, train__batch_size=100)
    config.method.update(name=name, first_stage=0.5)
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


def shipped(name: str):
    """Returns the content of `configs/NAME.py`."""
    return runpy.run_path(str(REPOSITORY / "configs" / f"{name}.py"))["get_config"]()


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


@contextlib.contextmanager
def benchmark(name: str) -> Iterator[ModuleType]:
    """Gives the module of the script `benchmarks/NAME.py`; its neighbours can be imported meanwhile."""
    importlib.import_module("mfm_jax.main")  # whose flags must not be those of the script
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(REPOSITORY / "benchmarks"))
