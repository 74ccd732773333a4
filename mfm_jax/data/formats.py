"""Which files are pictures by their names, and which of those are decoded here."""

import os
from pathlib import Path

from PIL import features

# By Pillow's names. It knows more; some of that starts other programs (EPS).
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpx", ".jpf"),
}
_OPTIONAL = {"AVIF": "avif", "JPEG2000": "jpg_2000"}  # a Pillow may have been built without them
FORMATS = tuple(name for name in _SUFFIXES if name not in _OPTIONAL or features.check(_OPTIONAL[name]))
# Pictures that nothing here decodes. Of some camera files, Pillow would take the small preview for the picture.
_OTHERS = (
    *(".heic", ".heif", ".hif", ".jxl", ".jxr", ".svg", ".psd", ".xcf", ".ico", ".tga", ".pcx", ".exr", ".hdr", ".eps"),
    *(".dcm", ".dicom", ".fits", ".svs", ".ndpi"),
    *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".raf", ".orf", ".rw2", ".pef", ".raw"),
)
_DECODED = {suffix for name in FORMATS for suffix in _SUFFIXES[name]}
_PICTURES = {"", *_OTHERS, *(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)}


def may_be_picture(path: str | Path) -> bool:
    """Returns whether a file may be a picture by its name; one without a suffix may: its content decides."""
    return _suffix(path) in _PICTURES


def no_decoder(path: str | Path) -> str:
    """Returns why a picture of this name is not decoded here, "" where it may be."""
    suffix = _suffix(path)
    decoded = not suffix or suffix in _DECODED or suffix not in _PICTURES
    return "" if decoded else f"no decoder for {suffix[1:].upper()} here; convert it to PNG or JPEG"


def _suffix(path: str | Path) -> str:
    return os.path.splitext(path)[1].lower()
