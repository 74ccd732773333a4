"""Augmentation on the device: per example, key first, jitted with the step.

An example's randomness is a function of its own key alone, so a batch gives the same images however it is
spread over devices.
"""

import jax
import jax.numpy as jnp

from mfm_jax.config import Augment


def crop_flip(key: jax.Array, image: jax.Array, pad: int, flip: bool) -> jax.Array:
    """Returns one image, shifted by up to `pad` pixels each way (reflecting at the edges) and mirrored half the time.

    The same as reflect-pad, random crop and random left-right flip, written as one gather of rows and columns.

    The image is `[H, W, C]` of any dtype, which it keeps; `pad` is less than H and W, and 0 shifts nothing.
    """
    height, width, _ = image.shape
    shift_key, flip_key = jax.random.split(key)
    shift = jax.random.randint(shift_key, (2,), -pad, pad + 1, jnp.int32)
    rows = _reflect(jnp.arange(height, dtype=jnp.int32) + shift[0], height)
    columns = _reflect(jnp.arange(width, dtype=jnp.int32) + shift[1], width)
    if flip:
        columns = jnp.where(jax.random.bernoulli(flip_key), columns[::-1], columns)
    return image[rows[:, None], columns[None, :]]


def _reflect(index: jax.Array, size: int) -> jax.Array:
    """Returns an index outside [0, size) mirrored back inside at the edge pixel."""
    return (size - 1) - jnp.abs((size - 1) - jnp.abs(index))


def color_jitter(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    """Returns one image with brightness, contrast and saturation times factors from 1 - strength to 1 + strength.

    Brightness multiplies the pixels, contrast their distance from the mean luminance, saturation each pixel's distance
    from its own luminance (Rec. 601: 0.299 R + 0.587 G + 0.114 B), one after the other, cut off at 0 and 255.

    The image is `[H, W, C]`, 0..255, C 1 or 3; the result is float32. `strength` is 0 to 1.
    """
    brightness, contrast, saturation = jax.random.uniform(key, (3,), jnp.float32, 1 - strength, 1 + strength)
    image = jnp.clip(image.astype(jnp.float32) * brightness, 0, 255)
    image = _away_from(luminance(image).mean(), image, contrast)
    return _away_from(luminance(image), image, saturation)


def luminance(image: jax.Array) -> jax.Array:
    """Returns the luminance `[H, W, 1]` of `[H, W, C]` (Rec. 601); a grey image is returned."""
    if image.shape[-1] == 1:
        return image
    return (image * jnp.array([0.299, 0.587, 0.114], image.dtype).reshape(1, 1, 3)).sum(-1, keepdims=True)


def _away_from(origin: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    return jnp.clip(origin + factor * (image - origin), 0, 255)


def augment_batch(key: jax.Array, images: jax.Array, settings: Augment) -> jax.Array:
    """Returns `images` `[B, H, W, C]` under `crop_flip` and `color_jitter`, as set, each with a key of its own."""
    pad = settings.pad if settings.crop == "shift" else 0

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        image = crop_flip(key, image, pad, settings.flip)
        if not settings.color_jitter:
            return image
        return color_jitter(jax.random.fold_in(key, 1), image, settings.color_jitter)

    if not (pad or settings.flip or settings.color_jitter):
        return images
    return jax.vmap(one)(jax.random.split(key, images.shape[0]), images)


def mixup(key: jax.Array, images: jax.Array, labels: jax.Array, alpha: float) -> tuple[jax.Array, ...]:
    """Returns each image mixed with a random one of the batch, seldom itself: `share x_i + (1 - share) x_j`.

    The share is drawn for each pair from Beta(alpha, alpha) and, as a pair has no order, taken as the larger part: the
    first label is the one that the image has more of.

    `images` are floating point `[B, ...]`, `labels` int32 `[B]`; a larger `alpha`, above 0, mixes more evenly. Returns
    (mixed images, labels of the partners `[B]`, shares `[B]` float32).

    References:
      Zhang et al., mixup: beyond empirical risk minimization, ICLR 2018, eq. 2.
    """
    pair_key, share_key = jax.random.split(key)
    partner = jax.random.permutation(pair_key, len(images))
    drawn = jax.random.beta(share_key, alpha, alpha, (len(images),), jnp.float32)
    share = jnp.maximum(drawn, 1 - drawn)
    part = share.astype(images.dtype).reshape(-1, *(1,) * (images.ndim - 1))
    return part * images + (1 - part) * images[partner], labels[partner], share


def normalize(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Returns `(images - mean) / std` in float32; `mean` and `std` are `[C]`, in units of the stored pixels."""
    shape = (1,) * (images.ndim - 1) + (-1,)
    return (images.astype(jnp.float32) - mean.reshape(shape)) / std.reshape(shape)
