"""The trained classifier of a run, as it is tested, from what lies in the workdir: its data set need not be at hand.

Three files make it: `config.json` says which network and method, the checkpoint has the parameters, and
`classifier.json`, which training writes at its start, has what only the data could tell. `load_pretrained` makes one of
pretrained weights and data in their place.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mfm_jax import augment
from mfm_jax import config as config_lib
from mfm_jax import experiment as experiment_lib
from mfm_jax.checkpoint import Checkpointer
from mfm_jax.config import Config
from mfm_jax.data import LongTailData
from mfm_jax.errors import UserError

FILE = "classifier.json"
WHICH = ("last", "best")


class NoBest(UserError):
    """The run has no checkpoint that was best on validation."""


def refuse_run(out: Path) -> None:
    """Checks that what is made of a run does not go into a run's own workdir.

    Raises:
      UserError: `out` holds a run.
    """
    if (out / "config.json").exists():
        raise UserError(f"--out={out}: holds a run; choose another folder")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the training data told: the content of `classifier.json`.

    class_names: K names.
    image_shape: (H, W, C) of an image.
    fit: how a picture of another shape becomes one (`pictures.read`).
    mean, std: of each channel, in units of 0..255; images are normalised by them.
    train_class_counts: K, images of each class that were trained on.
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    fit: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_class_counts: tuple[int, ...]


class Classifier(NamedTuple):
    """A classifier as it is tested: plain, with the running averages.

    facts: what it takes and tells apart.
    config: of its run.
    step: of its checkpoint.
    forward: uint8 `[B, H, W, C]` -> float32 `[B, K]`, the probabilities; a pure JAX function.
    probabilities: the same, compiled, of NumPy arrays.
    """

    facts: Facts
    config: Config
    step: int
    forward: Callable[[jax.Array], jax.Array]
    probabilities: Callable[[np.ndarray], np.ndarray]

    @property
    def class_names(self) -> tuple[str, ...]:
        """K names."""
        return self.facts.class_names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.facts.image_shape


def describe(config: Config, data: LongTailData) -> Facts:
    """Returns the facts of a run's data."""
    height, width, channels = data.train_images.shape[1:]
    return Facts(
        class_names=tuple(data.class_names),
        image_shape=(height, width, channels),
        # The other sources hold arrays, which `sources.resize` squeezes.
        fit=config.data.fit if config.data.source in ("folder", "list") else "squeeze",
        mean=tuple(data.mean.tolist()),
        std=tuple(data.std.tolist()),
        train_class_counts=tuple(data.counts.tolist()),
    )


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
    config, facts = read_config(workdir), _read_facts(workdir)
    checkpoints = Checkpointer(workdir, config.checkpoint, has_validation=True, read_only=True)
    try:
        step = checkpoints.latest_step()
        if step is None:
            raise UserError(f"{workdir}: the run there has no checkpoint yet")
        state, record = checkpoints.restore_tested(step)
        if which == "best":
            step = _best(checkpoints, record, workdir)
            state, _ = checkpoints.restore_tested(step)
    finally:
        checkpoints.close()
    tested = experiment_lib.tested(config, np.asarray(facts.train_class_counts))
    params = tested.params(state)
    return _of(facts, config, step, lambda image: tested.probabilities(params, state.batch_stats, image))


def load_pretrained(config: Config, data: LongTailData) -> Classifier:
    """Returns the classifier with the weights of `model.pretrained` as they are, at step 0.

    What the method does to a classifier after training (`posthoc_la`, `tau_norm`) is done to it too.

    Raises:
      UserError: the file is not one of this classifier's weights, with such a head.
    """
    experiment = experiment_lib.build(config, data)
    assert experiment.init_pretrained is not None
    state = experiment.init_pretrained(whole=True)
    return _of(describe(config, data), config, 0, lambda image: experiment.eval_step(state, image))


def _of(facts: Facts, config: Config, step: int, predict: Callable[[jax.Array], jax.Array]) -> Classifier:
    """Returns the classifier of which `predict` gives the probabilities for normalised images."""
    mean, std = np.asarray(facts.mean, np.float32), np.asarray(facts.std, np.float32)

    def forward(images: jax.Array) -> jax.Array:
        return predict(augment.normalize(images, jnp.asarray(mean), jnp.asarray(std)))

    compiled = jax.jit(forward)
    return Classifier(facts, config, step, forward, lambda images: np.asarray(compiled(images)))


def read_config(workdir: Path) -> Config:
    """Returns the config of the run in `workdir`.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{workdir}: no run there; give the workdir of one")
    try:
        return config_lib.resolve(_read_object(path))
    except ValueError as error:  # not JSON, not text, or a config that is none
        raise UserError(f"{path}: damaged, or of another version of mfm_jax: {error}") from error


def _read_facts(workdir: Path) -> Facts:
    path = workdir / FILE
    way_out = "remove {} and run the training command again, which writes both"
    try:
        fields = _read_object(path)
        return Facts(**{name: _as_tuple(value) for name, value in fields.items()})
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; {way_out.format('results.json beside it')}") from error
    except (TypeError, ValueError) as error:  # TypeError: another set of fields
        raise UserError(f"{path}: damaged; {way_out.format('it and results.json beside it')}") from error


def _read_object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _best(checkpoints: Checkpointer, record: dict[str, Any], workdir: Path) -> int:
    """Returns the step that was best on validation, as the last checkpoint's record has it."""
    scores = [row["balanced_accuracy"] for row in record["rows"] if row["kind"] == "val"]
    step = checkpoints.best_step(max(scores)) if scores else None
    if step is None:
        why = "that checkpoint is lost" if scores else "the run had no validation split"
        raise NoBest(f"{workdir}: no checkpoint that was best on validation ({why}); choose the last")
    return step
