"""Wide ResNets for small images (Zagoruyko and Komodakis 2016), with named sites for the modulation.

Sites, in order: `stem`, `stage1`, `stage2` (sums, which the next block normalises), `stage3` (after the last norm and
its ReLU), `pooled` (after global average pooling), `logits`. Norm and ReLU come before each convolution, and a block's
shortcut projects where its channels change.
"""

import functools

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from mfm_jax.models import layers
from mfm_jax.models.normalization import BatchNorm
from mfm_jax.types import Modulate, no_modulation


class Block(nn.Module):
    """Norm, ReLU and a 3x3 convolution, twice, beside a shortcut, which begins behind the first ReLU if it projects."""

    channels: int
    stride: int
    dtype: DTypeLike
    norm: functools.partial[BatchNorm]  # batch norm but for whether it trains

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, weight: jax.Array | None) -> jax.Array:
        norm = functools.partial(self.norm, not train)
        conv = functools.partial(layers.conv, self.channels, dtype=self.dtype)
        active = nn.relu(norm(name="norm1")(x, weight))
        y = conv(3, self.stride, name="conv1")(active)
        y = conv(3, name="conv2")(nn.relu(norm(name="norm2")(y, weight)))
        if x.shape[-1] != self.channels:
            x = conv(1, self.stride, name="shortcut")(active)
        return x + y


class WideResNet(layers.Network):
    """Wide ResNet of 6 n + 4 layers: a stem, three stages of n blocks, a norm, a head.

    Attributes:
      blocks: n, blocks in each stage.
      num_classes: K.
      width: channels of the stem.
      widen: the stages have this times 1, 2 and 4 times `width` channels.

    References:
      Zagoruyko and Komodakis, Wide residual networks, BMVC 2016, table 1 (without dropout).
    """

    blocks: int
    num_classes: int
    width: int = 16
    widen: int = 10

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
        x = modulate("stem", layers.conv(self.width, 3, dtype=self.dtype, name="stem")(image.astype(self.dtype)))
        kind = nn.remat(Block, static_argnums=2) if self.remat else Block
        alone = 1 if self.scan_blocks else self.blocks
        for i in range(3):
            site = f"stage{i + 1}"
            block = functools.partial(kind, self.width * self.widen * 2**i, dtype=self.dtype, norm=norm)
            x = layers.Stage(self.blocks, alone, block, 2 if i else 1, name=site)(x, train, weight)
            x = nn.relu(norm(not train, name="norm")(x, weight)) if i == 2 else x
            x = modulate(site, x)
        x = modulate("pooled", x.mean(axis=(1, 2)))
        return layers.head(self.num_classes, x, modulate, self.dtype, kernel_init=layers.kaiming)
