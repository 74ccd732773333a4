"""Runs as a user starts them: results, resume bit for bit, refusals, transfer. On the digits, by two layers.

Runs of residual networks: `trained_run` and the slow tier.
"""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Tiny, environment, logged, slow, stopped_at, tiny

from mfm_jax import bilevel, compare
from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax.config import groups
from mfm_jax.data.manifest import manifest_hash, write_manifest
from mfm_jax.errors import UserError
from mfm_jax.machine import interruption, parallel
from mfm_jax.models import native
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.training import loop as loop_lib
from mfm_jax.training import train
from mfm_jax.training.anomalies import NonFiniteError
from mfm_jax.training.run import Run
from mfm_jax.workdir.checkpoint import Checkpointer, restore_phi

pytestmark = pytest.mark.usefixtures("quick_runs")


def final_state(workdir: Path, config) -> loop_lib.LoopState:
    resolved = config_lib.resolve(config)
    data = data_lib.build(resolved)
    like = loop_lib.initial(experiment_lib.build(resolved, data))
    checkpoints = Checkpointer(workdir, resolved.checkpoint, has_validation=True)
    state, _ = checkpoints.restore(checkpoints.latest_step(), like)
    checkpoints.close()
    return state.replace(bilevel=state.bilevel.replace(key=jax.random.key_data(state.bilevel.key)))


_finished: list = []


@pytest.fixture
def finished(tmp_path_factory):
    """The folder and the results of a finished MFM run, made once."""
    if not _finished:
        workdir = tmp_path_factory.mktemp("runs") / "mfm"
        _finished.extend((workdir, train.train_and_evaluate(tiny(), workdir)))
    return _finished


def test_a_run_leaves_what_it_promises(finished):
    workdir, results = finished
    for name in ("config.json", "manifest.json", "metrics.jsonl", "results.json", "report.html"):
        assert (workdir / name).stat().st_size > 0
    assert list((workdir / "tensorboard").iterdir())
    assert json.loads((workdir / "results.json").read_text()) == json.loads(json.dumps(results))
    rows = logged(workdir)
    assert [row["kind"] for row in rows] == ["train", "modulation", "val"] * 2
    assert 0.1 < results["last"]["test"]["balanced_accuracy"] <= 1
    best = max((row for row in rows if row["kind"] == "val"), key=lambda row: row["balanced_accuracy"])
    assert results["best"]["val"]["balanced_accuracy"] == pytest.approx(best["balanced_accuracy"], abs=1e-9)
    beta = next(row for row in reversed(rows) if row["kind"] == "modulation")["sites"]["logits"]["beta"]
    assert len(beta) == 10
    assert any(beta)


def test_the_way_of_a_config_to_the_step_visits_no_file_more_than_four_times(tmp_path):
    """A visit is a call from another file that takes the config; what it derives of its own fields is none."""
    visits, root = Counter(), str(Path(train.__file__).parents[1])

    def count(frame, event, _):
        code, caller = frame.f_code, frame.f_back.f_code.co_filename
        if code.co_filename.startswith(root) and event == "call" and code.co_filename not in (caller, groups.__file__):
            taken = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount]]
            visits[code.co_filename] += any(isinstance(one, config_lib.Config) for one in taken)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(bilevel, "make_step", lambda *_, **__: 1 / 0)
        sys.setprofile(count)
        train.train_and_evaluate(tiny(), tmp_path)
    sys.setprofile(None)
    assert len(visits) > 10
    assert max(visits.values()) <= 4, visits


def test_a_finished_run_is_not_repeated(finished, monkeypatch):
    workdir, results = finished
    monkeypatch.setattr(train, "train_runs", None)
    again = train.train_and_evaluate(tiny(), workdir)
    assert again == json.loads(json.dumps(results))


def test_workdir_of_another_config_is_refused(finished):
    with pytest.raises(UserError, match=r"belongs to another config .*train.seed: 0 -> 1"):
        train.train_and_evaluate(tiny(train__seed=1), finished[0])


