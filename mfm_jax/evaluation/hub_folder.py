"""A classifier as a folder that a model hub can take: its weights in one file, and all else in `config.json`.

`model.safetensors` has the parameters as tested, what a second stage or a post-hoc step made of the head
included, and the batch statistics: float32, under flat names (`params.stage1.block0.conv1.kernel`,
`batch_stats.stem_norm.mean`). `config.json` has the architecture, the facts of the data (`facts.Facts`) and the run's
config. No modulator, no optimizer and no path of the machine is in it.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from mfm_jax import config as config_lib
from mfm_jax.config import Config
from mfm_jax.errors import UserError
from mfm_jax.evaluation import conformal, decisions
from mfm_jax.evaluation import facts as facts_lib
from mfm_jax.evaluation.decisions import Decisions
from mfm_jax.evaluation.facts import Facts
from mfm_jax.machine import disk
from mfm_jax.types import PyTree
from mfm_jax.workdir.files import Workdir

WEIGHTS = "model.safetensors"
_START = ("model.pretrained", "model.init_from", "model.text_features", "modulation.init_from", "method.teacher")


class Stored(NamedTuple):
    """What such a folder holds.

    config: of the run, as `published`.
    facts: its images and classes.
    which: the checkpoint, "last" or "best".
    step: of the checkpoint.
    variables: `params`, as tested, and `batch_stats`.
    sets: the prediction sets; None where there are none.
    decisions: by costs and wanted recalls; None where the likeliest class is named.
    """

    config: Config
    facts: Facts
    which: str
    step: int
    variables: PyTree
    sets: conformal.Sets | None
    decisions: Decisions | None = None


def is_one(folder: Path) -> bool:
    """Whether `folder` was laid out for a hub."""
    return (folder / WEIGHTS).is_file()


def published(config: Config) -> Config:
    """Returns a config without the places of one machine.

    Fields that say where the data lies are empty; of those that say what training started from, the last part stays.
    """
    groups = config.to_dict()
    for path, field in config_lib.FIELDS.items():
        group, name = path.split(".")
        if field.may_change and field.kind is str and not field.choices:
            groups[group][name] = field.default
        elif path in _START and not groups[group][name].startswith("timm/"):
            groups[group][name] = Path(groups[group][name]).name
    return config_lib.resolve(groups)


def write(folder: Path, stored: Stored, more: Mapping[str, Any]) -> None:
    """Writes both files; `more` is what else `config.json` says."""
    content = {
        "library_name": "mfm_jax",
        "architecture": stored.config.model.name,
        "num_classes": len(stored.facts.class_names),
        **dataclasses.asdict(stored.facts),
        "which": stored.which,
        "step": stored.step,
        "prediction_sets": stored.sets and stored.sets.to_dict(),
        "decisions": stored.decisions and stored.decisions.to_dict(),
        **more,
        "run_config": stored.config.to_dict(),
    }
    flat = {name: np.asarray(leaf) for name, leaf in flatten_dict(stored.variables, sep=".").items()}
    disk.write(folder / WEIGHTS, safetensors.numpy.save(flat, metadata={"format": "flax"}))
    disk.write_object(Workdir(folder).config, content, indent=2)


def read(folder: Path) -> Stored:
    """Returns what `write` wrote.

    Raises:
      UserError: a file is missing or damaged, or of another version of mfm_jax.
    """
    path = Workdir(folder).config
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        config, sets, decided = found["run_config"], found["prediction_sets"], found.get("decisions")
        facts, which, step = facts_lib.of_object(found), str(found["which"]), int(found["step"])
        tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: has no {Path(error.filename or path).name}; download or export it again") from error
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{folder}: damaged, or not laid out by mfm-jax export --hub: {error!r}; download or export it again"
        ) from error
    try:
        config = config_lib.resolve(config)
    except UserError as error:
        raise UserError(f"{path}: of another version of mfm_jax: {error}") from error
    sets, decided = sets and conformal.from_dict(sets), decided and decisions.from_dict(decided)
    return Stored(config, facts, which, step, unflatten_dict(tensors, sep="."), sets, decided)
