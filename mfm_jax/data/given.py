"""Images as a caller hands them over, made into arrays: sets of Hugging Face, TensorFlow and PyTorch, and iterables.

None of these libraries is imported: a data set is known by its methods. An item is a pair `(image, label)`, a dict
with the keys `image` and `label`, or a batch of either form, whose labels are `[B]`. An image is an array `[H, W, C]`
or `[H, W]`, a Pillow image, or a PyTorch tensor, which is `[C, H, W]` or `[H, W]` as torchvision has it.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mfm_jax.data.sources import resize
from mfm_jax.errors import UserError

_GREY = ("1", "L", "LA")
_COLOUR = ("RGB", "RGBA", "P", "CMYK", "YCbCr")


class Examples(NamedTuple):
    """images: `[n, H, W, C]`, in the dtype that they came in. labels: `[n]`; None where an item has no label.

    class_names: of the labels 0 to K - 1, where the data set names them; else empty.
    """

    images: npt.NDArray[Any]
    labels: npt.NDArray[Any] | None
    class_names: tuple[str, ...]


def is_data_set(given: Any) -> bool:
    """Whether `given` is a data set or an iterable of examples, and no array, table, list or path."""
    if isinstance(given, list | tuple | str | bytes) or any(hasattr(given, name) for name in ("__array__", "toarray")):
        return False
    return hasattr(given, "__iter__") or (hasattr(given, "__getitem__") and hasattr(given, "__len__"))


def examples(given: Any, image_size: int = 0) -> Examples:
    """Returns all examples of a data set, in its order.

    Args:
      given: the data set, which ends.
      image_size: uint8 images of several shapes are averaged to so many pixels a side; 0 refuses them.

    Raises:
      UserError: an item of another form, images of several shapes, or no item at all.
    """
    images: list[npt.NDArray[Any]] = []
    labels: list[Any] = []
    for item in _items(given):
        image, label = _image_and_label(item)
        batch = image if (label.ndim == 1 if label is not None else getattr(image, "ndim", 2) == 4) else [image]
        images += [_channels_last(one) for one in batch]
        labels += [None] * len(batch) if label is None else label.reshape(-1).tolist()
    if not images:
        raise UserError(f"{type(given).__name__}: has no example")
    if len(images) != len(labels):
        raise UserError(f"{type(given).__name__}: {len(images)} images, {len(labels)} labels")
    found = None if None in labels else np.asarray(labels)
    return Examples(_stacked(images, image_size), found, _class_names(given, found))


def array(given: Any) -> Any:
    """Returns a PyTorch tensor, `[n, C, H, W]` say, as an array, then `[n, H, W, C]`; anything else untouched."""
    if not _is_tensor(given):
        return given
    values = given.detach().cpu().numpy()
    return np.moveaxis(values, 1, -1) if values.ndim == 4 else values


def _items(given: Any) -> Iterable[Any]:
    if hasattr(given, "as_numpy_iterator"):  # tf.data.Dataset
        return given.as_numpy_iterator()
    if hasattr(given, "__iter__"):
        return given
    return (given[i] for i in range(len(given)))  # a PyTorch Dataset


def _image_and_label(item: Any) -> tuple[Any, npt.NDArray[Any] | None]:
    if isinstance(item, Mapping):
        if "image" not in item:
            raise UserError(f"an example has the fields {', '.join(map(str, item))}; needs image, and label to train")
        image, label = item["image"], item.get("label")
    elif isinstance(item, list | tuple):
        if len(item) != 2:
            raise UserError(f"an example has {len(item)} parts; needs a pair (image, label), or fields image and label")
        image, label = item
    else:
        image, label = item, None
    if isinstance(image, str | bytes):
        raise UserError(f"an image is {type(image).__name__}; needs an array, a Pillow image or a tensor")
    return image, None if label is None else np.asarray(label)


def _is_tensor(image: Any) -> bool:
    return type(image).__module__.partition(".")[0] == "torch"


def _channels_last(image: Any) -> npt.NDArray[Any]:
    """Returns one image as `[H, W, C]`."""
    if hasattr(image, "getbands"):  # Pillow's
        if image.mode not in _GREY + _COLOUR:
            raise UserError(f"a picture has the mode {image.mode!r}; allowed: {', '.join(_GREY + _COLOUR)}")
        image = image.convert("L" if image.mode in _GREY else "RGB")
    values = image.detach().cpu().numpy() if _is_tensor(image) else np.asarray(image)
    if values.ndim == 3:
        return np.moveaxis(values, 0, -1) if _is_tensor(image) else values
    if values.ndim != 2:
        raise UserError(f"an image is {values.dtype} {values.shape}; needs [H, W, C] or [H, W]")
    return values[..., None]


def _stacked(images: list[npt.NDArray[Any]], size: int) -> npt.NDArray[Any]:
    channels = {image.shape[-1] for image in images}
    if channels == {1, 3}:  # grey pictures among those in colour
        images = [np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image for image in images]
    shapes = sorted({image.shape for image in images})
    if len(shapes) == 1:
        return np.stack(images)
    if not size or any(image.dtype != np.uint8 for image in images) or len({shape[-1] for shape in shapes}) > 1:
        raise UserError(
            f"images differ in shape: {shapes[0]}, {shapes[-1]}; make them equal, or uint8 and set image_size"
        )
    return np.concatenate([resize(image[None], size) for image in images])


def _class_names(given: Any, labels: npt.NDArray[Any] | None) -> tuple[str, ...]:
    """Returns the names of Hugging Face's `ClassLabel`, or torchvision's `classes`; of a loader, its set's."""
    features = getattr(given, "features", None)
    names = getattr(features.get("label"), "names", None) if isinstance(features, Mapping) else None
    names = names or getattr(getattr(given, "dataset", given), "classes", None) or ()
    if labels is None or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= len(names):
        return ()
    return tuple(map(str, names))
