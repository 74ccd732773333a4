"""Students with and without a teacher: ResNet-8 of width 8, taught by MFM's tested classifier of width 16.

    TFDS_DATA_DIR=... python benchmarks/distillation.py --config=configs/cifar10_lt_small.py \
        --config.train.epochs=15 --workdir=runs/distillation --jobs=2

One teacher and five students a seed (`--seeds`). Started again with the same folder it goes on where it was;
WORKDIR/distillation.csv gets its lines as the runs end. At the end the means are printed, with differences paired by
seed. `--seeds=0 --config.train.epochs=2` makes a trial of it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import study
from absl import flags

from mfm_jax import command, compare
from mfm_jax import config as config_lib
from mfm_jax.machine import disk
from mfm_jax.study import runs, tune

COLUMNS = ("row", "seed", "balanced_accuracy", "head_third", "middle_third", "tail_third", "train_seconds")
TEACHER, WIDTH, STUDENT_WIDTH = "teacher", 16, 8
# The method of each student, whether it has a teacher, and what is set for it.
STUDENTS: dict[str, tuple[str, bool, Mapping[str, Any]]] = {
    "ce": ("ce", False, {}),
    "ce_kd": ("ce", True, {}),
    "tgeo_kd": ("tgeo_kd", True, {"meta.learning_rate": 2e-3}),  # its phi is a network, as Meta-Weight-Net's
    "mfm": ("mfm", False, {}),
    "mfm_kd": ("mfm", True, {}),
}
Done = dict[tuple[str, int], dict[str, Any]]  # the content of `results.json` of each row and seed


def teacher_of(config: Any, workdir: Path, seed: int) -> runs.Task:
    return task(config, workdir, TEACHER, "mfm", seed, {"model.width": WIDTH})


def students_of(config: Any, workdir: Path, seed: int) -> list[runs.Task]:
    """Returns the students of a seed, whose teacher has the same."""
    taught = {"method.teacher": str(teacher_of(config, workdir, seed).workdir)}
    return [
        task(config, workdir, row, method, seed, {"model.width": STUDENT_WIDTH, **values, **(taught if learns else {})})
        for row, (method, learns, values) in STUDENTS.items()
    ]


def task(config: Any, workdir: Path, row: str, method: str, seed: int, values: Mapping[str, Any]) -> runs.Task:
    fields = tune.with_values(compare.run_fields(config, method, seed), values)
    return runs.Task(f"{row}, seed {seed}", config_lib.resolve(fields), workdir / row / f"seed{seed}")


def main(argv: Sequence[str]) -> int:
    del argv
    workdir, config, seeds = command.workdir(), command.config(), compare._seeds(flags.FLAGS.seeds)
    workdir.mkdir(parents=True, exist_ok=True)
    done: Done = {}
    failed: list[str] = []

    def ended(tasks: Sequence[runs.Task], outcomes: Sequence[runs.Outcome]) -> None:
        for one, outcome in zip(tasks, outcomes, strict=True):
            if outcome.results:
                done[one.workdir.parent.name, int(one.workdir.name.removeprefix("seed"))] = outcome.results
        write_csv(done, workdir / "distillation.csv")

    students = [one for seed in seeds for one in students_of(config, workdir, seed)]
    for tasks in ([teacher_of(config, workdir, seed) for seed in seeds], students):
        outcomes = runs.train_all([[one] for one in tasks], flags.FLAGS.jobs, ended=ended)
        ended(tasks, outcomes)  # those that had finished before, too
        failed += [f"failed: {one.label}: {o.error}" for one, o in zip(tasks, outcomes, strict=True) if o.error]
        if failed:  # a student needs its teacher
            break
    print(markdown(done), *failed, sep="\n")
    return 1 if failed else 0


def write_csv(done: Done, path: Path) -> None:
    """Writes a line for each run, accuracies of the last epoch on the test split in percent."""
    lines = []
    for row in (TEACHER, *STUDENTS):
        for (_, seed), results in sorted(pair for pair in done.items() if pair[0][0] == row):
            found = study.summary([results])
            numbers = [f"{found[name]:.2f}" for name in ("mean", *study.THIRDS)]
            lines.append([row, seed, *numbers, f"{results['train_seconds']:.0f}"])
    disk.write_rows(path, [COLUMNS, *lines])


def markdown(done: Done) -> str:
    """Returns the table of means and standard deviations, with the differences to `ce` and `mfm`, paired by seed."""
    by_row = {
        row: [results for (name, _), results in sorted(done.items(), key=lambda pair: pair[0]) if name == row]
        for row in (TEACHER, *STUDENTS)
    }
    lines = ["| row | balanced accuracy | minus `ce` | minus `mfm` | seeds |", "|" + " --- |" * 5]
    for row, found in by_row.items():
        if not found:
            continue
        cells = [f"`{row}`", study.spread(study.summary(found))]
        for name in ("ce", "mfm"):
            paired = name != row and len(by_row[name]) == len(found)
            cells.append(study.difference(found, by_row[name]) if paired else "–")
        lines.append(" | ".join(["", *cells, str(len(found)), ""]).strip())
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
