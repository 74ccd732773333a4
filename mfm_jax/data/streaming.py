"""Pictures that are decoded when they are needed: for data that does not fit into the device's memory.

`Files` stands where an array of images would: it has a shape, a length, and takes an index. `stream` decodes what an
order asks for, batch by batch, in worker processes, ahead of who reads. Like the resident path it keeps no position:
which pictures are in batch t, and which part of each is seen, follows from the order, the seed and t alone, so a run
that goes on in the middle of an epoch asks for the rest of the same stream.

NumPy on the host only; who reads puts batches on the device.
"""

import abc
import dataclasses
import functools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mfm_jax.data import pictures
from mfm_jax.data import workers as processes
from mfm_jax.errors import UserError

Ints = npt.NDArray[np.integer]
Pixels = npt.NDArray[np.uint8]


class RandomPart(NamedTuple):
    """Take a random part of each picture (`pictures.read_part`), drawn from the seed, the step and its place."""

    min_area: float
    seed: tuple[int, ...]
    places: Ints  # of each picture in the whole batch, of which hosts have parts


class Streamed(abc.ABC):
    """Images uint8 [N, H, W, C] that are read when they are needed.

    With an integer, `images[i]` reads one; with a slice, or an array of positions, it is the images there, unread.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @abc.abstractmethod
    def batch(self, picks: Ints, part: RandomPart | None = None, seed: tuple[int, ...] = ()) -> Pixels:
        """Returns the pictures at `picks` [B] as [B, H, W, C]; with `part`, a part of each."""

    @abc.abstractmethod
    def at(self, index: Any) -> "Streamed":
        """Returns the images at `index`, a slice or an array of positions, unread."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:  # an image for a position, else what `at` returns
        return self.batch(np.array([index]))[0] if isinstance(index, int | np.integer) else self.at(index)


@dataclass(frozen=True, eq=False)
class Rows(Streamed):
    """The images at some positions of an array, which may be a file that is mapped into memory."""

    array: Pixels  # [M, H, W, C]
    positions: Ints  # [N]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.positions), *self.array.shape[1:]

    def at(self, index: Any) -> "Rows":
        return Rows(self.array, self.positions[index])

    def batch(self, picks: Ints, part: RandomPart | None = None, seed: tuple[int, ...] = ()) -> Pixels:
        del part, seed  # of pictures at one size, the whole is seen
        return np.asarray(self.array[self.positions[picks]])


@dataclass(frozen=True, eq=False)
class Files(Streamed):
    """Images [N, size, size, channels] that are decoded from files."""

    root: Path
    paths: npt.NDArray[np.object_]  # [N] of str, relative to `root`
    size: int
    channels: int
    fit: str
    white: int  # as of `pictures.read`
    digests: npt.NDArray[np.bytes_]  # [N], of the files as they were checked (`pictures.Facts`)

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.paths), self.size, self.size, self.channels

    def at(self, index: Any) -> "Files":
        return dataclasses.replace(self, paths=self.paths[index], digests=self.digests[index])

    def batch(self, picks: Ints, part: RandomPart | None = None, seed: tuple[int, ...] = ()) -> Pixels:
        """As `Streamed.batch`.

        Raises:
          UserError: a file is gone or has changed since it was checked.
        """
        result = np.empty((len(picks), *self.shape[1:]), np.uint8)
        for place, index in enumerate(picks.tolist()):
            rng = part and np.random.default_rng([*part.seed, *seed, part.places[place]])
            result[place] = self._decode(index, part.min_area if part else 0.0, rng)
        return result

    def _decode(self, index: int, min_area: float, rng: np.random.Generator | None) -> Pixels:
        path, digest = self.root / self.paths[index], self.digests[index].decode()
        try:
            if rng is None:
                return pictures.read(path, self.size, self.channels, self.fit, self.white, digest)
            return pictures.read_part(path, self.size, self.channels, rng, min_area, self.white, digest)
        except pictures.BadPicture as error:
            raise UserError(f"{path}: {error}; it has changed since it was checked, see --mode=check") from error


class Picks(NamedTuple):
    """What one of the streams consists of."""

    images: Streamed
    order: Sequence[Ints]  # the pictures of each batch; batches may differ in size and be empty
    part: RandomPart | None = None  # None: the whole of each picture


def stream(streams: Sequence[Picks], *, workers: int, first: int = 0) -> Generator[tuple[Pixels, ...], None, None]:
    """Yields a batch of each stream at every step, uint8 [B, size, size, C], decoded ahead until it is closed.

    Args:
      streams: equally many batches each.
      workers: processes that decode, a step at a time each; 0 decodes in this process, when a step is asked for.
      first: the step to begin with.

    Raises:
      UserError: a file is gone or has changed since it was checked, or a process was ended from outside.
    """
    decodes = any(isinstance(picks.images, Files) for picks in streams)  # an array is read faster than it is sent
    steps, read = range(first, len(streams[0].order)), functools.partial(_batches, streams)
    try:
        yield from processes.mapped(read, steps, workers if decodes else 0)
    except processes.WorkerEnded as error:
        raise UserError(
            f"data.workers = {workers}: a process that decodes was ended; is memory short? choose fewer, and run the"
            " same command to go on"
        ) from error


def _batches(streams: Sequence[Picks], step: int) -> tuple[Pixels, ...]:
    return tuple(images.batch(order[step], part, (step,)) for images, order, part in streams)


def in_batches(images: Streamed, batch_size: int, workers: int) -> Iterator[Pixels]:
    """Yields all images in order, the last batch as small as it comes; raises as `stream`."""
    order = [np.arange(i, min(i + batch_size, len(images))) for i in range(0, len(images), batch_size)]
    for (batch,) in stream([Picks(images, order)], workers=workers):
        yield batch


def paths(names: Sequence[str]) -> npt.NDArray[np.object_]:
    """Returns file names as `Files.paths`."""
    result = np.empty(len(names), object)
    result[:] = names
    return result
