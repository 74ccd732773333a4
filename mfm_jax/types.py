"""The types that modules pass to each other, in one place.

Classifier and modulator parameters are separate pytrees throughout: no function takes or returns a tree that
mixes them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
from flax import struct

PyTree = Any
START_PRIOR = "start_prior"  # of the state's memory, log q of the classifier before training, [K] (`training.prior`)
PROJECTION = "projection"  # of the classifier's parameters, what a loss of the batch trains and no test has


class Modulate(Protocol):
    """`(site, features [B, ..., C]) -> features`, same shape: what a classifier calls at each of its sites, by name."""

    def __call__(self, site: str, features: jax.Array, /) -> jax.Array: ...


class LossFn(Protocol):
    """`(logits [B, K], labels int32 [B]) -> loss of each example, [B]`, in nats for the cross-entropy family."""

    def __call__(self, logits: jax.Array, labels: jax.Array, /) -> jax.Array: ...


class FeatureLoss(NamedTuple):
    """A loss of each example that reads the features at the site `pooled`, too, and may change with the step.

    at: `(step int32 scalar, features [B, C]) -> LossFn`.
    """

    at: Callable[[jax.Array, jax.Array], LossFn]


# Scalars of one step, by name: `loss`, `accuracy`, `grad_norm`, and of a meta-step those below.
Metrics = dict[str, jax.Array]
META_METRICS = ("meta_loss", "hypergrad_norm", "hypergrad_agreement")

# A Flax module's `apply`: `(variables, images, train=, modulate=, weight=, mutable=, rngs=) -> logits [B, K]`. `train`
# is passed only to modules whose `__call__` takes it, `weight` in training passes over batches that have one, where
# there are batch statistics.
ApplyFn = Callable[..., Any]


def no_modulation(site: str, features: jax.Array) -> jax.Array:
    """The `Modulate` of every plain pass: returns `features` untouched."""
    del site
    return features


class Taught(NamedTuple):
    """What a teacher says of a batch.

    logits: `[B, K]`, of the images as the student sees them.
    typical: `[B, K]`, the mean of its predictions for the training images of an example's class, of mixed ones the
      mixture; None where nothing reads it.
    """

    logits: jax.Array
    typical: jax.Array | None = None


class Batch(NamedTuple):
    """Examples as the classifier sees them.

    `partner` and `share` are there where examples were mixed in pairs, `weight` where the batch was padded, `second`
    where a loss compares two views of the same images, `teacher` where another classifier's predictions are learned.
    """

    image: PyTree  # [B, H, W, C] floating point, normalised; or what else the module takes, a dict of [B, ...] too
    label: jax.Array  # [B] int32, 0 <= label < K
    partner: jax.Array | None = None  # [B] int32, label of the image that was mixed in
    share: jax.Array | None = None  # [B], what `label` has of the mixture, 1/2 to 1; `partner` has the rest
    weight: jax.Array | None = None  # [B], of mean 1: what an example counts in every mean over the batch
    second: "Batch | None" = None  # the same examples in another draw of the augmentation, in the same order; no weight
    teacher: Taught | None = None

    @property
    def views(self) -> tuple["Batch", ...]:
        """The batch, or both views, each a batch of its own with the weights of the first."""
        if self.second is None:
            return (self,)
        return self._replace(second=None), self.second._replace(weight=self.weight)


class Modulator(NamedTuple):
    """Generates gamma and beta (see `modulation`). Both functions are pure.

    init: `key -> phi`, the identity modulation.
    parameters: `(phi, site, features [B, ..., C], labels [B]) -> (gamma, beta)`, each [C] or [B, C].
    sites: the sites it modulates; every other site is left alone.
    """

    init: Callable[[jax.Array], PyTree]
    parameters: Callable[[PyTree, str, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    sites: tuple[str, ...]


class Average(struct.PyTreeNode):
    """Weights beside those that are trained, for the classifier that is tested (see `bilevel.averaging`)."""

    params: PyTree  # like the classifier's
    batch_stats: PyTree  # of the tested classifier
    share: jax.Array  # scalar: what these weights are of the tested ones; those that are trained are the rest


class BilevelState(struct.PyTreeNode):
    """All that changes from step to step. A plain run has empty `phi` and `phi_opt_state`."""

    step: jax.Array  # int32 scalar: steps done
    key: jax.Array  # typed PRNG key, constant: randomness of step t is `fold_in(key, t)`
    params: PyTree  # classifier, float32
    batch_stats: PyTree  # running averages; they describe the plain network
    opt_state: PyTree  # classifier's optax state
    phi: PyTree  # outer parameters: a modulator's, another meta learner's, or what a second stage trains
    phi_opt_state: PyTree  # its optax state
    average: PyTree = ()  # an `Average`; () where what is trained is tested
    # What losses of the whole batch keep, by their names, and `START_PRIOR`.
    memory: PyTree = struct.field(default_factory=dict)
