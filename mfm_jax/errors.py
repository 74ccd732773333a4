"""The one exception whose text is meant for the user rather than for a developer, and what others say in a line."""

_LONGEST = 200  # characters of somebody else's message


class UserError(ValueError):
    """A mistake the user can mend: its message is one line that names the field or file and the way out.

    A list of files may follow that line. The commands print the message alone and exit with status 2; a library caller
    catches it as a `ValueError`.
    """


def in_a_line(error: Exception) -> str:
    """Returns what another program's error is, for a message of one line: its kind, and the first line of its text."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:_LONGEST]}{'...' if len(text) > _LONGEST else ''}"
