"""What a run shows while it trains: its data in a line, what has changed since it was stopped, and a bar."""

import contextlib
import contextvars
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from rich import progress
from rich.console import Console

from mfm_jax.config import Config
from mfm_jax.data import LongTailData
from mfm_jax.data.manifest import factor_in_words, noise_in_words
from mfm_jax.data.streaming import Streamed
from mfm_jax.machine import cluster
from mfm_jax.training.pace import Pace

_LOOK_SECONDS = 0.5
_LOOK_CALLS = 20
_TICK_SECONDS = 0.25
_LINE_SECONDS = 30  # a log has a line as often, whatever happens
_AHEAD, _AHEAD_SECONDS = 2, 0.25  # calls, and seconds of them, that may wait for the device; a stop waits for them, too
_LONG_SECONDS, _MEASURED_STEPS = 2 * 3600, 10  # a run that takes so long says so, once so many steps were measured
_COMPILE_EVENTS = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")
_PROGRAMS = {"plain": "the plain step", "meta": "the meta-step", "retrain": "the second stage"}

_QUIET = contextvars.ContextVar("quiet", default=False)

Mark = tuple[jax.Array, jax.Array, jax.Array]  # of `loop.glance`


class TrainingBar:
    """What is seen of runs while they train: a bar in a terminal, lines in a log; process 0 alone shows it.

    A thread follows the marks of the calls, small arrays that are ready when the device has finished a call. So what
    is shown is what is done, and nothing waits for it.
    """

    def __init__(self, name: str, pace: Pace, step: int, total: int, epochs: int):
        """Takes the method's name, the steps done before, all steps, and the epochs that are left."""
        self.doing = "starting"
        self._name, self._pace, self._step, self._total, self._epochs = name, pace, step, total, epochs
        self._marks: deque[tuple[int, Mark]] = deque()  # of calls under way, with the step that each ends at
        self._seen: Mark | None = None
        self._programs: set[str] = set()
        self._warned, self._compiled = False, 0.0
        self._lock, self._closed, self._told = threading.RLock(), threading.Event(), time.perf_counter()
        console = Console()
        self._in_terminal = _shows() and console.is_terminal
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[loss]}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[left]}"),
            console=console,
            refresh_per_second=1 / _TICK_SECONDS,
            disable=not self._in_terminal,
        )
        self._task = self._bar.add_task(name, total=total, completed=step, loss="", left="")
        # In a copy of this context, so that what is quiet here is quiet there.
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=[self._watch], daemon=True)

    def __enter__(self) -> "TrainingBar":
        jax.monitoring.register_event_duration_secs_listener(self._note_compilation)
        self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()
        self._bar.stop()
        jax.monitoring.unregister_event_duration_listener(self._note_compilation)

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._told = time.perf_counter()
        say(text)

    def start_steps(self) -> float:
        """The steps of an epoch begin; returns the time."""
        self._calls, self._looked, self.doing = 0, time.perf_counter(), "training"
        with self._lock:
            self._pace.start(self._looked)
        return self._looked

    def end_steps(self) -> None:
        """The steps of an epoch are done, and its end begins."""
        self._collect()
        with self._lock:
            self._compiled = 0.0
            self._pace.stop(time.perf_counter())

    def end_epoch(self, text: str) -> None:
        """The end of an epoch is over; prints its line, with the time left."""
        with self._lock:
            self._pace.stopped(time.perf_counter(), self._compiled)
        self.say(text + self.left())

    @contextlib.contextmanager
    def compiling(self, kind: str) -> Iterator[None]:
        """Encloses a call of the compiled steps; says so where it is the first of its kind, which is compiled."""
        if kind in self._programs:
            yield
            return
        self._wait(0)  # what is under way while the cores compile is no measure
        self._programs.add(kind)
        self.say(f"compiling {_PROGRAMS[kind]} (usually half a minute, less where it was compiled before)")
        self.doing = "compiling"
        yield
        self.doing = "training"
        with self._lock:
            self._pace.start(time.perf_counter())

    def sent(self, step: int, mark: Mark) -> Mark | None:
        """Notes a call that ends at `step`, and waits while too many are under way; returns a mark to check, if due.

        By the clock that is a finished one, at no cost; where processes must agree, that of every so many calls.
        """
        with self._lock:
            self._marks.append((step, mark))
            self._pace.sent(step)
        if not self._pace.measured or self._pace.under_way > _AHEAD_SECONDS:
            self._wait(_AHEAD)
        self._calls += 1
        if jax.process_count() > 1:
            return mark if self._calls % _LOOK_CALLS == 0 else None
        if self._seen is None or time.perf_counter() - self._looked < _LOOK_SECONDS:
            return None
        self._looked = time.perf_counter()
        return self._seen

    def left(self) -> str:
        """Returns how much longer training takes, as `, left 2 min 5 s`; nothing while it is not known, or over."""
        with self._lock:
            seconds = self._pace.left(time.perf_counter()) if self._step < self._total else None
        return "" if seconds is None else f", left {duration(seconds)}"

    def _wait(self, most: int) -> None:
        """Waits until at most so many calls are under way."""
        while marks := list(self._marks):
            if len(marks) <= most:
                break
            jax.block_until_ready(marks[0][1])
            self._collect()

    def _collect(self) -> None:
        """Takes note of the calls that are done."""
        with self._lock:
            before = self._step
            while self._marks and all(map(_is_ready, self._marks[0][1])):
                self._step, self._seen = self._marks.popleft()
            if self._step > before:
                self._pace.done(self._step, time.perf_counter())

    def _watch(self) -> None:
        while not self._closed.wait(_TICK_SECONDS):
            self._collect()
            if _shows():
                self._show()

    def _show(self) -> None:
        loss, left = "", self.left()
        if self._seen is not None:
            _, total, steps = jax.device_get(self._seen)
            loss = f"loss {total.sum() / max(steps.sum(), 1):.3f}"
        doing = f"{self._name}: {self.doing}"
        self._bar.update(self._task, completed=self._step, description=doing, loss=loss, left=left.removeprefix(", "))
        if not self._in_terminal and time.perf_counter() - self._told > _LINE_SECONDS:
            self.say(f"step {self._step}/{self._total}, {self.doing}{loss and ', '}{loss}{left}")
        if not self._warned and self._pace.measured >= _MEASURED_STEPS:
            self._warned = True
            self._warn_if_long()

    def _warn_if_long(self) -> None:
        """Says so where the run takes hours: here, not before the start, for here it is measured."""
        with self._lock:
            seconds = self._pace.left(time.perf_counter()) or 0.0
        if seconds > _LONG_SECONDS:
            self.say(
                f"at this rate {self._epochs} epochs take about {duration(seconds)} on this machine; Ctrl-C saves and"
                " ends; a run of minutes is configs/cifar10_lt_small.py, or lower train.epochs, model.width or"
                " data.image_size"
            )

    def _note_compilation(self, event: str, duration_secs: float, **facts: str | int) -> None:
        if event in _COMPILE_EVENTS:
            self._compiled += duration_secs


