"""Decoded images that are kept between runs, in the user's cache folder ($MFM_JAX_CACHE, else the platform's).

Decoding 60,000 PNG files takes seconds to half a minute, so it is done once. The name of an entry holds all that the
arrays depend on. An entry is trusted only if its checksums fit; anything else is decoded again.
"""

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mfm_jax.data.sources import Labels, Pixels
from mfm_jax.machine import cache


def cached(name: str, build: Callable[[], tuple[Pixels, Labels]]) -> tuple[Pixels, Labels]:
    """Returns what the cache entry `name` holds, or what `build` returns, which is then kept there.

    An entry is a folder that appears whole or not at all (built beside, then renamed), so processes may build
    at once: the first to finish is kept, the others use their own arrays. An entry whose checksums do not fit
    is replaced. A folder that cannot be written costs the cache, not the run.
    """
    root = cache.folder()
    entry = root / name
    kept = _read_entry(entry)
    if kept is not None:
        return kept
    images, labels = build()
    try:
        _write_entry(entry, images, labels)
    except OSError as error:
        logging.getLogger(__name__).warning("decoded images are not kept: %s cannot be written (%s)", root, error)
    return images, labels


def _read_entry(entry: Path) -> tuple[Pixels, Labels] | None:
    """Returns the arrays of an entry; None where it is missing or damaged."""
    try:
        if json.loads((entry / "checksums.json").read_text()) != _checksums(entry):
            return None
        return np.load(entry / "images.npy", mmap_mode="r"), np.load(entry / "labels.npy")
    except (OSError, ValueError):
        return None


def _write_entry(entry: Path, images: Pixels, labels: Labels) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    for left in entry.parent.glob(".building-*"):  # of a process that was killed
        if left.stat().st_mtime < time.time() - 86_400:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=entry.parent) as scratch:
        new = Path(scratch) / "entry"
        new.mkdir()
        np.save(new / "images.npy", images)
        np.save(new / "labels.npy", labels)
        (new / "checksums.json").write_text(json.dumps(_checksums(new)))
        try:
            new.rename(entry)
        except OSError:  # it exists: another process was first, or it is damaged
            if _read_entry(entry) is None:
                shutil.rmtree(entry, ignore_errors=True)
                new.rename(entry)


def _checksums(entry: Path) -> dict[str, str]:
    """Returns the SHA-256 of each array file."""
    result = {}
    for name in ("images.npy", "labels.npy"):
        with open(entry / name, "rb") as file:
            result[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return result
