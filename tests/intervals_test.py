"""The intervals hold the truth as often as they say, with few images too."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfm_jax.evaluation import intervals, metrics


def test_wilson_by_hand():
    # z = 1.96: 8 of 10 is (0.8 + 1.92 / 10) / 1.384 = 0.7167 with sqrt(0.016 + 0.0096) * 1.96 / 1.384 = 0.2266 around.
    assert intervals.wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    assert intervals.wilson(0.0, 2) == pytest.approx((0.0, 0.6576), abs=2e-4)  # none of two says little
    assert intervals.wilson(1.0, 2) == pytest.approx((0.3424, 1.0), abs=2e-4)


def test_a_single_class_has_wilsons_and_none_has_no_interval():
    assert intervals.of_mean(np.array([8]), np.array([10])) == pytest.approx(intervals.wilson(0.8, 10))
    assert intervals.of_mean(np.array([0, 0]), np.array([0, 0])) is None


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=30))
def test_it_lies_around_the_mean_within_0_and_1(pairs):
    right, images = np.array([min(pair) for pair in pairs]), np.array([max(pair) for pair in pairs])
    if (found := intervals.of_mean(right, images)) is not None:
        mean = (right[images > 0] / images[images > 0]).mean()
        assert 0 <= found[0] <= mean + 1e-9
        assert mean - 1e-9 <= found[1] <= 1
        assert found[0] < found[1]


@pytest.mark.parametrize("images", [[2] * 10, [1] * 20, [40] * 10, [1, 2, 3, 10, 100, 400] * 3], ids=str)
@pytest.mark.parametrize("skill", [(1, 1), (0.5, 5), (5, 0.7)])
def test_it_holds_the_truth_19_times_of_20(images, skill):
    """Resampling the images of each class does so 12 to 15 times of 20 for two images a class, never for one."""
    rng, trials = np.random.default_rng(0), 400
    truth = rng.beta(*skill, (trials, len(images)))
    found = [intervals.of_mean(rng.binomial(images, one), np.array(images)) for one in truth]
    held = np.mean([low <= one.mean() <= high for one, (low, high) in zip(truth, found, strict=True)])
    assert 0.92 <= held <= 0.995


def test_of_an_evaluation():
    labels = np.repeat(np.arange(3), [20, 10, 2])
    probs = np.full((32, 3), 0.1)
    probs[np.arange(32), np.where(np.arange(32) % 5 == 0, (labels + 1) % 3, labels)] = 0.8
    found = metrics.evaluate(probs, labels, np.array([500, 50, 5]))
    of = intervals.of_evaluation(found, np.array([500, 50, 5]))
    assert of["few"] == pytest.approx(intervals.wilson(found["few"], 2))
    assert of["accuracy"] == pytest.approx(intervals.wilson(found["accuracy"], 32))
    assert set(of) < set(found)
    low, high = of["balanced_accuracy"]
    assert low < found["balanced_accuracy"] < high


def test_a_paired_difference_by_hand():
    # Gaps 1, 2, 3: standard error 1 / sqrt(3); Student's t(0.975, 2) is 4.3027.
    assert intervals.paired([2, 4, 6], [1, 2, 3]) == pytest.approx((2.0, 0.57735, 2.48414), abs=1e-4)
    assert intervals.paired([2.0], [1.5]) == (0.5, None, None)
