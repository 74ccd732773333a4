"""Pictures of 16 bits a channel: what is white is one number for a set, and keeps the greys that are there."""

import struct
from pathlib import Path

import numpy as np
import pytest
from helpers import overridden, png
from PIL import Image

from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax import predict
from mfm_jax.check import check
from mfm_jax.data import depth, pictures
from mfm_jax.evaluation import facts as facts_lib
from mfm_jax.evaluation.classifier import Classifier
from mfm_jax.workdir.files import Workdir

VALUES = [0, 1000, 2048, 4095]  # of 12 bits
GREYS = [0, 62, 128, 255]  # rint(255 / 4095 * value)


def tiff(values: list[int], channels: int, bits: int = 16, order: str = "<", most: int | None = None) -> bytes:
    """Returns a TIFF file of one row: kinds that Pillow reads but does not write."""
    data = np.array(values, f"{order}u2").tobytes()
    if bits == 12:
        row = "".join(f"{value:012b}" for value in values)
        data = int(row, 2).to_bytes(len(row) // 8, "big")
    tags = {256: len(values) // channels, 257: 1, 258: bits, 259: 1, 262: 2 if channels == 3 else 1, 277: channels}
    tags |= {278: 1, 279: len(data), **({} if most is None else {281: most})}
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    tags |= {273: start + 6}  # before the pixels, the bits of three channels
    body = b"".join(
        struct.pack(f"{order}HHII", tag, 3, 3, start) if (tag, channels) == (258, 3)
        else struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
        for tag, value in sorted(tags.items())
    )  # fmt: skip
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return head + body + struct.pack(f"{order}I3H", 0, bits, bits, bits) + data


def wide(values: list[int], repeat: int = 1, opaque: int | None = None) -> bytes:
    """Returns a row of a PNG file: each value so many times, and its opacity."""
    more = [] if opaque is None else [opaque]
    return struct.pack(f">{len(values) * (repeat + len(more))}H", *(x for v in values for x in [v] * repeat + more))


KINDS = {
    "grey png": png([wide(VALUES)], 4, 16, 0),
    "colour png": png([wide(VALUES, 3)], 4, 16, 2),
    "grey png with opacity": png([wide(VALUES, 1, 65535)], 4, 16, 4),
    "grey png with opacity of 12 bits": png([wide(VALUES, 1, 4095)], 4, 16, 4),
    "colour png with opacity": png([wide(VALUES, 3, 65535)], 4, 16, 6),
    "grey tiff": tiff(VALUES, 1),
    "grey tiff of the other order": tiff(VALUES, 1, order=">"),
    "colour tiff": tiff([v for v in VALUES for _ in range(3)], 3),
    "colour tiff of the other order": tiff([v for v in VALUES for _ in range(3)], 3, order=">"),
    "tiff of 12 bits a pixel": tiff(VALUES, 1, bits=12),
    "pgm": b"P5 4 1 65535\n" + wide(VALUES),
    "plain pgm": b"P2 4 1 65535\n" + " ".join(map(str, VALUES)).encode(),
    "ppm": b"P6 4 1 65535\n" + wide(VALUES, 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_its_greys(kind, tmp_path):
    file = tmp_path / "a"
    file.write_bytes(KINDS[kind])
    assert pictures.look_at(file).bits == 12
    read = pictures.read(file, 0, 3, "crop", white=4095)
    np.testing.assert_array_equal(read[0], np.repeat(np.array(GREYS)[:, None], 3, 1))
    part = pictures.read_part(file, 1, 1, np.random.default_rng(0), 1.0, white=4095)
    assert part.max() > 50  # of 65535, nothing is above 16


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_as_many_bits_as_the_largest_value_takes_are_used(bits, tmp_path):
    most = 2**bits - 1
    Image.fromarray(np.array([[0, most // 2, most // 2 + 1, most]], np.uint16)).save(tmp_path / "a.png")
    assert pictures.look_at(tmp_path / "a.png").bits == bits
    read = pictures.read(tmp_path / "a.png", 0, 1, "crop", white=most)
    np.testing.assert_array_equal(read.ravel(), [0, 127, 128, 255])


STATED = {
    "significant bits": (png([wide([0, 900])], 2, 16, 0, sBIT=b"\x0c"), 12),
    "those of a colour": (png([wide([0, 900], 3)], 2, 16, 2, sBIT=b"\x0c\x0c\x0c"), 12),
    "fewer than there are, which fill the upper bits": (png([wide([0, 4095 << 4])], 2, 16, 0, sBIT=b"\x0c"), 16),
    "16 of 16": (png([wide([0, 900])], 2, 16, 0, sBIT=b"\x10"), 10),
    "damaged": (png([wide([0, 900])], 2, 16, 0, sBIT=b"\xff"), 10),
    "empty": (png([wide([0, 900])], 2, 16, 0, sBIT=b""), 10),
    "a largest value": (tiff([0, 900], 1, most=4095), 12),
    "12 bits a pixel": (tiff([0, 900], 1, bits=12), 12),
    "its own white": (b"P5 2 1 1000\n" + wide([0, 900]), 0),
    "nothing": (png([wide([0, 900])], 2, 16, 0), 10),
    "8 bits": (png([bytes([0, 255])], 2, 8, 0, sBIT=b"\x04"), 0),
}


@pytest.mark.parametrize("kind", STATED)
def test_bits_that_a_file_states_count(kind, tmp_path):
    content, bits = STATED[kind]
    (tmp_path / "a").write_bytes(content)
    assert pictures.look_at(tmp_path / "a").bits == bits


def test_a_transparent_value_is_white(tmp_path):
    (tmp_path / "grey").write_bytes(png([wide([0, 5, 6])], 3, 16, 0, tRNS=wide([5])))
    (tmp_path / "color").write_bytes(png([wide([0, 5, 6], 3)], 3, 16, 2, tRNS=wide([5, 5, 5])))
    for name in ("grey", "color"):
        assert pictures.read(tmp_path / name, 0, 1, "crop").ravel().tolist() == [0, 255, 0]


@pytest.mark.parametrize("white", [1000, 4095, 65535])
@pytest.mark.parametrize("bits", [8, 11, 12, 16])
def test_levels_that_are_left(bits, white, tmp_path):
    Image.fromarray(np.arange(2**bits, dtype=np.uint16)[None]).save(tmp_path / "a.png")
    left = np.unique(pictures.read(tmp_path / "a.png", 0, 1, "crop", white))
    assert depth.levels(bits, white) == len(left)
    assert depth.levels(12, 65535) == 17


# Whole sets


@pytest.fixture
def root(tmp_path, own_cache) -> Path:
    """30 pictures of 12 bits in two classes: even, from 0 to 4060 in steps of 140; and a cache of the test's own."""
    for i in range(30):
        save(tmp_path / f"set/{'ab'[i % 2]}/{i:02}.png", 140 * i)
    return tmp_path / "set"


def save(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, np.uint16)).save(path)


def config(root: Path, **overrides):
    result = config_lib.default()
    result.data.update(source="folder", root=str(root), protocol="natural", imbalance_factor=1.0, workers=0)
    result.train.batch_size = 2
    return overridden(result, **overrides)


def build(root: Path, **overrides) -> data_lib.LongTailData:
    return data_lib.build(config_lib.resolve(config(root, **overrides)))


def names(data: data_lib.LongTailData, split: str) -> list[str]:
    return [data.manifest["files"][i] for i in data.manifest["splits"][split]["ids"]]


@pytest.mark.parametrize("resident_mb", [4096, 0])
def test_one_white_for_the_set_keeps_its_greys_and_their_order(root, resident_mb, capsys):
    data = build(root, data__resident_mb=resident_mb)
    assert data.manifest["white"] == 4095
    for split in ("train", "test"):
        images = getattr(data, f"{split}_images")
        for place, name in enumerate(names(data, split)):
            assert images[place].flat[0] == round(140 * int(name[2:4]) * 255 / 4095)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("given", [0, 2000])
def test_prediction_evaluation_and_training_see_the_same_pixels(given, root):
    data = build(root, data__white=given)
    facts = facts_lib.describe(config_lib.resolve(config(root, data__white=given)), data)
    assert facts.white == data.manifest["white"] == (given or 4095)
    seen = []
    asked = lambda images: (seen.append(images.copy()), np.zeros((len(images), 2)))[1]  # noqa: E731
    trained = Classifier(facts, config_lib.Config(), 0, asked, asked)
    list(predict.predicted(trained, [root / name for name in names(data, "test")], 4, 0))
    np.testing.assert_array_equal(np.concatenate(seen)[: len(data.test_images)], data.test_images)


def test_pictures_that_are_tested_on_do_not_decide(root):
    tested = names(build(root), "test")[0]
    save(root / tested, 65535)
    data = build(root)
    assert names(data, "test")[0] == tested
    assert data.manifest["white"] == 4095
    assert (data.test_images[0] == 255).all()


def test_a_training_picture_of_16_bits_among_those_of_12_is_warned_of(root, capsys):
    save(root / names(build(root), "train")[0], 65535)
    assert build(root).manifest["white"] == 65535
    assert "warning: 16 bits a channel: 30, of which 8 to 16 are used; 0 to 65535" in capsys.readouterr().err
    assert build(root, data__white=4095).manifest["white"] == 4095


def test_a_set_of_8_bits_is_what_it_was(root):
    for path in root.rglob("*.png"):
        Image.new("L", (4, 4), int(path.stem)).save(path)
    data = build(root)
    assert "white" not in data.manifest
    assert facts_lib.describe(config_lib.resolve(config(root)), data).white == pictures.WHITE
    assert facts_lib.describe(config_lib.resolve(config(root, data__white=4095)), data).white == 4095


def test_the_check_says_what_is_left(root, tmp_path, capsys):
    assert check(config(root), tmp_path / "run") == 0
    told = "16 bits a channel: 30, of which 8 to 12 are used; 0 to 4095 become 0 to 255, which leaves 17 to 256 levels"
    assert told in capsys.readouterr().out
    check(config(root, data__white=1023), tmp_path / "run")
    assert "values above 1023 in up to 22 become 255" in capsys.readouterr().out


def test_the_check_of_a_class_without_a_usable_picture(root, tmp_path, capsys):
    for path in (root / "b").iterdir():
        path.write_bytes(b"")
    assert check(config(root), tmp_path / "run") == 2
    assert "16 bits a channel: 15, of which" in capsys.readouterr().out


def test_facts_of_an_older_run_have_the_white_it_had(tmp_path):
    facts = facts_lib.Facts(("a", "b"), (4, 4, 1), "crop", (0.0,), (1.0,), (1, 1))
    run = Workdir(tmp_path)
    run.facts.write_text(
        '{"class_names": ["a", "b"], "image_shape": [4, 4, 1], "fit": "crop", "mean": [0.0], "std": [1.0],'
        ' "train_class_counts": [1, 1]}'
    )
    assert facts_lib.read(run) == facts
    assert facts.white == 65535
