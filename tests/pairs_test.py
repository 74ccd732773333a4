"""Contrast of the examples of a batch: BCL and SBCL by hand, padding, devices, and whole runs; SimSiam beside them."""

import chex
import contrast_test
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contrast_test import FORWARD, on_one_and_eight, unit
from helpers import arrays, configured, slow

from mfm_jax import data as data_lib
from mfm_jax.bilevel import agreement, auxiliary, contrast, optim, pairs
from mfm_jax.bilevel.auxiliary import Seen
from mfm_jax.errors import UserError
from mfm_jax.machine import interruption, parallel
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.types import PROJECTION, Batch

T, COUNTS = 0.5, np.array([6, 4, 2])
HEAD = {"kernel": jax.random.normal(jax.random.key(9), (4, 3)), "bias": jnp.zeros(3)}
LABELS = jnp.array([0, 0, 1, 0, 1])
FEATURES = jax.random.normal(jax.random.key(0), (2, 5, 4))


def seen_of(features, labels, weight=None):
    return [Seen(Batch(view, labels, weight=weight), jnp.zeros(()), {"pooled": view}) for view in features]


def of(beside, key=5):
    """Returns parameters with the loss's projection."""
    return {"head": HEAD, PROJECTION: {beside.name: beside.projection(jax.random.key(key), {"head": HEAD})}}


def by_hand(z, i, kind, among, amounts):
    """Returns l_i, by numbers of examples."""
    if not kind:
        return 0.0
    rest = np.log(sum(np.exp(z[i] @ z[a] / T) / amounts[a] for a in among))
    return rest - np.mean([z[i] @ z[p] / T for p in kind])


# --- BCL ------------------------------------------------------------------------------------------


def bcl(features=FEATURES, labels=LABELS, weight=None):
    beside = pairs.balanced(3, 2.0, T, 8)
    params = of(beside)
    return beside.loss(params, {}, seen_of(features, labels, weight), FORWARD)[0], params[PROJECTION]["bcl"]


def test_the_balanced_contrast_by_hand():
    """Ten examples and three classes, of which the third has no example."""
    found, layers = bcl()
    examples = [np.asarray(contrast.project(layers["examples"], view)) for view in FEATURES]
    z = np.concatenate([*examples, contrast.project(layers["classes"], HEAD["kernel"].T)])
    labels = [*map(int, LABELS), *map(int, LABELS), 0, 1, 2]
    values = []
    for i in range(10):
        others = [a for a in range(13) if a != i]
        amounts = {a: sum(labels[b] == labels[a] for b in others) for a in others}
        values.append(by_hand(z, i, [p for p in others if labels[p] == labels[i]], others, amounts))
    np.testing.assert_allclose(found, 2 * np.mean(values), rtol=1e-5)


def test_each_class_counts_alike_however_many_examples_it_has():
    """An example that is there once more, as near to all as its like, changes nothing for the others."""
    cosines = jnp.array([[0.2, 0.5, -0.3]])
    kind, among = jnp.array([[True, False, False]]), jnp.ones((1, 3), bool)
    once = pairs._contrast(cosines, kind, among, jnp.ones((1, 3)))
    more = [jnp.concatenate([x, x[:, 1:2]], axis=1) for x in (cosines, kind, among)]
    twice = pairs._contrast(*more, jnp.array([[1.0, 2, 1, 2]]))
    np.testing.assert_allclose(once, twice, rtol=1e-6)


def test_nobody_of_the_kind_is_no_loss_and_no_gradient():
    nothing = jnp.zeros((1, 3), bool)
    for among in (nothing, ~nothing):
        value, grad = jax.value_and_grad(lambda x, among=among: pairs._contrast(x, nothing, among)[0])(jnp.ones((1, 3)))
        assert value == 0
        chex.assert_trees_all_equal(grad, jnp.zeros((1, 3)))


# --- SBCL -----------------------------------------------------------------------------------------


