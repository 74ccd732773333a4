"""Picture files decode to the values that a hand computes, whatever they were stored as."""

import hashlib
import os
import struct
import tempfile
from pathlib import Path

import chex
import numpy as np
import pytest
from helpers import file_of, png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mfm_jax.data import pictures
from mfm_jax.data.pictures import BadPicture, Facts

ROW = [[0, 40, 80, 120]]  # 4 x 1


def saved(path: Path, pixels, **options) -> Path:
    """Writes uint8 pixels (or a picture) under a name whose suffix is the format."""
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.array(pixels, np.uint8))
    picture.save(path, **options)
    return path


def of_mode(mode: str, pixels: np.ndarray) -> Image.Image:
    """Returns the picture of uint8 pixels whose mode their shape does not tell."""
    return Image.frombytes(mode, pixels.shape[1::-1], pixels.tobytes())


def grey(path: Path, size: int = 0, fit: str = "crop") -> list[list[int]]:
    return pictures.read(path, size, 1, fit)[..., 0].tolist()


def test_pixels_come_as_they_were_stored(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    read = pictures.read(saved(tmp_path / "a.png", values), 0, 3, "crop")
    chex.assert_trees_all_equal(read, values)
    assert read.dtype == np.uint8


def test_a_picture_that_has_the_size_is_not_touched(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (4, 4), np.uint8)
    for fit in ("crop", "pad", "squeeze"):
        assert grey(saved(tmp_path / "a.png", values), 4, fit) == values.tolist()


def test_color_becomes_grey_by_its_luma_and_grey_becomes_color(tmp_path):
    # 0.299 * 100 + 0.587 * 200 + 0.114 * 50 = 153
    assert grey(saved(tmp_path / "a.png", [[[100, 200, 50]]])) == [[153]]
    assert pictures.read(saved(tmp_path / "b.png", [[7]]), 0, 3, "crop").tolist() == [[[7, 7, 7]]]


def test_crop_takes_the_middle(tmp_path):
    wide = saved(tmp_path / "wide.png", [[0, 10, 20, 90], [1, 11, 21, 91]])
    assert grey(wide, 2, "crop") == [[10, 20], [11, 21]]
    tall = saved(tmp_path / "tall.png", np.array([[0, 10, 20, 90], [1, 11, 21, 91]]).T)
    assert grey(tall, 2, "crop") == [[10, 11], [20, 21]]


def test_a_new_pixel_is_the_mean_of_what_it_covers(tmp_path):
    values = np.zeros((4, 6), np.uint8)
    values[:2, 1:3], values[2:, 3:5] = [[10, 20], [30, 40]], [[100, 120], [140, 160]]
    assert grey(saved(tmp_path / "a.png", values), 2, "crop") == [[25, 0], [0, 130]]


def test_crop_of_an_odd_rest_takes_whole_pixels(tmp_path):
    # the middle 2 of 5 columns: from 1.5 to 3.5, where the middles of the columns 2 and 3 lie
    assert grey(saved(tmp_path / "a.png", [[0, 10, 50, 200, 255]] * 2), 1, "crop") == [[125]]


def test_squeeze_scales_each_side_by_itself(tmp_path):
    assert grey(saved(tmp_path / "a.png", ROW * 2), 2, "squeeze") == [[20, 100], [20, 100]]


def test_pad_fills_up_with_the_median_of_the_border(tmp_path):
    # border, corners twice: 0 10 20 30, 40 50 60 70 and 0 40, 30 70; sorted, the middle two are 30 and 40
    values = [[0, 10, 20, 30], [40, 50, 60, 70]]
    assert grey(saved(tmp_path / "a.png", values), 4, "pad") == [[35] * 4, *values, [35] * 4]
    # to 2: 2 x 1 means, above what is filled up
    assert grey(saved(tmp_path / "a.png", values), 2, "pad") == [[25, 45], [35, 35]]


def test_pad_keeps_a_line_of_a_very_long_picture(tmp_path):
    result = np.array(grey(saved(tmp_path / "a.png", np.full((1, 500), 200)), 8, "pad"))
    assert result.shape == (8, 8)
    assert (result == 200).all()


@pytest.mark.parametrize("fit", ["crop", "pad", "squeeze"])
def test_a_single_pixel_fills_every_size(tmp_path, fit):
    assert grey(saved(tmp_path / "a.png", [[9]]), 3, fit) == [[9] * 3] * 3


def test_16_bits_become_8(tmp_path):
    values = np.array([[0, 128, 129, 257 * 100, 65535]], np.uint16)
    assert grey(saved(tmp_path / "a.png", Image.fromarray(values))) == [[0, 0, 1, 100, 255]]
    assert grey(saved(tmp_path / "a.tif", Image.fromarray(values))) == [[0, 0, 1, 100, 255]]


def test_16_bit_color_becomes_8(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(png([struct.pack(">6H", 0, 257 * 7, 65535, 257, 514, 771)], width=2, depth=16, color=2))
    assert pictures.read(file, 0, 3, "crop").tolist() == [[[0, 7, 255], [1, 2, 3]]]


def test_a_pgm_of_more_than_256_values_becomes_8_bits(tmp_path):
    file = tmp_path / "a.pgm"
    file.write_bytes(b"P5 3 1 1000\n" + struct.pack(">3H", 0, 500, 1000))
    assert grey(file) == [[0, 128, 255]]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_an_unknown_range_are_refused(tmp_path, kind):
    file = saved(tmp_path / "a.tif", Image.fromarray(np.array([[0, 200]], kind)))
    with pytest.raises(BadPicture, match="save it with 8 or 16 bits"):
        pictures.read(file, 0, 1, "crop")


def test_one_bit_is_black_and_white(tmp_path):
    assert grey(saved(tmp_path / "a.png", Image.fromarray(np.array([[True, False]])))) == [[255, 0]]


def test_what_is_transparent_is_white(tmp_path):
    # black at opacities 0, 1/5 and 1
    black = np.zeros((1, 3, 4), np.uint8)
    black[0, :, 3] = [0, 51, 255]
    assert grey(saved(tmp_path / "rgba.png", black)) == [[255, 204, 0]]
    assert grey(saved(tmp_path / "la.png", of_mode("LA", black[..., 2:]))) == [[255, 204, 0]]


def test_a_palette_with_a_transparent_color(tmp_path):
    picture = of_mode("P", np.array([[0, 1, 2]], np.uint8))
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    file = saved(tmp_path / "a.png", picture, transparency=1)
    assert pictures.read(file, 0, 3, "crop").tolist() == [[[10, 20, 30], [255] * 3, [70, 80, 90]]]


def test_cmyk_becomes_rgb(tmp_path):
    inks = np.zeros((8, 8, 4), np.uint8)
    inks[..., 0] = 255  # cyan alone
    for name in ("a.jpg", "a.tif"):  # in a JPEG Pillow stores the inks inverted, as Adobe does
        file = saved(tmp_path / name, of_mode("CMYK", inks))
        np.testing.assert_allclose(pictures.read(file, 0, 3, "crop")[4, 4], [0, 255, 255], atol=2)


ORIENTED = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


@pytest.mark.parametrize("orientation", ORIENTED)
def test_pictures_are_turned_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = saved(tmp_path / "a.png", ORIENTED[1], exif=exif)
    assert grey(file) == ORIENTED[orientation]
    facts = pictures.look_at(file)
    assert (facts.height, facts.width) == np.shape(ORIENTED[orientation])


def test_the_first_frame_of_an_animation_counts(tmp_path):
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (10, 200)]
    for name, options in (("a.webp", {"lossless": True}), ("a.png", {}), ("a.tif", {}), ("a.gif", {})):
        file = saved(tmp_path / name, frames[0], save_all=True, append_images=frames[1:], **options)
        assert grey(file) == [[10] * 8] * 8


# Coarser decoding. 129 columns at an eighth are 17, of which the last holds one column's worth.


@pytest.fixture(scope="module")
def slope(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """A JPEG of 129 x 1000 whose columns rise from 0 to 255, and its columns."""
    columns = np.linspace(0, 255, 129)
    values = np.broadcast_to(np.rint(columns), (1000, 129))
    return saved(tmp_path_factory.mktemp("slope") / "a.jpg", values, quality=100), columns


def means(columns: np.ndarray, size: int) -> np.ndarray:
    """Returns the mean of each of `size` equal parts of a line of pixels."""
    fine = np.repeat(columns, size)
    return fine.reshape(size, -1).mean(1)


def test_coarser_decoding_covers_the_same_box(slope):
    file, columns = slope
    read = pictures.read(file, 8, 1, "squeeze")[..., 0].astype(float)
    np.testing.assert_allclose(read, np.broadcast_to(means(columns, 8), (8, 8)), atol=3)
    read = pictures.read(file, 8, 1, "crop")[..., 0].astype(float)
    np.testing.assert_allclose(read, np.broadcast_to(means(columns, 8), (8, 8)), atol=3)


def test_coarser_decoding_keeps_the_proportion_when_padded(tmp_path, slope):
    file, _ = slope
    # 129 / 1000 of 16 pixels is 2.06, of 4 pixels 0.5
    white = saved(tmp_path / "w.jpg", np.pad(np.zeros((800, 2400)), ((0, 0), (1, 0)), constant_values=255), quality=100)
    read = pictures.read(white, 9, 1, "pad")[..., 0]  # 800 / 2401 of 9 is 3.0
    assert (read < 40).all()
    assert pictures.read(file, 16, 1, "pad").shape == (16, 16, 1)


def test_a_turned_picture_covers_the_same_box_too(tmp_path, slope):
    _, columns = slope
    exif = Image.Exif()
    exif[0x0112] = 3
    file = saved(tmp_path / "a.jpg", np.broadcast_to(np.rint(columns), (1000, 129)), quality=100, exif=exif)
    read = pictures.read(file, 8, 1, "squeeze")[..., 0].astype(float)
    np.testing.assert_allclose(read, np.broadcast_to(means(columns, 8)[::-1], (8, 8)), atol=3)


def test_reading_twice_gives_the_same_bytes(slope):
    file, _ = slope
    for fit in ("crop", "pad", "squeeze"):
        assert pictures.read(file, 8, 3, fit).tobytes() == pictures.read(file, 8, 3, fit).tobytes()
    parts = [pictures.read_part(file, 8, 3, np.random.default_rng(1), 0.1).tobytes() for _ in range(2)]
    assert parts[0] == parts[1]


# Random parts


@pytest.fixture(scope="module")
def plane(tmp_path_factory) -> Path:
    """A picture of 250 x 200 whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:200, :250]
    return saved(tmp_path_factory.mktemp("plane") / "a.png", np.stack([columns, rows, 0 * rows], -1))


def sides(part: np.ndarray) -> tuple[float, float]:
    """Returns width and height of what a part of `plane` covers: its pixels' centres are 15/16 of a side apart."""
    first, last = part[0, 0].astype(float), part[-1, -1].astype(float)
    return tuple((last - first)[:2] * 16 / 15)


def test_parts_have_the_areas_and_the_shapes_that_are_promised(plane):
    rng = np.random.default_rng(0)
    found = np.array([sides(pictures.read_part(plane, 16, 3, rng, 0.25)) for _ in range(200)])
    area, ratio = found.prod(1) / (250 * 200), found[:, 0] / found[:, 1]
    assert area.min() == pytest.approx(0.25, abs=0.03)
    assert area.max() > 0.9
    assert (area < 1.01).all()
    assert 0.72 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.36


def test_a_part_of_a_very_long_picture_is_its_middle_square(tmp_path):
    values = np.zeros((10, 1000), np.uint8)
    values[:, 490:510] = 200
    file = saved(tmp_path / "a.png", values)
    assert (pictures.read_part(file, 4, 1, np.random.default_rng(0), 0.5) == 200).all()


def test_a_part_is_the_same_from_a_coarser_decoding(tmp_path):
    rows, columns = np.mgrid[:1001, :1003] / 1003 * 255
    smooth = np.rint(np.stack([columns, rows, 255 - columns], -1))
    files = [saved(tmp_path / name, smooth, quality=100) for name in ("a.jpg", "a.png")]
    for seed in range(5):
        coarse, fine = (pictures.read_part(f, 16, 3, np.random.default_rng(seed), 0.08).astype(int) for f in files)
        np.testing.assert_allclose(coarse, fine, atol=4)


# Facts


def test_facts_of_a_picture(tmp_path):
    # falling to the left half, rising to the right: 1 where a pixel is brighter than its right neighbour
    row = [90, 80, 70, 60, 50, 60, 70, 80, 90]
    file = saved(tmp_path / "a.png", [row] * 8)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert pictures.look_at(file) == Facts(9, 8, True, digest, int("11110000" * 8, 2))


def test_a_picture_stored_with_color_but_without_any_is_grey(tmp_path):
    values = np.full((40, 40, 3), 100, np.uint8)
    assert pictures.look_at(saved(tmp_path / "a.png", values)).grey
    values[33, 7, 2] = 101
    assert not pictures.look_at(saved(tmp_path / "a.png", values)).grey


def test_a_scaled_copy_looks_the_same(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (8, 9), np.uint8)
    large = Image.fromarray(values).resize((360, 320), Image.Resampling.BICUBIC)
    small = large.resize((90, 80), Image.Resampling.BILINEAR)
    looks = [
        pictures.look_at(saved(tmp_path / name, picture, quality=70)).look
        for name, picture in (("a.jpg", large), ("b.jpg", small))
    ]
    assert (looks[0] ^ looks[1]).bit_count() <= 2


# Damage


def encoded() -> dict[str, bytes]:
    """Returns a valid file of every kind."""
    color = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    kinds = {
        "jpg": (color, "JPEG", {}),
        "jpg_progressive": (color, "JPEG", {"progressive": True}),
        "jpg_exif": (color, "JPEG", {"exif": exif}),
        "jpg_cmyk": (color.convert("CMYK"), "JPEG", {}),
        "png": (color, "PNG", {}),
        "png_exif": (color, "PNG", {"exif": exif}),
        "png_palette": (color.quantize(16), "PNG", {"transparency": 3}),
        "webp": (color, "WEBP", {}),
        "webp_lossless": (color, "WEBP", {"lossless": True, "exif": exif}),
        "webp_animated": (color, "WEBP", {"save_all": True, "append_images": [color.rotate(90)]}),
        "bmp": (color, "BMP", {}),
        "gif": (color, "GIF", {"save_all": True, "append_images": [color.rotate(90)]}),
        "ppm": (color, "PPM", {}),
        "tiff": (color, "TIFF", {}),
        "tiff_lzw": (color, "TIFF", {"compression": "tiff_lzw"}),
        "tiff_16": (Image.fromarray(np.arange(960, dtype=np.uint16).reshape(24, 40)), "TIFF", {}),
    }
    return {name: file_of(picture, kind, **options) for name, (picture, kind, options) in kinds.items()}


ENCODED = encoded()


def test_a_damaged_png_is_not_read_as_black(tmp_path):
    content = bytearray(ENCODED["png"])
    content[41] = 0  # the first byte of the compressed pixels
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(BadPicture, match="damaged: broken data stream"):
        pictures.read(tmp_path / "a.png", 4, 3, "crop")


def reason(function) -> str:
    """Returns why `function` raises `BadPicture`, "" where it gives a result; anything else is raised."""
    try:
        function()
    except BadPicture as error:
        return str(error) or "none"
    return ""


def check_damaged(content: bytes) -> None:
    """Checks that a damaged file is refused by all readers alike, in a line, or read by all of them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a"
        file.write_bytes(content)
        reasons = [
            reason(lambda: pictures.look_at(file)),
            reason(lambda: pictures.read(file, 0, 3, "crop")),
            reason(lambda: pictures.read(file, 4, 3, "crop")),
            reason(lambda: pictures.read_part(file, 4, 1, np.random.default_rng(0), 0.5)),
        ]
    assert all(reasons) or not any(reasons)
    assert "\n" not in "".join(reasons)


@pytest.mark.parametrize("kind", ENCODED)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_random_damage_is_refused_or_read_never_more(kind, data):
    content = bytearray(ENCODED[kind])
    positions = st.integers(0, len(content) - 1) | st.integers(0, min(100, len(content) - 1))  # headers matter most
    for position, value in data.draw(st.lists(st.tuples(positions, st.integers(0, 255)), max_size=8)):
        content[position] = value
    check_damaged(bytes(content[: data.draw(st.just(len(content)) | st.integers(1, len(content)))]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENCODED)
def test_every_single_byte_may_be_damaged(kind):
    content = ENCODED[kind]
    for position in range(0, len(content), max(len(content) // 1000, 1)):
        check_damaged(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(BadPicture, match="not a file"):
        pictures.look_at(tmp_path / "a.jpg")
    with pytest.raises(BadPicture, match="cannot be read: No such file"):
        pictures.look_at(tmp_path / "b.jpg")
