"""The vision transformer ViT-B/16 (Dosovitskiy et al. 2021), as timm and torchvision build it, and its relatives.

Sites, in order: `stem` (patches with their positions, and the class token: `[B, 1 + H W / 256, C]`), `block1` to
`block12`, `pooled` (the class token after the last norm, `[B, C]`), `logits`. A modulation of `[B, T, C]` is the same
for all tokens of an image. There is no batch norm and no dropout: a training pass is a test pass.

With `adapter_size`, a small bottleneck works beside each MLP, with `lora_rank` a product of two thin matrices beside
the query and the value. Their last layers start at zero, so that the network starts as the one without.

A `Tower` says in what the image towers of CLIP and DINOv2 differ.
"""

import functools
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Tower:
    """In what a published vision transformer differs; the defaults are those of Dosovitskiy et al.

    epsilon: of its layer norms.
    patch_bias: the patches' projection has a bias.
    registers: tokens between the class token and the patches, which have no position and are not read.
    pre_norm: a layer norm before the first block.
    quick_gelu: `x sigmoid(1.702 x)` in the place of GELU.
    layer_scale: a factor for each channel of what attention and MLP add to their shortcuts.
    projection: numbers to which the last norm's class token is projected, without a bias; 0 for no projection.

    References:
      Radford et al., Learning transferable visual models from natural language supervision, ICML 2021 (CLIP).
      Oquab et al., DINOv2: learning robust visual features without supervision, TMLR 2024.
      Darcet et al., Vision transformers need registers, ICLR 2024.
    """

    epsilon: float = 1e-6
    patch_bias: bool = True
    registers: int = 0
    pre_norm: bool = False
    quick_gelu: bool = False
    layer_scale: bool = False
    projection: int = 0

    def norm(self, **options: Any) -> nn.LayerNorm:
        return nn.LayerNorm(self.epsilon, use_fast_variance=False, **options)


CLIP = Tower(epsilon=1e-5, patch_bias=False, pre_norm=True, quick_gelu=True, projection=512)
DINOV2 = Tower(layer_scale=True)
DINOV2_REGISTERS = Tower(layer_scale=True, registers=4)


class Embedding(nn.Module):
    """Maps images `[B, H, W, C]` to tokens `[B, 1 + H W / patch^2, width]`: projected patches and a class token.

    Registers, if any, come after the class token.
    """

    width: int
    patch: int
    dtype: DTypeLike
    tower: Tower = Tower()

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        side = (self.patch, self.patch)
        options: dict[str, Any] = {"padding": "VALID", "use_bias": self.tower.patch_bias, "dtype": self.dtype}
        patches = nn.Conv(self.width, side, side, **options, name="projection")(image)
        patches = patches.reshape(image.shape[0], -1, self.width)
        first = self.param("class_token", _normal, (1, 1, self.width), jnp.float32)
        first = jnp.broadcast_to(first.astype(patches.dtype), (image.shape[0], 1, self.width))
        tokens = jnp.concatenate([first, patches], axis=1)
        tokens = tokens + self.param("positions", _normal, (1, *tokens.shape[1:]), jnp.float32).astype(tokens.dtype)
        if not self.tower.registers:
            return tokens
        more = self.param("registers", _normal, (1, self.tower.registers, self.width), jnp.float32)
        more = jnp.broadcast_to(more.astype(tokens.dtype), (image.shape[0], *more.shape[1:]))
        return jnp.concatenate([tokens[:, :1], more, tokens[:, 1:]], axis=1)


