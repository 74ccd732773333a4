"""Folders and lists of pictures become the same listing: what is named, with which class, in which split."""

import os
from pathlib import Path

import numpy as np
import pytest

from mfm_jax.config import Data
from mfm_jax.data import listing
from mfm_jax.data.listing import Problem
from mfm_jax.errors import UserError


def tree(root: Path, *files: str) -> Path:
    """Makes empty files; nothing here opens them."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def rows(found: listing.Listing) -> list[tuple[str, str, str]]:
    return [
        (path, found.class_names[label], str(split))
        for path, label, split in zip(found.paths, found.labels, found.splits, strict=True)
    ]


def written(root: Path, text: str | bytes, name: str = "train.txt") -> dict[str, Path]:
    (root / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return {"train": root / name}


@pytest.fixture
def pets(tmp_path) -> Path:
    return tree(tmp_path / "pets", "cat/a.jpg", "cat/b.jpg", "dog/a.jpg", "dog/b.jpg")


# Folders


def test_a_folder_a_class(tmp_path):
    root = tree(tmp_path, "dog/b.JPG", "dog/a.png", "cat/deep/er/c", "cat/z.webp")
    found = listing.folder(root)
    assert rows(found) == [
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
    assert rows(found) == [
        ("Valid/dog/3.jpg", "dog", "val"),
        ("meta/cat/5.jpg", "cat", "meta"),
        ("test/emu/4.jpg", "emu", "test"),
        ("train/cat/1.jpg", "cat", "train"),
        ("train/dog/2.jpg", "dog", "train"),
    ]
    assert found.problems == (Problem("emu", "a class without a training picture"),)


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
    with pytest.raises(UserError, match=r"only one class, 'cat'; not usable: 2, the first dog/1.heic: not a picture"):
        listing.folder(tree(tmp_path / "d", "cat/1.jpg", "dog/1.heic"))
    with pytest.raises(UserError, match=r"data\.root = '~no-such-user/x': no such folder"):
        listing.folder("~no-such-user/x")
    root = tree(tmp_path / "a", "train/cat/1.jpg", "train/dog/1.jpg", "test/cat/2.jpg", "old/cat/3.jpg")
    with pytest.raises(
        UserError, match=r"'test' holds folders, as a split does, but 'old' beside it is no split \(train,"
    ):
        listing.folder(root)
    with pytest.raises(UserError, match="'train' holds folders, as a split does, but 'tests' beside it"):
        listing.folder(tree(tmp_path / "c", "train/cat/1.jpg", "train/dog/1.jpg", "tests/cat/2.jpg"))
    with pytest.raises(UserError, match="holds the splits test, val but no folder 'train'"):
        listing.folder(tree(tmp_path / "b", "test/cat/1.jpg", "val/cat/1.jpg"))


def test_without_leaves_out_pictures_and_keeps_the_classes(pets):
    found = listing.folder(pets).without({"cat/a.jpg", "cat/b.jpg", "unknown"})
    assert rows(found) == [("dog/a.jpg", "dog", "train"), ("dog/b.jpg", "dog", "train")]
    assert found.class_names == ("cat", "dog")
    assert listing.folder(pets).without(found.paths).without(["cat/a.jpg", "cat/b.jpg"]).paths == ()


# Groups


def test_groups_come_from_the_path(pets):
    assert listing.folder(pets, r"/(\w)\.").groups == ("a", "b", "a", "b")
    assert listing.folder(pets, r"c..").groups == ("cat", "cat", "", "")
    assert listing.folder(pets, r"(a)?\.jpg").groups == ("a", "", "a", "")


def test_a_group_that_is_no_pattern_or_matches_nothing_is_refused(pets):
    with pytest.raises(UserError, match=r"data\.group = '\(': not a regular expression"):
        listing.folder(pets, "(")
    with pytest.raises(UserError, match=r"data\.group = 'bird': matches none of the paths; the first is 'cat/a.jpg'"):
        listing.folder(pets, "bird")


def test_a_column_of_groups_comes_before_the_pattern(pets):
    file = written(pets, "label,group,path\n0,7,cat/a.jpg\n0,,cat/b.jpg\n1,7,dog/a.jpg\n", "train.csv")
    assert listing.lists(pets, file, r"/(\w)\.").groups == ("7", "b", "7")


# Lists


def test_lists_of_numbers_are_called_as_their_folders(pets):
    files = written(pets, "dog/a.jpg 0\ncat/a.jpg 1\n") | {"test": written(pets, "cat/b.jpg 1", "test.txt")["train"]}
    found = listing.lists(pets, files)
    assert found.class_names == ("dog", "cat")
    assert rows(found) == [("cat/a.jpg", "cat", "train"), ("cat/b.jpg", "cat", "test"), ("dog/a.jpg", "dog", "train")]
    assert found.problems == ()


def test_numbers_stay_the_names_where_folders_do_not_tell_them(pets):
    found = listing.lists(pets, written(pets, "dog/a.jpg 0\ncat/a.jpg 1\ncat/b.jpg 0"))
    assert found.class_names == ("0", "1")
    assert found.labels.tolist() == [1, 0, 0]


def test_words_are_names_in_alphabetical_order(pets):
    found = listing.lists(pets, written(pets, "cat/a.jpg zebra\ncat/b.jpg ant\ndog/a.jpg ant\n"))
    assert (found.class_names, found.labels.tolist()) == (("ant", "zebra"), [1, 0, 0])


def test_the_label_is_the_last_word(tmp_path):
    root = tree(tmp_path, "a b/c d.jpg", "e/f.jpg")
    assert listing.lists(root, written(root, "a b/c d.jpg 0\ne/f.jpg\t1")).paths == ("a b/c d.jpg", "e/f.jpg")


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfcat/a.jpg 0\ndog/a.jpg 1\n",
        b"cat/a.jpg 0\r\n\r\n  \r\ndog/a.jpg 1\r\n",
        b"cat/a.jpg 0\rdog/a.jpg 1\r",
        b"# made by hand\n# path label\ncat/a.jpg 0\ndog/a.jpg 1",
        "cat/a.jpg 0\ndog/a.jpg 1\n".encode("utf-16"),
        b"./cat//a.jpg 0\ndog/../dog/a.jpg 1\n",
        b"cat/a.jpg 00\ndog/a.jpg 01\n",
        b'path,label\n"cat/a.jpg",0\ndog/a.jpg,1\n',
        b"\xef\xbb\xbfLabel;Path\r\n0;cat/a.jpg\r\n1;dog/a.jpg\r\n",
        b"path\tlabel\ncat/a.jpg\t0\ndog/a.jpg\t1\n",
    ],
)
def test_lists_as_programs_write_them(pets, text):
    found = listing.lists(pets, written(pets, text))
    assert rows(found) == [("cat/a.jpg", "cat", "train"), ("dog/a.jpg", "dog", "train")]
    assert found.problems == ()


def test_absolute_paths_inside_the_root_are_fine(pets):
    found = listing.lists(pets, written(pets, f"{pets}/cat/a.jpg 0\ndog/a.jpg 1"))
    assert found.paths == ("cat/a.jpg", "dog/a.jpg")


def test_the_root_may_be_reached_by_another_name(pets, tmp_path):
    (tmp_path / "link").symlink_to(pets)
    found = listing.lists(tmp_path / "link", written(pets, f"{pets}/cat/a.jpg 0\n{tmp_path}/link/dog/a.jpg 1"))
    assert found.paths == ("cat/a.jpg", "dog/a.jpg")


def test_a_hash_may_begin_a_path_once_the_list_has_begun(tmp_path):
    root = tree(tmp_path, "a.jpg", "#b.jpg")
    assert listing.lists(root, written(root, "# names\na.jpg 0\n#b.jpg 1")).paths == ("#b.jpg", "a.jpg")


def test_a_picture_in_two_splits_is_kept_from_training(pets):
    files = written(pets, "cat/a.jpg 0\ncat/b.jpg 0\ndog/a.jpg 1\ndog/b.jpg 1")
    files |= {"val": written(pets, "cat/a.jpg 0\ndog/a.jpg 1", "val.txt")["train"]}
    files |= {"test": written(pets, "cat/a.jpg 0", "test.txt")["train"]}
    found = listing.lists(pets, files)
    assert [row[::2] for row in rows(found)] == [
        ("cat/a.jpg", "test"),
        ("cat/b.jpg", "train"),
        ("dog/a.jpg", "val"),
        ("dog/b.jpg", "train"),
    ]
    assert found.problems == (
        Problem("train.txt:1", "cat/a.jpg is listed in train and test: test.txt:1"),
        Problem("train.txt:3", "dog/a.jpg is listed in train and val: val.txt:2"),
        Problem("val.txt:1", "cat/a.jpg is listed in val and test: test.txt:1"),
    )


def test_classes_without_a_training_picture_are_named(pets):
    files = written(pets, "cat/a.jpg 0\ncat/b.jpg 3\ndog/a.jpg 1")
    assert listing.lists(pets, files).problems == (Problem("train.txt", "no training picture of class 2"),)
    files = written(pets, "cat/a.jpg 1\ncat/b.jpg 1\ndog/a.jpg 2")
    told = "no training picture of class 0; classes are counted from 0"
    assert listing.lists(pets, files).problems == (Problem("train.txt", told),)


def test_what_a_list_does_not_tell_is_refused(pets):
    def refusal(text: str | bytes, name: str = "train.txt", group: str = "") -> str:
        with pytest.raises(UserError) as caught:
            listing.lists(pets, written(pets, text, name), group)
        return str(caught.value).replace(f"{pets}/", "").replace(str(pets), "pets")

    assert refusal("") == "data.train_list = 'train.txt': holds no line of the form `path label`"
    assert refusal("# nothing\n\n") == refusal("")
    assert refusal("cat/a.jpg\ndog/a.jpg") == refusal("")
    assert refusal("file,label\ncat/a.jpg,0", "train.csv") == (
        "data.train_list = 'train.csv': its first line is 'file,label'; a CSV file needs the columns path and label"
    )
    assert refusal("kat/a.jpg 0\nhond/a.jpg 1") == (
        "data.root = 'pets': none of the 2 listed pictures is there; train.txt:2: no such file: hond/a.jpg"
    )
    assert refusal("cat/a.jpg 0\ncat/b.jpg 0") == "data.train_list = 'train.txt': names fewer than two classes"
    assert refusal("path,label\n" + "x" * 200_000 + ",0", "train.csv") == (
        "data.train_list = 'train.csv': line 2: field larger than field limit (131072)"
    )
    with pytest.raises(UserError, match=r"data\.val_list = '.*none.txt': No such file or directory"):
        listing.lists(pets, {**written(pets, "cat/a.jpg 0\ndog/a.jpg 1"), "val": pets / "none.txt"})


# From a config


def test_load_takes_what_the_config_names(pets):
    file = str(written(pets, "cat/a.jpg 0\ndog/a.jpg 1")["train"])
    assert len(listing.load(Data(source="folder", root=str(pets))).paths) == 4
    assert len(listing.load(Data(source="list", root=str(pets), train_list=file)).paths) == 2
    with pytest.raises(UserError, match=r"data\.root: missing"):
        listing.load(Data(source="folder"))
    with pytest.raises(UserError, match=r"data\.train_list: missing"):
        listing.load(Data(source="list", root=str(pets)))


def test_names_that_are_not_utf_8_are_kept_as_they_are(tmp_path):
    root = tree(tmp_path, "cat/a.jpg", "dog/a.jpg")
    os.close(os.open(os.fsencode(root) + b"/cat/\xff.jpg", os.O_CREAT))
    assert [os.fsencode(path) for path in listing.folder(root).paths] == [b"cat/a.jpg", b"cat/\xff.jpg", b"dog/a.jpg"]
    found = listing.lists(root, written(root, b"cat/\xff.jpg 0\ndog/a.jpg 1"))
    assert [os.fsencode(path) for path in found.paths] == [b"cat/\xff.jpg", b"dog/a.jpg"]
    os.rename(root / "dog", os.fsencode(root) + b"/\xe9t\xe9")
    with pytest.raises(UserError, match=r"the name of class '\\udce9t\\udce9' is not UTF-8; rename its folder"):
        listing.folder(root)  # a class's name is drawn and printed
