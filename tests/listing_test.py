"""Folders of pictures become a listing: what is named, with which class, in which split."""

import os

import numpy as np
import pytest
from helpers import listed, tree, written

from mfm_jax.config import Data
from mfm_jax.data import listing
from mfm_jax.data.listing import Problem
from mfm_jax.errors import UserError

# Folders


def test_a_folder_a_class(tmp_path):
    root = tree(tmp_path, "dog/b.JPG", "dog/a.png", "cat/deep/er/c", "cat/z.webp")
    found = listing.folder(root)
    assert listed(found) == [
        ("cat/deep/er/c", "cat", "train"),
        ("cat/z.webp", "cat", "train"),
        ("dog/a.png", "dog", "train"),
        ("dog/b.JPG", "dog", "train"),
    ]
    assert found.labels.dtype == np.int32
    assert (found.root, found.class_names) == (root, ("cat", "dog"))
    assert (found.groups, found.problems) == (("",) * 4, ())


def test_folders_that_are_all_splits_hold_the_classes(tmp_path):
    root = tree(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "Valid/dog/3.jpg", "test/emu/4.jpg", "meta/cat/5.jpg")
    found = listing.folder(root)
    assert listed(found) == [
        ("Valid/dog/3.jpg", "dog", "val"),
        ("meta/cat/5.jpg", "cat", "meta"),
        ("test/emu/4.jpg", "emu", "test"),
        ("train/cat/1.jpg", "cat", "train"),
        ("train/dog/2.jpg", "dog", "train"),
    ]
    assert found.problems == (Problem("emu", "a class without a training picture"),)


SPLITS = {
    "Training Testing": "train test",
    "train dev": "train val",
    "TRAIN TEST valid": "train test val",
    "train_set test-set": "train test",
    "TrainingSet Testset": "train test",
    "seg_train seg_test": "train test",
    "images.train images.val": "train val",
    "train_images test_images": "train test",
    "training validation evaluation": "train val test",  # as Food-11 comes
    "train eval": "train test",
    "train eval test": "train val test",
    "meta training": "meta train",
}


@pytest.mark.parametrize("names", SPLITS)
def test_folders_that_are_named_as_splits(tmp_path, names):
    splits = dict(zip(names.split(), SPLITS[names].split(), strict=True))
    found = listing.folder(tree(tmp_path, *(f"{name}/{c}/1.jpg" for name in splits for c in "abcd")))
    assert found.class_names == ("a", "b", "c", "d")
    assert listed(found) == sorted((f"{name}/{c}/1.jpg", c, split) for name, split in splits.items() for c in "abcd")
    assert found.problems == ()


NO_SPLITS = {  # files, and what is the same in the first two folders
    "folds": (["fold1/a/1", "fold1/b/1", "fold2/a/1", "fold2/b/1"], "'a' and 'b'"),
    "years": (["2019/a/1", "2019/b/1", "2019/c/1", "2020/b/1", "2020/c/1"], "'b' and 'c'"),
    "masks": (["cat/images/1", "cat/masks/1", "dog/images/1", "dog/masks/1"], "'images' and 'masks'"),
    "splits in kinds": (["x/test/a/1", "x/train/a/1", "y/test/a/1", "y/train/a/1"], "'test' and 'train'"),
    "kinds in splits": (["train/x/a/1", "train/x/b/1", "train/y/a/1", "train/y/b/1", "test/x/a/1"], "'a' and 'b'"),
    "beside texts": (["s/a/1", "s/b/1", "s/notes.txt", "t/a/1", "t/b/1"], "'a' and 'b'"),
}


@pytest.mark.parametrize("name", NO_SPLITS)
def test_folders_that_may_be_splits_or_classes_are_refused(tmp_path, name):
    files, same = NO_SPLITS[name]
    with pytest.raises(UserError, match=f"hold no picture of their own, but the same folders, such as {same}; if they"):
        listing.folder(tree(tmp_path, *files))


