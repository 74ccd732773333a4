"""Wrong labels: how many, of which classes, of which images; without them all is as it was."""

import dataclasses
import json

import chex
import numpy as np
import pytest
from helpers import tiny

from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax.data import noise
from mfm_jax.data.manifest import noise_in_words, protocol_in_words, write_manifest
from mfm_jax.errors import UserError
from mfm_jax.evaluation import results
from mfm_jax.evaluation.results import Answers
from mfm_jax.training import train

LABELS = np.repeat([0, 1, 2], [100, 20, 3])


def built(**overrides):
    return data_lib.build(config_lib.resolve(tiny(**overrides)))


def confusion(true, found, num_classes):
    return np.bincount(num_classes * true + found, minlength=num_classes**2).reshape(num_classes, num_classes)


def test_of_each_class_the_share_rounded_down_is_wrong():
    matrix = confusion(LABELS, noise.changed(LABELS, 3, 0.29, "symmetric", 0), 3)
    assert np.diag(matrix).tolist() == [71, 15, 3]  # without 29, 5.8 and 0.87
    assert matrix.sum(axis=1).tolist() == [100, 20, 3]
    assert noise.changed(np.arange(5), 5, 0.9, "symmetric", 0).tolist() == [0, 1, 2, 3, 4]  # no class loses all


def test_symmetric_noise_goes_to_every_other_class_alike():
    labels = np.repeat(np.arange(4), 4000)
    matrix = confusion(labels, noise.changed(labels, 4, 0.75, "symmetric", 0), 4)
    assert (np.diag(matrix) == 1000).all()
    others = matrix[~np.eye(4, dtype=bool)]
    assert np.abs(others - 1000).max() < 4 * np.sqrt(3000 * 1 / 3 * 2 / 3)  # four deviations of the binomial


def test_proportional_noise_goes_to_classes_by_their_sizes():
    labels = np.repeat(np.arange(3), [6000, 3000, 1000])
    matrix = confusion(labels, noise.changed(labels, 3, 0.5, "proportional", 0), 3)
    assert np.diag(matrix).tolist() == [3000, 1500, 500]
    # Class 0's 3000 go to 1 and 2 as 3 to 1, class 1's 1500 to 0 and 2 as 6 to 1.
    assert matrix[0, 1] == pytest.approx(2250, abs=4 * np.sqrt(3000 * 3 / 16))
    assert matrix[1, 0] == pytest.approx(1500 * 6 / 7, abs=4 * np.sqrt(1500 * 6 / 49))


def test_noise_by_confusion_goes_to_the_class_with_the_nearest_mean_image():
    images = np.array([10, 30, 50, 90, 40, 61], np.uint8).reshape(6, 1, 1, 1)
    confused = noise.nearest(images, np.array([0, 0, 1, 1, 2, 2]), 3)  # means 20, 70 and 50.5
    assert confused.tolist() == [2, 2, 1]
    matrix = confusion(LABELS, noise.changed(LABELS, 3, 0.4, "confusion", 0, confused), 3)
    assert matrix.tolist() == [[60, 0, 40], [0, 12, 8], [0, 1, 2]]


