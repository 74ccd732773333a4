r"""The table of regret: how far every method is from the best of each setting, with one recipe for all of them.

    TFDS_DATA_DIR=... python benchmarks/regret.py --workdir=runs/regret --plankton=FOLDER \
        --csv=docs/results/regret.csv --picture=docs/results/regret.svg

Trains one row after another, writes what is there after each, stops at SIGTERM or Ctrl-C with all saved (status 75),
and goes on where it was with the same command; docs/results/regret.md is the protocol. Once MFM is trained in every
setting, `--modulator=mfm_jax/modulators/long_tail.json` writes the curve that ships, the mean over all. Tiers
(`--tiers`), in order:

  first  the six most telling settings (`regret_settings`), every method, 2 seeds
  rest   the other settings
  kept   MFM that learns nothing: in each setting with the mean curve of the settings that have other images
  more   5 seeds of the three methods with the smallest mean regret on validation

In each setting the tuned reference is chosen first, on validation (`TRIALS`), and the classes that are hard are those
of a run on balanced data, on validation; neither reads the test split.
"""

import argparse
import math
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import regret_curve
import regret_measure as measure
import regret_picture
import study
from regret_settings import BALANCED, SETTINGS, Setting, Values, fields, pack

from mfm_jax import command, compare
from mfm_jax import config as config_lib
from mfm_jax.config import Config
from mfm_jax.errors import UserError
from mfm_jax.machine import disk
from mfm_jax.study import tune
from mfm_jax.training import train
from mfm_jax.workdir.files import Workdir, read_object
from mfm_jax.workdir.finished import shown

TIERS = ("first", "rest", "kept", "more")
FIRST = tuple(SETTINGS)[:6]
SEEDS, MORE_SEEDS, BEST = 2, 5, 3
COLUMNS = (
    *("setting", "method", "seeds", "balanced_accuracy_mean", "balanced_accuracy_std"),
    *("regret", "regret_low", "regret_high", "command"),
)
TUNED, TRANSFERRED = "logit_adjusted_tuned", "logit_adjusted_transferred"
TUNED_ON = "cifar10_100"  # the setting whose tau is taken to the others
FROZEN = "mfm_frozen"
# The recipes: what is set for a method, as the study chose it on CIFAR-10 at factor 100 (docs/results/study.md).
RECIPES: dict[str, tuple[str, Values]] = {
    "mfm": ("mfm", {}),
    FROZEN: (FROZEN, {}),
    "logit_adjusted": ("logit_adjusted", {}),
    TRANSFERRED: ("logit_adjusted", {}),
    TUNED: ("logit_adjusted", {}),
    "ce": ("ce", {}),
    "ldam_drw": ("ldam_drw", study.CHOSEN["ldam_drw"]),
    "meta_weight_net": ("meta_weight_net", study.CHOSEN["meta_weight_net"]),
    "crt": ("crt", {}),
    "class_balanced": ("class_balanced", {}),
}
# The candidates of the tuned reference: sampling and tau.
TRIALS = (
    *(("square_root_later", tau) for tau in (0.5, 0.75, 1.0, 1.5)),
    *(("natural", tau) for tau in (1.0, 1.5, 2.0)),
)
_OWN_SAMPLING = {"mfm": "square_root", "mfm_frozen": "square_root", "crt": "balanced_later"}  # of the others: natural


class Run(NamedTuple):
    """One run: its config, and its folder."""

    config: Config
    workdir: Path

    @property
    def results(self) -> dict[str, Any]:
        """The content of its `results.json`; empty while there is none."""
        path = Workdir(self.workdir).results
        return read_object(path) if path.exists() else {}


class Row(NamedTuple):
    """A method in a setting: the content of `results.json` of each of its seeds that are done."""

    setting: str
    method: str
    results: Sequence[Mapping[str, Any]]

    def balanced(self, split: str = "test") -> list[float]:
        """Returns the balanced accuracies of the last epoch, in percent."""
        return [100 * one["last"][split]["balanced_accuracy"] for one in self.results]


