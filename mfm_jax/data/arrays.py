"""A data set in one `.npz` file: arrays under the names that MedMNIST gives them.

`train_images` (uint8, `[N, H, W]` or `[N, H, W, C]` with 1 or 3 channels), `train_labels` (integers from 0, `[N]` or
`[N, 1]`), and, where there are such splits, the same of `test`, `val` and `meta`; `class_names` (strings, `[K]`) may be
left out. A benchmark that was packed (`benchmarks/subset.py`) has a split's manifest in `manifest` (a string): its
records keep their names, so that the split can be compared with the one that was packed.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mfm_jax.config import Data
from mfm_jax.data import stamps
from mfm_jax.data.kept import cached
from mfm_jax.data.manifest import parse_manifest
from mfm_jax.data.sources import Labels, Pixels, Source, in_two_pools, resize
from mfm_jax.errors import UserError
from mfm_jax.machine.disk import expanded

_FOR_TRAINING = ("train", "val", "meta")
_NEEDED = ("train_images", "train_labels")
_MANIFEST = "manifest"  # of a packed benchmark


def load(config: Data) -> Source:
    """Loads the file `config.root`, its images at `config.image_size` pixels a side (0 = as stored).

    Resized arrays, and those too large for `config.resident_mb`, are kept in the cache, under the hash of the file.
    Without a test split, the source's has no image.

    Raises:
      UserError: there is no such file, or it is none of this kind; names the array.
    """
    arrays = _Arrays(config.root)
    for name in arrays.names:
        if name.endswith(("_images", "_labels")) and name.rpartition("_")[0] not in (*_FOR_TRAINING, "test"):
            raise arrays.error(f"{name} belongs to no split; they are train, val, meta and test")
    splits = [split for split in _FOR_TRAINING if f"{split}_images" in arrays.names]
    tested = ["test"] if "test_images" in arrays.names or "test_labels" in arrays.names else []
    found = {split: arrays.labels(split) for split in (*splits, *tested)}
    classes, images = max(int(values.max()) for values in found.values()) + 1, sum(map(len, found.values()))
    if classes > images:
        raise arrays.error(f"labels reach {classes - 1}, with {images} images in all; classes are numbered from 0")
    if 0 not in found["train"] and "class_names" not in arrays.names:
        raise arrays.error("train_labels has no 0; classes are numbered from 0")
    class_names = arrays.class_names(classes)
    labels = {split: values.astype(np.int32) for split, values in found.items()}

    def read(chosen: Sequence[str]) -> tuple[Pixels, Labels]:
        def resized() -> tuple[Pixels, Labels]:
            images = [resize(arrays.images(split, len(labels[split])), config.image_size) for split in chosen]
            if len({part.shape[1:] for part in images}) > 1:
                shapes = ", ".join(f"{part.shape[1:]} in {split}" for split, part in zip(chosen, images, strict=True))
                raise arrays.error(f"images differ in shape: {shapes}")
            return np.concatenate(images), np.concatenate([labels[split] for split in chosen])

        if not config.image_size and arrays.bytes <= config.resident_mb * 1e6:
            return resized()
        return cached(f"npz-{arrays.version}-{'-'.join(chosen)}-{config.image_size}px", resized)

    train = read(splits)
    test = read(tested) if tested else (train[0][:0], train[1][:0])
    if train[0].shape[1:] != test[0].shape[1:]:
        raise arrays.error(f"images are {train[0].shape[1:]} in train, {test[0].shape[1:]} in test")
    source = in_two_pools(arrays.path.stem, arrays.version, class_names, train, test)
    if _MANIFEST in arrays.names:
        return _packed(source, arrays, labels)
    return replace(source, given=np.repeat(splits, [len(labels[split]) for split in splits]))


def _packed(source: Source, arrays: "_Arrays", labels: dict[str, Labels]) -> Source:
    """Returns `source` with the records' names of the manifest in the file, and in their order."""
    manifest = arrays.manifest()
    records, splits = manifest["splits"], [split for split in labels if split != "test"]
    for split in labels:
        if (named := len(records[split]["ids"])) != (found := len(labels[split])):
            raise arrays.error(f"{split} has {found} images, its manifest names {named}; pack it again")
    ids = np.concatenate([np.array(records[split]["ids"], np.int64) for split in splits])
    order = np.argsort(ids, kind="stable")
    return replace(
        source,
        name=manifest["dataset"],
        version=manifest["version"],
        train_images=source.train_images[order],
        train_labels=source.train_labels[order],
        train_ids=ids[order],
        train_pool=records["train"]["pool"],
        test_ids=np.array(records["test"]["ids"], np.int64),
        test_pool=records["test"]["pool"],
        given=np.repeat(splits, [len(labels[split]) for split in splits])[order],
        manifest=manifest,
    )


class _Arrays:
    """The arrays of one file, each checked as it is read."""

    def __init__(self, root: str) -> None:
        if not root:
            raise UserError("data.root: missing; data.source = 'npz' needs the file")
        self.path = expanded(root)
        try:
            self._stamp = stamps.of(self.path)
            with self.path.open("rb") as file:
                self.version = hashlib.file_digest(file, "sha256").hexdigest()[:16]
                file.seek(0)
                with np.load(file) as members:
                    self.names = tuple(members.files)
                    self.bytes = sum(member.file_size for member in members.zip.infolist())  # of the arrays
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:  # TypeError: a bare array
            raise self.error(f"not an .npz file that can be read ({error})") from error
        for name in (*_NEEDED, *(("test_images", "test_labels") if _MANIFEST in self.names else ())):
            if name not in self.names:
                raise self.error(f"has no array {name}; it has: {', '.join(self.names) or 'none'}")

    def error(self, message: str) -> UserError:
        return UserError(f"data.root = {str(self.path)!r}: {message}")

    def images(self, split: str, count: int) -> Pixels:
        values = self._read(f"{split}_images")
        images = values[..., None] if values.ndim == 3 else values
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
            raise self.error(
                f"{split}_images is {values.dtype} {values.shape}; needs uint8 (0 to 255) of shape [N, H, W],"
                " [N, H, W, 1] or [N, H, W, 3]"
            )
        if len(images) != count:
            raise self.error(f"{split}_images has {len(images)} images, {split}_labels {count}")
        return images

    def labels(self, split: str) -> np.ndarray:
        values = self._read(f"{split}_labels")
        if values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        if not np.issubdtype(values.dtype, np.integer) or values.ndim != 1 or not len(values) or values.min() < 0:
            raise self.error(f"{split}_labels is {values.dtype} {values.shape}; needs integers from 0 of shape [N]")
        return values

    def class_names(self, count: int) -> tuple[str, ...]:
        if "class_names" not in self.names:
            return tuple(str(c) for c in range(count))
        values = self._read("class_names")
        if values.dtype.kind != "U" or values.ndim != 1 or len(values) < count:
            raise self.error(f"class_names is {values.dtype} {values.shape}; needs at least {count} strings")
        return tuple(values.tolist())

    def manifest(self) -> dict[str, Any]:
        return parse_manifest(str(self._read(_MANIFEST)), f"in data.root = {str(self.path)!r}")

    def _read(self, name: str) -> np.ndarray:
        try:
            with np.load(self.path) as file:
                values = file[name]
        except (KeyError, OSError, ValueError, zlib.error, zipfile.BadZipFile) as error:
            raise self.error(f"{name} cannot be read ({error})") from error
        if stamps.of(self.path) != self._stamp:  # it would be kept under the hash of the other file
            raise self.error("was written to while it was read; start again")
        return values
