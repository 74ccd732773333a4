"""What `--mode=check` says of somebody's pictures before anything is trained: how many, how large, what is wrong.

Nothing is decided here: the tables show what `data.listing` and `data.checking` found. What does not fit on a screen is
written to the workdir, a row each. Needs no JAX.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import ml_collections
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mfm_jax.config import Config, Data, resolve
from mfm_jax.data import assembly, checking, depth, files, listing, longtail, sizes, walk
from mfm_jax.data.checking import Duplicate
from mfm_jax.data.files import Sound
from mfm_jax.data.listing import Listing
from mfm_jax.data.lists import SPLITS
from mfm_jax.data.manifest import redrawn
from mfm_jax.data.walk import Problem
from mfm_jax.errors import UserError
from mfm_jax.evaluation import decisions
from mfm_jax.machine import disk
from mfm_jax.workdir.files import Workdir

_SHOWN = 20  # problems on the screen
_ENDS = 8  # classes shown at either end of a long table
_KINDS = {"file": "same file", "copy": "copies", "alike": "look alike"}


def check(config: ml_collections.ConfigDict, workdir: Path, command: str = "") -> int:
    """Checks the pictures that `config` names, prints what was found, and returns 0, or 2 where there are problems.

    What training would make of them comes last: the splits, the batch sizes, and `command`, which starts it.

    Raises:
      UserError: the config is wrong, or there are no pictures to look at.
    """
    resolved = resolve(config)
    data = resolved.data
    if data.source not in ("folder", "list"):
        raise UserError(
            f"data.source = {data.source!r}: --mode=check looks at files, with data.source = 'folder' or 'list'; what"
            " this source gives is checked when it is read"
        )
    found = listing.read(data)
    checked = checking.check(found, data.workers)
    usable = found.without([path for path, fact in zip(found.paths, checked.facts, strict=True) if not fact])
    sound = files.Sound(usable, [fact for fact in checked.facts if fact], [], [])
    console = Console()
    _print_pictures(console, sound)
    _print_depth(console, data, sound)
    if found.passed:
        console.print(walk.in_words(found.passed))
    problems = (*checked.problems, *checked.contradictions)
    _print_problems(console, problems, workdir)
    _print_duplicates(console, found, checked.duplicates, workdir)
    skips = bool(checked.problems) and data.on_bad_image == "error"
    trains = _print_plan(console, resolved, sound, command, skips)
    return 0 if trains and not problems else 2


def _print_plan(console: Console, config: Config, sound: Sound, command: str, skips: bool) -> bool:
    """Prints what training would make of the pictures that can be used; returns whether it would not refuse them.

    `skips`: there are others, which have to be left out first.
    """
    if not config.data.manifest:  # wrong labels that are drawn without the pixels; how many there are is the same
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, noise_kind="symmetric"))
    try:
        _, _, manifest = assembly.divided(config, files.source(config.data, sound, whole=True))
        held, wanted = manifest["splits"]["val"]["class_counts"], config.eval
        warned = decisions.check(wanted.costs, wanted.recall, manifest["class_names"], held)
    except UserError as error:
        console.print(f"training would end with: {error}", soft_wrap=True, markup=False)
        return False
    table = Table("split", "images", "classes")
    for split in ("train", "val", "meta", "test"):
        counts = np.array(manifest["splits"][split]["class_counts"])
        of_train = " (of train, redrawn every epoch)" if split == "meta" and redrawn(manifest) else ""
        table.add_row(split + of_train, f"{counts.sum():,}", f"{np.count_nonzero(counts):,}")
    console.print(table)
    used = sizes.cut(config, manifest)
    if cuts := sizes.in_words(config, manifest):
        console.print(cuts, soft_wrap=True)
    console.print(", ".join(f"{field} = {sizes.of(used, field)}" for field in sizes.limits(config, manifest)))
    for sentence in warned:
        console.print(f"warning: {sentence}", soft_wrap=True, markup=False)
    if skips:
        command += " --config.data.on_bad_image=skip"
        console.print("training ends with these problems; this leaves out what they name:")
    console.print(f"to train: {command}", soft_wrap=True, markup=False)
    return True


def _print_pictures(console: Console, sound: Sound) -> None:
    usable, facts = sound.listing, sound.facts
    color = f"{(grey := sum(fact.grey for fact in facts)):,} grey and {len(facts) - grey:,} in colour"
    console.print(f"{len(facts):,} pictures in {len(usable.class_names):,} classes, {color}")
    if facts:
        for name, sides in (("width", [f.width for f in facts]), ("height", [f.height for f in facts])):
            console.print(f"{name}: {min(sides)} to {max(sides)} pixels, median {np.median(sides):g}")
    present = [split for split in SPLITS if split in usable.splits]
    counts = {s: np.bincount(usable.labels[usable.splits == s], minlength=len(usable.class_names)) for s in present}
    for line in usable.lacking():
        console.print(Text(line))
    if "train" not in counts:
        return
    console.print(_class_table(usable.class_names, counts))
    groups = longtail.shot_groups(counts["train"])
    for name, what in (("many", "more than 100"), ("medium", "20 to 100"), ("few", "fewer than 20")):
        size = len(groups[name])
        console.print(f"{name} ({what} training pictures): {size:,} {'class' if size == 1 else 'classes'}")


def _print_depth(console: Console, data: Data, sound: Sound) -> None:
    """Prints how the values of pictures of 16 bits become 8, where there are any."""
    usable, facts = sound.listing, sound.facts
    if not any(fact.bits for fact in facts):
        return
    splits, _ = files.with_test(data, usable, files.with_copies(usable.groups, facts))
    console.print(depth.in_words(facts, depth.white(data.white, facts, splits == "train")), soft_wrap=True)


def _class_table(names: Sequence[str], counts: dict[str, longtail.Ints]) -> Table:
    """Returns a row a class, from most to fewest training pictures; of many classes, both ends."""
    table = Table("class")
    for split in counts:
        table.add_column(split, justify="right")
    order = np.argsort(-counts["train"], kind="stable").tolist()
    ends = order if len(order) <= 2 * _ENDS + 1 else [*order[:_ENDS], -1, *order[-_ENDS:]]
    for c in ends:
        if c < 0:
            table.add_row(f"({len(order) - 2 * _ENDS} more)")
        else:
            table.add_row(_shown(names[c]), *(f"{count[c]:,}" for count in counts.values()))
    table.add_section()
    table.add_row("all", *(f"{count.sum():,}" for count in counts.values()))
    return table


def _print_problems(console: Console, problems: Sequence[Problem], workdir: Path) -> None:
    file = Workdir(workdir).problems
    file.parent.mkdir(parents=True, exist_ok=True)
    disk.write_rows(file, [("path", "reason"), *problems])
    if not problems:
        console.print("no problems")
        return
    console.print(f"{len(problems):,} problem{'s' * (len(problems) > 1)}:")
    for path, reason in problems[:_SHOWN]:
        console.print(Text("  ") + _shown(path) + Text(": ") + _shown(reason), soft_wrap=True)
    if len(problems) > _SHOWN:
        console.print(f"  and {len(problems) - _SHOWN:,} more in {file}", soft_wrap=True, markup=False)


def _print_duplicates(console: Console, found: Listing, duplicates: Sequence[Duplicate], workdir: Path) -> None:
    """Prints, for each kind and pair of splits, how many there are and one of them, first one of different classes."""
    file = Workdir(workdir).duplicates
    rows = [
        (d.kind, *(str(value[i]) for i in (d.first, d.second) for value in (found.paths, found.splits, found.labels)))
        for d in duplicates
    ]
    header = ("kind", "path", "split", "label", "other_path", "other_split", "other_label")
    disk.write_rows(file, [header, *rows])
    pairs: defaultdict[tuple[str, str, str], list[Duplicate]] = defaultdict(list)
    for d in duplicates:
        pairs[d.kind, str(found.splits[d.second]), str(found.splits[d.first])].append(d)
    if pairs:
        console.print(f"duplicates, all in {file}:", soft_wrap=True, markup=False)
    for (kind, split, other), members in pairs.items():
        differ = [d for d in members if found.labels[d.first] != found.labels[d.second]]
        example = (differ or members)[0]
        where = f"in {split}" if split == other else f"in {split} of pictures in {other}"
        console.print(
            Text(f"  {_KINDS[kind]} {where}: {len(members):,}, {len(differ):,} across classes, such as ")
            + _shown(found.paths[example.second])
            + Text(" and ")
            + _shown(found.paths[example.first]),
            soft_wrap=True,
        )


def printable(name: str) -> str:
    """Returns a name with what cannot be printed, such as a line's end or a byte that is no UTF-8, as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _shown(name: str) -> Text:
    return Text(printable(name))
