"""Several processes that train as one, connected by `jax.distributed`.

Every process runs the same command on the same data and run folder, on a file system that all of them share. Each
computes its part of every batch and writes its part of a checkpoint; process 0 alone writes logs and reports. What a
process does must follow from the step, not from its clock: all enter the same collectives in the same order.

A process that dies ends the job: the others fail in their next collective, or learn of it from the heartbeats that
stopped, and end too. Nothing waits without a time-out.
"""

import contextlib
import itertools
import os
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from mfm_jax.errors import UserError

HEARTBEAT_SECONDS = 20  # a process that is silent for so long is dead
BARRIER_SECONDS = 300  # the longest that processes wait for each other; nothing between two barriers takes so long
_LEAVE_SECONDS = 5
_ORBAX_BARRIERS = "experimental_orbax_use_distributed_barrier"  # those with time-outs, also of 300 s
_barriers = itertools.count()
# Words in errors that come from the end of another process.
_LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat", "coordination service")


def join(coordinator: str, processes: int | None, process: int | None) -> None:
    """Joins the job, before anything else of JAX is used; without a coordinator this process stays alone.

    `coordinator` is `HOST:PORT` of process 0, with the number of `processes` and the index of this one, or `auto`: JAX
    finds the job by itself (Slurm, TPU pod, Kubernetes, MPI).

    Raises:
      UserError: arguments that do not fit together, no job, or one that cannot be reached.
    """
    _check(coordinator, processes, process)
    if not coordinator:
        return
    auto = coordinator == "auto"
    flags.FLAGS[_ORBAX_BARRIERS].value = True
    try:
        jax.distributed.initialize(
            coordinator_address=None if auto else coordinator,
            num_processes=processes,
            process_id=process,
            cluster_detection_method=None if auto else "deactivate",
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        raise UserError(
            f"--coordinator=auto: no Slurm, TPU pod, Kubernetes or MPI job found ({error});"
            " give --coordinator=HOST:PORT --processes=N --process=I"
        ) from error
    except RuntimeError as error:
        raise UserError(f"--coordinator={coordinator}: cannot join the job: {' '.join(str(error).split())}") from error


def _check(coordinator: str, processes: int | None, process: int | None) -> None:
    if coordinator in ("", "auto"):
        if processes is not None or process is not None:
            raise UserError("--processes, --process: only with --coordinator=HOST:PORT")
    elif not coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator={coordinator}: expected HOST:PORT or auto")
    elif processes is None or process is None or not 0 <= process < processes:
        raise UserError(
            f"--coordinator={coordinator}: needs --processes=N and --process=I, 0 <= I < N;"
            f" got --processes={processes} --process={process}"
        )


def is_primary() -> bool:
    """Returns whether this is process 0, the one that writes."""
    return jax.process_index() == 0


def barrier(name: str, seconds: int = BARRIER_SECONDS) -> None:
    """Waits until every process is here.

    Raises:
      JaxRuntimeError: some are not here after `seconds`.
    """
    unique = f"{name} {next(_barriers)}"
    multihost.sync_global_processes(unique, timeout=seconds, processes=set(range(jax.process_count())))


def check_agreed(text: str, message: str) -> None:
    """Raises `UserError(message)` in every process where `text` is not the same in all."""
    checksum = np.uint32(zlib.crc32(text.encode()))
    if len(np.unique(multihost_utils.process_allgather(checksum))) > 1:
        raise UserError(message)


def agreed_stop() -> Callable[[int], bool]:
    """Returns `stopped(step)`, to be called before each call of the step; it turns true at one step in all processes.

    SIGTERM at any process starts it. JAX's preemption service, which listens for the signal, then names the step after
    the last that a process has asked for; each step is asked for once.
    """
    asked, reached = -1, False

    def stopped(step: int) -> bool:
        nonlocal asked, reached
        while asked < step:
            asked += 1
            reached |= multihost_utils.reached_preemption_sync_point(asked)
        return reached

    return stopped


def reported_lost(error: Exception) -> bool:
    """Returns whether `error` comes from the end of another process; if so, prints a line."""
    lost = jax.distributed.is_initialized() and any(word in str(error) for word in _LOST)
    if lost:
        print(
            f"error: another process of this job has ended or cannot be reached: {' '.join(str(error).split())}; the"
            " same command goes on from the last checkpoint",
            file=sys.stderr,
        )
    return lost


@contextlib.contextmanager
def bound_together(status_if_lost: int) -> Iterator[None]:
    """Ends this process at once where the body fails in it alone, or because another process has ended.

    Nothing is closed then: a save that is under way would wait for the others, or they for this one. A mistake or an
    interruption that all processes meet is raised.
    """
    try:
        yield
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        if reported_lost(error):
            _end(status_if_lost)
        if _all_come():
            raise
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
            _end(2)
        traceback.print_exc()
        _end(1)


def leave(status: int) -> int:
    """Returns `status` if all processes leave with one; otherwise ends this one, so that none waits for it."""
    if status and jax.distributed.is_initialized() and not _all_come():
        _end(status)
    return status


def _all_come() -> bool:
    """Returns whether all processes come here within a few seconds."""
    try:
        barrier("all come", _LEAVE_SECONDS)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _end(status: int) -> NoReturn:
    """Ends this process without notice to the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
