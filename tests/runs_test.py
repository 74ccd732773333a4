"""Runs after each other and side by side: a failure is an outcome, and the others finish."""

import collections
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers import overridden, tiny

from mfm_jax import compare
from mfm_jax import config as config_lib
from mfm_jax.machine import interruption
from mfm_jax.study import runs
from mfm_jax.training import train
from mfm_jax.workdir.files import Workdir


def run(tmp_path, name: str, **overrides) -> runs.Task:
    config = tiny(
        data__val_images_per_class=0, augment__pad=0, method__name="ce", model__name="own_parts:Tiny", model__width=0
    )
    return runs.Task(name, config_lib.resolve(overridden(config, **overrides)), tmp_path / name)


def test_a_failed_method_is_shown_and_the_others_are_compared(tmp_path, monkeypatch, capsys):
    evaluation = {"test": dict.fromkeys(compare._COLUMNS, 0.5)}
    good = runs.Outcome({"split": "test", "last": evaluation, "best": None, "train_seconds": 1.0})
    outcomes = [good, runs.Outcome(None, "loss became non-finite"), good]
    monkeypatch.setattr(runs, "train_all", lambda planned, jobs: outcomes)
    results, failed, _ = compare.run_all(config_lib.default(), ["ce", "focal", "mfm"], [0], tmp_path)
    assert list(results) == ["ce", "mfm"]
    assert failed == {"focal": "focal seed 0: loss became non-finite"}
    rows = compare.table(results, "ce")
    compare.write(rows, [0], tmp_path, "ce", failed)
    assert "Failed: focal (focal seed 0: loss became non-finite)." in (tmp_path / "compare.md").read_text()
    compare.print_table(rows, "ce", failed)
    assert "failed: focal (focal seed 0" in capsys.readouterr().out
    lone = compare.table({"mfm": results["mfm"]}, "ce")  # the baseline is what failed
    assert [row["difference"] for row in lone] == [None]


def test_cores_are_shared_out():
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system does not tell its cores")
    cores = sorted(os.sched_getaffinity(0))
    assert [core for share in runs._shares_of_cores(1) for core in share] == cores
    two = runs._shares_of_cores(2)
    assert len(two) == 2
    assert all(two)
    more = runs._shares_of_cores(len(cores) + 1)
    assert [len(share) for share in more] == [1] * (len(cores) + 1)


@pytest.mark.usefixtures("one_device", "processes")
def test_side_by_side_gives_the_same_results_and_outlives_a_failure(tmp_path, capsys, monkeypatch):
    """Two seeds that are one program, and a run that fails; what has finished is not started again."""
    group, told = [run(tmp_path, f"seed{seed}", train__seed=seed) for seed in (0, 1)], {}
    planned = [group, [run(tmp_path, "bad", model__name="resnet8", modulation__sites="stage9")]]
    *good, bad = runs.train_all(planned, jobs=2, ended=lambda group, found: told.update({group[0].label: found}))
    assert told == {"seed0": good, "bad": [bad]}
    (line,) = Workdir(group[0].workdir).read_processes()
    assert line["of"] == "process"
    assert 0 < line["step_seconds"] < line["seconds"]
    assert 0 < line["compile_seconds"] < line["seconds"]
    assert Workdir(tmp_path / "bad").read_processes() == []
    assert bad.results is None
    assert bad.error.startswith("modulation.sites = 'stage9': the model has no such site")
    assert [outcome.results["seed"] for outcome in good] == [0, 1]
    assert line["bytes"] > 1e7
    assert Workdir(group[0].workdir).read_peak_memory() is None  # of several in a process
    assert Workdir(tmp_path / "bad").read_peak_memory() is None
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith("seed0 and 1 more: epoch 0/2, log ")
    assert "seed0 and 1 more: done in" in out
    assert "; 2 of 2 done" in out
    alone = train.train_and_evaluate(group[0].config, tmp_path / "alone")
    np.testing.assert_allclose(good[0].results["last"]["test"]["nll"], alone["last"]["test"]["nll"], rtol=1e-3)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert runs.train_all([group]) == good
    other = group[0]._replace(config=run(tmp_path, "x", train__epochs=3).config)
    (refused,) = runs.train_all([[other]])
    assert "has a run of train.epochs = 2, for which its learning rates were planned" in refused.error


