"""Batch sizes that the data cannot fill: what is the most, and the config with no more than that."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from mfm_jax.config import Config

FIELDS = frozenset({"train.batch_size", "meta.batch_size"})


def limits(config: Config, manifest: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Returns, by field, the most images that a batch can have without repeats, and what they are in words.

    The meta set is read by methods that learn from it alone: of each class as many images as its smallest class has.
    """
    train, meta = (manifest["splits"][name]["class_counts"] for name in ("train", "meta"))
    found = {"train.batch_size": (sum(train), "training images")}
    if config.method.meta_learned and not config.frozen:
        each = min(manifest["meta_images_per_class"], *meta)
        found["meta.batch_size"] = (each * len(meta), "images in the meta set")
    return found


def too_large(config: Config, manifest: Mapping[str, Any]) -> Iterator[tuple[str, int, str]]:
    """Yields each field with a size above its limit, the limit, and both in words."""
    for field, (most, what) in limits(config, manifest).items():
        if (size := of(config, field)) > most:
            yield field, most, f"{field} = {size}: there are {most} {what}"


def of(config: Config, field: str) -> int:
    """Returns the batch size that `config` has in `field`, `group.batch_size`."""
    return getattr(config, field.partition(".")[0]).batch_size


def cut(config: Config, manifest: Mapping[str, Any]) -> Config:
    """Returns `config`, no batch size above its limit; a cut one is a multiple of `train.accumulate` where it can be.

    Args:
      config: as asked for.
      manifest: of the split that it trains on.
    """
    parts = config.train.accumulate
    for field, most, _ in too_large(config, manifest):
        name = field.partition(".")[0]
        smaller = dataclasses.replace(getattr(config, name), batch_size=most - most % parts or most)
        config = dataclasses.replace(config, **{name: smaller})
    return config


def in_words(config: Config, manifest: Mapping[str, Any]) -> str:
    """Returns one line on the sizes of `config` that are cut, "" where none is."""
    fitting = cut(config, manifest)
    return "; ".join(f"{what}; {of(fitting, field)} is used" for field, _, what in too_large(config, manifest))
