"""One picture file: looked at, and decoded to the uint8 array that a network takes.

People's folders hold everything that is called an image. Pictures are turned upright (EXIF), the first frame of an
animation counts, transparent parts become white, 16 bits a channel become 8, CMYK and palettes become RGB. What cannot
be turned into a picture raises `BadPicture` with the reason, and never anything else.

An export takes this file and `formats` along and decodes with them, so they import nothing else of the package.
"""

import contextlib
import hashlib
import io
import math
import os
import re
import stat
import struct
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError

from mfm_jax.data.formats import FORMATS, no_decoder

FORMAT = 3  # of what is decoded and recorded, to be counted up when it changes: caches are named by it
MAX_PIXELS = 100_000_000  # 300 MB decoded as RGB: more is a mistake or an attack
MAX_BYTES = 1 << 30
WHITE = 65535  # the largest value of 16 bits
_GREY_MODES = ("1", "L", "LA", "La")
_DEEP = re.compile(r"(I;1[26]|RGB[AX]?;16|LA;16)[BLNR]?")  # Pillow's names of pixels stored with more than 8 bits
_DEEP_PPM = "PPM"  # which has no such name
_MAX_SAMPLE_VALUE = 281  # a tag of TIFF

Pixels = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


class BadPicture(Exception):
    """A file that cannot be used as a picture; its text is the reason."""


class Facts(NamedTuple):
    """What is known of a picture once it was looked at."""

    width: int  # pixels, upright
    height: int
    grey: bool  # one channel, or three that are equal everywhere
    digest: str  # SHA-256 of the file, hex
    look: int  # 64 bits that stay nearly the same when a picture is scaled or compressed again
    bits: int = 0  # 8 to 16, of 16 a channel, that its values take; 0: it has no 16, or says itself what is white


def look_at(path: Path, before: Facts | None = None) -> Facts:
    """Decodes a picture whole and returns what is known of it; `before`, known earlier, if the content is the same.

    `look` is its difference hash: at 9 x 8 grey pixels, whether each is brighter than its right neighbour.

    Raises:
      BadPicture: it cannot be used.
    """
    content = _content(path)
    digest = hashlib.sha256(content).hexdigest()
    if before and before.digest == digest:
        return before
    with _reasons():
        picture, _, bits = _decoded(content, white=0)
        grey = picture.mode == "L" or _colorless(np.asarray(picture))
        small = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    look = int.from_bytes(np.packbits(small[:, :-1] > small[:, 1:]).tobytes(), "big")
    return Facts(picture.width, picture.height, grey, digest, look, bits)


def facts_or_reason(item: tuple[Path, Facts | None]) -> Facts | str:
    """Returns what `look_at(*item)` does, or the reason why it cannot: for processes that look at many."""
    try:
        return look_at(*item)
    except BadPicture as error:
        return str(error)


def read(path: Path, size: int, channels: int, fit: str, white: int = WHITE, digest: str = "") -> Pixels:
    """Returns a picture as uint8 `[size, size, channels]`; with size 0, as large as it is.

    Args:
      path: the file.
      size: pixels a side.
      channels: 1 (grey) or 3 (RGB).
      fit: how another shape becomes square: "crop" scales the shorter side to `size` and takes the middle, "pad" scales
        the longer side and fills up with the median colour of the picture's border, "squeeze" scales each by itself.
      white: the value in pictures of 16 bits a channel that becomes 255, as larger ones do.
      digest: SHA-256 that the file must have, hex; "" for any.

    Raises:
      BadPicture: it cannot be used.
    """
    content = _content(path, digest)
    with _reasons():
        picture, box, _ = _decoded(content, white, 2 * size)
        return fitted(picture, size, channels, fit, box)


def read_part(
    path: Path,
    size: int,
    channels: int,
    rng: np.random.Generator,
    min_area: float,
    white: int = WHITE,
    digest: str = "",
) -> Pixels:
    """Returns a random part of a picture, scaled to uint8 `[size, size, channels]`; `white` and `digest` as in `read`.

    The part has between `min_area` and all of the picture's area and a ratio of sides between 3/4 and 4/3; where ten
    draws do not fit into the picture, it is the largest middle square.

    Raises:
      BadPicture: it cannot be used.

    References:
      Szegedy et al., Going deeper with convolutions, CVPR 2015, section 6.
    """
    content = _content(path, digest)
    with _reasons():
        # A part of 0.08 of the area is enlarged at most twice by the coarser decoding that this allows.
        picture, (_, _, width, height), _ = _decoded(content, white, 2 * size)
        box = _random_box(rng, width, height, min_area)
        part = picture.convert(_mode(channels)).resize((size, size), Image.Resampling.BILINEAR, box)
    return _array(part, channels)


