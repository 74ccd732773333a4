"""What a field of the configuration is: its annotation holds the type, the bounds and the meaning.

    pad: Annotated[int, Bounds(0), "reflect-pad this many pixels, then crop at random; 0 = off"] = 4
    dtype: Annotated[Literal["float32", "bfloat16"], "of the computation; parameters stay float32"] = "float32"

Before the meaning, `MAY_CHANGE` marks a field that a run may go on with at another value, and `OWN` one that may name a
part of the user's own.

A type checker, an editor and `declared` all read an annotation, so the meaning is a plain string in it. A comment is
lost to the program, and a section of the docstring would name every field a second time.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args, get_origin

from mfm_jax.errors import UserError

# Of a field on which no result depends, or whose effect on the data a run's manifest has.
MAY_CHANGE = "may change"
# Of a field whose value may be the import path of the user's own module, source, loss or meta learner.
OWN = "own"
GIVEN = "given"  # what such a field has where the object came from Python and no import path leads to it
_NAME = r"[^\W\d]\w*(\.[^\W\d]\w*)*"


def names_own(value: str) -> bool:
    """Whether a field's value stands for a part of the user's own: `package.module:name`, or `GIVEN`."""
    return value == GIVEN or bool(re.fullmatch(f"{_NAME}:{_NAME}", value))


@dataclass(frozen=True)
class Bounds:
    """The finite numbers from `low` to `high`, both included."""

    low: float
    high: float = math.inf

    def __contains__(self, value: Any) -> bool:
        return self.low <= value <= self.high and math.isfinite(value)

    def __str__(self) -> str:
        return f"{self.low:.10g} or more" if self.high == math.inf else f"{self.low:.10g} to {self.high:.10g}"


class Field(NamedTuple):
    """A field as its annotation declares it.

    path: `group.name`.
    kind: bool, int, float or str.
    default: of that kind.
    choices: what a str may be; () for anything.
    bounds: of an int or a float; None for others.
    meaning: for the reader, one line.
    may_change: whether a run that has begun goes on with another value.
    own: whether it may be an import path.
    """

    path: str
    kind: type[bool | int | float | str]
    default: Any
    choices: tuple[str, ...]
    bounds: Bounds | None
    meaning: str
    may_change: bool = False
    own: bool = False

    @property
    def allowed(self) -> str:
        """The values that it may have, in words."""
        if self.choices or self.own:
            return ", ".join([*sorted(self.choices), *["an import path package.module:name"] * self.own])
        return str(self.bounds or {bool: "True, False", str: "text"}.get(self.kind, "any number"))

    def checked(self, value: Any) -> Any:
        """Returns `value`, an int as a float where the field is one.

        Raises:
          UserError: one line that names the field, its value and what is allowed.
        """
        if self.kind is float and type(value) is int:
            value = float(value)
        if type(value) is not self.kind:
            raise UserError(f"{self.path} = {value!r}: expected {self.kind.__name__}, got {type(value).__name__}")
        choices = (*self.choices, *[self.default] * self.own)
        if self.own and names_own(str(value)):
            return value
        if (choices and value not in choices) or (self.bounds and value not in self.bounds):
            raise UserError(f"{self.path} = {value!r}: allowed: {self.allowed}")
        return value


def declared(group: str, cls: type[Any]) -> dict[str, Field]:
    """Returns the fields of the dataclass `cls` by name; `group` is its name in the configuration."""
    result = {}
    for one in dataclasses.fields(cls):
        kind, *rest, meaning = get_args(one.type)
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        bounds = next((mark for mark in rest if isinstance(mark, Bounds)), None)
        kind, path = str if choices else kind, f"{group}.{one.name}"
        result[one.name] = Field(path, kind, one.default, choices, bounds, meaning, MAY_CHANGE in rest, OWN in rest)
    return result
