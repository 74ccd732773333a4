"""Finds fields by what somebody wrote."""

import difflib

from mfm_jax.config.groups import FIELDS, GROUPS
from mfm_jax.errors import UserError
from mfm_jax.fields import Field

_ALIKE = 0.8  # of 1: "learning_rat" is like "learning_rate", "lr" like nothing


def meant(text: str) -> list[str]:
    """Returns the paths of the fields that a misspelt path, or a name without its group, may stand for."""
    group, _, name = text.rpartition(".")
    near = difflib.get_close_matches(name, {path.partition(".")[2] for path in FIELDS}, 1, _ALIKE)
    found = [path for path in FIELDS if path.partition(".")[2] in near]
    return [path for path in found if path.startswith(f"{group}.")] or found


def question(text: str) -> str:
    """Returns "did you mean ...?" with the flags of the fields that are `meant`, or "" where there are none."""
    flags = " or ".join(f"--config.{path}" for path in meant(text))
    return f"did you mean {flags}?" if flags else ""


def fields_of(text: str = "") -> list[Field]:
    """Returns the fields of a group, the one of a path, those of a name in any group, or all of them.

    Raises:
      UserError: there is none; the message has what was meant.
    """
    found = [field for path, field in FIELDS.items() if text in ("", path, *path.split("."))]
    if not found:
        near = meant(text) or difflib.get_close_matches(text, GROUPS, 1)
        way_out = f"did you mean {' or '.join(near)}?" if near else f"groups: {', '.join(GROUPS)}"
        raise UserError(f"{text}: no such group or field; {way_out}")
    return found