class Study:
    """The runs of a folder."""

    def __init__(self, root: Path, plankton: str = ""):
        self._root, self._plankton = root, plankton
        self.failed: dict[Path, str] = {}

    def run(self, name: str, setting: Setting, method: str, values: Values, seed: int = 0, kind: str = "") -> Run:
        """Returns the run of a method with `values`; two settings that differ in nothing for it have it in common."""
        data = self._root / "data" / f"{setting.images or name}.npz"
        if not data.exists():
            pack(setting, data, self._plankton, self._recalls() if setting.by_recall else ())
        values = sampled(method, setting, values)
        given = tune.with_values(compare.run_fields(fields(setting, data), method, seed), values)
        place = name if setting.values or not setting.images else setting.images
        label = "-".join([method, *(str(value) for path, value in values.items() if path.startswith("method."))])
        return Run(config_lib.resolve(given), self._root / place / kind / label / f"seed{seed}")

    def balanced(self) -> Run:
        """Returns the run that tells which classes are hard; it does not read the test split."""
        return self.run("cifar10_balanced", BALANCED, "ce", {"eval.test": False})

    def _recalls(self) -> list[float]:
        found = self.balanced().results
        if not found:
            raise UserError(f"{self.balanced().workdir}: failed, and two settings follow its recalls on validation")
        return shown(found)["per_class_accuracy"]

    def train(self, runs: Sequence[Run]) -> None:
        """Trains runs that differ in the seed alone, in one program; what fails is noted, with the reason."""
        print(f"{time.strftime('%H:%M:%S')}", *(run.workdir for run in runs), flush=True)
        try:
            train.train_together([run.config for run in runs], [run.workdir for run in runs], pages=False)
        except UserError as error:
            self.failed[runs[0].workdir] = str(error)
            print(f"failed: {error}", flush=True)
        jax.clear_caches()  # the next run's programs are others

    def trials(self, name: str) -> dict[tuple[str, float], Run]:
        """Returns the trials of the tuned reference in a setting; they do not read the test split."""
        setting = SETTINGS[name]
        return {
            pair: self.run(name, setting, "logit_adjusted", {**adjusted(*pair), "eval.test": False}, kind="trials")
            for pair in dict.fromkeys((setting.sampling or sampling, tau) for sampling, tau in TRIALS)
        }

    def chosen(self, name: str) -> tuple[str, float] | None:
        """Returns the sampling and tau that are best on validation; None while a trial is to be done."""
        found = {pair: run.results for pair, run in self.trials(name).items()}
        if not all(found.values()):
            return None
        return max(found, key=lambda pair: shown(found[pair])["balanced_accuracy"])

    def runs(self, name: str, method: str, seeds: Sequence[int]) -> list[Run]:
        """Returns the runs of a row; none while what it takes from trials is not known."""
        of, values = RECIPES[method]
        if method in (TUNED, TRANSFERRED):
            pair = self.chosen(name if method == TUNED else TUNED_ON)
            if pair is None:
                return []
            values = adjusted(*pair)
        if method == FROZEN:
            curve = self.curve(SETTINGS[name].images or name)
            if curve is None:
                return []
            values = {"modulation.init_from": str(curve)}
        return [self.run(name, SETTINGS[name], of, values, seed) for seed in seeds]

    def curve(self, without: str) -> Path | None:
        """Returns the file of the curve learned without the images of a setting; None while a run of MFM is to be done.

        The mean over the settings of the mean of the first seeds of the mean over the epochs. Settings that have a
        sampling are no part of it: they have another curve.
        """
        path = self._root / "curves" / f"{without}.json"
        names = [name for name, one in SETTINGS.items() if not one.sampling and without not in (name, one.images)]
        if not path.exists():
            runs = {name: self.runs(name, "mfm", range(SEEDS)) for name in names if self._packed(name)}
            if len(runs) < len(names) or not all(run.results for of in runs.values() for run in of):
                return None
            paths = [[regret_curve.path_of(run.workdir) for run in of] for of in runs.values()]
            means = [regret_curve.mean([regret_curve.mean(curves) for curves in of]) for of in paths]
            regret_curve.write(path, regret_curve.mean(means), f"the mean over {', '.join(names)}")
        return path

    def _packed(self, name: str) -> bool:
        return (self._root / "data" / f"{SETTINGS[name].images or name}.npz").exists()

    def rows(self) -> list[Row]:
        """Returns the rows of which a seed is done."""
        found = []
        for name in SETTINGS:
            if self._packed(name):
                for method in RECIPES:
                    results = [one for run in self.runs(name, method, range(MORE_SEEDS)) if (one := run.results)]
                    found += [Row(name, method, results)] if results else []
        return found


