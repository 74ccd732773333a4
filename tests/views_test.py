"""A second view of a batch, and the methods that compare the two."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Tiny, configured

from mfm_jax import data as data_lib
from mfm_jax.bilevel import losses, views
from mfm_jax.bilevel.passes import Pass
from mfm_jax.data import augment
from mfm_jax.errors import UserError
from mfm_jax.machine import parallel
from mfm_jax.methods import settings
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.training import inputs, recipe
from mfm_jax.training import loop as loop_lib
from mfm_jax.types import Batch

KEYS = inputs.step_keys(jax.random.key(3), 0)


def made(config, mesh=None):
    """Returns the first training batch of a run."""
    data = data_lib.build(config)
    order = jnp.arange(96, dtype=jnp.int32)[None] * 7 % len(data.train_labels)
    given = inputs.to_device(data).replace(order=order, meta_table=jnp.asarray(data.meta_table(0), jnp.int32))
    given = given.replace(mean=jnp.zeros(1), std=jnp.ones(1))

    def make(given):
        batch = loop_lib._training_batch(KEYS, given, jnp.int32(0), config, mesh)
        return jax.lax.with_sharding_constraint(batch, parallel.split(mesh)) if mesh else batch

    given = jax.device_put(given, parallel.replicated(mesh) if mesh else inputs.everywhere(None))
    return jax.jit(make)(given), jax.make_jaxpr(make)(given), given


# --- the second view ------------------------------------------------------------------------------


@pytest.fixture
def two_views(monkeypatch):
    """Has every method ask for a second view, which cross-entropy does not read."""
    monkeypatch.setattr(settings.Method, "second_view", property(lambda self: True))


def test_a_second_view_is_another_draw_of_the_augmentation_of_the_same_images(two_views):
    config = configured("ce", augment__pad=2, augment__flip=True, augment__color_jitter=0.4)
    batch, _, given = made(config)
    assert batch.second.weight is batch.second.second is None
    chex.assert_trees_all_equal(batch.second.label, batch.label)
    images = given.images[given.order[0]]
    key = jax.random.fold_in(KEYS[0], 2**31 - 1)
    for view, which in ((batch.image, KEYS[0]), (batch.second.image, key)):
        expected = jax.jit(lambda key: augment.augment_batch(key, images, config.augment))(which)
        chex.assert_trees_all_close(view, expected, rtol=1e-6)
    differ = (batch.image != batch.second.image).any((1, 2, 3))
    assert differ.all()
    plain, _, _ = made(configured("ce", augment__pad=0, augment__flip=False))
    chex.assert_trees_all_equal(plain.second.image, plain.image)


def test_the_views_of_a_batch_have_its_weights(two_views):
    batch, _, _ = made(configured("ce"))
    padded = parallel.padded(batch._replace(**_cut(batch, 93)), 8)
    first, second = padded.views
    assert first.second is second.second is None
    assert len(first.label) == len(second.image) == 96
    chex.assert_trees_all_equal(first.weight, second.weight)
    assert not first.weight[93:].any()
    assert not second.image[93:].any()


def _cut(batch, size):
    return {
        "image": batch.image[:size],
        "label": batch.label[:size],
        "second": Batch(batch.second.image[:size], batch.second.label[:size]),
    }


def test_a_mixed_batch_keeps_its_second_view(two_views):
    config = configured("ce", augment__mixup=0.5)
    batch, _, _ = made(config)
    chex.assert_trees_all_equal(batch.second.image, made(configured("ce"))[0].second.image)
    assert batch.second.partner is None
    assert (batch.image != batch.second.image).any()


def test_without_a_second_view_the_program_is_the_plain_one(monkeypatch):
    config = configured("ce", augment__flip=True)
    batch, program, given = made(config)
    assert batch.second is None

    def plain(given):
        examples = inputs.training(given, jnp.int32(0))
        return loop_lib._prepared(KEYS[0], examples, given, config)

    assert str(program) == str(jax.make_jaxpr(plain)(given))
    monkeypatch.setattr(settings.Method, "second_view", property(lambda self: True))
    twice, more, _ = made(config)
    chex.assert_trees_all_equal(twice._replace(second=None), batch)
    assert len(more.eqns) > len(program.eqns)


def test_the_second_view_on_several_devices_is_that_on_one(two_views):
    config = configured("ce", augment__flip=True)
    one, many = made(config)[0], made(config, parallel.data_mesh())[0]
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, many), jax.tree.map(np.asarray, one))


# --- GLMC -----------------------------------------------------------------------------------------


LABELS = jnp.arange(200, dtype=jnp.int32)
# Every pixel tells which image and which view it comes from.
VIEWS = tuple(
    jnp.broadcast_to(LABELS.astype(jnp.float32)[:, None, None, None] + of_view, (200, 12, 10, 3))
    for of_view in (0, 1000)
)


@pytest.mark.parametrize("given", [False, True])
def test_the_two_mixtures_are_of_the_same_pairs_and_shares(given):
    partners = (tuple(view + 500 for view in VIEWS), LABELS + 500) if given else None
    key = jax.random.key(4)
    (blended, *_), (pasted, *_) = first, second = augment.mixed_views(key, VIEWS, LABELS, 0.5, partners)
    pair_key, share_key, _ = jax.random.split(key, 3)
    drawn = np.asarray(jax.random.beta(share_key, 0.5, 0.5, (200,), jnp.float32))
    share = np.maximum(drawn, 1 - drawn)
    others = np.asarray(LABELS + 500 if given else LABELS[jax.random.permutation(pair_key, 200)])
    for labels, partner in (first[1:3], second[1:3]):
        chex.assert_trees_all_equal(labels, LABELS)
        chex.assert_trees_all_equal(partner, others)
    np.testing.assert_allclose(first[3], share, rtol=1e-6)
    value = share * np.asarray(LABELS) + (1 - share) * others
    np.testing.assert_allclose(blended, np.broadcast_to(value[:, None, None, None], blended.shape), rtol=1e-5)
    inside = np.asarray(pasted) != 1000 + np.asarray(LABELS)[:, None, None, None]
    theirs = np.broadcast_to(1000 + others[:, None, None, None], inside.shape)
    chex.assert_trees_all_equal(np.asarray(pasted)[inside], theirs[inside].astype(np.float32))
    kept = np.asarray(second[3])
    moved = others != np.asarray(LABELS)
    np.testing.assert_allclose(kept[moved], 1 - inside[..., 0].mean((1, 2))[moved], rtol=1e-5)
    assert (kept >= share - 1e-6).all()  # the box is cut off at the edges and rounded down
    assert 0.5 < kept.min() < 0.75


def test_disagreement_by_hand():
    predicted = jnp.array([[1.0, 0.0], [2.0, 0.0], [0.5, 0.0], [3.0, 4.0]])
    target = jnp.array([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [4.0, 3.0]])
    np.testing.assert_allclose(views.disagreement(predicted, target), [0, 1, 2, 1 - 24 / 25], atol=1e-6)
    held = jax.grad(lambda z: views.disagreement(predicted, z).sum())(target)
    chex.assert_trees_all_equal(held, jnp.zeros_like(target))
    zero = jax.grad(lambda p: views.disagreement(p, target).sum())(jnp.zeros_like(predicted))
    assert np.isfinite(zero).all()


def test_the_gradient_of_a_disagreement_is_that_of_its_difference(wide):
    predicted, target = jax.random.normal(jax.random.key(0), (2, 5, 3), jnp.float64)
    direction = jax.random.normal(jax.random.key(1), (5, 3), jnp.float64)

    def along(t):
        return views.disagreement(predicted + t * direction, target).sum()

    found, step = jax.grad(along)(0.0), 1e-5
    assert float(found) == pytest.approx(float(along(step) - along(-step)) / (2 * step), rel=1e-8)


def glmc(**overrides):
    """Returns the config, data and experiment of a GLMC run of a tiny network."""
    config = configured("glmc", **overrides)
    data = data_lib.build(config)
    return config, data, experiment_lib.build(config, data)


def batch_of(data, size=40):
    """Returns a batch of two mixtures."""
    image = jnp.asarray(data.train_images[:size], jnp.float32) / 16
    label, share = jnp.asarray(data.train_labels[:size]), jnp.linspace(0.5, 1.0, size)
    first = Batch(share[:, None, None, None] * image, label, label[::-1], share)
    return first._replace(second=Batch(image[:, ::-1], label, label[::-1], 1 - (1 - share) / 2))


@pytest.mark.usefixtures("quick_runs")
def test_the_loss_of_glmc_by_hand():
    _, data, experiment = glmc(method__consistency=3.0)
    state, batch = experiment.init(), batch_of(data)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    values, projected = [], []
    for view in batch.views:
        seen = {}
        record = lambda site, features: seen.setdefault(site, features)  # noqa: B023, E731
        logits, _ = Tiny(10, jnp.float32).apply(
            variables, view.image, train=True, modulate=record, mutable=["batch_stats"]
        )
        own, other = (losses.cross_entropy(logits, of) for of in (view.label, view.partner))
        values.append(float((view.share * own + (1 - view.share) * other).mean()))
        z = seen["pooled"] @ state.phi["project"]["kernel"]
        projected.append((z, z @ state.phi["predict"]["kernel"]))
    (z1, p1), (z2, p2) = (map(np.asarray, pair) for pair in projected)

    def cosine(a, b):
        return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

    apart = 1 - (cosine(p1, z2) + cosine(p2, z1)).mean() / 2
    _, metrics = jax.jit(experiment.plain_step)(state, batch)
    assert float(metrics["loss"]) == pytest.approx(sum(values) / 2 + 3 * apart, rel=1e-4)


@pytest.mark.usefixtures("quick_runs")
def test_without_consistency_the_classifier_takes_the_step_of_its_mixtures():
    """The mean of the two mixtures' losses: of one mixture twice, that of the plain step on it, but for rounding."""
    _, data, experiment = glmc(method__consistency=0.0, method__weighting="sqrt_frequency")
    state, batch = experiment.init(), batch_of(data)
    plain = experiment_lib.build(configured("ce"), data)
    alone = batch._replace(second=None)
    found, metrics = jax.jit(experiment.plain_step)(state, batch._replace(second=alone))
    start = plain.init().replace(params=state.params, key=state.key)
    expected, expected_metrics = jax.jit(plain.plain_step)(start, alone)
    chex.assert_trees_all_close(found.params, expected.params, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(found.batch_stats, expected.batch_stats, rtol=1e-6)
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-5)
    other, _ = jax.jit(experiment.plain_step)(state, batch)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), other.params, found.params))) > 1e-4


