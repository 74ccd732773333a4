"""How mkdocstrings reads a class here: the lines `name: what it is` of its docstring describe its fields."""

import re

from griffe import Class, Extension

_FIELD = re.compile(r"^(\w+): ")


class Fields(Extension):
    """Makes an `Attributes:` section of the lines of a class's docstring that begin with the name of a field."""

    def on_class(self, *, cls: Class, **_: object) -> None:
        """Called by griffe for every class that has been read."""
        if cls.docstring:
            cls.docstring.value = with_section(cls.docstring.value, set(cls.members))


def with_section(text: str, fields: set[str]) -> str:
    """Returns a docstring whose first block of fields is an `Attributes:` section; others come as they are."""
    blocks = text.split("\n\n")
    for i, block in enumerate(blocks):
        found = _FIELD.match(block)
        if found and found[1] in fields:
            lines = "\n".join("  " + line for line in block.splitlines())
            blocks[i] = f"Attributes:\n{lines}"
            break
    return "\n\n".join(blocks)
