"""A source of images of the user's own: a `Source`, or a function `config.data -> Source`."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mfm_jax.config import Data
from mfm_jax.data.sources import Labels, Pixels, Source, in_two_pools, resize
from mfm_jax.data.streaming import Streamed
from mfm_jax.errors import UserError, failing

Split = tuple[Any, Any]  # images [N, H, W] or [N, H, W, C], labels [N]


def load(own: Source | Callable[[Data], Source], config: Data) -> Source:
    """Returns the source of the user's own, its images at `data.image_size` pixels a side (0 = as given).

    Raises:
      UserError: it is no source, making it fails, or what it holds is not what every source holds.
    """
    field = f"data.source = {config.source!r}"
    if callable(own):
        with failing(f"{field}: fails when called with the fields of `data`"):
            own = own(config)
    if not isinstance(own, Source):
        raise UserError(f"{field}: gives a {type(own).__name__}; give a Source, e.g. of mfm_jax.source_of_arrays")
    if problem := next(_problems(own), ""):
        raise UserError(f"{field}: {problem}")
    sized: dict[str, Any] = {
        name: resize(images, config.image_size)
        for name in ("train_images", "test_images")
        if isinstance(images := getattr(own, name), np.ndarray)
    }
    return replace(own, **sized)


def source_of_arrays(
    train: Split,
    test: Split,
    *,
    val: Split | None = None,
    meta: Split | None = None,
    class_names: Sequence[str] = (),
    name: str = "arrays",
) -> Source:
    """Returns the source of images and labels in memory; its version is the hash of what is in them.

    Args:
      train: uint8 images `[N, H, W]`, or `[N, H, W, C]` with 1 or 3 channels; integer labels `[N]`, from 0.
      test: the same.
      val: the same of a validation set that the data brings (`data.protocol = natural`); other protocols draw it from
        `train`.
      meta: of a meta set.
      class_names: K names; the numbers of the classes by default.
      name: of the set.

    Raises:
      UserError: arrays of other shapes or kinds.
    """
    given = {"train": train, "val": val, "meta": meta, "test": test}
    arrays = {split: _arrays(split, *pair) for split, pair in given.items() if pair is not None}
    if len({images.shape[1:] for images, _ in arrays.values()}) > 1:
        shapes = ", ".join(f"{images.shape[1:]} in {split}" for split, (images, _) in arrays.items())
        raise UserError(f"source_of_arrays: images differ in shape: {shapes}; give all the same")
    digest = hashlib.sha256()
    for images, labels in arrays.values():
        digest.update(images.tobytes() + labels.tobytes())
    classes = max(int(labels.max()) for _, labels in arrays.values()) + 1
    splits = [split for split in arrays if split != "test"]
    images, labels = (np.concatenate([arrays[split][i] for split in splits]) for i in (0, 1))
    names = tuple(class_names) or tuple(map(str, range(classes)))
    source = in_two_pools(name, digest.hexdigest()[:16], names, (images, labels), arrays["test"])
    if len(splits) > 1:
        source = replace(source, given=np.repeat(splits, [len(arrays[split][1]) for split in splits]))
    if problem := next(_problems(source), ""):
        raise UserError(f"source_of_arrays: {problem}")
    return source


def _arrays(split: str, images: Any, labels: Any) -> tuple[Pixels, Labels]:
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim == 3:
        images = images[..., None]
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1 or not len(labels):
        raise UserError(f"source_of_arrays: labels of {split} are {labels.dtype} {labels.shape}; give integers [N]")
    return images, labels.astype(np.int32)


def _problems(source: Source) -> Any:
    """Yields what in a source is not as `Source` says."""
    classes = len(source.class_names)
    for split in ("train", "test"):
        images, labels, ids = (getattr(source, f"{split}_{what}") for what in ("images", "labels", "ids"))
        shape, kind = images.shape, "uint8" if isinstance(images, Streamed) else str(images.dtype)
        if kind != "uint8" or len(shape) != 4 or shape[-1] not in (1, 3) or not shape[0]:
            yield f"{split} images are {kind} {tuple(shape)}; give uint8 (0 to 255) [N, H, W, C] with 1 or 3 channels"
        if labels.dtype != np.int32 or labels.shape != shape[:1]:
            yield f"{split} labels are {labels.dtype} {labels.shape}; give int32 {shape[:1]}, one for each image"
        elif labels.min() < 0 or labels.max() >= classes:
            found = f"{labels.min()} to {labels.max()}"
            yield f"{split} labels are {found}, with {classes} class names; classes are numbered from 0"
        if ids.shape != shape[:1] or (np.diff(ids) <= 0).any():
            yield f"{split} ids do not rise from record to record; give each image its own, sorted"
    if source.train_images.shape[1:] != source.test_images.shape[1:]:
        yield f"images are {source.train_images.shape[1:]} in train, {source.test_images.shape[1:]} in test"
