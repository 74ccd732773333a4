"""Several processes that train as one, as a user starts them, connected by `jax.distributed` on this machine."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import REPOSITORY, environment, logged, shipped, stopped_at
from PIL import Image

from mfm_jax import config as config_lib
from mfm_jax.errors import UserError
from mfm_jax.machine import cluster, interruption
from mfm_jax.training import train

# ResNet-8 of width 4 on digits, one epoch of 6 steps.
TINY = (
    "--config=configs/digits_lt.py",
    "--config.data.imbalance_factor=10",
    "--config.data.val_images_per_class=5",
    "--config.meta.batch_size=20",
    "--config.model.width=4",
    "--config.train.batch_size=64",
    "--config.train.epochs=1",
    "--config.checkpoint.every_epochs=1",
)
QUICK = (*TINY, "--config.model.width=0", "--config.model.name=own_parts:Tiny")


def local(count: int, workdir: Path, *flags: str, devices: int = 1) -> subprocess.Popen:
    """Starts `launch/local.sh`."""
    command = [REPOSITORY / "launch/local.sh", str(count), *flags, f"--workdir={workdir}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment(devices), cwd=REPOSITORY, **pipes)


def finish(job: subprocess.Popen) -> str:
    """Waits for the job and returns what it printed; it must have succeeded."""
    printed, _ = job.communicate(timeout=1000)
    assert job.returncode == 0, printed
    return printed


def wait_for_rows(workdir: Path, job: subprocess.Popen, count: int = 1) -> None:
    """Waits until the run has logged so many rows."""
    rows = workdir / "metrics.jsonl"
    while job.poll() is None and not (rows.exists() and len(rows.read_text().splitlines()) >= count):
        time.sleep(0.02)
    assert job.poll() is None, job.communicate()[0]


def processes_of(job: subprocess.Popen) -> list[int]:
    """Returns the ids of the processes that `local.sh` has started, in their order."""
    command = ["pgrep", "-P", str(job.pid), "-f", "mfm_jax.main"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(number) for number in found.stdout.split()]


def quick() -> config_lib.Config:
    """Returns the config that `QUICK` describes."""
    config = shipped("digits_lt")
    for flag in QUICK[1:]:
        path, value = flag.removeprefix("--config.").split("=")
        group, name = path.split(".")
        config[group][name] = value if name == "name" else type(config[group][name])(float(value))
    return config_lib.resolve(config)


def assert_close(found, expected, rtol: float) -> None:
    """Compares nested results: numbers to `rtol`, all else exactly."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_close(found[name], expected[name], rtol)
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, rtol)
    elif isinstance(expected, float):
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-6)
    else:
        assert found == expected


def test_two_processes_train_and_evaluate_like_one(tmp_path):
    """Two processes with four devices each, and one with eight: the programs are the same, and so are the numbers."""
    printed = finish(local(2, tmp_path / "two", *QUICK, devices=4))
    assert printed.count("digits 1, protocol meta_held_out") == 1, "process 0 alone prints"
    assert jax.device_count() == 8
    one = train.train_and_evaluate(quick(), tmp_path / "one")
    two = json.loads((tmp_path / "two/results.json").read_text())
    assert two["versions"]["devices"] == one["versions"]["devices"]
    assert_close(logged(tmp_path / "two"), logged(tmp_path / "one"), rtol=1e-4)
    for which in ("last", "best"):
        assert_close(two[which], json.loads(json.dumps(one[which])), rtol=1e-4)
    assert (tmp_path / "two/report.html").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2])
def test_streamed_pictures_reach_the_devices_that_have_their_labels(tmp_path, fsdp):
    """Two processes with a device each, where with fsdp each holds whole batches, and one process with two."""
    for i in range(40):
        path = tmp_path / "pictures" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 9, 3), np.uint8)).save(path)
    flags = [
        *("--config=configs/folder_lt.py", f"--config.data.root={tmp_path / 'pictures'}", "--config.data.workers=0"),
        *("--config.data.image_size=8", "--config.data.resident_mb=0", "--config.augment.crop=resized"),
        *("--config.model.name=resnet8", "--config.model.width=4", f"--config.parallel.fsdp={fsdp}"),
        *("--config.train.epochs=1", "--config.train.batch_size=8", "--config.meta.batch_size=6"),
    ]
    finish(local(2, tmp_path / "two", *flags))
    finish(local(1, tmp_path / "one", *flags, devices=2))
    assert_close(logged(tmp_path / "two"), logged(tmp_path / "one"), rtol=1e-4)


