"""ResNets and ResNeXt for large images (He et al. 2016; Xie et al. 2017), as torchvision and timm build them.

Sites, in order: `stem` (after the stem's max-pooling), `stage1` to `stage4` (after each stage's last ReLU), `pooled`
(after global average pooling), `logits`. Unlike the networks for small images these begin with a 7x7 convolution of
stride 2 and max-pooling; shortcuts project where the shape changes (option B of He et al.), and the stride of a
bottleneck sits in its 3x3 convolution (version 1.5).
"""

import functools

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from mfm_jax.models import layers
from mfm_jax.models.normalization import BatchNorm
from mfm_jax.types import Modulate, no_modulation


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1, beside a shortcut.

    It starts as its shortcut alone: the scale of its last norm is zero. Otherwise each block adds as much variance as
    it is given, gradients grow with every block, and in a ResNet-50 the first ones are mostly rounding.

    Attributes:
      channels: of the 3x3 convolutions of a plain block; a bottleneck puts out four times as many.
      stride: of the first 3x3 convolution, and of the shortcut.
      bottleneck: which of the two.
      groups: of the bottleneck's 3x3 convolution; with more than one it is twice as wide (ResNeXt 32x4d).

    References:
      Goyal et al., Accurate, large minibatch SGD: training ImageNet in 1 hour, arXiv:1706.02677, 2017, section 5.1.
    """

    channels: int
    stride: int
    bottleneck: bool
    groups: int
    dtype: DTypeLike
    norm: functools.partial[BatchNorm]  # batch norm but for whether it trains

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, weight: jax.Array | None) -> jax.Array:
        conv = functools.partial(layers.conv, dtype=self.dtype)
        norm = functools.partial(self.norm, not train)
        last = functools.partial(norm, scale_init=nn.initializers.zeros)
        if self.bottleneck:
            inner, outer = self.channels * (2 if self.groups > 1 else 1), 4 * self.channels
            y = nn.relu(norm(name="norm1")(conv(inner, 1, name="conv1")(x), weight))
            y = nn.relu(norm(name="norm2")(conv(inner, 3, self.stride, self.groups, name="conv2")(y), weight))
            y = last(name="norm3")(conv(outer, 1, name="conv3")(y), weight)
        else:
            outer = self.channels
            y = nn.relu(norm(name="norm1")(conv(outer, 3, self.stride, name="conv1")(x), weight))
            y = last(name="norm2")(conv(outer, 3, name="conv2")(y), weight)
        if y.shape != x.shape:
            x = norm(name="shortcut_norm")(conv(outer, 1, self.stride, name="shortcut")(x), weight)
        return nn.relu(y + x)


class ResNet(layers.Network):
    """ResNet or ResNeXt: a stem, four stages with 1, 2, 4 and 8 times `width` channels, a head.

    Attributes:
      blocks: in each stage.
      num_classes: K.
      width: channels of the stem, and of stage1's 3x3 convolutions.
      bottleneck: blocks of three convolutions, which put out four times the stage's channels.
      groups: of the bottlenecks' 3x3 convolutions.

    References:
      He et al., Deep residual learning for image recognition, CVPR 2016, table 1.
      Xie et al., Aggregated residual transformations for deep neural networks, CVPR 2017, table 1.
    """

    blocks: tuple[int, ...]
    num_classes: int
    width: int = 64
    bottleneck: bool = False
    groups: int = 1

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
        x = layers.conv(self.width, 7, 2, dtype=self.dtype, name="stem")(image.astype(self.dtype))
        x = norm(not train, name="stem_norm")(x, weight)
        x = modulate("stem", nn.max_pool(nn.relu(x), window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1))))
        kind = nn.remat(Block, static_argnums=2) if self.remat else Block
        for i, blocks in enumerate(self.blocks):
            block = functools.partial(
                kind, self.width * 2**i, bottleneck=self.bottleneck, groups=self.groups, dtype=self.dtype, norm=norm
            )
            site = f"stage{i + 1}"
            alone = int(i > 0 or self.bottleneck) if self.scan_blocks else blocks  # the first may project
            x = modulate(site, layers.Stage(blocks, alone, block, 2 if i else 1, name=site)(x, train, weight))
        x = modulate("pooled", x.mean(axis=(1, 2)))
        return layers.head(self.num_classes, x, modulate, self.dtype, kernel_init=layers.kaiming)
