"""Schedules at steps worked out by hand, and the chains' updates on a parameter of two numbers."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import tiny

from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax.bilevel import optim
from mfm_jax.config import Meta, Optim
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.training import inputs
from mfm_jax.training import loop as loop_lib

PARAMS = {"w": np.array([1.0, -2.0], np.float32)}
GRADS = {"w": np.array([3.0, 4.0], np.float32)}


def rates(config: Optim, epochs: int, steps_per_epoch: int, steps: list[int]) -> list[float]:
    schedule = optim.schedule(config, epochs, steps_per_epoch)
    return [float(schedule(step)) for step in steps]


def after(tx: optax.GradientTransformation, gradients: list[dict]) -> dict:
    """Returns PARAMS after one update for each of `gradients`."""
    params, state = PARAMS, tx.init(PARAMS)
    for gradient in gradients:
        changes, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, changes)
    return params


# --- schedules ------------------------------------------------------------------------------------


def test_cosine():
    # Over 12 steps: (1 + cos(pi t / 12)) / 2 of the rate.
    found = rates(Optim(learning_rate=0.8), 4, 3, [0, 4, 6, 8, 12])
    assert found == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0], abs=1e-7)


def test_step_divides_by_a_hundred_twice():
    config = Optim(learning_rate=0.1, schedule="step")
    # 200 epochs of 10 steps: at epochs 160 and 180.
    found = rates(config, 200, 10, [0, 1599, 1600, 1799, 1800, 1999])
    assert found == pytest.approx([0.1, 0.1, 1e-3, 1e-3, 1e-5, 1e-5], rel=1e-5)


@pytest.mark.parametrize(("reference", "rate"), [(0, 0.4), (64, 0.8), (256, 0.2)])
def test_the_rate_is_scaled_to_the_whole_batch(reference, rate):
    config = optim.scaled(Optim(learning_rate=0.4, reference_batch_size=reference, schedule="constant"), 128)
    assert rates(config, 1, 2, [0, 1]) == pytest.approx([rate, rate])


def test_it_begins_anew_over_what_is_left_and_without_a_warm_up():
    config = Optim(learning_rate=0.8, warmup_epochs=1, restarts="3")
    # Two steps an epoch. Warm-up of 2, then 4 of cosine, then 4 of it anew: (1 + cos(pi t / 4)) / 2 of the rate.
    falling = [0.8, 0.8 * (2 + 2**0.5) / 4, 0.4, 0.8 * (2 - 2**0.5) / 4]
    assert rates(config, 5, 2, list(range(10))) == pytest.approx([0.4, 0.8, *falling, *falling], abs=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_each_part_is_a_schedule_of_its_own(schedule):
    config = Optim(learning_rate=0.3, schedule=schedule)
    parts = [rates(config, epochs, 2, list(range(2 * epochs))) for epochs in (10, 5, 7)]
    whole = Optim(learning_rate=0.3, schedule=schedule, restarts="10, 15")
    assert rates(whole, 22, 2, list(range(44))) == pytest.approx([*itertools.chain(*parts)], abs=1e-7)
    # What a run had planned so far stays as it was.
    shorter = Optim(learning_rate=0.3, schedule=schedule, restarts="10")
    assert rates(whole, 22, 2, list(range(30))) == rates(shorter, 15, 2, list(range(30)))


def test_phi_begins_anew_with_the_classifier():
    inner = Optim(learning_rate=0.4, restarts="2")
    pace = optim.meta_schedule(Meta(learning_rate=0.1, every=1, start_epoch=0), inner, 4, 5)
    assert [float(pace(step)) for step in (0, 10)] == pytest.approx([0.1, 0.1])
    assert float(pace(9)) < 0.01


def test_constant():
    assert rates(Optim(learning_rate=0.3, schedule="constant"), 4, 3, [0, 5, 11]) == pytest.approx([0.3] * 3)


@pytest.mark.parametrize(
    ("schedule", "tail"),
    [
        ("cosine", {5: 0.4, 10: 0.2, 15: 0.0}),  # a half-wave over the 10 steps that are left
        ("step", {5: 0.4, 11: 0.4, 12: 4e-3, 13: 4e-5}),  # 80 % and 90 % of the whole run, warm-up included
        ("constant", {5: 0.4, 14: 0.4}),
    ],
)
def test_warmup_rises_linearly_and_shifts_only_what_depends_on_the_rest(schedule, tail):
    config = Optim(learning_rate=0.4, schedule=schedule, warmup_epochs=1)
    assert rates(config, 3, 5, [0, 1, 4]) == pytest.approx([0.08, 0.16, 0.4])
    assert rates(config, 3, 5, list(tail)) == pytest.approx(list(tail.values()), rel=1e-5, abs=1e-7)


# --- the classifier's chain -----------------------------------------------------------------------


def test_sgd_with_decay_and_nesterov_momentum_by_hand():
    tx = optim.classifier(Optim(momentum=0.5, weight_decay=0.1), 0.2)
    # Gradient with decay: [3.1, 3.8]; velocity the same; Nesterov adds half of it: [4.65, 5.7].
    first = np.array([1.0 - 0.2 * 4.65, -2.0 - 0.2 * 5.7])
    chex.assert_trees_all_close(after(tx, [GRADS]), {"w": first.astype(np.float32)}, rtol=1e-5)
    decayed = np.array([3.0, 4.0]) + 0.1 * first
    velocity = decayed + 0.5 * np.array([3.1, 3.8])
    second = first - 0.2 * (decayed + 0.5 * velocity)
    chex.assert_trees_all_close(after(tx, [GRADS, GRADS]), {"w": second.astype(np.float32)}, rtol=1e-5)


def test_sgd_without_momentum_and_decay_is_plain_descent():
    tx = optim.classifier(Optim(momentum=0.0, weight_decay=0.0), 0.5)
    chex.assert_trees_all_close(after(tx, [GRADS, GRADS]), {"w": np.array([-2.0, -6.0], np.float32)})


def test_clipping_acts_on_the_gradient_before_the_decay():
    clipped = optim.classifier(Optim(momentum=0.0, weight_decay=0.1, clip_norm=1.0), 1.0)
    # The norm is 5: [0.6, 0.8] is left, and the decay adds [0.1, -0.2] to that.
    chex.assert_trees_all_close(after(clipped, [GRADS]), {"w": np.array([0.3, -2.6], np.float32)}, rtol=1e-5)
    small = {"w": GRADS["w"] / 10}
    plain = optim.classifier(Optim(momentum=0.0, weight_decay=0.1), 1.0)
    chex.assert_trees_all_close(after(clipped, [small]), after(plain, [small]), rtol=1e-6)


def test_adamw_by_hand():
    tx = optim.classifier(Optim(name="adamw", momentum=0.5, weight_decay=0.1), 0.2)
    # A first step is the gradient's sign, but for epsilons; decay is not part of the moments.
    expected = PARAMS["w"] - 0.2 * (np.sign(GRADS["w"]) + 0.1 * PARAMS["w"])
    chex.assert_trees_all_close(after(tx, [GRADS]), {"w": expected}, rtol=1e-5)
    # Then a gradient of zero: moments m = 0.5 * 0.5 g / (1 - 0.5^2), v = 0.999 * 0.001 g^2 / (1 - 0.999^2).
    ratio = (0.25 / 0.75) / np.sqrt(0.999 * 0.001 / (1 - 0.999**2))
    second = expected - 0.2 * (ratio * np.sign(GRADS["w"]) + 0.1 * expected)
    zero = {"w": np.zeros(2, np.float32)}
    chex.assert_trees_all_close(after(tx, [GRADS, zero]), {"w": second.astype(np.float32)}, rtol=1e-4)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_chain_follows_its_schedule(name):
    tx = optim.classifier(Optim(name=name, momentum=0.0, weight_decay=0.0), lambda step: jnp.where(step < 1, 0.0, 0.1))
    chex.assert_trees_all_equal(after(tx, [GRADS]), PARAMS)
    assert (np.abs(after(tx, [GRADS, GRADS])["w"] - PARAMS["w"]) > 0.05).all()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_update_can_be_differentiated_where_a_gradient_is_zero(name):
    tx = optim.classifier(Optim(name=name, clip_norm=1.0), 0.1)

    def moved(gradient):
        return tx.update({"w": gradient}, tx.init(PARAMS), PARAMS)[0]["w"].sum()

    slope = jax.jit(jax.grad(moved))(jnp.array([0.0, 4.0]))
    chex.assert_tree_all_finite(slope)
    assert slope[0] < 0


# --- the modulator's chain ------------------------------------------------------------------------


def test_phi_moves_by_adam_on_directions_by_hand():
    # Directions [0.6, 0.8] and [1, 0]; the first step of Adam is the rate in each number that has a gradient.
    first = PARAMS["w"] - 0.05
    chex.assert_trees_all_close(after(optim.outer(0.05), [GRADS]), {"w": first}, rtol=1e-5)
    mean = np.array([0.9 * 0.06 + 0.1, 0.9 * 0.08]) / (1 - 0.9**2)
    square = np.array([0.999 * 0.36 + 1.0, 0.999 * 0.64]) * 1e-3 / (1 - 0.999**2)
    second = first - 0.05 * mean / np.sqrt(square)
    found = after(optim.outer(0.05), [GRADS, {"w": np.array([7.0, 0.0], np.float32)}])
    chex.assert_trees_all_close(found, {"w": second.astype(np.float32)}, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-2, 1e8, 1e18])
def test_the_size_of_a_meta_gradient_counts_for_nothing(size):
    tx, scaled = optim.outer(0.05), {"w": np.float32(size) * GRADS["w"]}
    chex.assert_trees_all_close(after(tx, [GRADS, scaled]), after(tx, [GRADS, GRADS]), rtol=1e-4)


def test_phi_stands_still_where_the_meta_gradient_is_zero():
    chex.assert_trees_all_equal(after(optim.outer(0.05), [{"w": np.zeros(2, np.float32)}]), PARAMS)


def test_noise_moves_phi_by_a_quarter_of_the_rate():
    tx, moved = optim.outer(0.05), []
    state = tx.init(PARAMS)
    for gradient in np.random.default_rng(0).normal(size=(2000, 2)).astype(np.float32):
        change, state = tx.update({"w": gradient}, state)
        moved.append(np.abs(change["w"]) / 0.05)
    assert 0.2 < np.sqrt(np.mean(np.square(moved[50:]))) < 0.26  # sqrt(0.1 / 1.9) = 0.23


@pytest.mark.parametrize(("meta", "steps"), [({"every": 2}, [0, 2, 4]), ({"every": 2, "start_epoch": 1}, [6, 8])])
def test_phi_s_rate_falls_as_the_classifier_s_does(meta, steps):
    inner = Optim(learning_rate=0.4, schedule="cosine")
    pace = optim.meta_schedule(Meta(learning_rate=0.1, **meta), inner, 2, 5)
    expected = [float(optim.schedule(inner, 2, 5)(step)) / 4 for step in steps]
    assert [float(pace(done)) for done in range(len(steps))] == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 100])
def test_phi_recovers_from_any_single_meta_gradient(at, monkeypatch):
    """Fifty meta-steps after one of 1e8 in a direction of its own, on the digits, phi is within 10 % of without."""
    config = tiny(data__imbalance_factor=50.0, data__val_images_per_class=0, model__width=0)
    config.meta.update(every=1, batch_size=config_lib.Meta().batch_size)
    config.train.update(epochs=60, batch_size=32)
    config = config_lib.resolve(config)
    data, chain = data_lib.build(config), optim.outer

    def trained(planted: int) -> np.ndarray:
        monkeypatch.setattr(optim, "outer", lambda rate: optax.chain(spiked(planted), chain(rate)))
        experiment = experiment_lib.build(config, data)
        call, loop = loop_lib.make_call(experiment, config), loop_lib.initial(experiment)
        on_device = inputs.to_device(data)
        for step in range(at + 51):
            if step % experiment.steps_per_epoch == 0:
                epoch = step // experiment.steps_per_epoch
                table = jnp.asarray(data.meta_table(epoch), jnp.int32)
                order = experiment.order(jax.random.key(1), epoch)
                on_device = on_device.replace(order=order, meta_table=table)
            loop = call(loop, on_device, jnp.int32(1), "meta")
        return np.stack(jax.tree.leaves(loop.bilevel.phi))

    with_it, without = trained(at), trained(-1)
    assert 0 < np.linalg.norm(with_it - without) < 0.1 * np.linalg.norm(without)


def spiked(at: int) -> optax.GradientTransformation:
    """Puts 1e8 in every number of the gradient of step `at`."""

    def update(gradient, count, params=None):
        del params
        return jax.tree.map(lambda g: jnp.where(count == at, 1e8, g), gradient), count + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
