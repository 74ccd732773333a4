"""Data sets in one file of arrays: what is in it is what is trained on, and what is wrong with it is named."""

import json

import chex
import numpy as np
import pytest
from helpers import benchmark

from mfm_jax import config as config_lib
from mfm_jax.data import build
from mfm_jax.errors import UserError

COUNTS = (20, 8, 4)


def arrays(**changed) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {}
    for split, counts in (("train", COUNTS), ("test", (3, 3, 3))):
        labels = np.repeat(np.arange(3, dtype=np.uint8), counts)
        found |= {f"{split}_images": rng.integers(0, 256, (len(labels), 6, 6), np.uint8), f"{split}_labels": labels}
    found |= changed
    return {name: value for name, value in found.items() if value is not None}


def config_of(path, **fields):
    config = config_lib.default()
    config.data.update(source="npz", root=str(path), protocol="natural", imbalance_factor=1.0, val_fraction=0.25)
    config.train.batch_size = config.meta.batch_size = 2
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config_lib.resolve(config)


def saved(folder, **changed):
    np.savez_compressed(folder / "set.npz", **arrays(**changed))
    return folder / "set.npz"


def test_what_is_in_the_file_is_trained_on(tmp_path):
    path, given = saved(tmp_path, train_labels=arrays()["train_labels"][:, None]), arrays()  # MedMNIST's are [N, 1]
    data = build(config_of(path))
    assert (data.name, data.class_names, data.counts.tolist()) == ("set", ("0", "1", "2"), [15, 6, 3])
    chex.assert_trees_all_equal(data.test_images, given["test_images"][..., None])
    both = np.concatenate([data.train_images, data.val_images])
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in given["train_images"])
    where = {image.tobytes(): label for image, label in zip(given["train_images"], given["train_labels"], strict=True)}
    assert [where[image.tobytes()] for image in data.train_images] == data.train_labels.tolist()
    assert build(config_of(path, data__image_size=3)).train_images.shape == (24, 3, 3, 1)


def test_its_own_splits_and_names_are_kept(tmp_path):
    given = arrays()
    extra = {f"{split}_{what}": given[f"test_{what}"] for split in ("val", "meta") for what in ("images", "labels")}
    data = build(config_of(saved(tmp_path, **extra, class_names=np.array(["a", "b", "é"]))))
    assert data.class_names == ("a", "b", "é")
    assert data.counts.tolist() == list(COUNTS)
    chex.assert_trees_all_equal(data.val_images, given["test_images"][..., None])
    chex.assert_trees_all_equal(data.meta_labels, given["test_labels"].astype(np.int32))


def test_a_held_out_meta_set_is_trained_on_where_asked_for(tmp_path):
    """By a baseline; a manifest of either run gives the same split again."""
    path = saved(tmp_path)
    held = build(config_of(path, data__meta_fraction=0.2))
    assert held.counts.tolist() == [12, 5, 2]  # of 15, 6, 3
    assert np.bincount(held.meta_labels).tolist() == [3, 1, 1]
    given = build(config_of(path, data__meta_fraction=0.2, data__train_on_meta=True))
    assert given.counts.tolist() == build(config_of(path)).counts.tolist() == [15, 6, 3]
    chex.assert_trees_all_equal(given.meta_images, held.meta_images)
    (tmp_path / "split.json").write_text(json.dumps(given.manifest))
    again = build(config_of(path, data__meta_fraction=0.2, data__manifest=str(tmp_path / "split.json")))
    assert again.manifest == held.manifest
    with pytest.raises(UserError, match=r"data.meta_fraction = 0.0: the manifest .* was made with 0.2"):
        build(config_of(path, data__manifest=str(tmp_path / "split.json")))


def test_without_a_test_split_validation_is_shown_or_else_training(tmp_path):
    path = saved(tmp_path, test_images=None, test_labels=None)
    for fraction, shown in ((0.25, "val"), (0.0, "train")):
        data = build(config_of(path, eval__test=False, data__val_fraction=fraction))
        assert (data.test_images.shape, data.test_labels.shape) == ((0, 6, 6, 1), (0,))
        assert data.shown(test=False) == shown
    with pytest.raises(UserError, match=r"eval.test = False, as in tuning: .* data.val_fraction = 0 makes none"):
        build(config_of(saved(tmp_path), eval__test=False, data__val_fraction=0.0))


def test_only_resized_and_large_ones_are_kept_in_the_cache(tmp_path, own_cache):
    path = saved(tmp_path)
    build(config_of(path))
    assert not own_cache.exists()
    build(config_of(path, data__image_size=3))
    assert len(list(own_cache.iterdir())) == 2  # training and test images


def test_a_large_one_is_streamed_from_the_cache(tmp_path):
    path = saved(tmp_path)
    small, large = build(config_of(path)), build(config_of(path, data__resident_mb=0))
    assert not isinstance(large.train_images, np.ndarray)
    chex.assert_trees_all_equal(np.stack([large.train_images[i] for i in range(24)]), np.asarray(small.train_images))


def digits(**fields):
    """Returns a config, a `ConfigDict`, of the digits under an imbalance factor of 20."""
    config = config_lib.default()
    config.data.update(source="digits", name="digits", imbalance_factor=20.0, **fields)
    config.train.batch_size = 32
    return config


