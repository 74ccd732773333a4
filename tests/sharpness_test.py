"""The gradient up the loss: by hand, against the plain one, and in whole runs; `hypergrad_test` has its derivative."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import arrays, configured, slow, stopped_at, stored

from mfm_jax import bilevel
from mfm_jax import data as data_lib
from mfm_jax.bilevel import losses, sharpness
from mfm_jax.bilevel.passes import Pass
from mfm_jax.bilevel.sharpness import Sharpness
from mfm_jax.errors import UserError
from mfm_jax.machine import interruption
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.training import recipe, train
from mfm_jax.types import Batch, no_modulation

COUNTS = jnp.array([60, 30, 10])
W = jnp.array([3.0, 2.0])


def bowls(w, phi, counted=None):
    """Class k's loss is `k + 1` times half of the squared distance of w from (k, 0); aux is a number of its own."""
    counted = jnp.ones(3) if counted is None else counted
    slopes, centres = jnp.array([1.0, 2.0, 3.0]), jnp.stack([jnp.arange(3.0), jnp.zeros(3)], axis=1)
    each = slopes / 2 * jnp.sum((w[None] - centres) ** 2, axis=1)
    return jnp.sum(counted * each), jnp.float32(7)


def slope(w, counted):
    return jax.grad(lambda w: bowls(w, None, counted)[0])(w)


def test_sam_by_hand():
    """At (3, 2) the slope is (3 + 4 + 3, 2 * 6) = (10, 12), of length sqrt(244)."""
    (value, aux), found = sharpness.gradient(bowls, Sharpness(0.5))(W, None)
    there = W + 0.5 * jnp.array([10.0, 12.0]) / np.sqrt(244.0)
    expected = 6 * there - jnp.array([8.0, 0.0])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (float(value), float(aux)) == (float(bowls(W, None)[0]), 7.0)


@pytest.mark.parametrize("share", [[0.0, 0.0, 1.0], [0.4, 0.7, 0.9], [1.0, 1.0, 1.0]])
def test_shares_by_hand(share):
    share = jnp.array(share)
    (value, _), found = sharpness.gradient(bowls, Sharpness(0.5, share))(W, None)
    up = slope(W, share)
    expected = slope(W, 1 - share) + slope(W + 0.5 * up / jnp.linalg.norm(up), share)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(value, bowls(W, None)[0], rtol=1e-6)


def test_whose_loss_is_to_be_flat():
    np.testing.assert_array_equal(sharpness.rare(0.1, COUNTS, 30).share, [0.0, 0.0, 1.0])
    np.testing.assert_allclose(sharpness.focal(0.1, COUNTS, 2.0).share, [0.16, 0.49, 0.81], rtol=1e-6)
    everyone = sharpness.gradient(bowls, Sharpness(0.5))(W, None)[1]
    np.testing.assert_allclose(sharpness.gradient(bowls, sharpness.focal(0.5, COUNTS, 0.0))(W, None)[1], everyone)


def test_without_images_of_rare_classes_the_gradient_is_the_plain_one():
    def loss(w, phi, counted):
        return bowls(w, phi, counted * jnp.array([1.0, 1.0, 0.0]))

    found = sharpness.gradient(loss, Sharpness(0.5, jnp.array([0.0, 0.0, 1.0])))(W, None)[1]
    np.testing.assert_array_equal(found, slope(W, jnp.array([1.0, 1.0, 0.0])))


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, None),
        ({"sam_below": 30}, [0.0, 0.0, 1.0]),
        ({"sam_focus": 1.0}, [0.4, 0.7, 0.9]),
    ],
)
def test_what_the_config_asks_for(options, share):
    config = configured("ce", **{f"optim__{name}": value for name, value in ({"sam_rho": 0.1} | options).items()})
    found = recipe._sharpness(config, COUNTS)
    assert found.rho == 0.1
    assert share is None if found.share is None else np.allclose(found.share, share)


# --- in the steps ---------------------------------------------------------------------------------


def net_apply(variables, image, *, train=False, modulate=no_modulation, mutable=False, rngs=None):
    """Running averages that count the passes they saw, and one hidden layer."""
    params = variables["params"]
    hidden = modulate("pooled", jnp.tanh(image @ params["stem"]))
    logits = modulate("logits", hidden @ params["head"])
    seen = {"mean": variables["batch_stats"]["mean"] + 10 * params["stem"].sum()}
    return (logits, {"batch_stats": seen}) if mutable else logits


def problem():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"stem": jax.random.normal(keys[0], (5, 4)), "head": jax.random.normal(keys[1], (4, 3))}
    tx = optax.sgd(0.1, 0.9)
    state = bilevel.init_state(keys[2], {"params": params, "batch_stats": {"mean": jnp.float32(1)}}, tx)
    return state, tx, Batch(jax.random.normal(keys[2], (6, 5)), jnp.arange(6) % 3)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("share", [None, [0.2, 0.5, 1.0]])
