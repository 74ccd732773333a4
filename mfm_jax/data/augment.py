"""Augmentation on the device: per example, key first, jitted with the step.

An example's randomness is a function of its own key alone, so a batch gives the same images however it is
spread over devices.
"""

import jax
import jax.numpy as jnp

from mfm_jax.config import Augment
from mfm_jax.data import policies


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
    """Returns `images` `[B, H, W, C]` under `crop_flip`, a policy and `color_jitter`, as set, each with its own key.

    `split(key)[i]` is `fold_in(key, i)`: 0 and 1 are the keys of `crop_flip`, 2 is the policy's, 3 that of `cutout`.
    """
    pad = settings.pad if settings.crop == "shift" else 0
    policy = policies.policy(settings, *images.shape[1:3]) if settings.policy != "none" else None

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        image = crop_flip(key, image, pad, settings.flip)
        if policy:
            image = policies.apply(jax.random.fold_in(key, 2), image, policy)
        if not settings.color_jitter:
            return image
        return color_jitter(jax.random.fold_in(key, 4), image, settings.color_jitter)

    if not (pad or settings.flip or policy or settings.color_jitter):
        return images
    return jax.vmap(one)(jax.random.split(key, images.shape[0]), images)


def turned(images: jax.Array, quarters: jax.Array) -> jax.Array:
    """Returns each of `images` `[B, S, S, C]` turned anticlockwise by `quarters` int32 `[B]`, of any sign."""
    found, which = images, (quarters % 4)[:, None, None, None]
    for k in (1, 2, 3):
        found = jnp.where(which == k, jnp.rot90(images, k, axes=(1, 2)), found)
    return found


def cutout(key: jax.Array, images: jax.Array, side: int) -> jax.Array:
    """Returns images with a square of `side` pixels set to 0 in each, its middle anywhere, also where it leads outside.

    `images` are normalised, `[B, H, W, C]`: 0 is the mean. Each image has a key of its own, as in `augment_batch`.

    References:
      DeVries and Taylor, Improved regularization of convolutional neural networks with cutout, arXiv:1708.04552, 2017,
      section 3.2.
    """
    height, width = images.shape[1:3]

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        begin = (
            jax.random.randint(jax.random.fold_in(key, 3), (2,), 0, jnp.array([height, width]), jnp.int32) - side // 2
        )
        return jnp.where(_box(begin, begin + side, height, width)[..., None], 0, image)

    return jax.vmap(one)(jax.random.split(key, len(images)), images)


def _box(begin: jax.Array, end: jax.Array, height: int, width: int) -> jax.Array:
    """Returns where rows and columns lie from `begin` to `end`, both `[2]`: `[H, W]` bool."""
    rows, columns = (jnp.arange(size, dtype=jnp.int32) for size in (height, width))
    return ((rows >= begin[0]) & (rows < end[0]))[:, None] & ((columns >= begin[1]) & (columns < end[1]))[None]


Labelled = tuple[jax.Array, jax.Array]  # images [B, ...], labels int32 [B]
# What `types.Batch` has: images, labels, labels of the partners, shares of the labels.
Mixture = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
Pair = tuple[jax.Array, jax.Array]  # of views [B, H, W, C] of the same images


def mixed(
    key: jax.Array, images: jax.Array, labels: jax.Array, settings: Augment, partners: Labelled | None = None
) -> Mixture:
    """Returns the batch under `mixup` and `cutmix`, as set, one of them at least.

    With `cutmix`, half of the images get a box; the others are mixed up, or stay as they are with the share 1.
    `partners`, where given, are mixed in instead of others of the batch.
    """
    whole = images, labels, jnp.ones(len(images), jnp.float32)
    image, other, share = mixup(key, images, labels, settings.mixup, partners) if settings.mixup else whole
    if not settings.cutmix:
        return image, labels, other, share
    cut = cutmix(jax.random.fold_in(key, 2), images, labels, settings.cutmix, partners)
    chosen = jax.random.bernoulli(jax.random.fold_in(key, 3), shape=(len(images),))
    where = chosen.reshape(-1, *(1,) * (image.ndim - 1))
    first, second, part = (jnp.where(chosen, *pair) for pair in zip(cut[1:], (labels, other, share), strict=True))
    return jnp.where(where, cut[0], image), first, second, part


