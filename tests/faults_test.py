"""What goes wrong around a run: damaged files, a full disk, a second run, a machine taken away, a value gone bad."""

import contextlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import REPOSITORY, environment, logged, tiny
from tensorboardX.proto import event_pb2

from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax.config import Checkpoint, Train
from mfm_jax.errors import UserError
from mfm_jax.machine import interruption
from mfm_jax.training import anomalies, inputs, train
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.training import loop as loop_lib
from mfm_jax.types import BilevelState
from mfm_jax.workdir import integrity
from mfm_jax.workdir.checkpoint import Checkpointer, restore_phi
from mfm_jax.workdir.files import Workdir
from mfm_jax.workdir.logs import MetricLog


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full, as far as a process can have one to itself: writes beyond `size` bytes of a file fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- damage ---------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("harm", [flip, halve, Path.unlink], ids=["flipped", "truncated", "missing"])
@pytest.mark.parametrize("name", ["arrays", "folder/note", integrity.SEAL])
def test_a_sealed_folder_tells_which_file_was_damaged(harm, name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "arrays").write_bytes(bytes(range(256)))
    (tmp_path / "folder" / "note").write_text("twelve bytes")
    integrity.seal(tmp_path)
    (tmp_path / "_CHECKPOINT_METADATA").write_text("written later")
    assert integrity.damage(tmp_path) == ""
    harm(tmp_path / name)
    assert integrity.damage(tmp_path)
    if name != integrity.SEAL:
        assert integrity.damage(tmp_path) == f"{name} {'is missing' if harm is Path.unlink else 'has changed'}"


STATE = {"w": jax.random.normal(jax.random.key(0), (300, 100)), "step": jnp.int32(0)}
RECORD = {"rows": [], "seconds": 1.0, "phi": "modulator"}


