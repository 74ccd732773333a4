"""Policies of augmentation on the device: AutoAugment's for CIFAR, RandAugment, TrivialAugment.

Fourteen operations in one program, without a branch: every geometric one is a gather by an affine map, Brightness,
Contrast, Color and Sharpness are blends with another image, the others are a table of 256 values. So each image takes
one gather, one blend and one table, of which all but one change nothing; a `switch` under `vmap` computes all fourteen.
Coefficients that need float64 are made on the host, for the few strengths that a policy has.

The operations are Pillow's, pixel by pixel, on uint8 images (`transformed` has the one exception). The strengths are
those of torchvision's `AutoAugment`, `RandAugment` and `TrivialAugmentWide`: nearest pixel, black where there is none.

References:
  Cubuk et al., AutoAugment: learning augmentation strategies from data, CVPR 2019, tables 6 (operations) and 7 (CIFAR).
  Cubuk et al., RandAugment: practical automated data augmentation with a reduced search space, NeurIPS 2020, section 3.
  Mueller and Hutter, TrivialAugment: tuning-free yet state-of-the-art data augmentation, ICCV 2021, section 3, table 1.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mfm_jax.config import Augment

_GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_BLENDS = ("Brightness", "Color", "Contrast", "Sharpness")
# The largest strengths of operations that go either way: AutoAugment's and RandAugment's, with translations in parts of
# the image, and TrivialAugment's wide space, with translations in pixels.
_SIGNED = dict(zip(_GEOMETRIC, (0.3, 0.3, 150 / 331, 150 / 331, 30.0), strict=True)) | dict.fromkeys(_BLENDS, 0.9)
_WIDE = dict(zip(_GEOMETRIC, (0.99, 0.99, 32.0, 32.0, 135.0), strict=True)) | dict.fromkeys(_BLENDS, 0.99)
OPERATIONS = ("Identity", *_SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize")
_BINS = 31  # strengths of RandAugment and TrivialAugment; AutoAugment has 10
# What an image is blended with.
_BLACK, _MEAN, _GREY, _SMOOTH = range(4)
_ORIGINS = {"Brightness": _BLACK, "Contrast": _MEAN, "Color": _GREY, "Sharpness": _SMOOTH}
# What the table of an operation is made of.
_FIXED, _AUTOCONTRAST, _EQUALIZE = range(3)
_POINTS = {"AutoContrast": _AUTOCONTRAST, "Equalize": _EQUALIZE}

Step = tuple[str, float, int]  # an operation, its probability, its strength of 0 to 9
_CIFAR: tuple[tuple[Step, Step], ...] = (
    (("Invert", 0.1, 0), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 0), ("Equalize", 0.9, 0)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 0), ("Equalize", 0.5, 0)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, 0), ("AutoContrast", 0.4, 0)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 0)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 0), ("Equalize", 0.6, 0)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 0)),
    (("AutoContrast", 0.8, 0), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 0)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 0), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, 0), ("Invert", 0.1, 0)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 0)),
)


class Operation(NamedTuple):
    """One operation at one strength, as numbers; an operation has those of the identity but for its own.

    affine: int32 `[6]`, in units of 2^-16 pixels, from a pixel (x, y) of the result to where it comes from.
    origin: int32, which image the blend starts from.
    products: float32 `[511]`, the blend's factor times -255 to 255.
    point: int32, what the table is made of.
    threshold: int32; values from here on are inverted, 256 for none.
    mask: int32, the bits of a value that are kept.
    """

    affine: Any
    origin: Any
    products: Any
    point: Any
    threshold: Any
    mask: Any


class Policy(NamedTuple):
    """What is drawn for an image, `rounds` times: one of n choices, each of k steps, of which each may be left out.

    operations: `Operation` with a first axis, the identity first; `products` are rows of `products`.
    products: float32 `[f, 511]`.
    rows: int32 `[n, k, 2]`, the operation of a step for either sign.
    chances: float32 `[n, k]`, how often a step is taken.
    rounds: how often a choice is drawn.
    """

    operations: Operation
    products: np.ndarray
    rows: np.ndarray
    chances: np.ndarray
    rounds: int


def operation(name: str, strength: float, height: int, width: int) -> Operation:
    """Returns an operation on images of that size.

    Args:
      name: one of `OPERATIONS`, or "Invert".
      strength: of ShearX and ShearY, a slope; of TranslateX and TranslateY, pixels, of which the fraction is dropped;
        of Rotate, degrees, counterclockwise; of the blends, the factor minus 1; of Posterize, the bits that stay; of
        Solarize, the least value that is inverted. Others have none.
      height: H.
      width: W.
    """
    factor = np.float32(1 + strength if name in _ORIGINS else 1)
    bits = int(strength) if name == "Posterize" else 8
    return Operation(
        affine=_affine(name, strength, height, width),
        origin=np.int32(_ORIGINS.get(name, _BLACK)),
        products=factor * np.arange(-255, 256, dtype=np.float32),
        point=np.int32(_POINTS.get(name, _FIXED)),
        threshold=np.int32({"Solarize": math.ceil(strength), "Invert": 0}.get(name, 256)),
        mask=np.int32(256 - 2 ** (8 - bits)),
    )


def _affine(name: str, strength: float, height: int, width: int) -> np.ndarray:
    """Returns Pillow's map of a geometric operation, or the identity, in its fixed-point numbers."""
    a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
    match name:
        case "ShearX":
            b = strength
        case "ShearY":
            d = strength
        case "TranslateX":
            c = -float(int(strength))
        case "TranslateY":
            f = -float(int(strength))
        case "Rotate":
            angle, x, y = -math.radians(strength % 360), width / 2, height / 2
            a, b = round(math.cos(angle), 15), round(math.sin(angle), 15)
            d, e = round(-math.sin(angle), 15), round(math.cos(angle), 15)
            c, f = a * -x + b * -y + x, d * -x + e * -y + y
    numbers = a, b, c + (a + b) / 2, d, e, f + (d + e) / 2  # from the middle of a pixel
    return np.floor(np.array(numbers) * 65536 + 0.5).astype(np.int32)


