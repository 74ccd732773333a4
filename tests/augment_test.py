"""Augmentation against NumPy's own padding, example by example."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfm_jax.config import Augment
from mfm_jax.data import augment

PAD = 3
# No two pixels are equal, and the sides differ: a swapped axis or a wrong edge shows.
IMAGE = np.arange(5 * 7 * 2, dtype=np.uint8).reshape(5, 7, 2)
KEYS = jax.random.split(jax.random.key(0), 64)

crop_only = jax.jit(lambda key, image: augment.crop_flip(key, image, PAD, False))
crop_and_flip = jax.jit(lambda key, image: augment.crop_flip(key, image, PAD, True))
batch = jax.jit(augment.augment_batch, static_argnums=2)


def crops(image: np.ndarray, pad: int) -> dict[tuple[int, int], np.ndarray]:
    """Returns every crop of the reflect-padded image, by its shift (rows, columns)."""
    height, width, _ = image.shape
    padded = np.pad(image, [(pad, pad), (pad, pad), (0, 0)], mode="reflect")
    shifts = range(-pad, pad + 1)
    return {(r, c): padded[pad + r :, pad + c :][:height, :width] for r in shifts for c in shifts}


def drawn(key: jax.Array) -> tuple[int, int]:
    """Returns the shift that `crop_flip` draws: part of its contract, as runs must stay reproducible."""
    rows, columns = jax.random.randint(jax.random.split(key)[0], (2,), -PAD, PAD + 1, jnp.int32)
    return int(rows), int(columns)


class CropFlip(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_equals_reflect_pad_and_crop_at_the_drawn_shift(self):
        crop = self.variant(lambda key, image: augment.crop_flip(key, image, PAD, False))
        expected = crops(IMAGE, PAD)
        for key in KEYS[:4]:
            chex.assert_trees_all_equal(crop(key, IMAGE), expected[drawn(key)])

    @chex.variants(with_jit=True, without_jit=True)
    def test_without_padding_and_flip_it_is_the_identity(self):
        images = np.stack([IMAGE, IMAGE[::-1]])
        chex.assert_trees_all_equal(self.variant(lambda k, x: augment.crop_flip(k, x, 0, False))(KEYS[0], IMAGE), IMAGE)
        out = self.variant(lambda k, x: augment.augment_batch(k, x, Augment(pad=0, flip=False)))(KEYS[0], images)
        chex.assert_trees_all_equal(out, images)


def test_every_shift_occurs_and_about_half_are_mirrored():
    shifts, mirrored = set(), 0
    by_content = {image.tobytes(): shift for shift, image in crops(IMAGE, PAD).items()}
    for key in KEYS:
        cropped, out = np.asarray(crop_only(key, IMAGE)), np.asarray(crop_and_flip(key, IMAGE))
        shifts.add(by_content[cropped.tobytes()])
        is_mirrored = not np.array_equal(out, cropped)
        chex.assert_trees_all_equal(out, cropped[:, ::-1] if is_mirrored else cropped)
        mirrored += is_mirrored
    assert {row for row, _ in shifts} == {column for _, column in shifts} == set(range(-PAD, PAD + 1))
    assert len({row - column for row, column in shifts}) > PAD  # rows and columns move apart
    assert 20 <= mirrored <= 44  # of 64: three standard deviations


def test_flip_alone_only_mirrors():
    out = np.asarray(batch(jax.random.key(1), np.stack([IMAGE] * 16), Augment(pad=0)))
    mirrored = [np.array_equal(image, IMAGE[:, ::-1]) for image in out]
    assert any(mirrored)
    assert not all(mirrored)
    for image, is_mirrored in zip(out, mirrored, strict=True):
        chex.assert_trees_all_equal(image, IMAGE[:, ::-1] if is_mirrored else IMAGE)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32, jnp.bfloat16])
def test_dtype_and_shape_stay(dtype):
    out = jax.eval_shape(
        lambda k, x: augment.augment_batch(k, x, Augment(pad=1)), KEYS[0], jnp.zeros((3, 5, 7, 2), dtype)
    )
    assert (out.shape, out.dtype) == ((3, 5, 7, 2), dtype)


# --- colours --------------------------------------------------------------------------------------


def test_color_jitter_by_hand():
    image = np.array([[[100.0, 50.0, 0.0], [200.0, 200.0, 200.0]]], np.float32)
    key = jax.random.key(3)
    brightness, contrast, saturation = np.asarray(jax.random.uniform(key, (3,), jnp.float32, 0.6, 1.4))
    luminance = np.array([0.299, 0.587, 0.114], np.float32)
    expected = np.clip(image * brightness, 0, 255)
    mean = (expected @ luminance).mean()
    expected = np.clip(mean + contrast * (expected - mean), 0, 255)
    own = (expected @ luminance)[..., None]
    expected = np.clip(own + saturation * (expected - own), 0, 255)
    chex.assert_trees_all_close(augment.color_jitter(key, image, 0.4), expected, atol=1e-3)


def test_color_jitter_leaves_grey_pictures_grey_and_those_without_strength_alone():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
    rgb = np.repeat(grey, 3, axis=-1)
    jittered = augment.color_jitter(KEYS[0], rgb, 0.4)
    chex.assert_trees_all_close(jittered, jnp.repeat(augment.color_jitter(KEYS[0], grey, 0.4), 3, axis=-1), atol=1e-3)
    chex.assert_trees_all_close(augment.color_jitter(KEYS[0], IMAGE[..., :1], 0.0), IMAGE[..., :1].astype(np.float32))


def test_whether_an_image_is_mirrored_says_nothing_about_its_brightness():
    """A key in common would have every mirrored image darker, or every one brighter."""
    images = jnp.broadcast_to(jnp.array([[[50.0], [150.0]]]), (1000, 1, 2, 1))
    found = np.asarray(batch(jax.random.key(5), images, Augment(pad=0, flip=True, color_jitter=0.4)))[:, 0, :, 0]
    mirrored, brightness = found[:, 0] > found[:, 1], found.mean(axis=1)
    assert 400 < mirrored.sum() < 600
    assert abs(np.corrcoef(mirrored, brightness)[0, 1]) < 0.15  # five standard errors; 0.87 with the same key


# --- keys -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32 - 1))
def test_a_key_always_gives_the_same_images_and_another_key_others(seed):
    images = np.stack([IMAGE] * 8)
    first = batch(jax.random.key(seed), images, Augment(pad=PAD))
    chex.assert_trees_all_equal(first, batch(jax.random.key(seed), images, Augment(pad=PAD)))
    other = batch(jax.random.fold_in(jax.random.key(seed), 1), images, Augment(pad=PAD))
    assert (np.asarray(first) != np.asarray(other)).any()


def test_an_example_does_not_depend_on_the_images_around_it():
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 7, 2), np.uint8)
    others = np.random.default_rng(1).integers(0, 256, (6, 5, 7, 2), np.uint8)
    others[2] = images[2]
    whole, changed = (batch(KEYS[0], x, Augment(pad=PAD)) for x in (images, others))
    chex.assert_trees_all_equal(whole[2], changed[2])
    keys = jax.random.split(KEYS[0], 6)  # so the example's own key is all that it takes
    chex.assert_trees_all_equal(whole, jnp.stack([crop_and_flip(k, x) for k, x in zip(keys, images, strict=True)]))


# --- normalize ------------------------------------------------------------------------------------


class Normalize(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_by_hand(self):
        images = np.array([[[[0, 10]], [[255, 30]]]], np.uint8)
        out = self.variant(augment.normalize)(images, jnp.array([5.0, 10.0]), jnp.array([2.0, 4.0]))
        chex.assert_trees_all_equal(out, np.array([[[[-2.5, 0.0]], [[125.0, 5.0]]]], np.float32))
        chex.assert_type(out, jnp.float32)

    @chex.variants(with_jit=True, without_jit=True)
    def test_one_image_as_a_batch_of_one(self):
        mean, std = np.array([1.0, 2.0], np.float32), np.array([3.0, 4.0], np.float32)
        normalize = self.variant(augment.normalize)
        chex.assert_trees_all_equal(normalize(IMAGE, mean, std), normalize(IMAGE[None], mean, std)[0])


def test_mixup_mixes_images_as_it_says():
    images = jax.random.normal(jax.random.key(1), (16, 4, 4, 3))
    labels = jnp.arange(16, dtype=jnp.int32)
    mixed, partner, share = augment.mixup(jax.random.key(0), images, labels, 1.0)
    assert sorted(partner.tolist()) == list(range(16))
    assert ((share >= 0.5) & (share <= 1)).all()
    part = np.asarray(share)[:, None, None, None]
    want = part * np.asarray(images) + (1 - part) * np.asarray(images)[np.asarray(partner)]
    chex.assert_trees_all_close(mixed, want, rtol=1e-5, atol=1e-6)
    again = augment.mixup(jax.random.key(0), images, labels, 1.0)
    chex.assert_trees_all_equal(again, (mixed, partner, share))


def test_a_small_alpha_mixes_little():
    images, labels = jnp.zeros((2000, 1)), jnp.zeros(2000, jnp.int32)
    even, little = (augment.mixup(jax.random.key(0), images, labels, alpha)[2].mean() for alpha in (50.0, 0.05))
    assert even < 0.6 < 0.9 < little
