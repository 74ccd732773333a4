"""Losses by hand, their identities, and their gradients in float64."""

import doctest
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from mfm_jax.bilevel import losses

COUNTS = np.array([500, 60, 7])
# exp of these rows is [1, 2, 5] and [4, 4, 8]: softmax [1/8, 2/8, 5/8] and [1/4, 1/4, 1/2].
LOGITS = np.log(np.array([[1.0, 2.0, 5.0], [4.0, 4.0, 8.0]], np.float32))
LABELS = np.array([1, 2], np.int32)
COSTS = np.array([[0.0, 3.0, 1.0], [8.0, 0.0, 4.0], [2.0, 6.0, 0.0]])

LOSSES = {
    "cross_entropy": losses.cross_entropy,
    "logit_adjusted": losses.logit_adjusted(COUNTS, 1.5),
    "gce": losses.generalized_cross_entropy,
    "focal": losses.focal(2.0),
    "ldam": losses.ldam(COUNTS, 0.5, 3.0),
    "dice": losses.dice(0.5),
    "vector_scaled": losses.vector_scaled(COUNTS, 0.3, 1.5),
    "smoothed": losses.smoothed(losses.focal(1.0), 0.2),
    "expected_cost": losses.expected_cost(COSTS),
    "mixed": losses.mixed(losses.cross_entropy, losses.expected_cost(COSTS), 0.3),
    "temperature": losses.with_temperature(losses.generalized_cross_entropy, 2.0),
}


