"""DenseNet-BC for small images (Huang et al. 2017), with named sites for the modulation.

Sites, in order: `stem`, `stage1`, `stage2` (after the transition that halves channels and pixels), `stage3` (after the
last norm and its ReLU), `pooled` (after global average pooling), `logits`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mfm_jax.models import layers
from mfm_jax.models.normalization import BatchNorm
from mfm_jax.types import Modulate, no_modulation


class Layer(nn.Module):
    """A bottleneck of 1x1 and 3x3 convolutions, each behind norm and ReLU, whose `growth` channels join the input's."""

    growth: int
    dtype: DTypeLike
    norm: functools.partial[BatchNorm]  # batch norm but for whether it trains

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, weight: jax.Array | None) -> jax.Array:
        norm = functools.partial(self.norm, not train)
        y = layers.conv(4 * self.growth, 1, dtype=self.dtype, name="conv1")(nn.relu(norm(name="norm1")(x, weight)))
        y = layers.conv(self.growth, 3, dtype=self.dtype, name="conv2")(nn.relu(norm(name="norm2")(y, weight)))
        return jnp.concatenate([x, y], axis=-1)


class Stage(nn.Module):
    """`layers` layers, and unless it is the `last` stage a transition."""

    layers: int
    layer: functools.partial[Layer]
    last: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, weight: jax.Array | None) -> jax.Array:
        for i in range(self.layers):
            x = self.layer(name=f"layer{i}")(x, train, weight)
        norm, dtype = self.layer.keywords["norm"], self.layer.keywords["dtype"]
        x = nn.relu(norm(not train, name="norm")(x, weight))
        if self.last:
            return x
        return nn.avg_pool(layers.conv(x.shape[-1] // 2, 1, dtype=dtype, name="transition")(x), (2, 2), strides=(2, 2))


class DenseNet(layers.Network):
    """DenseNet-BC of 6 n + 4 layers: a stem, three stages of n layers, transitions that halve the channels, a head.

    Attributes:
      layers: n, layers in each stage.
      num_classes: K.
      width: channels of the stem; a layer adds half of them.

    References:
      Huang et al., Densely connected convolutional networks, CVPR 2017, section 3 (bottlenecks, compression 0.5).
    """

    layers: int
    num_classes: int
    width: int = 24

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
        kind = nn.remat(Layer, static_argnums=2) if self.remat else Layer
        layer = functools.partial(kind, self.width // 2, dtype=self.dtype, norm=norm)
        for i in range(3):
            site = f"stage{i + 1}"
            x = modulate(site, Stage(self.layers, layer, i == 2, name=site)(x, train, weight))
        x = modulate("pooled", x.mean(axis=(1, 2)))
        return layers.head(self.num_classes, x, modulate, self.dtype, kernel_init=layers.kaiming)