@pytest.mark.parametrize(
    "files",
    [
        ["cat/images/1", "dog/images/1"],  # as Tiny ImageNet comes
        ["cat/a/1", "cat/b/1", "cat/0.jpg", "dog/a/1", "dog/b/1", "dog/0.jpg"],
        ["cat/2019/1", "cat/2020/1", "cat/2021/1", "cat/2022/1", "dog/2020/1", "dog/2021/1"],
        ["cat/a/1", "cat/b/1", "dog/b/1", "dog/c/1"],
    ],
)
def test_folders_in_classes_are_no_splits(tmp_path, files):
    found = listing.folder(tree(tmp_path, *files))
    assert (found.class_names, len(found.paths)) == (("cat", "dog"), len(files))


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def test_canonically_equal_names_are_one_class(tmp_path):
    beside = listing.folder(tree(tmp_path / "a", f"{COMPOSED}/1.jpg", f"{DECOMPOSED}/2.jpg", "bar/3.jpg"))
    assert (beside.class_names, beside.labels.tolist()) == (("bar", COMPOSED), [0, 1, 1])
    names = (f"train/{COMPOSED}/1.jpg", f"test/{DECOMPOSED}/2.jpg", "train/\u1100\u1161/3.jpg", "test/\uac00/4.jpg")
    given = listing.folder(tree(tmp_path / "b", *names))
    assert given.class_names == (COMPOSED, "\uac00")
    assert sorted(zip(given.labels.tolist(), given.splits.tolist(), strict=True)) == [
        *((0, "test"), (0, "train"), (1, "test"), (1, "train"))
    ]
    assert (beside.problems, given.problems) == ((), ())


def test_class_names_that_look_the_same_are_a_problem(tmp_path, pets):
    found = listing.folder(tree(tmp_path / "a", "cat/1.jpg", "cat /2.jpg", "Dog/1.jpg", "dog\u200b/2.jpg", "emu/1.jpg"))
    assert found.class_names == ("Dog", "cat", "cat ", "dog\u200b", "emu")
    assert found.problems == (
        Problem("cat ", "a class that looks like 'cat', itself 'cat '; rename or merge them"),
        Problem("dog\u200b", "a class that looks like 'Dog', itself 'dog\\u200b'; rename or merge them"),
    )
    listed = listing.lists(pets, written(pets, "cat/a.jpg Ant\ncat/b.jpg ant\ndog/a.jpg bee"))
    assert [problem.path for problem in listed.problems] == ["ant"]


def test_what_systems_leave_behind_is_passed_over_and_counted(tmp_path):
    junk = [
        *("@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "cat/@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "cat/ehthumbs.db"),
        *("#recycle/cat/1.jpg", "$RECYCLE.BIN/S-1-5/1.jpg", ".Trash-1000/files/1.jpg", "cat/.nfs0000", "cat/Icon\r"),
        *("System Volume Information/x", "lost+found/x", "__MACOSX/cat/._a.jpg", "dog/.ipynb_checkpoints/a.jpg"),
    ]
    found = listing.folder(tree(tmp_path, "cat/a.jpg", "dog/b.jpg", *junk))
    assert (found.paths, found.class_names, found.problems) == (("cat/a.jpg", "dog/b.jpg"), ("cat", "dog"), ())
    assert found.passed == {"hidden": 3, "recycled": 2, "system": 4, "thumbnails": 3}
    (tmp_path / "all").mkdir()
    for name in ("cat", "dog", "@eaDir"):
        (tmp_path / name).rename(tmp_path / "all" / name)
    (tmp_path / "all").rename(tmp_path / "train")
    assert listing.folder(tmp_path).passed == found.passed


def test_classes_that_a_split_lacks_are_told(tmp_path):
    names = (
        [f"train/{c}/1.jpg" for c in "abcdef"] + ["test/b/2.jpg", "test/c/2.jpg"] + [f"val/{c}/3.jpg" for c in "abcdf"]
    )
    found = listing.folder(tree(tmp_path, *names))
    assert found.lacking() == ["val has no picture of 'e'", "test has no picture of 'a', 'd', 'e' and 1 more"]
    assert found.problems == ()
    assert found.without({"val/a/3.jpg", "test/b/2.jpg", "test/c/2.jpg"}).lacking() == [
        "val has no picture of 'a', 'e'"
    ]


def test_what_lies_beside_splits_is_told(tmp_path):
    root = tree(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "stray.jpg", "README.txt")
    (root / "test").symlink_to(tmp_path / "gone")
    found = listing.folder(root)
    assert {problem.path: problem.reason for problem in found.problems}.keys() == {"README.txt", "stray.jpg", "test"}
    assert Problem("stray.jpg", "lies in no class folder") in found.problems


def test_a_class_may_be_called_as_a_split(tmp_path):
    found = listing.folder(tree(tmp_path, "bus/1.jpg", "train/2.jpg", "test/3.jpg"))
    assert found.class_names == ("bus", "test", "train")


