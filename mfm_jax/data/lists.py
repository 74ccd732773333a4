"""Lines of list files: what `data.listing.lists` makes a listing of.

A list is a text file of `path label` lines, as ImageNet-LT, Places-LT and iNaturalist publish theirs, or a CSV file
with the columns `path`, `label` and, if wanted, `group`. A line that is not understood becomes a `Problem`.
"""

import codecs
import csv
import io
import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from mfm_jax.data.walk import Problem, entries, unusable
from mfm_jax.errors import UserError

SPLITS = ("train", "val", "meta", "test")
_NUMBER = re.compile(r"-?[0-9]{1,18}")


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
    lines = [line for split in given for line in _lines(split, files[split], problems)]
    rows = _existing_files(root, lines, problems)
    if not rows:
        raise UserError(
            f"data.root = {str(root)!r}: none of the {len(lines)} listed pictures is there; {': '.join(problems[-1])}"
        )
    numbered = _are_numbered(rows)
    rows = _once(_class_numbers(rows, problems) if numbered else rows, problems)
    names = _numbered_names(rows) if numbered else {label: label for label in sorted({row.label for row in rows})}
    if len(names) < 2:
        raise UserError(f"data.train_list = {str(files['train'])!r}: names fewer than two classes")
    trained = {row.label for row in rows if row.split == "train"}
    missing = [name for name in names if name not in trained]
    if missing:
        what = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
        hint = "; classes are counted from 0" if numbered and missing[0] == "0" else ""
        problems.append(Problem(files["train"].name, f"no training picture of class {what}{hint}"))
    return rows, names


def expanded(name: str | Path) -> Path:
    """Returns a path, `~` resolved where there is such a user."""
    return Path(os.path.expanduser(name))  # the method of `Path` raises where there is none


def _lines(split: str, file: Path, problems: list[Problem]) -> list[Row]:
    """Returns the lines of a list; those that are not understood become problems."""
    field = f"data.{split}_list = {str(file)!r}"
    try:
        content = expanded(file).read_bytes()
    except OSError as error:
        raise UserError(f"{field}: {error.strerror}") from error
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    # As the system gives names, so that one which is not UTF-8 is found.
    text = content.decode(encoding, "surrogateescape" if encoding == "utf-8-sig" else "replace")
    header = text.partition("\n")[0].lower()
    columns = [column.strip(' "\r') for column in re.split("[,;\t]", header)]
    is_csv = {"path", "label"} <= set(columns)
    if file.suffix.lower() == ".csv" and not is_csv:
        raise UserError(
            f"{field}: its first line is {header.strip()[:80]!r}; a CSV file needs the columns path and label"
        )
    found = _csv(text, columns, field) if is_csv else _plain(text)
    rows = []
    for number, path, label, group in found:
        where = f"{file.name}:{number}"
        if path and label:
            rows.append(Row(path, label, split, group, where))
        else:
            problems.append(Problem(where, f"not understood: no {'label' if path else 'path'}"))
    if not rows:
        raise UserError(f"{field}: holds no line of the form `path label`")
    return rows


def _plain(text: str) -> Iterator[tuple[int, str, str, str]]:
    """Yields line number, path, label and group of `path label` lines, past the comments that they start with."""
    begun = False
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        line = line.strip()
        if not line or (line.startswith("#") and not begun):
            continue
        begun = True
        path, label = line.rsplit(maxsplit=1) if len(line.split(maxsplit=1)) == 2 else (line, "")
        yield number, path, label, ""


def _csv(text: str, columns: list[str], field: str) -> Iterator[tuple[int, str, str, str]]:
    """Yields line number, path, label and group of the lines below a CSV file's header."""
    delimiter = next(mark for mark in ",;\t" if mark in text.partition("\n")[0])
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    wanted = [columns.index(name) if name in columns else len(columns) for name in ("path", "label", "group")]
    try:
        next(reader)
        for cells in reader:
            if any(cells):
                cells += [""] * (len(columns) + 1 - len(cells))
                path, label, group = (cells[i].strip() for i in wanted)
                yield reader.line_num, path, label, group
    except csv.Error as error:
        raise UserError(f"{field}: line {reader.line_num}: {error}") from error


