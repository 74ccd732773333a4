"""What the system knows of a file without opening it, and whether that would show that the file has changed.

A stamp says that what was decoded here earlier is still what the file holds. It is no part of a manifest: copied to
another machine, the same data has other stamps, and a run goes on with it.
"""

import os
import time
from pathlib import Path
from typing import NamedTuple

_SETTLED = 2 * 10**9  # ns; the coarsest clock of a file system, FAT's


class Stamp(NamedTuple):
    """Size and time of writing can be set, and archives and copies do set them. The others nobody sets."""

    size: int  # bytes
    written: int  # ns
    changed: int  # ns, when the file was last written, moved, or had its times set
    device: int
    inode: int


NOTHING = Stamp(0, 0, 0, 0, 0)


def of(path: str | Path) -> Stamp:
    """Returns the stamp of a file, `NOTHING` where the system knows nothing."""
    try:
        facts = os.stat(path)
    except (OSError, ValueError):
        return NOTHING
    return Stamp(facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_dev, facts.st_ino)


def shows_changes(stamp: Stamp, now: int | None = None) -> bool:
    """Whether a file would have another stamp if it changed after `now`, ns, when the stamp was taken.

    Drives that keep no inodes, or times of whole seconds, as some on a network do, cannot show it. Nor can others where
    the file changed a moment ago: a second change may get the time of the first.
    """
    if not stamp.inode or not stamp.changed % 10**9:
        return False
    return (time.time_ns() if now is None else now) - stamp.changed > _SETTLED
