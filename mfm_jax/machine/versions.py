"""What numbers depend on beside config and data: versions, devices, and how a result came about, as recorded."""

import contextlib
import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import mfm_jax
from mfm_jax.models import native


def versions() -> dict[str, str]:
    """Returns the versions of packages, and the devices; "unknown" where a package has none."""
    names = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "mfm-jax": mfm_jax.__version__,  # of this source, which need not be installed
        **{name: _version(name) for name in names},
        "python": platform.python_version(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "convolutions": native.lowering(),
    }


def provenance() -> dict[str, Any]:
    """Returns when, by which command, by which commit and on what machine this process makes results.

    `date` is in UTC; `commit` is None where the package is not in a git checkout, and ends in "-dirty" where files
    differ from it; `processor` and `cores` are this machine's, the cores those that the process may use.
    """
    program, *arguments = sys.orig_argv
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds"),
        "command": shlex.join([Path(program).name, *arguments]),
        "commit": _commit(),
        "processor": _processor(),
        "cores": cores,
    }


def _commit() -> str | None:
    root = Path(mfm_jax.__file__).parents[1]
    if not (root / ".git").exists():  # an installed package may lie within a checkout of something else
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(OSError):  # no git
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return None


def _processor() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        if names := [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]:
            return names[0]
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def devices() -> str:
    """Returns how many devices there are, in how many processes."""
    return f"{jax.device_count()} device(s) in {jax.process_count()} process(es)"