def checkpointer(workdir: Path) -> Checkpointer:
    return Checkpointer(workdir, Checkpoint(), has_validation=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the checkpoints of steps 6 and 12; the second is the best on validation."""
    workdir = tmp_path_factory.mktemp("checkpoints")
    with contextlib.closing(checkpointer(workdir)) as checkpoints:
        for step in (6, 12):
            state = {"w": STATE["w"] + step, "step": jnp.int32(step)}
            checkpoints.save(step, state, {"a": jnp.ones(3)}, RECORD, step / 100)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))


def arrays(workdir: Path, step: int) -> Path:
    files = (workdir / "checkpoints" / str(step) / "state").glob("ocdbt.process_*/d/*")
    return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("harm", [flip, halve, Path.unlink], ids=["flipped", "truncated", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(harm, workdir, capfd):
    damaged = arrays(workdir, 12)
    harm(damaged)
    with contextlib.closing(checkpointer(workdir)) as checkpoints:
        assert checkpoints.latest_step() == 6
        state, record = checkpoints.restore(6, STATE)
        assert checkpoints.best_step(0.12) is None  # it was that of step 12
        assert checkpoints.best_step(0.06) == 6
    np.testing.assert_array_equal(state["w"], STATE["w"] + 6)
    assert record == RECORD
    assert re.search(
        rf"checkpoints/12 is damaged \(state/.*{damaged.name} (has changed|is missing)\)", capfd.readouterr().err
    )
    assert (workdir / "damaged-checkpoints" / "12").is_dir()


def test_where_every_checkpoint_is_damaged_the_run_stops_and_moves_none(workdir):
    for step in (6, 12):
        flip(arrays(workdir, step))
    with pytest.raises(UserError, match=r"every checkpoint is damaged \(.*6: state/.* has changed"):
        checkpointer(workdir)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["12", "6"]


def test_a_reader_touches_nothing(workdir):
    flip(arrays(workdir, 12))
    (workdir / "checkpoints" / "18.orbax-checkpoint-tmp").mkdir()  # the run beside it is saving
    before = sorted(workdir.rglob("*"))
    with contextlib.closing(Checkpointer(workdir, Checkpoint(), has_validation=True, read_only=True)) as checkpoints:
        with pytest.raises(UserError, match=r"checkpoints/12: damaged"):
            checkpoints.restore(12, STATE)
        assert checkpoints.restore(6, STATE)[1] == RECORD
    assert sorted(workdir.rglob("*")) == before


def test_damage_that_happens_later_is_found_before_it_is_read(workdir):
    with contextlib.closing(checkpointer(workdir)) as checkpoints:
        flip(arrays(workdir, 12))
        with pytest.raises(UserError, match=r"checkpoints/12: damaged: state/"):
            checkpoints.restore(12, STATE)
        assert checkpoints.best_step(0.12) is None


def test_a_damaged_modulator_is_not_taken_over(workdir):
    assert restore_phi(workdir, {"a": jnp.zeros(3)}, "modulator")["a"].tolist() == [1, 1, 1]
    flip(workdir / "checkpoints" / "12" / "phi" / "manifest.ocdbt")
    with pytest.raises(UserError, match=r"its checkpoint 12 is damaged: phi/manifest.ocdbt has changed"):
        restore_phi(workdir, {"a": jnp.zeros(3)}, "modulator")


@pytest.mark.parametrize("name", ["config.json", "results.json"])
def test_a_damaged_file_of_a_workdir_is_named(name, tmp_path):
    """Whatever the damage: `workdir_test`."""
    (tmp_path / "report.html").touch()
    (tmp_path / name).write_text('{"data": ')
    with pytest.raises(UserError, match=rf"{name}: damaged, not a JSON object"):
        train.train_and_evaluate(config_lib.default(), tmp_path)


# --- a full disk ----------------------------------------------------------------------------------


# TensorStore's writes of the other arrays may end after Orbax has closed the event loop of the one that failed.
@pytest.mark.filterwarnings("ignore:(?s).*Event loop is closed:pytest.PytestUnraisableExceptionWarning")
def test_a_save_that_fails_is_told_and_the_next_one_made(workdir, capfd):
    state = {"w": STATE["w"] + 18, "step": jnp.int32(18)}
    with contextlib.closing(checkpointer(workdir)) as checkpoints:
        with files_of_at_most(32_768):
            checkpoints.save(18, state, {}, RECORD, 0.5)
            checkpoints.wait()
        assert checkpoints.latest_step() == 12
        err = capfd.readouterr().err
        assert (
            "warning: the checkpoint of step 18 could not be saved: File too large; the one of step 12 is kept" in err
        )
        checkpoints.save(24, state, {}, RECORD, 0.5)
        checkpoints.wait()
        assert checkpoints.latest_step() == 24
        np.testing.assert_array_equal(checkpoints.restore(24, STATE)[0]["w"], state["w"])
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"12", "24"}  # nothing unfinished


def test_rows_that_cannot_be_written_are_written_later(tmp_path, capsys):
    log = MetricLog(tmp_path, [])
    with files_of_at_most(200):
        for step in range(9):
            log.write("train", step, 0, {"loss": float(step)})
    told = capsys.readouterr().err
    assert [told.count(name) for name in ("metrics.jsonl cannot", "tensorboard cannot")] == [1, 1]
    content = (tmp_path / "metrics.jsonl").read_text()
    assert len(content) <= 200
    log.write("train", 9, 0, {"loss": 9.0})
    log.close()
    rows = logged(tmp_path)
    assert rows == log.rows
    assert [row["loss"] for row in rows] == list(range(10))
    assert scalars_by_step(tmp_path / "tensorboard") == {step: float(step) for step in range(10)}


def scalars_by_step(folder: Path) -> dict[int, float]:
    """Reads TensorBoard's records as far as each file is whole: a length, its checksum, the message, its checksum."""
    found = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        while len(content) >= 8 and len(content) >= 16 + (length := struct.unpack("<Q", content[:8])[0]):
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            for value in event.summary.value:
                found[event.step] = value.simple_value
            content = content[16 + length :]
    return found


# --- a second run ---------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from mfm_jax.workdir.files import Workdir
with Workdir(Path(sys.argv[1])).owned():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_a_workdir_is_refused_until_the_first_is_dead(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"another run is at work there \(process {holder.pid} on \S+\)"):
        train.train_and_evaluate(config_lib.default(), tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with Workdir(tmp_path).owned():
        assert (tmp_path / ".owner").read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(UserError, match="another run"), Workdir(tmp_path).owned():
            pass
    assert not list(tmp_path.iterdir())


# --- a machine taken away, and values gone bad ------------------------------------------------------


def narrow(**overrides):
    """Returns the config of a run that leaves out what is not finite; overrides as `group__field=value`."""
    rest = {"data__val_images_per_class": 0, "model__width": 2, "method__name": "ce", "train__on_nonfinite": "skip"}
    return tiny(**rest, **overrides)


def test_a_notice_of_preemption_stops_the_run_and_one_left_from_before_does_not(
    stepping, quick_runs, tmp_path, monkeypatch
):
    notice = tmp_path / "notice"
    monkeypatch.setenv(interruption.NOTICE, str(notice))
    monkeypatch.setattr(interruption, "_LOOK_SECONDS", 0.0)

    def act(step, data):
        if step == 3 and not notice.exists():
            notice.touch()
        return data

    stepping(act)
    with pytest.raises(interruption.Interrupted, match="saved at step 4"):
        train.train_and_evaluate(narrow(), tmp_path / "run")
    for name in ("load", "loads", "Unpickler"):  # a file that somebody else made runs no code
        monkeypatch.setattr(pickle, name, None)
    results = train.train_and_evaluate(narrow(), tmp_path / "run")
    assert results["last"]["step"] == 14


def test_a_run_writes_in_its_workdir_alone_and_no_secrets(stepping, drawn, tmp_path, monkeypatch):
    import matplotlib.font_manager  # noqa: F401 (which keeps a list of fonts in the home folder, made once)

    secret = "a-token-of-the-user"
    for name in ("HOME", "TMPDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(tempfile, "tempdir", None)  # what is remembered of $TMPDIR
    monkeypatch.setenv("API_TOKEN", secret)
    monkeypatch.chdir(tmp_path / "HOME")
    train.train_and_evaluate(narrow(train__max_steps=1), tmp_path / "run")
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()} == {"run"}
    written = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert not [path for path, content in written.items() if secret.encode() in content]
    for name in ("config.json", "manifest.json", "results.json", "metrics.jsonl", "report.html"):
        assert str(tmp_path).encode() not in written[tmp_path / "run" / name]


def poison(*steps):
    """Returns an `act` that makes the images of some steps NaN."""
    return lambda step, data: data.replace(mean=jnp.full_like(data.mean, jnp.nan)) if step in steps else data


def test_a_step_that_is_not_finite_is_left_out(stepping, quick_runs, tmp_path, capfd):
    stepping(poison(2, 9))
    results = train.train_and_evaluate(narrow(), tmp_path)
    assert np.isfinite(results["last"]["test"]["nll"])
    rows = logged(tmp_path)
    skipped = [(row["step"], row["epoch"], row["because"]) for row in rows if row["kind"] == "skipped"]
    assert skipped == [(2, 0, "loss became non-finite"), (9, 1, "loss became non-finite")]
    epochs = [row for row in rows if row["kind"] == "train"]
    assert [row["skipped"] for row in epochs] == [1, 1]
    assert all(np.isfinite(row["loss"]) for row in epochs)
    told = capfd.readouterr()
    assert re.sub(r"\s+", " ", told.out + told.err).count("loss became non-finite at step 2; skipped") == 1


def test_an_epoch_of_skipped_steps_ends_the_run(stepping, quick_runs, tmp_path):
    stepping(poison(*range(7, 14)))
    message = "every step of epoch 1 was skipped; the checkpoint of step 7 is kept"
    with pytest.raises(anomalies.NonFiniteError, match=message):
        train.train_and_evaluate(narrow(), tmp_path)


def test_a_skipped_step_changes_nothing_but_the_step_and_compiles_nothing(quick_runs):
    config = config_lib.resolve(narrow())
    data = data_lib.build(config)
    experiment = experiment_lib.build(config, data)
    call, loop = loop_lib.make_call(experiment, config), loop_lib.initial(experiment, config.train)
    order = jnp.arange(64 * experiment.steps_per_epoch, dtype=jnp.int32).reshape(-1, 64)
    resident = inputs.to_device(data).replace(order=order, meta_table=jnp.asarray(data.meta_table(0), jnp.int32))
    kind = (jnp.int32(1), "plain")
    loop = call(loop, resident, *kind)
    before = jax.device_get(loop.replace(bilevel=loop.bilevel.replace(key=None)))
    loop = call(loop, poison(1)(1, resident), *kind)
    after = jax.device_get(loop.replace(bilevel=loop.bilevel.replace(key=None)))
    assert (int(before.bilevel.step), int(after.bilevel.step)) == (1, 2)
    chex.assert_trees_all_equal(after.bilevel.replace(step=before.bilevel.step), before.bilevel)
    assert {**after.sums, "skipped": 0.0} == before.sums
    assert (after.sums["skipped"], after.bad[:2].tolist()) == (1.0, [[1, 0], [-1, -1]])
    loop = call(loop, resident, *kind)
    assert call._cache_size() == 1
    assert int(loop.sums["steps"]) == 2


def test_a_spike_is_a_norm_far_above_the_running_mean():
    """By hand: 11 norms of 2, then 5.9, 6.1 and an infinite one under factor 3."""
    norms = jnp.zeros(2)
    for _ in range(11):
        norms, spike = anomalies.watch_norm(norms, jnp.float32(2.0), 3.0)
        assert not spike
    weight = (1 - 0.99**11) / 0.01
    np.testing.assert_allclose(norms, [2 * weight, weight], rtol=1e-6)
    assert not anomalies.watch_norm(norms, jnp.float32(5.9), 3.0)[1]
    after, spike = anomalies.watch_norm(norms, jnp.float32(6.1), 3.0)
    assert spike
    np.testing.assert_allclose(after, [0.99 * 2 * weight + 6, 0.99 * weight + 1], rtol=1e-6)
    after, _ = anomalies.watch_norm(norms, jnp.float32(jnp.inf), 3.0)
    np.testing.assert_allclose(after, 0.99 * norms, rtol=1e-6)


def test_a_spike_is_noted_and_skipped():
    metrics = {"loss": jnp.float32(1), "accuracy": jnp.float32(0), "grad_norm": jnp.float32(100)}
    old = BilevelState(jnp.int32(20), jax.random.key(0), {"w": jnp.float32(1)}, {}, (), {}, ())
    new = old.replace(step=old.step + 1, params={"w": jnp.float32(5)})
    settings = Train(on_nonfinite="skip", spike_factor=3.0)
    sums = dict.fromkeys(("loss", "accuracy", "grad_norm", "steps", "skipped"), jnp.float32(0))
    loop = loop_lib.LoopState(old, sums, anomalies.none_noted(settings), jnp.array([40.0, 20.0]))
    loop = loop_lib._accumulate(loop, new, metrics, False, settings)
    assert (int(loop.bilevel.step), float(loop.bilevel.params["w"])) == (21, 1.0)
    assert loop.bad[0].tolist() == [20, len(anomalies.ANOMALIES) - 1]
    assert (float(loop.sums["skipped"]), float(loop.sums["loss"])) == (1.0, 0.0)


@pytest.mark.slow
def test_kills_damages_and_a_full_disk(tmp_path):
    """The campaign of `benchmarks/kill_campaign.py`, with fewer kills."""
    script = REPOSITORY / "benchmarks" / "kill_campaign.py"
    arguments = [f"--workdir={tmp_path / 'campaign'}", f"--out={tmp_path / 'found.json'}", "--kills=10"]
    subprocess.run([sys.executable, str(script), *arguments], env=environment(), check=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert sum(found["kills"]["sent"].values()) == 10
    assert found["kills"]["identical"] == found["kills"]["runs"]
    assert len(found["damages"]) == 20
