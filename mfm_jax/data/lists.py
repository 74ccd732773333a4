"""What list files name: the pictures that are there, each once, and their classes.

`list_text` reads the lines of a list, `labels` says what its labels stand for, and `spelling` finds its files. A line
that cannot be used becomes a `Problem`.
"""

import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from mfm_jax.data import labels, list_text
from mfm_jax.data.spelling import Disk
from mfm_jax.data.walk import Problem, class_name
from mfm_jax.errors import UserError, some_of
from mfm_jax.machine.disk import expanded

SPLITS = ("train", "val", "meta", "test")


class Row(NamedTuple):
    """A picture on its way into a `Listing`; `where` names it in a problem."""

    path: str
    label: str
    split: str
    group: str
    where: str


def read(root: Path, files: Mapping[str, Path], problems: list[Problem]) -> tuple[list[Row], dict[str, str]]:
    """Returns the pictures that list files name, and the name of each class by its label, in the order of the classes.

    Arguments and errors are those of `listing.lists`; lines and classes that cannot be used are added to `problems`.
    """
    given = [split for split in reversed(SPLITS) if split in files]
    listed = [row for split in given for row in _rows(split, files[split], problems)]
    rows = _existing_files(root, listed, problems)
    if not rows:
        raise UserError(
            f"data.root = {str(root)!r}: none of the {len(listed)} listed pictures is there{first_reason(problems)}"
        )
    others = labels.not_numbers(Counter(row.label for row in listed))
    problems += [Problem(row.where, others[row.label]) for row in rows if others and row.label in others]
    rows = _once([row for row in rows if not others or row.label not in others], problems)
    if others is None:
        problems += labels.changed({row.label: row.where for row in reversed(rows)})
        names = {label: label for label in labels.ordered({row.label for row in rows})}
    else:
        names = _numbered_names(rows)
    if len(names) < 2:
        raise UserError(
            f"data.train_list = {str(files['train'])!r}: names fewer than two classes{first_reason(problems)}"
        )
    problems += _untrained(files["train"].name, rows, names, others is not None)
    return rows, names


def first_reason(problems: list[Problem]) -> str:
    """Returns how many problems there are, and the first, as the end of an error's line."""
    return f"; not usable: {len(problems)}, the first {': '.join(problems[0])}" if problems else ""


def _rows(split: str, file: Path, problems: list[Problem]) -> list[Row]:
    """Returns what the lines of a list say; those that are not understood become problems."""
    field = f"data.{split}_list = {str(file)!r}"
    rows, wrong = [], []
    for number, path, label, group, reason in list_text.read(expanded(file), field):
        where = f"{file.name}:{number}"
        if reason:
            wrong.append(Problem(where, reason))
        else:
            rows.append(Row(path, class_name(label), split, class_name(group), where))
    if not rows:
        raise UserError(f"{field}: holds no line of the form `path label`{first_reason(wrong)}")
    problems += wrong
    return rows


def _existing_files(root: Path, rows: list[Row], problems: list[Problem]) -> list[Row]:
    """Returns the rows whose files are there, with their paths as the disk has them; the others become problems."""
    disk = Disk(root)
    result = []
    for row in rows:
        path, wrong = _found(root, disk, row.path)
        if wrong:
            problems.append(Problem(row.where, f"{wrong}: {row.path}{_hint(root, disk, row.path)}"))
        else:
            result.append(row if path == row.path else row._replace(path=path))
    return result


def _found(root: Path, disk: Disk, listed: str) -> tuple[str, str]:
    """Returns the path of a listed file relative to `root`, and why it cannot be used, or ""."""
    path, wrong = _relative(root, listed), "leaves data.root"
    if path is not None:
        path, wrong = disk.find(path)
    if wrong and "\\" in listed:  # as Windows writes paths
        return _found(root, disk, listed.replace("\\", "/"))
    return path or "", wrong


def _hint(root: Path, disk: Disk, listed: str) -> str:
    """Returns what may be meant by a path that leads nowhere."""
    if not list_text.is_unicode(listed):
        return f"; the line is not written in UTF-8: {list_text.SAVE}"
    if listed.startswith("#"):
        return "; a comment has a space after its #"
    if re.search(r"\.\w+\s", listed):
        return "; the label is the last word of a line, so one of several words needs a CSV file"
    if re.match(r"[A-Za-z]:|\\\\", listed):
        return "; paths are relative to data.root"
    path = _relative(root, listed.replace("\\", "/"))
    other = disk.in_other_case(path) if path else ""
    return f"; is {other} meant?" if other else ""


def _relative(root: Path, path: str) -> str | None:
    """Returns a listed path relative to `root` in its shortest form; None where it lies elsewhere."""
    if path.startswith("/"):
        absolute, path = path, os.path.relpath(path, root.absolute())
        if path.startswith("../"):
            path = os.path.relpath(absolute, os.path.realpath(root))
    if "//" in path or "./" in path or path == "..":
        path = posixpath.normpath(path)
    return None if path.startswith("../") or path == ".." else path


def _once(rows: Iterable[Row], problems: list[Problem]) -> list[Row]:
    """Returns the rows less repeated pictures: the first of a picture stays, none where their labels differ."""
    first: dict[str, Row] = {}
    contradicted: set[str] = set()
    for row in rows:
        other = first.setdefault(row.path, row)
        if other is row:
            continue
        if other.label != row.label:
            contradicted.add(row.path)
            problems.append(Problem(row.where, f"{row.path} has label {other.label} at {other.where}"))
        else:
            what = "a second time" if other.split == row.split else f"in {row.split} and {other.split}"
            problems.append(Problem(row.where, f"{row.path} is listed {what}: {other.where}"))
    problems += [Problem(first[path].where, f"{path} has another label elsewhere") for path in sorted(contradicted)]
    return [row for path, row in first.items() if path not in contradicted]


def _untrained(file: str, rows: list[Row], names: Iterable[str], numbered: bool) -> list[Problem]:
    """Returns the problem that classes have no training picture, if so."""
    trained, named = {row.label for row in rows if row.split == "train"}, {row.label for row in rows}
    missing = [name for name in names if name not in trained]
    hint = "; all lists count the classes from 0" if numbered else ""
    if not named.issuperset(missing):
        hint = (
            "; whole numbers from 0 count the classes: leave none out, or make names of them with a letter before each"
        )
    return [Problem(file, f"no training picture of class {some_of(missing, 20)}{hint}")] if missing else []


def _numbered_names(rows: list[Row]) -> dict[str, str]:
    """Returns the name of each class by its number, in the order of the classes."""
    numbers = [str(i) for i in range(max((int(row.label) for row in rows), default=-1) + 1)]
    folders = {(row.label, class_name(posixpath.basename(posixpath.dirname(row.path)))) for row in rows}
    names = dict(folders)
    one_each = len(folders) == len(set(names.values())) == len(numbers) and "" not in names.values()
    return {number: names[number] if one_each else number for number in numbers}
