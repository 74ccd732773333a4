"""One picture file: looked at, and decoded to the uint8 array that a network takes.

People's folders hold everything that is called an image. Pictures are turned upright (EXIF), the first frame of an
animation counts, transparent parts become white, 16 bits a channel become 8, CMYK and palettes become RGB. What cannot
be turned into a picture raises `BadPicture` with the reason, and never anything else.
"""

import contextlib
import hashlib
import io
import math
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from mfm_jax.data.formats import FORMATS, no_decoder

FORMAT = 2  # of what is decoded and told, to be counted up when it changes: caches are named by it
MAX_PIXELS = 100_000_000  # 300 MB decoded as RGB: more is a mistake or an attack
MAX_BYTES = 1 << 30
_GREY_MODES = ("1", "L", "LA", "La")


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


def look_at(path: Path) -> Facts:
    """Decodes a picture whole and returns what is known of it.

    `look` is its difference hash: at 9 x 8 grey pixels, whether each is brighter than its right neighbour.

    Raises:
      BadPicture: it cannot be used.
    """
    content = _content(path)
    with _reasons():
        picture, _ = _decoded(content)
        grey = picture.mode == "L" or _colorless(np.asarray(picture))
        small = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = np.packbits(small[:, :-1] > small[:, 1:])
    digest = hashlib.sha256(content).hexdigest()
    return Facts(picture.width, picture.height, grey, digest, int.from_bytes(bits.tobytes(), "big"))


def facts_or_reason(path: Path) -> Facts | str:
    """Returns what `look_at` does, or the reason why it cannot: for processes that look at many."""
    try:
        return look_at(path)
    except BadPicture as error:
        return str(error)


def read(path: Path, size: int, channels: int, fit: str) -> npt.NDArray[np.uint8]:
    """Returns a picture as uint8 `[size, size, channels]`; with size 0, as large as it is.

    Args:
      path: the file.
      size: pixels a side.
      channels: 1 (grey) or 3 (RGB).
      fit: how another shape becomes square: "crop" scales the shorter side to `size` and takes the middle, "pad" scales
        the longer side and fills up with the median colour of the picture's border, "squeeze" scales each by itself.

    Raises:
      BadPicture: it cannot be used.
    """
    content = _content(path)
    with _reasons():
        picture, box = _decoded(content, 2 * size)
        return fitted(picture, size, channels, fit, box)


def read_part(path: Path, size: int, channels: int, rng: np.random.Generator, min_area: float) -> npt.NDArray[np.uint8]:
    """Returns a random part of a picture, scaled to uint8 `[size, size, channels]`.

    The part has between `min_area` and all of the picture's area and a ratio of sides between 3/4 and 4/3; where ten
    draws do not fit into the picture, it is the largest middle square.

    Raises:
      BadPicture: it cannot be used.

    References:
      Szegedy et al., Going deeper with convolutions, CVPR 2015, section 6.
    """
    content = _content(path)
    with _reasons():
        # A part of 0.08 of the area is enlarged at most twice by the coarser decoding that this allows.
        picture, (_, _, width, height) = _decoded(content, 2 * size)
        box = _random_box(rng, width, height, min_area)
        part = picture.convert(_mode(channels)).resize((size, size), Image.Resampling.BILINEAR, box)
    return _array(part, channels)


def fitted(picture: Image.Image, size: int, channels: int, fit: str, box: Box | None = None) -> npt.NDArray[np.uint8]:
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


def _padded(picture: Image.Image, size: int, channels: int, width: float, height: float) -> npt.NDArray[np.uint8]:
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
        area, ratio = (
            width * height * rng.uniform(min_area, 1.0),
            math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3))),
        )
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _content(path: Path) -> bytes:
    if reason := no_decoder(path):
        raise BadPicture(reason)
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):  # a read of a pipe would wait for ever
            raise BadPicture("not a file")
        if facts.st_size > MAX_BYTES:
            raise BadPicture(f"has more than {MAX_BYTES >> 20} MB")
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise BadPicture(f"cannot be read: {getattr(error, 'strerror', error)}") from error
    if not content:
        raise BadPicture("empty")
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
    except Image.UnidentifiedImageError as error:
        raise BadPicture(f"not an image ({', '.join(FORMATS).lower()})") from error
    except Image.DecompressionBombError as error:
        raise BadPicture(f"has more than {MAX_PIXELS // 1_000_000} million pixels") from error
    except Exception as error:
        raise BadPicture(f"damaged: {' '.join(str(error).split()) or type(error).__name__}") from error


def _colorless(pixels: npt.NDArray[np.uint8]) -> bool:
    return all((part[..., 1:] == part[..., :1]).all() for part in (pixels[::16], pixels))  # a few rows often suffice


def _decoded(content: bytes, least: int = 0) -> tuple[Image.Image, Box]:
    """Returns a picture in mode L or RGB, upright, and what it covers of its pixels.

    With `least`, a JPEG may be decoded at a half, a quarter or an eighth, its sides not below that many pixels. Sides
    that do not divide then end within the last pixel.
    """
    picture = Image.open(io.BytesIO(content), formats=FORMATS)
    if picture.width * picture.height > MAX_PIXELS:
        raise BadPicture(f"has more than {MAX_PIXELS // 1_000_000} million pixels")
    drafted = None
    # Turned, the last pixel could be the first: such a picture is decoded as it is. Of no other format may the EXIF be
    # asked for here: a PNG is decoded to find it, and if that fails, `load` below takes it for done and black.
    if least and picture.format in ("JPEG", "MPO") and _orientation(picture) == 1:
        drafted = picture.draft(None, (least, least))
    picture.load()
    upright = _upright(picture)
    return upright, drafted[1] if drafted else (0.0, 0.0, float(upright.width), float(upright.height))


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF raises whatever its reader meets; the pixels count
        return 1


def _upright(picture: Image.Image) -> Image.Image:
    """Returns a loaded picture in mode L or RGB, turned as its EXIF says."""
    upright = ImageOps.exif_transpose(picture) if _orientation(picture) != 1 else picture
    if picture.mode == "I" and picture.format != "PPM":  # whose numbers Pillow has brought to 0..65535
        raise BadPicture("has 32-bit pixels; save it with 8 or 16 bits a channel")
    if picture.mode.startswith("I"):
        return Image.fromarray(_eight_bits(upright))
    if picture.mode == "F":
        raise BadPicture("has floating-point pixels; save it with 8 or 16 bits a channel")
    if upright.has_transparency_data:
        above = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    return upright.convert("L" if picture.mode in _GREY_MODES else "RGB")


def _eight_bits(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """Returns 16-bit grey pixels with 8: 0..65535 to 0..255."""
    pixels = np.asarray(picture).astype(np.int64)
    return ((pixels + 128) // 257).astype(np.uint8)


def _mode(channels: int) -> str:
    return "L" if channels == 1 else "RGB"


def _array(picture: Image.Image, channels: int) -> npt.NDArray[np.uint8]:
    return np.asarray(picture).reshape(picture.height, picture.width, channels)
