"""Which pictures a folder or a list file names, with their classes and splits; no picture is opened.

A folder has one sub-folder a class, or sub-folders for the splits with such sub-folders in them; `walk` has the rules
for what lies below. `lists` reads list files.

What somebody may not have meant (a file that is no picture, a link that leads nowhere, a line that is not understood, a
picture in two splits) becomes a `Problem` and is left out. What leaves no sensible set raises `UserError`.
"""

import itertools
import posixpath
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mfm_jax.config import Data
from mfm_jax.data import lists as list_files
from mfm_jax.data.list_text import is_unicode
from mfm_jax.data.lists import SPLITS, Row
from mfm_jax.data.walk import Problem, class_name, look_alikes, not_a_picture, scan, walk
from mfm_jax.errors import UserError, some_of
from mfm_jax.machine.disk import expanded

_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    "meta": "meta",
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("eval", "evaluation"), "eval"),  # test or, where there is one beside it, val
}
_SPLIT_FOLDER = re.compile(
    rf"(?:(?:images?|imgs?|data|seg)[\W_]+)?({'|'.join(_SPLIT_WORDS)})"
    r"(?:[\W_]*(?:set|data|dataset|images?|imgs?|split|folder))?",
    re.IGNORECASE,
)


class ClassFolder(NamedTuple):
    """A folder of one class; `path` and `pictures`, sorted a folder at a time, are relative to the root."""

    name: str  # of the class
    path: str
    pictures: list[str]


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
    passed: Mapping[str, int] = field(default_factory=dict)  # how many hidden files and the like, by kind

    def without(self, bad: Collection[str]) -> "Listing":
        """Returns the listing less the pictures whose paths are in `bad`; classes and problems stay."""
        left_out = frozenset(bad)
        keep = np.array([path not in left_out for path in self.paths], bool)
        paths, groups = (tuple(itertools.compress(values, keep)) for values in (self.paths, self.groups))
        return replace(self, paths=paths, labels=self.labels[keep], splits=self.splits[keep], groups=groups)

    def lacking(self) -> list[str]:
        """Returns a line for each split but training that has pictures, but none of some classes."""
        lines = []
        for split in SPLITS[1:]:
            there = set(self.labels[self.splits == split].tolist())
            absent = [repr(name) for k, name in enumerate(self.class_names) if k not in there]
            if there and absent:
                lines.append(f"{split} has no picture of {some_of(absent, 3)}")
        return lines


def read(config: Data) -> Listing:
    """Lists the pictures that `config` names: `data.source` is "folder" or "list"; lists may lie in `data.root`.

    Raises:
      UserError: a needed field is empty, a file or folder is missing, or its content makes no set of classes.
    """
    if not config.root:
        raise UserError(f"data.root: missing; data.source = {config.source!r} needs the folder that holds the pictures")
    if config.source == "folder":
        return folder(config.root, config.group)
    if not config.train_list:
        raise UserError("data.train_list: missing; data.source = 'list' needs a file of `path label` lines")
    named = {split: expanded(getattr(config, f"{split}_list")) for split in SPLITS}
    beside = {split: expanded(config.root) / file for split, file in named.items() if file.name}
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
    passed: Counter[str] = Counter()
    rows: list[Row] = []
    for level, split in _levels(root, problems, passed):
        for name, path, pictures in class_folders(root, level, problems, passed):
            if not pictures:
                problems.append(Problem(path, "a class folder without a picture"))
            rows += [Row(picture, name, split, "", picture) for picture in pictures]
    names = sorted({row.label for row in rows})
    if len(names) < 2:
        raise UserError(f"data.root = {str(root)!r}: {_too_few(root, names, problems)}")
    trained = {row.label for row in rows if row.split == "train"}
    problems += [Problem(name, "a class without a training picture") for name in names if name not in trained]
    return replace(_listing(root, names, rows, problems, pattern), passed=dict(passed))


def class_folders(root: Path, level: str, problems: list[Problem], passed: Counter[str]) -> Iterator[ClassFolder]:
    """Yields the folders of classes in the folder `level`, relative to `root`; of one name, there may be several.

    What cannot be used is added to `problems`, and what is passed over counted in `passed`.
    """
    content = scan(root, level, passed)
    problems += [*content.problems, *_strays(content.files)]
    for path in content.folders:
        found = list(walk(root, path, passed))
        problems += [Problem(file, wrong) for file, wrong in found if wrong]
        yield ClassFolder(class_name(posixpath.basename(path)), path, [file for file, wrong in found if not wrong])