def mixup(
    key: jax.Array, images: jax.Array, labels: jax.Array, alpha: float, partners: Labelled | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns each image mixed with a random one of the batch, seldom itself: `share x_i + (1 - share) x_j`.

    The share is drawn for each pair from Beta(alpha, alpha) and, as a pair has no order, taken as the larger part: the
    first label is the one that the image has more of.

    `images` are floating point `[B, ...]`, `labels` int32 `[B]`; a larger `alpha`, above 0, mixes more evenly.
    `partners`, where given, are mixed in instead. Returns (mixed images, labels of the partners `[B]`, shares `[B]`
    float32).

    References:
      Zhang et al., mixup: beyond empirical risk minimization, ICLR 2018, eq. 2.
    """
    pair_key, share_key = jax.random.split(key)
    others, other_labels = partners or _shuffled(pair_key, images, labels)
    share = _larger(jax.random.beta(share_key, alpha, alpha, (len(images),), jnp.float32))
    return _blended(images, others, share), other_labels, share


def cutmix(
    key: jax.Array, images: jax.Array, labels: jax.Array, alpha: float, partners: Labelled | None = None
) -> Mixture:
    """Returns each image with a box of a random one of the batch, seldom itself, in the same place.

    The box has the image's shape, `sqrt(1 - s)` of each side with s from Beta(alpha, alpha), in whole pixels, and its
    middle is anywhere; what leads outside is cut off. A label's share is the part of the pixels that its image has.

    `images` are `[B, H, W, C]`, `labels` int32 `[B]`; `partners`, where given, are cut out instead. Returns (images,
    labels of which the image has more, labels of which it has less, shares of the former `[B]` float32).

    References:
      Yun et al., CutMix: regularization strategy to train strong classifiers with localizable features, ICCV 2019,
      section 3.1.
    """
    pair_key, share_key, place_key = jax.random.split(key, 3)
    others, other_labels = partners or _shuffled(pair_key, images, labels)
    drawn = jax.random.beta(share_key, alpha, alpha, (len(images),), jnp.float32)
    pasted, share = _pasted(place_key, images, others, drawn)
    more = share >= 0.5
    first, second = jnp.where(more, labels, other_labels), jnp.where(more, other_labels, labels)
    return pasted, first, second, jnp.where(more, share, 1 - share)


def mixed_views(
    key: jax.Array, views: Pair, labels: jax.Array, alpha: float, partners: tuple[Pair, jax.Array] | None = None
) -> tuple[Mixture, Mixture]:
    """Returns two mixtures of the same pairs: the first views mixed up, the second with a box of the partner's.

    The shares of the mixup are drawn as `mixup` draws them, and the box has the size that leaves an image the same
    share; what of it leads outside is cut off, and a label's share is again the part of the pixels.

    Each of `views` is `[B, H, W, C]`, `labels` are int32 `[B]`, and `partners`, where given, both of these. Returns of
    each mixture (images, labels, labels of the partners, shares of the images `[B]` float32): what `types.Batch` has.

    References:
      Du et al., Global and local mixture consistency cumulative learning for long-tailed visual recognitions, CVPR
      2023 (global and local mixture consistency).
    """
    pair_key, share_key, place_key = jax.random.split(key, 3)
    if partners is None:
        order = jax.random.permutation(pair_key, len(labels))
        partners = (views[0][order], views[1][order]), labels[order]
    others, other_labels = partners
    share = _larger(jax.random.beta(share_key, alpha, alpha, (len(labels),), jnp.float32))
    blended = _blended(views[0], others[0], share)
    pasted, kept = _pasted(place_key, views[1], others[1], share)
    return (blended, labels, other_labels, share), (pasted, labels, other_labels, kept)


def _larger(drawn: jax.Array) -> jax.Array:
    return jnp.maximum(drawn, 1 - drawn)


def _blended(images: jax.Array, others: jax.Array, share: jax.Array) -> jax.Array:
    part = share.astype(images.dtype).reshape(-1, *(1,) * (images.ndim - 1))
    return part * images + (1 - part) * others


def _pasted(key: jax.Array, images: jax.Array, others: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns images with boxes of others, of `sqrt(1 - kept)` of each side, and the part of the pixels they keep."""
    count, height, width, _ = images.shape
    side = jnp.sqrt(1 - kept)[:, None]
    sizes = jnp.array([[height, width]], jnp.int32)
    half = (side * sizes.astype(jnp.float32)).astype(jnp.int32) // 2
    middle = jax.random.randint(key, (count, 2), 0, sizes, jnp.int32)
    box = jax.vmap(lambda begin, end: _box(begin, end, height, width))(middle - half, middle + half)
    share = 1 - box.sum((1, 2), dtype=jnp.int32).astype(jnp.float32) / (height * width)
    return jnp.where(box[..., None], others, images), share


def _shuffled(key: jax.Array, images: jax.Array, labels: jax.Array) -> Labelled:
    order = jax.random.permutation(key, len(images))
    return images[order], labels[order]


def normalize(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Returns `(images - mean) / std` in float32; `mean` and `std` are `[C]`, in units of the stored pixels."""
    shape = (1,) * (images.ndim - 1) + (-1,)
    return (images.astype(jnp.float32) - mean.reshape(shape)) / std.reshape(shape)