@pytest.mark.usefixtures("quick_runs")
def test_class_weights_set_in_with_the_square_of_the_epoch():
    config, data, experiment = glmc(train__epochs=4, method__weighting="inverse_frequency")
    weights, steps = recipe.of(config, data).class_weights, experiment.steps_per_epoch
    final = np.asarray(losses.frequency_weights(jnp.asarray(data.counts)))
    for epoch in range(4):
        for step in (epoch * steps, (epoch + 1) * steps - 1):
            expected = 1 + (epoch / 4) ** 2 * (final - 1)
            np.testing.assert_allclose(weights(jnp.int32(step)), expected, rtol=1e-5)


@pytest.mark.usefixtures("quick_runs")
def test_agreement_is_learned_and_the_projection_moves():
    _, data, experiment = glmc(method__consistency=10.0, optim__learning_rate=0.02, optim__schedule="constant")
    step, state, batch = jax.jit(experiment.plain_step), experiment.init(), batch_of(data)
    start, first = state, None
    for _ in range(20):
        state, metrics = step(state, batch)
        first = first or float(metrics["loss"])
    assert float(metrics["loss"]) < 0.7 * first
    for name in ("project", "predict"):
        assert np.abs(state.phi[name]["kernel"] - start.phi[name]["kernel"]).max() > 1e-3