def track(parts: Iterable[Any], text: str, total: int) -> Iterable[Any]:
    """Returns `parts`; a terminal shows how many have been taken."""
    console = Console()
    hidden = not (_shows() and console.is_terminal)
    return progress.track(parts, text, total, console=console, disable=hidden, transient=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps this thread from showing anything meanwhile; warnings go to the standard error all the same."""
    token = _QUIET.set(True)
    try:
        yield
    finally:
        _QUIET.reset(token)


def _shows() -> bool:
    return cluster.is_primary() and not _QUIET.get()


def _is_ready(array: jax.Array) -> bool:
    return array.is_ready()  # type: ignore[attr-defined]  # of every array that is no tracer


def say(text: str) -> None:
    """Prints a line at once, to a log too; process 0 alone does, where nothing keeps it `quiet`."""
    if _shows():
        with contextlib.suppress(OSError):  # a full disk, or nobody who reads: training goes on
            line = text.encode(errors="backslashreplace").decode()  # a name need not be UTF-8
            print(f"{line}\n", end="", flush=True)  # one write, unbuffered too: no other line cuts it


def duration(seconds: float) -> str:
    """Returns a time in words, in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def summary(config: Config, data: LongTailData) -> str:
    """Returns one line on the data: which set, which protocol, how many images, where they are."""
    counts, parts = data.counts, [len(x) for x in (data.train_labels, data.val_labels, data.test_labels)]
    where = "streamed" if isinstance(data.train_images, Streamed) else "resident"
    factor = factor_in_words(data.manifest)
    if config.data.protocol == "natural" and config.data.imbalance_factor > 1:
        factor += " (1 takes all images)"
    duplicates = data.manifest.get("duplicates_in_test", {})
    doubles = "".join(f" {n} test images with a duplicate outside ({kind});" for kind, n in duplicates.items())
    wrong = f" {noise};" if (noise := noise_in_words(data.manifest)) else ""
    return (
        f"{data.name} {data.version}, protocol {config.data.protocol}, imbalance factor {factor}:"
        f" {parts[0]} training images ({counts.max()}..{counts.min()} a class),"
        f" {min(data.manifest['splits']['meta']['class_counts'])} meta a class, {parts[1]} validation, {parts[2]} test;"
        f" {'x'.join(map(str, data.train_images.shape[1:]))}, {where};{doubles}{wrong}"
        f" manifest {data.manifest['hash'].removeprefix('sha256:')[:12]}"
    )


def say_change(step: int, how: str, now: str, before: str, same: str = "") -> None:
    """Says so where a run goes on in a way that rounds sums differently."""
    if before != now:
        say(f"goes on from step {step} {how} {now}, before: {before};{same} sums are rounded differently")
