"""Loggers besides TensorBoard: what they are handed, what happens where one fails, and the real ones offline."""

import json
import os
import sqlite3
from pathlib import Path

import pytest
from helpers import tiny

from mfm_jax import config as config_lib
from mfm_jax.errors import UserError
from mfm_jax.training import train
from mfm_jax.workdir import loggers
from mfm_jax.workdir.files import Workdir
from mfm_jax.workdir.loggers import Guarded
from mfm_jax.workdir.logs import MetricLog

ROWS = [{"kind": "train", "step": step, "epoch": 0, "loss": 1.0 / step} for step in (1, 2, 3)]


class Recorder:
    """A logger that keeps what it is handed, and fails as often as it is told to."""

    def __init__(self, run_id: str | None = None, failures: int = 0):
        self.run_id, self.resumed, self.failures = run_id or "first", bool(run_id), failures
        self.steps: list[int] = []
        self.values: dict[str, float] = {}
        self.files: list[Path] = []
        self.closed = False

    def log(self, step, values):
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no route\nto host")
        self.steps.append(step)
        self.values |= values

    def finish(self, summary, files):
        self.values |= summary
        self.files = list(files)

    def close(self):
        self.closed = True


def logged(recorder: Recorder, rows=(), workdir: Path | None = None) -> MetricLog:
    return MetricLog(workdir, list(rows), [Guarded("recorder", lambda: recorder, len(rows))])


def test_scalars_of_each_row_come_once_and_in_order():
    recorder = Recorder()
    log = logged(recorder)
    log.write("train", 5, 0, {"loss": 1.5, "note": "text", "count": 3, "missing": None})
    log.write("modulation", 5, 0, {"sites": {"logits": {"gamma": [0.1]}}})
    assert recorder.steps == [5]  # at once; nothing of a row without numbers
    log.write("val", 10, 1, {"accuracy": 0.25})
    log.finish({"last/test/accuracy": 0.5}, [Path("report.html")])
    log.close()
    assert recorder.steps == [5, 10]
    assert recorder.values == {"train/loss": 1.5, "val/accuracy": 0.25, "last/test/accuracy": 0.5}
    assert (recorder.files, recorder.closed) == ([Path("report.html")], True)


def test_a_resumed_logger_goes_on_and_a_new_one_gets_all():
    resumed, new = Recorder("first"), Recorder()
    for recorder in (resumed, new):
        log = logged(recorder, ROWS[:2])
        log.write("train", 3, 0, {"loss": 0.5})
        log.close()
    assert (resumed.steps, new.steps) == ([3], [1, 2, 3])


def test_a_logger_that_fails_is_told_once_and_gets_the_rest_at_the_end(capsys, tmp_path):
    recorder = Recorder(failures=1)
    log = logged(recorder, workdir=tmp_path)
    for row in ROWS:
        log.write("train", row["step"], 0, {"loss": row["loss"]})
    assert recorder.steps == []  # not asked again: each try may take long
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    log.finish({}, [])
    log.close()
    assert recorder.steps == [1, 2, 3]
    told = capsys.readouterr().err
    assert told == "warning: recorder has failed: ConnectionError: no route to host; training goes on without it\n"


def test_a_logger_that_cannot_be_opened_stops_nothing(capsys, tmp_path):
    def make():
        raise RuntimeError("no account")

    guarded = Guarded("recorder", make, 0)
    log = MetricLog(tmp_path, [], [guarded])
    log.write("train", 1, 0, {"loss": 1.0})
    log.finish({}, [])
    log.close()
    assert guarded.run_id is None
    assert capsys.readouterr().err.count("warning: recorder has failed: RuntimeError: no account") == 1


def test_the_summary_has_the_numbers_of_each_checkpoint_and_split():
    last = {"step": 9, "val": {"accuracy": 0.5, "per_class_accuracy": [0.5]}, "test": None}
    best = {"step": 3, "val": {"accuracy": 0.75}, "test": {"num_examples": 4, "ece": 0.125}}
    found = loggers.summary({"last": last, "best": best})
    assert found == {"last/val/accuracy": 0.5, "best/val/accuracy": 0.75, "best/test/ece": 0.125}
    assert loggers.summary({"last": last, "best": None}) == {"last/val/accuracy": 0.5}


def test_tensorboard_can_be_left_out(tmp_path):
    MetricLog(tmp_path, ROWS, tensorboard=False).close()
    assert not Workdir(tmp_path).tensorboard.exists()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


# --- the field --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["tensorbord", "wandb,wandb", "wandb,", ","])
def test_other_names_are_refused(value):
    with pytest.raises(UserError, match=r"train\.loggers = .*: expected some of tensorboard, wandb, mlflow"):
        config_lib.resolve(tiny(train__loggers=value))


