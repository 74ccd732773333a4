"""Folds that hold out every image once, what is suspected of being wrong, the table and the page."""

import csv
import shutil
import sys

import numpy as np
import pytest
from helpers import STRANGE_NAMES, benchmark, tiny
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mfm_jax import audit
from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax.data.manifest import check_leakage, manifest_hash, read_manifest
from mfm_jax.errors import UserError
from mfm_jax.evaluation import classifier, suspects
from mfm_jax.evaluation.suspects import Suspect
from mfm_jax.machine import disk
from mfm_jax.pages import audit as page
from mfm_jax.study import folds
from mfm_jax.training import train
from mfm_jax.workdir.files import Workdir

# Folds


def test_classes_are_dealt_evenly_copies_stay_together_and_a_class_of_one_is_not_held_out():
    labels = np.array([0] * 7 + [1] * 3 + [2] + [3, 3])
    copies = [0, 0, 0, *range(3, 11), "same", "same"]
    fold = folds.deal(labels, copies, 3, seed=0)
    assert len(set(fold[:3])) == 1
    assert sorted(fold[7:10]) == [0, 1, 2]
    assert fold[10] == -1  # its only image
    assert set(fold[11:]) == {-1}  # its only image, twice
    assert np.array_equal(fold, folds.deal(labels, copies, 3, seed=0))


@given(st.lists(st.integers(0, 5), min_size=2, max_size=60), st.integers(2, 5), st.integers(0, 9))
def test_every_fold_trains_on_every_class(classes, number, seed):
    labels = np.array(classes)
    fold = folds.deal(labels, range(len(labels)), number, seed)
    for k in np.unique(labels):
        members = fold[labels == k]
        assert (members == -1).all() == (len(members) == 1)
        if len(members) > 1:
            held = np.bincount(members, minlength=number)
            assert held.max() - held.min() <= 1
            assert held.max() < len(members)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"data__val_images_per_class": 0},
        {"data__train_on_meta": True, "method__name": "ce"},
        {"data__protocol": "full"},
        {"data__protocol": "natural", "data__val_images_per_class": 0, "data__val_fraction": 0.0},
        {"data__label_noise": 0.3, "data__noise_kind": "confusion"},
    ],
    ids=lambda one: ",".join(map(str, one.values())),
)
def test_the_folds_of_a_run_hold_out_each_image_once_and_are_split_as_planned(tmp_path, overrides):
    config = config_lib.resolve(tiny(**overrides))
    data = data_lib.build(config)
    where = folds.dealt(data)
    pool = set(np.array(data.manifest["splits"]["train"]["ids"])[where].tolist())
    fold = folds.deal(data.train_labels[where], range(len(where)), 2, seed=0)
    answered = []
    for run in folds.plan(config, data, fold, tmp_path / "folds"):
        of_fold = config_lib.resolve(run.config.to_dict())  # the rules between fields allow it
        built = data_lib.build(of_fold)
        splits = built.manifest["splits"]
        check_leakage(built.manifest)
        assert splits == read_manifest(of_fold.data.manifest)["splits"]
        assert splits["test"] == data.manifest["splits"]["test"]
        assert set(splits["train"]["ids"]) | set(splits["val"]["ids"]) == pool
        assert not of_fold.eval.test
        assert built.counts.all()
        assert built.manifest.get("noise") == data.manifest.get("noise")
        answered += splits["val"]["ids"]
    assert len(answered) == len(set(answered)) == (fold >= 0).sum()


# Suspects


def test_planted_labels_are_found_though_a_rare_class_is_never_sure():
    cleanlab = pytest.importorskip("cleanlab", reason="the extra `audit` is not installed")
    assert cleanlab.__version__
    # 60 images of class 0, 12 of class 1, to which the classifier gives at most 0.6; two of each are mislabelled.
    truth = np.array([0] * 60 + [1] * 12)
    probs = np.where(truth[:, None] == [0, 1, 2], [0.9, 0.6, 0], [0.08, 0.38, 0.02]).astype(np.float32)
    probs /= probs.sum(1, keepdims=True)
    labels = truth.copy()
    planted = [3, 17, 62, 70]
    labels[planted] = 1 - truth[planted]
    found = suspects.wrong_labels(probs, labels)
    assert {one.image for one in found} == set(planted)
    assert {one.kind for one in found} == {"label"}
    assert [one.score for one in found] == sorted(float(probs[one.image, labels[one.image]]) for one in found)
    assert suspects.wrong_labels(probs, truth) == []


