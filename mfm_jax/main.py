"""Train and evaluate one run.

    python -m mfm_jax.main --config=configs/cifar10_lt.py --workdir=runs/cifar10

With `--mode=check`, looks at the user's own pictures instead and says what was found (see `check`).

Any field is set with `--config.group.field=value`. Exit status: 0 done; 2 a mistake in the command, the config or the
data, told in one line; 75 saved on SIGTERM, Ctrl-C or a notice of pre-emption (the same command goes on).
"""

from collections.abc import Sequence
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

from mfm_jax import check, cluster, command
from mfm_jax.report import SPLITS

_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "check"], "What to do; check: look at the pictures, train nothing."
)

_INIT_FROM = flags.DEFINE_string(
    "init_modulator_from", "", "Workdir of a run whose modulator to start from (sets modulation.init_from)."
)


_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, where this is one of several processes; auto: ask the scheduler."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are; with --coordinator=HOST:PORT.")
_PROCESS = flags.DEFINE_integer("process", None, "The number of this process, from 0; with --coordinator=HOST:PORT.")


def main(argv: Sequence[str]) -> int:
    del argv
    if _MODE.value == "check":
        return check.check(command.config(), command.workdir())
    from mfm_jax import train  # here: seconds that a check does not pay

    cluster.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    config = command.config()
    if _INIT_FROM.value:
        config.modulation.init_from = _INIT_FROM.value
    results = train.train_and_evaluate(config, command.workdir())
    if cluster.is_primary():
        print_results(results)
        print(f"report: {command.workdir()}/report.html")
    return 0


def print_results(results: dict[str, Any]) -> None:
    """Prints the accuracies of the last epoch and of the best on validation, in percent."""
    split = results["split"]
    table = Table(f"{SPLITS[split]}, %", "last epoch", "best on validation")
    for name in ("balanced_accuracy", "accuracy", "many", "medium", "few", "rarest_third", "macro_f1"):
        cells = [results[which] and results[which][split][name] for which in ("last", "best")]
        table.add_row(name, *("–" if cell is None else f"{100 * cell:.2f}" for cell in cells))
    Console().print(table)


if __name__ == "__main__":
    command.run(main)