def sbcl(memory=None, features=FEATURES, labels=LABELS, weight=None):
    """Returns loss and memory after a batch of 5 of 12 images, whose classes have 3, 2 and 1 subclasses."""
    beside = pairs.by_subclasses(COUNTS, 5, 2.0, T, 8, 2)
    params = of(beside)
    found = beside.loss(params, memory or beside.init(), seen_of(features, labels, weight), FORWARD)
    return *found, [np.asarray(contrast.project(params[PROJECTION]["sbcl"], view)) for view in features]


MEMORY = {"mean": unit(4, 6, 8) * 0.5, "share": jnp.array([0.2, 0.2, 0.2, 0.4, 0.4, 0.2])}


def test_subclasses_by_hand():
    loss, after, views = sbcl(MEMORY)
    mean, share = np.asarray(MEMORY["mean"], np.float64), np.asarray(MEMORY["share"], np.float64)
    of_class, chosen = {0: (0, 1, 2), 1: (3, 4), 2: (5,)}, []
    for z, label in zip(views[0], LABELS, strict=True):
        own = of_class[int(label)]
        distance = [(1 - z @ mean[s] / np.linalg.norm(mean[s])) * share[s] for s in own]
        chosen.append(own[int(np.argmin(distance))])
    assert len(set(chosen)) > 2  # otherwise the second contrast is of nobody
    z, labels, subclasses = np.concatenate(views), [*map(int, LABELS)] * 2, chosen * 2
    values, ones = [], dict.fromkeys(range(10), 1)
    for i in range(10):
        others = [a for a in range(10) if a != i]
        near = [a for a in others if subclasses[a] == subclasses[i]]
        beyond = [a for a in others if a not in near]
        akin = [a for a in beyond if labels[a] == labels[i]]
        values.append(by_hand(z, i, near, others, ones) + by_hand(z, i, akin, beyond, ones))
    np.testing.assert_allclose(loss, 2 * np.mean(values), rtol=1e-5)
    shares = share * (1 - 5 / 12) + np.bincount(chosen, minlength=6) / 5
    np.testing.assert_allclose(after["share"], shares, rtol=1e-5)
    for s in range(6):
        members = [k for k in range(5) if chosen[k] == s]
        part = len(members) / 5 / shares[s]
        want = mean[s] + part * (views[0][members].mean(0) - mean[s]) if members else mean[s]
        np.testing.assert_allclose(after["mean"][s], want, atol=1e-6)


def test_no_subclass_gets_all_of_its_class():
    """Of one class, whose vectors lie close together: shares are held within a factor."""
    beside = pairs.by_subclasses(np.array([400]), 40, size=8, images=100)
    memory = beside.init()
    projection = {"head": {"kernel": jnp.zeros((4, 1))}, PROJECTION: {}}
    projection[PROJECTION]["sbcl"] = beside.projection(jax.random.key(1), projection)
    step = jax.jit(lambda memory, seen: beside.loss(projection, memory, seen, FORWARD)[1])
    for key in jax.random.split(jax.random.key(2), 60):
        x = 1 + 0.3 * jax.random.normal(key, (40, 4))
        memory = step(memory, seen_of([x, x], jnp.zeros(40, jnp.int32)))
    share = np.asarray(memory["share"])
    assert share.sum() == pytest.approx(10, rel=0.05)  # batches of an epoch
    assert share.max() < 4 * share.min()


def test_a_batch_of_all_images_leaves_finite_means():
    """Nothing is kept of a share then, and a subclass that gets no image has none."""
    beside = pairs.by_subclasses(COUNTS, 12, size=8, images=2)
    params, memory = of(beside), beside.init()
    view, labels = jax.random.normal(jax.random.key(0), (12, 4)), jnp.repeat(jnp.arange(3), COUNTS)
    for _ in range(3):
        memory = beside.loss(params, memory, seen_of([view, view], labels), FORWARD)[1]
        assert np.isfinite(memory["mean"]).all()


