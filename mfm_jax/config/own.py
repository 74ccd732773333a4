"""Parts of the user's own: which fields name them, and how an import path and an object from Python become one another.

A part is an object, or a callable that makes it (a class is one). What is called with what stands where the part is
used: `models.own`, `data.own` and `methods.own`.
"""

import importlib
import sys
from dataclasses import dataclass
from typing import Any

from mfm_jax.errors import UserError, in_a_line
from mfm_jax.fields import GIVEN, names_own

# The field that names a part, as `group.field`.
FIELD = {"module": "model.name", "source": "data.source", "loss": "method.loss", "learner": "method.learner"}


@dataclass(frozen=True)
class Own:
    """Objects from Python in the places of what a config names; None leaves a part as the config says.

    module: a Flax module, or `num_classes -> module` (`models.own`).
    source: a `data.sources.Source`, or `config.data -> Source` (`data.own`).
    loss: `(logits [B, K], labels [B]) -> [B]`, with a third argument `counts` if it has one (`methods.own`).
    learner: a `MetaLearner` or `Modulator`, or `(config, counts, channels) -> ` one (`methods.own`).
    """

    module: Any = None
    source: Any = None
    loss: Any = None
    learner: Any = None


def path_of(part: Any) -> str:
    """Returns the import path that leads to an object, `GIVEN` where there is none (of `__main__`, local)."""
    module, name = getattr(part, "__module__", None), getattr(part, "__qualname__", None)
    found, path = sys.modules.get(str(module)), f"{module}:{name}"
    for attribute in str(name).split("."):
        found = getattr(found, attribute, None)
    return path if found is part and module != "__main__" and names_own(path) else GIVEN


def find(part: str, value: str, given: Any) -> Any:
    """Returns the user's own `part`, a key of `FIELD`; None where the field has the name of a built-in one.

    `value` is the field's; `given` is the object from Python, None without one.

    Raises:
      UserError: there is nothing at the import path, or an object that only Python can give is not given.
    """
    if not names_own(value):
        return None
    field = f"{FIELD[part]} = {value!r}"
    if given is not None:
        return given
    if value == GIVEN:
        raise UserError(
            f"{field}: an object that no import path leads to; pass it from Python, {part}=..., or put it in a module"
            " and name it package.module:name"
        )
    module, _, name = value.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # a module is a program, which can raise anything
        where = "modules are looked for in the current folder and on PYTHONPATH"
        raise UserError(f"{field}: {module} cannot be imported ({in_a_line(error)}); {where}") from error
    for attribute in name.split("."):
        if not hasattr(found, attribute):
            raise UserError(f"{field}: {module} has no {name}; name what is there, package.module:name")
        found = getattr(found, attribute)
    return found
