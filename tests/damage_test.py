"""What happens to people's folders and lists: each kind has a line with the file's name and a reason, or does no harm.

Every case below damages a sound folder, or a sound list, and says what is to be told and what is to be left. No class
may lose or gain a picture without a problem that names it.
"""

import contextlib
import os
import re
import socket
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from helpers import file_of
from PIL import Image

from mfm_jax.data import checking, listing, pictures

COUNTS = {"cat": 4, "dog": 3, "emu": 2}
COLORS = {"cat": (250, 10, 10), "dog": (10, 250, 10), "emu": (10, 10, 250)}
VICTIM = "cat/0.png"


@dataclass
class Told:
    """What a damage is to lead to."""

    problems: dict[str, str] = field(default_factory=dict)  # path: pattern of the reason; no others
    counts: dict[str, int] = field(default_factory=dict)  # of the classes whose usable pictures are not COUNTS
    shows: dict[str, tuple[int, ...]] = field(default_factory=dict)  # path: its first pixel


def encoded(kind: str = "PNG", color: tuple[int, ...] = (200, 100, 50), side: int = 8, mode: str = "RGB", **options):
    return file_of(Image.new(mode, (side, side), color if len(color) > 1 else color[0]), kind, **options)


def noise(kind: str) -> bytes:
    return file_of(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), kind)


@pytest.fixture
def root(tmp_path) -> Path:
    """A sound folder of 9 pictures in 3 classes, each of one colour; no two files are equal."""
    folder = tmp_path / "pets"
    for name, count in COUNTS.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            red, green, blue = COLORS[name]
            (folder / name / f"{i}.png").write_bytes(encoded(color=(red, green, blue + i)))
    return folder


def usable(found: listing.Listing) -> dict[str, int]:
    counts = np.bincount(found.labels, minlength=len(found.class_names))
    return dict(zip(found.class_names, counts.tolist(), strict=True))


def check(found: listing.Listing, told: Told) -> checking.Checked:
    """Checks a listing, compares with what is to be told, and returns what the check found."""
    checked = checking.check(found, workers=0)
    reasons = {problem.path: problem.reason for problem in checked.problems}
    assert len(reasons) == len(checked.problems)
    assert reasons.keys() == told.problems.keys()
    for path, pattern in told.problems.items():
        assert re.search(pattern, reasons[path]), (path, reasons[path])
    left = found.without(reasons)
    assert usable(left) == {**COUNTS, **told.counts}
    lost = [found.class_names[label] for path, label in zip(found.paths, found.labels, strict=True) if path in reasons]
    assert usable(found) == {name: count + lost.count(name) for name, count in usable(left).items()}
    for path in left.paths:
        assert pictures.read(left.root / path, 4, 3, "pad").shape == (4, 4, 3)
    for path, pixel in told.shows.items():
        assert tuple(pictures.read(left.root / path, 0, len(pixel), "crop")[0, 0]) == pixel
    return checked


# Damage to one picture: the bytes that take the place of VICTIM, and the reason, or the colour it shows.

DAMAGED = r"damaged: |not an image"
EXIF = Image.Exif()
EXIF[0x0112] = 6


