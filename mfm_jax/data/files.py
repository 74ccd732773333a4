"""One's own pictures as a source: a folder, or lists of files.

Every picture is looked at (`checking`) before any of them counts. They are decoded into memory where they fit there,
and kept decoded in the cache; else they stay files, of which batches are decoded when they are needed
(`streaming.Files`).
"""

import hashlib
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from mfm_jax.config import Data
from mfm_jax.data import checking, depth, listing, longtail, streaming, walk
from mfm_jax.data.kept import cached
from mfm_jax.data.listing import Listing
from mfm_jax.data.pictures import FORMAT, Facts
from mfm_jax.data.sources import PROGRESS_FROM, TEST_SEED, Images, Labels, Pixels, Source
from mfm_jax.data.streaming import Files
from mfm_jax.data.walk import Problem
from mfm_jax.errors import UserError

_BATCH = 256  # pictures that are decoded at a time
_ALONE = 2_000  # pictures; so many are decoded before worker processes have started
_SHOWN = 20  # problems that an error lists


def load(config: Data, *, whole: bool) -> Source:
    """Loads a folder of class folders, or what list files name; with `whole`, pictures are not decoded but streamed.

    Where the data has no test split, `data.test_fraction` of each class is held out (`longtail.hold_out`) with a
    constant seed: the same test images for every `data.seed`. Copies of one picture count as a group, so that a split
    that is made does not divide them.
    """
    return source(config, _sound(config, listing.read(config)), whole=whole)


def source(config: Data, sound: "Sound", *, whole: bool) -> Source:
    """Returns `load` of pictures that have been checked; with `whole`, none is opened."""
    found, facts, left_out, duplicates = sound
    _check(config, found)
    groups = with_copies(found.groups, facts)
    splits, rule = with_test(config, found, groups)
    white = depth.white(config.white, facts, splits == "train")
    if depth.loses(facts, white):
        print(f"warning: {depth.in_words(facts, white)}; data.white sets it", file=sys.stderr)
    digests = {path: fact.digest for path, fact in zip(found.paths, facts, strict=True)}
    version = _version(found, facts)
    images = _images(config, whole, found, facts, version, white)
    test, rest = np.flatnonzero(splits == "test"), np.flatnonzero(splits != "test")
    return Source(
        name=found.root.resolve().name,
        version=version,
        class_names=found.class_names,
        train_images=images[rest],
        train_labels=found.labels[rest],
        train_ids=rest.astype(np.int64),
        train_pool="all",
        test_images=images[test],
        test_labels=found.labels[test],
        test_ids=test.astype(np.int64),
        test_pool="all",
        given=splits[rest],
        groups=tuple(groups[i] for i in rest.tolist()) if any(groups) else (),
        facts={
            "test_rule": rule,
            "group": config.group,
            "files": list(found.paths),
            "left_out": left_out,
            "duplicates_in_test": straddling(duplicates, digests, splits == "test"),
            **({"white": white} if any(fact.bits for fact in facts) else {}),
        },
    )


def with_test(config: Data, found: Listing, groups: Sequence[str]) -> tuple[npt.NDArray[np.str_], str]:
    """Returns the split of each picture, a test split among them, and the rule that made it."""
    splits = found.splits
    if (splits == "test").any():
        return splits, "as the data has it"
    train = np.flatnonzero(splits == "train")
    of_train = [groups[i] for i in train.tolist()]
    held = longtail.hold_out(found.labels[train], len(found.class_names), of_train, config.test_fraction, TEST_SEED)
    splits = splits.astype("U5")
    splits[train[held]] = "test"
    return splits, f"{config.test_fraction:g} of each class, at least one of two or more; whole groups; a constant seed"


def straddling(
    duplicates: Sequence[tuple[str, str, str]], digests: Mapping[str, str], is_test: npt.NDArray[np.bool_]
) -> dict[str, int]:
    """Returns how many pictures of the test split have a duplicate (kind, path, path) outside, by kind.

    Two paths of one file count as copies, which they are once the data was copied to another machine.
    """
    where = dict(zip(digests, is_test.tolist(), strict=True))
    alike: dict[tuple[str, str], set[str]] = {}
    for kind, first, second in duplicates:
        key = ("alike", first) if kind == "alike" else ("copy", digests[first])
        alike.setdefault(key, {first}).add(second)
    found: Counter[str] = Counter()
    for (kind, _), members in alike.items():
        tested = sum(where[path] for path in members)
        found[kind] += tested if tested < len(members) else 0
    return {kind: count for kind, count in found.items() if count}


class Sound(NamedTuple):
    """What is left of a listing after the check."""

    listing: Listing
    facts: list[Facts]  # of each picture
    left_out: list[str]  # a line each, with the reason
    duplicates: list[tuple[str, str, str]]  # kind, path, path


