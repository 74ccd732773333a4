"""Policies against Pillow, value by value, and what is drawn from them."""

import functools
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import configured
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from mfm_jax import data as data_lib
from mfm_jax.config import Augment
from mfm_jax.data import augment, policies
from mfm_jax.errors import UserError
from mfm_jax.training import experiment as experiment_lib

NAMES = ["autoaugment", "randaugment", "trivialaugment"]
SHAPES = [(16, 16, 3), (9, 14, 3), (8, 8, 1), (2, 5, 3)]
STRENGTHS = {
    **dict.fromkeys(("ShearX", "ShearY"), st.floats(-0.99, 0.99)),
    **dict.fromkeys(("TranslateX", "TranslateY"), st.floats(-32, 32)),
    "Rotate": st.floats(-135, 135) | st.sampled_from([90.0, -90.0, 0.0, 45.0]),
    # Tenths, as in AutoAugment: products near whole numbers, where rounding shows.
    **dict.fromkeys(policies._BLENDS, st.floats(-0.99, 0.99) | st.integers(-9, 9).map(lambda tenths: tenths / 10)),
    "Posterize": st.integers(2, 8),
    "Solarize": st.floats(0, 255) | st.integers(0, 255),
}
transformed = jax.jit(policies.transformed)


def by_pillow(name: str, strength: float, image: np.ndarray) -> np.ndarray:
    """Returns what torchvision's `_apply_op` has Pillow do, pixels that lead outside being black."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)

    def affine(*numbers: float) -> Image.Image:
        return picture.transform(picture.size, Image.Transform.AFFINE, numbers, Image.Resampling.NEAREST)

    done = {
        "Identity": lambda: picture,
        "ShearX": lambda: affine(1, strength, 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, strength, 1, 0),
        "TranslateX": lambda: affine(1, 0, -int(strength), 0, 1, 0),
        "TranslateY": lambda: affine(1, 0, 0, 0, 1, -int(strength)),
        "Rotate": lambda: picture.rotate(strength),
        "Posterize": lambda: ImageOps.posterize(picture, int(strength)),
        "Solarize": lambda: ImageOps.solarize(picture, strength),
        "AutoContrast": lambda: ImageOps.autocontrast(picture),
        "Equalize": lambda: ImageOps.equalize(picture),
        "Invert": lambda: ImageOps.invert(picture),
    }
    enhanced = getattr(ImageEnhance, name, None)
    result = enhanced(picture).enhance(1 + strength) if enhanced else done[name]()
    return np.asarray(result).reshape(image.shape)


@st.composite
def images(draw):
    """Returns noise over any range of values, or few values, of a shape of `SHAPES`."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low = draw(st.integers(0, 255))
    high = draw(st.integers(low, 255))
    image = rng.integers(low, high + 1, draw(st.sampled_from(SHAPES)))
    return (image if draw(st.booleans()) else np.where(image > (low + high) / 2, low, high)).astype(np.uint8)


def by_us(name: str, strength: float, image: np.ndarray) -> np.ndarray:
    return np.asarray(transformed(image, policies.operation(name, strength, *image.shape[:2])))


@pytest.mark.parametrize("name", [name for name in (*policies.OPERATIONS, "Invert") if name != "AutoContrast"])
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_an_operation_is_pillows(name, data):
    image, strength = data.draw(images()), data.draw(STRENGTHS.get(name, st.just(0.0)))
    chex.assert_trees_all_equal(by_us(name, strength, image), by_pillow(name, strength, image))


@settings(deadline=None, max_examples=100)
@given(images())
def test_autocontrast_is_pillows_but_for_its_rounding_of_whole_numbers(image):
    """Pillow multiplies by `255 / (high - low)` in float64, and may come out just below a whole number."""
    found, expected = (np.asarray(by(("AutoContrast"), 0.0, image), int) for by in (by_us, by_pillow))
    low, high = image.min((0, 1)).astype(int), image.max((0, 1)).astype(int)
    whole = 255 * (image - low) % np.maximum(high - low, 1) == 0
    chex.assert_trees_all_equal(np.where(whole, 0, found), np.where(whole, 0, expected))
    assert set(np.unique((found - expected)[whole])) <= {0, 1}


