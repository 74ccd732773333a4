"""Many picture files, decoded by processes of their own: in order, and never more than a few batches ahead.

A process that decodes imports this module and not JAX. Memory does not grow with the number of files: they are listed
as they are needed, and what was decoded waits in a queue of bounded length.
"""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mfm_jax.data import pictures
from mfm_jax.data import workers as processes
from mfm_jax.errors import UserError

_CHUNK = 16  # files a message


class Decoded(NamedTuple):
    """A file: its picture, uint8 `[size, size, channels]`, or None and the reason why there is none."""

    path: Path
    image: npt.NDArray[np.uint8] | None
    problem: str = ""


def decoded(paths: Iterable[Path], size: int, channels: int, fit: str, white: int, workers: int) -> Iterator[Decoded]:
    """Yields every file of `paths`, in order, decoded as `pictures.read` does.

    `size`, `channels`, `fit` and `white` are as there; `workers` processes decode, or this one alone.

    Raises:
      UserError: a process was ended from outside.
    """
    read = functools.partial(_read, size=size, channels=channels, fit=fit, white=white)
    try:
        yield from processes.mapped(read, paths, workers, _CHUNK)
    except processes.WorkerEnded as error:
        raise UserError(
            f"--workers={workers}: a process that decodes was ended; is memory short? choose fewer"
        ) from error


def _read(path: Path, size: int, channels: int, fit: str, white: int) -> Decoded:
    try:
        return Decoded(path, pictures.read(path, size, channels, fit, white))
    except pictures.BadPicture as reason:
        return Decoded(path, None, str(reason))
