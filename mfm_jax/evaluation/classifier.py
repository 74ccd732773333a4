"""The trained classifier of a run, as tested, from what lies in the workdir: its data set need not be at hand.

Three files make it: the config says which network and method, the checkpoint has the parameters, and the facts, which
training writes at its start, have what only the data could say. `load_pretrained` makes one of pretrained weights and
data in their place. In training, the same type stands for the state so far.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mfm_jax import models
from mfm_jax.bilevel.auxiliary import without_projection
from mfm_jax.config import Config, Own
from mfm_jax.data import LongTailData, augment, batches, sizes
from mfm_jax.errors import UserError
from mfm_jax.evaluation import conformal, decisions, hub_folder, tested
from mfm_jax.evaluation import facts as facts_lib
from mfm_jax.evaluation.decisions import Decisions
from mfm_jax.evaluation.facts import Facts
from mfm_jax.evaluation.tested import Tested
from mfm_jax.fields import names_own
from mfm_jax.methods import heads
from mfm_jax.models import own
from mfm_jax.models.own import Adapted
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.types import BilevelState, PyTree
from mfm_jax.workdir.checkpoint import Checkpointer, hushed, reading
from mfm_jax.workdir.files import Workdir, read_object

WHICH = ("last", "best")
TOLERANCE = 1e-5  # of a probability, between what was exported and the checkpoint


class NoBest(UserError):
    """The run has no checkpoint that was best on validation."""


class Classifier(NamedTuple):
    """A classifier as tested: plain, with the running averages.

    facts: its images and classes.
    config: of its run.
    step: of its checkpoint.
    forward: uint8 `[B, H, W, C]` -> float32 `[B, K]`, the probabilities; a pure JAX function.
    probabilities: the same, compiled, of NumPy arrays; of several batches `[n, B, H, W, C]` too, in one call.
    sets: its prediction sets (`sets.members(probabilities)`); None where there was no validation split, for the
      checkpoint that was best on it, and while a run has not finished.
    decisions: what names a class by `eval.costs` and `eval.recall` (`decisions.named(probabilities)`); None where it is
      the likeliest. Thresholds of recalls are known where prediction sets are.
    variables: `params`, as tested, and `batch_stats`; None where the state of a run in training stands for them.
    features: uint8 `[B, H, W, C]` -> float32 `[B, F]`, what the head reads (the site `pooled`), compiled, of NumPy
      arrays; of a classifier from `load`, else None.
    """

    facts: Facts
    config: Config
    step: int
    forward: Callable[[jax.Array], jax.Array]
    probabilities: Callable[[np.ndarray], np.ndarray]
    sets: conformal.Sets | None = None
    decisions: Decisions | None = None
    variables: PyTree = None
    features: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """K names."""
        return self.facts.class_names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.facts.image_shape


def load(workdir: str | Path, which: str = "last", *, module: Any = None) -> Classifier:
    """Returns the classifier of the run in `workdir`, or that in a folder that was laid out for a hub.

    Args:
      workdir: of the run, finished or not; or what `mfm-jax export RUN --hub=FOLDER` wrote, which has one checkpoint.
      which: "last" for its last checkpoint, "best" for the one that was best on validation.
      module: the user's own, of a run that was given one that no import path leads to.

    Raises:
      UserError: there is no run with such a checkpoint, one of its files is missing or damaged, or `module` is not
        that of the run.
      NoBest: there was no validation split, or the checkpoint that was best on it is lost.
    """
    workdir = Path(workdir)
    if which not in WHICH:
        raise UserError(f"which = {which!r}: allowed: {', '.join(WHICH)}")
    if hub_folder.is_one(workdir):
        return _of_hub(workdir, which)
    config, facts = Workdir(workdir).read_config(), facts_lib.read(Workdir(workdir))
    if module is not None and not names_own(config.model.name):
        raise UserError(f"module: the run in {workdir} has model.name = {config.model.name!r}; leave module out")
    config = config.with_own(Own(module=module))
    with hushed(), reading(Workdir(workdir), config.checkpoint) as (checkpoints, step):
        state, record = checkpoints.restore_tested(step)
        if which == "best":
            step = _best(checkpoints, record, workdir)
            state, _ = checkpoints.restore_tested(step)
    plain = tested.of(config, np.asarray(facts.train_class_counts))
    if isinstance(plain.module, Adapted):
        _check_same(plain.module, config, facts, state)
    found = _of_variables(plain, facts, config, step, plain.params(state), state.batch_stats)
    sets, decided = (_stored(workdir, which, step, name) for name in ("prediction_sets", "decisions"))
    return found._replace(
        sets=conformal.from_dict(sets) if sets else None,
        decisions=decisions.from_dict(decided) if decided else found.decisions,
    )


def _of_variables(
    plain: Tested, facts: Facts, config: Config, step: int, params: PyTree, batch_stats: PyTree
) -> Classifier:
    found = _of(facts, config, step, lambda image: plain.of_params(params, batch_stats, image))
    extract, variables = heads.features(plain.apply), {"params": params, "batch_stats": batch_stats}
    pooled = jax.jit(lambda images: extract(variables, _normalized(facts, images)))
    return found._replace(variables=variables, features=lambda images: np.asarray(pooled(images)))


def _of_hub(folder: Path, which: str) -> Classifier:
    """Returns the classifier in a folder that was laid out for a hub, which has one checkpoint."""
    stored = hub_folder.read(folder)
    if which == "best" and stored.which != which:
        raise NoBest(f"{folder}: has the {stored.which} checkpoint alone; leave which = 'best' out")
    facts, plain = stored.facts, tested.of(stored.config, np.asarray(stored.facts.train_class_counts))
    image = jax.ShapeDtypeStruct((1, *facts.image_shape), jnp.float32)
    drawn = jax.eval_shape(plain.module.init, jax.random.key(0), image)
    expected = {"batch_stats": {}, **drawn, "params": jax.eval_shape(models.merged, drawn["params"])}
    variables = {"batch_stats": {}, **jax.tree.map(jnp.asarray, stored.variables)}
    theirs, ours = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (variables, expected))
    if theirs != ours:
        raise UserError(f"{folder}: {hub_folder.WEIGHTS} is not of the classifier in the config; download it again")
    found = _of_variables(plain, facts, stored.config, stored.step, variables["params"], variables["batch_stats"])
    return found._replace(sets=stored.sets, decisions=stored.decisions)


def _check_same(module: Adapted, config: Config, facts: Facts, state: BilevelState) -> None:
    """Refuses a module of the user's own that has changed since it was trained."""
    field = f"model.name = {config.model.name!r}"
    now = own.seen(module, facts.image_shape, len(facts.class_names), field).params
    shapes = [
        {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (without_projection(state.params), now)
    ]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        then, now = (str(list(shape[name])) if name in shape else "absent" for shape in shapes)
        if then != now:
            raise UserError(f"{field}: its {name} is {now}, and was {then} in the run; give the module of the run")


def load_pretrained(config: Config, data: LongTailData) -> Classifier:
    """Returns the classifier with the weights of `model.pretrained`, untrained, at step 0.

    What the method does to a classifier after training (`posthoc_la`, `tau_norm`) is done to it too.

    Raises:
      UserError: the file is not one of this classifier's weights, with such a head.
    """
    config = sizes.cut(config, data.manifest)  # as training would
    experiment = experiment_lib.build(config, data)
    assert experiment.init_pretrained is not None
    state = experiment.init_pretrained(whole=True)
    facts = facts_lib.describe(config, data)
    return _of(facts, config, 0, lambda image: experiment.tested.probabilities(state, image))


def _of(facts: Facts, config: Config, step: int, predict: Callable[[jax.Array], jax.Array]) -> Classifier:
    """Returns the classifier of which `predict` gives the probabilities for normalised images."""

    def forward(images: jax.Array) -> jax.Array:
        return predict(_normalized(facts, images))

    compiled = jax.jit(functools.partial(batches.each, forward))
    by_cost = decisions.of(config.eval.costs, facts.class_names)
    return Classifier(facts, config, step, forward, lambda images: np.asarray(compiled(images)), decisions=by_cost)


def _normalized(facts: Facts, images: jax.Array) -> jax.Array:
    mean, std = (jnp.asarray(values, jnp.float32) for values in (facts.mean, facts.std))
    return augment.normalize(images, mean, std)


def _stored(workdir: Path, which: str, step: int, name: str) -> dict[str, Any] | None:
    """Returns what the results have of a checkpoint under `name`."""
    path = Workdir(workdir).results
    found = (read_object(path).get(which) or {}) if path.exists() else {}
    return found.get(name) if found.get("step") == step else None


def _best(checkpoints: Checkpointer, record: dict[str, Any], workdir: Path) -> int:
    """Returns the step that was best on validation, as the last checkpoint's record has it."""
    scores = [row["balanced_accuracy"] for row in record["rows"] if row["kind"] == "val"]
    step = checkpoints.best_step(max(scores)) if scores else None
    if step is None:
        why = "that checkpoint is lost" if scores else "the run had no validation split"
        raise NoBest(f"{workdir}: no checkpoint that was best on validation ({why}); choose the last")
    return step
