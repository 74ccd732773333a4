"""Compare methods over seeds, on the same data and budget.

    python -m mfm_jax.compare --config=configs/digits_lt.py --methods=ce,logit_adjusted,mfm --seeds=0,1,2 \\
        --workdir=runs/digits

Every run gets the same split (`data.seed`); a seed sets initialisation and data order. Finished runs are not repeated
and interrupted ones go on. Each run is a process; `--jobs=N` has N of them side by side, each with cores of its own. A
method of which a run fails is shown as failed, with the reason; the others still finish, and the exit status is 1. With
`--config.data.train_on_meta=True` the methods that learn nothing from the meta set also train on its images, so that
the others have seen no image that they have not. `--tune=N` first tunes every method on validation, N runs each over
its own declared space (`tune`), in `workdir/METHOD/tune`; the compared runs then have the best values found. With
`--config.eval.test=False` all numbers are of the validation split, and the test split is not read.

Writes `compare.md`, `compare.csv` and the page `compare.html`: the last epoch and the best on validation, mean and
standard deviation over seeds, the paired difference to the first method with its 95 % interval, and training time and
peak memory as multiples of the first method's.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Column, Table

from mfm_jax import command
from mfm_jax import config as config_lib
from mfm_jax.errors import UserError
from mfm_jax.evaluation import intervals
from mfm_jax.machine import disk, versions
from mfm_jax.methods.table import COMPARED, METHODS
from mfm_jax.pages import comparison
from mfm_jax.study import runs, tune
from mfm_jax.workdir import finished
from mfm_jax.workdir.files import Workdir, read_object
from mfm_jax.workdir.finished import shown

_METHODS = flags.DEFINE_list("methods", list(COMPARED), "Methods, the baseline first.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Training seeds.")
_TOGETHER = flags.DEFINE_bool("together", False, "Train all seeds of a method in one program (for small networks).")

_JOBS = flags.DEFINE_integer("jobs", 1, "Runs side by side, each with its share of the cores.")
_TUNE = flags.DEFINE_integer("tune", 0, "Runs with which each method is tuned on validation first; 0 tunes none.")

_COLUMNS = ("balanced_accuracy", "accuracy", "many", "medium", "few", "rarest_third", "macro_f1", "roc_auc", "ece")
Results = dict[str, list[dict[str, Any]]]  # method -> results of each seed
Tuned = Mapping[str, Mapping[str, Any]]  # method -> the values that tuning chose, by `group.field`
_NOTHING: Mapping[str, Any] = MappingProxyType({})


def main(argv: Sequence[str]) -> int:
    del argv
    methods, seeds = _METHODS.value, _seeds(_SEEDS.value)
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods or len(set(methods)) != len(methods):
        raise UserError(f"--methods={','.join(methods)}: allowed: distinct names of {', '.join(METHODS)}")
    workdir = command.workdir()
    Workdir(workdir).check_no_run("--workdir")
    if _JOBS.value < 1:
        raise UserError(f"--jobs={_JOBS.value}: allowed: 1 or more")
    if _TUNE.value < 0:
        raise UserError(f"--tune={_TUNE.value}: allowed: 0 or more")
    results, failed, tuned = run_all(
        command.config(), methods, seeds, workdir, _JOBS.value, _TUNE.value, together=_TOGETHER.value
    )
    if not results:
        raise UserError(f"--methods={','.join(methods)}: every method failed; {methods[0]}: {failed[methods[0]]}")
    rows = table(results, methods[0], {name: peak_memory(workdir / name, seeds) for name in results})
    write(rows, seeds, workdir, methods[0], failed, tuned)
    print_table(rows, methods[0], failed, tuned)
    folders = {name: [workdir / name / f"seed{seed}" for seed in seeds] for name in results}
    for folder in itertools.chain(*folders.values()):
        for sentence in finished.warnings(folder):
            print(f"warning: {folder.relative_to(workdir)}: {sentence}")
    made = versions.provenance()
    page, sentences = comparison.write_page(workdir, rows, results, failed, tuned, folders, methods[0], made)
    print(f"table: {workdir}/compare.md, {workdir}/compare.csv")
    print(f"report: {Workdir(folders[list(results)[-1]][0]).report}")
    if sentences:
        print("balanced accuracy:", *sentences)
    print(f"open {page}")
    return 1 if failed else 0


def _seeds(texts: list[str]) -> list[int]:
    if not texts or not all(text.isdecimal() for text in texts) or len(set(texts)) != len(texts):
        raise UserError(f"--seeds={','.join(texts)}: expected distinct integers, 0 or more")
    return [int(text) for text in texts]


def run_all(
    config: Any,
    methods: Sequence[str],
    seeds: Sequence[int],
    workdir: Path,
    jobs: int = 1,
    trials: int = 0,
    *,
    together: bool = False,
) -> tuple[Results, dict[str, str], Tuned]:
    """Trains every (method, seed) in `workdir/method/seedN`, `jobs` at a time, after `trials` runs of tuning each.

    With `together` the seeds of a method are one program (`train.train_together`).

    Returns:
      (the results by method, of the methods whose runs all finished; by method, why another did not; by method, what
      tuning chose).
    """
    given = {(method, seed): run_fields(config, method, seed) for seed in seeds for method in methods}
    for fields in given.values():
        config_lib.resolve(fields)  # all of them, before the first is trained
    failed: dict[str, str] = {}
    best: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for method in methods if trials else ():
        _check_tuned(workdir / method, trials)
    for method in methods if trials else ():
        try:
            best[method] = tune.tune(method, given[method, seeds[0]], trials, workdir / method / "tune", jobs)
        except UserError as error:
            failed[method] = str(error)
    planned = []
    for (method, seed), fields in given.items():
        if method not in failed:
            resolved = config_lib.resolve(tune.with_values(fields, best[method]))
            planned.append((method, runs.Task(f"{method} seed {seed}", resolved, workdir / method / f"seed{seed}")))
    planned.sort(key=lambda pair: methods.index(pair[0]) if together else 0)
    groups = itertools.groupby(planned, key=lambda pair: pair[0] if together else pair[1].label)
    outcomes = runs.train_all([[run for _, run in group] for _, group in groups], jobs)
    results: Results = {method: [] for method in methods}
    for (method, run), outcome in zip(planned, outcomes, strict=True):
        if outcome.results is None:
            failed.setdefault(method, f"{run.label}: {outcome.error}")
        else:
            results[method].append(outcome.results)
    return {method: found for method, found in results.items() if method not in failed}, failed, best


def _check_tuned(folder: Path, trials: int) -> None:
    """Refuses to tune a method of which there are runs that were tuned otherwise: they would be another config's."""
    path = folder / "tune" / tune.BEST
    done = read_object(path)["trials"] if path.exists() else 0
    if done != trials and any(Workdir(run).config.exists() for run in folder.glob("seed*")):
        raise UserError(f"--tune={trials}: {folder} has runs that followed {done} trials; choose a new --workdir")


