"""Losses of the whole batch: by hand, in float64, on padded and mixed batches; and features that a pass returns."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Tiny, configured
from jax.test_util import check_grads

from mfm_jax import bilevel
from mfm_jax import data as data_lib
from mfm_jax.bilevel import auxiliary, losses
from mfm_jax.bilevel.passes import Pass
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.types import Batch, BilevelState

COUNTS = np.array([60, 30, 10])
LOGITS = np.array([[1.0, 0.0, -1.0], [0.5, 2.0, 0.0], [0.0, -0.5, 0.3], [2.0, 0.2, 0.1]])
LABELS = np.array([0, 1, 0, 0], np.int32)
FORWARD = Pass(lambda variables, image, **options: image)


def lade(logits, labels, weights=None):
    """The regulariser written out: `labels` are one-hot or mixed, `weights` of mean 1."""
    prior, weights = COUNTS / COUNTS.sum(), np.ones(len(logits)) if weights is None else weights
    total, share = 0.0, weights @ labels / len(logits)
    for k in range(3):
        own = weights @ (labels[:, k] * logits[:, k]) / len(logits) / share[k] if share[k] else 0.0
        balanced = np.log(weights @ (labels @ (1 / (3 * prior)) * np.exp(logits[:, k])) / len(logits))
        total += prior[k] * (balanced + 0.1 * balanced**2 - own)
    return 0.1 * total


def found(logits, batch, forward=FORWARD):
    term, memory = auxiliary.label_distribution(COUNTS, 0.1).loss({}, {}, [auxiliary.Seen(batch, logits, {})], forward)
    assert memory == {}
    return term


def test_lade_by_hand_with_a_class_that_is_absent():
    batch = Batch(LOGITS, LABELS)
    want = lade(LOGITS, np.eye(3)[LABELS])
    np.testing.assert_allclose(found(jnp.asarray(LOGITS, jnp.float32), batch), want, rtol=1e-5)


def test_lade_of_mixed_labels_and_of_a_padded_batch():
    partner, share = np.array([2, 0, 1, 0], np.int32), np.array([0.8, 0.6, 1.0, 0.5], np.float32)
    weights = np.array([1.5, 0.5, 2.0, 0.0])
    mixed = share[:, None] * np.eye(3)[LABELS] + (1 - share[:, None]) * np.eye(3)[partner]
    batch = Batch(LOGITS, LABELS, partner, share, jnp.asarray(weights))
    np.testing.assert_allclose(found(jnp.asarray(LOGITS, jnp.float32), batch), lade(LOGITS, mixed, weights), rtol=1e-5)


def test_lade_does_not_overflow():
    assert np.isfinite(found(jnp.asarray(1000 * LOGITS, jnp.float32), Batch(LOGITS, LABELS)))


def test_lade_by_finite_differences():
    with jax.enable_x64(True):
        logits = jnp.asarray(LOGITS)
        check_grads(lambda z: found(z, Batch(z, LABELS)), (logits,), order=2, modes=["rev"], rtol=1e-5)


def state_of(variables):
    return bilevel.init_state(jax.random.key(2), variables, optax.sgd(0.1))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_pass_returns_features_in_the_order_of_the_batch(parts):
    module, image = Tiny(3), jax.random.normal(jax.random.key(0), (6, 4, 4, 1))
    variables = module.init(jax.random.key(1), image)
    state: BilevelState = state_of(variables)
    batch = Batch(image, jnp.zeros(6, jnp.int32))

    def double(labels):
        return lambda site, features: 2 * features if site == "pooled" else features

    forward = Pass.of(module, parts=parts)
    (logits, features), _ = forward.outputs(state, state.params, batch, double, train=False, sites=("pooled",))
    head = state.params["head"]
    assert set(features) == {"pooled"}
    chex.assert_trees_all_close(features["pooled"] @ head["kernel"] + head["bias"][None, :], logits, rtol=1e-5)


def started(name, **overrides):
    """Returns the experiment of a method on the digits, its initial state, and a batch of ten classes."""
    config = configured(name, **overrides)
    data = data_lib.build(config)
    experiment = experiment_lib.build(config, data)
    image = jnp.asarray(data.train_images[:40], jnp.float32) / 16
    return experiment, experiment.init(), Batch(image, jnp.asarray(data.train_labels[:40]))


@pytest.mark.usefixtures("quick_runs")
def test_lade_without_weight_is_the_logit_adjusted_loss():
    steps = []
    for name, overrides in (("lade", {"method__lade_weight": 0.0}), ("logit_adjusted", {}), ("lade", {})):
        experiment, state, batch = started(name, **overrides)
        steps.append(jax.jit(experiment.plain_step)(state, batch))
    chex.assert_trees_all_equal(steps[0][0].params, steps[1][0].params)
    chex.assert_trees_all_equal(steps[0][1], steps[1][1])
    logits, _ = Pass(experiment.apply).logits(state, state.params, batch, train=True)
    gap = steps[2][1]["loss"] - steps[1][1]["loss"]
    counts = experiment_counts("lade")
    term = auxiliary.label_distribution(counts, 0.1).loss(
        {}, {}, [auxiliary.Seen(batch, logits, {})], Pass(experiment.apply)
    )[0]
    np.testing.assert_allclose(gap, term, rtol=1e-3)


def experiment_counts(name):
    return data_lib.build(configured(name)).counts


@pytest.mark.usefixtures("quick_runs")
def test_influence_sets_in_with_the_second_stage():
    experiment, state, batch = started("influence_balanced")
    plain, _, _ = started("ce")
    step, begin = jax.jit(experiment.plain_step), experiment.steps_per_epoch  # of two epochs
    before = state.replace(step=jnp.int32(begin - 1))
    ce = jax.jit(plain.plain_step)(before, batch)
    chex.assert_trees_all_equal(step(before, batch), ce)
    loss = step(state.replace(step=jnp.int32(begin)), batch)[1]["loss"]
    (logits, features), _ = Pass(experiment.apply).outputs(state, state.params, batch, train=True, sites=("pooled",))
    counts = experiment_counts("ce").astype(np.float32)
    weights = 1 / counts / np.mean(1 / counts)
    values = losses.influence_balanced(features["pooled"])(logits, batch.label) * weights[np.asarray(batch.label)]
    np.testing.assert_allclose(loss, values.mean(), rtol=1e-5)
