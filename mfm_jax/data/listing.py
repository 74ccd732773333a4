"""Which pictures a folder or a list file names, with their classes and splits; no picture is opened.

A folder has one sub-folder a class, or `train`, `val`, `meta` and `test` with such sub-folders in them. A list is a
text file of `path label` lines, as ImageNet-LT, Places-LT and iNaturalist publish theirs, or a CSV file with the
columns `path`, `label` and, if wanted, `group`.

What somebody may not have meant (a file that is no picture, a link that leads nowhere, a line that is not understood, a
picture in two splits) becomes a `Problem` and is left out; nothing is left out without one, but hidden files and what
systems leave behind (`Thumbs.db`). What leaves no sensible set raises `UserError`.

A name that is not UTF-8 is kept as the system gives it (`os.fsencode` turns it back), and a link is followed.
"""

import codecs
import csv
import io
import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mfm_jax.config import Data
from mfm_jax.data.pictures import SUFFIXES
from mfm_jax.errors import UserError

SPLITS = ("train", "val", "meta", "test")
_SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "meta": "meta", "test": "test"}
_LEFT_BEHIND = ("thumbs.db", "desktop.ini", "__macosx")  # by systems; names that start with a dot are hidden, too
_NUMBER = re.compile(r"-?[0-9]{1,18}")


class Problem(NamedTuple):
    """A picture, folder or line that cannot be used."""

    path: str  # relative to the root; of a list, its name and the line: "places_train.txt:17"
    reason: str


@dataclass(frozen=True, eq=False)
class Listing:
    """Pictures that may be read, sorted by path; no path is there twice."""

    root: Path
    class_names: tuple[str, ...]  # [K]
    paths: tuple[str, ...]  # [N], relative to `root`, with forward slashes
    labels: npt.NDArray[np.int32]  # [N]
    splits: npt.NDArray[np.str_]  # [N], of SPLITS; all "train" where the data has no splits
    groups: tuple[str, ...]  # [N], "" where a picture has none
    problems: tuple[Problem, ...]

    def without(self, bad: Collection[str]) -> "Listing":
        """Returns the listing less the pictures whose paths are in `bad`; classes and problems stay."""
        left_out = frozenset(bad)
        keep = np.array([path not in left_out for path in self.paths], bool)
        return Listing(
            root=self.root,
            class_names=self.class_names,
            paths=tuple(path for path, kept in zip(self.paths, keep, strict=True) if kept),
            labels=self.labels[keep],
            splits=self.splits[keep],
            groups=tuple(group for group, kept in zip(self.groups, keep, strict=True) if kept),
            problems=self.problems,
        )


class _Row(NamedTuple):
    """A picture on its way into a `Listing`; `where` names it in a problem."""

    path: str
    label: str
    split: str
    group: str
    where: str


def load(config: Data) -> Listing:
    """Lists the pictures that `config` names: `data.source` is "folder" or "list"; lists may lie in `data.root`.

    Raises:
      UserError: a needed field is empty, a file or folder is not there, or what is there makes no set of classes.
    """
    if not config.root:
        raise UserError(f"data.root: missing; data.source = {config.source!r} needs the folder that holds the pictures")
    if config.source == "folder":
        return folder(config.root, config.group)
    if not config.train_list:
        raise UserError("data.train_list: missing; data.source = 'list' needs a file of `path label` lines")
    named = {split: _path(getattr(config, f"{split}_list")) for split in SPLITS}
    beside = {split: _path(config.root) / file for split, file in named.items() if file.name}
    files = {split: path if path.is_file() else named[split] for split, path in beside.items()}
    return lists(config.root, files, config.group)


def folder(root: str | Path, group: str = "") -> Listing:
    """Lists `root/CLASS/**/PICTURE`, or `root/SPLIT/CLASS/**/PICTURE` where every folder in `root` is named as a split.

    Args:
      root: the folder.
      group: regular expression; a picture's group is its first capture group, or its whole match, in the path.

    Raises:
      UserError: `root` is no folder or holds fewer than two classes, a class's name is no UTF-8, or `group` is no
        pattern or matches nowhere.
    """
    root, pattern = _existing(root), _pattern(group)
    problems: list[Problem] = []
    rows: list[_Row] = []
    for level, split in _levels(root, problems):
        folders, files = _scan(root, level, problems)
        problems += _strays(files)
        for path in folders:
            found = list(_below(root, path, problems))
            if not found:
                problems.append(Problem(path, "a class folder without a picture"))
            name = posixpath.basename(path)
            rows += [_Row(picture, name, split, "", picture) for picture in found]
    names = sorted({row.label for row in rows})
    if len(names) < 2:
        raise UserError(f"data.root = {str(root)!r}: {_too_few(root, names, problems)}")
    trained = {row.label for row in rows if row.split == "train"}
    problems += [Problem(name, "a class without a training picture") for name in names if name not in trained]
    return _listing(root, names, rows, problems, pattern)