def run_fields(config: Any, method: str, seed: int) -> dict[str, dict[str, Any]]:
    """Returns the config's fields for one run: what a method cannot share with the others is set for it alone."""
    given = config.to_dict() if hasattr(config, "to_dict") else config
    fields: dict[str, dict[str, Any]] = {group: dict(given.get(group, {})) for group in {*config_lib.GROUPS, *given}}
    fields["method"]["name"], fields["train"]["seed"] = method, seed
    for group, values in METHODS[method].overrides.items():
        fields[group].update(values)
    reads = {method, fields["method"].get("base", "") if METHODS[method].learner else ""}
    for part in ("loss", "learner"):  # of the user's own
        if f"own_{part}" not in reads:
            fields["method"].pop(part, None)
    fields["data"]["train_on_meta"] = fields["data"].get("train_on_meta", False) and METHODS[method].learner is None
    return config_lib.resolve(fields).to_dict()


def peak_memory(folder: Path, seeds: Sequence[int]) -> float | None:
    """Returns the median peak memory of a method's runs in bytes; None where they had no processes of their own."""
    known = [value for seed in seeds if (value := Workdir(folder / f"seed{seed}").read_peak_memory()) is not None]
    return statistics.median(known) if len(known) == len(seeds) else None


def table(
    results: Results, against: str | None = None, memory: Mapping[str, float | None] = _NOTHING
) -> list[dict[str, Any]]:
    """Returns a row for each method and selection (`last`, `best`): mean and std over seeds, as fractions.

    `difference` is the mean over seeds of the balanced accuracy minus that of the first method with the same seed,
    `difference_se` its standard error, `std / sqrt(seeds)`, and `difference_t95` half the width of its 95 % interval by
    Student's t with seeds - 1 degrees of freedom; None for the first method or a single seed. `time_ratio` and
    `memory_ratio` are multiples of the first method's median training time and peak memory. `against` names
    another baseline than the first method; without results of it there are neither differences nor ratios. Where
    `eval.costs` or `eval.recall` is set, `mean_cost` is that of an image, by the decisions.

    `results` has by method the content of `results.json` of each seed, `memory` peak memory in bytes, None where it was
    not measured.
    """
    rows = []
    against = against or next(iter(results))
    baseline = results.get(against)
    times = {method: statistics.median(run["train_seconds"] for run in found) for method, found in results.items()}
    for method, found in results.items():
        for which in ("last", "best"):
            if any(run[which] is None for run in found):
                continue
            row: dict[str, Any] = {"method": method, "epoch": which, "seeds": len(found)}
            columns = {name: [shown(run, which)[name] for run in found] for name in _COLUMNS}
            if any("decisions" in run["last"] for run in found):
                columns["mean_cost"] = [_cost(run, which) for run in found]
            for name, values in columns.items():
                missing = any(value is None for value in values)
                row[f"{name}_mean"] = None if missing else statistics.fmean(values)
                row[f"{name}_std"] = None if missing or len(values) < 2 else statistics.stdev(values)
            row |= _paired_difference(found, baseline, which)
            row |= {"train_seconds": times[method], "time_ratio": _ratio(times, method, against)}
            row |= {"memory_bytes": memory.get(method), "memory_ratio": _ratio(memory, method, against)}
            rows.append(row)
    return rows