def claimed(width: int, height: int) -> bytes:
    """Returns a PNG file that says it has so many pixels, and has one row of eight."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return start + encoded()[len(start) :]


def zeroed(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[: middle - 500] + bytes(1000) + content[middle + 500 :]


def palette() -> bytes:
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([1, 2, 3, 4, 5, 6])
    return file_of(picture, transparency=1)


def corrupt_exif() -> bytes:
    content = bytearray(encoded("JPEG", (128, 128, 128), exif=EXIF))
    start = content.index(b"Exif\0\0") + 6
    content[start + 4 : start + 20] = b"\xff" * 16
    return bytes(content)


SECOND = Image.new("RGB", (8, 8), (1, 2, 3))
BAD = {
    "a jpg cut off": (noise("JPEG")[:3000], DAMAGED),
    "a jpg cut off in its header": (noise("JPEG")[:100], DAMAGED),
    "a jpg without its end": (encoded("JPEG")[:-2], DAMAGED),
    "a png cut off": (noise("PNG")[:3000], DAMAGED),
    "a webp cut off": (noise("WEBP")[:1000], DAMAGED),
    "a gif cut off": (noise("GIF")[:1000], DAMAGED),
    "a tiff cut off": (noise("TIFF")[:3000], DAMAGED),
    "a bmp cut off": (noise("BMP")[:3000], DAMAGED),
    "empty": (b"", "empty"),
    "zeros": (bytes(1000), "not an image"),
    "text": (b"no picture at all\n", "not an image"),
    "a page that says the picture is gone": (b"<!DOCTYPE html><html>404 Not Found</html>", "not an image"),
    "a vector picture": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    "an archive": (b"PK\x03\x04" + bytes(100), "not an image"),
    "a heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), "not an image"),
    "a pdf": (b"%PDF-1.7\n" + bytes(100), "not an image"),
    "postscript, which would start a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "a header that claims 60000 x 60000": (claimed(60_000, 60_000), "more than 100 million pixels"),
    "a header that claims 12000 x 12000": (claimed(12_000, 12_000), "more than 100 million pixels"),
    "a header alone": (encoded()[:33], DAMAGED),
    "a png with zeros in the middle": (zeroed(noise("PNG")), DAMAGED),
    "a png without its first byte": (encoded()[1:], "not an image"),
    "a png as text, its line ends changed": (encoded().replace(b"\r\n", b"\n"), "not an image"),
    "32-bit whole numbers": (file_of(np.full((8, 8), 9, np.int32), "TIFF"), "32-bit pixels; save it with 8 or 16"),
    "floating-point numbers": (file_of(np.full((8, 8), 0.5, np.float32), "TIFF"), "floating-point pixels"),
}
FINE = {
    "a jpg under a wrong name": (encoded("JPEG", (128, 128, 128)), (128, 128, 128)),
    "a gif under a wrong name": (encoded("GIF", (200, 100, 50)), (200, 100, 50)),
    "a webp under a wrong name": (encoded("WEBP", lossless=True), (200, 100, 50)),
    "a bmp under a wrong name": (encoded("BMP"), (200, 100, 50)),
    "a cmyk jpg": (encoded("JPEG", (0, 0, 0, 0), mode="CMYK"), (255, 255, 255)),
    "a cmyk tiff": (encoded("TIFF", (0, 0, 0, 255), mode="CMYK"), (0, 0, 0)),
    "an animated webp": (encoded("WEBP", lossless=True, save_all=True, append_images=[SECOND]), (200, 100, 50)),
    "an animated png": (encoded(save_all=True, append_images=[SECOND]), (200, 100, 50)),
    "a tiff of two pages": (encoded("TIFF", save_all=True, append_images=[SECOND]), (200, 100, 50)),
    "one pixel": (encoded(side=1), (200, 100, 50)),
    "a very tall picture": (file_of(np.full((5000, 1), 7, np.uint8)), (7,)),
    "a very wide picture": (file_of(np.full((1, 5000), 7, np.uint8)), (7,)),
    "16-bit grey": (file_of(np.full((8, 8), 257 * 7, np.uint16)), (7,)),
    "a palette with transparency": (palette(), (255, 255, 255)),
    "transparent color": (encoded(color=(9, 9, 9, 0), mode="RGBA"), (255, 255, 255)),
    "transparent grey": (encoded(color=(9, 0), mode="LA"), (255,)),
    "1 bit": (encoded(color=(1,), mode="1"), (255,)),
    "turned": (encoded("JPEG", (128, 128, 128), exif=EXIF), (128, 128, 128)),
    "corrupt exif": (corrupt_exif(), (128, 128, 128)),
    "a color profile that is none": (encoded(icc_profile=b"nonsense" * 9), (200, 100, 50)),
    "something behind the picture": (encoded() + b"trailing" * 99, (200, 100, 50)),
    "fewer rows than its header says": (claimed(8, 9), (200, 100, 50)),
    "an archive behind the picture": (encoded() + b"PK\x03\x04" + bytes(99), (200, 100, 50)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_told(root, name):
    content, reason = BAD[name]
    (root / VICTIM).write_bytes(content)
    check(listing.folder(root), Told({VICTIM: reason}, {"cat": 3}))


@pytest.mark.parametrize("name", FINE)
def test_a_strange_picture_is_read(root, name):
    content, pixel = FINE[name]
    (root / VICTIM).write_bytes(content)
    check(listing.folder(root), Told(shows={VICTIM: pixel}))


# Damage to the folder.


# Names that a picture may have.
NAMES = {
    "spaces": " a  picture .png",
    "a line end": "a\nb.png",
    "other scripts": "кот 猫 🐱 é.png",
    "bytes that are not utf-8": b"\xe9\xff.png",
    "markup": "[red]\x1b[31m.png",
    "very long": "x" * 251 + ".png",
    "capitals": "0.PNG",
    "without a suffix": "0",
}


def moved(root: Path, name: str | bytes) -> str:
    """Moves VICTIM to another name in its folder, and returns its path in `root`."""
    path = b"cat/" + os.fsencode(name)
    os.rename(root / VICTIM, os.fsencode(root) + b"/" + path)
    return os.fsdecode(path)


@pytest.mark.parametrize("name", NAMES)
def test_a_strange_name_is_read(root, name):
    path = moved(root, NAMES[name])
    check(listing.folder(root), Told(shows={path: (250, 10, 10)}))


def names_that_differ_in_case(root: Path) -> Told:
    (root / "Cat").mkdir()
    for i, name in enumerate(("cat/A.png", "cat/a.png", "Cat/0.png")):
        (root / name).write_bytes(encoded(color=(1, 2, i)))
    return Told({"cat": "a class that looks like 'Cat'"}, {"cat": 6, "Cat": 1})


def an_unknown_suffix(root: Path) -> Told:
    moved(root, "0.png.part")
    return Told({"cat/0.png.part": "not a picture by its name"}, {"cat": 3})


def hidden_files(root: Path) -> Told:
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png", "cat/.hidden.png", "cat/Thumbs.db"):
        (root / name).write_bytes(b"x")
    for name in ("__MACOSX", ".git", "cat/.thumbnails"):
        (root / name).mkdir()
        (root / name / "0.png").write_bytes(b"x")
    return Told()


def other_files(root: Path) -> Told:
    for name in ("README.txt", "cat/labels.csv", "0.png"):
        (root / name).write_bytes(encoded())
    texts = dict.fromkeys(("README.txt", "cat/labels.csv"), "not a picture by its name")
    return Told({**texts, "0.png": "lies in no class folder"})


def a_link_to_a_picture(root: Path) -> Told:
    outside = root.parent / "elsewhere.png"
    (root / VICTIM).rename(outside)
    (root / VICTIM).symlink_to(outside)
    return Told(shows={VICTIM: (250, 10, 10)})


def links_that_lead_to_no_picture(root: Path) -> Told:
    for name, target in {"cat/link.png": "nowhere.png", "cat/loop.png": "loop.png"}.items():
        (root / name).symlink_to(target)
    (root / "cat/again").symlink_to(root / "cat")
    (root / "dog/all").symlink_to(root)
    told = dict.fromkeys(("cat/again", "dog/all"), "a link to a folder that it lies in")
    told["cat/loop.png"] = "cannot be read: Too many levels of symbolic links"
    return Told({**told, "cat/link.png": "a link to nowhere"})


def a_pipe_a_socket_and_a_device(root: Path) -> Told:
    os.mkfifo(root / "cat/pipe.png")
    (root / "cat/zero.png").symlink_to("/dev/zero")
    with contextlib.chdir(root / "cat"), socket.socket(socket.AF_UNIX) as unix:
        unix.bind("s.png")  # the whole path may be longer than a socket's name
    return Told(dict.fromkeys(("cat/pipe.png", "cat/s.png", "cat/zero.png"), "neither a file nor a folder"))


def a_folder_named_as_a_picture(root: Path) -> Told:
    (root / "cat/x.jpg").mkdir()
    (root / VICTIM).rename(root / "cat/x.jpg/0.png")
    return Told(shows={"cat/x.jpg/0.png": (250, 10, 10)})


def classes_without_a_picture(root: Path) -> Told:
    for name in ("gnu", "yak"):
        (root / name).mkdir()
    (root / "yak/a.txt").write_bytes(b"x")
    empty = dict.fromkeys(("gnu", "yak"), "a class folder without a picture")
    return Told({**empty, "yak/a.txt": "not a picture by its name"})


def deep_folders(root: Path) -> Told:
    deep = root / "cat" / "/".join("abcdefgh" * 10)
    deep.mkdir(parents=True)
    (root / VICTIM).rename(deep / "0.png")
    return Told()


def a_path_that_is_too_long(root: Path) -> Told:
    with contextlib.chdir(root / "cat"):
        for _ in range(20):
            os.mkdir("x" * 250)
            os.chdir("x" * 250)
    longest = os.pathconf(root, "PC_PATH_MAX") - 1  # without the null byte that ends it
    within = (longest - len(os.fsencode(root / "cat"))) // 251  # how many such folders a path may have
    return Told({"/".join(["cat", *["x" * 250] * (within + 1)]): "cannot be read: File name too long"})


def a_huge_file(root: Path) -> Told:
    os.truncate(root / VICTIM, pictures.MAX_BYTES + 1)  # sparse: it takes no room
    return Told({VICTIM: "has more than 1024 MB"}, {"cat": 3})


FOLDERS: tuple[Callable[[Path], Told], ...] = (
    *(names_that_differ_in_case, an_unknown_suffix, hidden_files, other_files, a_link_to_a_picture),
    *(links_that_lead_to_no_picture, a_pipe_a_socket_and_a_device, a_folder_named_as_a_picture),
    *(classes_without_a_picture, deep_folders, a_path_that_is_too_long, a_huge_file),
)


@pytest.mark.parametrize("damage", FOLDERS, ids=lambda damage: damage.__name__)
def test_a_damaged_folder_is_told(root, damage):
    told = damage(root)  # before it is listed
    check(listing.folder(root), told)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_what_may_not_be_read_is_told(root):
    (root / VICTIM).chmod(0)
    (root / "dog/inner").mkdir(mode=0)
    check(listing.folder(root), Told({VICTIM: "Permission denied", "dog/inner": "Permission denied"}, {"cat": 3}))


def test_a_picture_that_goes_between_listing_and_checking_is_told(root):
    found = listing.folder(root)
    (root / VICTIM).unlink()
    check(found, Told({VICTIM: "cannot be read: No such file"}, {"cat": 3}))


# Damage to the pictures of several files.


def repeats(root: Path, told: Told) -> list[tuple[str, str, str]]:
    found = listing.folder(root)
    return [(d.kind, found.paths[d.first], found.paths[d.second]) for d in check(found, told).duplicates]


def test_a_copy_in_another_class_is_told(root):
    (root / "dog/copy.png").write_bytes((root / VICTIM).read_bytes())
    assert repeats(root, Told(counts={"dog": 4})) == [("copy", VICTIM, "dog/copy.png")]


def test_a_hard_link_and_a_link_are_the_same_file(root):
    os.link(root / VICTIM, root / "cat/hard.png")
    (root / "dog/soft.png").symlink_to(root / VICTIM)
    expected = [("file", VICTIM, "cat/hard.png"), ("file", VICTIM, "dog/soft.png")]
    assert repeats(root, Told(counts={"cat": 5, "dog": 4})) == expected


def test_a_link_to_another_class_repeats_its_pictures(root):
    (root / "emu/also").symlink_to(root / "dog")
    told = Told({"dog": "a class of copies: the files of all its pictures are in 'emu', too"}, {"emu": 5})
    assert repeats(root, told) == [("file", f"dog/{i}.png", f"emu/also/{i}.png") for i in range(3)]


# Damage to a list: what `lists_test` does not have. A problem is named by the line.

LINES = [f"{name}/{i}.png {label}" for label, name in enumerate(COUNTS) for i in range(COUNTS[name])]
LISTS = {  # what takes the place of the second line
    "no such folder": ("none/0.png 0", "no such file: none/0.png"),
    "a folder": ("cat 0", "a folder: cat"),
    "a huge label": ("cat/1.png 99999999999999999999", "no whole number"),
    "a label with a fraction": ("cat/1.png 0.5", "'0.5' is no whole number"),
    "a number of another script": ("cat/1.png ٣", "is no whole number"),
    "a path that leaves the root": ("../cat/1.png 0", "leaves data.root: ../cat"),
    "a path that leaves by a detour": ("cat/../../x.png 0", "leaves data.root"),
    "a path from elsewhere": ("/etc/passwd 0", "leaves data.root: /etc/passwd"),
    "a comma for the space": ("cat/1.png,0", "not understood: no label"),
}


def check_list(root: Path, lines: list[str], told: Told, name: str = "l") -> None:
    (root.parent / name).write_text("\n".join(lines))
    check(listing.lists(root, {"train": root.parent / name}), told)


@pytest.mark.parametrize("name", LISTS)
def test_a_damaged_line_is_told(root, name):
    line, reason = LISTS[name]
    check_list(root, [LINES[0], line, *LINES[2:]], Told({"l:2": reason}, {"cat": 3}))


def test_a_picture_with_two_labels_is_told_at_both(root):
    told = {"l:10": "cat/0.png has label 0 at l:1", "l:1": "cat/0.png has another label elsewhere"}
    check_list(root, [*LINES, "cat/0.png 1"], Told(told, {"cat": 3}))


def test_a_quoted_comma_is_part_of_the_path(root):
    (root / VICTIM).rename(root / "cat/a, b.png")
    lines = ["path,label", '"cat/a, b.png",0', *(text.replace(" ", ",") for text in LINES[1:])]
    check_list(root, lines, Told(shows={"cat/a, b.png": (250, 10, 10)}), "l.csv")
