"""The training loop's input: an epoch's order on the device, features in the place of images, several seeds as one."""

import jax
import numpy as np
import pytest
from helpers import configured

from mfm_jax import data as data_lib
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.training import feed as feed_lib
from mfm_jax.training import inputs

pytestmark = pytest.mark.usefixtures("quick_runs")


def made(config, data=None, on_device=None):
    """Returns (data, experiment, feed)."""
    data = data or data_lib.build(config)
    experiment = experiment_lib.build(config, data)
    return data, experiment, feed_lib.make(data, experiment, config, on_device or inputs.to_device(data))


def test_an_epoch_s_order_and_meta_table_are_put_beside_the_images():
    config = configured("mfm", train__seed=3, data__protocol="full", data__imbalance_factor=10.0)
    data, experiment, feed = made(config)
    state, images = experiment.init(), feed.data.images
    for epoch in (0, 1):
        feed.start_epoch(epoch, epoch * experiment.steps_per_epoch, state)
        given = feed.next()
        assert given.images is images
        key = jax.random.fold_in(jax.random.key(3), 1)
        np.testing.assert_array_equal(given.order, experiment.order(key, epoch))
        np.testing.assert_array_equal(given.meta_table, data.meta_table(epoch))
    image, label = inputs.training(given, experiment.steps_per_epoch + 1)
    np.testing.assert_array_equal(image, data.train_images[np.asarray(given.order[1])])
    np.testing.assert_array_equal(label, data.train_labels[np.asarray(given.order[1])])
    assert feed.next() is given
    assert feed.waited() == 0
    assert feed.steps_per_call == 1  # on a CPU
    feed.close()


@pytest.mark.parametrize("name", ["smote", "rcal"])
def test_features_take_the_place_of_the_images_from_the_second_stage_on(name):
    config = configured(name)
    data, experiment, feed = made(config)
    state = experiment.init()
    assert not feed.is_shared
    feed.start_epoch(0, 0, state)
    assert isinstance(feed.next(), inputs.ResidentSet)
    feed.start_epoch(1, experiment.retrain_from, state)
    given = feed.next()
    assert isinstance(given, inputs.Features)
    assert np.bincount(given.labels).tolist() == [data.counts.max()] * 10
    feature, label = inputs.training(given, experiment.retrain_from)
    assert (feature.shape, label.shape) == ((100, 8), (100,))
    features = given.features
    feed.start_epoch(2, 2 * experiment.steps_per_epoch, state)
    assert feed.next().features is features
    assert not np.array_equal(feed.next().order, given.order)


def test_runs_of_different_seeds_share_their_images():
    configs = [configured("mfm", train__seed=seed) for seed in (0, 1)]
    data = data_lib.build(configs[0])
    on_device = inputs.to_device(data)
    built = [made(config, data, on_device) for config in configs]
    for _, experiment, feed in built:
        assert feed.is_shared
        feed.start_epoch(0, 0, experiment.init())
    feeds = [feed for *_, feed in built]
    assert feed_lib.joined(feeds[:1])() is feeds[0].data
    together = feed_lib.joined(feeds)
    assert together() is together()
    assert together().images.shape == data.train_images.shape
    np.testing.assert_array_equal(together().order, np.stack([feed.data.order for feed in feeds]))
    assert not np.array_equal(*together().order)
