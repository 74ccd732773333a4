"""Numbers as images: which of them are a pixel's, and what of 256 values they become."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mfm_jax.data.sources import Pixels
from mfm_jax.errors import UserError

ROW = "row"
_PART = 256  # images that are scaled at a time


def laid_out(numbers: npt.NDArray[Any], image_shape: tuple[int, ...] | str | None) -> npt.NDArray[Any]:
    """Returns numbers `[n, ...]` as images `[n, H, W, C]`, C 1 or 3.

    Flat ones, `[n, F]`, have the `image_shape` (H, W, C) or (H, W), of as many numbers; `ROW` makes each a picture one
    pixel high; None takes the shape they have, which must not be flat.

    Raises:
      UserError: they have another shape.
    """
    found = numbers.shape[1:]
    shape: tuple[int, ...]
    if image_shape == ROW:
        shape = (1, math.prod(found), 1)
    elif image_shape is not None and (isinstance(image_shape, str) or len(image_shape) not in (2, 3)):
        raise UserError(f"image_shape = {image_shape!r}: allowed: (H, W, C), (H, W), {ROW!r} or None")
    else:
        shape = tuple(image_shape or found)
    if len(shape) == 1:
        raise UserError(
            f"image_shape = None: rows of {shape[0]} numbers are pictures of which height, width and channels? e.g."
            f" image_shape = (8, 8, 1); for numbers that are no picture, {ROW!r}"
        )
    shape = (*shape, 1) if len(shape) == 2 else shape
    if math.prod(shape) != math.prod(found) or (len(found) > 1 and found not in (shape, shape[:2])):
        raise UserError(f"image_shape = {image_shape!r}: images are {found}, which do not have that shape")
    if len(shape) != 3 or shape[2] not in (1, 3):
        raise UserError(f"X: images are {found}; needs [H, W], [H, W, 1] or [H, W, 3]")
    return numbers.reshape(len(numbers), *shape)


def ends(value_range: tuple[float, float] | None, images: npt.NDArray[Any], *, columns: bool) -> npt.NDArray[Any]:
    """Returns the least and the largest value, `[2]`, as given or else of `images`; with `columns` of each place."""
    if value_range is None:
        axis = 0 if columns else None
        return np.stack([images.min(axis=axis), images.max(axis=axis)])
    given = np.asarray(value_range, np.float64)
    if given.shape != (2,) or not given[0] < given[1]:
        raise UserError(f"value_range = {value_range!r}: allowed: (least, largest), or None to learn it")
    return given


def to_pixels(images: npt.NDArray[Any], low: npt.ArrayLike, high: npt.ArrayLike, *, clip: bool = False) -> Pixels:
    """Returns numbers `[n, H, W, C]` as uint8, `low` as 0 and `high` as 255, rounded; where both are equal, 0.

    `low` and `high` are of all values, or arrays that broadcast to an image. What lies outside counts as the nearer end
    with `clip`, and is refused without.

    Raises:
      UserError: a value outside, and not `clip`.
    """
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    span, result = np.where(high > low, high - low, 1.0), np.empty(images.shape, np.uint8)
    for start in range(0, len(images), _PART):
        part = images[start : start + _PART]
        share = (part - low) / span
        if not clip and (share.min() < 0 or share.max() > 1):
            raise UserError(
                f"value_range = ({low:g}, {high:g}): values reach from {part.min():g} to {part.max():g}; uint8 is taken"
                " as it is, other numbers need their value_range, or None to learn it"
            )
        result[start : start + _PART] = np.rint(255 * np.clip(share, 0, 1))
    return result