def lists(root: str | Path, files: Mapping[str, str | Path], group: str = "") -> Listing:
    """Lists the pictures that list files name.

    Whole numbers are class numbers from 0; the classes are then called as the folders of their pictures, where each has
    one of its own. Other labels are class names, in alphabetical order. A picture that is named twice counts once, in
    two splits for the one further from training (test, meta, val, train), and with two labels not at all.

    Args:
      root: the folder that paths are relative to.
      files: the file of each split, by its name in `SPLITS`; at least "train".
      group: as in `folder`; a column `group` comes first.

    Raises:
      UserError: a file is missing, empty or not understood as a whole, none of the pictures is there, there are fewer
        than two classes, or `group` is no pattern or matches nowhere.
    """
    root, pattern = _existing(root), _pattern(group)
    problems: list[Problem] = []
    lines = [
        line for split in reversed(SPLITS) if split in files for line in _lines(split, Path(files[split]), problems)
    ]
    rows = _existing_files(root, lines, problems)
    if not rows:
        raise UserError(
            f"data.root = {str(root)!r}: none of the {len(lines)} listed pictures is there; {': '.join(problems[-1])}"
        )
    numbered = _are_numbered(rows)
    rows = _once(_class_numbers(rows, problems) if numbered else rows, problems)
    names = _numbered_names(rows) if numbered else {row.label: row.label for row in sorted(rows, key=lambda r: r.label)}
    if len(names) < 2:
        raise UserError(f"data.train_list = {str(files['train'])!r}: names fewer than two classes")
    trained = {row.label for row in rows if row.split == "train"}
    missing = [name for name in names if name not in trained]
    if missing:
        what = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
        hint = "; classes are counted from 0" if numbered and missing[0] == "0" else ""
        problems.append(Problem(Path(files["train"]).name, f"no training picture of class {what}{hint}"))
    return _listing(root, names, rows, problems, pattern)


def _existing(root: str | Path) -> Path:
    path = _path(root)
    if not path.is_dir():
        raise UserError(f"data.root = {str(root)!r}: {'not a folder' if path.exists() else 'no such folder'}")
    return path


def _path(name: str | Path) -> Path:
    return Path(os.path.expanduser(name))  # the method of `Path` raises where there is no such user


def _pattern(group: str) -> re.Pattern[str] | None:
    try:
        return re.compile(group) if group else None
    except re.error as error:
        raise UserError(f"data.group = {group!r}: not a regular expression: {error}") from error


def _listing(
    root: Path,
    names: list[str] | dict[str, str],
    rows: list[_Row],
    problems: list[Problem],
    pattern: re.Pattern[str] | None,
) -> Listing:
    rows = sorted(rows)
    groups = tuple(row.group or _group(pattern, row.path) for row in rows)
    if pattern and not any(groups):
        raise UserError(f"data.group = {pattern.pattern!r}: matches none of the paths; the first is {rows[0].path!r}")
    number = {name: i for i, name in enumerate(names)}
    class_names = tuple(names.values() if isinstance(names, dict) else names)
    for name in class_names:
        if name.encode(errors="ignore").decode() != name:
            raise UserError(f"data.root = {str(root)!r}: the name of class {name!r} is not UTF-8; rename its folder")
    return Listing(
        root=root,
        class_names=class_names,
        paths=tuple(row.path for row in rows),
        labels=np.array([number[row.label] for row in rows], np.int32),
        splits=np.array([row.split for row in rows]),
        groups=groups,
        problems=tuple(sorted(problems, key=_by_line)),
    )


def _by_line(problem: Problem) -> tuple[str, int, str]:
    path, _, line = problem.path.rpartition(":")
    return (path, int(line), "") if line.isdecimal() else (problem.path, 0, problem.reason)


def _group(pattern: re.Pattern[str] | None, path: str) -> str:
    match = pattern.search(path) if pattern else None
    return (match[1 if match.re.groups else 0] or "") if match else ""


# Folders


def _levels(root: Path, problems: list[Problem]) -> list[tuple[str, str]]:
    """Returns the folders that hold class folders, relative to `root`, each with its split.

    What lies in `root` beside splits is added to `problems`.
    """
    beside: list[Problem] = []
    folders, files = _scan(root, "", beside)
    splits = [(name, _SPLIT_FOLDERS[name.lower()]) for name in folders if name.lower() in _SPLIT_FOLDERS]
    found = {split for _, split in splits}
    others = sorted(set(folders) - {name for name, _ in splits})
    if others:  # a class may be called "train", too: then it holds pictures, not classes
        divided = [name for name, _ in splits if _scan(root, name, [])[0]]
        if divided:
            raise UserError(
                f"data.root = {str(root)!r}: {divided[0]!r} holds folders, as a split does, but {others[0]!r} beside it"
                f" is no split ({', '.join(_SPLIT_FOLDERS)}); rename or move one of them"
            )
    if others or not splits:
        return [("", "train")]
    if "train" not in found:
        raise UserError(f"data.root = {str(root)!r}: holds the splits {', '.join(sorted(found))} but no folder 'train'")
    problems += beside + _strays(files)
    return splits


