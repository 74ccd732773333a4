"""A folder laid out for a hub: it gives the same bits, its card has the run's numbers, and no path of the machine."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import yaml
from helpers import slow, tiny
from PIL import Image

import mfm_jax as mfm
from mfm_jax import config as config_lib
from mfm_jax import export, hub, models
from mfm_jax.errors import UserError
from mfm_jax.evaluation import classifier, conformal, hub_folder
from mfm_jax.evaluation.hub_folder import Stored

IMAGES = np.random.default_rng(3).integers(0, 256, (9, 8, 8, 1), np.uint8)


@pytest.fixture(scope="module")
def folder(trained_run, tmp_path_factory):
    """The last checkpoint of a run whose tested head is that of a second stage."""
    out = tmp_path_factory.mktemp("hub") / "crt"
    arguments = [f"--workdir={trained_run.workdir}", f"--hub={out}", "--license=cc-by-4.0"]
    assert export.main(["export", *arguments]) == 0
    return out


def head(folder: Path) -> dict:
    """Returns the front matter of the card in `folder`."""
    dashes, matter, _ = (folder / "README.md").read_text().split("---\n", 2)
    assert dashes == ""
    return yaml.safe_load(matter)


def test_the_folder_holds_what_a_hub_takes_and_no_more(folder):
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    figures = {f"figures/{name}.png" for name in ("classes", "curves", "reliability")}
    assert found == {"README.md", "config.json", "model.safetensors"} | figures


def test_the_second_stage_s_head_gives_the_same_bits(trained_run, folder):
    run, loaded = classifier.load(trained_run.workdir), mfm.load(folder)
    np.testing.assert_array_equal(loaded.probabilities(IMAGES), run.probabilities(IMAGES))
    assert (loaded.facts, loaded.step, loaded.class_names) == (run.facts, run.step, run.class_names)
    np.testing.assert_array_equal(loaded.sets.thresholds, run.sets.thresholds)
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    assert weights.keys() >= {"params.head.kernel", "params.stem.kernel", "batch_stats.stem_norm.mean"}
    assert {str(tensor.dtype) for tensor in weights.values()} == {"float32"}


@pytest.mark.parametrize("method", ["ldam", "tau_norm", slow("posthoc_la")])
def test_a_posthoc_step_is_in_the_weights_and_is_not_done_twice(method, trained_run, folder, tmp_path):
    """The same run's files, as of a method that changes the head after training, or whose head is a cosine."""
    run = tmp_path / method
    shutil.copytree(trained_run.workdir, run)
    for name in ("config", "results"):
        content = json.loads((run / f"{name}.json").read_text())
        content["method"] = content["method"] | {"name": method} if name == "config" else method
        (run / f"{name}.json").write_text(json.dumps(content))
    hub.lay_out(run, tmp_path / "hub", "best")
    expected = classifier.load(run, "best").probabilities(IMAGES)
    np.testing.assert_array_equal(mfm.load(tmp_path / "hub", "best").probabilities(IMAGES), expected)
    assert np.abs(expected - mfm.load(folder).probabilities(IMAGES)).max() > 1e-3
    assert mfm.load(tmp_path / "hub").sets is None  # validation chose this checkpoint
    assert head(tmp_path / "hub")["license"] == "unknown"
    assert "epoch best on validation" in (tmp_path / "hub" / "README.md").read_text()


@pytest.mark.parametrize("tune", ["adapters", "lora"])
def test_a_network_with_adapters_or_merged_and_without_batch_statistics_is_read_again(tune, folder, tmp_path):
    config = config_lib.resolve(tiny(model__name="vit_b16", model__width=16, model__tune=tune))
    facts = dataclasses.replace(mfm.load(folder).facts, image_shape=(16, 16, 1))
    module = classifier.tested.of(config, np.asarray(facts.train_class_counts)).module
    image, rng = np.zeros((1, 16, 16, 1), np.float32), np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), image)
    shapes = {"params": jax.eval_shape(models.merged, shapes["params"])}
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    hub_folder.write(tmp_path, Stored(config, facts, "last", 7, variables, None), {})
    found = mfm.load(tmp_path).variables
    jax.tree.map(np.testing.assert_array_equal, found, {"batch_stats": {}, **variables})
    assert ("adapter_up" in found["params"]["block1"]) == (tune == "adapters")
    assert "lora_query" not in found["params"]["block1"]


def test_the_config_tells_what_the_classifier_takes(trained_run, folder):
    found = json.loads((folder / "config.json").read_text())
    assert (found["library_name"], found["architecture"], found["num_classes"]) == ("mfm_jax", "resnet8", 10)
    assert (found["class_names"], found["image_shape"]) == (list("0123456789"), [8, 8, 1])
    facts = classifier.load(trained_run.workdir).facts
    assert (found["mean"], found["std"]) == (list(facts.mean), list(facts.std))
    assert (found["method"], found["step"]) == ("crt", trained_run.results["last"]["step"])
    assert found["run_config"]["method"] == trained_run.config.to_dict()["method"]