@pytest.mark.slow
def test_sigterm_at_one_stops_both_and_other_devices_go_on(tmp_path, monkeypatch, capsys):
    """Stopped in two processes; goes on in one with one device, and then with eight."""
    job = local(2, tmp_path, *TINY, "--config.method.name=ce", "--config.train.epochs=1000")
    wait_for_rows(tmp_path, job)
    os.kill(processes_of(job)[1], signal.SIGTERM)
    printed, _ = job.communicate(timeout=200)
    assert job.returncode == interruption.EXIT_INTERRUPTED, printed
    assert printed.count("saved at step") == 1, "process 0 alone tells"
    step = int(printed.partition("saved at step ")[2].partition(";")[0])
    config = json.loads((tmp_path / "config.json").read_text())
    before = "2 device(s) in 2 process(es)"
    for devices in (1, 8):
        monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
        with stopped_at(3), pytest.raises(interruption.Interrupted, match=f"saved at step {step + 3};"):
            train.train_and_evaluate(config, tmp_path)
        now = f"{devices} device(s) in 1 process(es)"
        assert f"goes on from step {step} on {now}, before: {before}; batches and their" in capsys.readouterr().out
        step, before = step + 3, now


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_and_restarted_is_bit_identical(tmp_path, victim):
    flags = (*TINY, "--config.train.epochs=8")
    finish(local(2, tmp_path / "whole", *flags))
    kill_and_restart(tmp_path / "cut", flags, victim)
    assert_same_end(tmp_path / "cut", tmp_path / "whole")


def kill_and_restart(workdir: Path, flags: tuple[str, ...], victim: int) -> None:
    """SIGKILL of one of two processes after the first checkpoint ends the job within a minute; then it is restarted."""
    job = local(2, workdir, *flags)
    while job.poll() is None and not any(path.name.isdecimal() for path in (workdir / "checkpoints").glob("*")):
        time.sleep(0.02)
    assert job.poll() is None, job.communicate()[0]
    os.kill(processes_of(job)[victim], signal.SIGKILL)
    began = time.monotonic()
    printed, _ = job.communicate(timeout=100)
    assert time.monotonic() - began < 60
    assert job.returncode == 128 + signal.SIGKILL
    assert f"local.sh: process {victim} of 2 ended with status 137" in printed
    assert "another process of this job has ended" in printed or "another task died" in printed
    assert not (workdir / "results.json").exists()
    finish(local(2, workdir, *flags))


def assert_same_end(one: Path, other: Path) -> None:
    """The same metrics, results and, bit for bit, the same arrays in the last checkpoint."""
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (one, other))
    assert (first["last"], first["best"]) == (second["last"], second["best"])
    chex.assert_trees_all_equal(*(last_state(folder) for folder in (one, other)))


def last_state(workdir: Path) -> dict:
    """Returns the arrays of the last checkpoint on one device of this process, keys as numbers."""
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        step = manager.latest_step()
        path = workdir / "checkpoints" / str(step) / "state"
    with ocp.StandardCheckpointer() as reader:
        like = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), reader.metadata(path).item_metadata.tree)
        return reader.restore(path, like)


@pytest.mark.slow
def test_cifar_in_two_processes(tmp_path):
    """Two epochs of `cifar10_lt_small`: two processes equal one with two devices, also if one is killed on the way."""
    flags = ("--config=configs/cifar10_lt_small.py", "--config.train.epochs=2", "--config.checkpoint.every_epochs=1")
    finish(local(2, tmp_path / "two", *flags))
    kill_and_restart(tmp_path / "cut", flags, victim=1)
    assert_same_end(tmp_path / "cut", tmp_path / "two")
    finish(local(1, tmp_path / "one", *flags, devices=2))
    two, one = (json.loads((tmp_path / name / "results.json").read_text())["last"]["test"] for name in ("two", "one"))
    assert_close(two, one, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", 2, 0), "only with --coordinator=HOST:PORT"),
        (("auto", 2, 0), "only with --coordinator=HOST:PORT"),
        (("somewhere", 2, 0), "expected HOST:PORT or auto"),
        (("localhost:1", None, 0), "needs --processes=N and --process=I"),
        (("localhost:1", 2, 2), "0 <= I < N; got --processes=2 --process=2"),
    ],
)
def test_flags_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        cluster.join(*arguments)


def test_auto_without_a_scheduler_is_refused():
    """In a process of its own: JAX is used already in this one."""
    command = [sys.executable, "-c", "from mfm_jax.machine import cluster; cluster.join('auto', None, None)"]
    done = subprocess.run(command, env=environment(1), cwd=REPOSITORY, capture_output=True, text=True)
    assert "UserError: --coordinator=auto: no Slurm, TPU pod, Kubernetes or MPI job found" in done.stderr
