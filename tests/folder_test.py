"""One's own pictures as a data set: folders and lists, their splits, and the streamed path against the resident one."""

import contextlib
import functools
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import overridden, stopped_at
from PIL import Image

from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax.data import files, listing, longtail, streaming
from mfm_jax.data.manifest import check_leakage, write_manifest
from mfm_jax.data.pictures import Facts
from mfm_jax.errors import UserError
from mfm_jax.machine import interruption
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.training import feed as feed_lib
from mfm_jax.training import inputs, preflight, train
from mfm_jax.training import loop as loop_lib
from mfm_jax.types import BilevelState

COUNTS = {"ant": 40, "bee": 12, "cricket": 5}


def picture(path: Path, seed: int, size: tuple[int, int] = (9, 7)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder of three classes with 40, 12 and 5 pictures of 9 x 7 pixels."""
    for number, (name, count) in enumerate(COUNTS.items()):
        for i in range(count):
            picture(tmp_path / "insects" / name / f"{i:02d}.png", 100 * number + i)
    return tmp_path / "insects"


def config(root: Path, **overrides):
    """Returns a config of a few seconds; overrides as `group__field=value`."""
    result = config_lib.default()
    result.data.update(
        source="folder", root=str(root), protocol="natural", imbalance_factor=1.0, image_size=8, workers=0
    )
    result.augment.pad = 1
    result.model.update(name="resnet8", width=4)
    result.meta.update(batch_size=6, every=2)
    result.train.update(epochs=2, batch_size=8)
    return overridden(result, **overrides)


def build(root: Path, **overrides) -> data_lib.LongTailData:
    return data_lib.build(config_lib.resolve(config(root, **overrides)))


def counts_of(data: data_lib.LongTailData) -> dict[str, list[int]]:
    return {name: split["class_counts"] for name, split in data.manifest["splits"].items()}


# --- splits ---------------------------------------------------------------------------------------


def test_a_folder_is_split_in_proportion(root):
    data = build(root)
    assert data.class_names == tuple(COUNTS)
    # Test: rint of a fifth of 40, 12 and 5. Validation: a tenth of the 32, 10 and 4 that are left, at least one.
    assert counts_of(data) == {"train": [29, 9, 3], "meta": [3, 3, 3], "val": [3, 1, 1], "test": [8, 2, 1]}
    check_leakage(data.manifest)
    chex.assert_shape(data.train_images, (41, 8, 8, 3))
    assert data.manifest["files"][0] == "ant/00.png"
    assert "0.2 of each class" in data.manifest["test_rule"]
    first = data.manifest["splits"]["test"]["ids"][0]
    with Image.open(root / data.manifest["files"][first]) as original:
        expected = original.resize((8, 8), Image.Resampling.BILINEAR, (1, 0, 8, 7))
    chex.assert_trees_all_equal(data.test_images[0], np.asarray(expected))


def test_the_test_split_does_not_depend_on_the_seed(root):
    first, second = build(root), build(root, data__seed=5)
    assert first.manifest["splits"]["test"] == second.manifest["splits"]["test"]
    assert first.manifest["splits"]["val"] != second.manifest["splits"]["val"]


def test_a_manifest_gives_the_same_split_again_and_notices_a_changed_picture(root, tmp_path):
    data = build(root)
    write_manifest(data.manifest, tmp_path / "split.json")
    again = build(root, data__manifest=str(tmp_path / "split.json"))
    assert again.manifest == data.manifest
    renamed = root.rename(root.with_name("elsewhere"))
    build(renamed, data__manifest=str(tmp_path / "split.json"))  # the version tells what is in it
    root = renamed.rename(root)
    picture(root / "ant" / "00.png", seed=999)
    with pytest.raises(UserError, match="made for version"):
        build(root, data__manifest=str(tmp_path / "split.json"))


def test_a_larger_factor_keeps_fewer(root):
    assert counts_of(build(root, data__imbalance_factor=29.0, meta__batch_size=3))["train"] == [
        29,
        5,
        1,
    ]  # 29 / 29 ** (r / 2)


def test_copies_of_a_picture_are_in_one_split(root):
    for i in range(20):
        (root / "bee" / f"copy{i}.png").write_bytes((root / "bee" / "00.png").read_bytes())
    data = build(root)
    files = data.manifest["files"]
    copies = {i for i, name in enumerate(files) if name == "bee/00.png" or "copy" in name}
    assert len(copies) == 21
    having = [name for name in ("train", "val", "test") if copies & set(data.manifest["splits"][name]["ids"])]
    assert len(having) == 1


def test_pictures_of_the_test_split_with_a_duplicate_outside_are_counted():
    pairs = [("alike", "a", "b"), ("alike", "a", "c"), ("alike", "d", "e"), ("copy", "a", "b")]
    count = functools.partial(files.straddling, pairs, dict(zip("abcde", "11234", strict=True)))
    assert count(np.array([1, 0, 0, 0, 0], bool)) == {"alike": 1, "copy": 1}
    assert count(np.array([1, 1, 0, 0, 1], bool)) == {"alike": 3}
    assert count(np.ones(5, bool)) == {}


def test_copies_join_the_groups_that_they_are_in():
    facts = [Facts(1, 1, True, digest, 0) for digest in ("x", "x", "y", "y", "z", "z", "u", "v")]
    groups = files.with_copies(["a", "b", "b", "c", "", "", "d", ""], facts)
    assert len({*groups[:4]}) == 1
    assert groups[4] == groups[5] == "z"
    assert groups[6:] == ["d", ""]
    assert len({groups[0], "z", "d", ""}) == 4


def test_groups_are_not_divided(root):
    data = build(root, data__group=r"(\d)\d\.png")  # pictures 00 to 09 of all classes, 10 to 19, ...
    files, where = data.manifest["files"], {}
    for name in ("train", "val", "test"):
        for i in data.manifest["splits"][name]["ids"]:
            assert where.setdefault(files[i].split("/")[1][0], name) == name


def test_splits_of_the_folder_are_kept_and_balanced_protocols_refuse_them(root):
    for split, numbers in {"train": range(2, 5), "val": [1], "test": [0]}.items():
        for number, name in enumerate(COUNTS):
            for i in numbers:
                picture(root.parent / "split" / split / name / f"{i}.png", 10 * number + i)
    assert counts_of(build(root.parent / "split", data__val_fraction=0.0)) == {
        "train": [3, 3, 3], "meta": [3, 3, 3], "val": [1, 1, 1], "test": [1, 1, 1]
    }  # fmt: skip
    with pytest.raises(UserError, match=r"data\.protocol = 'full': draws from all images alike"):
        build(root.parent / "split", data__protocol="full", data__imbalance_factor=1.0)


def test_a_meta_set_of_ones_own_is_as_large_as_its_smallest_class_allows(root):
    for number, (name, count) in enumerate(COUNTS.items()):
        for i in range(count):
            picture(root.parent / "split" / ("meta" if i <= number else "train") / name / f"{i}.png", 50 * number + i)
    data = build(root.parent / "split")
    assert counts_of(data)["meta"] == [1, 2, 3]
    chex.assert_shape(data.meta_table(0), (3, 1))
    learning, without = (config_lib.resolve(config(root.parent / "split", method__name=n)) for n in ("mfm", "ce"))
    with pytest.raises(UserError, match=r"meta\.batch_size = 6: there are 3 images in the meta set; choose at most 3"):
        preflight.check(learning, data, None)
    preflight.check(without, data, None)  # which reads no meta set


def test_nothing_to_show_is_refused_before_training(root):
    for path in root.glob("*/*.png"):  # of two pictures one is for training, and one for testing
        if path.stem not in ("00", "01"):
            path.unlink()
    with pytest.raises(UserError, match=r"eval\.test = False, as in tuning: there is no validation split"):
        build(root, eval__test=False, train__batch_size=3, meta__batch_size=3)


def test_balanced_protocols_refuse_copies(root):
    (root / "bee" / "copy.png").write_bytes((root / "bee" / "00.png").read_bytes())
    with pytest.raises(UserError, match=r"copies of one picture .* remove the copies"):
        build(root, data__protocol="full", data__imbalance_factor=1.0)


def test_a_balanced_folder_can_be_made_long_tailed_as_the_benchmarks_are(root):
    small = {"train__batch_size": 4, "meta__images_per_class": 2}
    data = build(root, data__protocol="meta_held_out", data__imbalance_factor=2.0, **small)
    # Left for training and meta: 32, 10, 4; less two meta images the smallest has 2, and int(2 / 2 ** (1 / 2)) = 1.
    assert counts_of(data)["train"] == [2, 1, 1]
    assert counts_of(data)["meta"] == [2, 2, 2]


# --- what is wrong with it ------------------------------------------------------------------------


def test_a_broken_picture_ends_the_run_or_is_left_out_but_never_in_silence(root, capsys):
    broken = root / "ant" / "03.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(UserError, match=r"(?s)1 problem; .*on_bad_image = 'skip'.*ant/03\.png: "):
        build(root)
    data = build(root, data__on_bad_image="skip")
    assert sum(sum(counts) for name, counts in counts_of(data).items() if name != "meta") == sum(COUNTS.values()) - 1
    assert "ant/03.png" not in data.manifest["files"]
    assert [line.split(":")[0] for line in data.manifest["left_out"]] == ["ant/03.png"]
    assert "ant/03.png" in capsys.readouterr().err


def test_a_picture_in_two_classes_and_what_is_passed_over_are_told(root, capsys):
    shutil.copy(root / "ant" / "03.png", root / "bee" / "ant.png")
    (root / "bee" / "@eaDir").mkdir()
    data = build(root)
    assert {"ant/03.png", "bee/ant.png"} <= set(data.manifest["files"])
    assert data.manifest["left_out"] == []
    told = capsys.readouterr().err.splitlines()
    assert "passed over: 1 thumbnails" in told
    start = told.index("warning: one picture in two classes:")
    assert told[start + 1] == "  bee/ant.png: equal to ant/03.png in class 'ant'; one of the two labels is wrong"


def test_a_set_that_lies_in_itself_once_more_is_refused(root):
    shutil.copytree(root, root / "insects")
    refused = r"(?s)1 problem; repair or remove what is named\n  insects: a class of copies: .* 'ant', 'bee', 'cricket'"
    for way in ("error", "skip"):
        with pytest.raises(UserError, match=refused if way == "error" else "no picture of class 'insects' can be used"):
            build(root, data__on_bad_image=way)


def test_a_class_that_is_only_tested_cannot_be_left_out(root):
    for name in ("ant", "bee"):
        (root / "train" / name).parent.mkdir(exist_ok=True)
        (root / name).rename(root / "train" / name)
    (root / "cricket").rename(root / "train" / "cricket")
    (root / "test").mkdir()
    shutil.copytree(root / "train" / "ant", root / "test" / "wasp")
    with pytest.raises(UserError, match=r"(?s)2 problems; repair or remove what is named\n  wasp: a class without"):
        build(root)


def test_a_class_that_loses_all_its_pictures_ends_the_run(root):
    for path in (root / "cricket").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no picture of class 'cricket' can be used"):
        build(root, data__on_bad_image="skip")


def test_pictures_of_several_sizes_want_an_image_size(root):
    with pytest.raises(UserError, match=r"data\.image_size = 0: pictures have sides of 7 to 9 pixels"):
        build(root, data__image_size=0)


def test_pictures_without_colour_have_one_channel(root):
    for name in COUNTS:
        for path in (root / name).iterdir():
            Image.open(path).convert("L").convert("RGB").save(path)
    chex.assert_shape(build(root).train_images, (41, 8, 8, 1))
    chex.assert_shape(build(root, data__channels=3).train_images, (41, 8, 8, 3))


def test_the_lists_of_the_long_tail_benchmarks(tmp_path):
    """`path label` lines, as Places-LT publishes them; the classes are called as their folders."""
    lines = {split: [] for split in ("train", "val", "test")}
    for split, count in (("train", 4), ("val", 1), ("test", 1)):
        for label, name in enumerate(("airfield", "attic")):
            for i in range(count):
                path = f"data_256/a/{name}/{split}_{i}.jpg"
                picture(tmp_path / path, 10 * label + i)
                lines[split].append(f"{path} {label}")
    for split, content in lines.items():
        (tmp_path / f"Places_LT_{split}.txt").write_text("\n".join(content) + "\n")
    fields = {f"data__{split}_list": f"Places_LT_{split}.txt" for split in lines}
    fields |= {"data__source": "list", "meta__images_per_class": 2, "meta__batch_size": 4}
    data = build(tmp_path, **fields)
    assert data.class_names == ("airfield", "attic")
    assert counts_of(data) == {"train": [4, 4], "meta": [2, 2], "val": [1, 1], "test": [1, 1]}
    assert len(build(tmp_path, **fields, data__val_fraction=0.0, eval__test=False).val_labels) == 2
    (tmp_path / "data_256/a/attic/train_2.jpg").unlink()
    with pytest.raises(UserError, match=r"Places_LT_train\.txt:7: "):
        build(tmp_path, **fields)


def test_shot_groups_of_a_list_as_long_tailed_as_places_lt(tmp_path):
    """A tree with the published list's sums: 365 classes, 62,500 pictures, 4980 to 5, 131 many-shot, 163, 71 few-shot.

    Hard links of one file stand for the pictures; none is opened.
    """
    counts = places_counts()
    assert (sum(counts), max(counts), min(counts)) == (62_500, 4980, 5)
    picture(tmp_path / "one.png", 0)
    lines = []
    for label, count in enumerate(counts):
        (tmp_path / f"c{label}").mkdir()
        for i in range(count):
            os.link(tmp_path / "one.png", tmp_path / f"c{label}" / f"{i}.jpg")
            lines.append(f"c{label}/{i}.jpg {label}")
    (tmp_path / "train.txt").write_text("\n".join(lines))
    found = listing.lists(tmp_path, {"train": tmp_path / "train.txt"})
    assert np.bincount(found.labels).tolist() == counts
    groups = longtail.shot_groups(np.bincount(found.labels))
    assert [len(groups[name]) for name in ("many", "medium", "few")] == [131, 163, 71]
    assert not found.problems


def places_counts() -> list[int]:
    """Returns class counts with the sums and the shot groups that are published of Places-LT's training list."""
    few, medium = [5 + i % 15 for i in range(71)], [20 + i % 81 for i in range(163)]
    many = [4980] + [101] * 130
    left = 62_500 - sum(few) - sum(medium) - sum(many)
    weights = np.exp(-np.arange(130) / 25)
    extra = np.floor(left * weights / weights.sum()).astype(int)
    extra[-1] += left - extra.sum()
    return [many[0], *(np.array(many[1:]) + extra).tolist(), *medium, *few]


# --- streaming ------------------------------------------------------------------------------------


def test_streamed_pictures_are_those_that_would_be_resident(root):
    resident, streamed = build(root), build(root, data__resident_mb=0)
    assert isinstance(streamed.train_images, streaming.Files)
    for name in ("train", "val", "test"):
        images, files = (getattr(data, f"{name}_images") for data in (resident, streamed))
        assert files.shape == images.shape
        chex.assert_trees_all_equal(np.stack([files[i] for i in range(len(files))]), images)
    assert resident.manifest == streamed.manifest


def feed(root: Path, first: int, **overrides):
    """Returns what a feed gives from step `first` of epoch 1 on: images and labels, and those of the meta batch."""
    resolved = config_lib.resolve(config(root, data__resident_mb=0, **overrides))
    data = data_lib.build(resolved)
    experiment = experiment_lib.build(resolved, data)
    source, found = feed_lib.make(data, experiment, resolved, inputs.to_device(data)), []
    assert (source.steps_per_call, source.is_shared) == (1, False)
    begin, end = experiment.steps_per_epoch, 2 * experiment.steps_per_epoch
    source.start_epoch(1, begin + first, state())
    for step in range(begin + first, end):
        given = source.next()
        assert isinstance(given, inputs.StepBatches)
        assert given is source.data
        is_meta = loop_lib.kind_of(experiment, resolved, step) == "meta"
        meta = inputs.meta(given, jax.random.key(7), 0, 6) if is_meta else ()
        found.append(jax.tree.map(np.asarray, (*inputs.training(given, 0), *meta)))
    source.close()
    return found


def state() -> BilevelState:
    """Returns a state of which the key alone counts."""
    return BilevelState(jnp.int32(0), jax.random.key(7), {}, {}, (), {}, ())


def test_signals_are_left_to_the_program_and_a_lost_worker_is_told_in_one_line(root):
    """Ctrl-C and some schedulers' SIGTERM reach every process; the program saves, and needs its workers until then."""
    order = [np.array([i % 40]) for i in range(100)]
    files = build(root, data__resident_mb=0).train_images
    with contextlib.closing(streaming.stream([streaming.Picks(files, order)], workers=1)) as steps:
        next(steps)
        (worker,) = multiprocessing.active_children()
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)
        assert len([next(steps) for _ in range(50)]) == 50
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"data\.workers = 1: a process that decodes was ended"):
            list(steps)


