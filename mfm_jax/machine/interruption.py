"""Stops a program on SIGTERM, Ctrl-C or a notice of pre-emption.

The training loop asks, finishes its step and saves (`listening`); elsewhere nothing needs saving (`terminable`). Either
way the program ends by `Interrupted`, with the status `EXIT_INTERRUPTED`.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from mfm_jax.machine import cluster

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: saved, run the same command again
NOTICE = "MFM_JAX_PREEMPTION_NOTICE"  # environment variable: a file that appears when the machine is to be taken away

_LOOK_SECONDS = 0.5


class Interrupted(Exception):
    """SIGTERM, Ctrl-C or a notice of pre-emption arrived; `saved` says what was saved, where that was needed."""

    def __init__(self, saved: str = ""):
        super().__init__("; ".join(filter(None, ("interrupted", saved, "run the same command to go on"))))


@contextlib.contextmanager
def listening() -> Iterator[Callable[[int], bool]]:
    """Yields `step -> bool`: whether SIGTERM, Ctrl-C or a notice of pre-emption has arrived.

    Outside the main thread a process gets no signals. With several processes, a signal to one stops all at one step.
    """
    received: list[int] = []
    notice = _Notice(os.environ.get(NOTICE, ""))

    def note(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:  # asked twice: do not wait for the save
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda step: notice.arrived()
        return
    if jax.process_count() > 1:
        signal.signal(signal.SIGINT, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
        agreed = cluster.agreed_stop()
        yield lambda step: notice.passed_on() or agreed(step)
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: bool(received) or notice.arrived()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raises `Interrupted` in the body on SIGTERM; training, which saves first, uses `listening` instead."""

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Notice:
    """A file that appears, or is touched, when the machine is to be taken away; one left from before does not count."""

    def __init__(self, path: str):
        self._path, self._before = path, self._written(path)
        self._seen, self._looked = False, time.monotonic()

    def arrived(self) -> bool:
        """Returns whether the file has appeared or changed; looks twice a second."""
        if self._path and not self._seen and time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            self._seen = self._written(self._path) not in (None, self._before)
        return self._seen

    def passed_on(self) -> bool:
        """Passes a notice on to all processes, by the signal that they agree on; returns False."""
        if not self._seen and self.arrived():
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    @staticmethod
    def _written(path: str) -> int | None:
        try:
            return os.stat(path).st_mtime_ns
        except OSError:
            return None
