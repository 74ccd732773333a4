"""A run that starts from the classifier of another: what it takes, what starts fresh, and what is refused."""

import re
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from helpers import Tiny, arrays, configured, quick_runs, stored

from mfm_jax import data as data_lib
from mfm_jax import models
from mfm_jax.config import Config
from mfm_jax.errors import UserError
from mfm_jax.inference import evaluate as evaluation
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.training import train
from mfm_jax.types import BilevelState
from mfm_jax.workdir.files import Workdir, read_object

pytestmark = pytest.mark.usefixtures("quick_runs")


def small(**overrides) -> Config:
    return configured("mfm", **{"model__name": "resnet8", "model__width": 2, "train__max_steps": 2} | overrides)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of MFM on the ten digits, of two steps, whose phi is no longer the identity."""
    folder = tmp_path_factory.mktemp("runs") / "mfm"
    with quick_runs():
        train.train_and_evaluate(small(), folder)
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> str:
    """A set of three of the digits' classes."""
    data, path = data_lib.build(small()), tmp_path_factory.mktemp("sets") / "three.npz"
    members = {}
    for split in ("train", "test"):
        labels = getattr(data, f"{split}_labels")
        members |= {f"{split}_images": getattr(data, f"{split}_images")[labels < 3]}
        members |= {f"{split}_labels": labels[labels < 3]}
    np.savez(path, **members)
    return str(path)


def of_three(three: str, **overrides) -> Config:
    natural = {"data__protocol": "natural", "data__imbalance_factor": 1.0}
    return small(**{"data__source": "npz", "data__root": three, "meta__batch_size": 9} | natural | overrides)


def start(config: Config) -> BilevelState:
    """Returns the state that a run of `config` starts from."""
    init = experiment_lib.build(config, data_lib.build(config)).init_pretrained
    return arrays(init())


def random(config: Config) -> BilevelState:
    return arrays(experiment_lib.build(config, data_lib.build(config)).init())


def test_the_classifier_is_taken_and_phi_is_not(run, capsys):
    theirs, config = stored(run), small(model__init_from=str(run), train__seed=1)
    ours, fresh = start(config), random(config)
    chex.assert_trees_all_equal(ours.params, theirs.params)
    chex.assert_trees_all_equal(ours.batch_stats, theirs.batch_stats)
    chex.assert_trees_all_equal(ours.phi, fresh.phi)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (theirs.phi, ours.phi)), strict=True))
    chex.assert_trees_all_equal(ours.opt_state, fresh.opt_state)
    assert (int(theirs.step), int(ours.step)) == (2, 0)
    assert capsys.readouterr().err == f"starts from the classifier of {run}, step 2\n"


def test_images_held_out_here_that_the_run_was_trained_on_are_warned_of(run, capsys):
    start(small(model__init_from=str(run), data__seed=1, data__val_images_per_class=5))
    told = f"warning: model.init_from = {str(run)!r}: was trained on "
    assert told in capsys.readouterr().err


def test_a_method_without_phi_starts_from_a_run_that_has_one(run):
    ours = start(small(model__init_from=str(run), method__name="ce"))
    chex.assert_trees_all_equal(ours.params, stored(run).params)
    assert ours.phi == {}


@pytest.mark.parametrize("overrides", [{}, {"method__name": "ldam"}, {"model__tune": "head"}])
def test_other_classes_have_a_head_of_their_own(run, three, capsys, overrides):
    theirs, config = stored(run), of_three(three, model__init_from=str(run), **overrides)
    ours = start(config)
    assert capsys.readouterr().err.endswith("; the head starts fresh: that run has 10 classes, this one 3\n")
    assert ours.params["head"]["kernel"].shape[1] == 3
    chex.assert_trees_all_equal(ours.params["head"], random(config).params["head"])
    for name in theirs.params.keys() - {"head"}:
        chex.assert_trees_all_equal(ours.params[name], theirs.params[name])
    chex.assert_trees_all_equal(ours.batch_stats, theirs.batch_stats)