def test_the_draw_is_of_the_seed():
    first, again, other = (noise.changed(LABELS, 3, 0.4, "symmetric", seed) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert not np.array_equal(first, other)
    # More noise has the wrong labels of less.
    assert set(np.flatnonzero(noise.changed(LABELS, 3, 0.2, "symmetric", 0) != LABELS)) < set(
        np.flatnonzero(first != LABELS)
    )


@pytest.mark.parametrize("kind", ["symmetric", "proportional", "confusion"])
def test_labels_of_training_images_alone_are_changed(kind):
    plain, noisy = built(), built(data__label_noise=0.4, data__noise_kind=kind)
    for name in ("meta", "val", "test"):
        chex.assert_trees_all_equal(getattr(noisy, f"{name}_labels"), getattr(plain, f"{name}_labels"))
        chex.assert_trees_all_equal(getattr(noisy, f"{name}_images"), getattr(plain, f"{name}_images"))
    chex.assert_trees_all_equal(noisy.train_images, plain.train_images)
    chex.assert_trees_all_equal(noisy.true_labels, plain.train_labels)
    wrong = noisy.train_labels != noisy.true_labels
    assert np.bincount(noisy.true_labels[wrong], minlength=10).tolist() == [int(0.4 * n) for n in plain.counts]
    chex.assert_trees_all_equal(noisy.counts, np.bincount(noisy.train_labels))  # what a method sees
    chex.assert_trees_all_equal(noisy.wrong_images, noisy.train_images[wrong])
    chex.assert_trees_all_equal(noisy.wrong_labels, noisy.train_labels[wrong])
    ids = np.array(noisy.manifest["splits"]["train"]["ids"])
    assert noisy.manifest["noise"] == {"ids": ids[wrong].tolist(), "labels": noisy.train_labels[wrong].tolist()}
    assert noisy.manifest["splits"]["train"]["class_counts"] == noisy.counts.tolist()
    half = np.arange(len(ids)) % 2 == 0
    fold = noisy.manifest | {"splits": {"train": {"ids": ids[half].tolist()}}}
    assert noise_in_words(noisy.manifest) == f"{wrong.sum()} of {len(wrong)} training labels are wrong ({kind} noise)"
    assert noise_in_words(fold).startswith(f"{wrong[half].sum()} of {half.sum()} training labels")
    assert protocol_in_words(noisy.manifest).endswith(f"; {noise_in_words(noisy.manifest)}")


def test_meta_images_that_are_trained_on_keep_their_labels():
    held, both = built(data__label_noise=0.4), built(data__label_noise=0.4, data__train_on_meta=True)
    assert len(both.train_labels) == len(held.train_labels) + len(held.meta_labels)
    assert both.manifest["noise"] == held.manifest["noise"]


def test_without_noise_the_manifest_says_nothing_of_it():
    plain = built()
    assert plain.true_labels.tolist() == plain.train_labels.tolist()
    assert not {"label_noise", "noise_kind", "noise"} & plain.manifest.keys()
    assert noise_in_words(plain.manifest) == ""


@pytest.mark.parametrize("kind", ["symmetric", "confusion"])
def test_a_manifest_brings_the_wrong_labels_back(tmp_path, kind):
    options = {"data__label_noise": 0.3, "data__noise_kind": kind}
    fresh = built(**options)
    write_manifest(fresh.manifest, tmp_path / "m.json")
    reused = built(data__manifest=str(tmp_path / "m.json"), **options)
    chex.assert_trees_all_equal(dataclasses.asdict(reused), dataclasses.asdict(fresh))
    other = "symmetric" if kind == "confusion" else "confusion"
    for change, line in (
        ({"data__label_noise": 0.2}, r"data.label_noise = 0.2: the manifest .* was made with 0.3; set"),
        (
            {"data__label_noise": 0.0, "data__noise_kind": "symmetric"},
            r"data.label_noise = 0.0: the manifest .* with 0",
        ),
        ({"data__noise_kind": other}, rf"data.noise_kind = '{other}': the manifest .* was made with '{kind}'"),
    ):
        with pytest.raises(UserError, match=line):
            built(data__manifest=str(tmp_path / "m.json"), **{**options, **change})
    write_manifest(built().manifest, tmp_path / "clean.json")
    with pytest.raises(UserError, match=r"data.label_noise = 0.3: the manifest .* was made with 0; set"):
        built(data__manifest=str(tmp_path / "clean.json"), **options)


def test_streamed_images_get_the_same_wrong_labels():
    resident, streamed = (built(data__label_noise=0.4, data__resident_mb=mb) for mb in (4096, 0))
    chex.assert_trees_all_equal(streamed.train_labels, resident.train_labels)
    with pytest.raises(UserError, match=r"data.noise_kind = 'confusion': compares all images at once; raise data.res"):
        built(data__label_noise=0.4, data__noise_kind="confusion", data__resident_mb=0)


def test_what_does_not_go_with_wrong_labels_is_refused():
    for options in ({"data__protocol": "full"}, {"data__protocol": "natural", "data__val_images_per_class": 0}):
        with pytest.raises(UserError, match=r"data.label_noise = 0.4: the meta set is redrawn from the training"):
            built(data__label_noise=0.4, **options)
    with pytest.raises(UserError, match=r"data.label_noise = 0.4: data.pretext = 'rotation' reads no class"):
        built(data__label_noise=0.4, data__pretext="rotation", method__name="ce")
    with pytest.raises(UserError, match=r"data.label_noise"):
        built(data__label_noise=0.95)


def test_what_a_classifier_makes_of_the_wrong_labels_by_hand():
    found = built(data__label_noise=0.4)
    wrong = found.train_labels != found.true_labels
    named = np.where(np.arange(wrong.sum()) % 4 == 0, found.true_labels[wrong], found.train_labels[wrong])
    said = results.of_wrong_labels(found, Answers(np.eye(10)[named], found.wrong_labels))
    quarter = -(-len(named) // 4) / len(named)
    assert said == {
        "wrong": wrong.sum(),
        "images": len(wrong),
        "named_true": pytest.approx(quarter),
        "named_wrong": pytest.approx(1 - quarter),
    }


def test_a_run_says_how_many_labels_are_wrong(quick_runs, tmp_path):
    found = train.train_and_evaluate(tiny(data__label_noise=0.4, method__name="ce", train__epochs=1), tmp_path)
    data = built(data__label_noise=0.4)
    assert (found["label_noise"]["wrong"], found["label_noise"]["images"]) == (
        len(data.wrong_labels),
        len(data.train_labels),
    )
    assert 0 <= found["label_noise"]["named_true"] + found["label_noise"]["named_wrong"] <= 1
    assert "<dt>Wrong labels</dt>" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "manifest.json").read_text()) == data.manifest
    plain = train.train_and_evaluate(tiny(method__name="ce", train__epochs=1), tmp_path / "plain")
    assert "label_noise" not in plain