@pytest.mark.parametrize("stop_at", [1, 6, slow(9), 12])  # 6 and 12 are the last steps of the epochs
def test_interrupted_and_resumed_is_bit_identical(finished, tmp_path, stop_at):
    """SIGTERM after any step: the run saves, and the same command ends as if nothing had happened."""
    workdir, _ = finished
    with stopped_at(stop_at), pytest.raises(interruption.Interrupted, match=f"saved at step {stop_at}"):
        train.train_and_evaluate(tiny(), tmp_path)
    train.train_and_evaluate(tiny(), tmp_path)
    chex.assert_trees_all_equal(final_state(tmp_path, tiny()), final_state(workdir, tiny()))
    assert (tmp_path / "metrics.jsonl").read_text() == (workdir / "metrics.jsonl").read_text()


COMMAND = """
import json, sys
from helpers import quick_runs
from mfm_jax.training import train
with quick_runs():
    train.train_and_evaluate(json.loads(sys.argv[1]), sys.argv[2])
"""


def test_seeds_trained_together_are_the_runs_they_would_be_alone(finished, tmp_path):
    """The first steps agree to rounding; each run has its own folder, and is not repeated."""
    workdir, alone = finished
    configs = [config_lib.resolve(tiny(train__seed=seed)) for seed in (0, 1)]
    folders = [tmp_path / "seed0", tmp_path / "seed1"]
    results = train.train_together(configs, folders)
    assert [result["seed"] for result in results] == [0, 1]
    rows = [logged(folder) for folder in (workdir, *folders)]
    for name in ("loss", "meta_loss", "grad_norm", "hypergrad_norm"):
        np.testing.assert_allclose(rows[1][0][name], rows[0][0][name], rtol=1e-4)
    assert rows[1][0]["loss"] != rows[2][0]["loss"]
    assert results[0]["last"]["step"] == alone["last"]["step"]
    assert train.train_together(configs, folders) == results


def test_runs_that_differ_in_more_than_the_seed_are_not_trained_together(tmp_path):
    configs = [config_lib.resolve(tiny(train__seed=seed, optim__momentum=0.5 + seed / 10)) for seed in (0, 1)]
    with pytest.raises(UserError, match=r"train\.seed alone, not in optim\.momentum"):
        train.train_together(configs, [tmp_path / "a", tmp_path / "b"])


