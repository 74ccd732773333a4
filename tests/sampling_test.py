"""How often each class is drawn: the distributions by hand, and what the order table makes of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfm_jax import config as config_lib
from mfm_jax.data import batches
from mfm_jax.methods import sampling

COUNTS = np.array([64, 16, 4, 1])
LABELS = np.repeat(np.arange(4, dtype=np.int32), COUNTS)[np.random.default_rng(0).permutation(85)]
CONFIG = config_lib.resolve({"train": {"epochs": 10}, "method": {"first_stage": 0.8}})


def order(draw: sampling.Draw, epoch: int, size: int = 8, seed: int = 0) -> np.ndarray:
    share, keep = jnp.asarray(draw.share), jnp.asarray(draw.keep)
    return np.asarray(batches.sampled_order(jax.random.key(seed), epoch, jnp.asarray(LABELS), share, keep, size))


@pytest.mark.parametrize(
    ("sampler", "epoch", "share"),
    [
        (sampling.balanced, 0, [0.25] * 4),
        (sampling.undersampled, 0, [0.25] * 4),
        (sampling.square_root, 0, [8 / 15, 4 / 15, 2 / 15, 1 / 15]),
        (sampling.progressive, 0, COUNTS / 85),
        (sampling.progressive, 5, (COUNTS / 85 + 0.25) / 2),
        (sampling.pretrained, 7, [0.25] * 4),
        (sampling.balanced_later, 8, [0.25] * 4),
        (sampling.square_root_later, 8, [8 / 15, 4 / 15, 2 / 15, 1 / 15]),
    ],
)
def test_shares_by_hand(sampler, epoch, share):
    draw = sampler(CONFIG, COUNTS, epoch)
    chex.assert_trees_all_close(draw.share, np.asarray(share, np.float32), rtol=1e-6)
    assert draw.keep.tolist() == ([1] * 4 if sampler is sampling.undersampled else COUNTS.tolist())


def test_every_sampling_that_a_config_may_choose_is_there():
    assert set(config_lib.FIELDS["method.sampling"].choices) == {"own", *sampling.SAMPLERS}


def test_the_long_tailed_distribution_needs_no_draw():
    assert sampling.natural(CONFIG, COUNTS, 0) is None
    assert sampling.pretrained(CONFIG, COUNTS, 8) is None
    assert sampling.balanced_later(CONFIG, COUNTS, 7) is None
    assert sampling.square_root_later(CONFIG, COUNTS, 7) is None


def test_pretraining_may_undersample():
    config = config_lib.resolve({"train": {"epochs": 10}, "method": {"pretrain": "undersample"}})
    assert sampling.pretrained(config, COUNTS, 0).keep.tolist() == [1] * 4


@pytest.mark.parametrize("sampler", [sampling.balanced, sampling.square_root, sampling.progressive])
def test_every_class_gets_its_share_of_an_epoch(sampler):
    draw = sampler(CONFIG, COUNTS, 3)
    table = order(draw, 3)
    chex.assert_shape(table, (10, 8))
    assert table.dtype == np.int32
    drawn = np.bincount(LABELS[table.ravel()], minlength=4)
    assert (np.abs(drawn - draw.share * 80) < 1 + 1e-3).all()


def test_images_of_a_class_take_turns():
    seen = np.bincount(order(sampling.balanced(CONFIG, COUNTS, 0), 0).ravel(), minlength=85)
    for k in range(4):
        own = seen[k == LABELS]
        assert own.max() - own.min() <= 1
    assert seen[LABELS == 3].tolist() == [20]


def test_undersampling_keeps_the_same_few_images():
    keep = np.array([2, 2, 2, 1], np.int32)
    draw = sampling.Draw(np.full(4, 0.25, np.float32), keep)
    used = [set(order(draw, epoch).ravel()) for epoch in range(4)]
    assert used[0] == used[1] == used[2] == used[3]
    kept = np.bincount(LABELS[list(used[0])], minlength=4)
    assert kept.tolist() == [2, 2, 2, 1]
    assert set(order(draw, 0, seed=1).ravel()) != used[0]


def test_the_order_is_a_function_of_seed_and_epoch():
    draw = sampling.balanced(CONFIG, COUNTS, 0)
    chex.assert_trees_all_equal(order(draw, 2), order(draw, 2))
    assert not np.array_equal(order(draw, 2), order(draw, 3))
    assert not np.array_equal(order(draw, 2), order(draw, 2, seed=1))


def test_the_classes_are_mixed_within_an_epoch():
    labels = LABELS[order(sampling.balanced(CONFIG, COUNTS, 0), 0)]
    assert (np.diff(np.sort(labels, axis=1), axis=1) > 0).any(axis=1).all()  # no batch of one class
