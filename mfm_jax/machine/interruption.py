"""Stops a program on SIGTERM, Ctrl-C or a notice of pre-emption.

The training loop asks, finishes its step and saves (`listening`); elsewhere nothing needs saving (`terminable`). Either
way the program ends by `Interrupted`, with the status `EXIT_INTERRUPTED`.

Python runs a handler between two of its instructions, and one of them may compile for half a minute. The answer to a
signal comes from a thread.
"""

import contextlib
import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from mfm_jax.machine import cluster

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: saved, run the same command again
NOTICE = "MFM_JAX_PREEMPTION_NOTICE"  # environment variable: a file that appears when the machine is to be taken away

_LOOK_SECONDS = 0.5
_GRACE_SECONDS = 3.0  # after a second Ctrl-C, for the main thread to end by itself
_STOPPING = "stopping after this step"
_SHOW_CURSOR = b"\x1b[?25h"


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
        yield functools.partial(_agreed, cluster.agreed_stop(), notice, [])
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with _answering():
            yield lambda step: bool(received) or notice.arrived()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Answers SIGTERM and Ctrl-C as they come; a second Ctrl-C ends the program, if it does not end by itself."""
    ours, pythons = socket.socketpair()
    pythons.setblocking(False)
    before = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
    ended = threading.Event()
    thread = threading.Thread(target=_answer, args=[ours, ended], daemon=True)
    thread.start()
    hook = sys.unraisablehook

    def report(lost: Any) -> None:
        # A second Ctrl-C in a callback of the garbage collector is raised nowhere; `_answer` ends the program.
        if lost.exc_type is not KeyboardInterrupt:
            hook(lost)

    sys.unraisablehook = report
    try:
        yield
    finally:
        sys.unraisablehook = hook
        ended.set()
        signal.set_wakeup_fd(before)
        pythons.close()
        thread.join()
        ours.close()


def _answer(numbers: socket.socket, ended: threading.Event) -> None:
    """Reads the numbers of signals until the other end is closed; `ended` says that the main thread has stopped."""
    stopping = False
    while received := numbers.recv(1):
        if not stopping and received[0] in (signal.SIGTERM, signal.SIGINT):
            _tell(f"{_STOPPING}; Ctrl-C{' again' if received[0] == signal.SIGINT else ''} to stop at once")
            stopping = True
        elif received[0] == signal.SIGINT:
            if ended.wait(_GRACE_SECONDS):
                return
            _tell(str(Interrupted()))
            if sys.stderr.isatty():
                os.write(sys.stderr.fileno(), _SHOW_CURSOR)  # a bar that is shown takes it out of what is printed
            os._exit(EXIT_INTERRUPTED)  # as after a kill, the run goes on from its last checkpoint


def _agreed(agreed: Callable[[int], bool], notice: "_Notice", said: list[int], step: int) -> bool:
    """Returns whether all processes stop at `step`; says so once."""
    notice.pass_on()
    if stop := agreed(step):
        if not said and cluster.is_primary():
            _tell(_STOPPING)
        said.append(step)
    return stop


def _tell(text: str) -> None:
    print(f"{text}\n", end="", file=sys.stderr, flush=True)  # one write, unbuffered too: no other line cuts it


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
            if self._seen:
                _tell(f"{self._path}: the machine is to be taken away; {_STOPPING}")
        return self._seen

    def pass_on(self) -> None:
        """Passes a notice on to all processes, by the signal that they agree on."""
        if not self._seen and self.arrived():
            os.kill(os.getpid(), signal.SIGTERM)

    @staticmethod
    def _written(path: str) -> int | None:
        try:
            return os.stat(path).st_mtime_ns
        except OSError:
            return None
