"""Training, evaluation on a folder and prediction find the same pictures in a folder."""

import os
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies
from PIL import Image

from mfm_jax.data import decode, listing, walk
from mfm_jax.data.pictures import WHITE
from mfm_jax.errors import UserError


@pytest.fixture
def root(tmp_path) -> Path:
    """Two classes with everything that a folder may hold."""
    root = tmp_path / "set"
    names = [
        *("b.JPG", "a.png", "deep/c", ".hidden.jpg", ".git/x.jpg", "Thumbs.db", "notes.txt", "__MACOSX/y.jpg"),
        *("../dog/d.webp", "../../elsewhere/e.jpg", "../../elsewhere/more/f.jpg"),
    ]
    for name in names:
        path = Path(os.path.normpath(root / "cat" / name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (root / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "one.jpg").symlink_to(tmp_path / "elsewhere" / "e.jpg")
    (root / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (root / "cat" / "deep" / "up").symlink_to(root / "cat")
    return root


PICTURES = ["a.png", "b.JPG", "one.jpg", "deep/c", "linked/e.jpg", "linked/more/f.jpg"]


def test_the_walk_goes_a_folder_at_a_time_and_gives_reasons(root):
    passed: Counter[str] = Counter()
    found = list(walk.walk(root, "cat", passed))
    assert [path for path, wrong in found if not wrong] == [f"cat/{path}" for path in PICTURES]
    assert [pair for pair in found if pair[1]] == [
        ("cat/gone.jpg", "a link to nowhere"),
        ("cat/notes.txt", walk.NOT_A_PICTURE),
        ("cat/deep/up", "a link to a folder that it lies in"),
    ]
    assert passed == {"hidden": 2, "thumbnails": 1, "system": 1}
    assert [path for path, wrong in walk.walk(root / "cat", "", Counter()) if not wrong] == PICTURES


def test_what_is_given_is_what_training_reads_and_what_cannot_be_read(root):
    trained = listing.folder(root)
    unusable = {problem.path for problem in trained.problems if problem.reason != walk.NOT_A_PICTURE}
    assert unusable == {"cat/gone.jpg", "cat/deep/up"}
    passed: Counter[str] = Counter()
    places = [path.relative_to(root).as_posix() for path in walk.given([root], passed)]
    assert set(places) == {*trained.paths, *unusable}
    assert len(places) == len(trained.paths) + 2
    assert passed == {**trained.passed, walk.NOT_A_PICTURE: 1}
    assert walk.in_words(passed) == "passed over: 2 hidden, 1 not a picture by its name, 1 system, 1 thumbnails"
    # A file that is given by its name is taken, whatever its name.
    named = [root / "cat/notes.txt", root / "cat/.hidden.jpg", root / "dog"]
    assert list(walk.given(named, Counter())) == [*named[:2], root / "dog/d.webp"]


def test_a_place_that_is_not_there_is_refused(root):
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        list(walk.given([root, root / "nowhere"], Counter()))


LEFT_BEHIND = {
    "hidden": ".DS_Store|._x.jpg|.Trash-1000|.ipynb_checkpoints|.AppleDouble|.nfs0000|.Spotlight-V100|.a\nb",
    "thumbnails": "@eaDir|@EADIR|Thumbs.db|ehthumbs.db|ehthumbs_vista.db|ZbThumbnail.info|x.jpg@SynoEAStream",
    "recycled": "#recycle|@Recycle|$RECYCLE.BIN|$Recycle.Bin|RECYCLER|Network Trash Folder",
    "system": "System Volume Information|lost+found|FOUND.000|Icon\r|__MACOSX|desktop.ini|#snapshot",
    "": "trash|recycled|icon|thumbs|lost and found|@home|x.jpg|MACOSX|snapshot|found|#1",
}


@pytest.mark.parametrize("kind", LEFT_BEHIND)
def test_what_systems_leave_behind_has_a_kind(kind):
    names = LEFT_BEHIND[kind].split("|")
    assert {name: walk.passed_over(name) for name in names} == dict.fromkeys(names, kind)


# Names of classes


@given(strategies.text())
def test_composed_and_decomposed_names_are_one_class(name):
    forms = {walk.class_name(unicodedata.normalize(form, name)) for form in ("NFC", "NFD")} | {walk.class_name(name)}
    assert forms == {walk.class_name(walk.class_name(name))}
    assert list(walk.look_alikes(forms)) == []


def test_names_that_look_the_same_are_told_with_what_they_are():
    same = {
        "cat": ["Cat", "cat ", " cat", "cat\u200b", "\ufeffcat", "c\u00adat", "c\u0430t", "cat\ufe0f", "cat\u2060"],
        "big cat": ["big  cat", "big\u00a0cat", "Big Cat", "big\tcat\n", "big\u3000cat"],
        "STRASSE": ["straße", "strasse"],
        "TOM": ["\u03a4\u039f\u039c", "Tom", "T\u041eM"],
    }
    for name, others in same.items():
        for other in others:
            (problem,) = walk.look_alikes([name, other])
            assert problem.path == other
            assert problem.reason == f"a class that looks like {name!a}, itself {other!a}; rename or merge them"
    assert "'c\\u0430t'" in next(walk.look_alikes(["cat", "c\u0430t"])).reason
    different = [
        *("a", "A", "cat", "cats", "bigcat", "big cat", "big_cat", "big-cat", "m2", "m\u00b2", "cafe", "caf\u00e9"),
        *("кот", "0", "O"),
    ]
    assert list(walk.look_alikes(different)) == []


# Formats


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A picture in each format and under each name that people have, one folder of them behind a link, and others."""
    root = tmp_path_factory.mktemp("pictures")
    rows, columns = np.mgrid[:32, :32]
    picture = Image.fromarray(np.stack([8 * rows, 8 * columns, 255 - 8 * rows], -1).astype(np.uint8))
    (root / "elsewhere").mkdir()
    (root / "set").mkdir()
    (root / "set/linked").symlink_to(root / "elsewhere")
    formats = {"a.jpe": "JPEG", "b.avif": "AVIF", "c.JP2": "JPEG2000", "d": "PNG", "e.pnm": "PPM", "f.apng": "PNG"}
    for name, kind in {**formats, "linked/g.jfif": "JPEG", "linked/h": "WEBP", "linked/i.png": "AVIF"}.items():
        picture.save(root / "set" / name, kind)
    for name in ("x.heic", "linked/x.HEIF", "y.jxl", "z.svg"):
        (root / "set" / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    picture.save(root / "set/camera.NEF", "TIFF")  # what opens as a picture is the preview
    (root / "set/notes.txt").touch()
    return root / "set"


def test_every_format_is_read_or_listed(pictures):
    passed: Counter[str] = Counter()
    found = list(decode.decoded(walk.given([pictures], passed), 32, 3, "crop", WHITE, workers=0))
    unread = {str(item.path.relative_to(pictures)): item.problem for item in found if item.image is None}
    names = {"x.heic": "HEIC", "linked/x.HEIF": "HEIF", "y.jxl": "JXL", "z.svg": "SVG", "camera.NEF": "NEF"}
    assert unread == {name: f"no decoder for {kind} here; convert it to PNG or JPEG" for name, kind in names.items()}
    assert passed == {walk.NOT_A_PICTURE: 1}
    read = {str(item.path.relative_to(pictures)): item.image for item in found if item.image is not None}
    assert sorted(read) == [
        *("a.jpe", "b.avif", "c.JP2", "d", "e.pnm", "f.apng"),
        *("linked/g.jfif", "linked/h", "linked/i.png"),
    ]
    for name, image in read.items():
        assert np.abs(image.astype(int) - read["d"]).mean() < 4, name