def fitted(picture: Image.Image, size: int, channels: int, fit: str, box: Box | None = None) -> Pixels:
    """Returns a decoded picture as uint8 `[size, size, channels]`; arguments as in `read`.

    `box` is what the picture covers of its pixels, from the corner (0, 0): all of them unless it was decoded coarser.
    """
    picture = picture.convert(_mode(channels))
    if size == 0 or picture.size == (size, size):
        return _array(picture, channels)
    _, _, width, height = box or (0.0, 0.0, float(picture.width), float(picture.height))
    if fit == "pad":
        return _padded(picture, size, channels, width, height)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side) if fit == "crop" else (0.0, 0.0, width, height)
    return _array(picture.resize((size, size), _filter(side, size), box), channels)


def _padded(picture: Image.Image, size: int, channels: int, width: float, height: float) -> Pixels:
    side = max(width, height)
    columns, rows = (max(round(old * size / side), 1) for old in (width, height))
    pixels = _array(picture, channels)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    result = np.empty((size, size, channels), np.uint8)
    result[:] = np.median(border, axis=0).astype(np.uint8)
    left, top = (size - columns) // 2, (size - rows) // 2
    scaled = picture.resize((columns, rows), _filter(side, size), (0.0, 0.0, width, height))
    result[top : top + rows, left : left + columns] = _array(scaled, channels)
    return result


def _filter(old: float, new: int) -> Image.Resampling:
    """The mean of the pixels whose middles a new pixel covers, where pictures shrink; else straight lines."""
    return Image.Resampling.BOX if new <= old else Image.Resampling.BILINEAR