def test_loggers_may_change_when_a_run_goes_on():
    began, now = config_lib.resolve(tiny()), config_lib.resolve(tiny(train__loggers="mlflow, wandb"))
    assert now.train.logger_names == ("mlflow", "wandb")
    changed = config_lib.changes(began.to_dict(), now)
    assert [change.path for change in changed] == ["train.loggers"]
    assert config_lib.problem(changed, now) == ""
    assert config_lib.resolve(tiny(train__loggers="")).train.logger_names == ()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_told_before_anything_is_done(name, monkeypatch, tmp_path):
    monkeypatch.setattr(loggers, "find_spec", lambda package: None)
    config = config_lib.resolve(tiny(train__loggers=f"tensorboard,{name}"))
    with pytest.raises(UserError, match=rf'{name} is not installed; python -m pip install -e "\.\[{name}\]"'):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- in a run ---------------------------------------------------------------------------------------


def test_a_run_that_is_interrupted_goes_on_in_the_same_place(monkeypatch, one_device, tmp_path):
    """A real run of two epochs, stopped after the first: a recorder stands where W&B would."""
    made: list[Recorder] = []

    def make(config, workdir, run_id):
        made.append(Recorder(run_id))
        return made[-1]

    monkeypatch.setitem(loggers._MAKERS, "wandb", make)
    monkeypatch.setattr(loggers, "find_spec", lambda package: package)
    config = config_lib.resolve(tiny(train__loggers="wandb", data__workers=0, method__name="ce"))

    class Stop(Exception):
        pass

    save = train.Run.save

    def save_and_stop(run, score):
        save(run, score)
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(train.Run, "save", save_and_stop)
        train.train_and_evaluate(config, tmp_path)
    assert made[0].closed
    assert made[0].files == []
    assert json.loads(Workdir(tmp_path).loggers.read_text()) == {"wandb": "first"}
    results = train.train_and_evaluate(config, tmp_path)
    steps = [row["step"] for row in map(json.loads, Workdir(tmp_path).metrics.read_text().splitlines())]
    assert (made[1].run_id, made[1].resumed) == ("first", True)
    assert made[0].steps + made[1].steps == steps
    assert made[1].values["last/test/accuracy"] == results["last"]["test"]["accuracy"]
    assert made[1].files == [Workdir(tmp_path).config, Workdir(tmp_path).report]
    assert all(path.is_file() for path in made[1].files)
    assert not Workdir(tmp_path).tensorboard.exists()


# --- the real ones, offline -------------------------------------------------------------------------


@pytest.fixture
def plain_environment(monkeypatch, tmp_path):
    """No variable of the user's, and no key."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where a key would lie
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def in_two_parts(name: str, workdir: Path) -> None:
    """Logs rows as a run would that is interrupted after two of them, and finished."""
    config = config_lib.resolve(tiny(train__loggers=name))
    workdir.mkdir()
    for path in (Workdir(workdir).config, Workdir(workdir).report):
        path.write_text("{}")
    for start in (0, 2):
        log = MetricLog(workdir, ROWS[:start], loggers.opened(config, workdir, start))
        for row in ROWS[start : start + 2]:
            log.write("train", row["step"], 0, {"loss": row["loss"]})
        if start:
            log.finish({"last/test/accuracy": 0.75}, [Workdir(workdir).config, Workdir(workdir).report])
        log.close()


@pytest.mark.filterwarnings("ignore")
def test_mlflow_keeps_one_run_in_the_folder(plain_environment, tmp_path, capsys):
    tracking = pytest.importorskip("mlflow", reason="the extra mlflow is not installed").MlflowClient
    workdir = tmp_path / "run"
    in_two_parts("mlflow", workdir)
    assert "has failed" not in capsys.readouterr().err
    store = Workdir(workdir).mlflow / "runs.db"
    run_id = json.loads(Workdir(workdir).loggers.read_text())["mlflow"]
    client = tracking(f"sqlite:///{store}")
    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params["model.name"] == "resnet8"
    history = [(one.step, one.value) for one in client.get_metric_history(run_id, "train/loss")]
    assert history == [(row["step"], row["loss"]) for row in ROWS]
    assert run.data.metrics["last/test/accuracy"] == 0.75
    assert {found.path for found in client.list_artifacts(run_id)} == {"config.json", "report.html"}
    with sqlite3.connect(store) as base:
        assert base.execute("select count(*) from runs").fetchone() == (1,)


@pytest.mark.filterwarnings("ignore")
def test_mlflow_follows_the_variable(plain_environment, tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # where nobody listens
    in_two_parts("mlflow", tmp_path / "run")
    assert capsys.readouterr().err.count("warning: mlflow has failed") == 2  # once a process
    assert not Workdir(tmp_path / "run").mlflow.exists()


@pytest.mark.filterwarnings("ignore")
def test_wandb_stays_offline_under_one_id_without_a_key(plain_environment, tmp_path, capsys):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    workdir = tmp_path / "run"
    in_two_parts("wandb", workdir)
    assert "has failed" not in capsys.readouterr().err
    run_id = json.loads(Workdir(workdir).loggers.read_text())["wandb"]
    written = sorted((workdir / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(written) == 2  # a process each, which `wandb sync --append` joins
    assert b"last/test/accuracy" in written[1].read_bytes()
    assert (written[1].parent / "files" / "report.html").is_file()