def adjusted(sampling: str, tau: float) -> dict[str, Any]:
    """Returns what is set for logit adjustment."""
    return {"method.sampling": sampling, "method.tau": tau}


def sampled(method: str, setting: Setting, values: Values) -> dict[str, Any]:
    """Returns `values` with the sampling of the setting, under one name for what is one thing."""
    sampling = setting.sampling or values.get("method.sampling", "own")
    if method == "crt" or sampling == _OWN_SAMPLING.get(method, "natural"):
        sampling = "own"
    later = {"method.first_stage": 0.5} if sampling.endswith("_later") else {}
    return {**values, "method.sampling": sampling, **later}


def queue(study_: Study, options: argparse.Namespace) -> Iterator[list[Run]]:
    """Yields what is trained together, in the order of worth; what follows may depend on what was trained before."""
    seeds = range(min(SEEDS, options.seeds))
    for tier, names in (("first", FIRST), ("rest", tuple(SETTINGS)[len(FIRST) :])):
        for name in names:
            if tier in options.tiers and name in options.settings:
                yield from _of_setting(study_, name, options.methods, seeds)
    if "kept" in options.tiers and FROZEN in options.methods:
        yield from (study_.runs(name, FROZEN, seeds) for name in options.settings)
    if "more" in options.tiers:
        methods = [method for method in best_on_validation(study_.rows()) if method in options.methods]
        more = range(SEEDS, min(MORE_SEEDS, options.seeds))
        yield from (study_.runs(name, method, more) for name in options.settings for method in methods)


def _of_setting(study_: Study, name: str, methods: Sequence[str], seeds: Sequence[int]) -> Iterator[list[Run]]:
    if SETTINGS[name].by_recall:
        yield [study_.balanced()]
    for wanted, where in ((TRANSFERRED, TUNED_ON), (TUNED, name)):
        if wanted in methods:
            yield from ([run] for run in study_.trials(where).values())
    yield from (study_.runs(name, method, seeds) for method in methods if method != FROZEN)


def best_on_validation(rows: Sequence[Row]) -> list[str]:
    """Returns the methods with the smallest mean regret on validation, of the first seeds alone."""
    means = {(row.setting, row.method): statistics.fmean(row.balanced("val")[:SEEDS]) for row in rows}
    best = {row.setting: max(v for (name, _), v in means.items() if name == row.setting) for row in rows}
    lost: dict[str, list[float]] = {}
    for (name, method), mean in means.items():
        lost.setdefault(method, []).append(best[name] - mean)
    return sorted(lost, key=lambda method: statistics.fmean(lost[method]))[:BEST]


def noises(rows: Sequence[Row]) -> dict[str, measure.Noise]:
    """Returns the noise of each setting in which every method has its two seeds."""
    found = {}
    for name in dict.fromkeys(row.setting for row in rows):
        here = [row for row in rows if row.setting == name]
        if [row.method for row in here if len(row.results) >= SEEDS] == list(RECIPES):
            found[name] = measure.noise([scores(row) for row in here], np.random.default_rng(0))
    return found


def scores(row: Row) -> measure.Scores:
    """Returns what the measure reads of a row, in percent."""
    tested = [shown(one) for one in row.results]
    variances = [measure.test_variance(_known(one), one["per_class_images"]) for one in tested]
    return measure.Scores(row.balanced(), 1e4 * statistics.fmean(variances))


def _known(found: Mapping[str, Any]) -> list[float]:
    """Returns the recall of each class, 0 of one without test images."""
    return [recall or 0.0 for recall in found["per_class_accuracy"]]


