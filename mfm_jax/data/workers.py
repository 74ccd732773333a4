"""Processes that work on pictures beside the program: light, and gone when it is gone.

They start afresh (`spawn`) because a program that runs JAX has threads, which a fork would break. A fresh process would
by default import the program's main module again, and with it JAX, for seconds and hundreds of megabytes; these see an
empty one, so they import no more than the function they are given.

Each process has a pipe of its own. Arrays come back in a piece of memory that the process makes and hands over: neither
side waits for the other to copy them, and nothing is left behind when either is killed.
"""

import atexit
import contextlib
import itertools
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import traceback
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import IO, Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 2  # messages that each process has before its results are asked for


class WorkerEnded(Exception):
    """A process was ended from outside, or by a fault in a decoder."""


def mapped(function: Callable[[Item], Result], items: Iterable[Item], workers: int, chunk: int = 1) -> Iterator[Result]:
    """Yields `function(item)` of each of `items`, in order, computed ahead by `workers` processes.

    Items are taken as they are needed. The processes last until the iterator ends or is closed. Arrays in a result are
    read-only.

    Args:
      function: sent to each process once; picklable, and from a module other than `__main__`. Its results are small,
        apart from arrays.
      items: picklable and small, as two messages of them wait in a pipe.
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
    asked: deque[Connection] = deque()
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(_process()) for _ in firsts]  # all start before the first reads what is sent
        content = pickle.dumps(function)
        for process in processes:
            with _lost():
                process.send_bytes(content)
        for part, process in zip(itertools.chain(firsts, chunks), itertools.cycle(processes), strict=False):
            if len(asked) == _AHEAD * len(processes):
                yield from _received(asked.popleft())
            asked.append(process)
            with _lost():
                process.send(part)
        while asked:
            yield from _received(asked.popleft())


@contextlib.contextmanager
def _process() -> Iterator[Connection]:
    """Starts a process, which ends with the context; gives the pipe to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    with _empty_main():
        process.start()
    theirs.close()
    atexit.register(process.kill)  # before `multiprocessing` waits for it, where the context is left open
    try:
        yield ours
    finally:
        atexit.unregister(process.kill)
        process.kill()  # it holds nothing but what it is decoding
        process.join()
        ours.close()


@contextlib.contextmanager
def _empty_main() -> Iterator[None]:
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise WorkerEnded from error


def _received(connection: Connection) -> Any:
    """Returns the results of a message; their arrays lie in the memory that the process has handed over."""
    with _lost():
        content, sizes, is_error = connection.recv()
        file = reduction.recv_handle(connection)
    memory = memoryview(mmap.mmap(file, sum(sizes), prot=mmap.PROT_READ) if any(sizes) else b"")
    os.close(file)
    parts = (memory[end - size : end] for size, end in zip(sizes, itertools.accumulate(sizes), strict=True))
    result = pickle.loads(content, buffers=parts)
    if is_error:
        raise result
    return result


# In the process


def _work(connection: Connection) -> None:
    """Answers each message until the program is gone."""
    # Ctrl-C and a scheduler's SIGTERM reach every process; they are for the program, which saves first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):
        function = connection.recv()
        while True:
            items = connection.recv()
            answer: tuple[Any, bool]
            try:
                answer = [function(item) for item in items], False
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = error, True
            _send(connection, *answer)


def _send(connection: Connection, result: Any, is_error: bool) -> None:
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(result, protocol=5, buffer_callback=buffers.append)
    with _memory() as file:
        sizes = [file.write(buffer.raw()) for buffer in buffers]
        file.flush()
        connection.send((content, sizes, is_error))
        reduction.send_handle(connection, file.fileno(), os.getppid())


def _memory() -> IO[bytes]:
    """Returns a file in memory, where the system has such; it has no name, and is gone with its last user."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("pictures"), "wb")
    return tempfile.TemporaryFile()
