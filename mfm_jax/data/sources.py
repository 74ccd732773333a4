"""What every source of images returns: uint8 images, int32 labels, and the id of each record, which never changes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mfm_jax.config import Data
from mfm_jax.data.streaming import Rows, Streamed

Pixels = npt.NDArray[np.uint8]
Images = Pixels | Streamed
Labels = npt.NDArray[np.int32]

TEST_SEED = 2020  # a constant: the test set must not change with `data.seed`
PROGRESS_FROM = 5_000  # records; fewer decode before a bar could be read
_PART = 256  # images that are averaged at a time


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset before it is split. A record is named by (pool, id); both splits may lie in one pool."""

    name: str
    version: str
    class_names: tuple[str, ...]
    train_images: Images  # [N, H, W, C]
    train_labels: Labels  # [N]
    train_ids: npt.NDArray[np.int64]  # [N], sorted
    train_pool: str
    test_images: Images
    test_labels: Labels
    test_ids: npt.NDArray[np.int64]
    test_pool: str
    given: npt.NDArray[np.str_] | None = None  # [N], "train", "val" or "meta", as the data itself says; None: all train
    groups: tuple[str, ...] = ()  # N group keys, "" for none; empty: no groups
    facts: Mapping[str, Any] = field(default_factory=dict)  # what else the manifest is to say
    manifest: dict[str, Any] | None = None  # of the split that the data was packed with, where it was


def in_two_pools(
    name: str,
    version: str,
    class_names: tuple[str, ...],
    train: tuple[Pixels, Labels],
    test: tuple[Pixels, Labels],
    test_pool: str = "test",
) -> Source:
    """Returns the source whose training and test records are numbered apart, each in their order."""
    return Source(
        name=name,
        version=version,
        class_names=class_names,
        train_images=train[0],
        train_labels=train[1],
        train_ids=np.arange(len(train[1]), dtype=np.int64),
        train_pool="train",
        test_images=test[0],
        test_labels=test[1],
        test_ids=np.arange(len(test[1]), dtype=np.int64),
        test_pool=test_pool,
    )


def streamed_if_large(config: Data, source: Source) -> Source:
    """Returns `source`, its training images as `Rows` where they exceed `data.resident_mb`."""
    images = source.train_images
    if isinstance(images, np.ndarray) and images.nbytes > config.resident_mb * 1e6:
        return replace(source, train_images=Rows(images, np.arange(len(images))))
    return source


def resize(images: Pixels, size: int) -> Pixels:
    """Averages images [N, H, W, C] to [N, size, size, C]: each new pixel is the mean of the area it covers.

    A side that is not `size` is squeezed or stretched on its own. The mean is rounded to the nearest integer,
    halves to even. 0, or the size the images have, returns them untouched.
    """
    height, width = images.shape[1:3]
    if size == 0 or (height, width) == (size, size):
        return images
    rows, columns = _averaging(height, size), _averaging(width, size)
    result = np.empty((len(images), size, size, images.shape[3]), np.uint8)
    for i in range(0, len(images), _PART):  # in parts: the float copies are ten times the images
        part = images[i : i + _PART].astype(np.float32)
        mean = np.einsum("ih,nhwc,jw->nijc", rows, part, columns, optimize=True)
        result[i : i + _PART] = np.clip(np.rint(mean), 0, 255)
    return result


def _averaging(old: int, new: int) -> npt.NDArray[np.float32]:
    """Returns the matrix [new, old] whose row i holds the share of each old pixel in new pixel i."""
    edges = np.arange(new + 1) * (old / new)
    pixel = np.arange(old)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return (np.clip(overlap, 0, None) * (new / old)).astype(np.float32)
