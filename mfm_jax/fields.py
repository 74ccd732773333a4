"""What a field of the configuration is: its annotation holds the type, the bounds and the meaning.

    pad: Annotated[int, Bounds(0), "reflect-pad this many pixels, then crop at random; 0 = off"] = 4
    dtype: Annotated[Literal["float32", "bfloat16"], "of the computation; parameters stay float32"] = "float32"

A type checker, an editor and `declared` all read an annotation, so the meaning is a plain string in it. A comment is
lost to the program, and a section of the docstring would name every field a second time.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args, get_origin

from mfm_jax.errors import UserError


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
    """

    path: str
    kind: type[bool | int | float | str]
    default: Any
    choices: tuple[str, ...]
    bounds: Bounds | None
    meaning: str

    @property
    def allowed(self) -> str:
        """The values that it may have, in words."""
        if self.choices:
            return ", ".join(sorted(self.choices))
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
        if (self.choices and value not in self.choices) or (self.bounds and value not in self.bounds):
            raise UserError(f"{self.path} = {value!r}: allowed: {self.allowed}")
        return value


def declared(group: str, cls: type[Any]) -> dict[str, Field]:
    """Returns the fields of the dataclass `cls` by name; `group` is its name in the configuration."""
    result = {}
    for one in dataclasses.fields(cls):
        kind, *rest, meaning = get_args(one.type)
        choices, bounds = get_args(kind) if get_origin(kind) is Literal else (), next(iter(rest), None)
        kind = str if choices else kind
        result[one.name] = Field(f"{group}.{one.name}", kind, one.default, choices, bounds, meaning)
    return result
