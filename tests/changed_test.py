"""Files that change, between two runs or while they are read: what is decoded and trained on is what they hold."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import overridden
from PIL import Image

from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax.data import checking, files, kept, listing, tfds
from mfm_jax.errors import UserError
from mfm_jax.workdir.files import Workdir

LONG_AGO = 10**18  # ns, a whole second


def even(path: Path, value: int) -> None:
    """Writes a BMP of one grey: all have one size and one time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(path)
    os.utime(path, ns=(LONG_AGO, LONG_AGO))


def filled(root: Path, first: int) -> Path:
    """Writes 12 pictures in two classes, of the greys from `first` on."""
    for i in range(12):
        even(root / "ab"[i % 2] / f"{i:02}.bmp", first + i)
    return root


@pytest.fixture
def root(tmp_path, own_cache) -> Path:
    """A folder of pictures, and a cache of the test's own."""
    return filled(tmp_path / "set", 10)


def config(root: Path, **overrides) -> config_lib.Config:
    result = config_lib.default()
    result.data.update(source="folder", root=str(root), protocol="natural", imbalance_factor=1.0, workers=0)
    result.train.batch_size = 2
    return config_lib.resolve(overridden(result, **overrides))


def build(root: Path, **overrides) -> data_lib.LongTailData:
    return data_lib.build(config(root, **overrides))


def greys(data: data_lib.LongTailData) -> dict[str, int]:
    """Returns the first pixel of every picture by its path, and checks its label."""
    result = {}
    for name, split in data.manifest["splits"].items():
        if name == "meta":  # redrawn from the training set
            continue
        images, labels = getattr(data, f"{name}_images"), getattr(data, f"{name}_labels")
        for place, i in enumerate(split["ids"]):
            path = data.manifest["files"][i]
            assert data.class_names[labels[place]] == path[0]
            result[path] = int(images[place].flat[0])
    return result


def there(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): Image.open(path).getpixel((0, 0)) for path in root.rglob("*.bmp")}


def swap(one: Path, other: Path) -> None:
    away = one.with_name("away")
    one.rename(away)
    other.rename(one)
    away.rename(other)


def swapped(root: Path) -> None:
    swap(root / "a/00.bmp", root / "b/01.bmp")


def rewritten(root: Path) -> None:
    filled(root, 100)


def another_folder(root: Path) -> None:
    shutil.rmtree(root)
    filled(root, 100)


def another_folder_by_name(root: Path) -> None:
    swap(root, filled(root.with_name("corrected"), 100))


def linked(root: Path) -> None:
    other = filled(root.with_name("elsewhere"), 100)
    for path in root.rglob("*.bmp"):
        path.unlink()
        path.symlink_to(other / path.relative_to(root))


@pytest.mark.parametrize("change", [swapped, rewritten, another_folder, another_folder_by_name, linked])
def test_other_pixels_of_the_same_names_sizes_and_times_are_seen(root, change, tmp_path):
    run, before = Workdir(tmp_path / "run"), build(root)
    assert greys(before) == there(root)
    run.path.mkdir()
    run.begin(config(root), before.manifest, {})
    run.check_split(build(root).manifest)
    change(root)
    after = build(root)
    assert greys(after) == there(root)
    assert after.version != before.version
    with pytest.raises(UserError, match=r"manifest\.json: the data or its split is not what this run began with"):
        run.check_split(after.manifest)


def test_a_copy_of_the_data_is_the_same_data(root, tmp_path, monkeypatch):
    """Elsewhere, with other times and inodes, of other owners, and with copies in the place of links."""
    os.link(root / "a/00.bmp", root / "a/linked.bmp")
    (root / "b/linked.bmp").symlink_to(root / "b/01.bmp")
    run, before = Workdir(tmp_path / "run"), build(root)
    run.path.mkdir()
    run.begin(config(root), before.manifest, {})
    copy = Path(shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile))
    shutil.rmtree(root)
    run.check_split(build(copy).manifest)
    monkeypatch.setenv("MFM_JAX_CACHE", str(tmp_path / "cache of another machine"))
    run.check_split(build(copy).manifest)


@pytest.mark.parametrize("resident_mb", [4096, 0])
def test_what_changes_between_the_check_and_the_decoding_is_not_kept(root, monkeypatch, resident_mb):
    """Not in memory, not in the cache, and not in a stream."""
    check = checking.check

    def then_changed(found: listing.Listing, workers: int) -> checking.Checked:
        checked = check(found, workers)
        swapped(root)
        return checked

    monkeypatch.setattr(files.checking, "check", then_changed)
    changed = r"b/01\.bmp|a/00\.bmp: has another content than before; it has changed since it was checked"
    with pytest.raises(UserError, match=changed):
        greys(build(root, data__resident_mb=resident_mb, data__normalize="half"))
    monkeypatch.undo()
    assert greys(build(root)) == there(root)


def test_a_streamed_picture_that_changes_in_the_middle_of_a_run_ends_it(root):
    data = build(root, data__resident_mb=0)
    path = root / data.manifest["files"][data.manifest["splits"]["train"]["ids"][0]]
    first = data.train_images[0]
    even(path, 250)
    with pytest.raises(UserError, match="has another content than before"):
        data.train_images[0]
    even(path, int(first.flat[0]))  # it is back
    assert (data.train_images[0] == first).all()


def test_records_of_tfds_that_are_replaced_have_another_name_in_the_cache(tmp_path):
    def save(content: bytes) -> None:
        (tmp_path / "new").write_bytes(content)
        (tmp_path / "new").replace(tmp_path / "set.array_record")
        os.utime(tmp_path / "set.array_record", ns=(LONG_AGO, LONG_AGO))

    save(b"one")
    before = tfds.fingerprint(tmp_path)
    assert tfds.fingerprint(tmp_path) == before
    save(b"two")
    assert tfds.fingerprint(tmp_path) != before


def test_a_file_of_arrays_that_is_replaced_while_it_is_read_is_not_kept(tmp_path, monkeypatch, own_cache):
    def save(value: int) -> None:
        labels = np.arange(8) % 2
        pixels = np.full((8, 4, 4), value, np.uint8)
        np.savez(tmp_path / "a.npz", train_images=pixels, train_labels=labels, test_images=pixels, test_labels=labels)

    save(1)
    cached = kept.cached
    monkeypatch.setattr("mfm_jax.data.arrays.cached", lambda name, build: (save(2), cached(name, build))[1])
    with pytest.raises(UserError, match=r"a\.npz': was written to while it was read; start again"):
        build(tmp_path / "a.npz", data__source="npz", data__image_size=2)
    monkeypatch.setattr("mfm_jax.data.arrays.cached", cached)
    assert (build(tmp_path / "a.npz", data__source="npz", data__image_size=2).test_images == 2).all()