def transformed(image: jax.Array, to: Operation) -> jax.Array:
    """Returns an image under an operation, as Pillow does it.

    Where AutoContrast's `255 (v - low) / (high - low)` is a whole number, Pillow's float64 may be just below it, and
    Pillow's value is then less by one.

    The image is uint8 `[H, W, C]`, C 1 or 3; H and W are less than 16,384.
    """
    pixels = _moved(image, to.affine).astype(jnp.int32)
    pixels = _blended(pixels, to.origin, to.products)
    return _looked_up(pixels, to).astype(jnp.uint8)


def _moved(image: jax.Array, affine: jax.Array) -> jax.Array:
    """Returns the gather by an affine map, black where the map leads out of the image (`affine_fixed` of Pillow)."""
    height, width, _ = image.shape
    y, x = jnp.arange(height, dtype=jnp.int32)[:, None], jnp.arange(width, dtype=jnp.int32)[None, :]
    from_x = (affine[2] + x * affine[0] + y * affine[1]) >> 16
    from_y = (affine[5] + x * affine[3] + y * affine[4]) >> 16
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    return jnp.where(inside[..., None], image[from_y.clip(0, height - 1), from_x.clip(0, width - 1)], 0)


def _blended(pixels: jax.Array, origin: jax.Array, products: jax.Array) -> jax.Array:
    """Returns `o + factor (v - o)`, cut off at 0 and 255, the fraction dropped (`ImageEnhance` and `blend` of Pillow).

    The products are looked up: a compiler may fuse a product with the sum, and that rounds otherwise.
    """
    grey = _grey(pixels)
    mean = (2 * grey.sum(dtype=jnp.int32) + grey.size) // (2 * grey.size)
    start = jnp.where(origin == _MEAN, mean, 0)
    start = jnp.where(origin == _GREY, grey, start)
    start = jnp.where(origin == _SMOOTH, _smooth(pixels), start)
    return (start.astype(jnp.float32) + products[pixels - start + 255]).clip(0, 255).astype(jnp.int32)


def _grey(pixels: jax.Array) -> jax.Array:
    """Returns Pillow's integer luminance `[H, W, 1]`; a grey image as it is."""
    if pixels.shape[-1] == 1:
        return pixels
    weights = jnp.array([19595, 38470, 7471], jnp.int32).reshape(1, 1, 3)
    return ((pixels * weights).sum(-1, keepdims=True, dtype=jnp.int32) + 2**15) >> 16


