"""Train and evaluate one run.

    python -m mfm_jax.main --config=configs/cifar10_lt.py --workdir=runs/cifar10
    python -m mfm_jax.main --workdir=runs/cifar10 --mode=eval --split=train
    python -m mfm_jax.main --workdir=runs/cifar10 --mode=eval --eval_folder=pictures

or `mfm-jax train`, `mfm-jax evaluate` (see `cli`). Without `--config`, the config is that of the run in the workdir.

With `--mode=check`, checks the user's own pictures and trains nothing (see `check`); with `--mode=eval`,
evaluates a run, or where there is none `model.pretrained` without training (see `inference.evaluate`).

Any field is set with `--config.group.field=value`. Exit status: 0 done; 1 evaluated, but some pictures of the folder
cannot be read; 2 a mistake in the command, the config or the data, in one line; 75 saved on SIGTERM, Ctrl-C or a
notice of pre-emption (the same command goes on).
"""

if __name__ == "__main__":  # before the other imports start threads; being imported changes no process
    from mfm_jax.machine import allocator

    allocator.keep_freed_memory()

from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags
from rich.console import Console
from rich.table import Table

from mfm_jax import check, command
from mfm_jax.data import walk
from mfm_jax.errors import UserError
from mfm_jax.machine import cluster
from mfm_jax.machine.disk import expanded
from mfm_jax.machine.trace import Trace
from mfm_jax.workdir.files import Workdir
from mfm_jax.workdir.finished import SPLITS, shown

_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "check", "eval"],
    "What to do; check: look at the pictures, train nothing; eval: evaluate a trained run, or model.pretrained.",
)

_INIT_FROM = flags.DEFINE_string(
    "init_modulator_from", "", "Workdir of a run whose modulator to start from (sets modulation.init_from)."
)


_SPLIT = flags.DEFINE_enum(
    "split",
    None,
    ["test", "val", "train"],
    "With --mode=eval: which split of its data; by default test, and val where eval.test = False.",
)
_EVAL_FOLDER = flags.DEFINE_string(
    "eval_folder", "", "With --mode=eval: a folder with a folder of pictures for each class, in the place of a split."
)
_OUT = flags.DEFINE_string("out", "", "With --mode=eval: the folder to write to, below WORKDIR/eval by default.")
_PROFILE = flags.DEFINE_string("profile", "", "With --mode=train: the folder for a jax.profiler trace of ten steps.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, where this is one of several processes; auto: ask the scheduler."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are; with --coordinator=HOST:PORT.")
_PROCESS = flags.DEFINE_integer("process", None, "The number of this process, from 0; with --coordinator=HOST:PORT.")


def main(argv: Sequence[str]) -> int:
    del argv
    for flag in (_SPLIT, _EVAL_FOLDER, _OUT):
        if flag.present and _MODE.value != "eval":
            raise UserError(f"--{flag.name}={flag.value}: only with --mode=eval")
    if _PROFILE.present and _MODE.value != "train":
        raise UserError(f"--profile={_PROFILE.value}: only with --mode=train")
    if _SPLIT.present and _EVAL_FOLDER.value:
        raise UserError(f"--split={_SPLIT.value}: --eval_folder takes the place of a split; leave one of them out")
    if _MODE.value == "check":
        return check.check(command.config(), command.workdir(), command.to_train())
    if _MODE.value == "eval" and _COORDINATOR.value:
        raise UserError(f"--coordinator={_COORDINATOR.value}: --mode=eval is one process; leave it out")
    from mfm_jax.methods.table import METHODS, modulating
    from mfm_jax.training import train  # here: seconds that a check does not pay

    cluster.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    config = command.config()
    if _INIT_FROM.value:
        config.modulation.init_from = _INIT_FROM.value
        if not METHODS[config.method.name].modulates:
            raise UserError(
                f"--init_modulator_from={_INIT_FROM.value}: {config.method.name} has no modulator; {modulating()} has"
            )
    if _MODE.value == "eval":
        return _evaluate(config)
    trace = Trace(expanded(_PROFILE.value) if _PROFILE.value else None)
    results = train.train_and_evaluate(config, command.workdir(), trace=trace)
    if cluster.is_primary():
        print_results(results)
        print(f"report: {Workdir(command.workdir()).report}")
        if _PROFILE.value:
            print(f"profile: {_PROFILE.value if trace.written else 'none; fewer than 21 steps were left'}")
    return 0


def _evaluate(config: ml_collections.ConfigDict) -> int:
    from mfm_jax.inference import evaluate as evaluation

    folder, out = (expanded(flag.value) if flag.value else None for flag in (_EVAL_FOLDER, _OUT))
    results, page = evaluation.evaluate_run(config, command.workdir(), _SPLIT.value, folder, out)
    print_results(results)
    for path, problem in results["unread"].items():
        print(f"could not be read: {check.printable(path)}: {problem}")
    if results["passed_over"]:
        print(walk.in_words(results["passed_over"]))
    print(f"report: {page}")
    return 1 if results["unread"] else 0


def print_results(results: dict[str, Any]) -> None:
    """Prints the accuracies of the last epoch and of the best on validation, in percent."""
    last = "as read" if results.get("pretrained") else "last epoch"
    table = Table(f"{SPLITS[results['split']]}, %", last, "best on validation")
    for name in ("balanced_accuracy", "accuracy", "many", "medium", "few", "rarest_third", "macro_f1"):
        cells = [results[which] and shown(results, which)[name] for which in ("last", "best")]
        table.add_row(name, *("–" if cell is None else f"{100 * cell:.2f}" for cell in cells))
    Console().print(table)
    if measured := results["last"].get("decisions", {}).get("measured", {}).get(results["split"]):
        costs = (f"{measured[name]['mean_cost']:.4g}" for name in ("decided", "likeliest"))
        print("mean cost of an image, as decided and of the likeliest class:", *costs)
        for row in measured["recalls"]:
            print(f"recall of class {row['of']}: {100 * row['reached']:.2f} %, wanted {100 * row['wanted']:g} %")


if __name__ == "__main__":
    command.run(main)
