"""FiLM by hand, and what each form of the modulation generates."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfm_jax.bilevel import modulation
from mfm_jax.errors import UserError
from mfm_jax.types import Modulator

COUNTS = np.array([1000, 100, 10])
CHANNELS = {"stem": 4, "pooled": 6, "logits": 3}
LABELS = np.array([2, 0, 1, 2, 1], np.int32)

FORMS = {
    "direct": lambda channels: modulation.direct(channels),
    "direct_per_class": lambda channels: modulation.direct(channels, 3),
    "frequency": lambda channels: modulation.frequency(channels, COUNTS),
    "network": lambda channels: modulation.network(channels, hidden=5),
    "network_count": lambda channels: modulation.network(channels, COUNTS, hidden=5),
    "joined": lambda channels: joined(channels),
}


def joined(channels):
    """A form of its own at the logits, where they are."""
    features = {site: size for site, size in channels.items() if site != "logits"}
    curve = {site: size for site, size in channels.items() if site == "logits"}
    return modulation.joined([modulation.network(features, hidden=5), modulation.frequency(curve, COUNTS)])


def features_at(site: str, batch: int = 5) -> np.ndarray:
    shape = (batch, 2, 2, 4) if site == "stem" else (batch, CHANNELS[site])
    return np.random.default_rng(len(site)).normal(size=shape).astype(np.float32)


def filled(modulator: Modulator):
    """Returns parameters of `modulator` that are not the identity."""
    leaves, structure = jax.tree.flatten(modulator.init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(structure, [rng.normal(size=x.shape).astype(x.dtype) for x in leaves])


# --- film -----------------------------------------------------------------------------------------


class Film(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_vector_for_all_examples(self):
        h = np.array([[1.0, 2.0], [3.0, -4.0]], np.float32)
        out = self.variant(modulation.film)(h, np.array([0.5, -1.0], np.float32), np.array([10.0, 1.0], np.float32))
        chex.assert_trees_all_equal(out, np.array([[11.5, 1.0], [14.5, 1.0]], np.float32))

    @chex.variants(with_jit=True, without_jit=True)
    def test_row_for_each_example(self):
        h = np.array([[1.0, 2.0], [3.0, -4.0]], np.float32)
        gamma = np.array([[0.0, 1.0], [1.0, 0.5]], np.float32)
        beta = np.array([[5.0, 0.0], [-1.0, 2.0]], np.float32)
        out = self.variant(modulation.film)(h, gamma, beta)
        chex.assert_trees_all_equal(out, np.array([[6.0, 4.0], [5.0, -4.0]], np.float32))

    @chex.variants(with_jit=True, without_jit=True)
    def test_images_are_modulated_by_channel(self):
        h = np.arange(16, dtype=np.float32).reshape(2, 2, 2, 2)  # as many rows and columns as examples and channels
        vector = np.array([1.0, -1.0], np.float32)
        out = self.variant(modulation.film)(h, vector, np.array([0.0, 7.0], np.float32))
        chex.assert_trees_all_equal(out[..., 0], 2 * h[..., 0])
        chex.assert_trees_all_equal(out[..., 1], np.full((2, 2, 2), 7.0, np.float32))

        gamma = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
        out = self.variant(modulation.film)(h, gamma, 100 * gamma)
        chex.assert_trees_all_equal(out[0, ..., 0], 2 * h[0, ..., 0] + 100)
        chex.assert_trees_all_equal(out[0, ..., 1], h[0, ..., 1])
        chex.assert_trees_all_equal(out[1, ..., 0], h[1, ..., 0])
        chex.assert_trees_all_equal(out[1, ..., 1], 3 * h[1, ..., 1] + 200)


@pytest.mark.parametrize("shape", [(3,), (5, 3)])
def test_film_keeps_the_dtype_of_the_features(shape):
    out = modulation.film(jnp.ones((5, 3), jnp.bfloat16), jnp.ones(shape), jnp.ones(shape))
    chex.assert_trees_all_equal(out, jnp.full((5, 3), 3, jnp.bfloat16))


# --- every form -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_form_starts_as_the_identity_at_every_site(form):
    modulator = FORMS[form](CHANNELS)
    assert modulator.sites == tuple(CHANNELS)
    apply = modulation.modulate(modulator, modulator.init(jax.random.key(0)), LABELS)
    for site in CHANNELS:
        h = features_at(site)
        chex.assert_trees_all_equal(apply(site, h), h)


@pytest.mark.parametrize("form", FORMS)
def test_only_the_chosen_sites_are_touched(form):
    modulator = FORMS[form]({"pooled": 6})
    apply = modulation.modulate(modulator, filled(modulator), LABELS)
    h = features_at("logits")
    assert apply("logits", h) is h
    changed = np.asarray(apply("pooled", features_at("pooled")) != features_at("pooled"))
    untouched = LABELS == 0 if form == "frequency" else np.zeros(5, bool)  # z = 0 for the largest class
    chex.assert_trees_all_equal(changed, np.tile(~untouched[:, None], 6))


@pytest.mark.parametrize("form", FORMS)
def test_gamma_and_beta_are_float32_rows_of_the_right_width_and_bfloat16_features_stay(form):
    modulator = FORMS[form](CHANNELS)
    parameters = filled(modulator)
    for site, size in CHANNELS.items():
        h = jnp.asarray(features_at(site), jnp.bfloat16)
        gamma, beta = modulator.parameters(parameters, site, h, LABELS)
        assert gamma.shape in {(size,), (5, size)}
        chex.assert_equal_shape([gamma, beta])
        chex.assert_type([gamma, beta], jnp.float32)
        chex.assert_type(modulation.modulate(modulator, parameters, LABELS)(site, h), jnp.bfloat16)


# --- direct ---------------------------------------------------------------------------------------


def test_direct_gives_its_vectors_to_all():
    modulator = modulation.direct({"pooled": 2})
    vectors = {"pooled": {"gamma": np.array([1.0, 2.0]), "beta": np.array([3.0, 4.0])}}
    gamma, beta = modulator.parameters(vectors, "pooled", np.zeros((5, 2)), LABELS)
    chex.assert_trees_all_equal((gamma, beta), (vectors["pooled"]["gamma"], vectors["pooled"]["beta"]))


def test_direct_per_class_looks_up_the_row_of_the_label():
    modulator = modulation.direct({"pooled": 2}, 3)
    rows = np.array([[0.0, 1.0], [10.0, 11.0], [20.0, 21.0]])
    gamma, beta = modulator.parameters({"pooled": {"gamma": rows, "beta": -rows}}, "pooled", np.zeros((5, 2)), LABELS)
    chex.assert_trees_all_equal(gamma, np.array([[20.0, 21], [0, 1], [10, 11], [20, 21], [10, 11]]))
    chex.assert_trees_all_equal(beta, -gamma)
    chex.assert_shape(modulator.init(jax.random.key(0))["pooled"]["gamma"], (3, 2))


# --- frequency ------------------------------------------------------------------------------------


def test_log_frequency():
    z = modulation.log_frequency(np.array([50, 5000, 500]))
    chex.assert_trees_all_close(z, np.array([-math.log(100), 0, -math.log(10)], np.float32), atol=1e-6)
    assert z[1] == 0
    chex.assert_type(z, jnp.float32)


def test_frequency_at_logits_by_hand():
    # z = [0, -l, -2 l] with l = ln 10; gamma = tanh(b z / 10), beta = a z + c z^2 / 10.
    modulator = modulation.frequency({"logits": 3}, COUNTS)
    numbers = {"logits": {"a": jnp.float32(2.0), "b": jnp.float32(-5.0), "c": jnp.float32(2.5)}}
    gamma, beta = modulator.parameters(numbers, "logits", np.zeros((5, 3)), LABELS)
    one = math.log(10)
    chex.assert_trees_all_close(gamma, np.tanh(np.array([0, 0.5 * one, one], np.float32)), atol=1e-5)
    expected = np.array([0, -2 * one + 0.25 * one**2, -4 * one + one**2], np.float32)
    chex.assert_trees_all_close(beta, expected, atol=1e-5)
    assert jax.tree.leaves(jax.tree.map(jnp.shape, modulator.init(jax.random.key(0)))) == []  # three scalars
    assert len(jax.tree.leaves(modulator.init(jax.random.key(0)))) == 3


def test_frequency_without_its_scale_is_the_shift_alone():
    modulator = modulation.frequency({"logits": 3}, COUNTS, shift_only=True)
    assert set(modulator.init(jax.random.key(0))["logits"]) == {"a", "c"}
    numbers = {"logits": {"a": jnp.float32(2.0), "c": jnp.float32(2.5)}}
    gamma, beta = modulator.parameters(numbers, "logits", np.zeros((5, 3)), LABELS)
    whole = modulation.frequency({"logits": 3}, COUNTS)
    both = whole.parameters({"logits": {**numbers["logits"], "b": jnp.float32(0)}}, "logits", np.zeros((5, 3)), LABELS)
    chex.assert_trees_all_equal((gamma, beta), both)


def test_frequency_at_a_feature_site_by_hand():
    modulator = modulation.frequency({"pooled": 2}, COUNTS)
    a, b, c = np.array([1.0, 0.0], np.float32), np.array([0.0, 20.0], np.float32), np.array([5.0, 10.0], np.float32)
    gamma, beta = modulator.parameters({"pooled": {"a": a, "b": b, "c": c}}, "pooled", np.zeros((5, 2)), LABELS)
    z = -math.log(10) * np.array([[2.0], [0], [1], [2], [1]])  # of the labels 2, 0, 1, 2, 1
    chex.assert_trees_all_close(gamma, np.tanh(np.hstack([0 * z, 2 * z])).astype(np.float32), atol=1e-5)
    chex.assert_trees_all_close(beta, np.hstack([z + 0.5 * z**2, z**2]).astype(np.float32), atol=1e-5)


numbers = st.floats(-5, 5, width=32)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5000), numbers, numbers, numbers)
def test_frequency_leaves_balanced_classes_alone(count, a, b, c):
    modulator = modulation.frequency({"logits": 3}, np.full(3, count))
    values = {"logits": {name: np.float32(x) for name, x in zip("abc", (a, b, c), strict=True)}}
    h = features_at("logits")
    chex.assert_trees_all_equal(modulation.modulate(modulator, values, LABELS)("logits", h), h)


# --- network --------------------------------------------------------------------------------------


def test_network_by_hand():
    modulator = modulation.network({"stage1": 2}, COUNTS, hidden=2)
    layer = {
        "w1": np.array([[1.0, 0.0], [0.0, -1.0], [1.0, 0.0]], np.float32),  # inputs: two features, then z_y
        "b1": np.array([5.0, 0.0], np.float32),
        "w2": np.array([[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, 3.0]], np.float32),
        "b2": np.array([0.0, 0.0, 0.0, 10.0], np.float32),
    }
    h = np.zeros((1, 1, 2, 2), np.float32)
    h[0, 0, 0] = [6.0, -2.0]
    h[0, 0, 1] = [0.0, -6.0]  # mean [3, -4], normalised [0.6, -0.8]
    gamma, beta = modulator.parameters({"stage1": layer}, "stage1", h, np.array([1], np.int32))
    first, second = 0.6 - math.log(10) + 5, 0.8
    chex.assert_trees_all_close(gamma, np.tanh(np.array([[first, second]], np.float32)), rtol=1e-5)
    chex.assert_trees_all_close(beta, np.array([[2 * first, 3 * second + 10]], np.float32), rtol=1e-5)


def test_network_starts_with_a_zero_last_layer_and_a_random_first():
    layer = modulation.network({"pooled": 6}, hidden=5).init(jax.random.key(0))["pooled"]
    for name in ("b1", "w2", "b2"):
        chex.assert_trees_all_equal(layer[name], jnp.zeros_like(layer[name]))
    assert float(jnp.abs(layer["w1"]).min()) > 0
    both = modulation.network({"stage1": 6, "pooled": 6}, hidden=5).init(jax.random.key(0))
    assert float(jnp.abs(both["stage1"]["w1"] - both["pooled"]["w1"]).min()) > 0  # a key of its own each


def test_network_sizes_do_not_depend_on_the_number_of_classes():
    def shapes(num_classes: int):
        modulator = modulation.network({"pooled": 6}, np.arange(1, num_classes + 1), hidden=5)
        return jax.tree.map(jnp.shape, jax.eval_shape(modulator.init, jax.random.key(0)))

    expected = {"b1": (5,), "b2": (12,), "w1": (7, 5), "w2": (5, 12)}
    assert shapes(10) == shapes(100) == {"pooled": expected}


@pytest.mark.parametrize("site", ["stem", "pooled"])
def test_detaching_the_inputs_changes_no_value_and_stops_the_gradient(site):
    def total(detach: bool, parameters, h):
        modulator = modulation.network({site: CHANNELS[site]}, COUNTS, hidden=5, detach_inputs=detach)
        gamma, beta = modulator.parameters(parameters, site, h, LABELS)
        return (gamma + 2 * beta).sum()

    parameters, h = filled(modulation.network({site: CHANNELS[site]}, COUNTS, hidden=5)), features_at(site)
    results = {}
    for detach in (True, False):
        gradients = jax.jit(jax.value_and_grad(functools.partial(total, detach), argnums=(0, 1)))
        results[detach] = gradients(parameters, h)
    (value, (in_weights, in_features)), (other, (also_in_weights, attached)) = results[True], results[False]
    chex.assert_trees_all_equal(value, other)
    chex.assert_trees_all_close(in_weights, also_in_weights, rtol=1e-6)
    chex.assert_trees_all_equal(in_features, jnp.zeros_like(h))
    assert float(jnp.abs(attached).max()) > 1e-3


def test_network_ignores_the_scale_of_a_sample_and_the_rest_of_the_batch():
    modulator = modulation.network({"pooled": 6}, hidden=5)
    parameters, h = filled(modulator), features_at("pooled")
    whole = modulator.parameters(parameters, "pooled", h, LABELS)
    scaled = modulator.parameters(parameters, "pooled", 8 * h, LABELS)
    chex.assert_trees_all_close(whole, scaled, rtol=1e-4)
    alone = modulator.parameters(parameters, "pooled", h[:1], LABELS[:1])
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[:1], whole), alone, rtol=1e-4)


def test_a_sample_without_features_has_finite_values_and_gradients():
    modulator = modulation.network({"pooled": 6}, hidden=5, detach_inputs=False)

    def total(parameters, h):
        gamma, beta = modulator.parameters(parameters, "pooled", h, LABELS[:2])
        return (gamma + beta).sum()

    h = np.stack([np.zeros(6, np.float32), features_at("pooled")[0]])
    chex.assert_tree_all_finite(jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(filled(modulator), h))


# --- site_channels --------------------------------------------------------------------------------


def classifier(modulate):
    h = modulate("stem", jnp.ones((1, 8, 8, 4)))
    return modulate("logits", modulate("pooled", h.mean((1, 2))) @ jnp.ones((4, 3)))


def test_site_channels_reads_the_widths_in_the_order_asked():
    found = modulation.site_channels(classifier, ("logits", "stem"))
    assert list(found.items()) == [("logits", 3), ("stem", 4)]


def test_an_unknown_site_is_named_with_those_that_exist():
    with pytest.raises(UserError) as caught:
        modulation.site_channels(classifier, ("pooled", "stage9"))
    message = "modulation.sites = 'stage9': the model has no such site; allowed: stem, pooled, logits"
    assert str(caught.value) == message
