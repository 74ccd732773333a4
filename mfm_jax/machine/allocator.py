"""How the process gets its memory from the system, and gives it back."""

import ctypes
import importlib.util
import os
from collections.abc import Mapping

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_KEPT_BYTES = 2_000_000_000
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX")


def keep_freed_memory() -> bool:
    """Has glibc's malloc keep what is freed, up to 2 GB; for a process that is to train or predict on the CPU.

    XLA's CPU client allocates the temporary memory of a step anew, and frees it when the step is done. malloc maps so
    large a block for itself and unmaps it when it is freed, and the system clears its pages again in every step. Here
    the block comes from the heap, whose end is kept, and there is one heap for all threads: a thread's own is of 64 MiB
    at most, and unmapped when it is free. A thread keeps the heap that it has and leaves it to another when it ends, so
    this comes first in a process, before an import starts threads.

    Does nothing with another C library, where JAX may compute on an accelerator, and where the environment tunes malloc
    (`GLIBC_TUNABLES`, or a variable of glibc's such as `MALLOC_ARENA_MAX`).

    Returns:
      Whether freed memory is kept.
    """
    library = None if not _on_cpu() or _is_tuned(os.environ) else _glibc()
    if library is None:
        return False
    mallopt = library.mallopt
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES), mallopt(_M_ARENA_MAX, 1)])


def give_back() -> None:
    """Gives the system the pages that are free now, gaps within the heap included.

    For the moment when all programs are compiled: compiling takes up to three times the memory of a step, in small
    blocks. The next step takes its own pages anew, once.
    """
    if library := _glibc():
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Returns the process's C library if that is glibc."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 (only glibc has it)
    except (AttributeError, OSError, TypeError):  # another library, none to be loaded, Windows
        return None
    return library


def _on_cpu() -> bool:
    """Whether JAX will compute on the CPU, as far as can be known without starting it."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms.split(",")[0] == "cpu"
    return not any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))  # what brings accelerators


def _is_tuned(environment: Mapping[str, str]) -> bool:
    tunables = environment.get("GLIBC_TUNABLES", "")
    return "glibc.malloc" in tunables or any(name in environment for name in _VARIABLES)
