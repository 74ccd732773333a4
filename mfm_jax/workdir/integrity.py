"""Digests of a folder's files, so that damage on disk is found before anything is read.

Orbax's file format has checksums of its index, not of the arrays: a flipped bit there is restored as a wrong number,
silently. A checkpoint is therefore sealed, while it still has its temporary name, with the SHA-256 of each of its
files; it becomes visible with its seal or not at all.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from mfm_jax.machine import disk

SEAL = "sha256.json"
# Written by Orbax after the seal; a restore needs neither.
_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


def seal(folder: Path) -> None:
    """Writes the SHA-256 of every file below `folder` to `folder/sha256.json`."""
    disk.write_object(folder / SEAL, dict(digests(folder)))


def damage(folder: Path) -> str:
    """Returns what is wrong with a sealed folder, naming the file; "" if every file is as it was sealed."""
    try:
        sealed = json.loads((folder / SEAL).read_bytes())
        present = dict(digests(folder))
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:  # ValueError: not JSON, not text
        return f"unreadable: {error}"
    if not isinstance(sealed, dict):
        return f"{SEAL} has changed"
    for name, digest in sealed.items():
        if present.get(name) != digest:
            return f"{name} {'has changed' if name in present else 'is missing'}"
    return ""


def digests(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields the path below `folder` and the SHA-256 of each file, but for the seal and what Orbax writes after it."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != SEAL and name not in _LATER:
            with path.open("rb") as file:
                yield name, hashlib.file_digest(file, "sha256").hexdigest()