def _existing_files(root: Path, rows: list[Row], problems: list[Problem]) -> list[Row]:
    """Returns the rows whose files are there, their paths relative to `root`; the others become problems.

    Folders are listed once each instead of asking for every file.
    """
    known: dict[str, defaultdict[str, str]] = {}
    result = []
    for row in rows:
        path = _relative(root, row.path)
        if path is None:
            problems.append(Problem(row.where, f"leaves data.root: {row.path}"))
            continue
        inside, name = posixpath.split(path)
        if inside not in known:
            known[inside] = _files_in(root, inside)
        wrong = known[inside][name]
        if wrong:
            problems.append(Problem(row.where, f"{wrong}: {row.path}"))
        else:
            result.append(row if path == row.path else row._replace(path=path))
    return result


def _relative(root: Path, path: str) -> str | None:
    """Returns a listed path relative to `root` in its shortest form; None where it lies elsewhere."""
    if path.startswith("/"):
        absolute, path = path, os.path.relpath(path, root.absolute())
        if path.startswith("../"):
            path = os.path.relpath(absolute, os.path.realpath(root))
    if "//" in path or "./" in path or path == "..":
        path = posixpath.normpath(path)
    return None if path.startswith("../") or path == ".." else path


def _files_in(root: Path, inside: str) -> defaultdict[str, str]:
    """Returns what is wrong with a file of a folder, by its name; "" for regular files."""
    absent = "no such file"
    wrong: defaultdict[str, str] = defaultdict(lambda: absent)
    try:
        found = entries(root, inside)
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            absent = f"its folder cannot be read: {error.strerror}"
        return wrong
    except ValueError:  # a null character in the name
        return wrong
    wrong.update((entry.name, unusable(entry)) for entry in found)
    wrong.update((entry.name, "a folder") for entry in found if not wrong[entry.name] and entry.is_dir())
    return wrong


def _are_numbered(rows: list[Row]) -> bool:
    """Returns whether most labels are whole numbers."""
    uses = Counter(row.label for row in rows)
    return 2 * sum(count for label, count in uses.items() if _NUMBER.fullmatch(label)) > len(rows)


def _class_numbers(rows: list[Row], problems: list[Problem]) -> list[Row]:
    """Returns the rows whose labels can be class numbers, in their shortest form; the others become problems."""
    numbers = {label: int(label) for label in {row.label for row in rows} if _NUMBER.fullmatch(label)}
    # A few classes may have lost their pictures, but not most of them: beyond that a number is no class.
    beyond = 2 * len(set(numbers.values()))
    result = []
    for row in rows:
        number = numbers.get(row.label)
        if number is None:
            problems.append(Problem(row.where, f"label {row.label!r} is no whole number, as most labels are"))
        elif number < 0:
            problems.append(Problem(row.where, f"label {number} is negative"))
        elif number >= beyond:
            problems.append(Problem(row.where, f"label {number} is out of range for {beyond // 2} different labels"))
        else:
            shortest = str(number)
            result.append(row if row.label == shortest else row._replace(label=shortest))
    return result


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


def _numbered_names(rows: list[Row]) -> dict[str, str]:
    """Returns the name of each class by its number, in the order of the classes."""
    numbers = [str(i) for i in range(max((int(row.label) for row in rows), default=-1) + 1)]
    folders = {(row.label, posixpath.basename(posixpath.dirname(row.path))) for row in rows}
    names = dict(folders)
    one_each = len(folders) == len(set(names.values())) == len(numbers) and "" not in names.values()
    return {number: names[number] if one_each else number for number in numbers}