@pytest.mark.parametrize("kills", [1, slow(5)])
def test_killed_and_resumed_is_bit_identical(tmp_path, kills):
    """SIGKILL of a process at a random moment, several times over; what is left is this process's."""
    config = tiny(train__epochs=12 if kills > 1 else 6)
    arguments = [sys.executable, "-c", COMMAND, config.to_json(), str(tmp_path / "cut")]
    train.train_and_evaluate(config, tmp_path / "whole")
    random = np.random.default_rng(kills)
    for _ in range(kills):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(arguments, env=environment(), **quiet)
        rows = tmp_path / "cut" / "metrics.jsonl"
        before = rows.stat().st_size if rows.exists() else 0
        while process.poll() is None and not (rows.exists() and rows.stat().st_size > before):
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        process.wait()
    assert not (tmp_path / "cut" / "results.json").exists()
    train.train_and_evaluate(config, tmp_path / "cut")
    chex.assert_trees_all_equal(final_state(tmp_path / "cut", config), final_state(tmp_path / "whole", config))
    assert (tmp_path / "cut/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()


def test_a_run_keeps_the_type_that_it_began_with(tmp_path, monkeypatch):
    """`auto` is what the devices compute best in, where a run begins; where it goes on elsewhere, it is the run's."""
    config = tiny(train__dtype="auto", train__epochs=1)
    for device, folder in (("cpu", "a"), ("gpu", "b")):
        monkeypatch.setattr(jax, "default_backend", lambda device=device: device)
        settled = train.settled(config_lib.resolve(config), tmp_path / folder)
        assert settled.train.dtype == ("float32" if device == "cpu" else "bfloat16")
    monkeypatch.undo()
    results = train.train_and_evaluate(config, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["dtype"] == "float32"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert train.settled(config_lib.resolve(config), tmp_path).train.dtype == "float32"
    assert train.train_and_evaluate(config, tmp_path) == json.loads(json.dumps(results))
    with pytest.raises(UserError, match=r'train.dtype: "float32" -> "bfloat16"'):
        train.train_and_evaluate(tiny(train__dtype="bfloat16", train__epochs=1), tmp_path)


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    config = tiny(train__epochs=3, optim__schedule="constant")
    call = loop_lib.make_call

    def make_call(*built):
        compiled = call(*built)

        def poisoned(loop, data, *steps):
            data = data.replace(mean=jnp.where(loop.bilevel.step >= 8, jnp.nan, data.mean))
            return compiled(loop, data, *steps)

        return poisoned

    with pytest.MonkeyPatch.context() as patch, pytest.raises(NonFiniteError) as error:
        patch.setattr(loop_lib, "make_call", make_call)
        train.train_and_evaluate(config, tmp_path)
    assert re.match(r"(loss|grad_norm) became non-finite at step 8; the checkpoint of step 6 is kept", str(error.value))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(final_state(tmp_path, config)))
    before = native.lowering()
    monkeypatch.setattr(native, "lowering", lambda dtype="float32": "xla")
    results = train.train_and_evaluate(config, tmp_path)  # and the run goes on from there, by XLA's convolutions
    assert results["versions"]["convolutions"] == "xla"
    said = capsys.readouterr().out
    assert "convolutions: xla" in said
    assert (f"goes on from step 6 with convolutions by xla, before: {before};" in said) == (before != "xla")


def test_transfer_starts_from_the_modulator_and_freeze_keeps_it(finished, tmp_path):
    workdir, _ = finished
    config = tiny(modulation__init_from=str(workdir), meta__freeze=True, data__imbalance_factor=5.0)
    train.train_and_evaluate(config, tmp_path / "frozen")
    theirs, ours = final_state(workdir, tiny()), final_state(tmp_path / "frozen", config)
    chex.assert_trees_all_equal(ours.bilevel.phi, theirs.bilevel.phi)
    assert ours.bilevel.phi_opt_state == ()
    resolved = config_lib.resolve(config)
    assert experiment_lib.build(resolved, data_lib.build(resolved)).meta_step is None
    with pytest.raises(UserError, match=r"meta.freeze = True: would keep a modulator that does nothing"):
        train.train_and_evaluate(tiny(meta__freeze=True), tmp_path / "nothing")
    message = r"meta.freeze = True: l2ac would learn nothing from the meta set; only mfm or mfm_frozen can"
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(tiny(meta__freeze=True, method__name="l2ac"), tmp_path / "nothing")


def test_parts_of_a_batch_that_is_padded_for_all_devices_are_refused():
    resolved = config_lib.resolve(tiny(train__accumulate=2, train__batch_size=12, parallel__fsdp=4))
    with pytest.raises(UserError, match=r"train.batch_size = 12: does not divide by 16, the devices times"):
        experiment_lib.build(resolved, data_lib.build(resolved), parallel.data_mesh(fsdp=4))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"modulation__sites": "pooled"}, r"modulation.init_from = .*: its logits.a is \(\), this run needs none"),
        ({"modulation__form": "direct"}, r"modulation.init_from = .*: its logits.a is \(\), this run needs none"),
        ({"modulation__init_from": "/nowhere"}, r"no such folder; give a run's workdir, a JSON file, or long_tail"),
    ],
)
def test_a_modulator_that_does_not_fit_is_refused(finished, tmp_path, overrides, message):
    config = tiny(**({"modulation__init_from": str(finished[0])} | overrides))
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(config, tmp_path)


def test_a_manifest_is_taken_from_a_file(finished, tmp_path):
    workdir, results = finished
    config = tiny(data__manifest=str(workdir / "manifest.json"))
    again = train.train_and_evaluate(config, tmp_path)
    assert (tmp_path / "manifest.json").read_text() == (workdir / "manifest.json").read_text()
    assert again["last"]["test"] == results["last"]["test"]


@pytest.mark.parametrize(
    "overrides",
    [
        slow({"method__base": "logit_adjusted", "meta__loss": "ce", "meta__temperature": 2.0, "meta__bn": "batch"}),
        slow({"modulation__form": "network", "modulation__sites": "stage2,pooled", "modulation__use_count": True}),
        slow({"modulation__form": "direct", "modulation__sites": "pooled", "modulation__per_class": True}),
        {"meta__every": 2, "meta__start_epoch": 1, "meta__lagged": False},
        slow({"meta__virtual": "last_stage", "optim__clip_norm": 1.0}),
        {"data__protocol": "full", "data__val_images_per_class": 0},
        {"train__dtype": "bfloat16", "data__train_on_meta": True, "optim__name": "adamw", "optim__schedule": "step"},
        {"method__name": "ldam_drw", "method__first_stage": 0.5, "augment__mixup": 0.4, "method__label_smoothing": 0.1},
        slow(
            {"method__name": "smote", "method__first_stage": 0.5, "train__steps_per_call": 4, "data__protocol": "full"}
        ),
        slow({"method__name": "meta_weight_net", "method__base": "ldam", "meta__virtual": "head"}),
        {"train__max_steps": 7, "optim__warmup_epochs": 1},
        slow({"augment__policy": "autoaugment", "augment__cutout": 4}),
        slow({"augment__policy": "randaugment", "augment__cutmix": 1.0, "augment__partners": "balanced"}),
        {"augment__policy": "trivialaugment", "augment__cutmix": 1.0, "augment__mixup": 0.4},
    ],
    ids=lambda overrides: "+".join(str(value) for value in overrides.values()),
)
def test_every_choice_runs(tmp_path, overrides):
    results = train.train_and_evaluate(tiny(**overrides), tmp_path)
    assert np.isfinite(results["last"]["test"]["nll"])
    no_validation = overrides.get("data__val_images_per_class") == 0
    assert (results["best"] is None) == no_validation


