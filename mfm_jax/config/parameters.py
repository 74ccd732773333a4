"""Fields as the parameters of an estimator: `group__field`, or a name of its own for the common ones."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mfm_jax.config.groups import FIELDS, Config
from mfm_jax.config.lookup import meant
from mfm_jax.errors import UserError

Fields = dict[str, dict[str, Any]]

NAMED = {
    "method.name": "method",
    "model.name": "model",
    "train.epochs": "epochs",
    "train.seed": "random_state",
    "data.val_fraction": "validation_fraction",
}
_SET_BY_FIT = ("data.source", "data.root", "data.name")


def check(name: str) -> None:
    """Checks that `name` is a field, `group__field`, that has no parameter of its own.

    Raises:
      UserError: it is not; the message has what was meant.
    """
    path = _path(name)
    if path in NAMED:
        raise UserError(f"{name}: give it as {NAMED[path]}")
    if path in _SET_BY_FIT:
        raise UserError(f"{name}: fit sets it, by what it is given")
    if path not in FIELDS:
        near = [one.replace(".", "__") for one in meant(path)]
        raise UserError(f"{name}: no such parameter{'; did you mean ' + ' or '.join(near) + '?' if near else ''}")


def of_images(named: Mapping[str, Any], further: Mapping[str, Any], *, kept: bool) -> Fields:
    """Returns the fields of a run on a caller's own images; where they lie is left open.

    They are those of `configs/folder_lt.py`, but that no validation and no test images are set aside.

    `named` has the fields of `NAMED` by path, `further` others by `group__field`. A run that is `kept` may be gone on
    with: it is saved every few epochs then, and else at its end.
    """
    fields = Config().to_dict()
    fields["data"] |= {"source": "npz", "protocol": "natural", "imbalance_factor": 1.0}
    fields["train"]["batch_size"] = fields["meta"]["batch_size"] = 50
    fields["eval"]["test"] = False
    fields["checkpoint"] |= {"keep": 1, "every_epochs": 5 if kept else named["train.epochs"]}
    for path, value in {**named, **{_path(name): value for name, value in further.items()}}.items():
        group, _, field = path.partition(".")
        fields[group][field] = plain(value)
    return fields


def plain(value: Any) -> Any:
    """Returns a NumPy number, as searches over a grid have them, as Python's; anything else untouched."""
    return value.item() if isinstance(value, np.generic) else value


def _path(name: str) -> str:
    return name.replace("__", ".", 1)
