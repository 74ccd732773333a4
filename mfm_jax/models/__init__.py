"""Classifiers. Each exposes its sites by calling `modulate(site, features)` on the way."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from mfm_jax.models.normalization import BatchNorm as BatchNorm
from mfm_jax.models.resnet import CifarResNet

# 6 n + 2 layers: n blocks in each of three stages.
_BLOCKS = {"resnet8": 1, "resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}

# Top-level parameter groups that take part in the virtual step, by `meta.virtual`.
VIRTUAL_GROUPS: dict[str, tuple[str, ...]] = {"head": ("head",), "last_stage": ("stage3", "head")}


def create(name: str, num_classes: int, width: int, dtype: DTypeLike = jnp.float32) -> CifarResNet:
    """Returns the classifier called `name`."""
    return CifarResNet(_BLOCKS[name], num_classes, width or 16, dtype)
