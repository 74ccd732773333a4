"""The classifier of another run, for a run to start from (`model.init_from`)."""

import sys
from collections.abc import Sequence

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mfm_jax import models
from mfm_jax.bilevel.auxiliary import without_projection
from mfm_jax.config import Config
from mfm_jax.data import LongTailData
from mfm_jax.errors import UserError
from mfm_jax.evaluation import facts
from mfm_jax.machine import cluster
from mfm_jax.machine.disk import expanded
from mfm_jax.methods import table
from mfm_jax.types import PyTree
from mfm_jax.workdir.checkpoint import reading
from mfm_jax.workdir.files import Workdir


def of_run(config: Config, data: LongTailData, params: PyTree, batch_stats: PyTree) -> tuple[PyTree, PyTree]:
    """Returns `(params, batch_stats)` with the weights of the run in `model.init_from`, as its last step left them.

    They are the classifier's own: no phi, and not what a second stage or a post-hoc step made of the head. The head
    starts fresh where the classes are others, or where one is linear and the other normalised; the standard error
    says which, and warns of images that this run holds out and that one was trained on. The run's LoRA is merged into
    its weights; this run's, and adapters that the run has not, start fresh.

    `params` and `batch_stats` are those of the new run's classifier, for their shapes and for what starts fresh.

    Raises:
      UserError: there is no such run, it has no sound checkpoint, or its classifier is another model or of another
        size.
    """
    field, run = f"model.init_from = {config.model.init_from!r}", Workdir(expanded(config.model.init_from))
    if run.path.is_file():
        raise UserError(f"{field}: a file, not a run folder; weights in a file are for model.pretrained")
    try:
        its_config, its_names = run.read_config(), facts.read(run).class_names
        with reading(run, its_config.checkpoint) as (checkpoints, step):
            state = checkpoints.restore_tested(step)[0]
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
    if its_config.model.name != config.model.name:
        raise UserError(
            f"{field}: its classifier is a {its_config.model.name}, here model.name = {config.model.name!r}; set that"
            f" to {its_config.model.name!r}, or start from another run"
        )
    fresh = _why_fresh(config, its_config, data.class_names, its_names)
    ours = flatten_dict({"params": params, "batch_stats": batch_stats}, sep=".")
    tested = models.merged(without_projection(state.params))
    theirs = flatten_dict({"params": tested, "batch_stats": state.batch_stats}, sep=".")
    for name, leaf in ours.items():
        if (fresh and name.startswith("params.head.")) or (models.is_added(name.split(".")) and name not in theirs):
            theirs[name] = leaf
    for name in sorted(ours.keys() | theirs.keys()):
        shapes = [str(list(np.shape(tree[name]))) if name in tree else "absent" for tree in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{field}: its {name.partition('.')[2]} is {shapes[0]}, here it is {shapes[1]}; match model.width,"
                " model.tune, data.channels and, for a ViT, data.image_size"
            )
    if cluster.is_primary():
        said = f"; the head starts fresh: {fresh}" if fresh else ""
        print(f"starts from the classifier of {run.path}, step {int(state.step)}{said}", file=sys.stderr)
        if leaks := run.leaks(data.manifest):
            print(f"warning: {field}: {leaks}", file=sys.stderr)
    found = unflatten_dict(theirs, sep=".")
    return found["params"], found.get("batch_stats", {})


def _why_fresh(config: Config, its_config: Config, names: Sequence[str], its_names: Sequence[str]) -> str:
    """Returns why the head of a run is not for this one, "" where it is."""
    if len(names) != len(its_names):
        return f"that run has {len(its_names)} classes, this one {len(names)}"
    if other := [(a, b) for a, b in zip(its_names, names, strict=True) if a != b]:
        return "the classes are others, such as {!r} there and {!r} here".format(*other[0])
    theirs, ours = map(table.head, (its_config, config))
    if theirs != ours:
        words = {"linear": "linear", "cosine": "normalised", "simplex": "a simplex"}
        return f"that run's is {words[theirs]}, that of {config.method.name} is not"
    if its_config.method.unlabelled and (config.model.start_share or config.method.pretraining_tau):
        return "no label counted where that run's features were trained"
    return ""