def test_both_mixtures_of_a_training_batch_have_the_same_partners():
    batch, _, _ = made(configured("glmc", augment__flip=True))
    for name in ("label", "partner"):
        chex.assert_trees_all_equal(getattr(batch, name), getattr(batch.second, name))
    assert (batch.second.share >= batch.share - 1e-6).all()
    assert (batch.image != batch.second.image).any((1, 2, 3)).all()


def test_balanced_partners_of_two_mixtures_have_two_views_as_well():
    plain, _, _ = made(configured("glmc"))
    config = configured("glmc", augment__partners="balanced", augment__flip=True)
    batch, _, _ = made(config)
    many, _, _ = made(config, parallel.data_mesh())
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, many), jax.tree.map(np.asarray, batch))
    chex.assert_trees_all_equal(batch.partner, batch.second.partner)
    rare = lambda one: np.bincount(one.partner, minlength=10).min()  # noqa: E731
    assert rare(batch) > rare(plain)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"augment__mixup": 0.5}, r"augment.mixup = 0.5: glmc mixes images for itself, by method.mixing; set"),
        ({"augment__cutmix": 1.0}, r"augment.cutmix = 1.0: glmc mixes images for itself"),
        ({"train__accumulate": 2}, r"train.accumulate = 2: glmc compares features of the whole batch; set it to 1"),
        ({"optim__restarts": "1"}, r"optim.restarts = '1': glmc has one plan for all of train.epochs"),
    ],
)
def test_what_does_not_go_with_two_mixtures(fields, message):
    with pytest.raises(UserError, match=message):
        configured("glmc", **fields)


def test_a_batch_in_parts_is_refused():
    forward = Pass(lambda *_, **__: None, parts=2)
    with pytest.raises(ValueError, match="parts = 2: features of a whole batch are compared"):
        views.make_views_step(forward, losses.cross_entropy, optax.sgd(0.1), views.linear(3, 2, 1.0), optax.sgd(0.1))
