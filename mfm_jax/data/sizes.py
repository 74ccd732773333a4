"""Batch sizes that the data cannot fill: what is the most, and the config with no more than that."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mfm_jax.config import Config

FIELDS = frozenset({"train.batch_size", "meta.batch_size"})


def limits(config: Config, manifest: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Returns, by field, the most images that a batch can have without repeats, and what they are in words.

    The meta set is read by methods that learn from it alone: of each class as many images as its smallest class has.
    """
    train, meta = (manifest["splits"][name]["class_counts"] for name in ("train", "meta"))
    found = {"train.batch_size": (sum(train), "training images")}
    if config.method.meta_learned and not config.meta.freeze:
        each = min(manifest["meta_images_per_class"], *meta)
        found["meta.batch_size"] = (each * len(meta), "images in the meta set")
    return found


def cut(config: Config, manifest: Mapping[str, Any]) -> Config:
    """Returns `config`, no batch size above its limit; a cut one is a multiple of `train.accumulate` where it can be.

    Args:
      config: as asked for.
      manifest: of the split that it trains on.
    """
    parts = config.train.accumulate
    for field, (most, _) in limits(config, manifest).items():
        name = field.partition(".")[0]
        group = getattr(config, name)
        if group.batch_size > most:
            smaller = dataclasses.replace(group, batch_size=most - most % parts or most)
            config = dataclasses.replace(config, **{name: smaller})
    return config


def told(config: Config, manifest: Mapping[str, Any]) -> str:
    """Returns one line on the sizes of `config` that are cut, "" where none is."""
    fitting = cut(config, manifest).to_dict()
    asked = config.to_dict()
    lines = []
    for field, (most, what) in limits(config, manifest).items():
        size, used = (fields[field.partition(".")[0]]["batch_size"] for fields in (asked, fitting))
        if size != used:
            lines.append(f"{field} = {size}: there are {most} {what}; {used} is used")
    return "; ".join(lines)