@pytest.mark.parametrize(("crop", "workers"), [("shift", 0), ("resized", 0), ("resized", 2)])
def test_the_rest_of_an_epoch_is_the_same_after_a_stop(root, crop, workers):
    options = {"augment__crop": crop, "data__workers": workers}
    whole, rest = feed(root, 0, **options), feed(root, 3, **options)
    assert len(whole) == 5
    chex.assert_trees_all_equal(whole[3:], rest)
    assert not np.array_equal(whole[0][0], whole[1][0])


def test_a_streamed_epoch_has_the_batches_of_a_resident_one(root):
    resolved = config_lib.resolve(config(root))
    data = data_lib.build(resolved)
    experiment = experiment_lib.build(resolved, data)
    resident = feed_lib.make(data, experiment, resolved, inputs.to_device(data))
    begin = experiment.steps_per_epoch
    resident.start_epoch(1, begin, state())
    given = resident.next()
    assert isinstance(given, inputs.ResidentSet)
    streamed = feed(root, 0)
    chex.assert_trees_all_equal(streamed[0][:2], inputs.training(given, begin))
    assert [len(step) for step in streamed] == [2, 4, 2, 4, 2]
    for step, (image, label, *meta) in enumerate(streamed, begin):
        chex.assert_trees_all_equal((image, label), inputs.training(given, step))
        if meta:
            chex.assert_trees_all_equal(tuple(meta), inputs.meta(given, state().key, step, 6))