def _random_box(rng: np.random.Generator, width: float, height: float, min_area: float) -> Box:
    for _ in range(10):
        area = width * height * rng.uniform(min_area, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _content(path: Path, digest: str = "") -> bytes:
    if reason := no_decoder(path):
        raise BadPicture(reason)
    try:
        before = os.stat(path)
        if not stat.S_ISREG(before.st_mode):  # a read of a pipe would wait for ever
            raise BadPicture("not a file")
        if before.st_size > MAX_BYTES:
            raise BadPicture(f"has more than {MAX_BYTES >> 20} MB")
        content, after = path.read_bytes(), os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise BadPicture(f"cannot be read: {getattr(error, 'strerror', error)}") from error
    if (before.st_ino, before.st_size, before.st_mtime_ns) != (after.st_ino, after.st_size, after.st_mtime_ns):
        raise BadPicture("was written to while it was read")
    if not content:
        raise BadPicture("empty")
    if digest and hashlib.sha256(content).hexdigest() != digest:
        raise BadPicture("has another content than before")
    return content


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """Turns whatever a decoder raises (each format has its own errors) into `BadPicture`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF and the like: the pixels count
            yield
    except BadPicture:
        raise
    except UnidentifiedImageError as error:
        raise BadPicture(f"not an image ({', '.join(FORMATS).lower()})") from error
    except Image.DecompressionBombError as error:
        raise BadPicture(f"has more than {MAX_PIXELS // 1_000_000} million pixels") from error
    except Exception as error:
        raise BadPicture(f"damaged: {' '.join(str(error).split()) or type(error).__name__}") from error


def _colorless(pixels: Pixels) -> bool:
    return all((part[..., 1:] == part[..., :1]).all() for part in (pixels[::16], pixels))  # a few rows often suffice


def _decoded(content: bytes, white: int, least: int = 0) -> tuple[Image.Image, Box, int]:
    """Returns a picture in mode L or RGB, upright, what it covers of its pixels, and the `bits` of its facts.

    With `least`, a JPEG may be decoded at a half, a quarter or an eighth, its sides not below that many pixels. Sides
    that do not divide then end within the last pixel. With `white` 0, a picture's own bits decide.
    """
    picture = Image.open(io.BytesIO(content), formats=FORMATS)
    if picture.width * picture.height > MAX_PIXELS:
        raise BadPicture(f"has more than {MAX_PIXELS // 1_000_000} million pixels")
    drafted, layout = None, _layout(picture)
    # Turned, the last pixel could be the first: such a picture is decoded unturned. Of no other format may the EXIF be
    # asked for here: a PNG is decoded to find it, and if that fails, `load` below takes it for done and black.
    if least and picture.format in ("JPEG", "MPO") and _orientation(picture) == 1:
        drafted = picture.draft(None, (least, least))
    picture.load()
    if picture.mode == "F" or (picture.mode == "I" and picture.format != "PPM"):  # its numbers are 0..65535 by now
        kind = "floating-point" if picture.mode == "F" else "32-bit"
        raise BadPicture(f"has {kind} pixels; save it with 8 or 16 bits a channel")
    bits = _bits(picture, layout, content) if layout else 0
    upright = _turned(picture)
    white = (white or 2**bits - 1) if bits else WHITE
    if picture.mode.startswith("I") or (bits and (white < WHITE or "transparency" in picture.info)):
        upright = _eight_bits(_values(upright, layout, content), white, picture.info.get("transparency"))
    upright = _flat(upright)
    return upright, drafted[1] if drafted else (0.0, 0.0, float(upright.width), float(upright.height)), bits


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF raises whatever its reader meets; the pixels count
        return 1


def _turned(picture: Image.Image) -> Image.Image:
    """Returns a loaded picture turned as its EXIF says."""
    return ImageOps.exif_transpose(picture) if _orientation(picture) != 1 else picture


def _flat(picture: Image.Image) -> Image.Image:
    """Returns a picture of 8 bits a channel in mode L or RGB, on white."""
    grey = picture.mode in _GREY_MODES
    if picture.has_transparency_data:
        above = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    return picture.convert("L" if grey else "RGB")


# 16 bits a channel. Cameras and scanners fill 10, 12 or 14 of them, and only a whole set shows how many: scaled picture
# by picture, equal values would become different greys, and how bright a picture is would be lost.


def _layout(picture: ImageFile.ImageFile) -> str:
    """Returns how pixels of more than 8 bits a channel lie in their file, else ""; asked before they are loaded."""
    decoder, _, _, args = picture.tile[0] if picture.tile else ("", None, 0, None)
    if decoder == "ppm" and args == ("RGB", WHITE):
        return _DEEP_PPM
    if decoder == "ppm_plain" and args == ("L", WHITE):
        return picture.mode
    layout = str(args[0] if isinstance(args, tuple) else args)
    return layout if _DEEP.fullmatch(layout) else picture.mode if picture.mode.startswith("I;16") else ""  # JPEG 2000


def _bits(picture: Image.Image, layout: str, content: bytes) -> int:
    """Returns how many bits the values of a loaded picture of this `layout` take, or the file says they do: 8 to 16."""
    if layout == _DEEP_PPM or picture.mode.startswith("I"):
        most = int(_values(picture, layout, content).max())
    else:  # of colours Pillow keeps the high byte
        most = int(np.asarray(picture)[..., :3].max()) << 8 | 255
    stated = 12 if layout == "I;12" else _significant(content) if picture.format == "PNG" else 0
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        stated = max(stated, int(np.max(picture.tag_v2.get(_MAX_SAMPLE_VALUE, 0))).bit_length())
    # 16 of 16 says nothing. Values may also fill the upper bits; then the largest takes all of them.
    return max(8, most.bit_length(), stated if stated < 16 else 0)


def _significant(content: bytes) -> int:
    """Returns the significant bits that a PNG file states, 0 if it does not."""
    at, kind = 8, b""
    while kind != b"IDAT" and at + 9 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        if kind == b"sBIT":
            return max(content[at + 8 : at + 8 + length], default=0)
        at += length + 12
    return 0


def _values(picture: Image.Image, layout: str, content: bytes) -> npt.NDArray[np.integer]:
    """Returns the numbers of an upright picture of this `layout`, up to 65535, `[H, W, channels]`."""
    if picture.mode.startswith("I"):
        return np.asarray(picture)[..., None]
    again = Image.open(io.BytesIO(content), formats=FORMATS)
    if layout == _DEEP_PPM:
        count = 3 * picture.width * picture.height
        return np.frombuffer(content, ">u2", count, again.tile[0].offset).reshape(picture.height, picture.width, 3)
    # Of a colour's two bytes Pillow keeps the high one, and the low one in a mode in which that comes first. Grey
    # and opacity, of 16 bits each, are read as four channels of 8.
    high_first = layout[-1] == "B" or (layout[-1] == "N" and sys.byteorder == "big")
    other = "RGBA" if layout.startswith("LA") else layout[:-1] + ("L" if high_first else "B")
    args = [tile.args[1:] if isinstance(tile.args, tuple) else () for tile in again.tile]
    again.tile = [tile._replace(args=(other, *rest)) for tile, rest in zip(again.tile, args, strict=True)]
    again.load()
    low = np.asarray(_turned(again)).astype(np.uint16)
    if layout.startswith("LA"):
        return low[..., 0::2] << 8 | low[..., 1::2]
    return np.asarray(picture).astype(np.uint16) << 8 | low


def _eight_bits(values: npt.NDArray[np.integer], white: int, clear: int | tuple[int, ...] | None) -> Image.Image:
    """Returns the picture of `values` `[H, W, channels]`, 0 to `white` as 0 to 255; `clear` is transparent."""
    whites = np.full(values.shape[-1], white, np.uint32)
    if len(whites) in (2, 4) and values[..., -1].max() > white:  # opacity is often of 16 bits where colours are not
        whites[-1] = WHITE
    scaled = np.minimum((values.astype(np.uint32) * 255 + whites // 2) // whites, 255).astype(np.uint8)
    if clear is not None:
        scaled[(values == np.array(clear)).all(-1)] = 255
    return Image.fromarray(scaled[..., 0] if scaled.shape[-1] == 1 else scaled)


def _mode(channels: int) -> str:
    return "L" if channels == 1 else "RGB"


def _array(picture: Image.Image, channels: int) -> Pixels:
    return np.asarray(picture).reshape(picture.height, picture.width, channels)
