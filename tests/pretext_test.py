"""A first stage that learns how images were turned, and the run that starts from it."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import arrays, configured, stopped_at, stored, tiny

from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax.data import augment, pretext
from mfm_jax.errors import UserError
from mfm_jax.machine import interruption, parallel
from mfm_jax.training import inputs, train
from mfm_jax.training import loop as loop_lib

KEYS = inputs.step_keys(jax.random.key(3), 0)
ROTATION = {"data__pretext": "rotation"}


def test_turns_by_hand():
    image = np.array([[1, 2], [3, 4]], np.uint8)[None, :, :, None]
    found = augment.turned(jnp.asarray(np.repeat(image, 6, 0)), jnp.array([0, 1, 2, 3, -1, 5]))
    expected = [[[1, 2], [3, 4]], [[2, 4], [1, 3]], [[4, 3], [2, 1]], [[3, 1], [4, 2]]]
    chex.assert_trees_all_equal(found[..., 0], np.array([*expected, expected[3], expected[1]], np.uint8))


def test_every_split_is_turned_evenly_and_the_split_is_that_of_the_classes():
    configs = [configured("ce", data__val_images_per_class=5, **fields) for fields in ({}, ROTATION)]
    (plain, turned), source = map(data_lib.build, configs), data_lib.assembly._load(configs[0])
    assert turned.class_names == pretext.CLASSES
    for split in ("train", "meta", "val"):
        ids = [data.manifest["splits"][split]["ids"] for data in (plain, turned)]
        assert ids[0] == ids[1]
        labels = getattr(turned, f"{split}_labels")
        chex.assert_trees_all_equal(labels, np.searchsorted(source.train_ids, ids[1]).astype(np.int32) % 4)
        assert np.bincount(labels, minlength=4).tolist() == turned.manifest["splits"][split]["class_counts"]
        for quarters in range(4):
            images, theirs = (getattr(data, f"{split}_images")[labels == quarters] for data in (plain, turned))
            chex.assert_trees_all_equal(theirs, np.rot90(images, quarters, (1, 2)))
    assert turned.counts.tolist() == np.bincount(turned.train_labels, minlength=4).tolist()
    assert np.ptp(np.bincount(turned.test_labels)) <= 1
    for name in ("mean", "std"):
        np.testing.assert_allclose(getattr(turned, name), getattr(plain, name), rtol=1e-6)


def batch_of(config, mesh=None):
    data = data_lib.build(config)
    order = jnp.arange(96, dtype=jnp.int32)[None] * 7 % len(data.train_labels)
    given = inputs.to_device(data).replace(order=order, meta_table=jnp.asarray(data.meta_table(0), jnp.int32))
    given = given.replace(mean=jnp.zeros(1), std=jnp.ones(1))
    given = jax.device_put(given, parallel.replicated(mesh) if mesh else inputs.everywhere(None))

    def make(given):
        batch = loop_lib._training_batch(KEYS, given, jnp.int32(0), config, mesh)
        return jax.lax.with_sharding_constraint(batch, parallel.split(mesh)) if mesh else batch

    return jax.jit(make)(given), data, np.asarray(order[0])


def test_a_batch_is_augmented_upright_and_turned_anew():
    """Mirroring what is turned by a quarter would turn it by three: the label would be wrong."""
    config = configured("ce", augment__flip=True, augment__pad=0, **ROTATION)
    batch, _, order = batch_of(config)
    upright = data_lib.build(configured("ce")).train_images[order].astype(np.float32)
    back = np.asarray(augment.turned(batch.image, -batch.label))
    mirrored = (back != upright).any((1, 2, 3))
    chex.assert_trees_all_equal(back[mirrored], upright[mirrored][:, :, ::-1])
    assert 20 < mirrored.sum() < 76
    assert np.bincount(batch.label, minlength=4).min() > 10
    many, _, _ = batch_of(config, parallel.data_mesh())
    chex.assert_trees_all_equal(arrays(many), arrays(batch))


def test_without_a_pretext_a_batch_is_what_it_was():
    batch, data, order = batch_of(configured("ce", augment__pad=0))
    chex.assert_trees_all_equal(batch.image, data.train_images[order].astype(np.float32))
    chex.assert_trees_all_equal(batch.label, data.train_labels[order])


def test_a_first_stage_is_a_run_and_another_starts_from_it(tmp_path, quick_runs, capsys):
    """The head has other classes and starts fresh; the rest is the first stage's, bit for bit."""
    first = tiny(method__name="ce", **ROTATION)
    results = train.train_and_evaluate(first, tmp_path / "first")
    assert len(results["last"]["test"]["per_class_accuracy"]) == 4
    manifest = json.loads((tmp_path / "first" / "manifest.json").read_text())
    assert manifest["class_names"] == list(pretext.CLASSES)
    second = tiny(method__name="ce", model__init_from=str(tmp_path / "first"), optim__learning_rate=0.0)
    train.train_and_evaluate(second, tmp_path / "second")
    assert "the head starts fresh: that run has 4 classes, this one 10" in capsys.readouterr().err
    before, after = (stored(tmp_path / name).params for name in ("first", "second"))
    for name in before.keys() - {"head"}:
        chex.assert_trees_all_equal(before[name], after[name])
    assert after["head"]["bias"].shape == (10,)


def test_a_first_stage_goes_on_bit_for_bit(tmp_path, quick_runs):
    config = tiny(method__name="ce", train__epochs=2, **ROTATION)
    with stopped_at(3), pytest.raises(interruption.Interrupted):
        train.train_and_evaluate(config, tmp_path / "stopped")
    stopped, whole = (train.train_and_evaluate(config, tmp_path / name) for name in ("stopped", "whole"))
    assert stopped["last"] == whole["last"]
    chex.assert_trees_all_equal(stored(tmp_path / "stopped").params, stored(tmp_path / "whole").params)


def test_what_a_first_stage_cannot_be(tmp_path):
    for name in ("mfm", "ldam_drw", "glmc"):
        with pytest.raises(UserError, match=f"data.pretext = 'rotation': its labels .* method.name = '{name}' acts on"):
            configured(name, **ROTATION)
    with pytest.raises(UserError, match=r"data.pretext = 'rotation': needs all images at once; raise data.resident_mb"):
        data_lib.build(configured("ce", data__resident_mb=0, **ROTATION))
    source = data_lib.assembly._load(config_lib.resolve(tiny()))
    flat = dataclasses.replace(source, train_images=source.train_images[:, :4])
    with pytest.raises(UserError, match=r"data.pretext = 'rotation': needs square images, not 4 x 8; set data"):
        pretext.turned(flat)
