"""Processes that work on pictures beside the program: light, and gone when it is gone.

They start afresh (`spawn`) because a program that runs JAX has threads, which a fork would break. A fresh process would
by default import the program's main module again, and with it JAX, for seconds and hundreds of megabytes; these see an
empty one, so they import no more than the functions they are given.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, wait


@contextlib.contextmanager
def pool(count: int) -> Iterator[ProcessPoolExecutor]:
    """Starts `count` processes that last as long as the context; what was not begun by its end is dropped.

    Functions given to them, their arguments and results must be picklable, and the functions from a module other than
    `__main__`.
    """
    executor = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=begin)
    try:
        with _empty_main():
            wait([executor.submit(os.getpid) for _ in range(count)])  # a process starts when it has something to do
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _empty_main() -> Iterator[None]:
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def begin() -> None:
    """In a new process: leaves Ctrl-C to the program, and ends when the program was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