def table(rows: Sequence[Row], found: Mapping[str, measure.Noise]) -> list[dict[str, Any]]:
    """Returns the lines of the CSV file, by column, accuracies and regrets in percent; "" where it is not known."""
    regrets = {name: dict(zip(RECIPES, measure.regrets(noise), strict=True)) for name, noise in found.items()}
    lines = []
    for row in rows:
        values, regret = row.balanced(), regrets.get(row.setting, {}).get(row.method)
        line = {"setting": row.setting, "method": row.method, "seeds": len(values)}
        line |= {"balanced_accuracy_mean": f"{statistics.fmean(values):.2f}"}
        line |= {"balanced_accuracy_std": f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""}
        shown_ = dict(zip(COLUMNS[5:8], regret[:3], strict=True)) if regret else dict.fromkeys(COLUMNS[5:8], math.nan)
        line |= {name: "" if math.isnan(value) else f"{value:.2f}" for name, value in shown_.items()}
        lines.append(line | {"command": shell(row)})
    return lines


def shell(row: Row) -> str:
    """Returns the command that trains the row by itself."""
    words = [f"--settings={row.setting}", f"--methods={row.method}", f"--seeds={len(row.results)}", "--workdir=WORKDIR"]
    words += ["--plankton=FOLDER"] * (row.setting == "plankton")
    return shlex.join(["python", "benchmarks/regret.py", *words])


def markdown(found: Mapping[str, measure.Noise], lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table over settings, the smallest mean first, and the regrets of each setting."""
    names = list(found)
    head = ["method", "mean", "above a level one", "worst", "above a level one", *names]
    text = [head, ["---"] * len(head)]
    over = {method: measure.summary(found, i) for i, method in enumerate(RECIPES)} if found else {}
    by_key = {(line["setting"], line["method"]): line for line in lines}
    for method, one in sorted(over.items(), key=lambda pair: pair[1].mean):
        above = f"{one.mean - one.level_mean:.1f} [{one.mean_low:.1f}, {one.mean_high:.1f}]"
        cells = [f"`{method}`", f"{one.mean:.1f}", above, f"{one.worst:.1f}", f"{one.worst - one.level_worst:.1f}"]
        text.append([*cells, *(f"{float(by_key[name, method]['regret']):.1f}" for name in names)])
    return "".join("| " + " | ".join(cells) + " |\n" for cells in text)


def record(study_: Study, root: Path, options: argparse.Namespace) -> str:
    """Writes the CSV file, the table and the picture of what is there; returns the table."""
    rows = study_.rows()
    found = noises(rows)
    lines = table(rows, found)
    for path in filter(None, (root / "regret.csv", options.csv)):
        disk.write_rows(path, [COLUMNS, *([line[name] for name in COLUMNS] for line in lines)])
    text = markdown(found, lines)
    disk.write(root / "regret.md", text)
    if found:
        for path in filter(None, (root / "regret.svg", options.picture)):
            regret_picture.write(path, lines, {m: measure.summary(found, i) for i, m in enumerate(RECIPES)})
    return text


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--plankton", default="", help="folder of PlanktonSet's pictures; without it, not that setting")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--modulator", type=Path, help="written once MFM is trained in every setting")
    parser.add_argument("--seeds", type=int, default=MORE_SEEDS, help="no row gets more")
    for name, known in (("tiers", TIERS), ("settings", tuple(SETTINGS)), ("methods", tuple(RECIPES))):
        parser.add_argument(f"--{name}", default=known, type=lambda text: text.split(","), help=",".join(known))
    options = parser.parse_args(argv)
    for name, known in (("tiers", TIERS), ("settings", SETTINGS), ("methods", RECIPES)):
        if unknown := [word for word in getattr(options, name) if word not in known]:
            raise UserError(f"--{name}={','.join(unknown)}: allowed: {', '.join(known)}")
    if not options.plankton:
        options.settings = [name for name in options.settings if SETTINGS[name].source != "plankton"]
    root = options.workdir
    root.mkdir(parents=True, exist_ok=True)
    study_ = Study(root, options.plankton)
    for runs in queue(study_, options):
        if not all(run.results for run in runs):
            study_.train(runs)
            record(study_, root, options)
    if options.modulator and (curve := study_.curve(without="none")):
        disk.write(options.modulator, curve.read_text())
    print(record(study_, root, options), *(f"failed: {path}: {why}" for path, why in study_.failed.items()), sep="\n")
    return 1 if study_.failed else 0


if __name__ == "__main__":
    sys.exit(command.guarded(main, sys.argv[1:]))
