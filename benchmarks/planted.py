"""How many wrong labels the audit finds: plants some in a folder of pictures, and scores an audit of them.

    python benchmarks/planted.py plant PLANKTON runs/planted/pictures --share=0.03 --seed=0
    mfm-jax train plankton --workdir=runs/planted/run --config.data.root=runs/planted/pictures --config.train.epochs=4
    mfm-jax audit runs/planted/run --folds=3
    python benchmarks/planted.py score runs/planted/pictures runs/planted/run --out=docs/results/audit.csv

`plant` makes a folder of links to the pictures, of which a share, drawn at random, lies in the folder of another class,
drawn in proportion to the classes' sizes, so that a rare class is not flooded; `pictures-planted.csv` beside it lists
them. `score` tells how many of the planted pictures that were audited are flagged (recall), and how many of the flagged
were planted (precision, with its 95 % interval; a lower bound: the data's own wrong labels count as false). It prints,
and with `--out` writes, a row for all flagged, for the first of the list, as many as were planted and half as many, and
for each shot group of the given label.
"""

import argparse
import csv
import os
from pathlib import Path

import numpy as np

from mfm_jax.data import longtail
from mfm_jax.data.manifest import read_manifest
from mfm_jax.evaluation import intervals
from mfm_jax.machine import disk
from mfm_jax.workdir.files import Workdir

FIELDS = ("which", "audited", "planted", "flagged", "found", "precision", "low", "high", "recall")


def plant(source: Path, target: Path, share: float, seed: int) -> list[tuple[str, str]]:
    """Links the pictures of `source` to `target`; returns (planted path, true class) of those with a wrong label."""
    files = sorted(path for path in source.glob("*/*") if path.is_file())
    names, labels = np.unique([path.parent.name for path in files], return_inverse=True)
    rng, sizes = np.random.default_rng(seed), np.bincount(labels)
    chosen = rng.permutation(len(files))[: round(share * len(files))]
    given = labels.copy()
    for i in chosen:
        odds = np.where(np.arange(len(names)) == labels[i], 0, sizes)
        given[i] = rng.choice(len(names), p=odds / odds.sum())
    for name in names:
        (target / str(name)).mkdir(parents=True, exist_ok=True)
    for path, label in zip(files, given, strict=True):
        os.symlink(path.resolve(), _place(target, str(names[label]), path))
    wrong = [
        (str(_place(target, str(names[given[i]]), files[i]).relative_to(target)), str(names[labels[i]])) for i in chosen
    ]
    disk.write_rows(_list_of(target), [("path", "true_class"), *sorted(wrong)])
    return wrong


def _place(target: Path, name: str, path: Path) -> Path:
    return target / name / f"{path.parent.name}-{path.name}"  # the name of a picture is that in its own class


def _list_of(target: Path) -> Path:
    return target.with_name(f"{target.name}-planted.csv")


def score(pictures: Path, run: Path) -> list[dict[str, object]]:
    """Returns the rows of the table."""
    with _list_of(pictures).open(newline="") as file:
        planted = {row["path"] for row in csv.DictReader(file)}
    manifest = read_manifest(Workdir(run).manifest)
    splits, files = manifest["splits"], manifest["files"]
    audited = {files[i] for i in splits["train"]["ids"]}
    with (Workdir(run).audit / "suspects.csv").open(newline="") as file:
        flagged = [row["picture"] for row in csv.DictReader(file) if row["kind"] == "label"]
    known = len(planted & audited)
    rows = [
        _row("all flagged", audited, planted, flagged),
        _row("the first, as many as planted", audited, planted, flagged[:known]),
        _row("the first, half as many", audited, planted, flagged[: known // 2]),
    ]
    groups = longtail.shot_groups(splits["train"]["class_counts"])
    for group in ("many", "medium", "few"):
        names = {manifest["class_names"][k] for k in groups[group]}
        within = {path for path in audited if path.split("/")[0] in names}
        rows.append(_row(f"{group}-shot", within, planted, [path for path in flagged if path in within]))
    return rows


def _row(which: str, audited: set[str], planted: set[str], flagged: list[str]) -> dict[str, object]:
    there, found = audited & planted, len(planted.intersection(flagged))
    precision = found / max(len(flagged), 1)
    low, high = intervals.wilson(precision, max(len(flagged), 1))
    values = (which, len(audited), len(there), len(flagged), found, precision, low, high, found / max(len(there), 1))
    return dict(zip(FIELDS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    planting = commands.add_parser("plant")
    planting.add_argument("source", type=Path)
    planting.add_argument("target", type=Path)
    planting.add_argument("--share", type=float, default=0.03)
    planting.add_argument("--seed", type=int, default=0)
    scoring = commands.add_parser("score")
    scoring.add_argument("pictures", type=Path)
    scoring.add_argument("run", type=Path)
    scoring.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.command == "plant":
        wrong = plant(options.source, options.target, options.share, options.seed)
        print(f"{len(wrong):,} wrong labels, listed in {_list_of(options.target)}")
        return
    rows = score(options.pictures, options.run)
    for row in rows:
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if options.out:
        disk.write_rows(options.out, [FIELDS, *(tuple(row.values()) for row in rows)])


if __name__ == "__main__":
    main()
