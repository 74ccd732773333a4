"""Many picture files, decoded by processes of their own: in order, and never more than a few batches ahead.

A process that decodes imports this module and not JAX. Memory does not grow with the number of files: they are listed
as they are needed, and what was decoded waits in a queue of bounded length.
"""

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mfm_jax.data import pictures
from mfm_jax.data.workers import pool
from mfm_jax.errors import UserError

_CHUNK = 16  # files a task: messages between processes cost as much as small pictures


class Decoded(NamedTuple):
    """A file: its picture, uint8 `[size, size, channels]`, or None and the reason why there is none."""

    path: Path
    image: npt.NDArray[np.uint8] | None
    problem: str = ""


def files(places: Iterable[Path]) -> Iterator[Path]:
    """Yields each file of `places`, and of each folder the pictures in and below it, sorted by name.

    In a folder, pictures are the files with a suffix of `pictures.SUFFIXES`; hidden files and folders are passed over,
    and links to folders are not followed.

    Raises:
      UserError: there is no such file or folder, or a folder cannot be read.
    """
    for place in places:
        if place.is_dir():
            for folder, inside, names in os.walk(place, onerror=_refuse):
                inside[:] = sorted(name for name in inside if not name.startswith("."))
                found = (n for n in sorted(names) if n.lower().endswith(pictures.SUFFIXES) and not n.startswith("."))
                yield from (Path(folder, name) for name in found)
        elif place.exists():
            yield place
        else:
            raise UserError(f"{place}: no such file or folder")


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}")


def decoded(paths: Iterable[Path], size: int, channels: int, fit: str, workers: int) -> Iterator[Decoded]:
    """Yields every file of `paths`, in order, decoded as `pictures.read` does.

    Args:
      paths: the files.
      size, channels, fit: as of `pictures.read`.
      workers: processes; 0 decodes in this one.

    Raises:
      UserError: a process was ended from outside.
    """
    rest = iter(paths)
    chunks = iter(lambda: list(itertools.islice(rest, _CHUNK)), [])
    if not workers:
        for chunk in chunks:
            yield from _read(chunk, size, channels, fit)
        return
    waiting: deque[Future[list[Decoded]]] = deque()
    with pool(workers) as processes:
        try:
            for chunk in chunks:
                waiting.append(processes.submit(_read, chunk, size, channels, fit))
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"--workers={workers}: a process that decodes was ended; is memory short? choose fewer"
            ) from error


def _read(chunk: list[Path], size: int, channels: int, fit: str) -> list[Decoded]:
    return [_read_one(path, size, channels, fit) for path in chunk]


def _read_one(path: Path, size: int, channels: int, fit: str) -> Decoded:
    try:
        return Decoded(path, pictures.read(path, size, channels, fit))
    except pictures.BadPicture as reason:
        return Decoded(path, None, str(reason))
