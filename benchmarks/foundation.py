"""What pre-training favours, corrected or not: a last layer trained on the frozen features of a network from here.

    TFDS_DATA_DIR=... python benchmarks/foundation.py --config=configs/cifar10_lt_small.py --workdir=runs/foundation

The stand-in for a foundation model is the config's network, trained by cross-entropy on a long tail of its own, of the
factor `--start_factor`, so that its head favours some classes. From it the head alone is trained on the config's long
tail (`model.tune=head`), by CE, logit adjustment and MFM, each as it is and with the prior that pre-training left
(`method.pretraining_tau=1`). `start` is the stand-in itself. Started again with the same folder it goes on where it
was. `--seeds=0 --config.train.epochs=2` makes a trial of it; `--jobs=N` has N runs side by side. The rows are printed,
and are in WORKDIR/foundation.csv.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import study
from absl import flags

from mfm_jax import command, compare
from mfm_jax import config as config_lib
from mfm_jax.machine import disk
from mfm_jax.study import runs, tune

_START_FACTOR = flags.DEFINE_float("start_factor", 10.0, "Imbalance factor of what the stand-in is trained on.", 1.0)
_ROWS = flags.DEFINE_list("rows", ["ce", "logit_adjusted", "mfm"], "Methods to train, each with and without the prior.")

COLUMNS = (
    *("method", "pretraining_tau", "seeds", "balanced_accuracy_mean", "balanced_accuracy_std", "minus_uncorrected"),
    *("head_third", "middle_third", "rarest_third"),
)
Row = tuple[str, float]  # a method and its `method.pretraining_tau`


def planned(
    config: Any, workdir: Path, methods: Sequence[str], seeds: Sequence[int], factor: float
) -> dict[Row, list[runs.Task]]:
    """Returns the runs of each row, one for each seed; `start` is what the others need."""

    def of(name: str, method: str, values: Mapping[str, Any]) -> list[runs.Task]:
        made = []
        for seed in seeds:
            head = {"model.init_from": str(workdir / "start" / f"seed{seed}")} if name != "start" else {}
            fields = tune.with_values(compare.run_fields(config, method, seed), {**values, **head})
            made.append(runs.Task(f"{name}, seed {seed}", config_lib.resolve(fields), workdir / name / f"seed{seed}"))
        return made

    rows = {("start", 0.0): of("start", "ce", {"data.imbalance_factor": factor})}
    for method in methods:
        rows[method, 0.0] = of(method, method, {"model.tune": "head"})
        corrected = {"model.tune": "head", "method.pretraining_tau": 1.0}
        rows[method, 1.0] = of(f"{method}_corrected", method, corrected)
    return rows


def line(row: Row, results: study.Results, uncorrected: study.Results) -> list[Any]:
    """Returns a line of the CSV file, in percent; the difference is that of the means."""
    found, without = study.summary(results), study.summary(uncorrected)
    numbers = [found["mean"], found["std"], found["mean"] - without["mean"], *(found[name] for name in study.THIRDS)]
    return [row[0], f"{row[1]:g}", len(results), *("" if math.isnan(value) else f"{value:.2f}" for value in numbers)]


def main(argv: Sequence[str]) -> int:
    del argv
    workdir, jobs = command.workdir(), flags.FLAGS.jobs
    rows = planned(command.config(), workdir, _ROWS.value, compare._seeds(flags.FLAGS.seeds), _START_FACTOR.value)
    found: dict[Row, study.Results] = {}
    failed: list[str] = []
    for stage in ([("start", 0.0)], [row for row in rows if row[0] != "start"]):
        tasks = [task for row in stage for task in rows[row]]
        outcomes = runs.train_all([[task] for task in tasks], jobs)
        failed += [f"{task.label}: {one.error}" for task, one in zip(tasks, outcomes, strict=True) if one.error]
        each = iter(outcomes)
        found |= {row: [one.results for one in (next(each) for _ in rows[row]) if one.results] for row in stage}
        if failed:
            break
    lines = [line(row, results, found[row[0], 0.0]) for row, results in found.items() if len(results) == len(rows[row])]
    disk.write_rows(workdir / "foundation.csv", [COLUMNS, *lines])
    print(*(",".join(map(str, one)) for one in [COLUMNS, *lines]), *(f"failed: {one}" for one in failed), sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    command.run(main)