def lists(root: str | Path, files: Mapping[str, str | Path], group: str = "") -> Listing:
    """Lists the pictures that list files name.

    The whole numbers from 0 to K - 1 are class numbers; the classes are then called as the folders of their pictures,
    where each has one of its own. Other labels are class names (see `labels`). A picture that is named twice counts
    once, in two splits for the one further from training (test, meta, val, train), and with two labels not at all.

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
    rows, names = list_files.read(root, {split: Path(file) for split, file in files.items()}, problems)
    return _listing(root, names, rows, problems, pattern)


def _existing(root: str | Path) -> Path:
    path = expanded(root)
    if not path.is_dir():
        raise UserError(f"data.root = {str(root)!r}: {'not a folder' if path.exists() else 'no such folder'}")
    return path


def _pattern(group: str) -> re.Pattern[str] | None:
    try:
        return re.compile(class_name(group)) if group else None
    except re.error as error:
        raise UserError(f"data.group = {group!r}: not a regular expression: {error}") from error


def _listing(
    root: Path,
    names: list[str] | dict[str, str],
    rows: list[Row],
    problems: list[Problem],
    pattern: re.Pattern[str] | None,
) -> Listing:
    rows = sorted(rows)
    groups = tuple(row.group or _group(pattern, class_name(row.path)) for row in rows)
    if pattern and not any(groups):
        raise UserError(f"data.group = {pattern.pattern!r}: matches none of the paths; the first is {rows[0].path!r}")
    number = {name: i for i, name in enumerate(names)}
    class_names = tuple(names.values() if isinstance(names, dict) else names)
    for name in class_names:
        if not is_unicode(name):
            raise UserError(f"data.root = {str(root)!r}: the name of class {name!r} is not UTF-8; rename its folder")
    problems += look_alikes(class_names)
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


def _levels(root: Path, problems: list[Problem], passed: Counter[str]) -> list[tuple[str, str]]:
    """Returns the folders that hold class folders, relative to `root`, each with its split.

    What lies in `root` beside splits is added to `problems`.
    """
    beside: Counter[str] = Counter()
    folders, files, wrong = scan(root, "", beside)
    words = {name: found[1].lower() for name in folders if (found := _SPLIT_FOLDER.fullmatch(name))}
    others = [name for name in folders if name not in words]
    if others:  # a class may be called "train", too: then it holds pictures, not classes
        divided = [name for name in words if scan(root, name, Counter()).folders]
        if divided:
            raise UserError(
                f"data.root = {str(root)!r}: {divided[0]!r} holds folders, as a split does, but {others[0]!r} beside it"
                f" is no split ({', '.join(_SPLIT_WORDS)}); rename or move one of them"
            )
    if others or not words:
        _check_no_splits(root, folders)
        return [("", "train")]
    splits = _splits(root, words)
    for name in splits:
        _check_no_splits(root, scan(root, name, Counter()).folders)
    problems += [*wrong, *_strays(files)]
    passed.update(beside)
    return list(splits.items())


def _splits(root: Path, words: Mapping[str, str]) -> dict[str, str]:
    """Returns the split of each folder by the word for it in its name."""
    evaluation = "val" if "test" in map(_SPLIT_WORDS.get, words.values()) else "test"
    splits = {name: evaluation if _SPLIT_WORDS[word] == "eval" else _SPLIT_WORDS[word] for name, word in words.items()}
    first: dict[str, str] = {}
    for name, split in splits.items():
        if first.setdefault(split, name) != name:
            raise UserError(
                f"data.root = {str(root)!r}: {first[split]!r} and {name!r} are both the split {split}; merge them, or"
                " move one away"
            )
    if "train" not in first:
        raise UserError(f"data.root = {str(root)!r}: holds the splits {', '.join(sorted(first))} but no folder 'train'")
    return splits


def _check_no_splits(root: Path, folders: list[str]) -> None:
    """Refuses folders that hold no picture of their own and mostly the same folders: they may be splits or classes."""
    inside: list[set[str]] = []
    for folder in folders:
        content = scan(root, folder, Counter())
        if not all(map(not_a_picture, content.files)):
            return
        inside.append({class_name(posixpath.basename(path)) for path in content.folders})
    common = sorted(set.intersection(*inside)) if len(inside) > 1 else []
    if len(common) > 1 and all(2 * len(common) > len(names) for names in inside):
        raise UserError(
            f"data.root = {str(root)!r}: {folders[0]!r} and {folders[1]!r} hold no picture of their own, but the same"
            f" folders, such as {common[0]!r} and {common[1]!r}; if they are splits, call them train, val and test, or"
            " choose one as data.root; if they are classes, name their pictures in a list (data.source = 'list')"
        )


def _strays(files: Iterable[str]) -> list[Problem]:
    return [Problem(file, not_a_picture(file) or "lies in no class folder") for file in files]


def _too_few(root: Path, names: list[str], problems: list[Problem]) -> str:
    """Returns why fewer than two classes were found, and the way out."""
    first = list_files.first_reason(problems)
    if not names:
        return f"no picture in a class folder; put each class into a folder of its own{first}"
    inner = scan(root, names[0], Counter()).folders if (root / names[0]).is_dir() else []
    hint = f"; is {str(root / names[0])!r} meant?" if len(inner) > 1 else ""
    return f"only one class, {names[0]!r}{hint}{first}"
