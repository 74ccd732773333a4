"""Trains runs in processes of their own, several side by side, and lets none stop the others.

Each process has cores of this machine to itself and its own log file, and on an accelerator takes memory as it needs
it; this one only watches. A run that fails becomes an outcome with its reason. All stop on SIGTERM, on Ctrl-C, when the
time is over, and when one was interrupted, by a notice of pre-emption say: each saves, and the same command goes on.
Each process adds a line on its time and memory to `processes.jsonl` of its run.

    python -m mfm_jax.study.runs CORES WORKDIR...

is one such process, on cores such as `0,1`. It reads the config of the run in `DIR/seed0` from `DIR/seed0.json`, and
trains several runs in one program.
"""

if __name__ == "__main__":  # before the other imports start threads; being imported changes no process
    from mfm_jax.machine import allocator

    allocator.keep_freed_memory()

import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.live import Live
from rich.table import Table

from mfm_jax import command
from mfm_jax import config as config_lib
from mfm_jax.config import Config
from mfm_jax.errors import UserError
from mfm_jax.machine import disk
from mfm_jax.machine.interruption import EXIT_INTERRUPTED, Interrupted
from mfm_jax.training import train
from mfm_jax.workdir.files import Workdir, read_object

_POLL_SECONDS = 0.5
_LINE_SECONDS = 30  # a log has a line as often
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"  # programs read from the cache included


class Task(NamedTuple):
    """What to train, where, and what to call it."""

    label: str
    config: Config
    workdir: Path


class Outcome(NamedTuple):
    """The content of `results.json`, or the reason why there is none."""

    results: dict[str, Any] | None
    error: str = ""


@dataclass
class _Job:
    """The runs of one process on their way: waiting, then with a process, then with an outcome for each."""

    runs: Sequence[Task]
    cores: Sequence[int] = ()
    process: subprocess.Popen[bytes] | None = None
    outcomes: list[Outcome] | None = None
    began: float = 0.0
    epoch: int = 0  # how many are trained, those before this process included
    epochs_before: int = 0
    score: str = ""  # the last balanced accuracy on validation, percent

    @property
    def label(self) -> str:
        return self.runs[0].label + (f" and {len(self.runs) - 1} more" if len(self.runs) > 1 else "")

    @property
    def epochs(self) -> int:
        return self.runs[0].config.train.epochs

    @property
    def workdir(self) -> Workdir:
        return Workdir(self.runs[0].workdir)

    @property
    def log(self) -> Path:
        return self.runs[0].workdir.with_suffix(".log")

    @property
    def running(self) -> bool:
        return self.process is not None and self.outcomes is None

    def minutes_left(self) -> str:
        """Returns the minutes to its end at the pace of the epochs that its process has trained."""
        new = self.epoch - self.epochs_before
        seconds = time.monotonic() - self.began
        return f"{seconds / new * (self.epochs - self.epoch) / 60:.1f}" if new else "starting"

    def look(self) -> int | None:
        """Reads how far the first run is, and returns the exit status if the process has ended."""
        status = self.process.poll() if self.process else None
        self.epoch, score = self.workdir.progress()
        self.score = "" if score is None else f"{100 * score:.1f}"
        return status


