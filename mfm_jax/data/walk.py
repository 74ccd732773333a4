"""Which files below a folder may be pictures: one set of rules for training, checking, evaluation and prediction.

Hidden files and what systems leave behind (`Thumbs.db`) are passed over and counted; nothing else is left out without
a reason. `formats` knows a picture by its name. Links are followed. A name that is not UTF-8 is kept as the system
gives it (`os.fsencode` turns it back).
"""

import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from mfm_jax.data.formats import may_be_picture
from mfm_jax.errors import UserError

NOT_A_PICTURE = "not a picture by its name"
_UNREADABLE = "cannot be read"
_LEFT_BEHIND = re.compile(  # names in any case; each group is a kind, counted under its name
    r"""(?P<hidden> \..* )
    | (?P<thumbnails> @eadir | @__thumb | (?:eh)?thumbs(?:_vista)?\.db | zbthumbnail\.info
        | .*@syno(?:eastream|resource) )
    | (?P<recycled> \#recycle | @recycle | \$recycle\.bin | recycler | network\ trash\ folder )
    | (?P<system> system\ volume\ information | lost\+found | found\.\d{3} | \#snapshot | @tmp | temporary\ items
        | __macosx | icon[\r\uf00d] | desktop\.ini | picasa\.ini | wpsettings\.dat )""",
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)
# Letters of Cyrillic and Greek that are drawn as Latin ones.
_DRAWN_ALIKE = str.maketrans(
    "\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0425\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458"
    "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7\u03bf",
    "ABEKMHOPCTXaeopcyxijABEZHIKMNOPTYXo",
)


class Problem(NamedTuple):
    """A picture, folder or line that cannot be used."""

    path: str  # relative to the root; of a list, its name and the line: "places_train.txt:17"
    reason: str


class Content(NamedTuple):
    """What lies in one folder: paths relative to the root, sorted."""

    folders: list[str]
    files: list[str]
    problems: list[Problem]


def passed_over(name: str) -> str:
    """Returns as what a file or folder of this name is no part of a data set: hidden, left by a system; "" if it is."""
    found = _LEFT_BEHIND.fullmatch(name)
    return found.lastgroup or "" if found else ""


def in_words(passed: Mapping[str, int]) -> str:
    """Returns how many files and folders of each kind were passed over."""
    return f"passed over: {', '.join(f'{count:,} {kind}' for kind, count in sorted(passed.items()))}"


def not_a_picture(path: str) -> str:
    """Returns why a file cannot be a picture by its name, "" where it may be one."""
    return "" if may_be_picture(path) else NOT_A_PICTURE


def class_name(name: str) -> str:
    """Returns the class that a folder or a label of this name stands for: accents composed with letters (NFC)."""
    return unicodedata.normalize("NFC", name)


def look_alikes(names: Iterable[str]) -> Iterator[Problem]:
    """Yields each of `names` that is an earlier one but for case, or for what cannot be seen.

    Names of one letter may differ by case: `a` and `A` are classes of handwriting.
    """
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(_look(name), name)
        if other != name and not (len(name) == len(other) == 1 and name.swapcase() == other):
            yield Problem(name, f"a class that looks like {other!a}, itself {name!a}; rename or merge them")


def _look(name: str) -> str:
    plain = class_name(name).translate(_DRAWN_ALIKE).casefold()
    shown = (
        c for c in plain if c.isspace() or not (unicodedata.category(c) in ("Cc", "Cf") or "\ufe00" <= c <= "\ufe0f")
    )
    return " ".join("".join(shown).split())


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


def scan(root: Path, inside: str, passed: Counter[str]) -> Content:
    """Returns what lies in the folder `inside`, relative to `root`; that the folder cannot be read is a problem.

    What is passed over is counted in `passed`, by kind.
    """
    content = Content([], [], [])
    try:
        found = sorted(entries(root, inside), key=lambda entry: entry.name)
    except OSError as error:
        content.problems.append(Problem(inside, f"{_UNREADABLE}: {error.strerror}"))
        return content
    for entry in found:
        path = posixpath.join(inside, entry.name)
        if kind := passed_over(entry.name):
            passed[kind] += 1
        elif wrong := unusable(entry):
            content.problems.append(Problem(path, wrong))
        else:
            (content.folders if entry.is_dir() else content.files).append(path)
    return content


def walk(root: Path, start: str, passed: Counter[str]) -> Iterator[tuple[str, str]]:
    """Yields each file below `root/start`: its path relative to `root`, and why it cannot be a picture ("" if it may).

    A folder's files come before those of the folders in it, each sorted by name. What cannot be looked into (a link
    to nowhere, a folder without permission, a link to a folder that it lies in) is yielded with the reason. What is
    passed over is counted in `passed`.
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
        content = scan(root, inside, passed)
        yield from sorted([*content.problems, *((path, not_a_picture(path)) for path in content.files)])
        stack += [(path, above | {here}) for path in reversed(content.folders)]


def _identity(path: Path) -> tuple[int, int]:
    facts = os.stat(path)
    return facts.st_dev, facts.st_ino


def given(places: Iterable[Path], passed: Counter[str]) -> Iterator[Path]:
    """Yields each file of `places`, and of each folder in it the files below that may be pictures.

    What the walk cannot look into is yielded too, so that whoever reads it reports it. What is passed over, here also
    files that are no pictures by their names, is counted in `passed`.

    Raises:
      UserError: there is no such file or folder, or a folder cannot be read.
    """
    for place in places:
        if not place.exists():
            raise UserError(f"{place}: no such file or folder")
        if not place.is_dir():
            yield place
            continue
        for path, wrong in walk(place, "", passed):
            if wrong.startswith(_UNREADABLE) and os.path.isdir(place / path):
                raise UserError(f"{place / path}: {wrong}")
            if wrong == NOT_A_PICTURE:
                passed[wrong] += 1
            else:
                yield place / path
