"""Processes that work on pictures beside the program: light, and gone when it is gone.

They start afresh (`spawn`) because a program that runs JAX has threads, which a fork would break. A fresh process would
by default import the program's main module again, and with it JAX, for seconds and hundreds of megabytes; these see an
empty one, so they import no more than the function they are given.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 2  # chunks that each process has before their results are asked for
_function: Callable[[Any], Any]  # in a process: what it computes


class WorkerEnded(Exception):
    """A process was ended from outside, or by a fault in a decoder."""


def mapped(function: Callable[[Item], Result], items: Iterable[Item], workers: int, chunk: int = 1) -> Iterator[Result]:
    """Yields `function(item)` of each of `items`, in order, computed ahead by `workers` processes.

    Items are taken as they are needed. The processes last until the iterator ends or is closed.

    Args:
      function: sent to each process once; picklable, and from a module other than `__main__`.
      items: picklable and small.
      workers: 0 computes in this process, when a result is asked for.
      chunk: items a message, which costs as much as a small picture.

    Raises:
      WorkerEnded: a process was ended.
      Exception: what `function` raises.
    """
    if not workers:
        yield from map(function, items)
        return
    rest = iter(items)
    chunks = iter(lambda: list(itertools.islice(rest, chunk)), [])
    firsts = list(itertools.islice(chunks, workers))  # no more processes than messages
    if not firsts:
        return
    waiting: deque[Future[list[Result]]] = deque()
    with _pool(len(firsts), function) as pool:
        for part in itertools.chain(firsts, chunks):
            if len(waiting) == _AHEAD * len(firsts):
                yield from waiting.popleft().result()
            waiting.append(pool.submit(_each, part))
        while waiting:
            yield from waiting.popleft().result()


@contextlib.contextmanager
def _pool(count: int, function: Callable[[Any], Any]) -> Iterator[ProcessPoolExecutor]:
    """Starts `count` processes that last as long as the context; what was not begun by its end is dropped."""
    context = multiprocessing.get_context("spawn")
    end, held = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(function, end))
    try:
        with _empty_main():
            wait([executor.submit(os.getpid) for _ in range(count)])  # a process starts when it has something to do
        yield executor
    except BrokenProcessPool as error:
        held.close()  # the executor ends the others with SIGTERM, which they ignore, and waits for them
        raise WorkerEnded from error
    finally:
        executor.shutdown(cancel_futures=True)
        held.close()
        end.close()


@contextlib.contextmanager
def _empty_main() -> Iterator[None]:
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


# In the process


def _begin(function: Callable[[Any], Any], end: Connection) -> None:
    """Leaves Ctrl-C and a scheduler's SIGTERM to the program, which saves first, and ends when its `end` is closed."""
    global _function
    _function = function
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(end,), daemon=True).start()


def _end_with(end: Connection) -> None:
    """Ends the process when the program closes the other side of the pipe, or is killed."""
    with contextlib.suppress(EOFError):
        end.recv()
    os._exit(1)


def _each(items: list[Any]) -> list[Any]:
    return [_function(item) for item in items]
