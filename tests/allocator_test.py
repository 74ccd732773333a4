"""Memory that a step frees is kept for the next one."""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from mfm_jax import allocator

# Steps with 64 MB of temporary memory, after the imports of a run; prints the pages that the system cleared for ten.
STEPS = """
import resource, sys
from mfm_jax import allocator, predict, runs
if sys.argv[1] == "kept":
    assert allocator.keep_freed_memory()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jnp.tanh(x @ x.T) @ x / 4000)
x = jnp.ones((4000, 8))
for _ in range(10):
    x = jax.block_until_ready(step(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    x = jax.block_until_ready(step(x))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
VARIABLES = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_MAX_": "9", "GLIBC_TUNABLES": "glibc.malloc.trim_threshold=9"}


def huge_pages() -> bool:
    """Whether the system clears 2 MiB at a time, so that pages tell little."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return path.exists() and "[always]" in path.read_text()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="acts on glibc's malloc alone")
@pytest.mark.skipif(huge_pages(), reason="the system clears huge pages")
def test_steps_with_kept_memory_need_no_pages_of_the_system():
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    pages = {}
    for how in ("system", "kept"):
        done = subprocess.run([sys.executable, "-c", STEPS, how], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        pages[how] = int(done.stdout)
    a_block = 4000 * 4000 * 4 // os.sysconf("SC_PAGE_SIZE")
    assert pages["system"] > 5 * a_block  # of ten steps
    assert pages["kept"] < pages["system"] / 2  # on a busy machine further blocks may come into use late


@pytest.mark.parametrize("name", VARIABLES)
def test_an_allocator_that_was_tuned_is_left_alone(monkeypatch, name):
    monkeypatch.setenv(name, VARIABLES[name])
    assert not allocator.keep_freed_memory()


def test_another_library_is_left_alone(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not allocator.keep_freed_memory()


def test_an_accelerators_process_is_left_alone():
    before = jax.config.values["jax_platforms"]
    jax.config.update("jax_platforms", "cuda,cpu")
    try:
        assert not allocator.keep_freed_memory()
    finally:
        jax.config.update("jax_platforms", before)