# --- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [bcl, sbcl])
def test_a_padded_batch_is_the_batch(loss):
    plain = loss()[0]
    padded = parallel.padded(Batch(FEATURES[0], LABELS, second=Batch(FEATURES[1], LABELS)), 4)
    views = [view.image for view in padded.views]
    assert len(views[0]) == 8
    np.testing.assert_allclose(loss(features=views, labels=padded.label, weight=padded.weight)[0], plain, rtol=1e-5)


@pytest.mark.parametrize("beside", [pairs.balanced(3, 1.0, T, 8), pairs.by_subclasses(COUNTS, 5, 1.0, T, 8, 2)])
def test_the_gradient_is_that_of_the_difference(beside, wide):
    features = jnp.asarray(FEATURES, jnp.float64)
    memory, params = beside.init(), jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), of(beside))
    step = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape, x.dtype), params)

    def along(t):
        moved = jax.tree.map(lambda x, d: x + t * d, params, step)
        return beside.loss(moved, memory, seen_of(features, LABELS), FORWARD)[0]

    along = jax.jit(along)
    found, h = jax.grad(along)(0.0), 1e-6
    assert abs(float(found)) > 1e-3
    assert float(found) == pytest.approx(float(along(h) - along(-h)) / (2 * h), rel=1e-6)


WEIGHTS = {"bcl": {"method__bcl_weight": 0.5}, "sbcl": {"method__sbcl_weight": 0.5, "method__sbcl_images": 20}}


def run(which, name="ce", **overrides):
    return configured(name, method__contrast_features=8, **WEIGHTS[which], **overrides)


def batches(data, size=40):
    """Returns a training batch with a second view, and a meta batch."""
    batch, meta = contrast_test.batches(data, size)
    return batch._replace(second=Batch(batch.image[:, ::-1], batch.label)), meta


@pytest.mark.usefixtures("quick_runs")
def test_weight_zero_is_the_plain_method_and_another_forms_the_features_too():
    states = []
    off = {"method__contrast_features": 8, "method__contrast_temperature": 1.0, "method__sbcl_images": 7}
    for config in (configured("ce"), configured("ce", **off), run("bcl"), run("sbcl")):
        data = data_lib.build(config)
        experiment = experiment_lib.build(config, data)
        batch = batches(data)[0]
        batch = batch if config.method.second_view else batch._replace(second=None)
        state, step = experiment.init(), jax.jit(experiment.plain_step)
        for _ in range(2):
            state, _ = step(state, batch)
        states.append(arrays(state))
    chex.assert_trees_all_equal(states[0], states[1])
    assert [set(state.memory) for state in states] == [set(), set(), {"bcl"}, {"sbcl"}]
    for state in states[2:]:
        assert np.abs(states[0].params["stage3"]["kernel"] - state.params["stage3"]["kernel"]).max() > 1e-5


@pytest.mark.parametrize(("which", "name"), [("bcl", "mfm"), ("sbcl", "mfm"), slow("bcl", "ldam")])
@pytest.mark.usefixtures("quick_runs")
def test_eight_devices_equal_one(which, name, monkeypatch):
    monkeypatch.setattr(optim, "outer", lambda *_: optax.sgd(0.1))
    one, eight = on_one_and_eight(run(which, name), batches)
    chex.assert_trees_all_close(eight, one, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("which", "name"), [("sbcl", "logit_adjusted"), slow("bcl", "mfm")])
@pytest.mark.usefixtures("quick_runs")
def test_a_run_resumes_bit_for_bit_and_its_projection_is_not_tested(which, name, tmp_path):
    """`methods_test` has SimSiam."""
    from methods_test import trained

    config = run(which, name)
    whole = trained(config, tmp_path / "whole")
    with pytest.raises(interruption.Interrupted, match="saved at step 3"):
        trained(config, tmp_path / "parts", stop_at=3, like=whole)
    again = trained(config, tmp_path / "parts")
    chex.assert_trees_all_equal(arrays(again.loop), arrays(whole.loop))
    state = whole.loop.bilevel
    assert PROJECTION in state.params
    assert PROJECTION not in whole.experiment.tested.params(state)