def test_a_plain_step(share, mixed):
    """The gradient is that above, the update is from w, and the loss, the accuracy and the averages are those at w."""
    state, tx, batch = problem()
    if mixed:
        batch = batch._replace(partner=batch.label[::-1], share=jnp.linspace(0.5, 1.0, 6))
    wanted = Sharpness(0.3, None if share is None else jnp.array(share))
    forward = Pass(net_apply)
    found, metrics = jax.jit(bilevel.make_plain_step(forward, losses.cross_entropy, tx, sharpness=wanted))(state, batch)
    without, at = jax.jit(bilevel.make_plain_step(forward, losses.cross_entropy, tx))(state, batch)
    partner, part = (batch.partner, batch.share) if mixed else (batch.label, jnp.ones(6))

    def loss(w, counts):
        logits = net_apply({"params": w, "batch_stats": state.batch_stats}, batch.image)
        pairs = ((batch.label, part), (partner, 1 - part))
        each = sum(s * losses.cross_entropy(logits, y) for y, s in pairs)
        return (sum(s * counts[y] for y, s in pairs) * each).mean()

    c = jnp.ones(3) if share is None else jnp.array(share)
    up = jax.grad(loss)(state.params, c)
    there = jax.tree.map(lambda w, g: w + 0.3 * g / optax.tree.norm(up), state.params, up)
    grad = jax.tree.map(jnp.add, jax.grad(loss)(state.params, 1 - c), jax.grad(loss)(there, c))
    changes, _ = tx.update(grad, state.opt_state, state.params)
    chex.assert_trees_all_close(found.params, optax.apply_updates(state.params, changes), rtol=1e-5, atol=1e-6)
    assert np.abs(found.params["head"] - without.params["head"]).max() > 1e-4
    chex.assert_trees_all_close(found.batch_stats, without.batch_stats, rtol=1e-6)
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(metrics[name], at[name], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grad), rtol=1e-5)


def test_without_it_the_step_is_the_plain_program():
    state, tx, batch = problem()
    programs = [
        str(jax.make_jaxpr(bilevel.make_plain_step(Pass(net_apply), losses.cross_entropy, tx, **given))(state, batch))
        for given in ({}, {"sharpness": None}, {"sharpness": Sharpness(0.1)})
    ]
    assert programs[0] == programs[1] != programs[2]
    assert recipe._sharpness(configured("ce", optim__sam_rho=0.0), COUNTS) is None


# --- in whole runs --------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_runs")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mfm", {}),
        ("ce", {"optim__sam_below": 20}),
        slow("mfm", {"optim__sam_focus": 1.0, "meta__lagged": False}),
        slow("crt", {}),
        slow("metasaug", {}),
        slow("meta_weight_net", {}),
    ],
)
def test_interrupted_and_resumed_is_bit_identical(name, options, tmp_path):
    config = configured(name, optim__sam_rho=0.1, **options)
    with stopped_at(3), pytest.raises(interruption.Interrupted, match="saved at step 3"):
        train.train_and_evaluate(config, tmp_path / "cut", pages=False)
    for folder in ("cut", "whole"):
        results = train.train_and_evaluate(config, tmp_path / folder, pages=False)
        assert np.isfinite(results["last"]["test"]["nll"])
    cut, whole = (arrays(stored(tmp_path / folder)) for folder in ("cut", "whole"))
    chex.assert_trees_all_equal(cut.params, whole.params)
    train.train_and_evaluate(configured(name), tmp_path / "plain", pages=False)
    gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole.params, arrays(stored(tmp_path / "plain")).params)
    assert max(jax.tree.leaves(gap)) > 1e-5


# --- what does not go together --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("ce", {"optim__sam_below": 20}, "optim.sam_below = 20: not read without optim.sam_rho; set that, or leave it"),
        (
            "ce",
            {"optim__sam_rho": 0.1, "optim__sam_below": 20, "optim__sam_focus": 1.0},
            "optim.sam_below = 20: so does optim.sam_focus = 1.0 say which classes; leave one of them out",
        ),
        ("l2rw", {"optim__sam_rho": 0.1}, "optim.sam_rho = 0.1: l2rw's virtual step starts from a gradient of zero"),
    ],
)
def test_refusals(name, options, told):
    with pytest.raises(UserError) as caught:
        configured(name, **options)
    assert str(caught.value).startswith(told)


@pytest.mark.usefixtures("quick_runs")
@pytest.mark.parametrize("below", [1, 10_000])
def test_a_bound_that_leaves_no_class_or_all_is_refused(below):
    config = configured("ce", optim__sam_rho=0.1, optim__sam_below=below)
    with pytest.raises(UserError, match=rf"optim.sam_below = {below}: the classes have 1 to \d+ training images; choo"):
        experiment_lib.build(config, data_lib.build(config))
