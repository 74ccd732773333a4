"""What is seen while a run trains: words, lines in a log, a bar in a terminal, and an answer to Ctrl-C."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import REPOSITORY, environment

from mfm_jax.machine.interruption import EXIT_INTERRUPTED
from mfm_jax.training import epoch_log, progress
from mfm_jax.training.pace import Pace


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (125, "2 min 5 s"), (3599.4, "59 min 59 s"), (15000, "4 h 10 min")],
)
def test_a_time_in_words(seconds, words):
    assert progress.duration(seconds) == words


def epoch(number: int, loss: float, score: float | None = None, **betas: list[float]) -> list[dict]:
    rows = [{"kind": "train", "epoch": number, "loss": loss}]
    if betas:
        sites = {site: {"gamma": [0.0], "beta": beta} for site, beta in betas.items()}
        rows.append({"kind": "modulation", "epoch": number, "sites": sites})
    return rows + ([] if score is None else [{"kind": "val", "epoch": number, "balanced_accuracy": score}])


@pytest.mark.parametrize(
    ("logs", "words"),
    [
        ([epoch(0, 2.0, 0.9) + epoch(1, 0.5)], "loss 0.500"),  # the score is of the epoch before
        ([epoch(0, 0.5, 0.711)], "loss 0.500, balanced on validation 71.1 %"),
        ([epoch(0, 0.5, pooled=[9.0], logits=[0.0, -1.52, 3.0])], "loss 0.500, phi: rarest beta -1.5"),
        ([epoch(0, 0.5, stage3=[9.0], pooled=[-0.25, 0.5])], "loss 0.500, phi: beta at pooled 0.38"),
        ([epoch(0, 0.5, 0.6), epoch(0, 0.7, 0.7)], "loss 0.600, balanced on validation 65.0 %"),  # of two runs
    ],
)
def test_an_epoch_in_words(logs, words):
    assert epoch_log.in_words(logs, np.array([50, 2, 10])) == words


def test_a_log_shows_life_within_an_epoch_and_a_long_run_says_so(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.3)
    monkeypatch.setattr(progress, "_LONG_SECONDS", 0)
    mark = (jnp.full((1, 2), -1), jnp.float32(6), jnp.float32(12))
    with progress.TrainingBar("mfm", Pace(np.zeros(10**6, int), [""], 10**6), 0, 10**6, 200) as bar:
        bar.start_steps()
        with bar.compiling("plain"):
            pass
        time.sleep(0.3)  # steps of less than a quarter of a second are not measured
        assert bar.sent(12, mark) is None  # too soon
        out, began = "", time.monotonic()
        # The first line may come before there is an estimate, on a crowded machine.
        while not re.search(r"^step 12/1000000, training, loss 0\.500, left .+$", out, re.MULTILINE):
            assert time.monotonic() < began + 60, out
            time.sleep(0.3)
            out += capsys.readouterr().out
        time.sleep(1)
        assert bar.sent(24, mark) is mark
    out += capsys.readouterr().out
    assert re.search(r"^compiling the plain step \(usually .*\)$", out, re.MULTILINE)
    assert re.search(r"^at this rate 200 epochs take about .+ on this machine; Ctrl-C saves", out, re.MULTILINE)
    assert out.count("at this rate") == 1


BUSY = """
import hashlib, sys
from mfm_jax.machine import interruption
with interruption.listening():
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # an hour, in which no handler of Python runs
"""


def test_ctrl_c_is_answered_where_python_does_not_come_to_a_handler():
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "stopping after this step; Ctrl-C again to stop at once\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert said == "interrupted; run the same command to go on\n"
    assert process.returncode == EXIT_INTERRUPTED


IN_A_CALLBACK = """
import gc, os, signal, time
from mfm_jax.machine import interruption
def collect(*args):
    gc.callbacks.clear()
    os.kill(os.getpid(), signal.SIGINT)
with interruption.listening():
    os.kill(os.getpid(), signal.SIGINT)
    gc.callbacks[:] = [collect]
    gc.collect()
    time.sleep(60)
"""


def test_a_second_ctrl_c_in_a_callback_leaves_no_traceback():
    done = subprocess.run([sys.executable, "-c", IN_A_CALLBACK], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines() == [
        "stopping after this step; Ctrl-C again to stop at once",
        "interrupted; run the same command to go on",
    ]
    assert done.returncode == EXIT_INTERRUPTED


def start(workdir, **options) -> subprocess.Popen:
    fields = ("model.width=2", "train.epochs=2", "data.val_images_per_class=5")
    config = f"--config={REPOSITORY}/configs/digits_lt.py"
    arguments = [sys.executable, "-m", "mfm_jax.main", config, f"--workdir={workdir}"]
    arguments += [f"--config.{field}" for field in fields]
    shown = {"COLUMNS": "120", "TERM": "xterm", "PYTHONUNBUFFERED": "1"}  # as containers set it: no line may be cut
    return subprocess.Popen(arguments, env=environment() | shown, **options)


def read_all(descriptor: int) -> str:
    """Returns what is written to a terminal until its other end is closed."""
    text = b""
    with contextlib.suppress(OSError):  # how Linux tells the end
        while part := os.read(descriptor, 4096):
            text += part
    return text.decode(errors="replace")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal of POSIX")
def test_a_run_in_a_log_that_is_stopped_while_it_compiles_and_starts_again_in_a_terminal(tmp_path):
    with (tmp_path / "log").open("w") as file:
        process = start(tmp_path / "run", stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        for wanted in ("compiling", "stopping", "interrupted"):  # the last comes while the interpreter goes down
            while wanted not in (tmp_path / "log").read_text() and process.poll() is None:
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
        process.wait(120)
    said = (tmp_path / "log").read_text().splitlines()
    words = [line.partition(" ")[0] for line in said if not line.startswith("step ")]  # one comes every half minute
    assert words == ["reading", "digits", "convolutions:", "compiling", "stopping", "interrupted;"]
    assert process.returncode == EXIT_INTERRUPTED

    ours, terminal = os.openpty()
    process = start(tmp_path / "run", stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = read_all(ours)
    os.close(ours)
    assert process.wait(120) == 0, shown[-2000:]
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown))
    for form in (
        r"compiling the meta-step \(.*\)",
        r"mfm: compiling .* 0/18 .*",
        r"mfm: evaluating .* 9/18 loss \d\.\d{3} \d:\d\d:\d\d left \d+ s",
        r"epoch 1/2: loss \d\.\d{3}, balanced on validation \d+\.\d %, phi: rarest beta [+-]\d\.\d, left \d+ s",
        r"epoch 2/2: loss \d\.\d{3}, balanced on validation \d+\.\d %, phi: rarest beta [+-]\d\.\d",
        "evaluating on test images",
        "writing the report",
    ):
        assert any(re.fullmatch(form, line.strip()) for line in lines), (form, shown[-2000:])
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") > 0  # the cursor is back
