"""The numbers of one evaluation: by hand, against scikit-learn, and as properties."""

import json
import math

import hypothesis
import numpy as np
import pytest
import scipy.special
import sklearn.metrics
from hypothesis import strategies as st

from mfm_jax.evaluation import metrics

GROUPS = ("many", "medium", "few", "head_third", "middle_third", "rarest_third")

# Three classes, one of each shot group. Predictions: 0 0 1 | 1 0 | 2 (the last class has one image, found).
HAND_PROBS = np.array(
    [[0.9, 0.1, 0.0], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.5, 0.4, 0.1], [0.0, 0.0, 1.0]], np.float32
)
HAND_LABELS = np.array([0, 0, 0, 1, 1, 2])
HAND_COUNTS = np.array([500, 50, 5])


def _random_case(seed: int, examples: int = 200, classes: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities without ties, every class tested, distinct counts (so no ties between groups)."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, examples - classes)])
    logits = rng.normal(size=(examples, classes)) + 1.5 * np.eye(classes)[labels]
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return probs.astype(np.float32), labels, rng.permutation(np.arange(1, classes + 1) * 40)


def test_accuracies_by_hand():
    result = metrics.evaluate(HAND_PROBS, HAND_LABELS, HAND_COUNTS)
    assert result["num_examples"] == 6
    assert result["confusion"] == [[2, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert result["per_class_accuracy"] == pytest.approx([2 / 3, 1 / 2, 1])
    assert result["accuracy"] == pytest.approx(4 / 6)
    assert result["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    for group, value in zip(GROUPS, (2 / 3, 1 / 2, 1, 2 / 3, 1 / 2, 1), strict=True):
        assert result[group] == pytest.approx(value), group
    # F1 = 2 TP / (2 TP + FP + FN): 4/6, 2/4, 1.
    assert result["macro_f1"] == pytest.approx((4 / 6 + 2 / 4 + 1) / 3)


def test_ranking_and_calibration_by_hand():
    result = metrics.evaluate(HAND_PROBS, HAND_LABELS, HAND_COUNTS)
    # Pairs (positive, negative) in the right order: class 0, 8 of 9 (0.2 < 0.5); class 1, 7 of 8 (0.4 < 0.7);
    # class 2, 5 of 5.
    assert result["roc_auc"] == pytest.approx((8 / 9 + 7 / 8 + 1) / 3)
    # Every confidence (.9 .6 .7 .8 .5 1.0) is alone in its bin; its gap is |correct - confidence|.
    assert result["ece"] == pytest.approx((0.1 + 0.4 + 0.7 + 0.2 + 0.5 + 0.0) / 6)
    assert result["nll"] == pytest.approx(-sum(map(math.log, (0.9, 0.6, 0.2, 0.8, 0.4, 1.0))) / 6)


def test_reliability_bins_by_hand():
    bins = metrics.reliability_bins(np.array([0.0, 0.25, 0.3, 1.0]), np.array([True, False, True, True]), num_bins=4)
    assert [one["count"] for one in bins] == [2, 1, 0, 1]  # 0 and 0.25 share the first bin: it is (0, 0.25] and 0
    assert bins[0]["confidence"] == pytest.approx(0.125)
    assert bins[0]["accuracy"] == pytest.approx(0.5)
    assert bins[2] == {"lower": 0.5, "upper": 0.75, "count": 0, "confidence": None, "accuracy": None}
    assert metrics.expected_calibration_error(bins) == pytest.approx((2 * 0.375 + 0.7 + 0) / 4)


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_scikit_learn(seed):
    probs, labels, counts = _random_case(seed)
    result = metrics.evaluate(probs, labels, counts)
    predictions = probs.argmax(axis=1)
    # scikit-learn insists on rows that sum to one in the precision they come in.
    normalised = probs.astype(np.float64) / probs.sum(axis=1, keepdims=True, dtype=np.float64)
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(labels, predictions),
        "balanced_accuracy": sklearn.metrics.balanced_accuracy_score(labels, predictions),
        "macro_f1": sklearn.metrics.f1_score(labels, predictions, average="macro"),
        "roc_auc": sklearn.metrics.roc_auc_score(labels, normalised, multi_class="ovr", average="macro"),
        "nll": sklearn.metrics.log_loss(labels, normalised),
    }
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, abs=1e-6), name
    recall = sklearn.metrics.recall_score(labels, predictions, average=None)
    np.testing.assert_allclose(result["per_class_accuracy"], recall, atol=1e-6)


def test_class_without_test_images_is_none_and_left_out_of_means():
    probs, labels, counts = _random_case(0)
    labels = np.where(labels == 3, 2, labels)
    result = metrics.evaluate(probs, labels, counts)
    assert result["per_class_accuracy"][3] is None
    tested = [value for value in result["per_class_accuracy"] if value is not None]
    assert len(tested) == 6
    assert result["balanced_accuracy"] == pytest.approx(np.mean(tested))
    present = [k for k in range(7) if k != 3]
    f1 = sklearn.metrics.f1_score(labels, probs.argmax(axis=1), average=None, labels=present)
    assert result["macro_f1"] == pytest.approx(np.mean(f1))


def test_empty_group_is_none():
    probs, labels, _ = _random_case(0)
    result = metrics.evaluate(probs, labels, np.full(7, 1000) + np.arange(7))
    assert result["medium"] is None
    assert result["few"] is None
    assert result["many"] == pytest.approx(result["balanced_accuracy"])
    assert result["rarest_third"] is not None


def test_group_whose_classes_have_no_test_images_is_none():
    result = metrics.evaluate(HAND_PROBS[:5], HAND_LABELS[:5], HAND_COUNTS)
    assert result["few"] is None
    assert result["rarest_third"] is None


def test_one_label_only():
    result = metrics.evaluate(HAND_PROBS[:3], HAND_LABELS[:3], HAND_COUNTS)
    assert result["roc_auc"] is None
    assert result["balanced_accuracy"] == pytest.approx(2 / 3)


def test_confident_and_wrong_is_finite():
    result = metrics.evaluate(np.array([[1.0, 0.0]], np.float32), np.array([1]), np.array([5, 5]))
    assert result["nll"] == pytest.approx(87.34, abs=0.01)
    assert result["ece"] == 1.0
    json.dumps(result, allow_nan=False)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=60), st.integers(1, 20)
)
def test_ece_equals_the_definition_written_out(pairs, num_bins):
    confidence, correct = np.array([p for p, _ in pairs], np.float32), np.array([c for _, c in pairs])
    edges = np.linspace(0, 1, num_bins + 1)
    expected, total = 0.0, 0
    for m in range(num_bins):
        members = [
            (float(p), c)
            for p, c in zip(confidence, correct, strict=True)
            if edges[m] < p.astype(np.float64) <= edges[m + 1] or (m == 0 and p == 0)
        ]
        total += len(members)
        expected += abs(sum(c for _, c in members) - sum(p for p, _ in members)) / len(pairs)
    assert total == len(pairs)
    ece = metrics.expected_calibration_error(metrics.reliability_bins(confidence, correct, num_bins))
    assert ece == pytest.approx(expected, abs=1e-9)
    assert 0 <= ece <= 1


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(st.permutations(range(7)), st.integers(0, 5))
def test_names_of_classes_do_not_matter(permutation, seed):
    probs, labels, counts = _random_case(seed, examples=60)
    order = np.array(permutation)
    before = metrics.evaluate(probs, labels, counts)
    after = metrics.evaluate(probs[:, order], np.argsort(order)[labels], counts[order])
    for name in (*GROUPS, "accuracy", "balanced_accuracy", "macro_f1", "roc_auc", "ece", "nll"):
        if before[name] is None:
            assert after[name] is None
        else:
            assert after[name] == pytest.approx(before[name], abs=1e-9), name
    assert after["confusion"] == np.array(before["confusion"])[np.ix_(order, order)].tolist()


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.integers(1, 30), st.integers(2, 9), st.integers(0, 10**6))
def test_any_well_formed_input_gives_finite_json(examples, classes, seed):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(classes, 0.2), size=examples).astype(np.float32)
    result = metrics.evaluate(probs, rng.integers(0, classes, examples), rng.integers(0, 300, classes))
    json.dumps(result, allow_nan=False)
    assert np.sum(result["confusion"]) == examples == sum(one["count"] for one in result["reliability"])
    for name in GROUPS:
        assert result[name] is None or 0 <= result[name] <= 1