def test_equalize_cuts_off_what_is_too_bright():
    """Of 1024 pixels a quarter has the largest value: steps of 3, and 768 / 3 is more than 255."""
    image = np.concatenate([np.zeros(767), np.ones(1), np.full(256, 2)]).reshape(32, 32, 1).astype(np.uint8)
    assert by_us("Equalize", 0.0, image).max() == 255
    chex.assert_trees_all_equal(by_us("Equalize", 0.0, image), by_pillow("Equalize", 0.0, image))


# --- what is drawn --------------------------------------------------------------------------------


@functools.cache
def made(name: str, size: int = 32, **fields) -> policies.Policy:
    return policies.policy(Augment(policy=name, **fields), size, size)


def row_of(policy: policies.Policy, row: int) -> policies.Operation:
    """Returns an operation of a policy."""
    one = policies.Operation(*(column[row] for column in policy.operations))
    return one._replace(products=policy.products[one.products])


def test_strengths_are_torchvisions():
    """By hand: the second of its linspaces of 10 or 31, the last, and the counts of bits."""
    of = {
        name: functools.partial(policies._strength, largest, bits, bins, size, 2 * size)
        for name, largest, bits, bins, size in (
            ("auto", policies._SIGNED, 4, 10, 331),
            ("rand", policies._SIGNED, 4, 31, 331),
            ("trivial", policies._WIDE, 6, 31, 1),
        )
    }
    assert [of["auto"]("TranslateX", 9), of["auto"]("TranslateY", 9)] == pytest.approx([300, 150])
    assert [of["rand"](name, 1) for name in ("ShearX", "Rotate", "Color")] == pytest.approx([0.01, 1, 0.03])
    assert [of["trivial"](name, 30) for name in ("ShearY", "TranslateX", "Rotate")] == pytest.approx([0.99, 64, 135])
    assert [of["auto"]("Posterize", at) for at in range(10)] == [8, 8, 7, 7, 6, 6, 5, 5, 4, 4]
    assert [of["rand"]("Posterize", at) for at in (3, 4, 11, 12, 18, 19, 26, 27)] == [8, 7, 7, 6, 6, 5, 5, 4]
    assert [of["trivial"]("Posterize", at) for at in (2, 3, 27, 28)] == [8, 7, 3, 2]
    assert [of["auto"]("Solarize", at) for at in (0, 3, 9)] == [255, 170, 0]


def test_autoaugment_has_the_choices_of_its_table():
    policy, strength = made("autoaugment"), functools.partial(policies._strength, policies._SIGNED, 4, 10, 32, 32)
    assert policy.rows.shape == (25, 2, 2)
    for choice, steps in enumerate(policies._CIFAR):
        for step, (name, chance, at) in enumerate(steps):
            assert policy.chances[choice, step] == np.float32(chance)
            for sign in range(2):
                signed = strength(name, at) * (-1 if sign and name in policies._SIGNED else 1)
                found, expected = (
                    row_of(policy, policy.rows[choice, step, sign]),
                    policies.operation(name, signed, 32, 32),
                )
                chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_gets_the_operations_that_are_drawn(name):
    policy, key = made(name, 16, operations=3), jax.random.key(5)
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    apply = jax.jit(lambda key, image: policies.apply(key, image, policy))
    for one in jax.random.split(key, 6):
        expected = image
        for row in policies.draw(one, policy):
            expected = np.asarray(transformed(expected, row_of(policy, int(row))))
        chex.assert_trees_all_equal(apply(one, image), expected)


def drawn(policy: policies.Policy, number: int = 20_000) -> np.ndarray:
    """Returns the rows of many images, `[number, rounds * k]`."""
    keys = jax.random.split(jax.random.key(1), number)
    return np.stack(jax.jit(jax.vmap(lambda key: policies.draw(key, policy)))(keys), axis=-1)