@pytest.mark.slow
def test_a_streamed_run_is_the_resident_run(tmp_path, monkeypatch):
    """On the digits, whose pixels are in memory either way; the first epoch agrees to rounding."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    given = config_lib.default()
    given.data.update(source="digits", imbalance_factor=10.0)
    given.augment.update(pad=1, flip=False)
    given.model.update(name="resnet8", width=4)
    given.meta.update(batch_size=20, every=2)
    given.train.update(epochs=1, batch_size=64)
    losses = []
    for megabytes in (4096, 0):
        given.data.resident_mb = megabytes
        train.train_and_evaluate(given, tmp_path / str(megabytes))
        first = (tmp_path / str(megabytes) / "metrics.jsonl").read_text().splitlines()[0]
        losses.append({name: value for name, value in json.loads(first).items() if name in ("loss", "meta_loss")})
    chex.assert_trees_all_close(losses[0], losses[1], rtol=1e-4)


@pytest.mark.usefixtures("quick_runs")
def test_a_streamed_run_that_was_stopped_ends_as_if_nothing_had_happened(root, tmp_path, monkeypatch):
    """SIGTERM in the middle of the second epoch."""
    options = {"data__resident_mb": 0, "augment__crop": "resized", "augment__color_jitter": 0.4}
    options |= {"meta__start_epoch": 1, "meta__every": 2}
    with stopped_at(7) as programs, pytest.raises(interruption.Interrupted, match="saved at step 7"):
        train.train_and_evaluate(config(root, **options), tmp_path / "stopped")
    assert programs[0]._cache_size() == 2  # the plain step before, between and after meta-steps is one
    stopped, whole = (
        train.train_and_evaluate(config(root, **options), tmp_path / name) for name in ("stopped", "whole")
    )
    assert stopped["last"] == whole["last"]
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("stopped", "whole")]
    assert rows[0] == rows[1]
    assert 0 < whole["input_wait"] < 1
    assert (tmp_path / "whole" / "gallery.npz").exists()
    assert "The rarest classes: right and wrong answers" in (tmp_path / "whole" / "report.html").read_text()