def test_the_reason_of_a_failure_is_its_error_and_not_the_list_below(tmp_path):
    job = runs._Job([run(tmp_path, "one")])
    job.log.write_text("reading\nerror: data.root = 'x': 2 problems; repair\n  a.png: damaged\n  b.png: damaged\n")
    (outcome,) = runs._finished(job, 2)
    assert outcome.error == f"data.root = 'x': 2 problems; repair ({job.log})"


def test_the_table_tells_what_runs_and_when_it_will_be_done(tmp_path, monkeypatch):
    jobs = [runs._Job([run(tmp_path, name, train__epochs=10)]) for name in ("done", "running", "waiting")]
    for job in jobs[:2]:
        job.process = subprocess.Popen([sys.executable, "-c", ""])
        job.process.wait()
        job.runs[0].workdir.mkdir()
    jobs[0].outcomes = [runs.Outcome({})]
    for name, epochs in (("done", 10), ("running", 6)):
        rows = [{"kind": "val", "epoch": epochs - 1, "balanced_accuracy": 0.5}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    jobs[1].epochs_before, jobs[1].began = 2, 60.0  # went on after two epochs
    assert [job.look() for job in jobs[:2]] == [0, 0]
    monkeypatch.setattr(time, "monotonic", lambda: 300.0)
    table = runs._table(jobs, began=20.0)
    # Four epochs in 240 s, four are left; without a validation split there is no column for it.
    assert [list(column.cells) for column in table.columns] == [["running"], ["6/10"], ["4.0"], ["4.0"]]
    line = f"running: epoch 6/10, log {tmp_path / 'running.log'}; 1 of 3 done, about 5 min left"
    assert runs._line(jobs, began=20.0) == line
    validated = run(tmp_path, "running", data__val_images_per_class=5, train__epochs=10)
    table = runs._table([dataclasses.replace(jobs[1], runs=[validated])], began=20.0)
    assert [list(column.cells) for column in table.columns] == [["running"], ["6/10"], ["50.0"], ["4.0"], ["4.0"]]
    jobs[1].epochs_before = 6
    assert [list(column.cells) for column in runs._table(jobs, began=20.0).columns][-1] == ["starting"]
    jobs[1].epochs_before = 2
    # 14 epochs in 280 s: 20 s an epoch, and 4 + 10 are left.
    assert runs._table(jobs, began=20.0).caption == "1 of 3 done, about 5 min left"


def test_the_end_of_an_interrupted_run_stops_the_rest(tmp_path, monkeypatch):
    """As when a notice of pre-emption has reached a run, and not this process."""

    def start(job, cores):
        code = "import sys; sys.exit(75)" if job.label == "one" else "import time; time.sleep(600)"
        job.log.touch()
        job.cores, job.process = cores, subprocess.Popen([sys.executable, "-c", code])

    monkeypatch.setattr(runs, "_start", start)
    with pytest.raises(interruption.Interrupted, match="every run is saved"):
        runs.train_all([[run(tmp_path, name)] for name in ("one", "two", "three")], jobs=2)


def test_when_the_time_is_over_all_are_stopped_and_what_does_not_save_is_killed(tmp_path, monkeypatch):
    started, told = [], []

    def start(job, cores):
        code = "import time; time.sleep(600)"
        if job.label == "deaf":
            code = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('', flush=True); {code}"
        job.log.touch()
        job.cores, job.process = cores, subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        if job.label == "deaf":
            job.process.stdout.readline()
        started.append(job.process)

    monkeypatch.setattr(runs, "_start", start)
    with pytest.raises(interruption.Interrupted):
        planned = [[run(tmp_path, name)] for name in ("deaf", "obedient", "waiting")]
        runs.train_all(planned, jobs=2, seconds=0.5, patience=0.5, ended=lambda *pair: told.append(pair))
    assert [process.returncode for process in started] == [-signal.SIGKILL, -signal.SIGTERM]
    assert told == []
    for process in started:
        process.stdout.close()


def test_nothing_runs_on_where_this_process_fails(tmp_path, monkeypatch):
    started = []

    def start(job, cores):
        job.cores, job.process = cores, subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        started.append(job.process)

    monkeypatch.setattr(runs, "_start", start)
    monkeypatch.setattr(runs, "_table", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runs.train_all([[run(tmp_path, "one")]])
    assert started[0].wait(10) == -signal.SIGTERM


PARENT = """
import json, sys
from pathlib import Path
from mfm_jax import config
from mfm_jax.machine import interruption
from mfm_jax.study import runs
given = config.resolve(json.loads(sys.argv[1]))
try:
    runs.train_all([[runs.Task(name, given, Path(sys.argv[2]) / name)] for name in ("one", "two", "three")], jobs=2)
except interruption.Interrupted as interrupted:
    print(interrupted)
    sys.exit(75)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "processes")
def test_sigterm_stops_and_saves_them_all(tmp_path):
    given = json.dumps(run(tmp_path, "x", model__name="resnet8", model__width=2, train__epochs=500).config.to_dict())
    parent = subprocess.Popen([sys.executable, "-c", PARENT, given, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    while not all((tmp_path / name / "metrics.jsonl").exists() for name in ("one", "two")):
        time.sleep(0.2)
    parent.send_signal(signal.SIGTERM)
    out, _ = parent.communicate(timeout=120)
    assert parent.returncode == 75
    assert "every run is saved" in out
    for name in ("one", "two"):
        assert list((tmp_path / name / "checkpoints").iterdir())
        assert not (tmp_path / name / "results.json").exists()
    assert not list((tmp_path / "three").iterdir())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "false None"),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}, "true None"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".4"}, "None .4"),
    ],
)
def test_a_process_shares_the_memory_of_its_device_unless_the_user_has_divided_it(
    tmp_path, monkeypatch, given, expected
):
    names = ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nimport os\nprint(*map(os.environ.get, {names}))\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    job = runs._Job([run(tmp_path, "ce")])
    runs._start(job, [])
    job.process.wait()
    assert job.log.read_text().strip() == expected


@pytest.mark.usefixtures("processes")
def test_the_process_of_a_second_seed_compiles_nothing(tmp_path, monkeypatch):
    """It finds every program of the first one in the cache."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    config = {"method__name": "mfm", "meta__every": 2, "meta__batch_size": 20, "data__val_images_per_class": 5}
    planned = [[run(tmp_path, f"seed{seed}", train__seed=seed, **config)] for seed in (0, 1)]
    kept = []
    outcomes = runs.train_all(planned, ended=lambda *_: kept.append(sorted(tmp_path.glob("xla/*-cache"))))
    assert not any(outcome.error for outcome in outcomes)
    assert len(kept[0]) > 20
    assert kept[1] == kept[0]


@pytest.fixture
def events():
    """The names of JAX's events, counted; every program is kept in the cache meanwhile."""
    counts, setting = collections.Counter(), "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[setting]

    def note(event, **_):
        counts[event] += 1

    jax.monitoring.register_event_listener(note)
    jax.config.update(setting, 0.0)
    yield counts
    jax.config.update(setting, before)
    jax.monitoring.unregister_event_listener(note)


@pytest.mark.usefixtures("quick_runs")
def test_a_second_seed_in_the_same_process_compiles_nothing(tmp_path, events):
    for seed in (11, 12):  # of no other test, which might have left its programs in the cache
        events.clear()
        train.train_and_evaluate(run(tmp_path, "x", method__name="mfm", train__seed=seed).config, tmp_path / str(seed))
    asked, found = (events[f"/jax/compilation_cache/{name}"] for name in ("compile_requests_use_cache", "cache_hits"))
    assert asked == found > 0