class LossValues(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_cross_entropy(self):
        out = self.variant(losses.cross_entropy)(LOGITS, LABELS)
        chex.assert_trees_all_close(out, np.array([math.log(4), math.log(2)], np.float32), rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_logit_adjusted(self):
        # With tau = 2 the terms n^tau e^z are 16 * 1, 9 * 2, 1 * 5, and 16 * 4, 9 * 4, 1 * 8.
        out = self.variant(losses.logit_adjusted(np.array([4, 3, 1]), 2.0))(LOGITS, LABELS)
        chex.assert_trees_all_close(out, np.array([math.log(39 / 18), math.log(108 / 8)], np.float32), rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_generalized_cross_entropy(self):
        # q = 1/2: 2 (1 - sqrt(p)), with p = 1/4 and 1/2.
        out = self.variant(lambda z, y: losses.generalized_cross_entropy(z, y, 0.5))(LOGITS, LABELS)
        chex.assert_trees_all_close(out, np.array([1.0, 2 - math.sqrt(2)], np.float32), rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_focal(self):
        # gamma = 2, p = 1/4 and 1/2: (3/4)^2 log 4 and (1/2)^2 log 2.
        out = self.variant(losses.focal(2.0))(LOGITS, LABELS)
        chex.assert_trees_all_close(out, np.array([9 / 16 * math.log(4), math.log(2) / 4], np.float32), rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_ldam(self):
        # Counts 256, 16, 1: margins 1/4, 1/2 and 1 times log 2, so that the labels' exponentials shrink by 2^-1/2
        # and 1/2: 2^1/2 / (1 + 2^1/2 + 5), and 4 / (4 + 4 + 4).
        out = self.variant(losses.ldam(np.array([256, 16, 1]), math.log(2) / 2, 2.0))(LOGITS, LABELS)
        chex.assert_trees_all_close(
            out, np.array([math.log((6 + 2**0.5) / 2**0.5), math.log(3)], np.float32), rtol=1e-5
        )

    @chex.variants(with_jit=True, without_jit=True)
    def test_vector_scaling(self):
        # The factors are 1, 1/2, 1/4 at gamma = 1/2, the terms n e^(delta z) 16, 4 sqrt 2, 5^(1/4), and 64, 8, 8^(1/4).
        out = self.variant(losses.vector_scaled(np.array([16, 4, 1]), 0.5, 1.0))(LOGITS, LABELS)
        first, second = (16, 4 * 2**0.5, 5**0.25), (64, 8, 8**0.25)
        want = [math.log(sum(first) / first[1]), math.log(sum(second) / second[2])]
        chex.assert_trees_all_close(out, np.array(want, np.float32), rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_influence_balanced(self):
        # p = 1/4 and 1/2, so |p - y| = 3/2 and 1; |h| = 3 and 1/2: 9 ln 4 / (9/2 + 1/2), 9 ln 2 / (1/2 + 1/2).
        features = np.array([[1.0, -2.0], [0.5, 0.0]], np.float32)
        out = self.variant(losses.influence_balanced(features, 9.0, 0.5))(LOGITS, LABELS)
        chex.assert_trees_all_close(out, np.array([1.8 * math.log(4), 9 * math.log(2)], np.float32), rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_dice(self):
        # alpha = 1, p = 1/4 and 1/2: f = 3/16 and 1/4, loss 1 - (2 f + 1) / (f + 2) = 13/35 and 1/3.
        out = self.variant(losses.dice(1.0))(LOGITS, LABELS)
        chex.assert_trees_all_close(out, np.array([1 - 22 / 35, 1 / 3], np.float32), rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_label_smoothing_is_the_cross_entropy_to_the_smoothed_label(self):
        out = self.variant(losses.smoothed(losses.cross_entropy, 0.3))(LOGITS, LABELS)
        target = 0.7 * np.eye(3)[LABELS] + 0.1
        want = -(target * np.log([[1 / 8, 2 / 8, 5 / 8], [1 / 4, 1 / 4, 1 / 2]])).sum(axis=1)
        chex.assert_trees_all_close(out, want.astype(np.float32), rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_temperature_divides_the_logits(self):
        # At temperature 1/2 the softmax terms are squared: 4 / (1 + 4 + 25), and 64 / (16 + 16 + 64).
        out = self.variant(losses.with_temperature(losses.cross_entropy, 0.5))(LOGITS, LABELS)
        chex.assert_trees_all_close(out, np.array([math.log(30 / 4), math.log(96 / 64)], np.float32), rtol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_expected_cost_by_hand(share):
    """8/8 + 4 * 5/8 and 2/4 + 6/4, beside log 4 and log 2."""
    loss = losses.mixed(losses.cross_entropy, losses.expected_cost(COSTS), share)
    want = (1 - share) * np.log([4.0, 2.0]) + share * np.array([3.5, 2.0])
    chex.assert_trees_all_close(loss(LOGITS, LABELS), want.astype(np.float32), rtol=1e-6)


def test_equal_costs_are_the_probability_of_a_mistake():
    """Which is the generalised cross-entropy at q = 1."""
    found = losses.expected_cost(1 - jnp.eye(3))(LOGITS, LABELS)
    chex.assert_trees_all_close(found, losses.generalized_cross_entropy(LOGITS, LABELS, 1.0), rtol=1e-6)


def test_log_prior():
    prior = losses.log_prior(COUNTS)
    chex.assert_trees_all_close(prior, np.log(COUNTS / 567).astype(np.float32), rtol=1e-5)
    chex.assert_type(prior, jnp.float32)


def test_the_default_q_is_that_of_the_paper():
    expected = (1 - np.array([0.25, 0.5]) ** 0.7) / 0.7
    chex.assert_trees_all_close(
        losses.generalized_cross_entropy(LOGITS, LABELS), expected.astype(np.float32), rtol=1e-6
    )


finite_logits = st.lists(st.floats(-20, 20, width=32), min_size=3, max_size=3)


@settings(deadline=None, max_examples=30)
@given(finite_logits, st.integers(0, 2), st.lists(st.integers(1, 5000), min_size=3, max_size=3))
def test_logit_adjustment_at_tau_one_is_balanced_softmax_and_at_zero_cross_entropy(row, label, counts):
    logits, labels, n = np.array([row], np.float32), np.array([label], np.int32), np.array(counts)
    terms = n * np.exp(np.float64(row))  # balanced softmax, written out
    adjusted = losses.logit_adjusted(n, 1.0)(logits, labels)
    np.testing.assert_allclose(adjusted, [-np.log(terms[label] / terms.sum())], rtol=1e-4, atol=1e-4)
    plain = losses.cross_entropy(logits, labels)
    chex.assert_trees_all_equal(losses.logit_adjusted(n, 0.0)(logits, labels), plain)
    chex.assert_trees_all_equal(losses.with_temperature(losses.cross_entropy, 1.0)(logits, labels), plain)


@settings(deadline=None, max_examples=30)
@given(finite_logits, st.integers(0, 2))
def test_what_reduces_to_the_cross_entropy(row, label):
    logits, labels = np.array([row], np.float32), np.array([label], np.int32)
    plain = losses.cross_entropy(logits, labels)
    chex.assert_trees_all_equal(losses.focal(0.0)(logits, labels), plain)
    chex.assert_trees_all_equal(losses.smoothed(losses.cross_entropy, 0.0)(logits, labels), plain)
    scaled = losses.ldam(COUNTS, 0.0, 30.0)(30 * logits, labels)
    chex.assert_trees_all_equal(scaled, losses.cross_entropy(30 * logits, labels))
    p = np.exp(-np.float64(plain))
    np.testing.assert_allclose(losses.dice(0.0)(logits, labels), 1 - (2 * p + 1) / (p + 2), atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(finite_logits, st.integers(0, 2), st.lists(st.integers(1, 5000), min_size=3, max_size=3), st.floats(0, 2))
def test_vector_scaling_without_factors_is_the_logit_adjusted_loss(row, label, counts, tau):
    logits, labels, n = np.array([row], np.float32), np.array([label], np.int32), np.array(counts)
    adjusted = losses.logit_adjusted(n, tau)(logits, labels)
    chex.assert_trees_all_equal(losses.vector_scaled(n, 0.0, tau)(logits, labels), adjusted)
    chex.assert_trees_all_equal(losses.vector_scaled(n, 0.0, 0.0)(logits, labels), losses.cross_entropy(logits, labels))


def test_class_dependent_temperatures_divide_the_logits():
    cooled = LOGITS / (COUNTS.max() / COUNTS) ** 0.3
    want = losses.cross_entropy(cooled.astype(np.float32), LABELS)
    chex.assert_trees_all_close(losses.vector_scaled(COUNTS, 0.3, 0.0)(LOGITS, LABELS), want, rtol=1e-5)


def test_influence_is_the_size_of_the_gradient_by_the_last_layer():
    features = np.array([[1.0, -2.0], [0.5, 0.3]], np.float32)

    def nats(kernel, i):
        return losses.cross_entropy((features @ kernel)[i : i + 1], LABELS[i : i + 1])[0]

    kernel = jax.random.normal(jax.random.key(0), (2, 3))
    sizes = np.array([np.abs(jax.grad(nats)(kernel, i)).sum() for i in range(2)])
    logits = features @ kernel
    found = losses.influence_balanced(features, 2.0, 0.0)(logits, LABELS)
    chex.assert_trees_all_close(found, 2 * losses.cross_entropy(logits, LABELS) / sizes, rtol=1e-4)


def test_influence_of_what_is_learned_has_a_finite_gradient():
    learned, labels = np.array([[60.0, 0.0]], np.float32), np.array([0], np.int32)

    def value(logits, features):
        return losses.influence_balanced(features)(logits, labels)[0]

    for features in (np.zeros((1, 3), np.float32), np.ones((1, 3), np.float32)):
        chex.assert_tree_all_finite(jax.grad(value, argnums=(0, 1))(learned, features))
        chex.assert_tree_all_finite(jax.jacfwd(jax.grad(value))(learned, features))


def test_ldam_holds_the_rarest_class_furthest():
    even = np.zeros((3, 3), np.float32)
    values = losses.ldam(np.array([256, 16, 1]), 0.5, 4.0)(even, np.arange(3))
    want = [math.log(2 * math.exp(4 * margin) + 1) for margin in (1 / 8, 1 / 4, 1 / 2)]
    chex.assert_trees_all_close(values, np.array(want, np.float32), rtol=1e-6)


def test_dice_is_least_where_its_docstring_says():
    p = np.linspace(0.01, 0.99, 99, dtype=np.float32)
    logits = np.stack([np.log(p), np.log1p(-p)], axis=1)
    values = losses.dice(1.0)(logits, np.zeros(99, np.int32))
    assert p[np.argmin(values)] == pytest.approx(0.5)


@pytest.mark.parametrize("loss", [losses.focal(0.5), losses.dice(0.1)], ids=["focal", "dice"])
def test_certainty_has_a_finite_gradient(loss):
    logits = np.array([[1e4, 0.0]], np.float32)
    chex.assert_tree_all_finite(jax.grad(lambda z: loss(z, np.array([0]))[0])(logits))
    chex.assert_tree_all_finite(jax.grad(lambda z: loss(z, np.array([1]))[0])(logits))
    learned = np.array([[30.0, 0.0]], np.float32)  # the loss rounds to zero; meta learners need the second derivative
    chex.assert_tree_all_finite(jax.jacfwd(jax.grad(lambda z: loss(z, np.array([0]))[0]))(learned))


def test_class_weights_by_hand():
    chex.assert_trees_all_close(losses.frequency_weights(np.array([1, 2, 4])), np.array([12, 6, 3], np.float32) / 7)
    root = losses.frequency_weights(np.array([1, 4, 16]), 0.5)
    chex.assert_trees_all_close(root, np.array([12, 6, 3], np.float32) / 7, rtol=1e-6)
    # beta = 1/2: effective numbers 1, 3/2, 7/4 (over 1 - beta); inverted 1, 2/3, 4/7, mean 47/63.
    found = losses.effective_number_weights(np.array([1, 2, 3]), 0.5)
    chex.assert_trees_all_close(found, np.array([63, 42, 36], np.float32) / 47, rtol=1e-6)


def test_effective_number_lies_between_no_weights_and_inverse_frequency():
    chex.assert_trees_all_equal(losses.effective_number_weights(COUNTS, 0.0), jnp.ones(3))
    nearly = losses.effective_number_weights(COUNTS, 0.999999)
    chex.assert_trees_all_close(nearly, losses.frequency_weights(COUNTS), rtol=1e-3)


def test_balanced_counts_make_the_adjustment_vanish():
    adjusted = losses.logit_adjusted(np.full(3, 40), 1.7)(LOGITS, LABELS)
    chex.assert_trees_all_close(adjusted, losses.cross_entropy(LOGITS, LABELS), rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(finite_logits, st.integers(0, 2), st.floats(0.1, 1.0))
def test_gce_lies_between_zero_and_its_bound_and_below_the_cross_entropy(row, label, q):
    logits, labels = np.array([row], np.float32), np.array([label], np.int32)
    value = float(losses.generalized_cross_entropy(logits, labels, q)[0])
    assert 0 <= value <= 1 / q * (1 + 1e-6)
    assert value <= float(losses.cross_entropy(logits, labels)[0]) * (1 + 1e-5)


def test_gce_reaches_its_bound_without_nan():
    logits, labels = np.array([[0.0, 1e4]], np.float32), np.array([0], np.int32)
    value, slope = jax.value_and_grad(lambda z: losses.generalized_cross_entropy(z, labels, 0.7)[0])(logits)
    chex.assert_trees_all_close(value, np.float32(1 / 0.7), rtol=1e-6)
    chex.assert_trees_all_equal(slope, np.zeros((1, 2), np.float32))  # an outlier no longer pulls


def test_gce_tends_to_cross_entropy_and_at_one_is_the_absolute_error():
    with jax.enable_x64(True):
        logits = jnp.asarray(LOGITS, jnp.float64)
        small = losses.generalized_cross_entropy(logits, LABELS, 1e-6)
        chex.assert_trees_all_close(small, losses.cross_entropy(logits, LABELS), rtol=2e-6)
        chex.assert_trees_all_close(losses.generalized_cross_entropy(logits, LABELS, 1.0), np.array([0.75, 0.5]))


@pytest.mark.parametrize("name", LOSSES)
def test_each_example_has_its_own_loss_and_the_dtype_of_the_logits(name):
    loss = LOSSES[name]
    both = loss(LOGITS, LABELS)
    chex.assert_shape(both, (2,))
    chex.assert_trees_all_close(both[1:], loss(LOGITS[1:], LABELS[1:]), rtol=1e-6)
    chex.assert_type(loss(jnp.asarray(LOGITS, jnp.bfloat16), LABELS), jnp.bfloat16)


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(losses, optionflags=doctest.ELLIPSIS)
    assert (result.failed, result.attempted) == (0, len(LOSSES))


@pytest.mark.parametrize("name", LOSSES)
def test_other_ranks_and_types_are_refused(name):
    labels = [LABELS[:, None], LABELS.astype(np.float32), LABELS[:1]]
    for logits, label in [(LOGITS[0], LABELS), (LOGITS.astype(int), LABELS), *((LOGITS, label) for label in labels)]:
        with pytest.raises(AssertionError):
            LOSSES[name](logits, label)


def test_first_and_second_derivatives_in_float64():
    # Second ones too: the meta-gradient differentiates the gradient of the training loss.
    @jax.jit
    def every_loss(logits):
        return jnp.stack([loss(logits, LABELS) for loss in LOSSES.values()])

    with jax.enable_x64(True):
        check_grads(every_loss, (jnp.asarray(LOGITS, jnp.float64),), order=2, modes=["rev"], atol=1e-7, rtol=1e-6)


def test_gradient_of_the_cross_entropy_by_hand():
    slope = jax.grad(lambda z: losses.cross_entropy(z, LABELS).sum())(LOGITS)
    expected = np.array([[1 / 8, 2 / 8 - 1, 5 / 8], [1 / 4, 1 / 4, 1 / 2 - 1]], np.float32)
    chex.assert_trees_all_close(slope, expected, rtol=1e-5)
