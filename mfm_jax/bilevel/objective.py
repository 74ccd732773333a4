"""What a step minimises: the losses of the examples, and losses of the whole batch beside them.

    L(w, phi) = mean_v mean_i c_{y_i} l(z_i^v, y_i)  +  sum_a L_a

over the views v of the batch, one or two, with c the weights of classes and L_a the losses of the whole batch
(`auxiliary`). With a teacher, its predictions have a share in each example's loss (`distillation`). `halves` makes of
it the two functions that every training step is made of.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mfm_jax.bilevel import losses
from mfm_jax.bilevel import outer as outer_lib
from mfm_jax.bilevel.auxiliary import Auxiliary, Seen
from mfm_jax.bilevel.distillation import Distillation
from mfm_jax.bilevel.hypergrad import Gradient, TrainLoss, Update
from mfm_jax.bilevel.outer import MetaLearner
from mfm_jax.bilevel.passes import UNMODULATED, Pass
from mfm_jax.bilevel.sharpness import Sharpness
from mfm_jax.bilevel.sharpness import gradient as sharp_gradient
from mfm_jax.errors import UserError
from mfm_jax.types import START_PRIOR, Batch, BilevelState, FeatureLoss, LossFn, PyTree

# step int32 scalar -> weight of each class's loss, [K]
ClassWeights = Callable[[jax.Array], jax.Array]


class Objective(NamedTuple):
    """What a step minimises, and where it takes the gradient.

    loss: of an example.
    class_weights: multiply each example's loss by its class's weight at this step; None for no weights.
    beside: losses of the whole batch that are added to the mean of the examples'.
    distillation: how a teacher is learned from; None for no teacher.
    sharpness: where the gradient is taken (`sharpness`); None for at w. The meta-gradient goes `through` it.
    start_tau: strength of the prior in `BilevelState.memory` that the loss's logits are adjusted by; 0 for none.
    """

    loss: LossFn | FeatureLoss
    class_weights: ClassWeights | None = None
    beside: Sequence[Auxiliary] = ()
    distillation: Distillation | None = None
    sharpness: Sharpness | None = None
    start_tau: float = 0.0

    def gradient(self, train_loss: TrainLoss) -> Gradient:
        """Returns `(params, phi) -> ((loss, aux), gradient)` of a batch's loss, as `sharpness` takes it."""
        return sharp_gradient(train_loss, self.sharpness)


def of(given: LossFn | FeatureLoss | Objective) -> Objective:
    """Returns the objective of what may be given in its place: a loss alone."""
    return given if isinstance(given, Objective) else Objective(given)


def halves(
    forward: Pass, objective: Objective, tx: optax.GradientTransformation, learner: MetaLearner
) -> Callable[[BilevelState, Batch], tuple[TrainLoss, Update]]:
    """Returns `(state, batch) -> (train_loss, update)`, the two halves that every training step is made of.

    `train_loss` gives, beside the loss, the accuracy, the running averages and `BilevelState.memory` afterwards; of two
    views, the accuracy and the averages are those of the first. It takes a third argument, too: what each class's loss
    counts, [K].

    Raises:
      UserError: the learner says what a teacher counts, and the objective has none.
    """
    if learner.share and not objective.distillation:
        raise UserError(f"{learner.kind}: says what a teacher counts, and there is none; set method.teacher")
    loss, sites = objective.loss, {site for one in objective.beside for site in one.sites}
    sites |= {"pooled"} if isinstance(loss, FeatureLoss) else set()
    sites |= {UNMODULATED} if objective.distillation else set()

    def build(state: BilevelState, batch: Batch) -> tuple[TrainLoss, Update]:
        chex.assert_equal_shape_prefix(jax.tree.leaves(batch), 1)
        weights = objective.class_weights(state.step) if objective.class_weights else None

        def look(params: PyTree, phi: PyTree, view: Batch) -> tuple[Seen, PyTree]:
            modulate_by, check_sites = outer_lib.noting(learner, functools.partial(learner.modulate, phi, params))
            found, averages = forward.outputs(state, params, view, modulate_by, train=True, sites=sites)
            check_sites()
            return Seen(view, *found), averages

        def of_examples(phi: PyTree, seen: Seen, counted: jax.Array | None) -> jax.Array:
            of_example = loss.at(state.step, seen.features["pooled"]) if isinstance(loss, FeatureLoss) else loss
            if objective.start_tau:
                of_example = losses.with_prior(of_example, state.memory[START_PRIOR], objective.start_tau)
            values = example_losses(of_example, seen.logits, seen.batch, weights)
            if objective.distillation:
                share_of = functools.partial(learner.share, phi) if learner.share else None
                values = objective.distillation.mixed(values, seen, share_of)
            values = learner.weigh(phi, values, functools.partial(forward.mean, batch=seen.batch))
            if counted is not None:
                values = values * _of_labels(lambda labels: counted.astype(values.dtype)[labels], seen.batch)
            return forward.mean(values, seen.batch)

        def train_loss(
            params: PyTree, phi: PyTree, counted: jax.Array | None = None
        ) -> tuple[jax.Array, tuple[jax.Array, PyTree, PyTree]]:
            views = batch.views
            if len(views) > 1:
                params, phi = forward.of_each_device((params, phi))
            (first, averages), *others = [look(params, phi, view) for view in views]
            seen = [first, *(one for one, _ in others)]
            values = [of_examples(phi, one, counted) for one in seen]
            value = sum(values[1:], values[0]) / len(values) if others else values[0]
            memory = {START_PRIOR: state.memory[START_PRIOR]} if objective.start_tau else {}
            for term in objective.beside:
                added, memory[term.name] = term.loss(params, state.memory[term.name], seen, forward)
                value = value + added
            return value, (forward.accuracy(first.logits, first.batch), averages, memory)

        def update(grads: PyTree) -> tuple[PyTree, PyTree]:
            changes, opt_state = tx.update(grads, state.opt_state, state.params)
            return optax.apply_updates(state.params, changes), opt_state

        return train_loss, update

    return build


def example_losses(loss: LossFn, logits: jax.Array, batch: Batch, class_weights: jax.Array | None = None) -> jax.Array:
    """Returns the loss of each example, `[B]`; on mixed labels, the mixture of the two labels' losses.

    It is NaN where the label is no class: a gather would take another one in silence.
    """

    def losses_of(labels: jax.Array) -> jax.Array:
        values = loss(logits, labels)
        values = jnp.where((labels >= 0) & (labels < logits.shape[-1]), values, jnp.nan)
        return values if class_weights is None else values * class_weights.astype(values.dtype)[labels]

    return _of_labels(losses_of, batch)


def _of_labels(value: Callable[[jax.Array], jax.Array], batch: Batch) -> jax.Array:
    """Returns `value(labels)`, [B], of the batch's labels; of mixed ones, the mixture of the two."""
    own = value(batch.label)
    if batch.partner is None or batch.share is None:
        return own
    share = batch.share.astype(own.dtype)
    return share * own + (1 - share) * value(batch.partner)