def _sound(config: Data, found: Listing) -> Sound:
    """Returns the pictures that can be used; refuses what `data.on_bad_image` does not allow to be left out."""
    checked = checking.check(found, config.workers)
    bad = [path for path, fact in zip(found.paths, checked.facts, strict=True) if fact is None]
    sound = found.without(bad)
    lines, shown = _lines(checked.problems)
    count = f"{len(lines)} problem{'s' * (len(lines) > 1)}"
    if lines and config.on_bad_image == "error":
        trained = np.unique(sound.labels[sound.splits == "train"])
        trains_all = len(trained) == len(sound.class_names)
        way_out = ", or go on without it with data.on_bad_image = 'skip'" if trains_all else ""
        raise UserError(f"data.root = {config.root!r}: {count}; repair or remove what is named{way_out}\n  {shown}")
    for line in sound.lacking():
        print(f"warning: {line}", file=sys.stderr)
    if found.passed:
        print(walk.in_words(found.passed), file=sys.stderr)
    if lines:
        print(f"warning: {count}; the pictures that are named are left out:\n  {shown}", file=sys.stderr)
    if checked.contradictions:
        print(f"warning: one picture in two classes:\n  {_lines(checked.contradictions)[1]}", file=sys.stderr)
    duplicates = [
        (kind, found.paths[first], found.paths[second])
        for kind, first, second in checked.duplicates
        if checked.facts[first] and checked.facts[second]
    ]
    return Sound(sound, [fact for fact in checked.facts if fact], lines, duplicates)


def _lines(problems: Sequence[Problem]) -> tuple[list[str], str]:
    """Returns a line for each problem, and the first of them as one text."""
    lines = [f"{problem.path}: {problem.reason}" for problem in problems]
    more = [f"and {len(lines) - _SHOWN} more; --mode=check lists all"] if len(lines) > _SHOWN else []
    return lines, "\n  ".join([*lines[:_SHOWN], *more])


def with_copies(groups: Sequence[str], facts: Sequence[Facts]) -> list[str]:
    """Returns the group of each picture, "" for none; copies of one share a group, and join those that they are in."""
    copies, joined = Counter(fact.digest for fact in facts), dict[str, str]()

    def of(group: str) -> str:
        while group in joined:
            group = joined[group]
        return group

    for group, fact in zip(groups, facts, strict=True):
        if group and copies[fact.digest] > 1 and of(group) != of(fact.digest):
            joined[of(fact.digest)] = of(group)
    together = zip(groups, facts, strict=True)
    return [of(group or (fact.digest if copies[fact.digest] > 1 else "")) for group, fact in together]


def _images(config: Data, whole: bool, found: Listing, facts: Sequence[Facts], version: str, white: int) -> Images:
    """Returns the pictures, decoded where they fit into `data.resident_mb` and are looked at whole."""
    channels = config.channels or (1 if all(fact.grey for fact in facts) else 3)
    sizes = {side for fact in facts for side in (fact.width, fact.height)}
    if not config.image_size and len(sizes) > 1:
        raise UserError(
            f"data.image_size = 0: pictures have sides of {min(sizes)} to {max(sizes)} pixels; choose a size, e.g. 64"
        )
    size = config.image_size or sizes.pop()
    digests = np.array([fact.digest for fact in facts], np.bytes_)
    files = Files(found.root, streaming.paths(found.paths), size, channels, config.fit, white, digests)
    if whole or math.prod(files.shape) > config.resident_mb * 1e6:
        return files

    def decode() -> tuple[Pixels, Labels]:
        done, result = 0, np.empty(files.shape, np.uint8)
        workers = config.workers if len(files) > _ALONE else 0
        with Progress(console=Console(stderr=True), transient=True, disable=len(files) < PROGRESS_FROM) as progress:
            task = progress.add_task("decoding pictures (once)", total=len(files))
            for batch in streaming.in_batches(files, _BATCH, workers):
                result[done : done + len(batch)] = batch
                done += len(batch)
                progress.update(task, completed=done)
        return result, found.labels

    return cached(f"files-{FORMAT}-{version}-{size}px-{channels}-{config.fit}-{white}", decode)[0]


def _version(found: Listing, facts: Sequence[Facts]) -> str:
    """Returns 16 hex digits that change with the names, classes, splits or contents of the pictures.

    And with nothing else: not with times or inodes, so that a run goes on with a copy of its data.
    """
    lines = zip(found.paths, found.labels.tolist(), found.splits.tolist(), facts, strict=True)
    content = repr([(path, label, split, fact.digest) for path, label, split, fact in lines])
    return hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _check(config: Data, found: Listing) -> None:
    """Refuses data whose own splits divide a group, or of which a class has lost all its pictures."""
    first: dict[str, str] = {}
    for split, group in zip(found.splits.tolist(), found.groups, strict=True):
        if group and first.setdefault(group, split) != split:
            raise UserError(
                f"data.group = {config.group!r}: group {group!r} is in the splits {first[group]} and {split} of the"
                " data; move its pictures into one, or leave data.group empty"
            )
    counts = np.bincount(found.labels, minlength=len(found.class_names))
    if not counts.all():
        name = found.class_names[int(np.argmin(counts))]
        raise UserError(f"data.root = {config.root!r}: no picture of class {name!r} can be used; see --mode=check")