@pytest.mark.parametrize("name", NAMES[1:])
def test_every_operation_is_drawn_as_often_in_either_direction(name):
    policy = made(name)
    rows = drawn(policy)
    assert rows.shape[1] == (2 if name == "randaugment" else 1)
    by_name = len(policy.rows) // 14
    for column in rows.T:
        counts = Counter(column.tolist())
        per_operation = [
            sum(counts[row] for row in set(policy.rows[i * by_name : (i + 1) * by_name].ravel().tolist()))
            for i in range(14)
        ]
        assert per_operation[0] == counts[0]  # the identity
        assert np.abs(np.array(per_operation) - 20_000 / 14).max() < 5 * np.sqrt(20_000 / 14)
        rotations = policy.rows[5 * by_name : 6 * by_name, 0]
        if name == "randaugment":
            assert np.ptp([counts[row] for row in rotations[0].tolist()]) < 5 * np.sqrt(20_000 / 14)
        else:
            assert set(rotations.ravel().tolist()) <= counts.keys()  # every strength occurs, in either direction
    if name == "randaugment":
        assert np.mean(rows[:, 0] == rows[:, 1]) < 0.1  # independent of each other


def test_autoaugment_takes_its_steps_as_often_as_its_table_says():
    policy = made("autoaugment")
    steps = drawn(policy)
    for step in range(2):
        left_out = (1 - policy.chances[:, step]).mean()
        assert np.mean(steps[:, step] == 0) == pytest.approx(left_out, abs=0.02)
    ends = policy.rows[3, 1]  # TranslateY, 0.7, after ShearY, 0.5: only this choice has that strength after it
    together = np.isin(steps[:, 0], policy.rows[3, 0]) & np.isin(steps[:, 1], ends)
    assert np.mean(together) == pytest.approx(0.5 * 0.7 / 25, abs=0.004)


# --- in a batch -----------------------------------------------------------------------------------

batch = jax.jit(augment.augment_batch, static_argnums=2)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_does_not_depend_on_the_images_around_it(name):
    chosen = Augment(policy=name, pad=2)
    some, others = (np.random.default_rng(seed).integers(0, 256, (6, 12, 12, 3), np.uint8) for seed in (0, 1))
    others[2] = some[2]
    whole, changed = (batch(jax.random.key(0), x, chosen) for x in (some, others))
    assert whole.dtype == jnp.uint8
    chex.assert_trees_all_equal(whole[2], changed[2])
    assert (np.asarray(whole) != np.asarray(batch(jax.random.key(0), some, Augment(pad=2)))).any()


def test_without_a_policy_the_program_is_the_plain_one():
    given = jax.random.key(0), np.zeros((4, 8, 8, 3), np.uint8)
    plain, unread = (
        batch.lower(*given, chosen).as_text() for chosen in (Augment(), Augment(magnitude=3, operations=5))
    )
    assert plain == unread


def test_no_strength_leaves_images_alone():
    """RandAugment at 0: but for the operations that have no strength, and white, which Solarize inverts."""
    policy = made("randaugment", magnitude=0)
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    changing = {
        name
        for name, rows in zip(policies.OPERATIONS, policy.rows[:, 0].tolist(), strict=True)
        if any((np.asarray(transformed(image, row_of(policy, row))) != image).any() for row in rows)
    }
    assert changing <= {"AutoContrast", "Equalize"}


def test_a_policy_takes_grey_and_rgb_alone():
    config = configured("ce", augment__policy="trivialaugment")
    data = data_lib.build(config)
    experiment_lib.build(config, data)  # grey digits
    object.__setattr__(data, "train_images", np.repeat(data.train_images, 2, axis=-1))
    with pytest.raises(UserError, match=r"augment.policy = 'trivialaugment': takes 1 or 3 channels, .* have 2; use"):
        experiment_lib.build(config, data)
