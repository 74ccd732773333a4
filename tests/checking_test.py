"""A check opens every picture once, remembers what it found, and tells which pictures are the same."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mfm_jax.data import checking, listing, pictures, stamps
from mfm_jax.data.pictures import look_at


def noise(path: Path, seed: int, size: tuple[int, int] = (90, 80)) -> Image.Image:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), np.uint8)
    picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    picture.save(path)
    return picture


@pytest.fixture
def root(tmp_path, own_cache) -> Path:
    """20 pictures in 2 classes, and a cache of the test's own."""
    for i in range(20):
        noise(tmp_path / f"set/{'ab'[i % 2]}/{i:02}.png", i)
    return tmp_path / "set"


def cache(root: Path) -> Path:
    (file,) = (root.parent / "cache").iterdir()
    return file


def test_facts_are_in_the_order_of_the_listing(root):
    found = listing.folder(root)
    checked = checking.check(found, workers=0)
    assert checked.facts == tuple(look_at(root / path) for path in found.paths)
    assert (checked.problems, checked.duplicates) == ((), ())


def test_processes_find_what_one_finds(root):
    for i in range(20, 90):
        noise(root / f"a/{i}.png", i)
    (root / "b/01.png").write_bytes(b"x")
    found = listing.folder(root)
    alone = checking.check(found, workers=0)
    cache(root).unlink()
    together = checking.check(found, workers=2)
    assert together.facts == alone.facts
    assert together.problems == alone.problems
    assert [problem.path for problem in alone.problems] == ["b/01.png"]
    assert cache(root).read_text().count("\n") > 80


# What is remembered


Opened = Callable[[], tuple[set[str], set[str]]]


@pytest.fixture
def opened(root, monkeypatch) -> Opened:
    """Returns a function that checks `root`, and returns which pictures were read for it and which decoded.

    What has been written long enough ago for its stamp to tell: the clock of the check is an hour ahead.
    """
    read, decoded = set(), set()
    look, load = checking.facts_or_reason, pictures._decoded
    soon = time.time_ns() + 3600 * 10**9

    def looking(item):
        read.add(name := str(item[0].relative_to(root)))
        monkeypatch.setattr(pictures, "_decoded", lambda *args, **more: decoded.add(name) or load(*args, **more))
        return look(item)

    def opened():
        read.clear()
        decoded.clear()
        checking.check(listing.folder(root), workers=0)
        return set(read), set(decoded)

    monkeypatch.setattr(checking, "facts_or_reason", looking)
    monkeypatch.setattr(time, "time_ns", lambda: soon)
    return opened


def both(*names: str) -> tuple[set[str], set[str]]:
    """Returns `names` as read and as decoded."""
    return set(names), set(names)


def test_a_second_check_opens_only_what_changed_or_was_bad(root, opened):
    (root / "a/00.png").write_bytes(b"x")
    assert len(opened()[1]) == 20
    assert opened() == both("a/00.png")
    noise(root / "a/02.png", 99)
    noise(root / "b/new.png", 100)
    assert opened() == both("a/00.png", "a/02.png", "b/new.png")


