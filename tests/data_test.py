"""Sources, their cache, `build` and the batch functions; real CIFAR only where it is prepared."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets
from array_record.python import array_record_module
from helpers import file_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2

from mfm_jax import data
from mfm_jax.config import Config, Data, Meta, Train
from mfm_jax.data import assembly, batches, kept, longtail, sources, tfds
from mfm_jax.data import digits as digits_lib
from mfm_jax.data.manifest import manifest_hash, write_manifest
from mfm_jax.errors import UserError, install

CIFAR = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser() / "cifar10"
needs_cifar = pytest.mark.skipif(not CIFAR.is_dir(), reason="TFDS_DATA_DIR holds no prepared cifar10")


def digits(*, meta: Meta = Meta(), train: Train = Train(), **fields) -> Config:  # noqa: B008  # both frozen
    fields = {"source": "digits", "imbalance_factor": 5.0, **fields}
    return Config(data=Data(**fields), meta=meta, train=train)


# --- sources --------------------------------------------------------------------------------------


def test_digits_has_a_fixed_test_split():
    first, second = digits_lib.load(Data(source="digits")), digits_lib.load(Data(source="digits", seed=5))
    chex.assert_trees_all_equal(first.test_ids, second.test_ids)
    assert np.bincount(first.test_labels).tolist() == [50] * 10
    both = np.sort(np.concatenate([first.train_ids, first.test_ids]))
    chex.assert_trees_all_equal(both, np.arange(1797))
    chex.assert_shape(first.train_images, (1297, 8, 8, 1))
    chex.assert_type([first.train_images, first.train_labels], [np.uint8, np.int32])
    assert (first.train_images.min(), first.train_images.max()) == (0, 255)
    assert (np.diff(first.train_ids) > 0).all()
    assert np.bincount(first.train_labels).min() == 124  # as the docstring says
    assert np.bincount(first.train_labels).max() == 133


def test_resize_averages_areas():
    image = np.array([[0, 10, 20], [30, 40, 50], [60, 70, 80]], np.uint8)[None, :, :, None]
    assert sources.resize(image, 1).ravel().tolist() == [40]
    # Each new pixel covers 1.5 x 1.5 old ones: (0 + 10/2 + 30/2 + 40/4) / 2.25 = 13.33
    assert sources.resize(image, 2).ravel().tolist() == [13, 27, 53, 67]
    wide = np.array([[0, 100, 200, 255]], np.uint8)[None, :, :, None]
    assert sources.resize(wide, 2).ravel().tolist() == [50, 228, 50, 228]  # 227.5 rounds to even
    assert sources.resize(image, 0) is image
    assert sources.resize(image, 3) is image
    full = np.full((3, 32, 32, 3), 255, np.uint8)
    assert (sources.resize(full, 13) == 255).all()


def example(image: np.ndarray, label: int) -> bytes:
    """Returns one record as TFDS prepares it: a serialised tf.train.Example with a PNG."""
    record = tf_example_pb2.Example()
    record.features.feature["image"].bytes_list.value.append(file_of(image))
    record.features.feature["label"].int64_list.value.append(label)
    return record.SerializeToString()


def prepare(root: Path, splits: dict[str, list[tuple[np.ndarray, int]]], **changes) -> Path:
    """Writes a prepared TFDS set `tiny` 1.0.0 of two classes, without TensorFlow."""
    folder = root / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    features = tensorflow_datasets.features.FeaturesDict(
        {
            "image": tensorflow_datasets.features.Image(shape=changes.get("shape", (4, 4, 3))),
            "label": tensorflow_datasets.features.ClassLabel(names=["cat", "dog"]),
        }
    )
    features.save_config(folder)
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": changes.get("file_format", "array_record")}
    info["splits"] = []
    for name, examples in splits.items():
        file = f"tiny-{name}.{info['fileFormat']}-00000-of-00001"
        writer = array_record_module.ArrayRecordWriter(str(folder / file), "group_size:1")
        for image, label in examples:
            writer.write(example(image, label))
        writer.close()
        info["splits"].append(
            {
                "name": name,
                "shardLengths": [str(len(examples))],
                "numBytes": str((folder / file).stat().st_size),
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return root


def pictures(count: int, seed: int = 0, size: tuple[int, int] = (4, 4)) -> list[tuple[np.ndarray, int]]:
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 256, (*size, 3), np.uint8), i % 2) for i in range(count)]


def tiny(root: Path, **fields) -> Data:
    return Data(name="tiny", root=str(root), **fields)


def test_tfds_set_is_read_without_tensorflow(tmp_path, own_cache):
    train, test = pictures(30), pictures(6, seed=1)
    root = prepare(tmp_path / "a", {"train": train, "test": test})
    for _ in range(2):  # decoded, then from the cache
        source = tfds.load(tiny(root))
        chex.assert_trees_all_equal(source.train_images, np.stack([image for image, _ in train]))
        chex.assert_trees_all_equal(source.test_images, np.stack([image for image, _ in test]))
        assert source.train_labels.tolist() == [label for _, label in train]
        chex.assert_type([source.train_images, source.train_labels], [np.uint8, np.int32])
    assert (source.name, source.version, source.class_names) == ("tiny", "1.0.0", ("cat", "dog"))
    assert (source.train_pool, source.test_pool) == ("train", "test")
    assert len(list(own_cache.iterdir())) == 2


def test_cache_does_not_mix_copies_or_sizes(tmp_path, own_cache):
    a = prepare(tmp_path / "a", {"train": pictures(8), "test": pictures(2)})
    b = prepare(tmp_path / "b", {"train": pictures(8, seed=1), "test": pictures(2)})
    of_a, of_b = tfds.load(tiny(a)), tfds.load(tiny(b))
    assert not np.array_equal(of_a.train_images, of_b.train_images)
    small = tfds.load(tiny(a, image_size=2))
    chex.assert_trees_all_equal(small.train_images, sources.resize(of_a.train_images, 2))
    assert len(list(own_cache.iterdir())) == 6


def test_processes_decode_what_one_does(tmp_path, own_cache, monkeypatch):
    splits = {"train": pictures(20) + pictures(7, size=(6, 8)), "test": pictures(2)}
    root = prepare(tmp_path / "a", splits, shape=(None, None, 3))
    monkeypatch.setattr(tfds, "_DECODE_BATCH", 5)
    alone = tfds.load(tiny(root, image_size=3))
    shutil.rmtree(own_cache)
    started, mapped = [], tfds.workers.mapped
    monkeypatch.setattr(tfds, "PROGRESS_FROM", 10)
    monkeypatch.setattr(tfds.workers, "mapped", lambda *args: started.append(args[2]) or mapped(*args))
    several = tfds.load(tiny(root, image_size=3))
    assert started == [Data.workers, 0] != [0, 0]  # few images are not worth a process
    chex.assert_trees_all_equal(several.train_images, alone.train_images)
    chex.assert_trees_all_equal(several.train_labels, alone.train_labels)


def test_validation_stands_in_for_a_missing_test_split(tmp_path, own_cache):
    root = prepare(tmp_path / "a", {"train": pictures(8), "validation": pictures(2)})
    assert tfds.load(tiny(root)).test_pool == "validation"
    root = prepare(tmp_path / "b", {"train": pictures(8)})
    with pytest.raises(UserError, match="needs the splits train and test"):
        tfds.load(tiny(root))


def test_images_of_several_sizes_need_a_size(tmp_path, own_cache):
    mixed = pictures(3) + pictures(3, size=(6, 8))
    root = prepare(tmp_path / "a", {"train": mixed, "test": pictures(2)}, shape=(None, None, 3))
    with pytest.raises(UserError, match=r"data\.image_size = 0: images of 'tiny' differ .* record 3 is \(6, 8, 3\)"):
        tfds.load(tiny(root))
    chex.assert_shape(tfds.load(tiny(root, image_size=2)).train_images, (6, 2, 2, 3))


def test_unlabelled_split_is_an_error(tmp_path, own_cache):
    unlabelled = [(image, -1) for image, _ in pictures(2)]
    root = prepare(tmp_path / "a", {"train": pictures(8), "test": unlabelled})
    with pytest.raises(UserError, match="split test has no labels"):
        tfds.load(tiny(root))


def test_set_in_another_file_format_is_an_error(tmp_path, own_cache):
    root = prepare(tmp_path / "a", {"train": pictures(8), "test": pictures(2)}, file_format="tfrecord")
    with pytest.raises(UserError, match=r"prepared in .* as tfrecord, .* array_record form$"):
        tfds.load(tiny(root))


def test_unprepared_set_without_tensorflow_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        tfds.load(Data(name="cifar10", root=str(tmp_path)))
    line = str(error.value)
    assert line.startswith(f"data.name = 'cifar10': not prepared in {tmp_path}")
    for way_out in ("TFDS_DATA_DIR", "--config.data.root", install("prepare")):
        assert way_out in line
    assert "\n" not in line
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_failed_preparation_is_one_line(tmp_path, monkeypatch):
    def offline(self):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(tfds.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(tensorflow_datasets.core.DatasetBuilder, "download_and_prepare", offline)
    with pytest.raises(UserError) as error:
        tfds.load(Data(name="cifar10", root=str(tmp_path)))
    assert "could not be prepared" in str(error.value)
    assert "ConnectionError: no route to host" in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_and_unfit_sets_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"data\.name = 'nosuch': neither a TFDS set nor one prepared"):
        tfds.load(Data(name="nosuch", root=str(tmp_path)))
    with pytest.raises(UserError, match="needs an `image` and a class `label`; it has:"):
        tfds.load(Data(name="ag_news_subset", root=str(tmp_path)))


# --- the cache ------------------------------------------------------------------------------------


def arrays(value: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return np.full((5, 2, 2, 1), value, np.uint8), np.arange(5, dtype=np.int32)


def never() -> tuple[np.ndarray, np.ndarray]:
    raise AssertionError("was in the cache")


@pytest.mark.parametrize("file", ["images.npy", "labels.npy", "checksums.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_damaged_entry_is_rebuilt(own_cache, file, damage):
    kept.cached("set", lambda: arrays(1))
    path = own_cache / "set" / file
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        flipped = content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]
        path.write_bytes(content[:-3] if damage == "cut" else flipped)
    chex.assert_trees_all_equal(kept.cached("set", lambda: arrays(2)), arrays(2))
    chex.assert_trees_all_equal(kept.cached("set", never), arrays(2))
    assert [path.name for path in own_cache.iterdir()] == ["set"]


def test_a_failed_build_leaves_nothing(own_cache):
    with pytest.raises(AssertionError, match="was in the cache"):
        kept.cached("set", never)
    assert not own_cache.exists()


def test_unwritable_cache_costs_only_the_cache(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MFM_JAX_CACHE", str(tmp_path / "file" / "cache"))
    chex.assert_trees_all_equal(kept.cached("set", arrays), arrays())
    assert "decoded images are not kept" in caplog.text


BUILDER = """
import sys, time
from pathlib import Path
import numpy as np
from mfm_jax.data import kept
me, other = Path(sys.argv[1]), Path(sys.argv[2])