def _cost(run: Mapping[str, Any], which: str) -> float | None:
    """Returns the mean cost of an image, by the decisions; None for a checkpoint without them."""
    if "decisions" not in run[which]:
        return None
    paid: float = run[which]["decisions"]["measured"][run["split"]]["decided"]["mean_cost"]
    return paid


def _ratio(values: Mapping[str, float | None], method: str, against: str) -> float | None:
    value, unit = values.get(method), values.get(against)
    return value / unit if value and unit else None


def _paired_difference(
    found: list[dict[str, Any]], baseline: list[dict[str, Any]] | None, which: str
) -> dict[str, float | None]:
    if baseline is None or found is baseline or any(run[which] is None for run in baseline):
        return dict.fromkeys(("difference", "difference_se", "difference_t95"))
    scores, against = ([shown(run, which)["balanced_accuracy"] for run in runs] for runs in (found, baseline))
    mean, error, half = intervals.paired(scores, against)
    return {"difference": mean, "difference_se": error, "difference_t95": half}


def write(
    rows: list[dict[str, Any]],
    seeds: Sequence[int],
    workdir: Path,
    baseline: str,
    failed: Mapping[str, str] = _NOTHING,
    tuned: Tuned = _NOTHING,
) -> None:
    """Writes `compare.csv`, in fractions, and `compare.md`, in percent, with what failed and what was tuned."""
    disk.write_rows(workdir / "compare.csv", [list(rows[0]), *(row.values() for row in rows)])
    priced = ["cost"] * len(comparison.cost(rows[0]))
    head = ["method", "epoch", *_COLUMNS, f"balanced - {baseline}", *priced, "time", "memory"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [comparison.cell(row[f"{name}_mean"], row[f"{name}_std"]) for name in _COLUMNS]
        ratios = ["–" if row[name] is None else f"{row[name]:.2f}" for name in ("time_ratio", "memory_ratio")]
        lines.append([row["method"], row["epoch"], *cells, comparison.interval(row), *comparison.cost(row), *ratios])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    note = (
        f"Percent{' but for the cost' if priced else ''}; mean ± standard deviation over the seeds"
        f" {', '.join(map(str, seeds))}; the difference in balanced"
        f" accuracy is paired by seed, with Student's 95 % interval; training time, with compilation, and peak"
        f" memory are multiples of {baseline}'s."
    )
    below = [f"Failed: {method} ({reason})." for method, reason in failed.items()]
    below += [f"Tuned: {method}: {_in_words(values)}." for method, values in tuned.items() if values]
    disk.write(workdir / "compare.md", "\n\n".join([text, note, *below]) + "\n")


def _in_words(values: Mapping[str, Any]) -> str:
    """Returns `group.field = value, ...`."""
    return ", ".join(f"{path} = {v:.4g}" if isinstance(v, float) else f"{path} = {v}" for path, v in values.items())


def print_table(
    rows: list[dict[str, Any]], baseline: str, failed: Mapping[str, str] = _NOTHING, tuned: Tuned = _NOTHING
) -> None:
    """Prints the accuracies that matter most, in percent, narrow enough for a terminal."""
    groups = ("balanced", "many", "medium", "few", "rarest", f"- {baseline}")
    priced = ["cost"] * len(comparison.cost(rows[0]))
    columns = [Column(name, no_wrap=True, justify="right") for name in (*groups, *priced)]
    shown = Table(Column("method", no_wrap=True), "epoch", *columns, box=box.SIMPLE_HEAD, padding=0)
    for row in rows:
        cells = [comparison.cell(row[f"{name}_mean"], None) for name in ("many", "medium", "few", "rarest_third")]
        balanced = comparison.cell(row["balanced_accuracy_mean"], row["balanced_accuracy_std"])
        shown.add_row(row["method"], row["epoch"], balanced, *cells, comparison.interval(row), *comparison.cost(row))
    for method in failed:
        shown.add_row(method, "failed")
    Console().print(shown)
    spread = f"± standard deviation over {rows[0]['seeds']} seeds, [95 % interval of the paired difference]"
    print(f"balanced accuracy, %, also of the rarest third{f'; {spread}' if rows[0]['seeds'] > 1 else '; one seed'}")
    for method, values in tuned.items():
        if values:
            print(f"tuned: {method}: {_in_words(values)}")
    for method, reason in failed.items():
        print(f"failed: {method} ({reason})")


if __name__ == "__main__":
    command.run(main)