def test_an_interrupted_run_does_not_go_on_with_other_images(tmp_path, monkeypatch):
    """The split is drawn from a manifest file; the file is replaced between the run's two halves."""
    manifest = tmp_path / "split.json"
    first, second = (data_lib.build(config_lib.resolve(tiny(data__seed=seed))).manifest for seed in (0, 1))
    write_manifest(first, manifest)
    config = tiny(data__manifest=str(manifest))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="lights out"):
        patch.setattr(Run, "results", lambda *_: (_ for _ in ()).throw(RuntimeError("lights out")))
        train.train_and_evaluate(config, tmp_path / "run")
    swapped = second | {"seed": 0}
    write_manifest(swapped | {"hash": manifest_hash(swapped)}, manifest)
    with pytest.raises(UserError, match=r"is not what this run began with"):
        train.train_and_evaluate(config, tmp_path / "run")


def test_compare_checks_every_run_before_the_first(tmp_path):
    with pytest.raises(UserError, match=r"train.seed = 99999999999"):
        compare.run_all(tiny(), ["ce", "mfm"], [0, 99999999999], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_site_is_checked_for_every_method(tmp_path):
    with pytest.raises(UserError, match=r"modulation.sites = 'stage9'"):
        train.train_and_evaluate(tiny(method__name="ce", modulation__sites="stage9"), tmp_path)


def test_a_modulator_learned_on_many_devices_goes_to_one(tmp_path):
    learned = {"logits": {"a": jnp.arange(3.0), "b": jnp.float32(7)}}
    everywhere = parallel.place(learned, parallel.replicated(parallel.data_mesh()))
    checkpoints = Checkpointer(tmp_path, config_lib.Checkpoint(), has_validation=False)
    checkpoints.save(5, {"step": jnp.int32(5)}, everywhere, {"phi": "modulator"}, None)
    checkpoints.close()
    like = jax.device_put(jax.tree.map(jnp.zeros_like, learned), jax.devices()[1])
    found = restore_phi(tmp_path, like, "modulator")
    chex.assert_trees_all_equal(found, learned)
    assert found["logits"]["a"].devices() == {jax.devices()[1]}


def test_a_stored_classifier_has_the_statistics_of_its_own_network(tmp_path):
    """The checkpoint's are the mean over plain passes of its parameters, not the averages of the steps before."""
    config = tiny(method__name="ce", train__epochs=1)
    results = train.train_and_evaluate(config, tmp_path)
    assert np.isfinite(results["last"]["test"]["nll"])
    state, data = final_state(tmp_path, config).bilevel, data_lib.build(config_lib.resolve(config))
    experiment = experiment_lib.build(config_lib.resolve(config), data)
    order = experiment.order(jax.random.fold_in(jax.random.key(config.train.seed), 1), 0)
    module, passes = Tiny(10, jnp.float32), []
    for index in order:
        image = (data.train_images[np.asarray(index)] - data.mean) / data.std
        blank = {"params": state.params, "batch_stats": jax.tree.map(jnp.zeros_like, state.batch_stats)}
        passes.append(module.apply(blank, jnp.float32(image), train=True, mutable=["batch_stats"])[1]["batch_stats"])
    expected = jax.tree.map(lambda *tenths: 10 * sum(tenths) / len(tenths), *passes)
    chex.assert_trees_all_close(jax.device_get(state.batch_stats), jax.device_get(expected), rtol=1e-3, atol=1e-4)
