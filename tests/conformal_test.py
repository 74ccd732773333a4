"""Prediction sets: thresholds and pools by hand, the promise over exchangeable draws, and what a run leaves."""

import csv

import numpy as np
import pytest
from helpers import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mfm_jax import predict
from mfm_jax.evaluation import conformal
from mfm_jax.workdir.files import Workdir, read_object

COUNTS = np.array([500, 50, 5])


def two_classes(own):
    """Returns probabilities and labels: images of class 0 with probability `own` of it, and as many of class 1."""
    own = np.array(own)
    of_first = np.stack([own, 1 - own], axis=1)
    return np.concatenate([of_first, of_first[:, ::-1]]), np.repeat([0, 1], len(own))


@pytest.mark.parametrize(
    ("coverage", "images"), [(0.5, 1), (0.75, 3), (0.8, 4), (0.9, 9), (0.95, 19), (0.99, 99), (0.999, 999)]
)
def test_the_fewest_images_of_a_threshold(coverage, images):
    assert conformal.least_images(coverage) == images


@pytest.mark.parametrize(
    ("coverage", "threshold"),
    [
        (0.8, 0.2),  # rank 4 of 4: the lowest
        (0.6, 0.4),  # rank 3
        (0.7, 0.3),  # rank 3.5, half-way between 0.4 and 0.2
        (0.5, 0.5),  # rank 2.5, between 0.6 and 0.4
        (0.9, 0.0),  # nine images are needed, and both classes have eight together
    ],
)
def test_thresholds_by_hand(coverage, threshold):
    probs, labels = two_classes([0.8, 0.2, 0.6, 0.4])
    sets = conformal.fit(probs, labels, np.array([200, 200]), coverage)
    if threshold:
        np.testing.assert_array_equal(sets.pools, [0, 1])
    np.testing.assert_allclose(sets.thresholds, threshold, atol=1e-12)


def test_equal_probabilities_are_in_the_set():
    probs, labels = two_classes([0.7] * 9)
    sets = conformal.fit(probs, labels, np.array([200, 200]), 0.9)
    np.testing.assert_array_equal(sets.members(probs).sum(axis=1), 1)
    np.testing.assert_array_equal(sets.members(np.array([[0.5, 0.5]])), [[False, False]])


@pytest.mark.parametrize(
    ("images", "counts", "found"),
    [
        ([9, 9, 9], [500, 50, 5], [0, 1, 2]),
        ([5, 4, 9], [500, 400, 5], [0, 0, 1]),  # two of the head together
        ([9, 4, 9], [500, 400, 5], [0, 0, 1]),  # what is left of a group joins its last pool
        ([4, 9, 9], [500, 50, 5], [0, 0, 1]),  # a whole group that is too small joins the next
        ([9, 9, 3], [500, 50, 5], [0, 1, 1]),  # the last one the pool before
        ([9, 0, 9], [5, 50, 500], [1, 1, 0]),  # by training count, whatever the numbers of the classes
        ([2, 2, 2], [500, 50, 5], [0, 0, 0]),
        ([0, 0, 0], [500, 50, 5], [0, 0, 0]),
    ],
)
def test_pools_by_hand(images, counts, found):
    np.testing.assert_array_equal(conformal.pools(np.array(images), np.array(counts), 9), found)


def test_too_few_images_make_whole_sets():
    sets = conformal.fit(np.full((2, 3), 1 / 3), np.array([0, 1]), COUNTS, 0.9)
    assert sets.members(np.array([[1.0, 0.0, 0.0]])).all()


def test_what_is_measured_by_hand():
    sets = conformal.Sets(0.9, np.array([0.5, 0.3, 0.3]), np.arange(3))
    probs = np.array([[0.6, 0.3, 0.1], [0.4, 0.3, 0.3], [0.4, 0.2, 0.4], [0.4, 0.2, 0.4], [0.45, 0.28, 0.27]])
    found = conformal.measure(sets, probs, np.array([0, 0, 2, 1, 1]), COUNTS)
    assert found == {
        "all": {"images": 5, "covered": 2, "size": 6 / 5, "empty": 1},
        "many": {"images": 2, "covered": 1, "size": 2.0, "empty": 0},
        "medium": {"images": 2, "covered": 0, "size": 0.5, "empty": 1},
        "few": {"images": 1, "covered": 1, "size": 1.0, "empty": 0},
    }
    assert "few" not in conformal.measure(sets, probs[:2], np.array([0, 1]), COUNTS)


