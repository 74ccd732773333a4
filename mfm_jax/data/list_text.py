"""The text of a list file, line by line: encodings, line ends, comments, CSV and its quotes.

Nothing is lost without a word: every line of a file is blank, a comment, part of the header, or comes out as a `Line`,
with what is wrong with it. Where a quote might swallow lines, the file is refused.
"""

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mfm_jax.errors import UserError

SAVE = "save the list as UTF-8"
_COLUMNS = ("path", "label", "group")
_SEPARATORS = ",;\t|"
_SEPARATOR_LINE = re.compile(r'\s*"?sep=([^\w\s"]|\t)\1*"?\s*', re.IGNORECASE)  # Excel's
_COMMENT = re.compile(r"#(\s|#|$)")


class Line(NamedTuple):
    """What a line says."""

    number: int  # from 1
    path: str
    label: str
    group: str
    wrong: str  # why it cannot be used, or ""


def read(file: Path, field: str) -> Iterator[Line]:
    """Yields the lines of a list file that are neither blank nor comments nor a header.

    Args:
      file: a text of `path label` lines, or CSV with the columns path, label and, if wanted, group.
      field: what errors begin with.

    Raises:
      UserError: the file cannot be read, is no text, or has labels or groups that are not UTF-8; a CSV file lacks the
        columns, has one of them twice, or a quoted cell that does not end on its line.
    """
    lines = _text(file, field).split("\n")
    begin, separators = _begin(lines)
    separator = _separator(lines[begin], separators)
    if not separator and (file.suffix.lower() in (".csv", ".tsv") or separators != _SEPARATORS):
        if any(line.strip() for line in lines):
            first = lines[begin].strip()[:80]
            raise UserError(f"{field}: its first line is {first!r}; a CSV file needs the columns path and label")
        return
    for line in _csv(lines, begin, separator, field) if separator else _plain(lines):
        for cell in (line.label, line.group):
            if not is_unicode(cell):
                meant = cell.encode(errors="surrogateescape").decode("latin-1")
                raise UserError(f"{field}: line {line.number}: {meant!r} is not written in UTF-8; {SAVE}")
        yield line


def is_unicode(text: str) -> bool:
    """Whether a text that was read with "surrogateescape" is UTF-8."""
    return text.isascii() or text.encode(errors="ignore").decode() == text


def _text(file: Path, field: str) -> str:
    """Returns the text of a file, each line end as a line feed, bytes that are not UTF-8 as the system gives names."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{field}: {error.strerror}") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            text = content.decode("utf-16")
        except UnicodeDecodeError as error:
            raise UserError(f"{field}: begins as UTF-16, but goes on otherwise ({error.reason}); {SAVE}") from error
    else:
        text = content.decode(errors="surrogateescape")
    text = io.StringIO(text.replace("\ufeff", ""), newline=None).read()
    if "\0" in text:
        raise UserError(
            f"{field}: line {text.count(chr(10), 0, text.index(chr(0))) + 1}: a null character, as in UTF-16 without a"
            f" byte order mark or in what is no text; {SAVE}"
        )
    return text


def _begin(lines: Sequence[str]) -> tuple[int, str]:
    """Returns which line is the first of content, and what may separate its columns."""
    separators = _SEPARATORS
    for i, line in enumerate(lines):
        if given := _SEPARATOR_LINE.fullmatch(line):
            separators = given[1]
        elif not _is_passed_over(line):
            return i, separators
    return len(lines) - 1, separators


def _is_passed_over(line: str) -> bool:
    return not line.strip() or bool(_COMMENT.match(line))


def _separator(line: str, separators: str) -> str:
    """Returns what separates the columns of a CSV file that begins with this line, "" where it is no header."""
    could_be = "path" in line.casefold() and len(line) < csv.field_size_limit()
    found = (mark for mark in separators if could_be and {"path", "label"} <= set(_names(_cells(line, mark))))
    return next(found, "")


def _names(cells: Sequence[str]) -> list[str]:
    return [cell.strip().casefold() for cell in cells]


def _plain(lines: Sequence[str]) -> Iterator[Line]:
    """Yields the lines of a list of `path label` lines."""
    for number, line in enumerate(lines, 1):
        if not _is_passed_over(line):
            path, label = line.rsplit(maxsplit=1) if len(line.split(maxsplit=1)) == 2 else (line, "")
            yield _line(number, _unquoted(path.strip()), _unquoted(label.rstrip(",;")), "")


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def _line(number: int, path: str, label: str, group: str, wrong: str = "") -> Line:
    if not path or not label:
        wrong = wrong or f"not understood: no {'label' if path else 'path'}"
    return Line(number, path, label, group, wrong)


def _csv(lines: Sequence[str], begin: int, separator: str, field: str) -> Iterator[Line]:
    """Yields the rows of a CSV file whose header is the line `begin`, each of one line."""
    columns = _names(_row(lines[begin], begin + 1, separator, field))
    for name in _COLUMNS:
        if columns.count(name) > 1:
            raise UserError(f"{field}: line {begin + 1}: two columns are called {name}; rename one of them")
    wanted = [columns.index(name) if name in columns else len(columns) for name in _COLUMNS]
    for number, line in enumerate(lines[begin + 1 :], begin + 2):
        cells = [] if _is_passed_over(line) else _row(line, number, separator, field)
        if any(cell.strip() for cell in cells):
            path, label, group = ((cells + [""] * (len(columns) + 1))[i].strip() for i in wanted)
            yield _line(number, path, label, group, _wrong(line, cells, separator, len(columns), path + label + group))


def _row(line: str, number: int, separator: str, field: str) -> list[str]:
    """Returns the cells of a line.

    A cell over several lines is refused, though CSV allows it: a quote that somebody forgot makes one, too, of all the
    rows up to the next quote, and nothing distinguishes the two.
    """
    try:
        cells = _cells(f"{line}\n", separator)
    except csv.Error as error:
        raise UserError(f"{field}: line {number}: {error}") from error
    if cells[-1].endswith("\n"):
        raise UserError(
            f"{field}: line {number}: a quote opens a cell that does not end on this line; close it, and write each row"
            " in one line"
        )
    return cells


def _cells(line: str, separator: str, strict: bool = False) -> list[str]:
    """Returns the cells of a line; the last keeps the line's end where its quote is still open."""
    return next(csv.reader([line], delimiter=separator, skipinitialspace=True, strict=strict), [])


def _wrong(line: str, cells: Sequence[str], separator: str, columns: int, read: str) -> str:
    """Returns why the cells of a row may not be what was meant, "" if they are; `read` is what counts of them."""
    if any(cell.strip() for cell in cells[columns:]):
        return f"{len(cells)} cells under {columns} columns; a cell with {separator!r} in it needs quotes"
    if '"' not in line:
        return ""
    try:
        _cells(line, separator, strict=True)
    except csv.Error:
        return "a quote within a quoted cell; write it twice"
    return "a quote without its pair" if '"' in read and line.count('"') % 2 else ""