def packed(config, path):
    """Returns the data of `config`, which is packed into a file."""
    given = build(config_lib.resolve(config))
    with benchmark("subset") as subset:
        subset.pack(given, path)
    return given


def same_images(one, other) -> None:
    for name in ("train", "meta", "val", "test"):
        chex.assert_trees_all_equal(getattr(one, f"{name}_images"), getattr(other, f"{name}_images"))
        chex.assert_trees_all_equal(getattr(one, f"{name}_labels"), getattr(other, f"{name}_labels"))


def test_a_packed_benchmark_keeps_its_splits(tmp_path):
    given = packed(digits(val_images_per_class=3), tmp_path / "digits.npz")
    natural = build(config_of(tmp_path / "digits.npz", data__val_fraction=0.0, data__imbalance_factor=20.0))
    same_images(natural, given)
    chex.assert_trees_all_close(natural.mean, given.mean)


@pytest.mark.parametrize(
    "fields", [{"val_images_per_class": 3}, {"protocol": "full"}, {"train_on_meta": True}], ids=lambda f: next(iter(f))
)
def test_a_packed_benchmark_is_the_split_itself(tmp_path, fields):
    """Under its own protocol, and no other: record by record, in the same order, by the same manifest."""
    config, path = digits(**fields), tmp_path / "any.npz"
    given = packed(config, path)
    config.data.update(source="npz", root=str(path))
    again = build(config_lib.resolve(config))
    assert again.manifest == given.manifest
    same_images(again, given)
    config.data.seed = 1
    with pytest.raises(UserError, match=r"data.seed = 1: the manifest in .*any.npz was made with 0; set the field to"):
        build(config_lib.resolve(config))
    with np.load(path) as file:
        arrays = dict(file)
    arrays["test_images"], arrays["test_labels"] = arrays["test_images"][1:], arrays["test_labels"][1:]
    np.savez(path, **arrays)
    with pytest.raises(UserError, match="test has 499 images, its manifest names 500; pack it again"):
        build(config_lib.resolve(config))


def test_only_cifar_s_name_decides_how_images_are_normalised(tmp_path):
    own = build(config_of(saved(tmp_path)))
    for name in ("imagenet", "half", "cifar10"):
        named = build(config_of((tmp_path / "set.npz").rename(tmp_path / f"{name}.npz")))
        assert np.array_equal(named.mean, own.mean) == (name != "cifar10")
        (tmp_path / f"{name}.npz").rename(tmp_path / "set.npz")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_labels": None}, "has no array train_labels; it has: train_images, test_images, test_labels"),
        ({"test_labels": None}, "test_labels cannot be read"),
        ({"test_images": None, "test_labels": None}, "data: set has no test split; give it one, or set eval.test = F"),
        ({"train_images": np.zeros((32, 6, 6))}, r"train_images is float64 \(32, 6, 6\); needs uint8"),
        ({"train_images": np.zeros((32, 6, 6, 4), np.uint8)}, r"uint8 \(32, 6, 6, 4\); needs .* or \[N, H, W, 3\]"),
        ({"train_images": np.zeros((31, 6, 6), np.uint8)}, "train_images has 31 images, train_labels 32"),
        ({"train_labels": np.zeros((32, 2), int)}, r"train_labels is int64 \(32, 2\); needs integers"),
        ({"train_labels": np.full(32, -1)}, "train_labels is int64 .* from 0"),
        ({"train_labels": np.array([{}] * 32)}, "train_labels cannot be read"),
        ({"train_labels": np.full(32, 2**32)}, "labels reach 4294967296, with .* images in all; classes are numbered"),
        ({"train_labels": np.zeros(32, int), "test_labels": np.zeros(9, int)}, "has only one class, '0'"),
        ({"validation_labels": np.zeros(1, int)}, "validation_labels belongs to no split; they are train, val, meta"),
        ({"class_names": np.array(["a", "b"])}, "class_names is .* needs at least 3 strings"),
        ({"class_names": np.array(["a", "b", "c", "d"])}, "class 'd' has no training image"),
        ({"test_images": np.zeros((9, 5, 6), np.uint8)}, r"images are \(6, 6, 1\) in train, \(5, 6, 1\) in test"),
        ({"val_images": np.zeros((1, 6, 6, 3), np.uint8), "val_labels": np.zeros(1, int)}, r"\(6, 6, 3\) in val"),
        ({"val_images": np.zeros((1, 6, 6), np.uint8)}, "val_labels cannot be read"),
        ({"train_labels": np.repeat([1, 2, 3], [16, 8, 8])}, "train_labels has no 0; classes are numbered from 0"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changed, message):
    with pytest.raises(UserError, match=message):
        build(config_of(saved(tmp_path, **changed)))


def test_a_file_of_another_kind_is_refused(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty.npz").touch()
    whole = saved(tmp_path).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("one.npy", "text.npz", "empty.npz", "cut.npz", "absent.npz"):
        with pytest.raises(UserError, match=f"data.root = '.*{name}': not an .npz file that can be read"):
            build(config_of(tmp_path / name))
    damaged = bytearray(whole)
    damaged[len(whole) // 3] ^= 255
    (tmp_path / "damaged.npz").write_bytes(bytes(damaged))
    with pytest.raises(UserError, match="train_images cannot be read"):
        build(config_of(tmp_path / "damaged.npz"))
    with pytest.raises(UserError, match=r"data.root: missing; data.source = 'npz' needs the file"):
        build(config_of(""))
