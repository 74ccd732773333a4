"""Every picture of a listing opened and decoded once: which cannot be used, how large they are, which are the same.

What was found of a sound picture is kept in the user's cache folder ($MFM_JAX_CACHE, else the platform's), a line each
in one file for each root, and believed as long as the picture's stamp (`stamps`) stays the same; so a second check
opens only what has changed and what was bad. Where a stamp shows nothing, the picture is read, and decoded only if its
content is another. A line has its own checksum: one that is torn or damaged is as good as absent.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress, TextColumn

from mfm_jax.data import stamps
from mfm_jax.data import workers as processes
from mfm_jax.data.listing import Listing
from mfm_jax.data.lists import SPLITS
from mfm_jax.data.pictures import FORMAT, Facts, facts_or_reason
from mfm_jax.data.stamps import Stamp
from mfm_jax.data.walk import Problem
from mfm_jax.errors import UserError, some_of
from mfm_jax.machine import cache as cache_lib

NEAR = 2  # bits of `Facts.look` in which pictures that look alike may differ
_SAME_SHAPE = 0.02  # by which the ratio of their sides may differ
_FLAT = 8  # a look with fewer bits set, or unset, is of a nearly even picture and says little
_NEIGHBOURS = 256  # pictures that each is compared with, among those that share half of their look
_CHUNK = 32  # pictures handed to a process at a time
_KEEP_EVERY = 2_000  # pictures between two writes of what was found
_PROGRESS_FROM = 1_000  # pictures; fewer are looked at before a bar could be read


class Duplicate(NamedTuple):
    """A picture and an earlier one that shows the same; earlier in the order of `SPLITS`, then of paths."""

    kind: str  # "file": two paths of one file; "copy": equal content; "alike": `look` and shape are nearly equal
    first: int  # position in the listing
    second: int


@dataclass(frozen=True, eq=False)
class Checked:
    """What a check found."""

    facts: tuple[Facts | None, ...]  # [N], in the listing's order; None for a picture that cannot be used
    problems: tuple[Problem, ...]  # the listing's, then those of the pictures
    contradictions: tuple[Problem, ...]  # pictures that are used, though others of equal bytes are in other classes
    duplicates: tuple[Duplicate, ...]  # each picture at most once as `second`


def check(listing: Listing, workers: int = 2) -> Checked:
    """Looks at every picture of a listing, in `workers` processes, or in this one for 0.

    Raises:
      UserError: a process was killed, by the system for want of memory or by a decoder's fault.
    """
    paths = [os.path.join(listing.root, path) for path in listing.paths]
    taken = [(stamp, stamps.shows_changes(stamp)) for stamp in map(stamps.of, paths)]
    # On a cluster one drive has another device number on each node.
    stamped = [stamp._replace(device=0) if shows else stamps.NOTHING for stamp, shows in taken]
    cache = _cache_file(listing.root)
    known = remembered(cache)
    before = [known.get(path, (stamps.NOTHING, None)) for path in listing.paths]
    facts = [fact if was == now != stamps.NOTHING else None for now, (was, fact) in zip(stamped, before, strict=True)]
    todo = [i for i, fact in enumerate(facts) if fact is None]
    problems = []
    with _kept(cache) as keep, _bar(len(todo)) as advance:
        looked = _looked_at([(Path(paths[i]), before[i][1]) for i in todo], workers)
        for i, found in zip(todo, looked, strict=True):
            if not isinstance(found, Facts):
                problems.append(Problem(listing.paths[i], found))
            else:
                facts[i] = found
                if (stamped[i], found) != before[i]:
                    keep(listing.paths[i], stamped[i], found)
            advance()
    # Drives without inodes cannot show that two paths are of one file.
    files = [(stamp.device, stamp.inode) if stamp.inode else (-1, i) for i, (stamp, _) in enumerate(taken)]
    duplicates = tuple(_duplicates(listing, facts, files))
    copied = _classes_of_copies(listing, facts)
    problems += [Problem(listing.class_names[label], reason) for label, reason in copied.items()]
    facts = [None if label in copied else fact for label, fact in zip(listing.labels.tolist(), facts, strict=True)]
    contradictions = tuple(_contradictions(listing, facts, duplicates))
    return Checked(tuple(facts), (*listing.problems, *problems), contradictions, duplicates)


def _looked_at(items: Sequence[tuple[Path, Facts | None]], workers: int) -> Iterator[Facts | str]:
    """Yields facts, or the reason why there are none, of each picture, with what was known of it, in turn."""
    done, workers = 0, workers if len(items) > _CHUNK else 0
    try:
        for found in processes.mapped(facts_or_reason, items, workers, _CHUNK):
            yield found
            done += 1
    except processes.WorkerEnded as error:
        raise UserError(
            f"data.workers = {workers}: a process that decodes was killed, within {(2 * workers + 1) * _CHUNK} pictures"
            f" of {str(items[done][0])!r}; one of them needs more memory than there is, or crashes its decoder"
        ) from error


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[], None]]:
    columns = (*Progress.get_default_columns(), TextColumn("{task.completed:,} of {task.total:,}"))
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=total < _PROGRESS_FROM) as bar:
        task = bar.add_task("checking pictures", total=total)
        yield lambda: bar.advance(task)


# What is known from earlier checks


def _cache_file(root: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:16]
    return cache_lib.folder() / f"checked-{FORMAT}-{name}.txt"


def remembered(cache: Path) -> dict[str, tuple[Stamp, Facts]]:
    """Returns the last stamp and the facts of each path, as far as the lines of a cache file are sound."""
    known: dict[str, tuple[Stamp, Facts]] = {}
    try:
        with cache.open("rb") as lines:
            for line in lines:
                checksum, _, text = line.rstrip(b"\n").partition(b" ")
                if checksum == _checksum(text):
                    path, stamp, facts = json.loads(text)
                    known[path] = Stamp(*stamp), Facts(*facts)
    except OSError:
        pass  # there is none, or it cannot be read: everything is looked at
    return known


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


@contextlib.contextmanager
def _kept(cache: Path) -> Iterator[Callable[[str, Stamp, Facts], None]]:
    """Gives a function that notes facts; they are written every few thousand, and at the end, however it comes."""
    lines: list[bytes] = []

    def write() -> None:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with cache.open("ab") as file:
                file.write(b"\n" + b"\n".join(lines) + b"\n")  # a line that was torn before ends here
        except OSError as error:
            logging.getLogger(__name__).warning("what a check found is not kept: %s (%s)", cache, error)
        lines.clear()

    def keep(path: str, stamp: Stamp, facts: Facts) -> None:
        text = json.dumps((path, stamp, facts)).encode()
        lines.append(_checksum(text) + b" " + text)
        if len(lines) >= _KEEP_EVERY:
            write()

    try:
        yield keep
    finally:
        if lines:
            write()


# Duplicates


def _duplicates(
    listing: Listing, facts: Sequence[Facts | None], files: Sequence[tuple[int, int]]
) -> Iterator[Duplicate]:
    """Yields each picture that repeats an earlier one, with the earliest: files, then copies, then look-alikes."""
    rank = {split: i for i, split in enumerate(SPLITS)}
    order = sorted((i for i, fact in enumerate(facts) if fact), key=lambda i: (rank[str(listing.splits[i])], i))
    first_file: dict[tuple[int, int], int] = {}
    first_copy: dict[str, int] = {}
    distinct = []
    for i in order:
        fact = facts[i]
        assert fact is not None
        file, copy = first_file.setdefault(files[i], i), first_copy.setdefault(fact.digest, i)
        if file != i:
            yield Duplicate("file", file, i)
        elif copy != i:
            yield Duplicate("copy", copy, i)
        else:
            distinct.append((i, fact.look, fact.width / fact.height))
    looks = np.array([look for _, look, _ in distinct], np.uint64)
    shapes = np.array([shape for _, _, shape in distinct], np.float64)
    for first, second in alike(looks, shapes):
        yield Duplicate("alike", distinct[first][0], distinct[second][0])


def _classes_of_copies(listing: Listing, facts: Sequence[Facts | None]) -> dict[int, str]:
    """Returns the classes of which every picture has the bytes of one in another class, with the reason, by label.

    Larger classes come first: where a folder holds the whole set once more, that is the one, and no class in it.
    """
    classes: defaultdict[str, set[int]] = defaultdict(set)
    contents: defaultdict[int, set[str]] = defaultdict(set)
    for label, fact in zip(listing.labels.tolist(), facts, strict=True):
        if fact:
            classes[fact.digest].add(label)
            contents[label].add(fact.digest)
    found: dict[int, str] = {}
    for label in sorted(contents, key=lambda label: (-len(contents[label]), -label)):
        others = [classes[digest] - {label} - found.keys() for digest in contents[label]]
        if all(others):
            them = some_of([repr(listing.class_names[other]) for other in sorted(set().union(*others))], 3)
            found[label] = f"a class of copies: the files of all its pictures are in {them}, too; remove one of the two"
    return found


def _contradictions(
    listing: Listing, facts: Sequence[Facts | None], duplicates: Iterable[Duplicate]
) -> Iterator[Problem]:
    """Yields each picture whose bytes are those of an earlier one in another class."""
    for kind, first, second in duplicates:
        differ = listing.labels[first] != listing.labels[second]
        if kind != "alike" and differ and facts[first] and facts[second]:
            other = f"{listing.paths[first]} in class {listing.class_names[listing.labels[first]]!r}"
            yield Problem(listing.paths[second], f"equal to {other}; one of the two labels is wrong")


def alike(looks: npt.NDArray[np.uint64], shapes: npt.NDArray[np.float64]) -> list[tuple[int, int]]:
    """Returns each position that an earlier one looks like, as (the earliest found, it), in order.

    They differ in at most NEAR of 64 bits in `looks [N]`, and in their ratio of sides, `shapes [N]`, by 0.02 of it.
    Of four quarters of the 64 bits, two are equal in looks that differ in two bits: sorted by each pair of quarters in
    turn, look-alikes are neighbours. Each is compared with the next 256 of those that share the pair, so in a set with
    very many that share it some are missed.
    """
    ones = np.bitwise_count(looks)
    telling = np.flatnonzero((ones >= _FLAT) & (ones <= 64 - _FLAT))
    first = np.arange(len(looks))
    for a, b in itertools.combinations(range(4), 2):
        mask = np.uint64((0xFFFF << 16 * a) | (0xFFFF << 16 * b))
        shared = looks[telling] & mask
        by_key = np.argsort(shared, kind="stable")
        position, shared = telling[by_key], shared[by_key]
        start = np.arange(len(shared))
        for shift in range(1, _NEIGHBOURS + 1):
            start = start[start + shift < len(shared)]
            start = start[shared[start] == shared[start + shift]]
            if not len(start):
                break
            left, right = position[start], position[start + shift]  # left < right: the sort is stable
            near = np.bitwise_count(looks[left] ^ looks[right]) <= NEAR
            near &= np.abs(shapes[left] - shapes[right]) <= _SAME_SHAPE * shapes[left]
            np.minimum.at(first, right[near], left[near])
    second = np.flatnonzero(first < np.arange(len(looks)))
    return list(zip(first[second].tolist(), second.tolist(), strict=True))