def train_all(
    groups: Sequence[Sequence[Task]],
    jobs: int = 1,
    *,
    seconds: float = math.inf,
    patience: float = math.inf,
    ended: Callable[[Sequence[Task], Sequence[Outcome]], None] = lambda runs, outcomes: None,
) -> list[Outcome]:
    """Trains every run and returns their outcomes in the same order, those of a group next to each other.

    A run that has finished before is not started again.

    Args:
      groups: what each process trains; several runs, that differ in their seed alone, are one program
        (`train.train_together`). Every run has a workdir of its own.
      jobs: processes at a time.
      seconds: after so many all are stopped, as by SIGTERM.
      patience: a process that has not saved so many seconds later is killed; its last checkpoint stays.
      ended: called with the runs of each process that has ended by itself, and their outcomes.

    Raises:
      Interrupted: SIGTERM, Ctrl-C, or the time is over; what has begun is saved.
    """
    planned, free, began = [_planned(runs) for runs in groups], _shares_of_cores(jobs), time.monotonic()
    printed = began - _LINE_SECONDS
    with _stopping(planned) as (stopped, stop), Live(refresh_per_second=2, transient=True) as live:
        while any(job.outcomes is None for job in planned):
            late = time.monotonic() - began - seconds
            if late >= 0 and not stopped():
                stop()
            for job in planned:
                if job.running and job.process and late > patience:
                    job.process.kill()
                if job.running and (status := job.look()) is not None:
                    job.outcomes = _finished(job, status)
                    if status == EXIT_INTERRUPTED:
                        stop()
                    free.append(job.cores)
                    if not stopped():
                        ended(job.runs, job.outcomes)
                    with contextlib.suppress(OSError, SystemExit):  # a log that cannot be written stops no run
                        live.console.print(f"{_told(job)}; {_overall(planned, began)}", markup=False)
                if job.process is None and job.outcomes is None and stopped():
                    job.outcomes = [Outcome(None, "not started")] * len(job.runs)
                elif job.process is None and job.outcomes is None and free:
                    _start(job, free.pop(0))
            live.update(_table(planned, began))
            if not live.console.is_terminal and time.monotonic() - printed >= _LINE_SECONDS:
                with contextlib.suppress(OSError):
                    print(_line(planned, began), flush=True)
                printed = time.monotonic()
            time.sleep(_POLL_SECONDS)
    if stopped():
        raise Interrupted("every run is saved")
    return [outcome for job in planned for outcome in job.outcomes or ()]


def _planned(runs: Sequence[Task]) -> _Job:
    """Returns the job, with its outcomes if all of its runs have finished before, or one cannot begin."""
    try:
        for run in runs:
            Workdir(run.workdir).claim(run.config)
        places = [(Workdir(run.workdir), run.config) for run in runs]
        done = all(place.is_finished(config) and place.report.exists() for place, config in places)
        return _Job(runs, outcomes=[_read(run) for run in runs] if done else None)
    except UserError as error:
        return _Job(runs, outcomes=[Outcome(None, str(error))] * len(runs))


def _read(run: Task) -> Outcome:
    return Outcome(read_object(Workdir(run.workdir).results))


def _shares_of_cores(jobs: int) -> list[Sequence[int]]:
    """Returns this process's cores in `jobs` shares; cores are shared where there are fewer of them."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < jobs:
        return [cores[i % len(cores) :][:1] if cores else [] for i in range(jobs)]
    return [cores[i * len(cores) // jobs : (i + 1) * len(cores) // jobs] for i in range(jobs)]


def _start(job: _Job, cores: Sequence[int]) -> None:
    for run in job.runs:
        disk.write_object(run.workdir.with_suffix(".json"), run.config.to_dict(), indent=None)
    folders = [str(run.workdir) for run in job.runs]
    arguments = [sys.executable, "-m", "mfm_jax.study.runs", ",".join(map(str, cores)), *folders]
    # Several share a device's memory, unless the user has divided it.
    shared = {} if "XLA_PYTHON_CLIENT_MEM_FRACTION" in os.environ else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    job.cores, job.began, job.epochs_before = cores, time.monotonic(), job.workdir.progress()[0]
    job.epoch = job.epochs_before
    with job.log.open("w") as log:
        # A session of its own: Ctrl-C reaches it through this process alone, once.
        job.process = subprocess.Popen(
            arguments, env=shared | os.environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _finished(job: _Job, status: int) -> list[Outcome]:
    if status == 0:
        return [_read(run) for run in job.runs]
    if status == EXIT_INTERRUPTED:
        return [Outcome(None, "interrupted")] * len(job.runs)
    lines = [line for line in job.log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]  # a list may follow
    last = (errors or lines or ["no output"])[-1]
    killed = f"killed by signal {-status}; " if status < 0 else ""
    return [Outcome(None, f"{killed}{last} ({job.log})")] * len(job.runs)


@contextlib.contextmanager
def _stopping(jobs: list[_Job]) -> Iterator[Any]:
    """Passes SIGTERM, Ctrl-C and the terminal's end on to the processes; yields whether one came, and the handler."""
    received: list[int] = []

    def note(number: int = signal.SIGTERM, frame: Any = None) -> None:
        received.append(number)
        for job in jobs:
            if job.process and job.process.poll() is None:
                job.process.terminate()

    ends = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        ends.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in ends}
    try:
        yield lambda: bool(received), note
    except BaseException:
        note()  # or they would go on unseen
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _told(job: _Job) -> str:
    """Returns one line on a process that has ended."""
    assert job.outcomes
    error = job.outcomes[0].error
    return f"{job.label}: " + (f"failed: {error}" if error else f"done in {time.monotonic() - job.began:.0f} s")