def build():
    me.touch()
    while not other.exists():  # neither finishes before both have begun
        time.sleep(0.01)
    return np.full((2000, 16, 16, 3), 7, np.uint8), np.zeros(2000, np.int32)

images, labels = kept.cached("set", build)
assert (images == 7).all() and images.shape == (2000, 16, 16, 3)
"""


def test_two_processes_may_build_at_once(own_cache, tmp_path):
    marks = [str(tmp_path / "one"), str(tmp_path / "two")]
    command = [sys.executable, "-c", BUILDER]
    both = [subprocess.Popen([*command, *order]) for order in (marks, marks[::-1])]
    assert [process.wait(60) for process in both] == [0, 0]
    images, _ = kept.cached("set", never)
    assert (images == 7).all()
    assert [path.name for path in own_cache.iterdir()] == ["set"]


# --- build ----------------------------------------------------------------------------------------


def test_build_holds_out_the_meta_set():
    made = data.build(digits(val_images_per_class=4))
    left = 124 - 4 - 10
    chex.assert_trees_all_equal(made.counts, longtail.class_counts(left, 10, 5.0))
    chex.assert_trees_all_equal(made.counts, np.bincount(made.train_labels))
    assert np.bincount(made.meta_labels).tolist() == [10] * 10
    assert np.bincount(made.val_labels).tolist() == [4] * 10
    table = made.meta_table(0)
    chex.assert_shape(table, (10, 10))
    chex.assert_type(table, np.int32)
    assert (made.meta_labels[table] == np.arange(10)[:, None]).all()
    chex.assert_trees_all_equal(np.sort(table.ravel()), np.arange(100))
    chex.assert_trees_all_equal(made.meta_table(7), table)
    assert made.num_classes == 10


def test_build_full_redraws_the_meta_set_from_training():
    made = data.build(digits(protocol="full", imbalance_factor=20.0, meta=Meta(batch_size=60)))
    assert made.meta_images is made.train_images
    assert (made.counts[0], made.counts[-1]) == (124, 6)
    chex.assert_shape(made.meta_table(0), (10, 6))  # no class has more than the smallest gives
    assert (made.train_labels[made.meta_table(3)] == np.arange(10)[:, None]).all()
    assert not np.array_equal(made.meta_table(0), made.meta_table(1))
    train, meta = (made.manifest["splits"][name]["ids"] for name in ("train", "meta"))
    assert sorted(np.array(train)[made.meta_table(0)].ravel()) == meta
    assert made.manifest["overlaps"][0]["part"] == "meta"


def test_train_on_meta_adds_the_same_meta_images():
    plain, both = data.build(digits()), data.build(digits(train_on_meta=True))
    chex.assert_trees_all_equal(both.counts, plain.counts + 10)
    chex.assert_trees_all_equal(both.meta_images, plain.meta_images)
    chex.assert_trees_all_equal((both.mean, both.std), (plain.mean, plain.std))
    ids = {name: set(split["ids"]) for name, split in both.manifest["splits"].items()}
    assert ids["meta"] < ids["train"]


def test_records_are_the_ones_the_manifest_names():
    made, source = data.build(digits(val_images_per_class=2)), digits_lib.load(Data(source="digits"))
    position = {record: i for i, record in enumerate(source.train_ids)}
    for name in ("train", "meta", "val"):
        rows = [position[record] for record in made.manifest["splits"][name]["ids"]]
        chex.assert_trees_all_equal(getattr(made, f"{name}_images"), source.train_images[rows])
    assert {split["pool"] for split in made.manifest["splits"].values()} == {"all"}


def test_mean_and_std_are_of_the_training_images():
    made = data.build(digits())
    pixels = made.train_images.astype(np.float64)
    chex.assert_trees_all_close(made.mean, np.array([pixels.mean()], np.float32), rtol=1e-6)
    chex.assert_trees_all_close(made.std, np.array([pixels.std()], np.float32), rtol=1e-6)
    constant = np.full((3, 2, 2, 2), 9, np.uint8)
    mean, std = assembly.mean_std(Config(), "other", constant)
    assert (mean.tolist(), std.tolist()) == ([9, 9], [1, 1])
    chex.assert_type([mean, std], np.float32)
    coloured = np.zeros((1, 2, 2, 3), np.uint8)
    assert assembly.mean_std(Config(), "cifar10", coloured)[0].tolist() == pytest.approx([125.3, 123.0, 113.9])
    chosen = Config(data=Data(normalize="pytorch_cifar"))
    mean, std = assembly.mean_std(chosen, "cifar10", coloured)
    assert (mean / 255).tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
    assert (std / 255).tolist() == pytest.approx([0.2023, 0.1994, 0.2010])


@pytest.mark.parametrize("train_on_meta", [False, True])
@pytest.mark.parametrize("protocol", ["meta_held_out", "full"])
def test_a_manifest_brings_the_split_back(tmp_path, protocol, train_on_meta):
    path = tmp_path / "manifest.json"
    config = digits(protocol=protocol, train_on_meta=train_on_meta, val_images_per_class=3)
    write_manifest(data.build(config).manifest, path)
    for again in (False, True):  # a manifest serves runs with and without `train_on_meta`
        fields = dataclasses.replace(config.data, train_on_meta=again)
        fresh = data.build(dataclasses.replace(config, data=fields))
        fields = dataclasses.replace(fields, manifest=str(path))
        reused = data.build(dataclasses.replace(config, data=fields))
        assert reused.manifest == fresh.manifest
        chex.assert_trees_all_equal(dataclasses.asdict(reused), dataclasses.asdict(fresh))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"imbalance_factor": 4.0}, r"data\.imbalance_factor = 4\.0: the manifest .* was made with 5\.0; set"),
        ({"seed": 3}, r"data\.seed = 3: the manifest .* was made with 0"),
        ({"protocol": "full"}, r"data\.protocol = 'full': the manifest .* was made with 'meta_held_out'"),
    ],
)
def test_a_manifest_of_other_settings_is_refused(tmp_path, change, line):
    path = tmp_path / "manifest.json"
    write_manifest(data.build(digits()).manifest, path)
    with pytest.raises(UserError, match=line):
        data.build(digits(**change, manifest=str(path)))


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda m: m.update(dataset="letters"), "made for dataset 'letters', the data has 'digits'"),
        (lambda m: m.update(version="2"), "made for version '2', the data has '1'"),
        (lambda m: m["splits"]["test"]["ids"].pop(), "its test split differs from digits's"),
        (lambda m: m["splits"]["train"]["ids"].append(1797), "train names records of pool 'all' that digits does"),
        (lambda m: m["splits"]["val"].update(class_counts=[1] * 10), "records of val have other classes"),
        (lambda m: m["splits"]["val"]["ids"].append(m["splits"]["meta"]["ids"][0]), "meta and val share 1"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, edit, line):
    """Even one with a hash that fits: made by hand, or of another copy of the data."""
    path = tmp_path / "manifest.json"
    manifest = data.build(digits()).manifest
    edit(manifest)
    write_manifest({**manifest, "hash": manifest_hash(manifest)}, path)
    with pytest.raises(UserError, match=line):
        data.build(digits(manifest=str(path)))


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (digits(meta=Meta(images_per_class=130)), "meta.images_per_class = 130: class "),
        (digits(val_images_per_class=124), "data.val_images_per_class = 124: class "),
        (digits(imbalance_factor=115.0), "data.imbalance_factor = 115: leaves the rarest class without a training ima"),
    ],
)
def test_what_only_the_data_can_tell_is_checked(config, line):
    with pytest.raises(UserError) as error:
        data.build(config)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


@pytest.mark.slow  # 60,000 pictures are decoded; `longtail_test` has the same counts
@needs_cifar
@pytest.mark.parametrize(("protocol", "total"), [("meta_held_out", 12_380), ("full", 12_406)])
def test_real_cifar(protocol, total):
    made = data.build(Config(data=Data(protocol=protocol)))
    chex.assert_shape(made.train_images, (total, 32, 32, 3))
    chex.assert_shape(made.test_images, (10_000, 32, 32, 3))
    assert made.class_names[:2] == ("airplane", "automobile")
    # The published constants describe all 50,000 images; a tail-heavy swap of channels would show.
    source = tfds.load(Data())
    channel_means = source.train_images.mean((0, 1, 2))
    chex.assert_trees_all_close(channel_means.astype(np.float32), made.mean, atol=0.06)


# --- batches --------------------------------------------------------------------------------------


def test_epoch_order_is_a_permutation_of_seed_and_epoch():
    key = jax.random.key(3)
    order = batches.epoch_order(key, 2, 107, 10)
    chex.assert_shape(order, (10, 10))
    chex.assert_type(order, jnp.int32)
    assert len(set(np.asarray(order).ravel())) == 100
    chex.assert_trees_all_equal(order, batches.epoch_order(key, jnp.int32(2), 107, 10))
    assert not np.array_equal(order, batches.epoch_order(key, 3, 107, 10))
    dropped = [set(range(107)) - set(np.asarray(batches.epoch_order(key, e, 107, 10)).ravel()) for e in range(3)]
    assert len({frozenset(d) for d in dropped}) == 3
    assert batches.steps_per_epoch(107, 10) == 10


@settings(deadline=None, max_examples=8)  # each has programs of its own
@given(st.integers(1, 7), st.integers(1, 6), st.integers(0, 2**31 - 1), st.data())
def test_meta_batches_are_balanced_without_repeats(num_classes, m, step, draw):
    batch_size = draw.draw(st.integers(1, num_classes * m))
    table = 100 + jnp.arange(num_classes * m, dtype=jnp.int32).reshape(num_classes, m)
    index = batches.meta_indices(jax.random.key(0), step, table, batch_size)
    chex.assert_shape(index, (batch_size,))
    chex.assert_type(index, jnp.int32)
    rows = (np.asarray(index) - 100) // m
    counts = np.bincount(rows, minlength=num_classes)
    assert counts.max() - counts.min() <= 1
    assert len(set(np.asarray(index).tolist())) == batch_size


def test_every_meta_image_is_equally_likely():
    table = jnp.arange(12, dtype=jnp.int32).reshape(3, 4)
    draw = jax.vmap(lambda step: batches.meta_indices(jax.random.key(1), step, table, 4))
    index = np.asarray(draw(jnp.arange(3000, dtype=jnp.int32)))
    seen = np.bincount(index.ravel(), minlength=12) / 3000  # 4 of 12: expected 1/3, standard error 0.0086
    assert np.abs(seen - 1 / 3).max() < 0.045
    first = np.bincount(index[:, 0] // 4, minlength=3) / 3000
    assert np.abs(first - 1 / 3).max() < 0.045


def test_meta_batch_is_a_function_of_key_and_step():
    table = jnp.arange(50, dtype=jnp.int32).reshape(5, 10)
    key = jax.random.key(0)
    again = [np.asarray(batches.meta_indices(key, step, table, 20)) for step in (4, 4, 5)]
    chex.assert_trees_all_equal(again[0], again[1])
    assert not np.array_equal(again[0], again[2])
    with pytest.raises(ValueError, match="would repeat some"):
        batches.meta_indices(key, 0, table, 51)


def test_indices_stay_int32_and_equal_under_x64():
    table = jnp.arange(50, dtype=jnp.int32).reshape(5, 10)
    key = jax.random.key(0)

    def all_indices():
        return batches.epoch_order(key, 1, 33, 4), batches.meta_indices(key, 1, table, 20)

    narrow = all_indices()
    with jax.enable_x64(True):
        wide = all_indices()
    chex.assert_type(list(wide), jnp.int32)
    chex.assert_trees_all_equal(narrow[1], wide[1])
    chex.assert_trees_all_equal(narrow[0], wide[0])


def test_gather_keeps_dtypes():
    images = jnp.arange(24, dtype=jnp.uint8).reshape(6, 2, 2, 1)
    index = jnp.array([5, 0], jnp.int32)
    got = batches.gather(images, index)
    chex.assert_type(got, jnp.uint8)
    chex.assert_trees_all_equal(got, images[np.array([5, 0])])
    chex.assert_trees_all_equal(batches.gather(jnp.arange(6, dtype=jnp.int32), index), index)


@pytest.mark.parametrize("num_examples", [0, 3, 4, 9])
def test_eval_batches_cover_all_in_one_shape(num_examples):
    images = np.arange(num_examples * 4, dtype=np.uint8).reshape(num_examples, 2, 2, 1)
    seen = []
    for batch_images, mask in batches.eval_batches(images, 4):
        chex.assert_shape([batch_images, mask], [(4, 2, 2, 1), (4,)])
        chex.assert_type([batch_images, mask], [np.uint8, bool])
        assert not batch_images[~mask].any()
        seen.append(batch_images[mask])
    chex.assert_trees_all_equal(np.concatenate([np.zeros((0, 2, 2, 1), np.uint8), *seen]), images)
