"""Bounds and decay of the last layer's weight vectors: by hand, off bit for bit, and in whole runs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import arrays, configured, stored

from mfm_jax.bilevel import balancing, optim
from mfm_jax.config import Optim
from mfm_jax.errors import UserError
from mfm_jax.training import train

KERNEL = jnp.array([[3.0, 0.0], [4.0, 1.0]])  # lengths 5 and 1
HEAD = {"kernel": KERNEL, "bias": jnp.array([9.0, 9.0])}
PARAMS = {"stem": {"kernel": 10 * KERNEL}, "head": HEAD}


def moved(tx: optax.GradientTransformation, params, gradient):
    @jax.jit
    def step(params, state):
        changes, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, changes), state

    return step(params, tx.init(params))


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def test_a_weight_vector_that_is_too_long_is_shortened():
    found, _ = moved(balancing.max_norm(2.0), PARAMS, zeros(PARAMS))
    expected = jnp.array([[1.2, 0.0], [1.6, 1.0]])
    chex.assert_trees_all_close(found, PARAMS | {"head": HEAD | {"kernel": expected}}, rtol=1e-6)
    chex.assert_trees_all_equal(found["head"]["kernel"][:, 1], KERNEL[:, 1])


def test_what_counts_is_the_length_after_the_update():
    change = {"kernel": jnp.array([[-3.0, 0.0], [-3.0, 3.0]]), "bias": jnp.zeros(2)}  # to (0, 1) and (0, 4)
    found, _ = moved(balancing.max_norm(2.0), HEAD, change)
    np.testing.assert_allclose(found["kernel"], [[0.0, 0.0], [1.0, 2.0]], rtol=1e-6)


def test_the_decay_of_a_class_goes_by_its_images():
    found, _ = moved(balancing.class_decay(0.2, jnp.array([10, 5])), PARAMS, zeros(PARAMS))
    expected = PARAMS | {"head": HEAD | {"kernel": KERNEL * jnp.array([[1.2, 1.1]])}}
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decay_and_bound_in_the_chain(name):
    """SGD adds the decay to the gradient, here to its momentum too; AdamW adds it to the step."""
    settings = Optim(name=name, momentum=0.5, weight_decay=0.1, head_decay=0.2, head_max_norm=4.0)
    found, _ = moved(optim.classifier(settings, 0.1, jnp.array([10, 5])), HEAD, zeros(HEAD))
    nesterov = 1.5 if name == "sgd" else 1.0
    kernel = KERNEL * (1 - 0.1 * nesterov * (0.1 + 0.2 * jnp.array([[1.0, 0.5]])))
    kernel = kernel * jnp.array([[4.0 / jnp.linalg.norm(kernel[:, 0]), 1.0]])
    expected = {"kernel": kernel, "bias": HEAD["bias"] * (1 - 0.1 * nesterov * 0.1)}
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


def test_decay_by_classes_needs_their_images():
    with pytest.raises(ValueError, match="head_decay: needs counts"):
        optim.classifier(Optim(head_decay=0.1), 0.1)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_bound_that_is_never_reached_changes_no_bit(name):
    key = jax.random.key(0)
    params = {"stem": jax.random.normal(key, (3, 4)), "head": {"kernel": jax.random.normal(key, (4, 5))}}
    plain, bounded = (optim.classifier(Optim(name=name, head_max_norm=m), 0.1) for m in (0.0, 1e6))
    chex.assert_trees_all_equal(moved(plain, params, params)[0], moved(bounded, params, params)[0])


def test_adamw_is_optax_s_bit_for_bit():
    ours = optim.classifier(Optim(name="adamw", weight_decay=0.3), 0.1)
    theirs = optax.chain(optax.adamw(0.1, b1=0.9, weight_decay=0.3, eps_root=optim.EPS_ROOT))
    chex.assert_trees_all_equal(moved(ours, PARAMS, PARAMS), moved(theirs, PARAMS, PARAMS))


@pytest.mark.usefixtures("quick_runs")
@pytest.mark.parametrize("name", ["mfm", "crt"])
def test_no_class_is_beyond_the_bound_after_a_run(name, tmp_path):
    config = configured(name, optim__head_max_norm=0.5, optim__head_decay=0.01)
    train.train_and_evaluate(config, tmp_path, pages=False)
    state = arrays(stored(tmp_path))
    for head in (state.params["head"], *([state.phi] if name == "crt" else [])):
        lengths = np.linalg.norm(head["kernel"], axis=0)
        assert lengths.max() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(("name", "base"), [("ldam", "own"), ("mfm", "ldam_drw")])
@pytest.mark.parametrize("field", ["head_max_norm", "head_decay"])
def test_directions_have_no_length(name, base, field):
    with pytest.raises(UserError, match=f"optim.{field} = 0.1: the last layer of ldam.* compares directions"):
        configured(name, method__base=base, **{f"optim__{field}": 0.1})