def test_without_cleanlab_the_way_out_is_told_before_anything_is_trained(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    with pytest.raises(UserError, match=r"cleanlab is not installed; python -m pip install .*\[audit\]"):
        audit.audit(tmp_path)


def test_outliers_and_near_duplicates():
    angle = np.linspace(0, 0.58, 30)  # neighbours 0.02 apart on the unit circle
    angle = np.concatenate([angle, [2.5, 0.101, 0.3401]])  # 0.101: 0.001 from the image 5; 0.3401: 0.0001 from 17
    length = np.random.default_rng(0).uniform(1, 5, len(angle))  # which must not matter
    features = (length * np.array([np.cos(angle), np.sin(angle)])).T
    labels = np.zeros(len(angle), int)
    labels[31] = 1
    outlier, first, second = suspects.by_features(features, labels)
    assert (outlier.kind, outlier.image, outlier.other) == ("outlier", 30, -1)
    assert outlier.score < 1 / 1.5
    assert first[:2] + first[3:] == ("near duplicate", 31, 5)  # two labels come first, though the other is nearer
    assert second[:2] + second[3:] == ("near duplicate", 32, 17)
    assert first.score == pytest.approx(0.001 / 0.02, rel=0.01)
    assert second.score == pytest.approx(0.0001 / 0.02, rel=0.01)


def test_copies_are_near_duplicates_of_score_zero():
    features = np.random.default_rng(1).normal(size=(40, 8))
    features[7] = 3 * features[2]
    (found,) = [one for one in suspects.by_features(features, np.zeros(40, int)) if one.kind == "near duplicate"]
    assert (found.image, found.other) == (7, 2)
    assert found.score == pytest.approx(0, abs=1e-6)


# The door


def test_features_are_what_the_head_reads(trained_run):
    trained = classifier.load(trained_run.workdir)
    data = data_lib.build(trained.config)
    features = trained.features(data.val_images)
    assert features.shape[0] == len(data.val_images)
    assert features.ndim == 2
    assert np.isfinite(features).all()
    assert np.unique(features, axis=0).shape[0] > 1
    np.testing.assert_allclose(trained.features(data.val_images[:3]), features[:3], rtol=1e-4, atol=1e-5)


def test_the_page_shows_the_first_of_each_kind_and_escapes_what_is_strange(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (70, 8, 8, 1), np.uint8)
    many = [Suspect("label", i, 0.01) for i in range(65)] + [Suspect("near duplicate", 66, 0.0, 65)]
    labels = (STRANGE_NAMES[0], STRANGE_NAMES[1], "0.9000", "0.0100")
    rows = [
        dict(zip(audit.HEADER, (f"{one.image}.png", *labels, one.kind, "x.png", STRANGE_NAMES[3]), strict=True))
        for one in many
    ]
    page.write(tmp_path / "a.html", "<set>", list(zip(many, rows, strict=True)), images, page.Looked(69, 3, 0.374))
    text = (tmp_path / "a.html").read_text()
    assert "65 likely wrong labels, 0 outliers, 1 near duplicates" in text
    assert text.count('<img class="thumb"') == page.SHOWN + 2
    assert "all are in suspects.csv" in text
    assert "<b>bold" not in text
    assert "<set>" not in text
    assert "90 %" in text
    assert "37.4 %" in text
    assert STRANGE_NAMES[3] in text


@pytest.mark.slow
def test_an_audit_trains_folds_once_and_leaves_a_table_and_a_page(trained_run, tmp_path, capsys):
    pytest.importorskip("cleanlab", reason="the extra `audit` is not installed")
    workdir = shutil.copytree(trained_run.workdir, tmp_path / "run")
    assert audit.main(["audit", f"--checkpoint={workdir}", "--folds=2"]) == 0
    place = Workdir(workdir).audit
    out = capsys.readouterr().out
    assert str(place / "suspects.csv") in out
    with (place / "suspects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["kind"] for row in rows} <= set(suspects.KINDS)
    ids = {str(i) for i in read_manifest(Workdir(workdir).manifest)["splits"]["train"]["ids"]}
    assert {row["picture"] for row in rows} <= ids
    done = sorted((path, path.stat().st_mtime_ns) for path in place.glob("folds2/fold?/results.json"))
    assert len(done) == 2
    before = (place / "suspects.csv").read_text()
    audit.audit(workdir, folds=2)
    assert sorted((path, path.stat().st_mtime_ns) for path in place.glob("folds2/fold?/results.json")) == done
    assert (place / "suspects.csv").read_text() == before


@pytest.fixture
def without_networks(monkeypatch):
    """Audits of a config's run, whose folds are not trained, whatever they would answer."""

    def prepare(config):
        monkeypatch.setattr(suspects, "installed", lambda: None)  # needs the extra `audit`
        monkeypatch.setattr(folds, "train", lambda planned, jobs: None)
        plain = classifier.Classifier(None, config_lib.resolve(config), 2, None, lambda x: np.full((len(x), 10), 0.1))
        plain = plain._replace(features=lambda x: x.reshape(len(x), -1) / 255)
        monkeypatch.setattr(classifier, "load", lambda *_: plain)

    return prepare


def test_an_audit_counts_the_labels_made_wrong_that_it_finds(
    quick_runs, tmp_path, monkeypatch, capsys, without_networks
):
    config = tiny(data__label_noise=0.3, method__name="ce", train__epochs=1, train__max_steps=2)
    train.train_and_evaluate(config, tmp_path / "run", pages=False)
    data = data_lib.build(config_lib.resolve(config))
    without_networks(config)
    monkeypatch.setattr(suspects, "wrong_labels", lambda *_: [Suspect("label", i, 0.1) for i in range(40)])
    audit.audit(tmp_path / "run", folds=2)
    found = (data.train_labels != data.true_labels)[:40].sum()
    assert 0 < found < 40
    said = capsys.readouterr()
    assert f"of {len(data.wrong_labels)} labels made wrong, {found} are found" in said.out
    assert "audit a run without it" not in said.err


@pytest.mark.parametrize("field", ["method.teacher", "model.init_from"])
def test_an_audit_warns_of_a_run_that_knows_the_labels(
    field, quick_runs, tmp_path, monkeypatch, capsys, without_networks
):
    config = {"method__name": "ce", "train__epochs": 1, "train__max_steps": 2}
    first = str(tmp_path / "first")
    train.train_and_evaluate(tiny(**config), first, pages=False)
    after = tiny(**config, **{field.replace(".", "__"): first})
    train.train_and_evaluate(after, tmp_path / "run", pages=False)
    without_networks(after)
    monkeypatch.setattr(suspects, "wrong_labels", lambda *_: [])
    audit.audit(tmp_path / "run", folds=2)
    assert f"warning: {field} = {first!r}: was trained on images that folds hold out" in capsys.readouterr().err


# The benchmark


def test_labels_are_planted_and_scored(tmp_path):
    for name, size in (("a", 30), ("b", 10)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(size):
            Image.new("L", (4, 4), i).save(tmp_path / "set" / name / f"{i}.png")
    pictures, run = tmp_path / "pictures", Workdir(tmp_path / "run")
    with benchmark("planted") as planted:
        wrong = planted.plant(tmp_path / "set", pictures, share=0.1, seed=0)
        assert len(wrong) == 4
        assert all((pictures / path).resolve().parent.name == true != path[0] for path, true in wrong)
        assert len(list(pictures.glob("*/*.png"))) == 40
        files = sorted(path.relative_to(pictures).as_posix() for path in pictures.glob("*/*.png"))
        run.audit.mkdir(parents=True)
        counts = [sum(path[0] == name for path in files) for name in "ab"]
        train = {"train": {"pool": "all", "ids": list(range(40)), "class_counts": counts}}
        made = {"format": 1, "files": files, "class_names": ["a", "b"], "splits": train}
        disk.write_object(run.manifest, {**made, "hash": manifest_hash(made)})
        right = next(path for path in files if path not in dict(wrong))
        flagged = [(wrong[0][0], "label"), (right, "label"), (wrong[1][0], "outlier")]
        disk.write_rows(run.audit / "suspects.csv", [("picture", "kind"), *flagged])
        row = planted.score(pictures, run.path)[0]
    assert (row["audited"], row["planted"], row["flagged"], row["found"]) == (40, 4, 2, 1)
    assert (row["precision"], row["recall"]) == (0.5, 0.25)
