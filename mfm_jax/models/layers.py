"""What the convolutional networks have in common: a convolution, a stage of equal blocks, a head."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mfm_jax.models import stacked
from mfm_jax.models.convolution import convolution
from mfm_jax.models.normalization import BatchNorm
from mfm_jax.types import Modulate

kaiming = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def conv(
    channels: int, kernel: int, stride: int = 1, groups: int = 1, *, kernel_init: Any = kaiming, **options: Any
) -> nn.Conv:
    """Returns a square convolution without bias, padded as PyTorch pads (`SAME` differs at stride 2).

    One with groups is XLA's own: the project's kernels have none.
    """
    return nn.Conv(
        channels,
        (kernel, kernel),
        stride,
        padding=kernel // 2,
        feature_group_count=groups,
        use_bias=False,
        kernel_init=kernel_init,
        conv_general_dilated=convolution if groups == 1 else jax.lax.conv_general_dilated,
        **options,
    )


class Network(nn.Module, kw_only=True):
    """A classifier with named sites; `__call__` is that of `resnet.CifarResNet`.

    Attributes:
      dtype: of the computation; parameters, batch-norm statistics and logits are float32 (or wider).
      axis_name: mesh axis over which batch norm averages its statistics; None keeps them local.
      remat: keep only the blocks' inputs for the backward pass and compute the rest again.
      scan_blocks: one scanned body for a stage's equal blocks, whose variables are `stacked`; not where none are equal.
    """

    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None
    remat: bool = False
    scan_blocks: bool = False

    @property
    def batch_norm(self) -> functools.partial[BatchNorm]:
        """Batch norm but for whether it trains."""
        return functools.partial(BatchNorm, axis_name=self.axis_name, dtype=self.dtype)


class Stage(nn.Module):
    """`blocks` blocks, the first with the stride, named `called` and a number; `alone` as in `stacked.through`."""

    blocks: int
    alone: int
    block: Callable[..., nn.Module]
    stride: int
    called: str = "block"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, weight: jax.Array | None) -> jax.Array:
        def block(i: int) -> nn.Module:
            return self.block(stride=self.stride if i == 0 else 1, name=f"{self.called}{i}")

        return stacked.through(block, self.blocks, self.alone, x, train, weight)


def head(num_classes: int, x: jax.Array, modulate: Modulate, dtype: DTypeLike, **options: Any) -> jax.Array:
    """Returns the logits `[B, K]`, float32 or wider, of a layer `head` on features `[B, C]`, modulated at `logits`."""
    logits = nn.Dense(num_classes, dtype=dtype, name="head", **options)(x)
    return modulate("logits", logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