@pytest.mark.parametrize(
    ("probs", "labels", "counts", "message"),
    [
        (HAND_PROBS[0], HAND_LABELS, HAND_COUNTS, "N >= 1"),
        (HAND_PROBS[:0], HAND_LABELS[:0], HAND_COUNTS, "N >= 1"),
        (HAND_PROBS[:, :1], HAND_LABELS, HAND_COUNTS[:1], "K >= 2"),
        (HAND_PROBS, HAND_LABELS[:5], HAND_COUNTS, "labels must have shape"),
        (HAND_PROBS, HAND_LABELS, HAND_COUNTS[:2], "train_counts must have shape"),
        (HAND_PROBS, HAND_LABELS + 1, HAND_COUNTS, "0..2"),
        (HAND_PROBS, HAND_LABELS - 1, HAND_COUNTS, "0..2"),
        (HAND_PROBS, HAND_LABELS.astype(np.float32), HAND_COUNTS, "integers"),
        (HAND_PROBS, HAND_LABELS, -HAND_COUNTS, "negative"),
        (HAND_PROBS * np.float32(np.nan), HAND_LABELS, HAND_COUNTS, "finite"),
        (HAND_PROBS + np.float32(np.inf), HAND_LABELS, HAND_COUNTS, "finite"),
        (HAND_PROBS * 3, HAND_LABELS, HAND_COUNTS, "sum to one"),
        (HAND_PROBS * 2 - 1 / 3, HAND_LABELS, HAND_COUNTS, "not negative"),
    ],
)
def test_refuses(probs, labels, counts, message):
    with pytest.raises(ValueError, match=message):
        metrics.evaluate(probs, labels, counts)


