"""A trained run is evaluated again, on its splits and on folders of pictures, and its own results stay as they are."""

import dataclasses
import json
import shutil

import jax
import pytest
from helpers import changed
from PIL import Image

from mfm_jax import data as data_lib
from mfm_jax.config import Eval
from mfm_jax.data import digits
from mfm_jax.errors import UserError
from mfm_jax.inference import evaluate as evaluation
from mfm_jax.workdir import integrity
from mfm_jax.workdir.files import Workdir


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def same(found: dict, recorded: dict) -> None:
    assert found["confusion"] == recorded["confusion"]
    assert found["nll"] == pytest.approx(recorded["nll"], abs=1e-5)
    assert found["few"] == recorded["few"]


def test_gives_the_numbers_of_training_and_touches_none_of_its_files(trained_run):
    config, workdir, recorded = trained_run
    before = dict(integrity._digests(workdir))
    for split in ("test", "val"):
        results, page = evaluation.evaluate_run(config, workdir, split)
        assert page == workdir / "eval" / split / "report.html"
        assert json.loads((page.parent / "results.json").read_text()) == json.loads(json.dumps(results))
        for which in ("last", "best"):
            assert (results[which]["step"], results[which]["epoch"]) == (
                recorded[which]["step"],
                recorded[which]["epoch"],
            )
            same(results[which][split], recorded[which][split])
    after = dict(integrity._digests(workdir))
    assert {name: digest for name, digest in after.items() if not name.startswith("eval/")} == before


def test_without_being_asked_the_split_that_the_run_shows_is_read(trained_run, tmp_path, capsys):
    undecided = dataclasses.replace(trained_run.config, eval=Eval(test=False))
    for config, split in ((trained_run.config, "test"), (undecided, "val")):
        workdir = tmp_path / split
        shutil.copytree(trained_run.workdir, workdir)
        (workdir / "config.json").write_text(json.dumps(config.to_dict()))
        (workdir / "results.json").unlink()
        assert evaluation.evaluate_run(config, workdir)[0]["split"] == split
        assert f"the run in {workdir} has not finished; this is its step" in capsys.readouterr().err


def test_a_folder_of_pictures_may_have_been_given_another_name(trained_run):
    """`data.root` is not compared, and the name that the manifest takes from it is not either; other images are."""
    _, workdir, _ = trained_run
    manifest = json.loads((workdir / "manifest.json").read_text())
    Workdir(workdir).check_split({**manifest, "dataset": "another name"})
    with pytest.raises(UserError, match="not what this run began with"):
        Workdir(workdir).check_split({**manifest, "version": "2"})


def test_the_training_split_has_a_report_of_its_own(trained_run, tmp_path):
    results, page = evaluation.evaluate_run(trained_run.config, trained_run.workdir, "train", out=tmp_path / "here")
    assert results["last"]["train"]["num_examples"] == len(data_lib.build(trained_run.config).train_labels)
    assert page.parent == tmp_path / "here"
    assert "Training split, last epoch." in page.read_text()


@pytest.fixture
def folder(trained_run, tmp_path):
    """The test split as files, one without a suffix, a class behind a link, and a file that is no picture."""
    data = data_lib.build(trained_run.config)
    root = tmp_path / "mine"
    for i, (pixels, label) in enumerate(zip(data.test_images, data.test_labels, strict=True)):
        path = root / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.squeeze()).save(path)
    (root / "7" / "broken.png").write_bytes(b"?")
    first = min((root / "7").iterdir())
    first.rename(first.with_suffix(""))
    (root / "3").rename(tmp_path / "elsewhere")
    (root / "3").mkdir()
    (root / "3" / "more").symlink_to(tmp_path / "elsewhere")
    return root


def test_folders_of_pictures_give_the_numbers_of_their_pixels_without_the_data(trained_run, folder, monkeypatch):
    monkeypatch.setattr(digits, "load", None)
    config, workdir, recorded = trained_run
    (folder / ".ipynb_checkpoints").mkdir()
    results, page = evaluation.evaluate_run(config, workdir, folder=folder)
    assert page.parent == workdir / "eval" / "outside-mine"
    assert results["unread"].keys() == {str(folder / "7" / "broken.png")}
    assert all(reason.startswith("not an image") for reason in results["unread"].values())
    for which in ("last", "best"):
        same(results[which]["outside"], recorded[which]["test"])
    assert "Outside, last epoch" in page.read_text()


def test_other_classes_are_refused_by_name(trained_run, folder):
    (folder / "7").rename(folder / "seven")
    shutil.rmtree(folder / "2")
    with pytest.raises(
        UserError, match=r"not the classes of the run \(missing: 2, 7; unknown: seven\); a class without"
    ):
        evaluation.evaluate_run(trained_run.config, trained_run.workdir, folder=folder)


def test_what_is_not_the_run_s_is_refused(trained_run, tmp_path):
    config, workdir, _ = trained_run
    with pytest.raises(UserError, match=r"belongs to another config \(train.seed: 0 -> 1\)"):
        evaluation.evaluate_run(changed(config, train={"seed": 1}), workdir)
    # A run's own weights are evaluated, never in silence those of a file.
    with pytest.raises(UserError, match=r"belongs to another config \(model.pretrained: \"\" -> \"w.npz\"\)"):
        evaluation.evaluate_run(changed(config, model={"pretrained": "w.npz"}), workdir)
    with pytest.raises(UserError, match=r"--out=.*: holds a run; choose another folder"):
        evaluation.evaluate_run(config, workdir, out=workdir)
    with pytest.raises(UserError, match=r"no such folder"):
        evaluation.evaluate_run(config, workdir, folder=tmp_path / "nowhere")
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    manifest = data_lib.build(changed(config, data={"seed": 1})).manifest
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"the data or its split is not what this run began with"):
        evaluation.evaluate_run(config, copy)


def test_the_data_may_have_moved(trained_run, tmp_path):
    config = changed(trained_run.config, data={"root": "elsewhere"}, eval={"batch_size": 7})
    results, _ = evaluation.evaluate_run(config, trained_run.workdir, "val", out=tmp_path)
    same(results["last"]["val"], trained_run.results["last"]["val"])
