"""The vision transformer ViT-B/16 (Dosovitskiy et al. 2021), as timm and torchvision build it.

Sites, in order: `stem` (patches with their positions, and the class token: `[B, 1 + H W / 256, C]`), `block1` to
`block12`, `pooled` (the class token after the last norm, `[B, C]`), `logits`. A modulation of `[B, T, C]` is the same
for all tokens of an image. There is no batch norm and no dropout: a training pass is a test pass.

With `adapter_size`, a small bottleneck works beside each MLP. Its last layer starts at zero, so that the network starts
as the one without.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mfm_jax.errors import UserError
from mfm_jax.models import layers, stacked
from mfm_jax.types import Modulate, no_modulation

_normal = nn.initializers.truncated_normal(0.02)
_HEAD_WIDTH = 64
_ADAPTER_SCALE = 0.1


class Embedding(nn.Module):
    """Maps images `[B, H, W, C]` to tokens `[B, 1 + H W / patch^2, width]`: projected patches and a class token."""

    width: int
    patch: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        side = (self.patch, self.patch)
        patches = nn.Conv(self.width, side, side, padding="VALID", dtype=self.dtype, name="projection")(image)
        patches = patches.reshape(image.shape[0], -1, self.width)
        first = self.param("class_token", _normal, (1, 1, self.width), jnp.float32)
        first = jnp.broadcast_to(first.astype(patches.dtype), (image.shape[0], 1, self.width))
        tokens = jnp.concatenate([first, patches], axis=1)
        return tokens + self.param("positions", _normal, (1, *tokens.shape[1:]), jnp.float32).astype(tokens.dtype)


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a shortcut: `x + attention(norm(x))`, then `x + mlp(norm(x))`.

    With adapters the second is `x + mlp(norm(x)) + 0.1 up(relu(down(norm(x))))`.

    References:
      Chen et al., AdaptFormer: adapting vision transformers for scalable visual recognition, NeurIPS 2022, eq. 4.
      Shi et al., Long-tail learning with foundation model: heavy fine-tuning hurts, ICML 2024.
    """

    adapter_size: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = functools.partial(nn.Dense, kernel_init=_normal, dtype=self.dtype)
        norm = functools.partial(nn.LayerNorm, use_fast_variance=False, dtype=self.dtype)
        width = x.shape[-1]
        heads = max(width // _HEAD_WIDTH, 1)
        qkv = dense(3 * width, name="qkv")(norm(name="norm1")(x))
        query, key, value = jnp.unstack(qkv.reshape(*x.shape[:2], 3, heads, width // heads), axis=2)
        x = x + dense(width, name="proj")(jax.nn.dot_product_attention(query, key, value).reshape(x.shape))
        normed = norm(name="norm2")(x)
        y = dense(width, name="fc2")(nn.gelu(dense(4 * width, name="fc1")(normed), approximate=False))
        if self.adapter_size:
            hidden = nn.relu(nn.Dense(self.adapter_size, dtype=self.dtype, name="adapter_down")(normed))
            up = nn.Dense(width, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="adapter_up")(hidden)
            y = y + _ADAPTER_SCALE * up
        return x + y


class VisionTransformer(nn.Module):
    """ViT: patches, `depth` blocks, and a head on the class token.

    Attributes:
      num_classes: K.
      width: C; a multiple of 64, the width of an attention head, or less than that for a single one.
      depth: blocks.
      patch: pixels a side of a patch.
      adapter_size: hidden units of the adapter beside each MLP; 0 for none.
      dtype: of the computation; parameters and logits are float32 (or wider).
      axis_name: for the same signature as the other models; nothing here couples examples.
      remat: keep only the blocks' inputs for the backward pass and compute the rest again.
      scan_blocks: one scanned body for all blocks, whose variables are `stacked`; of their sites only the last is left.

    References:
      Dosovitskiy et al., An image is worth 16x16 words: transformers for image recognition at scale, ICLR 2021.
    """

    num_classes: int
    width: int = 768
    depth: int = 12
    patch: int = 16
    adapter_size: int = 0
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None
    remat: bool = False
    scan_blocks: bool = False

    @nn.compact
    def __call__(
        self,
        image: jax.Array,
        *,
        train: bool = False,
        modulate: Modulate = no_modulation,
        weight: jax.Array | None = None,
    ) -> jax.Array:
        """Returns logits `[B, K]`; arguments as `resnet.CifarResNet` has them, `train` and `weight` without effect.

        Raises:
          UserError: the image cannot be cut into patches.
        """
        height, width = image.shape[1:3]
        if height % self.patch or width % self.patch:
            raise UserError(
                f"data.image_size: images are {height} x {width} pixels, and this model cuts them into patches of"
                f" {self.patch} x {self.patch}; choose a multiple of {self.patch}"
            )
        x = modulate("stem", Embedding(self.width, self.patch, self.dtype, name="stem")(image.astype(self.dtype)))
        kind = nn.remat(Block) if self.remat else Block

        def block(i: int) -> nn.Module:
            return kind(self.adapter_size, self.dtype, name=f"block{i + 1}")

        for i in range(0 if self.scan_blocks else self.depth):
            x = modulate(f"block{i + 1}", block(i)(x))
        if self.scan_blocks:
            x = modulate(f"block{self.depth}", stacked.through(block, self.depth, 0, x))
        x = nn.LayerNorm(use_fast_variance=False, dtype=self.dtype, name="norm")(x[:, 0])
        return layers.head(self.num_classes, modulate("pooled", x), modulate, self.dtype, kernel_init=_normal)