def replaced(file: Path, content: bytes) -> None:
    """Puts a new file in the place of `file`, of the same times."""
    times = file.stat()
    file.with_suffix(".new").write_bytes(content)
    file.with_suffix(".new").replace(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def swapped(one: Path, other: Path) -> None:
    one.rename(one.with_name("away"))
    other.rename(one)
    one.with_name("away").rename(other)


def test_pictures_that_change_places_are_seen(root, opened):
    for i, name in enumerate(("a/x.bmp", "b/x.bmp")):
        Image.new("RGB", (9, 9), (i, i, i)).save(root / name)
        os.utime(root / name, ns=(10**18, 10**18))
    opened()
    swapped(root / "a/x.bmp", root / "b/x.bmp")
    assert opened() == both("a/x.bmp", "b/x.bmp")
    assert opened() == both()


@pytest.mark.parametrize("how", ["in a new file", "in place", "by a link to another"])
def test_another_picture_of_the_same_size_and_time_is_seen(root, opened, how):
    file, other = root / "a/x.bmp", root.parent / "x.bmp"
    for i, path in enumerate((file, other)):
        Image.new("RGB", (9, 9), (i, i, i)).save(path)
        os.utime(path, ns=(10**18, 10**18))
    opened()
    if how == "in a new file":
        replaced(file, other.read_bytes())
    elif how == "in place":
        file.write_bytes(other.read_bytes())
        os.utime(file, ns=(10**18, 10**18))
    else:
        file.unlink()
        file.symlink_to(other)
    assert opened() == both("a/x.bmp")


def test_what_is_written_anew_with_the_same_content_is_not_decoded_again(root, opened):
    opened()
    for path in root.rglob("*.png"):
        replaced(path, path.read_bytes())
    read, decoded = opened()
    assert (len(read), decoded) == (20, set())
    assert opened() == both()


@pytest.mark.parametrize(
    "drive", [{"changed": 10**18}, {"inode": 0}, {"changed": 0, "inode": 0}, {"changed": 2 * 10**18 + 1}]
)
def test_where_stamps_tell_nothing_content_does(root, opened, monkeypatch, drive):
    """Drives of whole seconds, without inodes, without both, and with a clock ahead of ours."""
    of = stamps.of
    monkeypatch.setattr(stamps, "of", lambda path: of(path)._replace(**drive))
    assert len(opened()[1]) == 20
    file = cache(root)
    size = file.stat().st_size
    assert (len(opened()[0]), opened()[1]) == (20, set())
    assert file.stat().st_size == size
    swapped(root / "a/00.png", root / "b/01.png")
    assert opened()[1] == {"a/00.png", "b/01.png"}
    assert told(root) == []  # without inodes, files are not one


def test_a_file_that_was_written_a_moment_ago_is_read_again(root, opened, monkeypatch):
    now = max(path.stat().st_ctime_ns for path in root.rglob("*.png"))
    monkeypatch.setattr(time, "time_ns", lambda: now + 10**9)
    opened()
    assert len(opened()[0]) == 20


def test_a_picture_that_is_written_to_while_it_is_read_is_a_problem(root, monkeypatch):
    read = Path.read_bytes

    def meanwhile(path):
        content = read(path)
        if path.name == "00.png":
            noise(path, 77, (30, 30))
        return content

    monkeypatch.setattr(Path, "read_bytes", meanwhile)
    checked = checking.check(listing.folder(root), workers=0)
    assert checked.problems == (("a/00.png", "was written to while it was read"),)
    monkeypatch.undo()


@pytest.mark.parametrize("damage", ["cut", "flip", "garbage", "empty", "folder"])
def test_a_damaged_memory_is_not_believed(root, damage):
    found = listing.folder(root)
    facts = checking.check(found, workers=0).facts
    file = cache(root)
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        for i in range(0, len(content), 7):
            content[i] ^= 4
        file.write_bytes(content)
    elif damage == "garbage":
        file.write_bytes(b"\xff\x00{}[]\n" * 99)
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
        file.mkdir()
    assert checking.check(found, workers=0).facts == facts
    if damage != "folder":
        assert len(checking.remembered(file)) == 20


def test_every_flip_of_a_bit_in_a_remembered_line_is_noticed(root):
    found = listing.folder(root)
    checking.check(found, workers=0)
    file = cache(root)
    content = file.read_bytes()
    sound = checking.remembered(file)
    for position in range(0, 200):
        file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert checking.remembered(file).items() <= sound.items()


def test_an_interrupted_check_keeps_what_it_found(root, monkeypatch):
    found = listing.folder(root)
    looks = checking.facts_or_reason

    def interrupted(item):
        if item[0].name == "05.png":  # 10 of class a come first, then 01 and 03
            raise KeyboardInterrupt
        return looks(item)

    monkeypatch.setattr(checking, "facts_or_reason", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checking.check(found, workers=0)
    assert len(checking.remembered(cache(root))) == 12


def test_a_cache_folder_that_cannot_be_written_costs_the_memory_only(root, monkeypatch, caplog):
    (root.parent / "file").write_bytes(b"x")
    monkeypatch.setenv("MFM_JAX_CACHE", str(root.parent / "file"))
    assert all(checking.check(listing.folder(root), workers=0).facts)
    assert "what a check found is not kept" in caplog.text


# Duplicates


def told(root: Path) -> list[tuple[str, str, str]]:
    found = listing.folder(root)
    return [(d.kind, found.paths[d.first], found.paths[d.second]) for d in checking.check(found, workers=0).duplicates]


def test_copies_and_pictures_that_look_alike_are_told(root):
    (root / "b/copy.png").write_bytes((root / "a/00.png").read_bytes())
    noise(root / "a/small.png", 3, size=(45, 40))  # b/03.png at half its size
    noise(root / "a/squeezed.png", 5, size=(80, 80))  # b/05.png in another shape: not the same picture
    Image.open(root / "a/02.png").convert("RGB").save(root / "b/again.jpg", quality=80)
    assert told(root) == [
        ("copy", "a/00.png", "b/copy.png"),
        ("alike", "a/small.png", "b/03.png"),
        ("alike", "a/02.png", "b/again.jpg"),
    ]


COPIES = {  # which folder is copied where: the class that is one of copies, and those that it repeats
    "a/. plant/a/. b/. plant/b/.": ("plant", "'a', 'b'"),
    "a/. a2/.": ("a2", "'a'"),
    "b/. B2/.": ("b", "'B2'"),  # of two that are equal, the later
    "a/. all/. b/. all/.": ("all", "'a', 'b'"),
    "a/00.png one/x.png": ("one", "'a'"),
}


@pytest.mark.parametrize("copied", COPIES)
def test_a_class_of_copies_is_a_problem(root, copied):
    names = copied.split()
    for source, target in zip(names[::2], names[1::2], strict=True):
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        if source.endswith("."):
            shutil.copytree(root / source, root / target, dirs_exist_ok=True)
        else:
            shutil.copy(root / source, root / target)
    found = listing.folder(root)
    checked = checking.check(found, workers=0)
    name, others = COPIES[copied]
    reason = f"a class of copies: the files of all its pictures are in {others}, too; remove one of the two"
    assert checked.problems == ((name, reason),)
    assert checked.contradictions == ()
    usable = {found.class_names[label] for label, fact in zip(found.labels, checked.facts, strict=True) if fact}
    assert usable == set(found.class_names) - {name}


def test_equal_pictures_with_different_labels_are_contradictions(root):
    for target in ("b/copy.png", "c/copy.png", "a/copy.png"):
        noise(root / target, 0)
    noise(root / "c/own.png", 30)
    (root / "b/link.png").symlink_to(root / "a/02.png")
    noise(root / "c/again.jpg", 4)  # looks like a/04.png, which is no contradiction
    checked = checking.check(listing.folder(root), workers=0)
    equal = "equal to a/{}.png in class 'a'; one of the two labels is wrong"
    assert dict(checked.contradictions) == {
        "b/copy.png": equal.format("00"),
        "b/link.png": equal.format("02"),
        "c/copy.png": equal.format("00"),
    }
    assert all(checked.facts)


def test_even_pictures_do_not_look_alike(root):
    for i in range(5):
        Image.new("RGB", (20 + i, 20 + i), (i, i, i)).save(root / f"a/even{i}.png")
    assert told(root) == []


def test_of_two_splits_the_one_nearer_to_training_comes_first(tmp_path, own_cache):
    root = tmp_path / "set"
    for split, name, seed in (("train", "a/z", 1), ("train", "b/x", 2), ("test", "a/a", 1), ("val", "a/b", 1)):
        noise(root / split / f"{name}.png", seed)
    assert told(root) == [("copy", "train/a/z.png", "val/a/b.png"), ("copy", "train/a/z.png", "test/a/a.png")]


def bits(*positions: int) -> int:
    return sum(1 << position for position in positions)


def test_two_bits_make_no_difference_and_three_do():
    base = int("0110" * 16, 2)
    looks = np.array([base, base ^ bits(0, 63), base ^ bits(5, 6, 7), base ^ bits(20), ~base & (2**64 - 1)], np.uint64)
    assert checking.alike(looks, np.ones(5)) == [(0, 1), (0, 3)]
    assert checking.alike(looks, np.array([1.0, 1.03, 1.0, 1.01, 1.0])) == [(0, 3)]
    assert checking.alike(looks[:0], np.ones(0)) == []


def test_every_pair_of_changed_bits_is_found():
    base = int("0110" * 16, 2)
    for i in range(64):
        looks = np.array([base, *(base ^ bits(i) ^ bits(j) for j in range(64) if j != i)], np.uint64)
        assert [pair[1] for pair in checking.alike(looks, np.ones(64))] == list(range(1, 64))


def test_many_looks_agree_with_comparing_each_with_each():
    rng = np.random.default_rng(0)
    looks = rng.integers(0, 2**64, 300, np.uint64)
    for _ in range(200):  # pictures one, two, three and four bits from others
        one = looks[rng.integers(len(looks))]
        flips = np.bitwise_or.reduce(
            np.uint64(1) << rng.choice(64, rng.integers(1, 5), replace=False).astype(np.uint64)
        )
        looks = np.append(looks, one ^ flips)
    near = np.bitwise_count(looks[:, None] ^ looks[None]) <= 2
    expected = [(int(near[i].argmax()), i) for i in range(len(looks)) if near[i].argmax() < i]
    assert checking.alike(looks, np.ones(len(looks))) == expected
    assert len(expected) > 60


# Processes


def crash(item: tuple) -> None:
    """What a fault in a decoder comes to."""
    os._exit(1)


def test_a_process_that_is_killed_is_told(root, monkeypatch):
    for i in range(20, 60):
        noise(root / f"a/{i}.png", i)
    monkeypatch.setattr(checking, "facts_or_reason", crash)
    with pytest.raises(checking.UserError, match=r"data\.workers = 2: a process that decodes was killed, within"):
        checking.check(listing.folder(root), workers=2)
