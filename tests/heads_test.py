"""What methods do to the head: identities, and numbers by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Small, configured

from mfm_jax import data as data_lib
from mfm_jax.bilevel import losses
from mfm_jax.errors import UserError
from mfm_jax.methods import gaussians, heads, smote
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.types import Batch

MODULE = Small(3, 4)
IMAGE = jax.random.normal(jax.random.key(0), (5, 8, 8, 3))
COUNTS = jnp.array([500, 60, 7])


@pytest.fixture(scope="module")
def variables():
    found = MODULE.init(jax.random.key(1), IMAGE)
    bias = jnp.array([0.3, -0.2, 0.1])
    params = heads.replaced(found["params"], {**found["params"]["head"], "bias": bias})
    return {**found, "params": params}


def logits(variables, params=None):
    return MODULE.apply({**variables, "params": params or variables["params"]}, IMAGE)


def test_tau_zero_is_plain(variables):
    chex.assert_trees_all_equal(heads.tau_normalized(variables["params"], 0.0), variables["params"])
    chex.assert_trees_all_equal(heads.without_prior(variables["params"], COUNTS, 0.0), variables["params"])


def test_tau_one_makes_every_weight_vector_a_unit_vector(variables):
    params = {"head": {"kernel": jnp.array([[3.0, 0.0], [4.0, 2.0]]), "bias": jnp.array([5.0, 1.0])}}
    found = heads.tau_normalized(params, 1.0)["head"]
    want = {"kernel": jnp.array([[0.6, 0.0], [0.8, 1.0]]), "bias": jnp.array([1.0, 0.5])}
    chex.assert_trees_all_close(found, want, rtol=1e-6)
    half = heads.tau_normalized(params, 0.5)["head"]["kernel"]
    chex.assert_trees_all_close(half[:, 0], jnp.array([3.0, 4.0]) / 5**0.5, rtol=1e-6)


def test_the_prior_is_taken_off_the_logits(variables):
    gap = logits(variables) - logits(variables, heads.without_prior(variables["params"], COUNTS, 1.5))
    want = np.broadcast_to(1.5 * np.log(np.array([500, 60, 7]) / 567), gap.shape)
    chex.assert_trees_all_close(gap, want.astype(np.float32), rtol=1e-4, atol=1e-5)


def test_a_head_with_the_prior_as_its_bias_predicts_the_prior(variables):
    params = heads.with_prior_bias(variables["params"], COUNTS)
    params["head"]["kernel"] = jnp.zeros_like(params["head"]["kernel"])
    found = jax.nn.softmax(logits(variables, params))
    chex.assert_trees_all_close(found[0], COUNTS / 567, rtol=1e-5)
    assert float(losses.cross_entropy(logits(variables, params), jnp.zeros(5, jnp.int32))[0]) < 0.2


def test_scales_multiply_the_logits(variables):
    scale = jnp.array([1.0, 2.0, 0.5])
    found = logits(variables, heads.scaled(variables["params"], scale))
    chex.assert_trees_all_close(found, logits(variables) * scale[None, :], rtol=1e-5, atol=1e-6)


def test_cosine_head(variables):
    found = heads.cosine(MODULE.apply, 30.0)(variables, IMAGE)
    features = np.asarray(heads.features(MODULE.apply)(variables, IMAGE))
    kernel = np.asarray(variables["params"]["head"]["kernel"])
    cosines = features @ kernel / np.linalg.norm(features, axis=1)[:, None] / np.linalg.norm(kernel, axis=0)[None, :]
    chex.assert_trees_all_close(found, 30 * cosines, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("channels", "classes"), [(8, 5), (4, 5), (64, 10), (1, 2)])
def test_simplex_vectors_have_length_one_and_equal_angles(channels, classes):
    found = heads.simplex(channels, classes)
    assert found.shape == (channels, classes)
    want = (classes * np.eye(classes) - 1) / (classes - 1)
    np.testing.assert_allclose(found.T @ found, want, atol=1e-12)
    np.testing.assert_array_equal(found, heads.simplex(channels, classes))


def test_there_is_no_simplex_of_five_in_three_dimensions():
    with pytest.raises(UserError, match=r"method.head = 'simplex': 5 classes need 4 features, the model has 3; raise"):
        heads.simplex(3, 5)


def test_fixed_head_reads_and_trains_no_weights_of_its_own(variables):
    apply = heads.cosine(MODULE.apply, 30.0, fixed=True)
    features = np.asarray(heads.features(MODULE.apply)(variables, IMAGE))
    want = 30 * (features / np.linalg.norm(features, axis=1)[:, None]) @ heads.simplex(features.shape[1], 3)
    chex.assert_trees_all_close(apply(variables, IMAGE), want.astype(np.float32), rtol=1e-4, atol=1e-4)

    def loss(params):
        return losses.cross_entropy(apply({**variables, "params": params}, IMAGE), jnp.zeros(5, jnp.int32)).mean()

    slope = jax.grad(loss)(variables["params"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slope["head"]))
    assert np.any(slope["stage1"]["kernel"])


@pytest.mark.usefixtures("quick_runs")
def test_cosine_head_of_cross_entropy_is_ldam_without_margins():
    steps = []
    for config in (configured("ce", method__head="cosine"), configured("ldam", method__ldam_margin=0.0)):
        data = data_lib.build(config)
        experiment = experiment_lib.build(config, data)
        batch = Batch(jnp.asarray(data.train_images[:40], jnp.float32) / 16, jnp.asarray(data.train_labels[:40]))
        state, _ = jax.jit(experiment.plain_step)(experiment.init(), batch)
        steps.append((state.params, experiment.tested.probabilities(state, batch.image)))
    chex.assert_trees_all_equal(*steps)


@pytest.mark.usefixtures("quick_runs")
def test_a_simplex_that_cannot_be_is_refused_before_training():
    config = configured("ce", method__head="simplex")  # eight features for ten classes
    with pytest.raises(UserError, match="10 classes need 9 features, the model has 8"):
        experiment_lib.build(config, data_lib.build(config))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("crt", {"method__head": "cosine"}, "method.head = 'cosine': crt sets or trains a linear one"),
        ("posthoc_la", {"method__head": "simplex"}, "method.head = 'simplex': posthoc_la sets or trains"),
        ("ce", {"method__head": "simplex", "model__tune": "head"}, "model.tune = 'head': with method.head = 'simplex'"),
        ("mfm", {"method__head": "simplex", "meta__virtual": "head"}, "meta.virtual = 'head': with method.head"),
    ],
)
def test_heads_that_do_not_go_together(name, fields, message):
    with pytest.raises(UserError, match=message):
        configured(name, **fields)


def test_head_on_stored_features_is_the_network_and_runs_none_of_it(variables):
    features = heads.features(MODULE.apply)(variables, IMAGE)
    on_features = heads.on_features(MODULE.apply, IMAGE.shape[1:])
    run = jax.jit(lambda features: on_features(variables, features, train=False))
    chex.assert_trees_all_close(run(features), logits(variables), rtol=1e-5, atol=1e-6)
    assert "convolution" not in run.lower(features).compile().as_text()


def test_new_head_has_the_old_ones_shape(variables):
    found = heads.fresh(jax.random.key(5), variables["params"])
    chex.assert_trees_all_equal_shapes_and_dtypes(found, variables["params"]["head"])
    assert not np.any(found["bias"])


def test_smote_fills_every_class_with_points_between_its_own():
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(4, dtype=np.int32), [9, 5, 2, 1])
    features = (random.normal(size=(17, 3)) + 10 * labels[:, None]).astype(np.float32)
    found, found_labels = smote.oversample(features, labels, 5, 0)
    assert np.bincount(found_labels).tolist() == [9] * 4
    assert (found.dtype, found_labels.dtype) == (np.float32, np.int32)
    chex.assert_trees_all_equal(found[:17], features)
    for k in range(4):
        own, added = features[labels == k], found[17:][found_labels[17:] == k]
        assert (added >= own.min(axis=0) - 1e-5).all()
        assert (added <= own.max(axis=0) + 1e-5).all()
    between = found[17:][found_labels[17:] == 2]  # two images: every point is on the segment
    start, end = features[labels == 2]
    part = (between - start) @ (end - start) / np.sum((end - start) ** 2)
    chex.assert_trees_all_close(between, start + part[:, None] * (end - start), atol=1e-4)
    chex.assert_trees_all_equal(found, smote.oversample(features, labels, 5, 0)[0])
    assert not np.array_equal(found, smote.oversample(features, labels, 5, 1)[0])


def gaussian(mean: list[float], variance: float, size: int) -> gaussians.Gaussian:
    return gaussians.Gaussian(np.array(mean), variance * np.eye(len(mean)), size)


def test_a_class_is_estimated_without_what_lies_apart():
    found = gaussians.robust(np.array([[0, 0], [1, 0], [2, 0], [3, 0], [4, 0], [50, 50]], np.float32), 0.2)
    assert found.size == 5
    assert found.mean.tolist() == [2, 0]
    assert found.covariance.tolist() == [[2, 0], [0, 0]]
    few = gaussians.robust(np.array([[0, 0], [4, 0], [50, 0]], np.float32), 0.3)
    assert (few.size, few.mean.tolist()) == (3, [18, 0])
    assert gaussians.robust(np.ones((9, 2), np.float32), 0.2).size == 8  # copies have no density
    assert gaussians.robust(np.arange(9.0)[:, None], 0.0).mean.tolist() == [4]


def test_rare_classes_borrow_from_the_frequent_ones_nearby():
    own = [gaussian([0, 0], 1, 100), gaussian([4, 0], 3, 80), gaussian([1, 0], 2, 6)]  # 62 on average
    ridge = 1 + 1e-4
    kept, also, moved = gaussians.calibrated(own, 1, 0.25)
    for before, after in ((own[0], kept), (own[1], also)):
        assert after.mean.tolist() == before.mean.tolist()
        chex.assert_trees_all_close(after.covariance, ridge * before.covariance)
    chex.assert_trees_all_close(moved.mean, np.array([0.75, 0.0]))
    chex.assert_trees_all_close(moved.covariance, 1.75 * ridge * np.eye(2))
    # Distances 1 and 3, 2 on average: 100 exp(-1/2) = 60.653 and 80 exp(-3/2) = 17.850 are 0.77262 and 0.22738.
    both = gaussians.calibrated(own, 5, 0.5)[2]
    chex.assert_trees_all_close(both.mean, np.array([0.5 + 0.5 * 4 * 0.22738, 0.0]), atol=1e-4)
    chex.assert_trees_all_close(both.covariance, (1 + 0.5 * (0.77262 + 3 * 0.22738)) * ridge * np.eye(2), atol=1e-4)
    chex.assert_trees_all_close(gaussians.calibrated(own, 1, 0.0)[2].mean, own[2].mean)
    single = [*own[:2], gaussian([1, 0], 0, 1)]
    chex.assert_trees_all_close(gaussians.calibrated(single, 1, 0.25)[2].covariance, ridge * np.eye(2))


def test_drawn_features_are_balanced_and_of_their_class():
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(3, dtype=np.int32), [3000, 2000, 1])
    features = (random.normal(size=(5001, 2)) * [1, 2] + 10 * labels[:, None]).astype(np.float32)
    features[:150] += 60  # wrong labels
    found, found_labels = gaussians.drawn(features, labels, 0.05, 1, 0.0, 0)
    assert np.bincount(found_labels).tolist() == [3000] * 3
    assert (found.dtype, found_labels.dtype, found.shape) == (np.float32, np.int32, (9000, 2))
    for k in (0, 1):
        own = found[found_labels == k]
        chex.assert_trees_all_close(own.mean(axis=0), np.full(2, 10.0 * k, np.float32), atol=0.2)
        chex.assert_trees_all_close(own.std(axis=0), np.array([1, 2], np.float32), rtol=0.15)  # the edge is left out
    single = found[found_labels == 2]  # where its image is, spread as the nearest class
    chex.assert_trees_all_close(single.mean(axis=0), features[-1], atol=0.2)
    chex.assert_trees_all_close(single.std(axis=0), np.array([1, 2], np.float32), rtol=0.15)
    chex.assert_trees_all_equal(found, gaussians.drawn(features, labels, 0.05, 1, 0.0, 0)[0])
    assert not np.array_equal(found, gaussians.drawn(features, labels, 0.05, 1, 0.0, 1)[0])
