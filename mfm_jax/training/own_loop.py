"""MFM's recipe for a training loop of one's own: what the default `method.name` uses, in one call."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from mfm_jax.bilevel import MetaRule
from mfm_jax.config import Config
from mfm_jax.errors import UserError
from mfm_jax.methods.table import METHODS
from mfm_jax.training import recipe as recipes
from mfm_jax.types import Modulator

_DEFAULT = Config()


class Parts(NamedTuple):
    """What `make_step` and a loop around it take.

    modulator: `modulation.frequency` at the site `logits`, three numbers in all.
    phi_tx: its optax chain, Adam on the meta-gradients' directions (`optim.outer`).
    rule: how a meta-step is taken.
    share: float32 `[K]`, how often each class is drawn: in proportion to the square root of its images.
    every: a meta-step is taken every so many steps, a plain one in between.
    """

    modulator: Modulator
    phi_tx: optax.GradientTransformation
    rule: MetaRule
    share: npt.NDArray[np.float32]
    every: int


def recipe(
    counts: npt.ArrayLike, learning_rate: optax.ScalarOrSchedule = _DEFAULT.meta.learning_rate, every: int = 0
) -> Parts:
    """Returns the parts of MFM as the commands train it by default, for a module that calls `modulate("logits", ...)`.

    Args:
      counts: training images of each class, `[K]`, each at least 1.
      learning_rate: how far phi moves in a meta-step where meta-gradients agree. A schedule counts meta-steps; the
        commands let it fall with the classifier's rate (`optim.meta_schedule`).
      every: steps from one meta-step to the next; 0 for the commands' default. A run of a few hundred steps wants 1.

    Raises:
      UserError: a class has no image.
    """
    images = np.asarray(counts)
    if images.ndim != 1 or len(images) < 2 or (images < 1).any():
        raise UserError(
            f"counts = {images.tolist()}: allowed: the training images of two classes or more, each 1 or more"
        )
    method = METHODS[_DEFAULT.method.name]
    assert method.learner is not None
    learner = method.learner(_DEFAULT, jnp.asarray(images), {"logits": len(images)})
    draw = method.sampler(_DEFAULT, images, 0)
    assert learner.modulator is not None
    assert draw is not None
    phi_tx = learner.optimizer(learning_rate)  # optax takes a number, too
    return Parts(learner.modulator, phi_tx, recipes.meta_rule(_DEFAULT), draw.share, every or _DEFAULT.meta.every)