def _strays(files: Iterable[str]) -> list[Problem]:
    return [Problem(file, _not_a_picture(file) or "lies in no class folder") for file in files]


def _too_few(root: Path, names: list[str], problems: list[Problem]) -> str:
    """Returns why fewer than two classes were found, and the way out."""
    first = f"; not usable: {len(problems)}, the first {': '.join(problems[0])}" if problems else ""
    if not names:
        return f"no picture in a class folder; put each class into a folder of its own{first}"
    inner, _ = _scan(root, names[0], []) if (root / names[0]).is_dir() else ([], [])
    hint = f"; is {str(root / names[0])!r} meant?" if len(inner) > 1 else ""
    return f"only one class, {names[0]!r}{hint}{first}"


def passed_over(name: str) -> bool:
    """Whether a file or folder of this name is no part of a data set: hidden, or left behind by a system."""
    return name.startswith(".") or name.lower() in _LEFT_BEHIND


def _scan(root: Path, inside: str, problems: list[Problem]) -> tuple[list[str], list[str]]:
    """Returns the folders and the regular files in a folder, sorted, relative to `root`; links are followed."""
    folders: list[str] = []
    files: list[str] = []
    try:
        entries = _entries(root, inside)
    except OSError as error:
        problems.append(Problem(inside, f"cannot be read: {error.strerror}"))
        return [], []
    for entry in entries:
        path = posixpath.join(inside, entry.name)
        if passed_over(entry.name):
            continue
        wrong = _unusable(entry)
        if wrong:
            problems.append(Problem(path, wrong))
        else:
            (folders if entry.is_dir() else files).append(path)
    return sorted(folders), sorted(files)


def _entries(root: Path, inside: str) -> list[os.DirEntry[str]]:
    with os.scandir(os.path.join(root, inside)) as entries:
        return list(entries)


def _unusable(entry: os.DirEntry[str]) -> str:
    """Returns why an entry is neither a file nor a folder, "" for those; asks the system about links only."""
    try:
        if entry.is_file() or entry.is_dir():
            return ""
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "neither a file nor a folder" if os.path.exists(entry.path) else "a link to nowhere"


def _below(root: Path, start: str, problems: list[Problem]) -> Iterator[str]:
    """Yields the files below a folder that may be pictures; the others become problems."""
    top = os.stat(root)
    stack = [(start, frozenset([(top.st_dev, top.st_ino)]))]
    while stack:
        inside, above = stack.pop()
        try:
            facts = os.stat(root / inside)
        except OSError as error:
            problems.append(Problem(inside, f"cannot be read: {error.strerror}"))
            continue
        here = (facts.st_dev, facts.st_ino)
        if here in above:
            problems.append(Problem(inside, "a link to a folder that it lies in"))
            continue
        folders, files = _scan(root, inside, problems)
        stack += [(path, above | {here}) for path in folders]
        for path in files:
            wrong = _not_a_picture(path)
            if wrong:
                problems.append(Problem(path, wrong))
            else:
                yield path


def _not_a_picture(path: str) -> str:
    suffix = posixpath.splitext(path)[1].lower()  # none at all: what is in it decides
    return "" if suffix in ("", *SUFFIXES) else "not a picture by its name"


# Lists


def _lines(split: str, file: Path, problems: list[Problem]) -> list[_Row]:
    """Returns the lines of a list; those that are not understood become problems."""
    field = f"data.{split}_list = {str(file)!r}"
    try:
        content = _path(file).read_bytes()
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
            rows.append(_Row(path, label, split, group, where))
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


def _existing_files(root: Path, rows: list[_Row], problems: list[Problem]) -> list[_Row]:
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
        entries = _entries(root, inside)
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            absent = f"its folder cannot be read: {error.strerror}"
        return wrong
    except ValueError:  # a null character in the name
        return wrong
    wrong.update((entry.name, _unusable(entry)) for entry in entries)
    wrong.update((entry.name, "a folder") for entry in entries if not wrong[entry.name] and entry.is_dir())
    return wrong


def _are_numbered(rows: list[_Row]) -> bool:
    """Returns whether most labels are whole numbers."""
    uses = Counter(row.label for row in rows)
    return 2 * sum(count for label, count in uses.items() if _NUMBER.fullmatch(label)) > len(rows)


def _class_numbers(rows: list[_Row], problems: list[Problem]) -> list[_Row]:
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


def _once(rows: Iterable[_Row], problems: list[Problem]) -> list[_Row]:
    """Returns the rows less repeated pictures: the first of a picture stays, none where their labels differ."""
    first: dict[str, _Row] = {}
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


def _numbered_names(rows: list[_Row]) -> dict[str, str]:
    """Returns the name of each class by its number, in the order of the classes."""
    numbers = [str(i) for i in range(max((int(row.label) for row in rows), default=-1) + 1)]
    folders = {(row.label, posixpath.basename(posixpath.dirname(row.path))) for row in rows}
    names = dict(folders)
    one_each = len(folders) == len(set(names.values())) == len(numbers) and "" not in names.values()
    return {number: names[number] if one_each else number for number in numbers}
