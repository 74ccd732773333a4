"""ProCo: the mean over a von Mises-Fisher distribution against quadrature and SciPy, running means, and whole runs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import arrays, configured, stored
from jax.test_util import check_grads
from scipy.special import ive

from mfm_jax import data as data_lib
from mfm_jax.bilevel import auxiliary, contrast, optim
from mfm_jax.bilevel.passes import Pass
from mfm_jax.evaluation import classifier
from mfm_jax.machine import interruption, parallel
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.training import train
from mfm_jax.types import PROJECTION, Batch

FORWARD = Pass(lambda variables, image, **options: image)


def unit(key, *shape):
    x = jax.random.normal(jax.random.key(key), shape)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize(("p", "tolerance"), [(8, 2e-4), (64, 1e-5), (128, 1e-5)])
def test_the_moment_is_a_ratio_of_bessel_functions(p, tolerance):
    lengths = np.array([0.0, 0.3, 0.7, 0.95, 0.999])
    mean, z, t = unit(0, 5, p) * lengths[:, None].astype(np.float32), unit(1, 3, p), 0.1
    found = contrast.log_moment(mean, z, t)
    mean, z, nu = np.asarray(mean, np.float64), np.asarray(z, np.float64), p / 2 - 1
    r2 = (mean**2).sum(axis=1)
    leaning = mean * ((p - r2) / (1 - r2))[:, None]

    def log_bessel(x):  # of I_nu(x) / x^nu, which tends to 2^-nu / Gamma(nu + 1)
        x = np.maximum(x, 1e-3)
        return np.log(ive(nu, x)) + x - nu * np.log(x)

    after = np.linalg.norm(leaning[None] + z[:, None] / t, axis=2)
    want = log_bessel(after) - log_bessel(np.linalg.norm(leaning, axis=1))[None]
    np.testing.assert_allclose(found, want, atol=tolerance * 20, rtol=tolerance)


def test_a_class_that_was_not_seen_is_everywhere_on_the_sphere():
    """The mean of exp(u / t) over the first coordinate u of the sphere, of density (1 - u^2)^((p - 3) / 2)."""
    p, t = 16, 0.2
    u = np.linspace(-1, 1, 200_001)
    density = np.maximum(1 - u**2, 0) ** ((p - 3) / 2)
    want = np.log((np.exp(u / t) * density).sum() / density.sum())
    found = contrast.log_moment(jnp.zeros((2, p)), unit(0, 3, p), t)
    np.testing.assert_allclose(found, np.full((3, 2), want), rtol=1e-4)


def test_a_class_whose_features_are_equal_is_a_single_example():
    mean, z = unit(0, 2, 32), unit(1, 4, 32)
    found = contrast.log_moment(mean, z, 0.5)
    np.testing.assert_allclose(found, z @ mean.T / 0.5, atol=1e-3)


def test_derivatives_in_float64():
    with jax.enable_x64(True):
        mean = unit(0, 3, 12).astype(jnp.float64) * jnp.array([0.0, 0.6, 0.95])[:, None]
        z = unit(1, 2, 12).astype(jnp.float64)
        check_grads(lambda z: contrast.log_moment(mean, z, 0.3), (z,), order=2, modes=["rev"], rtol=1e-5)


def stepped(memory, features, labels, counts, batch_size, weight=None, forward=FORWARD):
    """Returns the loss and the memory after a batch of features, projected by nothing."""
    beside = contrast.proco(counts, batch_size, 1.0, 0.5, size=8)
    projection = contrast.new_projection(jax.random.key(5), {"head": {"kernel": jnp.zeros((4, 3))}}, 8)
    params = {PROJECTION: {"proco": projection}}
    batch = Batch(features, labels, weight=weight)
    made = contrast.project(projection, features)
    seen = auxiliary.Seen(batch, jnp.zeros(()), {"pooled": features})
    return beside.loss(params, memory or beside.init(), [seen], forward), np.asarray(made)


def test_running_means_by_hand():
    """Batches of 4; class 0 has 8 images, class 1 has 2, class 2 has 4: remembered for 2, 1/2 and 1 batches."""
    counts, features = np.array([8, 2, 4]), jax.random.normal(jax.random.key(0), (4, 4))
    (_, memory), z = stepped(None, features, jnp.array([0, 0, 0, 1]), counts, 4)
    np.testing.assert_allclose(memory["amount"], [0.75, 0.25, 0.0])
    np.testing.assert_allclose(memory["mean"], np.stack([z[:3].mean(0), z[3], np.zeros(8)]), atol=1e-6)
    (_, after), z2 = stepped(memory, 2 * features[::-1], jnp.array([0, 0, 1, 1]), counts, 4)
    np.testing.assert_allclose(after["amount"], [1.25, 0.5, 0.0])
    first = (3 * z[:3].mean(0) + 2 * z2[:2].mean(0)) / 5
    np.testing.assert_allclose(after["mean"][0], first, atol=1e-6)
    np.testing.assert_allclose(after["mean"][1], z2[2:].mean(0), atol=1e-6)  # two are all that it remembers


def test_the_loss_is_by_the_batches_before_this_one():
    counts, features = np.array([6, 3, 1]), jax.random.normal(jax.random.key(0), (4, 4))
    labels = jnp.array([0, 1, 1, 2])
    (loss, memory), _ = stepped(None, features, labels, counts, 5)
    np.testing.assert_allclose(loss, -np.log(np.array([0.6, 0.3, 0.3, 0.1])).mean(), rtol=1e-5)  # nothing is known yet
    (loss, _), z = stepped(memory, features, labels, counts, 5)
    logits = contrast.log_moment(memory["mean"], z, 0.5) + np.log(counts / 10, dtype=np.float32)[None]
    want = -jax.nn.log_softmax(logits)[np.arange(4), labels].mean()
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert loss < 1


def test_a_padded_batch_is_the_batch():
    counts, features = np.array([6, 3, 1]), jax.random.normal(jax.random.key(0), (5, 4))
    labels = jnp.array([0, 1, 1, 2, 0])
    plain, _ = stepped(None, features, labels, counts, 5)
    batch = parallel.padded(Batch(features, labels), 4)
    padded, _ = stepped(None, batch.image, batch.label, counts, 5, weight=batch.weight)
    chex.assert_trees_all_close(padded, plain, rtol=1e-5)


# --- whole runs -----------------------------------------------------------------------------------


def proco(name="ce", **overrides):
    return configured(name, method__proco_weight=0.5, method__contrast_features=8, **overrides)


def batches(data, size=40):
    """Returns a training and a meta batch."""
    image, label = jnp.asarray(data.train_images[:size], jnp.float32) / 16, jnp.asarray(data.train_labels[:size])
    meta = jnp.asarray(data.meta_images[:size], jnp.float32) / 16, jnp.asarray(data.meta_labels[:size])
    return Batch(image, label), Batch(*meta)


@pytest.mark.usefixtures("quick_runs")
def test_weight_zero_is_the_plain_method_and_another_forms_the_features_too():
    states = []
    off = {"method__contrast_features": 8, "method__contrast_temperature": 1.0}
    for config in (configured("ce"), configured("ce", **off), proco()):
        data = data_lib.build(config)
        experiment = experiment_lib.build(config, data)
        state, step = experiment.init(), jax.jit(experiment.plain_step)
        for _ in range(2):
            state, _ = step(state, batches(data)[0])
        states.append(arrays(state))
    chex.assert_trees_all_equal(states[0], states[1])
    assert (states[0].memory, set(states[2].memory)) == ({}, {"proco"})
    plain, contrasted = states[0].params, states[2].params
    assert np.abs(plain["stage3"]["kernel"] - contrasted["stage3"]["kernel"]).max() > 1e-5
    start = arrays(experiment.init()).params[PROJECTION]["proco"]["out"]["kernel"]
    assert np.abs(contrasted[PROJECTION]["proco"]["out"]["kernel"] - start).max() > 1e-5


def on_one_and_eight(config, batches):
    """Returns state and metrics after the same steps on one device and on eight; `batches` as here, `(data, size)`."""
    data, found = data_lib.build(config), []
    for mesh in (None, parallel.data_mesh(jax.devices()[:8])):
        experiment = experiment_lib.build(config, data, mesh)
        state = experiment.init()
        for size in (40, 44):  # the second is padded
            state, metrics = jax.jit(experiment.plain_step)(state, batches(data, size)[0])
        if experiment.meta_step:
            state, metrics = jax.jit(experiment.meta_step)(state, *batches(data))
        found.append(arrays((state, metrics)))
    return found


@pytest.mark.parametrize("name", ["ce", "mfm", "ldam"])
@pytest.mark.usefixtures("quick_runs")
def test_eight_devices_equal_one(name, monkeypatch):
    monkeypatch.setattr(optim, "outer", lambda *_: optax.sgd(0.1))
    one, eight = on_one_and_eight(proco(name), batches)
    chex.assert_trees_all_close(eight, one, rtol=1e-4, atol=2e-5)
    assert np.abs(one[0].memory["proco"]["mean"]).max() > 0


@pytest.mark.usefixtures("quick_runs")
def test_a_run_resumes_bit_for_bit_and_its_projection_is_not_tested(tmp_path):
    from methods_test import trained

    config = proco("logit_adjusted")
    whole = trained(config, tmp_path / "whole")
    with pytest.raises(interruption.Interrupted, match="saved at step 3"):
        trained(config, tmp_path / "parts", stop_at=3, like=whole)
    again = trained(config, tmp_path / "parts")
    chex.assert_trees_all_equal(arrays(again.loop), arrays(whole.loop))
    state = whole.loop.bilevel
    assert PROJECTION in state.params
    assert PROJECTION not in whole.experiment.tested.params(state)


@pytest.mark.usefixtures("quick_runs")
def test_a_run_is_loaded_and_started_from_without_its_projection(tmp_path):
    train.train_and_evaluate(proco(), tmp_path / "first")
    loaded = classifier.load(tmp_path / "first")
    assert set(loaded.variables["params"]) == {"stage3", "BatchNorm_0", "head"}
    first = {"model__init_from": str(tmp_path / "first")}
    for config in (configured("ce", **first), proco(**first)):
        data = data_lib.build(config)
        state = experiment_lib.build(config, data).init_pretrained()
        assert (PROJECTION in state.params) == bool(config.method.proco_weight)
        chex.assert_trees_all_equal(state.params["head"], stored(tmp_path / "first").params["head"])


def test_mixed_labels_count_for_both():
    batch = Batch(jnp.zeros((2, 1)), jnp.array([0, 1]), jnp.array([1, 2]), jnp.array([0.75, 0.5]))
    np.testing.assert_allclose(auxiliary.soft_labels(batch, 3), [[0.75, 0.25, 0], [0, 0.5, 0.5]])