def test_what_a_folder_does_not_tell_is_refused(tmp_path, pets):
    with pytest.raises(UserError, match=r"data\.root = .*: no such folder"):
        listing.folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"data\.root = .*: not a folder"):
        listing.folder(pets / "cat/a.jpg")
    with pytest.raises(UserError, match=r"only one class, 'pets'; is '.*/pets' meant\?"):
        listing.folder(pets.parent)
    with pytest.raises(UserError, match="no picture in a class folder"):
        listing.folder(pets / "cat")
    with pytest.raises(UserError, match=r"only one class, 'cat'; not usable: 2, the first dog/1.txt: not a picture"):
        listing.folder(tree(tmp_path / "d", "cat/1.jpg", "dog/1.txt"))
    with pytest.raises(UserError, match=r"data\.root = '~no-such-user/x': no such folder"):
        listing.folder("~no-such-user/x")
    root = tree(tmp_path / "a", "train/cat/1.jpg", "train/dog/1.jpg", "test/cat/2.jpg", "old/cat/3.jpg")
    message = r"'test' holds folders, as a split does, but 'old' beside it is no split \(train,"
    with pytest.raises(UserError, match=message):
        listing.folder(root)
    with pytest.raises(UserError, match="'train' holds folders, as a split does, but 'tests' beside it"):
        listing.folder(tree(tmp_path / "c", "train/cat/1.jpg", "train/dog/1.jpg", "tests/cat/2.jpg"))
    with pytest.raises(UserError, match="'Val' and 'valid_set' are both the split val; merge them, or move one away"):
        listing.folder(
            tree(tmp_path / "e", "train/cat/1.jpg", "train/dog/1.jpg", "Val/cat/2.jpg", "valid_set/cat/3.jpg")
        )
    with pytest.raises(UserError, match="holds the splits test, val but no folder 'train'"):
        listing.folder(tree(tmp_path / "b", "test/cat/1.jpg", "val/cat/1.jpg"))


def test_without_leaves_out_pictures_and_keeps_the_classes(pets):
    found = listing.folder(pets).without({"cat/a.jpg", "cat/b.jpg", "unknown"})
    assert listed(found) == [("dog/a.jpg", "dog", "train"), ("dog/b.jpg", "dog", "train")]
    assert found.class_names == ("cat", "dog")
    assert listing.folder(pets).without(found.paths).without(["cat/a.jpg", "cat/b.jpg"]).paths == ()


# Groups


def test_groups_come_from_the_path(pets):
    assert listing.folder(pets, r"/(\w)\.").groups == ("a", "b", "a", "b")
    assert listing.folder(pets, r"c..").groups == ("cat", "cat", "", "")
    assert listing.folder(pets, r"(a)?\.jpg").groups == ("a", "", "a", "")


def test_a_group_has_one_name_in_either_form(tmp_path):
    root = tree(tmp_path, *(f"{name}/{who}.jpg" for name in ("cat", "dog") for who in ("Ren\xe9", "Rene\u0301 ")))
    assert set(listing.folder(root, "Ren[\xe9]").groups) == {"Ren\xe9"}


def test_a_group_that_is_no_pattern_or_matches_nothing_is_refused(pets):
    with pytest.raises(UserError, match=r"data\.group = '\(': not a regular expression"):
        listing.folder(pets, "(")
    with pytest.raises(UserError, match=r"data\.group = 'bird': matches none of the paths; the first is 'cat/a.jpg'"):
        listing.folder(pets, "bird")


def test_a_column_of_groups_comes_before_the_pattern(pets):
    file = written(pets, "label,group,path\n0,7,cat/a.jpg\n0,,cat/b.jpg\n1,7,dog/a.jpg\n", "train.csv")
    assert listing.lists(pets, file, r"/(\w)\.").groups == ("7", "b", "7")


# From a config


def test_load_takes_what_the_config_names(pets):
    file = str(written(pets, "cat/a.jpg 0\ndog/a.jpg 1")["train"])
    assert len(listing.read(Data(source="folder", root=str(pets))).paths) == 4
    assert len(listing.read(Data(source="list", root=str(pets), train_list=file)).paths) == 2
    with pytest.raises(UserError, match=r"data\.root: missing"):
        listing.read(Data(source="folder"))
    with pytest.raises(UserError, match=r"data\.train_list: missing"):
        listing.read(Data(source="list", root=str(pets)))


def test_names_that_are_not_utf_8_are_kept_as_they_are(tmp_path):
    root = tree(tmp_path, "cat/a.jpg", "dog/a.jpg")
    os.close(os.open(os.fsencode(root) + b"/cat/\xff.jpg", os.O_CREAT))
    assert [os.fsencode(path) for path in listing.folder(root).paths] == [b"cat/a.jpg", b"cat/\xff.jpg", b"dog/a.jpg"]
    found = listing.lists(root, written(root, b"cat/\xff.jpg 0\ndog/a.jpg 1"))
    assert [os.fsencode(path) for path in found.paths] == [b"cat/\xff.jpg", b"dog/a.jpg"]
    os.rename(root / "dog", os.fsencode(root) + b"/\xe9t\xe9")
    with pytest.raises(UserError, match=r"the name of class '\\udce9t\\udce9' is not UTF-8; rename its folder"):
        listing.folder(root)  # a class's name is drawn and printed