# --- temperature ----------------------------------------------------------------------------------


def test_a_temperature_divides_the_logits():
    probs = np.array([[0.8, 0.2], [0.5, 0.5], [1.0, 0.0]], np.float32)
    np.testing.assert_allclose(metrics.with_temperature(probs, 1.0), probs, atol=1e-7)
    np.testing.assert_allclose(metrics.with_temperature(probs, 2.0), [[2 / 3, 1 / 3], [0.5, 0.5], [1, 0]], atol=1e-7)
    logits = np.random.default_rng(0).normal(size=(5, 4))
    np.testing.assert_allclose(
        metrics.with_temperature(scipy.special.softmax(logits, 1), 3.0), scipy.special.softmax(logits / 3, 1)
    )


def test_the_temperature_of_an_overconfident_classifier_is_found():
    """It says softmax(3 z) where labels are drawn from softmax(z)."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 3))
    labels = (rng.gumbel(size=logits.shape) + logits).argmax(1)
    temperature = metrics.fit_temperature(scipy.special.softmax(3 * logits, 1), labels)
    assert temperature == pytest.approx(3.0, rel=0.05)


def test_the_temperature_of_two_answers_is_that_by_hand():
    """Three of four answers of confidence 0.9 are right: log 9 / T = log 3, T = 2."""
    probs, labels = np.tile([0.9, 0.1], (4, 1)), np.array([0, 0, 0, 1])
    assert metrics.fit_temperature(probs, labels) == pytest.approx(2.0, rel=1e-3)


def test_a_classifier_that_is_always_right_has_the_least_temperature():
    assert metrics.fit_temperature(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1])) == pytest.approx(
        0.05, rel=1e-2
    )


def test_the_confusion_of_very_many_classes_is_left_out():
    count = metrics.CONFUSION_CLASSES + 1
    found = metrics.evaluate(np.eye(count, dtype=np.float32), np.arange(count), np.ones(count, int))
    assert found["confusion"] is None
    assert found["per_class_images"] == [1] * count
