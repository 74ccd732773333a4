"""The one exception whose text is meant for the user rather than for a developer."""


class UserError(ValueError):
    """A mistake the user can mend: its message is one line that names the field or file and the way out.

    A list of files may follow that line. The commands print the message alone and exit with status 2; a library caller
    catches it as a `ValueError`.
    """
