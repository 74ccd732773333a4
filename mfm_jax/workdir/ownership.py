"""One run at a time in a workdir.

The lock is the operating system's (`flock`) on a file there (`Workdir.owner`), so that it ends with the process that
holds it, however that ends; the file's content only says who that is. Where there is no `flock`, as on Windows and on
some network file systems, nothing is locked.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from mfm_jax.errors import UserError


@contextlib.contextmanager
def owned(path: Path) -> Iterator[None]:
    """Holds the workdir of which `path` is the lock for this process.

    Raises:
      UserError: another run holds it; the message names its host and process.
    """
    file = _locked(path)
    try:
        with contextlib.suppress(OSError):  # a full disk: the lock holds, without its owner's name
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(file.name)
        with contextlib.suppress(OSError):
            file.close()


def _locked(path: Path) -> TextIO:
    """Returns the locked, open file."""
    while True:
        file = path.open("a+")
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "its name is not known"
            file.close()
            raise UserError(
                f"--workdir={path.parent}: another run is at work there ({owner}); wait for it, or choose a new"
                " --workdir"
            ) from None
        except OSError:  # a file system without locks
            return file
        # Its last holder may have removed the file between opening and locking it: then it locks nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()
