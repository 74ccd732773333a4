"""The one exception whose text is meant for the user rather than for a developer, and the lines that it is made of."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

_LONGEST = 200  # characters of somebody else's message


class UserError(ValueError):
    """A mistake the user can mend: its message is one line that names the field or file and the way out.

    A list of files may follow that line. The commands print the message alone and exit with status 2; a library caller
    catches it as a `ValueError`.
    """


def some_of(names: Sequence[str], most: int = 5) -> str:
    """Returns the first `most` names in a row, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def in_a_line(error: Exception) -> str:
    """Returns what another program's error is, for a message of one line: its kind, and the first line of its text."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:_LONGEST]}{'...' if len(text) > _LONGEST else ''}"


@contextlib.contextmanager
def failing(what: str) -> Iterator[None]:
    """Turns an error of the user's own code into a `UserError` of `what` and the error; a `UserError` passes."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {in_a_line(error)}") from error


def install(extra: str) -> str:
    """Returns the command that installs the extra `extra` of pyproject.toml: into a clone, or to an installed wheel."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").exists():
        return f'python -m pip install "mfm-jax[{extra}]"'
    return f'python -m pip install -e "{"." if root == Path.cwd() else root}[{extra}]"'
