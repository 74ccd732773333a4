"""The meta learners by hand, and what holds two of them together."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Small, slow

from mfm_jax import bilevel
from mfm_jax import config as config_lib
from mfm_jax.bilevel import MetaRule, hypergrad, losses, modulation, outer
from mfm_jax.bilevel.outer import MetaLearner
from mfm_jax.bilevel.passes import Pass
from mfm_jax.methods import learners
from mfm_jax.methods.table import METHODS
from mfm_jax.types import Batch

CLASSES, BATCH, WIDTH = 4, 12, 4
LABELS = jnp.arange(BATCH, dtype=jnp.int32) % CLASSES
MODULE = Small(CLASSES, WIDTH)
FORWARD = Pass.of(MODULE)


def batch(seed: int) -> Batch:
    return Batch(jax.random.normal(jax.random.key(seed), (BATCH, 8, 8, 3)), LABELS)


def noisy(tree, scale: float = 0.3):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    return structure.unflatten([x + scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def state_of(learner, tx, phi_tx):
    variables = MODULE.init(jax.random.key(1), batch(0).image)
    return bilevel.init_state(jax.random.key(2), variables, tx, learner and learner.init, phi_tx)


@pytest.mark.slow
def test_l2ac_is_the_network_form_of_mfm_with_the_shift_alone():
    """The same inputs and weights: training loss and meta-gradient agree."""
    mfm = outer.of(modulation.network({"logits": CLASSES}, hidden=7, shift_only=True))
    l2ac, tx = learners.l2ac(CLASSES, 7), optax.sgd(0.1, 0.9, nesterov=True)
    theirs = mfm.init(jax.random.key(0))
    chex.assert_trees_all_equal_shapes(theirs["logits"], l2ac.init(jax.random.key(0)))
    phi = noisy(l2ac.init(jax.random.key(0)))
    found = {}
    for name, learner, start in (("mfm", mfm, {"logits": phi}), ("l2ac", l2ac, phi)):
        state = state_of(learner, tx, optax.sgd(1.0)).replace(phi=start)
        step = bilevel.make_step(FORWARD, losses.cross_entropy, tx, learner, optax.sgd(1.0))
        after, metrics = jax.jit(step)(state, batch(0), batch(1))
        gradient = jax.tree.map(lambda a, b: a - b, start, after.phi)
        found[name] = metrics, gradient["logits"] if name == "mfm" else gradient
    chex.assert_trees_all_close(found["l2ac"], found["mfm"], rtol=1e-6, atol=1e-6)
    assert float(optax.tree.norm(found["l2ac"][1])) > 1e-3


@pytest.mark.parametrize("name", ["l2ac", "metasaug"])
def test_starts_as_the_plain_classifier(name):
    learner = learners.l2ac(CLASSES) if name == "l2ac" else learners.metasaug(CLASSES, 2 * WIDTH, strength=0.0)
    params = MODULE.init(jax.random.key(1), batch(0).image)["params"]
    logits = jax.random.normal(jax.random.key(0), (BATCH, CLASSES))
    film = learner.modulate(learner.init(jax.random.key(0)), params, LABELS)
    chex.assert_trees_all_equal(film("logits", logits), logits)
    chex.assert_trees_all_equal(film("pooled", logits), logits)


def test_meta_weight_net_by_hand():
    """Two hidden units, relu(2 l) and relu(1 - l), out of which comes h1 / 2 - h2: l = 2 gives 2, l = 0 gives -1."""
    learner = learners.meta_weight_net(2)
    phi = {"w1": jnp.array([[2.0, -1.0]]), "b1": jnp.array([0.0, 1.0])}
    phi |= {"w2": jnp.array([[0.5], [-1.0]]), "b2": jnp.zeros(1)}
    values = jnp.array([2.0, 0.0])
    weights = 1 / (1 + np.exp([-2.0, 1.0]))
    weights = (weights / weights.mean()).astype(np.float32)
    chex.assert_trees_all_close(learner.weigh(phi, values, jnp.mean), weights * values, rtol=1e-6)
    # The weight is a number to the classifier: the derivative by the loss is the weight itself.
    slope = jax.grad(lambda x: learner.weigh(phi, x, jnp.mean).sum())(values)
    chex.assert_trees_all_close(slope, weights, rtol=1e-6)
    start = learner.init(jax.random.key(0))
    chex.assert_trees_all_close(learner.weigh(start, values, jnp.mean), values)


def test_semantic_augmentation_by_its_sum():
    learner = learners.metasaug(CLASSES, 5, strength=0.5)
    phi = noisy(learner.init(jax.random.key(0)), 2.0)
    kernel = jax.random.normal(jax.random.key(3), (5, CLASSES))
    logits = jax.random.normal(jax.random.key(4), (BATCH, CLASSES))
    out = learner.modulate(phi, {"head": {"kernel": kernel}}, LABELS)("logits", logits)
    variance = np.log1p(np.exp(np.asarray(phi["rho"], np.float64)))
    want = np.array(logits, np.float64)
    for i, y in enumerate(np.asarray(LABELS)):
        for k in range(CLASSES):
            want[i, k] += 0.25 * np.sum(variance[y] * (np.asarray(kernel)[:, k] - np.asarray(kernel)[:, y]) ** 2)
    chex.assert_trees_all_close(out, want.astype(np.float32), rtol=1e-5, atol=1e-5)
    own = jnp.take_along_axis(out - logits, LABELS[:, None], axis=1)
    chex.assert_trees_all_close(own, jnp.zeros_like(own), atol=1e-6)  # the label's own logit stays


def test_semantic_augmentation_of_a_cosine_classifier_sees_directions():
    config = config_lib.resolve({"method": {"name": "metasaug", "base": "ldam", "ldam_scale": 10.0}})
    learner = METHODS["metasaug"].learner(config, jnp.ones(CLASSES), {"pooled": 5})
    phi = noisy(learner.init(jax.random.key(0)), 2.0)
    kernel = jax.random.normal(jax.random.key(3), (5, CLASSES))
    logits = jax.random.normal(jax.random.key(4), (BATCH, CLASSES))
    plain = learners.metasaug(CLASSES, 5, config.method.isda_strength)
    unit = {"head": {"kernel": 10 * kernel / jnp.linalg.norm(kernel, axis=0, keepdims=True)}}
    want = plain.modulate(phi, unit, LABELS)("logits", logits)
    for length in (1.0, 0.01):
        out = learner.modulate(phi, {"head": {"kernel": length * kernel}}, LABELS)("logits", logits)
        chex.assert_trees_all_close(out, want, rtol=1e-4, atol=1e-4)


def test_positive_part_by_hand():
    tx = learners.positive_part()
    gradient = jnp.array([-3.0, 2.0, 0.0, -1.0])
    chex.assert_trees_all_close(tx.update(gradient, tx.init({}), gradient)[0], jnp.array([3.0, 0.0, 0.0, 1.0]))
    chex.assert_trees_all_equal(tx.update(-jnp.abs(gradient) * 0, tx.init({}), gradient)[0], jnp.zeros(4))


@pytest.mark.parametrize("route", [hypergrad.mixed_mode, slow(hypergrad.reverse_over_reverse)])
def test_l2rw_is_the_gradients_inner_product(route):
    """With plain SGD, weight i is in proportion to max(0, <grad l_i(w), grad L_meta(w)>), and the step takes them."""
    learner, rate = learners.l2rw(), 0.1
    tx, phi_tx = optax.sgd(rate), learners.positive_part()
    state = state_of(learner, tx, phi_tx)
    rule = MetaRule(hypergrad=route, lagged=False, bn="running")
    step = bilevel.make_step(FORWARD, losses.cross_entropy, tx, learner, phi_tx, rule)
    after, metrics = jax.jit(step)(state, batch(0), batch(1))
    assert after.phi == {}

    def training(params, weights):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, _ = MODULE.apply(variables, batch(0).image, train=True, mutable=["batch_stats"])
        return (weights * losses.cross_entropy(logits, LABELS)).mean()

    def meta_loss(params):
        logits = MODULE.apply({"params": params, "batch_stats": state.batch_stats}, batch(1).image)
        return losses.cross_entropy(logits, LABELS).mean()

    target = jax.grad(meta_loss)(state.params)
    one_by_one = jax.jit(jax.vmap(lambda w: optax.tree.vdot(jax.grad(training)(state.params, w), target)))
    products = one_by_one(jnp.eye(BATCH))
    weights = jnp.maximum(products, 0)
    weights = weights / weights.mean()
    chex.assert_trees_all_close(metrics["loss"], training(state.params, weights), rtol=1e-4)
    gradient = jax.grad(training)(state.params, weights)
    want = jax.tree.map(lambda p, g: p - rate * g, state.params, gradient)
    chex.assert_trees_all_close(after.params, want, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(metrics["hypergrad_norm"], rate * jnp.linalg.norm(products), rtol=1e-4)


def test_l2rw_is_not_lagged():
    with pytest.raises(ValueError, match="lagged = True"):
        bilevel.make_step(FORWARD, losses.cross_entropy, optax.sgd(0.1), learners.l2rw(), learners.positive_part())


def test_a_learner_that_governs_nothing_is_the_plain_step():
    tx = optax.sgd(0.1, 0.9)
    nothing = MetaLearner("nothing", lambda key: {})
    state = state_of(nothing, tx, None)
    step = bilevel.make_plain_step(FORWARD, losses.cross_entropy, tx)
    governed = bilevel.make_plain_step(FORWARD, losses.cross_entropy, tx, nothing)
    chex.assert_trees_all_equal(jax.jit(governed)(state, batch(0))[0].params, jax.jit(step)(state, batch(0))[0].params)


def test_mixed_labels_get_the_mixture_of_the_losses():
    tx = optax.sgd(0.1)
    state = state_of(None, tx, None)
    step = jax.jit(bilevel.make_plain_step(FORWARD, losses.cross_entropy, tx))
    partner, share = LABELS[::-1], jnp.linspace(0.5, 1.0, BATCH)
    mixed = step(state, batch(0)._replace(partner=partner, share=share))[1]["loss"]
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits, _ = MODULE.apply(variables, batch(0).image, train=True, mutable=["batch_stats"])
    log_p = np.asarray(jax.nn.log_softmax(logits))
    target = np.zeros((BATCH, CLASSES))
    np.add.at(target, (np.arange(BATCH), np.asarray(LABELS)), np.asarray(share))
    np.add.at(target, (np.arange(BATCH), np.asarray(partner)), 1 - np.asarray(share))
    np.testing.assert_allclose(mixed, -(target * log_p).sum(axis=1).mean(), rtol=1e-5)


def test_class_weights_follow_the_step():
    tx = optax.sgd(0.1)
    state = state_of(None, tx, None)
    weights = jnp.array([4.0, 0.0, 0.0, 0.0])
    weights_at = lambda step: jnp.where(step >= 3, weights, jnp.ones(CLASSES))  # noqa: E731
    step = jax.jit(bilevel.make_plain_step(FORWARD, bilevel.Objective(losses.cross_entropy, weights_at), tx))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits, _ = MODULE.apply(variables, batch(0).image, train=True, mutable=["batch_stats"])
    values = losses.cross_entropy(logits, LABELS)
    np.testing.assert_allclose(step(state, batch(0))[1]["loss"], values.mean(), rtol=1e-5)
    later = step(state.replace(step=jnp.int32(3)), batch(0))[1]["loss"]
    np.testing.assert_allclose(later, values[LABELS == 0].mean(), rtol=1e-5)


def test_each_site_of_mfm_has_its_form():
    config = config_lib.resolve({"modulation": {"sites": "pooled:network,logits,stage3:direct"}})
    learner = METHODS["mfm"].learner(config, jnp.arange(CLASSES) + 1, {"stage3": 6, "pooled": 6, "logits": CLASSES})
    phi = learner.init(jax.random.key(0))
    names = {site: set(values) for site, values in phi.items()}
    assert names == {"pooled": {"w1", "b1", "w2", "b2"}, "logits": set("abc"), "stage3": {"gamma", "beta"}}
    assert learner.modulator.sites == ("pooled", "logits", "stage3")
