"""Configuration: ml_collections config files in, validated frozen dataclasses out.

`default()` turns the dataclasses of `groups` into a `ConfigDict` that a config file edits and the command line
overrides (`--config.optim.learning_rate=0.05`); `resolve` turns that back into dataclasses, so that code behind it
never meets an unknown field or an impossible value. Only the data can say how many images a class holds, and only the
model which sites it has: `data.build` and `models.create` check those, all before the first training step.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from mfm_jax.config import consistency
from mfm_jax.config.groups import FIELDS, GROUPS, Config
from mfm_jax.config.own import FIELD, Own
from mfm_jax.errors import UserError


def default() -> ml_collections.ConfigDict:
    """Returns every field at its default, as a `ConfigDict` for a config file to edit."""
    return ml_collections.ConfigDict(Config().to_dict())


def resolve(config: ml_collections.ConfigDict | Mapping[str, Any] | Config, own: Own = Own()) -> Config:  # noqa: B008
    """Returns `config`, validated, as frozen dataclasses, with the user's own parts from Python.

    Raises:
      UserError: one line that names the field, its value and what is allowed.
    """
    resolved = (config if isinstance(config, Config) else _parsed(config)).with_own(own)
    for problem in consistency.problems(resolved):
        raise UserError(problem)
    return resolved


def find_own(config: Config) -> None:
    """Finds the user's own parts that `config` names, before anything is made.

    Raises:
      UserError: one is not there.
    """
    for part in FIELD:
        config.own(part)


def _parsed(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    given = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    _no_unknown(given, GROUPS, "")
    parts = {}
    for group, cls in GROUPS.items():
        values = given.get(group, {})
        if not isinstance(values, Mapping):
            raise UserError(f"{group} = {values!r}: expected a group of fields")
        _no_unknown(values, cls.__dataclass_fields__, f"{group}.")
        parts[group] = cls(**{name: FIELDS[f"{group}.{name}"].checked(value) for name, value in values.items()})
    return Config(**parts)


def _no_unknown(given: Mapping[str, Any], allowed: Mapping[str, Any], prefix: str) -> None:
    for key in given:
        if key not in allowed:
            raise UserError(f"{prefix}{key}: no such field; allowed: {', '.join(prefix + a for a in allowed)}")
