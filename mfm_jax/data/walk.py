"""Which files below a folder may be pictures: one set of rules for training, checking, evaluation and prediction.

Hidden files and what systems leave behind (`Thumbs.db`) are passed over; nothing else is left out without a reason. A
file may be a picture if its suffix is one of `pictures.SUFFIXES`, or if it has none: its content decides then. Links
are followed. A name that is not UTF-8 is kept as the system gives it (`os.fsencode` turns it back).
"""

import os
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from mfm_jax.data.pictures import SUFFIXES
from mfm_jax.errors import UserError

NOT_A_PICTURE = "not a picture by its name"
_UNREADABLE = "cannot be read"
_LEFT_BEHIND = ("thumbs.db", "desktop.ini", "__macosx")  # by systems; names that start with a dot are hidden, too


class Problem(NamedTuple):
    """A picture, folder or line that cannot be used."""

    path: str  # relative to the root; of a list, its name and the line: "places_train.txt:17"
    reason: str


class Content(NamedTuple):
    """What lies in one folder: paths relative to the root, sorted."""

    folders: list[str]
    files: list[str]
    problems: list[Problem]


def passed_over(name: str) -> bool:
    """Whether a file or folder of this name is no part of a data set: hidden, or left behind by a system."""
    return name.startswith(".") or name.lower() in _LEFT_BEHIND


def not_a_picture(path: str) -> str:
    """Returns why a file cannot be a picture by its name, "" where it may be one."""
    return "" if posixpath.splitext(path)[1].lower() in ("", *SUFFIXES) else NOT_A_PICTURE


def class_name(name: str) -> str:
    """Returns the class that a folder or a label of this name stands for: its composed form (Unicode NFC)."""
    return unicodedata.normalize("NFC", name)


def entries(root: Path, inside: str) -> list[os.DirEntry[str]]:
    """Returns all entries of the folder `inside`, a path relative to `root`.

    Raises:
      OSError, ValueError: it cannot be read; its name holds a null character.
    """
    with os.scandir(os.path.join(root, inside)) as found:
        return list(found)


def unusable(entry: os.DirEntry[str]) -> str:
    """Returns why an entry is neither a file nor a folder, "" for those; asks the system about links only."""
    try:
        if entry.is_file() or entry.is_dir():
            return ""
    except OSError as error:
        return f"{_UNREADABLE}: {error.strerror}"
    return "neither a file nor a folder" if os.path.exists(entry.path) else "a link to nowhere"


def scan(root: Path, inside: str = "") -> Content:
    """Returns what lies in the folder `inside`, relative to `root`; that the folder cannot be read is a problem."""
    content = Content([], [], [])
    try:
        found = sorted(entries(root, inside), key=lambda entry: entry.name)
    except OSError as error:
        content.problems.append(Problem(inside, f"{_UNREADABLE}: {error.strerror}"))
        return content
    for entry in found:
        path = posixpath.join(inside, entry.name)
        if passed_over(entry.name):
            continue
        if wrong := unusable(entry):
            content.problems.append(Problem(path, wrong))
        else:
            (content.folders if entry.is_dir() else content.files).append(path)
    return content


def walk(root: Path, start: str = "") -> Iterator[tuple[str, str]]:
    """Yields each file below `root/start`: its path relative to `root`, and why it cannot be a picture ("" if it may).

    A folder's files come before those of the folders in it, each sorted by name. What cannot be looked into (a link
    to nowhere, a folder without permission, a link to a folder that it lies in) is yielded with the reason.
    """
    stack = [(start, frozenset({_identity(root)} if start else {}))]
    while stack:
        inside, above = stack.pop()
        try:
            here = _identity(root / inside)
        except OSError as error:
            yield inside, f"{_UNREADABLE}: {error.strerror}"
            continue
        if here in above:
            yield inside, "a link to a folder that it lies in"
            continue
        content = scan(root, inside)
        yield from sorted([*content.problems, *((path, not_a_picture(path)) for path in content.files)])
        stack += [(path, above | {here}) for path in reversed(content.folders)]


def _identity(path: Path) -> tuple[int, int]:
    facts = os.stat(path)
    return facts.st_dev, facts.st_ino


def given(places: Iterable[Path]) -> Iterator[Path]:
    """Yields each file of `places`, and of each folder in it the files below that may be pictures.

    What the walk cannot look into is yielded too, so that whoever reads it reports it.

    Raises:
      UserError: there is no such file or folder, or a folder cannot be read.
    """
    for place in places:
        if not place.exists():
            raise UserError(f"{place}: no such file or folder")
        if not place.is_dir():
            yield place
            continue
        for path, wrong in walk(place):
            if wrong.startswith(_UNREADABLE) and os.path.isdir(place / path):
                raise UserError(f"{place / path}: {wrong}")
            if wrong != NOT_A_PICTURE:
                yield place / path