def _smooth(pixels: jax.Array) -> jax.Array:
    """Returns each pixel's mean with its eight neighbours, itself five times, rounded; the border stays."""
    height, width, _ = pixels.shape
    if min(height, width) < 3:
        return pixels
    rows = pixels[:-2] + pixels[1:-1] + pixels[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * pixels[1:-1, 1:-1]
    return pixels.at[1:-1, 1:-1].set((2 * total + 13) // 26)


def _looked_up(pixels: jax.Array, to: Operation) -> jax.Array:
    """Returns each value's entry in its channel's table, as Pillow's `ImageOps` make it."""
    planes, values = pixels.reshape(-1, pixels.shape[-1]).T, jnp.arange(256, dtype=jnp.int32)
    fixed = jnp.where(values < to.threshold, values, 255 - values) & to.mask
    low, high = planes.min(1, keepdims=True), planes.max(1, keepdims=True)
    stretched = _quotient(255 * (values[None] - low), high - low)
    count = jnp.zeros((len(planes), 256), jnp.int32).at[jnp.arange(len(planes))[:, None], planes].add(1)
    below = jnp.cumsum(count, axis=1, dtype=jnp.int32) - count
    step = jnp.take_along_axis(below, high, axis=1) // 255  # of all values but the largest
    equal = _quotient(below + step // 2, step)
    table = jnp.where((to.point == _AUTOCONTRAST) & (high > low), stretched, fixed[None])
    table = jnp.where((to.point == _EQUALIZE) & (step > 0), equal, table).clip(0, 255)
    return jnp.take_along_axis(table, planes, axis=1).T.reshape(pixels.shape)


def _quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns `a / b` without its fraction, whatever where b is 0; cheaper than `//`, which is of either sign."""
    return jax.lax.div(a, jnp.broadcast_to(jnp.maximum(b, 1), a.shape))


@functools.lru_cache
def policy(settings: Augment, height: int, width: int) -> Policy:
    """Returns the policy that `settings.policy` names, which is not "none", for images of that size."""
    choices, rounds = _choices(settings, height, width)
    rows = {("Identity", 0.0): 0}
    for name, _, strength in (step for choice in choices for step in choice):
        for signed in _either(name, strength):
            rows.setdefault((name, signed), len(rows))
    table = [operation(name, strength, height, width) for name, strength in rows]
    products, row = np.unique([one.products for one in table], axis=0, return_inverse=True)
    row = row.ravel().astype(np.int32)  # NumPy 2.0.0 gives [N, 1]
    operations = Operation(*map(np.stack, zip(*table, strict=True)))._replace(products=row)
    return Policy(
        operations=operations,
        products=products,
        rows=np.array([[[rows[name, s] for s in _either(name, x)] for name, _, x in one] for one in choices], np.int32),
        chances=np.array([[chance for _, chance, _ in one] for one in choices], np.float32),
        rounds=rounds,
    )


def _either(name: str, strength: float) -> tuple[float, float]:
    return (strength, -strength if name in _SIGNED else strength)


def _choices(settings: Augment, height: int, width: int) -> tuple[Sequence[Sequence[tuple[str, float, float]]], int]:
    """Returns the steps of each choice, as (operation, probability, strength), and how many choices an image gets."""
    if settings.policy == "autoaugment":
        strength = functools.partial(_strength, _SIGNED, 4, 10, height, width)
        return [[(name, chance, strength(name, at)) for name, chance, at in one] for one in _CIFAR], 1
    if settings.policy == "randaugment":
        strength = functools.partial(_strength, _SIGNED, 4, _BINS, height, width)
        return [[(name, 1.0, strength(name, settings.magnitude))] for name in OPERATIONS], settings.operations
    strength = functools.partial(_strength, _WIDE, 6, _BINS, 1, 1)
    return [[(name, 1.0, strength(name, at))] for name in OPERATIONS for at in range(_BINS)], 1


def _strength(largest: dict[str, float], bits: int, bins: int, height: int, width: int, name: str, at: int) -> float:
    """Returns the strength numbered `at` of an operation, of `bins` from 0; `bits` is what Posterize takes at most."""
    if name == "Posterize":
        return 8 - round(bits * at / (bins - 1))
    if name == "Solarize":
        return 255 - 255 * at / (bins - 1)
    whole = {"TranslateX": width, "TranslateY": height}.get(name, 1)
    return largest.get(name, 0.0) * whole * at / (bins - 1)


def apply(key: jax.Array, image: jax.Array, what: Policy) -> jax.Array:
    """Returns an image, uint8 `[H, W, C]` with C 1 or 3, under what is drawn from a policy."""
    for row in draw(key, what):
        image = transformed(image, at(what, row))
    return image


def at(what: Policy, row: jax.Array) -> Operation:
    """Returns the operation of a row, int32, of those that a policy has."""
    to = Operation(*(jnp.asarray(column)[row] for column in what.operations))
    return to._replace(products=jnp.asarray(what.products)[to.products])


def draw(key: jax.Array, what: Policy) -> list[jax.Array]:
    """Returns the operations that an image gets, one after the other: `rounds * k` rows, int32."""
    steps, found = what.rows.shape[1], []
    for of_round in jax.random.split(key, what.rounds):
        choice_key, chance_key, sign_key = jax.random.split(of_round, 3)
        choice = jax.random.randint(choice_key, (), 0, len(what.rows), jnp.int32)
        taken = jax.random.uniform(chance_key, (steps,), jnp.float32) < jnp.asarray(what.chances)[choice]
        sign = jax.random.bernoulli(sign_key, shape=(steps,)).astype(jnp.int32)
        rows = jnp.asarray(what.rows)[choice]
        found += [jnp.where(taken[step], rows[step, sign[step]], 0) for step in range(steps)]
    return found
