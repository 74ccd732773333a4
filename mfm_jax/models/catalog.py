"""Classifiers. Each exposes its sites by calling `modulate(site, features)` on the way."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from mfm_jax.errors import UserError
from mfm_jax.models.densenet import DenseNet
from mfm_jax.models.efficientnet import EfficientNet
from mfm_jax.models.imagenet import ResNet
from mfm_jax.models.resnet import CifarResNet
from mfm_jax.models.vit import CLIP, DINOV2, DINOV2_REGISTERS, Tower, VisionTransformer
from mfm_jax.models.wide_resnet import WideResNet

# 6 n + 2 layers: n blocks in each of three stages.
_BLOCKS = {"resnet8": 1, "resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}
# Blocks in each of four stages; whether they are bottlenecks; groups of their 3x3 convolution.
_IMAGENET = {
    "resnet10": ((1, 1, 1, 1), False, 1),
    "resnet18": ((2, 2, 2, 2), False, 1),
    "resnet34": ((3, 4, 6, 3), False, 1),
    "resnet50": ((3, 4, 6, 3), True, 1),
    "resnet101": ((3, 4, 23, 3), True, 1),
    "resnet152": ((3, 8, 36, 3), True, 1),
    "resnext50": ((3, 4, 6, 3), True, 32),
}
# Pixels a side of a patch; in what it differs.
_VITS = {
    "vit_b16": (16, Tower()),
    "clip_vit_b16": (16, CLIP),
    "dinov2_vit_b14": (14, DINOV2),
    "dinov2_reg_vit_b14": (14, DINOV2_REGISTERS),
}
# The last groups of parameters below the head.
_LAST = {
    **dict.fromkeys(_BLOCKS, ("stage3",)),
    **dict.fromkeys(_IMAGENET, ("stage4",)),
    "wrn28_10": ("stage3", "norm"),
    "densenet_bc100": ("stage3",),
    "efficientnet_b0": ("stage7", "top", "top_norm"),
    **dict.fromkeys(_VITS, ("block12", "norm")),
    "clip_vit_b16": ("block12", "norm", "visual_projection"),
}


def create(
    name: str,
    num_classes: int,
    width: int,
    dtype: DTypeLike = jnp.float32,
    *,
    remat: bool = False,
    adapter_size: int = 0,
    lora_rank: int = 0,
) -> nn.Module:
    """Returns the classifier called `name`.

    Args:
      name: as `config.Model.name` lists them.
      num_classes: K.
      width: channels of the stem, or of a token; 0 for the published number.
      dtype: of the computation.
      remat: compute activations again in the backward pass.
      adapter_size: hidden units of the adapters of a ViT; 0 for none.
      lora_rank: of the LoRA of a ViT; 0 for none.

    Raises:
      UserError: a width that does not divide into the model's groups or heads, or is no multiple of what it rounds to.
    """
    if name in _BLOCKS:
        return CifarResNet(_BLOCKS[name], num_classes, width or 16, dtype=dtype, remat=remat)
    if name in _IMAGENET:
        blocks, bottleneck, groups = _IMAGENET[name]
        _check_width(name, width, groups // 2)
        return ResNet(blocks, num_classes, width or 64, bottleneck, groups, dtype=dtype, remat=remat)
    if name == "wrn28_10":
        return WideResNet(4, num_classes, width or 16, dtype=dtype, remat=remat)
    if name == "densenet_bc100":
        _check_width(name, width, 2)
        return DenseNet(16, num_classes, width or 24, dtype=dtype, remat=remat)
    if name == "efficientnet_b0":
        _check_width(name, width, 8)
        return EfficientNet(num_classes, width or 32, dtype=dtype, remat=remat)
    _check_width(name, width if width >= 64 else 0, 64)
    patch, tower = _VITS[name]
    tuning: dict[str, Any] = {"adapter_size": adapter_size, "lora_rank": lora_rank}
    return VisionTransformer(num_classes, width or 768, 12, patch, dtype=dtype, remat=remat, tower=tower, **tuning)


def _check_width(name: str, width: int, unit: int) -> None:
    if unit and width % unit:
        raise UserError(f"model.width = {width}: {name} divides its channels; choose a multiple of {unit}, or 0")


def virtual_groups(name: str, virtual: str) -> tuple[str, ...] | None:
    """Returns the top-level parameter groups of the model `name` that `meta.virtual` moves; None for all."""
    return {"all": None, "head": ("head",), "last_stage": (*_LAST.get(name, ()), "head")}[virtual]