def _table(jobs: Sequence[_Job], began: float) -> Table:
    """Returns a row for each process that runs now, and a caption on when all will be done."""
    score = ["balanced on validation"] * any(job.runs[0].config.data.validates for job in jobs if job.running)
    table = Table("run", "epoch", *score, "minutes", "left", caption_justify="left")
    for job in jobs:
        if job.running:
            minutes, rest = f"{(time.monotonic() - job.began) / 60:.1f}", job.minutes_left()
            table.add_row(job.label, f"{job.epoch}/{job.epochs}", *[job.score] * len(score), minutes, rest)
    table.caption = _overall(jobs, began)
    return table


def _line(jobs: Sequence[_Job], began: float) -> str:
    """Returns the table as a line, for a log."""
    running = [f"{job.label}: epoch {job.epoch}/{job.epochs}, log {job.log}" for job in jobs if job.running]
    return "; ".join([*running, _overall(jobs, began)])


def _overall(jobs: Sequence[_Job], began: float) -> str:
    """Returns how many are done, and when all will be at the pace of the epochs so far."""
    done = sum(job.outcomes is not None for job in jobs)
    trained = sum(job.epoch - job.epochs_before for job in jobs)
    left = sum(job.epochs - job.epoch for job in jobs if job.outcomes is None)
    pace = (time.monotonic() - began) / trained if trained else None
    text = f"{done} of {len(jobs)} done"
    return f"{text}, about {max(pace * left / 60, 1):.0f} min left" if pace and left else text


def _measure() -> dict[str, Any]:
    """Returns the peak memory of the accelerator, or of the process where there is none."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return {"bytes": stats["peak_bytes_in_use"], "of": "accelerator"}
    import resource  # absent on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "of": "process"}


@contextlib.contextmanager
def _accounted(workdirs: Sequence[Path]) -> Iterator[None]:
    """Adds a line on this process to `Workdir.processes` of each run, when the body ends or is interrupted.

    `seconds`: of the process, from here; `compile_seconds`: XLA's; `step_seconds`: of a step, the median over the
    epochs but the first, in which programs are compiled (None without others); `bytes`: peak memory, and `of` what;
    `device`: its kind.
    """
    compiling: list[float] = []
    epochs: list[float] = []

    def note(event: str, duration_secs: float, **facts: str | int) -> None:
        if event == _COMPILE_EVENT:
            compiling.append(duration_secs)
        elif event == train.EPOCH_EVENT and (steps := int(facts["steps"])):
            epochs.append(duration_secs / steps)

    def write() -> None:
        line = {
            "seconds": time.monotonic() - began,
            "compile_seconds": sum(compiling),
            "step_seconds": statistics.median(epochs[1:]) if epochs[1:] else None,
            **_measure(),
            "device": jax.devices()[0].device_kind,
        }
        for workdir in workdirs:
            with Workdir(workdir).processes.open("a") as file:
                file.write(json.dumps(line) + "\n")

    began = time.monotonic()
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield
    except Interrupted:
        write()
        raise
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    write()


def main(argv: Sequence[str]) -> int:
    """Trains the runs of one process."""
    cores, *folders = argv
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [int(core) for core in cores.split(",")])  # before JAX counts them
    workdirs = [Path(folder) for folder in folders]
    configs = [config_lib.resolve(read_object(workdir.with_suffix(".json"))) for workdir in workdirs]
    fresh = not Workdir(workdirs[0]).checkpoints.exists()
    with _accounted(workdirs):
        train.train_together(configs, workdirs)
    if fresh and len(workdirs) == 1:  # neither a run in two halves nor one of several has a peak of its own
        disk.write_object(Workdir(workdirs[0]).peak_memory, _measure(), indent=None)
    return 0


if __name__ == "__main__":
    sys.exit(command.guarded(main, sys.argv[1:]))