class LowRank(nn.Module):
    """`up(down(x))`, `[..., C]`, through `rank` numbers: zero at the start, as `up` is.

    References:
      Hu et al., LoRA: low-rank adaptation of large language models, ICLR 2022, section 4.1 (with alpha = rank).
    """

    rank: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        down = nn.Dense(self.rank, use_bias=False, dtype=self.dtype, name="down")(x)
        zeros = nn.initializers.zeros
        return nn.Dense(x.shape[-1], use_bias=False, kernel_init=zeros, dtype=self.dtype, name="up")(down)


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a shortcut: `x + attention(norm(x))`, then `x + mlp(norm(x))`.

    With adapters the second is `x + mlp(norm(x)) + 0.1 up(relu(down(norm(x))))`. With `lora_rank` the query and the
    value have a `LowRank` of `norm(x)` beside them; parameters without it are `tuning.merged`, and nothing is added.

    References:
      Chen et al., AdaptFormer: adapting vision transformers for scalable visual recognition, NeurIPS 2022, eq. 4.
      Shi et al., Long-tail learning with foundation model: heavy fine-tuning hurts, ICML 2024.
    """

    adapter_size: int
    dtype: DTypeLike
    lora_rank: int = 0
    tower: Tower = Tower()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = functools.partial(nn.Dense, kernel_init=_normal, dtype=self.dtype)
        norm = functools.partial(self.tower.norm, dtype=self.dtype)
        width = x.shape[-1]
        heads = max(width // _HEAD_WIDTH, 1)
        normed = norm(name="norm1")(x)
        qkv = dense(3 * width, name="qkv")(normed)
        query, key, value = jnp.unstack(qkv.reshape(*x.shape[:2], 3, heads, width // heads), axis=2)
        if self.lora_rank and (self.is_initializing() or self.has_variable("params", "lora_query")):
            query = query + LowRank(self.lora_rank, self.dtype, name="lora_query")(normed).reshape(query.shape)
            value = value + LowRank(self.lora_rank, self.dtype, name="lora_value")(normed).reshape(value.shape)
        y = dense(width, name="proj")(jax.nn.dot_product_attention(query, key, value).reshape(x.shape))
        x = x + self._scaled("scale1", y)
        normed = norm(name="norm2")(x)
        hidden = dense(4 * width, name="fc1")(normed)
        active = hidden * nn.sigmoid(1.702 * hidden) if self.tower.quick_gelu else nn.gelu(hidden, approximate=False)
        y = self._scaled("scale2", dense(width, name="fc2")(active))
        if self.adapter_size:
            hidden = nn.relu(nn.Dense(self.adapter_size, dtype=self.dtype, name="adapter_down")(normed))
            up = nn.Dense(width, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="adapter_up")(hidden)
            y = y + _ADAPTER_SCALE * up
        return x + y

    def _scaled(self, name: str, x: jax.Array) -> jax.Array:
        if not self.tower.layer_scale:
            return x
        return x * self.param(name, nn.initializers.ones, (x.shape[-1],), jnp.float32).astype(x.dtype)[None, None, :]


class VisionTransformer(layers.Network):
    """ViT: patches, `depth` blocks, and a head on the class token.

    Attributes:
      num_classes: K.
      width: C; a multiple of 64, the width of an attention head, or less than that for a single one.
      depth: blocks.
      patch: pixels a side of a patch.
      adapter_size: hidden units of the adapter beside each MLP; 0 for none.
      scan_blocks: one scanned body for all blocks; of their sites only the last is left.
      lora_rank: of the changes to each block's query and value; 0 for none.
      tower: in what it differs from the ViT of Dosovitskiy et al.

    References:
      Dosovitskiy et al., An image is worth 16x16 words: transformers for image recognition at scale, ICLR 2021.
    """

    num_classes: int
    width: int = 768
    depth: int = 12
    patch: int = 16
    adapter_size: int = 0
    lora_rank: int = 0
    tower: Tower = Tower()

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
        x = Embedding(self.width, self.patch, self.dtype, self.tower, name="stem")(image.astype(self.dtype))
        x = modulate("stem", self.tower.norm(dtype=self.dtype, name="pre_norm")(x) if self.tower.pre_norm else x)
        kind = nn.remat(Block) if self.remat else Block

        def block(i: int) -> nn.Module:
            return kind(self.adapter_size, self.dtype, self.lora_rank, self.tower, name=f"block{i + 1}")

        for i in range(0 if self.scan_blocks else self.depth):
            x = modulate(f"block{i + 1}", block(i)(x))
        if self.scan_blocks:
            x = modulate(f"block{self.depth}", stacked.through(block, self.depth, 0, x))
        x = self.tower.norm(dtype=self.dtype, name="norm")(x[:, 0])
        if size := self.tower.projection:
            x = nn.Dense(size, use_bias=False, kernel_init=_normal, dtype=self.dtype, name="visual_projection")(x)
        return layers.head(self.num_classes, modulate("pooled", x), modulate, self.dtype, kernel_init=_normal)