def drawn(rng, images, classes):
    """Returns probabilities of a classifier that is better at some classes than at others, and labels."""
    labels = rng.integers(0, classes, images)
    logits = rng.normal(size=(images, classes))
    logits[np.arange(images), labels] += np.linspace(3, 0.5, classes)[labels]
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), labels


@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_the_promise_is_kept_in_every_class(coverage):
    """Also where a rank lies between two images; over 400 calibrations with 12 images a class."""
    rng, covered, tested = np.random.default_rng(0), np.zeros(3), np.zeros(3)
    for _ in range(400):
        probs, labels = drawn(rng, 2_000, 3)
        chosen = np.concatenate([np.flatnonzero(labels == k)[:12] for k in range(3)])
        sets = conformal.fit(probs[chosen], labels[chosen], COUNTS, coverage)
        rest = np.setdiff1d(np.arange(len(labels)), chosen)
        hit = sets.members(probs[rest])[np.arange(len(rest)), labels[rest]]
        covered += np.bincount(labels[rest], hit, 3)
        tested += np.bincount(labels[rest], minlength=3)
    np.testing.assert_allclose(covered / tested, coverage, atol=0.015)


@given(st.integers(0, 2**32 - 1), st.integers(0, 60))
@settings(max_examples=50, deadline=None)
def test_more_coverage_never_makes_a_set_smaller(seed, images):
    """Of two classes in one pool, whatever the promise."""
    rng = np.random.default_rng(seed)
    probs, labels = drawn(rng, images, 2)
    labels[:] = 0  # the other has no image, and so no threshold of its own
    found = [conformal.fit(probs, labels, np.array([30, 20]), coverage) for coverage in (0.5, 0.7, 0.9, 0.99)]
    thresholds = np.array([sets.thresholds for sets in found])
    assert (thresholds[:, 0] == thresholds[:, 1]).all()
    assert (np.diff(thresholds[:, 0]) <= 0).all()


def test_a_run_has_sets_that_prediction_names(trained_run, tmp_path):
    """Of its last checkpoint; those of the best would be chosen by what they promise about."""
    found = trained_run.results["last"]["prediction_sets"]
    assert found["coverage"] == trained_run.config.eval.coverage == 0.9
    assert found["measured"]["test"]["all"]["images"] == trained_run.results["last"]["test"]["num_examples"]
    last, best = (predict.load(trained_run.workdir, which) for which in ("last", "best"))
    if trained_run.results["best"]["step"] != trained_run.results["last"]["step"]:
        assert best.sets is None
    np.testing.assert_array_equal(last.sets.thresholds, found["thresholds"])
    Image.effect_noise((8, 8), 90).save(tmp_path / "one.png")
    (tmp_path / "two.png").write_bytes(b"no picture")
    predict.write_csv(last, [tmp_path], tmp_path / "out.csv", all_classes=True, workers=0)
    with (tmp_path / "out.csv").open() as file:
        one, two = csv.DictReader(file)
    probs = np.array([float(one[f"probability of {name}"]) for name in last.class_names])
    inside = [last.class_names[k] for k in np.argsort(-probs) if probs[k] >= last.sets.thresholds[k]]
    assert (one["set"], one["set_size"]) == (" | ".join(inside), str(len(inside)))
    assert (two["set"], two["set_size"]) == ("", "")
    page = Workdir(trained_run.workdir).report.read_text()
    assert 'id="sets"' in page
    assert read_object(Workdir(trained_run.workdir).results)["last"]["prediction_sets"] == found


def test_the_page_has_what_was_measured():
    folder = REPOSITORY / "docs" / "results"
    with (folder / "coverage.csv").open() as file:
        rows = list(csv.DictReader(file))
    page = (folder / "coverage.md").read_text()
    for row in rows:
        assert row["held"] == "True"
        mean, std, low, high = (f"{100 * float(row[name]):.1f}" for name in ("coverage", "coverage_std", "low", "high"))
        start = f"| {row['run']} | {row['per_class']} | {row['group']} | {int(row['images']):,} |"
        assert f"{start} {mean} ± {std} | [{low}, {high}] | {float(row['size']):.2f} |" in page
    assert page.count("| digits |") + page.count("| cifar10_small |") + page.count("| plankton |") == len(rows)
