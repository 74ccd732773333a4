"""The one exception whose text is meant for the user rather than for a developer, and how it names many things."""

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake the user can mend: its message is one line that names the field or file and the way out.

    A list of files may follow that line. The commands print the message alone and exit with status 2; a library caller
    catches it as a `ValueError`.
    """


def some_of(names: Sequence[str], most: int = 5) -> str:
    """Returns the first `most` names in a row, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
