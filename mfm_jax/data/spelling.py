"""Paths as the disk spells them: accents may be one letter there or two, and some disks take `A` for `a`."""

import os
import posixpath
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mfm_jax.data.walk import class_name, entries, unusable


class _Folder(NamedTuple):
    wrong: dict[str, str]  # of each entry, by name: why it is no file that can be read; "" for files
    absent: str  # what is wrong with any other name


class Disk:
    """What lies below a folder; each folder in it is listed once, when a path first leads there."""

    def __init__(self, root: Path):
        self._root = root
        self._folders: dict[str, _Folder] = {}
        self._forms: dict[tuple[str, Callable[[str], str]], dict[str, str]] = {}
        self._spelled = {"": ""}  # folders as they were asked for, and as the disk has them

    def find(self, path: str) -> tuple[str, str]:
        """Returns a path as the disk spells it, and why there is no file to read, or "".

        A name that is on the disk as it stands comes first, then one with the same letters in another form of Unicode.
        """
        inside, name = posixpath.split(path)
        if inside not in self._spelled:
            here = ""
            for part in inside.split("/"):
                here = posixpath.join(here, self._name(here, part))
            self._spelled[inside] = here
        here = self._spelled[inside]
        name = self._name(here, name)
        folder = self._folder(here)
        return posixpath.join(here, name), folder.wrong.get(name, folder.absent)

    def in_other_case(self, path: str) -> str:
        """Returns the path of the only file that differs from a path in capitals, or ""."""
        here = ""
        for part in path.split("/"):
            part = part if part in self._folder(here).wrong else self._by(_folded, here).get(_folded(part), "")
            if not part:
                return ""
            here = posixpath.join(here, part)
        return here

    def _name(self, here: str, name: str) -> str:
        """Returns the name of an entry of a folder as the disk has it; of one that is not there, the name itself."""
        if name in self._folder(here).wrong:
            return name
        if other := self._by(class_name, here).get(class_name(name)):
            return other
        if os.path.lexists(os.path.join(self._root, here, name)):  # the disk takes another name for it
            return self._by(_folded, here).get(_folded(name)) or name
        return name

    def _by(self, form: Callable[[str], str], here: str) -> dict[str, str]:
        """Returns the names in a folder by a form of theirs; "" where two share it."""
        if (here, form) not in self._forms:
            names: dict[str, str] = {}
            for name in self._folder(here).wrong:
                names[form(name)] = "" if form(name) in names else name
            self._forms[here, form] = names
        return self._forms[here, form]

    def _folder(self, here: str) -> _Folder:
        if here not in self._folders:
            self._folders[here] = _listed(self._root, here)
        return self._folders[here]


def _folded(name: str) -> str:
    return class_name(name).casefold()


def _listed(root: Path, inside: str) -> _Folder:
    try:
        found = entries(root, inside)
    except (FileNotFoundError, NotADirectoryError):
        return _Folder({}, "no such file")
    except OSError as error:
        return _Folder({}, f"its folder cannot be read: {error.strerror}")
    wrong = {entry.name: unusable(entry) for entry in found}
    wrong.update((entry.name, "a folder") for entry in found if not wrong[entry.name] and entry.is_dir())
    return _Folder(wrong, "no such file")
