"""ResNets for small images (He et al. 2016, section 4.2), with named sites for the modulation.

Sites, in order: `stem`, `stage1`, `stage2`, `stage3` (after each stage's last ReLU), `pooled` (after global average
pooling), `logits`. With `modulate` left out the network is the plain one.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mfm_jax.models import layers
from mfm_jax.models.normalization import BatchNorm
from mfm_jax.types import Modulate, no_modulation


def shortcut(x: jax.Array, channels: int, stride: int) -> jax.Array:
    """Returns the shortcut of option A of He et al.: subsample, and fill the new channels with zeros; no parameters."""
    x = x[:, ::stride, ::stride]
    extra = channels - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * 3 + [(extra // 2, extra - extra // 2)])


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut."""

    channels: int
    stride: int
    dtype: DTypeLike
    norm: functools.partial[BatchNorm]  # batch norm but for whether it trains

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, weight: jax.Array | None) -> jax.Array:
        conv = functools.partial(layers.conv, self.channels, 3, dtype=self.dtype)
        norm = functools.partial(self.norm, not train)
        y = nn.relu(norm()(conv(self.stride)(x), weight))
        y = norm()(conv()(y), weight)
        return nn.relu(y + shortcut(x, self.channels, self.stride))


class CifarResNet(layers.Network):
    """ResNet of 6 n + 2 layers: a stem, three stages of n blocks with 1, 2 and 4 times `width` channels, a head.

    Attributes:
      blocks: n, blocks in each stage.
      num_classes: K.
      width: channels of the stem and of stage1.

    References:
      He et al., Deep residual learning for image recognition, CVPR 2016, section 4.2.
    """

    blocks: int
    num_classes: int
    width: int = 16

    @nn.compact
    def __call__(
        self,
        image: jax.Array,
        *,
        train: bool = False,
        modulate: Modulate = no_modulation,
        weight: jax.Array | None = None,
    ) -> jax.Array:
        """Returns logits `[B, K]`.

        Args:
          image: `[B, H, W, C]`, normalised.
          train: normalise with batch statistics and update the running ones.
          modulate: called at each site.
          weight: `[B]`, the weight of each example in batch statistics; None for equal weights.
        """
        norm = self.batch_norm
        x = layers.conv(self.width, 3, dtype=self.dtype, name="stem")(image.astype(self.dtype))
        x = norm(not train, name="stem_norm")(x, weight)
        x = modulate("stem", nn.relu(x))
        kind = nn.remat(BasicBlock, static_argnums=2) if self.remat else BasicBlock
        for i in range(3):
            site = f"stage{i + 1}"
            alone = min(i, 1) if self.scan_blocks else self.blocks
            block = functools.partial(kind, self.width * 2**i, dtype=self.dtype, norm=norm)
            stage = layers.Stage(self.blocks, alone, block, 2 if i else 1, "BasicBlock_", name=site)
            x = modulate(site, stage(x, train, weight))
        x = modulate("pooled", x.mean(axis=(1, 2)))
        return layers.head(self.num_classes, x, modulate, self.dtype, kernel_init=layers.kaiming)
