"""Trains runs one after the other, or side by side in processes of their own, and lets none stop the others.

Side by side, each process has its share of this machine's cores to itself, its own log file, and on an accelerator
takes memory as it needs it. A run that fails is an outcome with its reason. SIGTERM or Ctrl-C stops them all, each
saved, and the same command goes on.

    python -m mfm_jax.runs CONFIG.json WORKDIR CORES

is the process of one run: cores as `0,1`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.live import Live
from rich.table import Table

from mfm_jax import command, train
from mfm_jax.config import Config
from mfm_jax.train import EXIT_INTERRUPTED, Interrupted

_POLL_SECONDS = 0.5


class Run(NamedTuple):
    """What to train, where, and what to call it."""

    label: str
    config: Config
    workdir: Path


class Outcome(NamedTuple):
    """The content of `results.json`, or the reason why there is none."""

    results: dict[str, Any] | None
    error: str = ""


class AllInterrupted(Interrupted):
    """SIGTERM or Ctrl-C arrived while runs were trained side by side; each was saved."""

    def __init__(self) -> None:
        Exception.__init__(self, "interrupted; every run is saved; run the same command to go on")


@dataclass
class _Place:
    """A run on its way: waiting without a process, then running, then with an outcome."""

    run: Run
    cores: Sequence[int] = ()
    process: subprocess.Popen | None = None
    outcome: Outcome | None = None
    began: float = field(default_factory=time.monotonic)


def train_all(runs: Sequence[Run], jobs: int = 1) -> list[Outcome]:
    """Trains every run and returns their outcomes in the same order.

    Args:
      runs: with workdirs of their own.
      jobs: how many at a time; 1 trains in this process.

    Raises:
      Interrupted: SIGTERM or Ctrl-C; what has begun is saved.
    """
    return [_train_here(run) for run in runs] if jobs == 1 else _train_beside(runs, jobs)


def train_together(runs: Sequence[Run]) -> None:
    """Trains runs that differ in their seed alone in one program; if that fails, they are left to `train_all`.

    Raises:
      Interrupted: SIGTERM or Ctrl-C; what has begun is saved.
    """
    try:
        label = f"{len(runs)} runs from {runs[0].label}" if runs else ""
        train.train_together([run.config for run in runs], [run.workdir for run in runs], label=label)
    except Interrupted:
        raise
    except Exception as error:  # whatever it is, the runs may go on one by one
        print(f"{label}: not together: {_one_line(error)}", file=sys.stderr)


def _train_here(run: Run) -> Outcome:
    try:
        return Outcome(train.train_and_evaluate(run.config, run.workdir, label=run.label))
    except Interrupted:
        raise
    except Exception as error:  # whatever it is, the other runs go on
        print(f"{run.label} failed: {error}", file=sys.stderr)
        return Outcome(None, _one_line(error))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def _train_beside(runs: Sequence[Run], jobs: int) -> list[Outcome]:
    places, free = [_Place(run) for run in runs], _shares_of_cores(jobs)
    with _stopping(places) as stopped, Live(_table(places), refresh_per_second=2) as live:
        while any(place.outcome is None for place in places):
            for place in places:
                if place.process and place.outcome is None and place.process.poll() is not None:
                    place.outcome = _finished(place)
                    free.append(place.cores)
                if place.process is None and place.outcome is None and stopped():
                    place.outcome = Outcome(None, "not started")
                elif place.process is None and free and not stopped():
                    _start(place, free.pop(0))
            live.update(_table(places))
            time.sleep(_POLL_SECONDS)
    if stopped():
        raise AllInterrupted
    return [place.outcome for place in places if place.outcome]


def _shares_of_cores(jobs: int) -> list[Sequence[int]]:
    """Returns this process's cores in `jobs` shares; cores are shared where there are fewer of them."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < jobs:
        return [cores[i % len(cores) :][:1] if cores else [] for i in range(jobs)]
    return [cores[i * len(cores) // jobs : (i + 1) * len(cores) // jobs] for i in range(jobs)]


def _start(place: _Place, cores: Sequence[int]) -> None:
    folder = place.run.workdir
    folder.parent.mkdir(parents=True, exist_ok=True)
    wanted = folder.with_suffix(".json")
    wanted.write_text(json.dumps(place.run.config.to_dict()))
    arguments = [sys.executable, "-m", "mfm_jax.runs", str(wanted), str(folder), ",".join(map(str, cores))]
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    with folder.with_suffix(".log").open("w") as log:
        # A session of its own: Ctrl-C reaches it through this process alone, once.
        place.process = subprocess.Popen(
            arguments, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    place.cores, place.began = cores, time.monotonic()


def _finished(place: _Place) -> Outcome:
    assert place.process is not None
    path = place.run.workdir / "results.json"
    if place.process.returncode == 0 and path.exists():
        return Outcome(json.loads(path.read_text()))
    if place.process.returncode == EXIT_INTERRUPTED:
        return Outcome(None, "interrupted")
    log = place.run.workdir.with_suffix(".log")
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1].removeprefix("error: ") if lines else "no output"
    status = place.process.returncode
    killed = f"killed by signal {-status}; " if status < 0 else ""
    return Outcome(None, f"{killed}{last} ({log})")


@contextlib.contextmanager
def _stopping(places: list[_Place]) -> Iterator[Any]:
    """Passes SIGTERM and Ctrl-C on to the processes that run; yields whether one has arrived."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        for place in places:
            if place.process and place.process.poll() is None:
                place.process.terminate()

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _table(places: Sequence[_Place]) -> Table:
    table = Table("run", "state", "epoch", "balanced on validation")
    for place in places:
        epoch, score = _progress(place.run)
        table.add_row(place.run.label, _state(place), f"{epoch}/{place.run.config.train.epochs}", score)
    return table


def _state(place: _Place) -> str:
    if place.outcome:
        return "done" if place.outcome.results else f"failed: {place.outcome.error}"
    return f"running, {time.monotonic() - place.began:.0f} s" if place.process else "waiting"


def _progress(run: Run) -> tuple[int, str]:
    """Returns how many epochs a run has logged, and its last balanced accuracy on validation in percent."""
    path = run.workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # what follows the last newline is on its way
    rows = [json.loads(line) for line in lines[-4:]]
    scores = [row["balanced_accuracy"] for row in rows if row["kind"] == "val"]
    return (rows[-1]["epoch"] + 1 if rows else 0), (f"{100 * scores[-1]:.1f}" if scores else "–")


def peak_memory(workdir: Path) -> int | None:
    """Returns the peak memory in bytes of a run that had a process of its own; None of one that had not."""
    path = workdir / "peak_memory.json"
    return json.loads(path.read_text())["bytes"] if path.exists() else None


def _measure() -> dict[str, Any]:
    """Returns the peak memory of the accelerator, or of the process where there is none."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return {"bytes": stats["peak_bytes_in_use"], "of": "accelerator"}
    import resource  # absent on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "of": "process"}


def main(argv: Sequence[str]) -> int:
    """Trains one run in this process."""
    wanted, workdir, cores = argv
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [int(core) for core in cores.split(",")])  # before JAX counts them
    fresh = not (Path(workdir) / "checkpoints").exists()
    train.train_and_evaluate(json.loads(Path(wanted).read_text()), workdir)
    if fresh:  # a run in two halves has no one peak
        (Path(workdir) / "peak_memory.json").write_text(json.dumps(_measure()))
    return 0


if __name__ == "__main__":
    sys.exit(command.guarded(main, sys.argv[1:]))
