"""Cutout, CutMix, and whom images are mixed with."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Tiny, configured

from mfm_jax import data as data_lib
from mfm_jax import models
from mfm_jax.bilevel import losses
from mfm_jax.config import Augment
from mfm_jax.data import augment, batches
from mfm_jax.errors import UserError
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.training import inputs
from mfm_jax.training import loop as loop_lib
from mfm_jax.types import Batch

KEY = jax.random.key(4)
LABELS = jnp.arange(200, dtype=jnp.int32)
# Every pixel tells which image it comes from.
IMAGES = jnp.broadcast_to(LABELS.astype(jnp.float32)[:, None, None, None], (200, 12, 10, 3))


# --- cutout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 4, 5])
def test_cutout_blanks_the_drawn_square_and_nothing_else(side):
    images = jnp.ones((40, 9, 7, 3))
    out = np.asarray(jax.jit(augment.cutout, static_argnums=2)(KEY, images, side))
    for key, image in zip(jax.random.split(KEY, 40), out, strict=True):
        middle = jax.random.randint(jax.random.fold_in(key, 3), (2,), 0, jnp.array([9, 7]), jnp.int32)
        begin = np.asarray(middle) - side // 2
        expected = np.ones((9, 7, 3), np.float32)
        rows, columns = (slice(max(at, 0), at + side) for at in begin.tolist())
        expected[rows, columns] = 0
        chex.assert_trees_all_equal(image, expected)
    assert len({image.tobytes() for image in out}) > 20


def test_cutout_blanks_normalised_images():
    """So a square has the mean of the images, which normalising makes 0; of a mean that no pixel has, none is 0."""
    config = configured("ce", augment__cutout=3, augment__pad=0)
    data = data_lib.build(config)
    resident = inputs.to_device(data).replace(mean=jnp.array([0.5]))
    examples = jnp.asarray(data.train_images[:20]), jnp.asarray(data.train_labels[:20])
    image = loop_lib._prepared(KEY, examples, resident, config).image
    zeros = np.asarray((image == 0).sum((1, 2, 3)))
    assert set(zeros.tolist()) <= {4, 6, 9}  # a corner, an edge, the inside
    assert zeros.max() == 9
    plain = loop_lib._prepared(KEY, examples, resident, configured("ce", augment__pad=0)).image
    chex.assert_trees_all_equal(jnp.where(image == 0, plain, image), plain)


def test_a_square_is_smaller_than_the_image():
    config = configured("ce", augment__cutout=8)
    with pytest.raises(UserError, match=r"augment.cutout = 8: images are 8 pixels wide; choose at most 7"):
        experiment_lib.build(config, data_lib.build(config))


# --- cutmix ---------------------------------------------------------------------------------------


def test_the_shares_of_cutmix_are_the_parts_of_the_pixels():
    mixed, first, second, share = augment.cutmix(KEY, IMAGES, LABELS, 1.0)
    assert ((share >= 0.5) & (share <= 1)).all()
    sources = np.asarray(mixed)
    chex.assert_trees_all_equal(sources[..., 0], sources[..., 2])
    swapped = 0
    for own, image, one, other, part in zip(LABELS, sources[..., 0], first, second, share, strict=True):
        assert own in (one, other)
        if one != other:
            assert np.mean(image == one) == pytest.approx(float(part), abs=1e-6)
            assert np.mean(image == other) == pytest.approx(1 - float(part), abs=1e-6)
            box = np.argwhere(image != own)
            if len(box):  # a whole rectangle
                assert len(box) == np.prod(box.max(0) - box.min(0) + 1)
            swapped += int(own == other)
    assert 5 < swapped < 60  # boxes larger than half of the image
    partners = jnp.where(first == LABELS, second, first)
    assert sorted(partners.tolist()) == LABELS.tolist()
    chex.assert_trees_all_equal(augment.cutmix(KEY, IMAGES, LABELS, 1.0), (mixed, first, second, share))


def test_the_box_of_cutmix_by_hand():
    """`sqrt(1 - s)` of each side in whole pixels, half of that to either side of a middle, cut off at the edge."""
    share_key, place_key = jax.random.split(KEY, 3)[1:]
    side = np.sqrt(1 - np.asarray(jax.random.beta(share_key, 0.7, 0.7, (200, 1), jnp.float32)))
    half = (side * np.array([[12, 10]], np.float32)).astype(int) // 2
    middle = np.asarray(jax.random.randint(place_key, (200, 2), 0, jnp.array([[12, 10]]), jnp.int32))
    begin, end = np.maximum(middle - half, 0), np.minimum(middle + half, [12, 10])
    others = jnp.full_like(IMAGES, -1), jnp.full_like(LABELS, 500)
    mixed, first, second, share = augment.cutmix(KEY, IMAGES, LABELS, 0.7, others)
    area = np.prod(end - begin, axis=1)
    chex.assert_trees_all_equal(np.asarray((mixed == -1).all(-1).sum((1, 2))), area)
    for image, (top, left), (bottom, right) in zip(np.asarray(mixed), begin, end, strict=True):
        assert (image[top:bottom, left:right] == -1).all()
    chex.assert_trees_all_equal(np.asarray(first == 500), area > 60)
    chex.assert_trees_all_equal(first + second, LABELS + 500)
    chex.assert_trees_all_close(share, np.maximum(area, 120 - area).astype(np.float32) / 120, rtol=1e-6)


def test_the_loss_of_cutmix_by_hand(monkeypatch):
    monkeypatch.setattr(models, "create", lambda name, classes, width, dtype, **_: Tiny(classes, dtype))
    config = configured("ce")
    data = data_lib.build(config)
    experiment = experiment_lib.build(config, data)
    images, labels = jnp.asarray(data.train_images[:100], jnp.float32) / 16, jnp.asarray(data.train_labels[:100])
    batch = Batch(*augment.cutmix(KEY, images, labels, 1.0))
    state = experiment.init()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits, _ = Tiny(10, jnp.float32).apply(variables, batch.image, train=True, mutable=["batch_stats"])
    first, second = (losses.cross_entropy(logits, of) for of in (batch.label, batch.partner))
    expected = np.mean(np.asarray(batch.share * first + (1 - batch.share) * second))
    np.testing.assert_allclose(experiment.plain_step(state, batch)[1]["loss"], expected, rtol=1e-5)


# --- both, and partners ---------------------------------------------------------------------------


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_half_of_the_images_get_a_box_and_the_others_are_mixed_up_or_stay(mixup):
    out = augment.mixed(KEY, IMAGES, LABELS, Augment(mixup=mixup, cutmix=1.0))
    cut = augment.cutmix(jax.random.fold_in(KEY, 2), IMAGES, LABELS, 1.0)
    if mixup:
        image, partner, share = augment.mixup(KEY, IMAGES, LABELS, mixup)
        otherwise = image, LABELS, partner, share
    else:
        otherwise = IMAGES, LABELS, LABELS, jnp.ones(200)
    chosen = np.asarray(jax.random.bernoulli(jax.random.fold_in(KEY, 3), shape=(200,)))
    assert 70 <= chosen.sum() <= 130
    for found, one, other in zip(out, cut, otherwise, strict=True):
        chex.assert_trees_all_equal(found[chosen], one[chosen])
        chex.assert_trees_all_equal(found[~chosen], other[~chosen])


def test_mixup_alone_is_what_it_was():
    image, partner, share = augment.mixup(KEY, IMAGES, LABELS, 0.4)
    chex.assert_trees_all_equal(augment.mixed(KEY, IMAGES, LABELS, Augment(mixup=0.4)), (image, LABELS, partner, share))
    pair_key, share_key = jax.random.split(KEY)
    chex.assert_trees_all_equal(partner, LABELS[jax.random.permutation(pair_key, 200)])
    drawn = jax.random.beta(share_key, 0.4, 0.4, (200,), jnp.float32)
    chex.assert_trees_all_equal(share, jnp.maximum(drawn, 1 - drawn))


def test_balanced_partners_are_of_every_class_as_often_and_of_any_image_in_it():
    counts, size = np.array([60, 25, 1]), 30_000
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), counts)).astype(np.int32)
    draw = jax.jit(batches.balanced_indices, static_argnums=(2, 3))
    index = np.asarray(draw(KEY, labels, 3, size))
    assert index.dtype == np.int32
    assert np.abs(np.bincount(labels[index]) - size / 3).max() < 5 * np.sqrt(size / 3)
    for k in range(3):
        times = np.bincount(index, minlength=len(labels))[labels == k]
        expected = size / 3 / counts[k]
        assert np.abs(times - expected).max() < 5 * np.sqrt(size / 3 if counts[k] == 1 else expected)


def test_partners_come_from_the_whole_training_set_augmented_as_the_images():
    """Rare classes are pasted into what is there mostly: a batch of the largest class alone gets partners of all."""
    config = configured("ce", augment__cutmix=1.0, augment__partners="balanced", augment__pad=0)
    data = data_lib.build(config)
    resident = inputs.to_device(data)
    head = jnp.asarray(np.flatnonzero(data.train_labels == data.counts.argmax())[:100], jnp.int32)
    resident = resident.replace(order=jnp.stack([head] * 2), meta_table=jnp.asarray(data.meta_table(0)))
    make = jax.jit(lambda key: loop_lib._training_batch(inputs.step_keys(key, 0), resident, jnp.int32(0), config, None))
    made = [make(key) for key in jax.random.split(KEY, 20)]
    own = int(data.counts.argmax())
    labels = np.concatenate([np.where(one.label == own, one.partner, one.label) for one in made])
    shares = np.concatenate([one.share for one in made])
    partners = np.bincount(labels[shares < 1], minlength=10)
    # Half of 2000 images get a box, a few of which are empty; those of the class's own are among the others.
    assert np.delete(partners, own).min() > 60
    assert np.ptp(np.delete(partners, own)) < 70


def test_partners_of_streamed_images_are_of_the_batch():
    config = configured("ce", data__resident_mb=0, augment__cutmix=1.0, augment__partners="balanced")
    with pytest.raises(UserError, match=r"partners = 'balanced': needs all images at once; raise data.resident_mb, or"):
        experiment_lib.build(config, data_lib.build(config))


def test_partners_without_mixing_are_refused():
    with pytest.raises(UserError, match=r"augment.partners = 'balanced': not read without partners; set augment.mixup"):
        configured("ce", augment__partners="balanced")
