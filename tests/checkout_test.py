"""A copy of the source that is not installed trains to its end."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import mfm_jax
from mfm_jax.machine.versions import provenance

ROOT = Path(__file__).parents[1]
FLAGS = ("epochs=1", "batch_size=64", "model.name=own_parts:Tiny", "data.workers=0")


def test_without_an_installation_a_run_ends_and_unknown_versions_are_written_so(tmp_path):
    """Packages are linked from this interpreter's, without what is known of mfm_jax (all of it) and of optax."""
    copy, packages = tmp_path / "copy", tmp_path / "packages"
    shutil.copytree(ROOT / "mfm_jax", copy / "mfm_jax", ignore=shutil.ignore_patterns("__pycache__"))
    packages.mkdir()
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(folder).iterdir():
            if not re.match(r"(__editable__.*|)mfm_jax|optax-", path.name):
                (packages / path.name).symlink_to(path)
    flags = [f"--config.{flag}" if "." in flag else f"--config.train.{flag}" for flag in FLAGS]
    config = f"--config={ROOT / 'configs/digits_lt.py'}"
    # -S: the interpreter's own packages stay out, and with them the installation that the tests run from.
    command = [sys.executable, "-S", "-m", "mfm_jax.main", config, f"--workdir={tmp_path / 'run'}", *flags]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (copy, packages, Path(__file__).parent)))}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "run/results.json").read_text())
    versions, made = results["versions"], results["provenance"]
    assert (versions["optax"], versions["mfm-jax"]) == ("unknown", mfm_jax.__version__)
    assert "unknown" not in versions["jax"]
    assert made["commit"] is None
    assert shlex.split(made["command"])[1:] == command[1:]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_in_a_checkout_the_commit_is_known():
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert head.startswith(provenance()["commit"].removesuffix("-dirty"))
