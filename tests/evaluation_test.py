"""A trained run is evaluated again, on its splits and on folders of pictures, and its own results stay as they are."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from helpers import changed
from PIL import Image

from mfm_jax import data as data_lib
from mfm_jax.config import Eval
from mfm_jax.data import digits, walk
from mfm_jax.data.formats import FORMATS
from mfm_jax.errors import UserError
from mfm_jax.inference import evaluate as evaluation
from mfm_jax.workdir import integrity
from mfm_jax.workdir.files import Workdir

pytestmark = pytest.mark.usefixtures("one_device")


def same(found: dict, recorded: dict) -> None:
    assert found["confusion"] == recorded["confusion"]
    assert found["nll"] == pytest.approx(recorded["nll"], abs=1e-5)
    assert found["few"] == recorded["few"]


def test_gives_the_numbers_of_training_and_touches_none_of_its_files(trained_run):
    config, workdir, recorded = trained_run
    before = dict(integrity.digests(workdir))
    for split in ("test", "val"):
        results, page = evaluation.evaluate_run(config, workdir, split)
        assert page == workdir / "eval" / split / "report.html"
        assert json.loads((page.parent / "results.json").read_text()) == json.loads(json.dumps(results))
        for which in ("last", "best"):
            assert all(results[which][name] == recorded[which][name] for name in ("step", "epoch"))
            same(results[which][split], recorded[which][split])
    after = dict(integrity.digests(workdir))
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
    """The test split as files, without suffixes, in other formats, behind links, and what is no picture beside them."""
    data = data_lib.build(trained_run.config)
    root = tmp_path / "mine"
    for i, (pixels, label) in enumerate(zip(data.test_images, data.test_labels, strict=True)):
        path = root / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.squeeze()).save(path)
    for path in sorted((root / "5").iterdir()):
        path.rename(path.with_suffix(""))
    for path in sorted((root / "6").iterdir()):
        Image.open(path).save(path.with_suffix(".jp2"))  # without loss
        path.unlink()
    for name, linked in (("3", root / "3" / "more"), ("4", root / "4")):
        (root / name).rename(tmp_path / f"elsewhere-{name}")
        linked.parent.mkdir(exist_ok=True)
        linked.symlink_to(tmp_path / f"elsewhere-{name}")
    for name in ("7/broken.png", "7/x.heic", "stray.png", "8/notes.txt", "@eaDir/0.png", ".ipynb_checkpoints/0.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"?")
    (root / "9" / "all").symlink_to(root)
    return root


def test_a_class_without_pictures_is_told(trained_run, folder, tmp_path, capsys):
    shutil.rmtree(folder / "2")
    (folder / "2").mkdir()
    results, _ = evaluation.evaluate_run(trained_run.config, trained_run.workdir, folder=folder, out=tmp_path / "out")
    assert sum(results["last"]["outside"]["confusion"][2]) == 0
    assert "warning: no picture of '2'; means over classes leave them out\n" in capsys.readouterr().err


def test_folders_of_pictures_give_the_numbers_of_their_pixels_without_the_data(trained_run, folder, monkeypatch):
    monkeypatch.setattr(digits, "load", None)
    config, workdir, recorded = trained_run
    results, page = evaluation.evaluate_run(config, workdir, folder=folder)
    assert page.parent == workdir / "eval" / "outside-mine"
    assert {Path(path).relative_to(folder).as_posix(): reason for path, reason in results["unread"].items()} == {
        "7/broken.png": f"not an image ({', '.join(FORMATS).lower()})",
        "7/x.heic": "no decoder for HEIC here; convert it to PNG or JPEG",
        "9/all": "a link to a folder that it lies in",
        "stray.png": "lies in no class folder",
    }
    assert results["passed_over"] == {"hidden": 1, "thumbnails": 1, walk.NOT_A_PICTURE: 1}
    for which in ("last", "best"):
        same(results[which]["outside"], recorded[which]["test"])
    text = page.read_text()
    assert "Outside, last epoch" in text
    assert "4 files of the folder could not be read; results.json has the reasons under unread." in text
    assert "In the folder passed over: 1 hidden, 1 not a picture by its name, 1 thumbnails." in text


def test_other_classes_are_refused_by_name(trained_run, folder):
    (folder / "7").rename(folder / "seven")
    shutil.rmtree(folder / "2")
    (folder / "2").symlink_to("nowhere")
    message = r"not the classes of the run \(missing: 2, 7; unknown: seven\); a class without .*/2: a link to"
    with pytest.raises(UserError, match=message):
        evaluation.evaluate_run(trained_run.config, trained_run.workdir, folder=folder)


def test_classes_are_found_by_either_form_of_their_names(trained_run, folder, tmp_path):
    config, workdir, recorded = trained_run
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    facts = json.loads((copy / "classifier.json").read_text())
    facts["class_names"][0], facts["class_names"][1] = "caf\u00e9", "cafe\u0301 2"
    (copy / "classifier.json").write_text(json.dumps(facts))
    (folder / "0").rename(folder / "cafe\u0301")
    (folder / "1").rename(folder / "caf\u00e9 2")
    results, _ = evaluation.evaluate_run(config, copy, folder=folder)
    same(results["last"]["outside"], recorded["last"]["test"])
    (folder / "cafe\u0301").rename(folder / "Caf\u00e9 ")
    with pytest.raises(UserError, match=r"'Caf. ' is a class that looks like 'caf\\xe9', itself 'Caf\\xe9 '; rename"):
        evaluation.evaluate_run(config, copy, folder=folder)


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