def test_no_place_of_the_machine_is_published():
    config = tiny(data__root="/home/me/pictures", model__init_from="/home/me/runs/first", data__source="folder")
    config = hub_folder.published(config_lib.resolve(config))
    assert (config.data.root, config.model.init_from, config.data.source) == ("", "first", "folder")
    assert "/home" not in json.dumps(config.to_dict())


def test_the_front_matter_has_the_results(trained_run, folder):
    found, last = head(folder), trained_run.results["last"]["test"]
    assert (found["license"], found["library_name"]) == ("cc-by-4.0", "mfm_jax")
    assert found["pipeline_tag"] == "image-classification"
    assert {"long-tailed-recognition", "crt"} <= set(found["tags"])
    (model,) = found["model-index"]
    (result,) = model["results"]
    assert model["name"] == "resnet8-crt"
    assert result["task"]["type"] == "image-classification"
    assert [result["dataset"][name] for name in ("name", "type", "split")] == ["digits", "digits", "test"]
    assert result["dataset"]["args"] == {"protocol": "meta_held_out", "imbalance_factor": 10.0}
    values = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert values["Balanced accuracy"] == pytest.approx(last["balanced_accuracy"], abs=1e-6)
    assert values["Accuracy, rarest third"] == pytest.approx(last["rarest_third"], abs=1e-6)
    assert set(found["metrics"]) <= {metric["type"] for metric in result["metrics"]}


def test_the_card_shows_its_figures(folder):
    page = (folder / "README.md").read_text()
    for name in ("classes", "curves", "reliability"):
        assert page.count(f"](figures/{name}.png)") == 1
        with Image.open(folder / "figures" / f"{name}.png") as picture:
            assert picture.width > 700
    assert 'mfm.load("FOLDER")' in page
    assert page.endswith("--license=cc-by-4.0\n")


def test_it_can_be_laid_out_again_but_not_over_a_run(trained_run, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "again")
    hub.lay_out(trained_run.workdir, tmp_path / "again")
    assert head(tmp_path / "again")["license"] == "unknown"
    with pytest.raises(UserError, match=r"--hub=.*: holds a run; choose another folder"):
        hub.lay_out(trained_run.workdir, trained_run.workdir)


def test_flags_that_do_not_go_together(trained_run, tmp_path, capsys):
    run = f"--workdir={trained_run.workdir}"
    for flags in ([f"--hub={tmp_path}", "--onnx"], ["--license=mit"]):
        with pytest.raises(SystemExit):
            export.main(["export", run, *flags])
        assert capsys.readouterr().err.startswith("error: --")
    assert not list(tmp_path.iterdir())


# --- what is refused --------------------------------------------------------------------------------


def test_the_best_checkpoint_is_not_in_a_folder_of_the_last(folder):
    with pytest.raises(classifier.NoBest, match="has the last checkpoint alone"):
        mfm.load(folder, "best")


@pytest.mark.parametrize("what", ["weights cut", "weights of another", "config absent", "config cut", "old config"])
def test_a_damaged_folder_is_told(what, folder, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(folder, out)
    config, weights = out / "config.json", out / "model.safetensors"
    content = json.loads(config.read_text())
    told = "damaged, or not laid out"
    if what == "weights cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif what == "weights of another":
        found = safetensors.numpy.load_file(weights)
        safetensors.numpy.save_file(found | {"params.head.bias": np.zeros(9, np.float32)}, weights)
        told = "model.safetensors is not of the classifier in the config"
    elif what == "config absent":
        config.unlink()
        told = "has no config.json"
    elif what == "config cut":
        config.write_text(config.read_text()[:500])
    else:
        config.write_text(json.dumps(content | {"run_config": {"models": {}}}))
        told = "of another version of mfm_jax: models: no such field"
    with pytest.raises(UserError, match=told) as caught:
        mfm.load(out)
    assert "\n" not in str(caught.value)


def test_weights_that_differ_are_told(folder):
    loaded = mfm.load(folder)
    other = loaded._replace(probabilities=lambda images: loaded.probabilities(images)[:, ::-1])
    with pytest.raises(RuntimeError, match=r"model.safetensors: its probabilities differ from the checkpoint's by"):
        hub.check("model.safetensors", loaded, other.probabilities)


def test_prediction_sets_survive(folder):
    found = json.loads((folder / "config.json").read_text())["prediction_sets"]
    np.testing.assert_array_equal(conformal.from_dict(found).pools, mfm.load(folder).sets.pools)
