"""Memory that a step frees is kept for the next one."""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import slow

from mfm_jax.machine import allocator

# Steps with 36 MB of temporary memory, after a command's imports; prints the pages that the system cleared for ten.
STEPS = """
import contextlib, resource, runpy, sys
sys.argv[1:], command = ["--help"], sys.argv[1]
with contextlib.suppress(SystemExit):
    runpy.run_module(command, run_name="__main__")
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jnp.tanh(x @ x.T) @ x / 3000)
x = jnp.ones((3000, 8))
for _ in range(10):
    x = jax.block_until_ready(step(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    x = jax.block_until_ready(step(x))
print(f"\\n{resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before}")
"""
VARIABLES = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_MAX_": "9", "GLIBC_TUNABLES": "glibc.malloc.trim_threshold=9"}


def huge_pages() -> bool:
    """Whether the system clears 2 MiB at a time, so that pages tell little."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return path.exists() and "[always]" in path.read_text()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="acts on glibc's malloc alone")
@pytest.mark.skipif(huge_pages(), reason="the system clears huge pages")
@pytest.mark.parametrize("command", ["main", slow("predict")])
def test_a_commands_steps_need_no_pages_of_the_system(command):
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    pages = []
    for tuned in ({}, {"GLIBC_TUNABLES": "glibc.malloc.check=0"}):  # which changes nothing but what `allocator` does
        run = [sys.executable, "-c", STEPS, f"mfm_jax.{command}"]
        done = subprocess.run(run, env=environment | tuned, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        pages.append(int(done.stdout.splitlines()[-1]))
    a_block = 3000 * 3000 * 4 // os.sysconf("SC_PAGE_SIZE")
    assert pages[1] > 5 * a_block  # of ten steps
    assert pages[0] < pages[1] / 2  # on a busy machine further blocks may come into use late


@pytest.mark.parametrize("name", VARIABLES)
def test_an_allocator_that_was_tuned_is_left_alone(monkeypatch, name):
    monkeypatch.setenv(name, VARIABLES[name])
    assert not allocator.keep_freed_memory()


def test_another_library_is_left_alone(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not allocator.keep_freed_memory()


def test_an_accelerators_process_is_left_alone(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert not allocator.keep_freed_memory()