def test_a_head_of_another_kind_or_of_other_names_starts_fresh(run, tmp_path, capsys):
    ours = start(small(model__init_from=str(run), method__name="ldam"))
    assert "the head starts fresh: that run's is linear, that of ldam is not" in capsys.readouterr().err
    assert np.any(ours.params["head"]["kernel"] != stored(run).params["head"]["kernel"])
    renamed = shutil.copytree(run, tmp_path / "renamed")
    facts = Workdir(renamed).facts
    facts.write_text(facts.read_text().replace('"7"', '"seven"'))
    start(small(model__init_from=str(renamed)))
    assert "the classes are others, such as 'seven' there and '7' here" in capsys.readouterr().err


def test_training_goes_on_from_it_and_keeps_what_is_frozen(run, three, tmp_path):
    """The run that it started from is not needed to go on."""
    moved = shutil.copytree(run, tmp_path / "moved")
    config = of_three(three, model__init_from=str(moved), model__tune="head")
    train.train_and_evaluate(config, tmp_path / "tuned")
    shutil.rmtree(moved)
    Workdir(tmp_path / "tuned").results.unlink()
    results = train.train_and_evaluate(config, tmp_path / "tuned")
    assert results["last"]["step"] == 2
    ours, theirs = stored(tmp_path / "tuned"), stored(run)
    for name in theirs.params.keys() - {"head"}:
        chex.assert_trees_all_equal(ours.params[name], theirs.params[name])
    assert read_object(Workdir(tmp_path / "tuned").config)["model"]["init_from"] == str(moved)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"model__name": "resnet20"}, "its classifier is a resnet8, here model.name = 'resnet20'; set that to"),
        ({"model__name": "vit_b16"}, "its classifier is a resnet8, here model.name = 'vit_b16'"),
    ],
)
def test_another_model_is_refused(run, overrides, told):
    with pytest.raises(UserError, match=re.escape(f"model.init_from = {str(run)!r}: {told}")):
        start(small(**{"model__init_from": str(run), "data__image_size": 16 if "vit" in told else 0} | overrides))


def test_another_width_is_refused(run, monkeypatch):
    monkeypatch.setattr(models, "create", lambda name, classes, width, dtype, **_: Tiny(classes, dtype, units=4))
    told = "its BatchNorm_0.mean is [8], here it is [4]; match model.width"
    with pytest.raises(UserError, match=re.escape(f"model.init_from = {str(run)!r}: {told}")):
        start(small(model__init_from=str(run)))


def test_what_is_no_run_is_refused_with_the_way_out(run, tmp_path):
    (tmp_path / "weights.npz").touch()
    begun = Workdir(shutil.copytree(run, tmp_path / "begun"))
    shutil.rmtree(begun.checkpoints)
    damaged = Workdir(shutil.copytree(run, tmp_path / "damaged"))
    next(damaged.checkpoints.rglob("_METADATA")).write_bytes(b"x")
    for name, told in {
        "nowhere": "no run there; give the workdir of one",
        "weights.npz": "a file, not a run folder; weights in a file are for model.pretrained",
        "begun": "the run there has no checkpoint yet",
        "damaged": "damaged: ",
    }.items():
        with pytest.raises(UserError, match=f"^model.init_from = '{tmp_path}/{name}': .*{told}"):
            start(small(model__init_from=str(tmp_path / name)))


def test_a_run_given_as_a_file_of_weights_is_told_its_field(run):
    told = f"model.pretrained = {str(run)!r}: a folder, not a file; to start from the classifier of a run there, set"
    with pytest.raises(UserError, match=re.escape(f"{told} model.init_from = {str(run)!r} in its place")):
        start(small(model__pretrained=str(run)))
    with pytest.raises(UserError, match=r"model.init_from = 'a': so does model.pretrained = 'b' set the initial weig"):
        small(model__init_from="a", model__pretrained="b")


def test_there_is_nothing_to_evaluate_before_training(run, tmp_path):
    with pytest.raises(UserError, match="no run there; give the workdir of one"):
        evaluation.evaluate_run(small(model__init_from=str(run)), tmp_path)
