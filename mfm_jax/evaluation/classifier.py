"""The trained classifier of a run, as it is tested, from what lies in the workdir: its data set need not be at hand.

Three files make it: the config says which network and method, the checkpoint has the parameters, and the facts, which
training writes at its start, have what only the data could say. `load_pretrained` makes one of pretrained weights and
data in their place. In training, the same type stands for the state so far.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mfm_jax.config import Config
from mfm_jax.data import LongTailData, augment, sizes
from mfm_jax.errors import UserError
from mfm_jax.evaluation import conformal, tested
from mfm_jax.evaluation import facts as facts_lib
from mfm_jax.evaluation.facts import Facts
from mfm_jax.methods import heads
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.workdir.checkpoint import Checkpointer
from mfm_jax.workdir.files import Workdir, read_object

WHICH = ("last", "best")


class NoBest(UserError):
    """The run has no checkpoint that was best on validation."""


class Classifier(NamedTuple):
    """A classifier as it is tested: plain, with the running averages.

    facts: what it takes and tells apart.
    config: of its run.
    step: of its checkpoint.
    forward: uint8 `[B, H, W, C]` -> float32 `[B, K]`, the probabilities; a pure JAX function.
    probabilities: the same, compiled, of NumPy arrays.
    sets: its prediction sets (`sets.members(probabilities)`); None where there was no validation split, for the
      checkpoint that was best on it, and while a run has not finished.
    features: uint8 `[B, H, W, C]` -> float32 `[B, F]`, what the head reads (the site `pooled`), compiled, of NumPy
      arrays; of a classifier from `load`, else None.
    """

    facts: Facts
    config: Config
    step: int
    forward: Callable[[jax.Array], jax.Array]
    probabilities: Callable[[np.ndarray], np.ndarray]
    sets: conformal.Sets | None = None
    features: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """K names."""
        return self.facts.class_names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.facts.image_shape


def load(workdir: str | Path, which: str = "last") -> Classifier:
    """Returns the classifier of the run in `workdir`.

    Args:
      workdir: of the run, finished or not.
      which: "last" for its last checkpoint, "best" for the one that was best on validation.

    Raises:
      UserError: there is no run with such a checkpoint, or one of its files is missing or damaged.
      NoBest: there was no validation split, or the checkpoint that was best on it is lost.
    """
    workdir = Path(workdir)
    if which not in WHICH:
        raise UserError(f"which = {which!r}: allowed: {', '.join(WHICH)}")
    config, facts = Workdir(workdir).read_config(), facts_lib.read(Workdir(workdir))
    reader = Checkpointer(workdir, config.checkpoint, has_validation=True, read_only=True)
    with contextlib.closing(reader) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise UserError(f"{workdir}: the run there has no checkpoint yet")
        state, record = checkpoints.restore_tested(step)
        if which == "best":
            step = _best(checkpoints, record, workdir)
            state, _ = checkpoints.restore_tested(step)
    plain = tested.of(config, np.asarray(facts.train_class_counts))
    params = plain.params(state)
    found = _of(facts, config, step, lambda image: plain.of_params(params, state.batch_stats, image))
    extract = heads.features(plain.apply)
    variables = {"params": params, "batch_stats": state.batch_stats}
    pooled = jax.jit(lambda images: extract(variables, _normalized(facts, images)))
    return found._replace(sets=_sets(workdir, which, step), features=lambda images: np.asarray(pooled(images)))


def load_pretrained(config: Config, data: LongTailData) -> Classifier:
    """Returns the classifier with the weights of `model.pretrained` as they are, at step 0.

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

    compiled = jax.jit(forward)
    return Classifier(facts, config, step, forward, lambda images: np.asarray(compiled(images)))


def _normalized(facts: Facts, images: jax.Array) -> jax.Array:
    mean, std = (jnp.asarray(values, jnp.float32) for values in (facts.mean, facts.std))
    return augment.normalize(images, mean, std)


def _sets(workdir: Path, which: str, step: int) -> conformal.Sets | None:
    """Returns the prediction sets that the results have of a checkpoint."""
    path = Workdir(workdir).results
    found = (read_object(path).get(which) or {}) if path.exists() else {}
    sets = found.get("prediction_sets") if found.get("step") == step else None
    return sets and conformal.from_dict(sets)


def _best(checkpoints: Checkpointer, record: dict[str, Any], workdir: Path) -> int:
    """Returns the step that was best on validation, as the last checkpoint's record has it."""
    scores = [row["balanced_accuracy"] for row in record["rows"] if row["kind"] == "val"]
    step = checkpoints.best_step(max(scores)) if scores else None
    if step is None:
        why = "that checkpoint is lost" if scores else "the run had no validation split"
        raise NoBest(f"{workdir}: no checkpoint that was best on validation ({why}); choose the last")
    return step
