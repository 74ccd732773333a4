"""How well the promise of prediction sets is kept: coverage over random partitions of a run's held-out images.

    python benchmarks/coverage.py runs/digits --per_class=10 --out=docs/results/coverage.csv

Takes finished runs. The validation and test images of each, which its last checkpoint never saw, are put together and
partitioned `--repeats` times, stratified by class: `--per_class` images (half of a class's where it has fewer than
twice as many) make the thresholds, the rest are covered or not. Prints, and with `--out` adds to a CSV file, a row for
all images and for each shot group: the promise, the mean coverage over the partitions with its standard deviation, the
95 % binomial interval of one partition's coverage around the mean, whether it holds the promise, and sizes of the sets.
"""

import argparse
import csv
import dataclasses
from pathlib import Path

import numpy as np

from mfm_jax import data as data_lib
from mfm_jax.evaluation import classifier, conformal, intervals, results


def held_out(workdir: Path) -> tuple[classifier.Classifier, results.Answers]:
    """Returns the last classifier of a run, and its answers on validation and test images."""
    trained = classifier.load(workdir)
    config = dataclasses.replace(trained.config, eval=dataclasses.replace(trained.config.eval, test=True))
    data = data_lib.build(config)
    splits = [split for split in ("val", "test") if len(getattr(data, f"{split}_labels"))]
    parts = [results.on_split(data, split, config.eval.batch_size)(trained) for split in splits]
    return trained, results.Answers(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def partition(rng: np.random.Generator, labels: np.ndarray, per_class: int) -> np.ndarray:
    """Returns which images make the thresholds, bool [N]."""
    chosen = np.zeros(len(labels), bool)
    for k in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == k))
        chosen[members[: min(per_class, len(members) // 2)]] = True
    return chosen


def rows(workdir: Path, promise: float, per_class: int, repeats: int) -> list[dict[str, object]]:
    """Returns the table's rows of one run."""
    trained, (probs, labels) = held_out(workdir)
    counts, rng = np.asarray(trained.facts.train_class_counts), np.random.default_rng(0)
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(repeats):
        chosen = partition(rng, labels, per_class)
        sets = conformal.fit(probs[chosen], labels[chosen], counts, promise)
        for group, measured in conformal.measure(sets, probs[~chosen], labels[~chosen], counts).items():
            found.setdefault(group, []).append(measured)
    settings = {"run": workdir.name, "method": trained.config.method.name, "per_class": per_class, "promise": promise}
    return [settings | {"group": group} | _row(promise, each) for group, each in found.items()]


def _row(promise: float, each: list[dict[str, float]]) -> dict[str, object]:
    images = each[0]["images"]
    coverage = np.array([one["covered"] / one["images"] for one in each])
    low, high = intervals.wilson(float(coverage.mean()), images)
    return {
        "images": int(images),
        "coverage": round(float(coverage.mean()), 4),
        "coverage_std": round(float(coverage.std(ddof=1)), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "held": low <= promise <= high,
        "size": round(float(np.mean([one["size"] for one in each])), 3),
        "empty": round(float(np.mean([one["empty"] / one["images"] for one in each])), 4),
    }


def main() -> None:
    """Prints the table of the runs that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", nargs="+", type=Path)
    parser.add_argument("--coverage", type=float, default=0.9)
    parser.add_argument("--per_class", type=int, default=50, help="calibration images a class (%(default)s)")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    table = [
        row
        for workdir in options.workdirs
        for row in rows(workdir, options.coverage, options.per_class, options.repeats)
    ]
    for row in table:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if options.out:
        new = not options.out.exists()
        with options.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            if new:
                writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
