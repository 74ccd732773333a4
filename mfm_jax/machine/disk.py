"""Files that are there whole or not at all: a reader finds the old file or the new one, never a part."""

import csv
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def expanded(name: str | os.PathLike[str]) -> Path:
    """Returns a path, `~` resolved where there is such a user."""
    return Path(os.path.expanduser(name))  # the method of `Path` raises where there is none


def write(path: Path, content: str | bytes) -> None:
    """Writes a file, text as UTF-8; what is no text in a file's name (PEP 383) is written as the bytes it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
    temporary.replace(path)


def write_object(path: Path, value: Mapping[str, Any], indent: int | None = 1) -> None:
    """Writes `value` as JSON."""
    write(path, json.dumps(value, indent=indent))


def write_rows(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Writes `rows` as CSV; None is an empty cell."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write(path, text.getvalue())


def unpack(archive: tarfile.TarFile, folder: Path) -> None:
    """Extracts `archive` to `folder`, which no member leaves where Python sees to that (from 3.11.4 on)."""
    archive.extraction_filter = getattr(tarfile, "data_filter", None)
    archive.extractall(folder)