def test_what_pairs_do_not_go_with():
    with pytest.raises(UserError, match=r"method.bcl_weight = 0.5: contrasts images of one class each, not augment"):
        run("bcl", augment__mixup=0.2)
    with pytest.raises(UserError, match=r"method.bcl_weight = 0.5: contrasts with the weights of the last layer, and"):
        run("bcl", method__head="simplex")
    with pytest.raises(UserError, match=r"method.sbcl_weight = 0.5: contrasts images .*, not the mixtures of glmc"):
        run("sbcl", "glmc")


def test_what_simsiam_does_not_go_with():
    for field in ("mixup", "cutmix"):
        with pytest.raises(UserError, match=rf"augment.{field} = 0.2: simsiam compares views of one image; set the"):
            configured("simsiam", **{f"augment__{field}": 0.2})
    with pytest.raises(UserError, match=r"model.tune = 'head': the first stage of simsiam trains what is below the"):
        configured("simsiam", model__tune="head")


# --- SimSiam --------------------------------------------------------------------------------------


def test_the_siamese_loss_by_hand():
    beside = agreement.siamese(64)
    params = of(beside)
    layers = jax.tree.map(lambda x: np.asarray(x, np.float64), params[PROJECTION]["agreement"])
    assert layers["narrow"]["kernel"].shape == (64, 16)

    def linear(name, x):
        return x @ layers[name]["kernel"] + layers[name]["bias"]

    def normal(x):
        return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)

    found = []
    for view in np.asarray(FEATURES, np.float64):
        x = np.maximum(normal(linear("first", view)), 0)
        z = normal(linear("third", np.maximum(normal(linear("second", x)), 0)))
        found.append((z, linear("predict", np.maximum(normal(linear("narrow", z)), 0))))
    (z1, p1), (z2, p2) = found

    def apart(p, z):
        return 1 - (p * z).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(z, axis=1)

    value, memory = beside.loss(params, {}, seen_of(FEATURES, LABELS), FORWARD)
    assert memory == {}
    np.testing.assert_allclose(value, (apart(p1, z2) + apart(p2, z1)).mean() / 2, rtol=1e-4)


@pytest.mark.usefixtures("quick_runs")
def test_no_label_counts_in_the_first_stage_of_simsiam():
    config = configured("simsiam")
    data = data_lib.build(config)
    experiment = experiment_lib.build(config, data)
    step, batch = jax.jit(experiment.plain_step), batches(data)[0]
    wrong = (batch.label + 1) % 10
    other = batch._replace(label=wrong, second=batch.second._replace(label=wrong))
    states = [step(experiment.init(), one)[0] for one in (batch, other)]
    chex.assert_trees_all_equal(arrays(states[0].params), arrays(states[1].params))
    start = arrays(experiment.init()).params
    assert np.abs(start["stage3"]["kernel"] - arrays(states[0].params)["stage3"]["kernel"]).max() > 1e-6
    again = jax.jit(experiment.retrain_step)
    heads = [arrays(again(states[0], one)[0].phi) for one in (batch, other)]
    assert np.abs(heads[0]["kernel"] - heads[1]["kernel"]).max() > 1e-6


@pytest.mark.usefixtures("quick_runs")
def test_eight_devices_normalise_as_one():
    one, eight = on_one_and_eight(configured("simsiam"), batches)
    chex.assert_trees_all_close(eight, one, rtol=1e-4, atol=2e-5)


def test_the_classifier_that_is_tested_has_no_projection():
    params = of(pairs.balanced(3))
    assert set(auxiliary.without_projection(params)) == {"head"}
