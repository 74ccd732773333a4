"""EfficientNet (Tan and Le 2019), as torchvision builds it, with named sites for the modulation.

Sites, in order: `stem`, `stage1` to `stage7` (after each stage's last block), `pooled` (after the last convolution and
global average pooling), `logits`. Dropout and stochastic depth, which the paper trains with, are left out.

Depthwise convolutions are XLA's own: the project's kernels have no groups.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from mfm_jax.models import layers
from mfm_jax.models.convolution import convolution
from mfm_jax.models.normalization import BatchNorm
from mfm_jax.types import Modulate, no_modulation

_kaiming = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Plan(NamedTuple):
    """One stage: blocks, their kernel, the first one's stride, channels, and how much wider they are inside."""

    blocks: int
    kernel: int
    stride: int
    channels: int
    expand: int


B0 = (
    Plan(1, 3, 1, 16, 1),
    Plan(2, 3, 2, 24, 6),
    Plan(2, 5, 2, 40, 6),
    Plan(3, 3, 2, 80, 6),
    Plan(3, 5, 1, 112, 6),
    Plan(4, 5, 2, 192, 6),
    Plan(1, 3, 1, 320, 6),
)
WIDTH, TOP = 32, 1280  # of B0: channels of the stem and of the last convolution


def scaled(channels: int, width: int) -> int:
    """Returns the channels of a network whose stem has `width`: a multiple of 8, and nine tenths of the share at least.

    References:
      Tan and Le, EfficientNet: rethinking model scaling for convolutional neural networks, ICML 2019; the rounding is
      that of their code.
    """
    wanted = channels * width / WIDTH
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * wanted else rounded + 8


class Block(nn.Module):
    """An inverted bottleneck: expand, a depthwise convolution, squeeze and excitation, project; with the input added.

    Attributes:
      channels: that it puts out.
      stride: of the depthwise convolution.
      kernel: its size.
      expand: how many times wider than the input it is inside.
    """

    channels: int
    stride: int
    kernel: int
    expand: int
    dtype: DTypeLike
    norm: functools.partial[BatchNorm]  # batch norm but for whether it trains

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, weight: jax.Array | None) -> jax.Array:
        norm, inputs = functools.partial(self.norm, not train), x.shape[-1]
        conv = functools.partial(layers.conv, kernel_init=_kaiming, dtype=self.dtype)
        inner, y = inputs * self.expand, x
        if self.expand > 1:
            y = nn.silu(norm(name="expand_norm")(conv(inner, 1, name="expand")(y), weight))
        # Each channel for itself: its fan-in is the kernel alone.
        depthwise = conv(inner, self.kernel, self.stride, inner, kernel_init=layers.kaiming, name="depthwise")
        y = nn.silu(norm(name="depthwise_norm")(depthwise(y), weight))
        y = y * self._gate(y, max(inputs // 4, 1))
        y = norm(name="project_norm")(conv(self.channels, 1, name="project")(y), weight)
        return x + y if x.shape == y.shape else y

    def _gate(self, y: jax.Array, squeezed: int) -> jax.Array:
        """Returns what each channel of each image is multiplied by, `[B, 1, 1, C]` (Hu et al., CVPR 2018)."""
        dense = functools.partial(
            nn.Conv, kernel_size=(1, 1), kernel_init=_kaiming, conv_general_dilated=convolution, dtype=self.dtype
        )
        squeeze = nn.silu(dense(squeezed, name="squeeze")(y.mean(axis=(1, 2), keepdims=True)))
        return nn.sigmoid(dense(y.shape[-1], name="excite")(squeeze))


class EfficientNet(layers.Network):
    """EfficientNet: a stem of stride 2, stages of inverted bottlenecks, a last convolution `top`, a head.

    Attributes:
      num_classes: K.
      width: channels of the stem; the others are `scaled` by it.
      stages: B0's, or others.

    References:
      Tan and Le, EfficientNet: rethinking model scaling for convolutional neural networks, ICML 2019, table 1.
    """

    num_classes: int
    width: int = WIDTH
    stages: tuple[Plan, ...] = B0

    @nn.compact
    def __call__(
        self,
        image: jax.Array,
        *,
        train: bool = False,
        modulate: Modulate = no_modulation,
        weight: jax.Array | None = None,
    ) -> jax.Array:
        """Returns logits `[B, K]`; arguments as `resnet.CifarResNet` has them."""
        norm = self.batch_norm
        conv = functools.partial(layers.conv, kernel_init=_kaiming, dtype=self.dtype)
        kind = nn.remat(Block, static_argnums=2) if self.remat else Block
        x = conv(self.width, 3, 2, name="stem")(image.astype(self.dtype))
        x = modulate("stem", nn.silu(norm(not train, name="stem_norm")(x, weight)))
        for i, plan in enumerate(self.stages):
            site = f"stage{i + 1}"
            block = functools.partial(
                kind,
                scaled(plan.channels, self.width),
                kernel=plan.kernel,
                expand=plan.expand,
                dtype=self.dtype,
                norm=norm,
            )
            x = modulate(site, layers.Stage(plan.blocks, plan.blocks, block, plan.stride, name=site)(x, train, weight))
        x = conv(scaled(TOP, self.width), 1, name="top")(x)
        x = modulate("pooled", nn.silu(norm(not train, name="top_norm")(x, weight)).mean(axis=(1, 2)))
        return layers.head(self.num_classes, x, modulate, self.dtype)
