"""Pictures that are decoded when they are needed: for data that does not fit into the device's memory.

`Files` stands where an array of images would: it has a shape, a length, and takes an index. `stream` decodes what an
order asks for, batch by batch, in worker processes (grain's), ahead of who reads. Like the resident path it keeps no
position: which pictures are in batch t, and which part of each is seen, follows from the order, the seed and t alone,
so a run that goes on in the middle of an epoch asks for the rest of the same stream.

NumPy on the host only; who reads puts batches on the device.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
import numpy.typing as npt
from absl import flags

from mfm_jax.data import pictures
from mfm_jax.errors import UserError

_AHEAD = 2  # batches that each worker prepares before they are asked for

Ints = npt.NDArray[np.integer]
Pixels = npt.NDArray[np.uint8]


class RandomPart(NamedTuple):
    """Take a random part of each picture (`pictures.read_part`), drawn from `seed` and its place in the order."""

    min_area: float
    seed: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Files:
    """Images [N, size, size, channels] uint8 that are decoded when an item is taken.

    `files[i]` with an integer decodes one; with a slice, or an array of positions, it is the `Files` of those.
    """

    root: Path
    paths: npt.NDArray[np.object_]  # [N] of str, relative to `root`
    size: int
    channels: int
    fit: str

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.paths), self.size, self.size, self.channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index):  # of the type that `index` says
        if isinstance(index, int | np.integer):
            return self.decode(int(index))
        return Files(self.root, self.paths[index], self.size, self.channels, self.fit)

    def decode(self, index: int, part: RandomPart | None = None, position: int = 0) -> Pixels:
        """Returns picture `index`, or a random part of it that depends on the seed and `position`.

        Raises:
          UserError: the file is gone or was damaged since it was checked.
        """
        path = self.root / self.paths[index]
        try:
            if part is None:
                return pictures.read(path, self.size, self.channels, self.fit)
            rng = np.random.default_rng([*part.seed, position])
            return pictures.read_part(path, self.size, self.channels, rng, part.min_area)
        except pictures.BadPicture as error:
            raise UserError(f"{path}: {error}; it was changed since it was checked, see --mode=check") from error


@dataclass(frozen=True, eq=False)
class _Picked:
    """The pictures of an order, as grain asks for them: item i is the one at `index[i]`."""

    images: Files
    index: Ints
    position: Ints
    part: RandomPart | None

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> Pixels:
        return self.images.decode(int(self.index[item]), self.part, int(self.position[item]))


@contextlib.contextmanager
def stream(
    images: Files,
    order: Ints,
    *,
    workers: int,
    part: RandomPart | None = None,
    first: int = 0,
    share: slice = slice(None),
) -> Iterator[Iterator[Pixels]]:
    """Gives an iterator over the batches of `order`, uint8 [B, size, size, C], decoded ahead in `workers` processes.

    Args:
      images: what the order points into.
      order: [S, B], the pictures of each batch.
      workers: 0 decodes in this process, when a batch is asked for.
      part: what is seen of each picture; None fits the whole (`images.fit`).
      first: the batch to begin with.
      share: which places of every batch are decoded: this host's.

    Raises:
      UserError: a file is gone or was damaged since it was checked.
    """
    places = np.arange(order.size).reshape(order.shape)
    index, position = (np.asarray(x)[first:, share] for x in (order, places))
    if not index.size:
        yield iter(())
        return
    source = _Picked(images, index.ravel(), position.ravel(), part)
    batches = grain.MapDataset.source(source).batch(index.shape[1]).to_iter_dataset(grain.ReadOptions(1, 1))
    if workers:
        if not flags.FLAGS.is_parsed():  # in a notebook; grain's workers ask for its own flags
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(workers, _AHEAD))
    iterator = iter(batches)
    try:
        yield iterator
    finally:
        iterator.close()


def decode_all(images: Files, workers: int, batch_size: int = 64) -> Iterator[tuple[slice, Pixels]]:
    """Yields all images in order, in batches with their place; raises as `stream`."""
    whole = len(images) // batch_size
    order = np.arange(whole * batch_size).reshape(whole, batch_size)
    with stream(images, order, workers=workers) as batches:
        for i, batch in enumerate(batches):
            yield slice(i * batch_size, (i + 1) * batch_size), batch
    if rest := len(images) % batch_size:
        start = whole * batch_size
        yield slice(start, start + rest), np.stack([images[i] for i in range(start, start + rest)])


def paths(names: Sequence[str]) -> npt.NDArray[np.object_]:
    """Returns file names as `Files.paths`."""
    result = np.empty(len(names), object)
    result[:] = names
    return result
