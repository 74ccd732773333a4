"""The training steps, as pure functions of state and batches.

`make_step` updates the classifier and phi, `make_plain_step` the classifier alone, `make_retrain_step` what a second
stage trains on a frozen classifier. Every meta learner goes through the same step: MFM, which modulates features, or
one that weighs examples or augments logits (`outer.MetaLearner`).

One step, with `U` the classifier's real optax update:

    g     = grad_w L_train(w, phi; B)                       under the meta learner, batch statistics
    w_hat = U(w, g)                                         the virtual step
    phi'  = meta_optax(phi, d/dphi L_meta(w_hat(phi)))      plain, on a meta batch
    w'    = w_hat                                           lagged (default), or
    w'    = U(w, grad_w L_train(w, phi'; B))                not lagged

Batch-norm policy, which decides whether the meta-gradient means anything:

  1. The meta pass is normalised by the statistics of a plain pass over the training batch at w_hat (`bn="fresh"`),
     which are constants for the meta-gradient: one forward pass a meta-step. They are right from the first step, at any
     depth and learning rate. Running averages (`bn="running"`) begin at mean 0 and variance 1 and are those of the last
     ten or so steps' networks; a deep network explodes under them, and the first meta-gradients with it. A balanced
     batch normalised by its own statistics (`bn="batch"`) is not the network that will be tested. The meta pass
     writes no statistics.
  2. The running averages always describe the plain network: they come from a plain pass over the training batch.
     Where every modulated site lies behind the last batch norm, the training pass gathers the same numbers and no
     other is run; a site before a batch norm costs one more forward pass.
  3. The averages are updated once a step, whether or not the step is lagged or meta. Whoever tests or stores a
     classifier takes them anew first, by plain passes over training batches (`Pass.statistics`): they lag behind w.

No function here jits, shards or donates; the caller does. Inside `shard_map`, give the `Pass` its `axis_name`: losses
are averaged over that mesh axis before they are differentiated, so that every derivative below is the global one.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import optax

from mfm_jax.bilevel import losses
from mfm_jax.bilevel import outer as outer_lib
from mfm_jax.bilevel import sharpness as sharpness_lib
from mfm_jax.bilevel.hypergrad import HypergradFn, MetaLoss, TrainLoss, Update, depends, mixed_mode, through
from mfm_jax.bilevel.outer import MetaLearner
from mfm_jax.bilevel.passes import Pass
from mfm_jax.bilevel.sharpness import Sharpness
from mfm_jax.types import Batch, BilevelState, LossFn, Metrics, Modulator, PyTree


class Step(Protocol):
    """A training step with a meta batch: updates w and phi."""

    def __call__(self, state: BilevelState, batch: Batch, meta_batch: Batch, /) -> tuple[BilevelState, Metrics]: ...


class PlainStep(Protocol):
    """A training step without one: updates w, or what a second stage trains."""

    def __call__(self, state: BilevelState, batch: Batch, /) -> tuple[BilevelState, Metrics]: ...


# step int32 scalar -> weight of each class's loss, [K]
ClassWeights = Callable[[jax.Array], jax.Array]


class MetaRule(NamedTuple):
    """How a meta-step is taken.

    loss: per-example loss of the plain pass on the meta batch.
    lagged: take w_hat as the real step; otherwise repeat the step under the new phi.
    virtual_groups: top-level groups of `params` that move in the virtual step; None for all. The real step moves all
      parameters in any case.
    bn: statistics of the meta pass (the policy above).
    hypergrad: the route to the meta-gradient.
    """

    loss: LossFn = losses.cross_entropy
    lagged: bool = True
    virtual_groups: tuple[str, ...] | None = None
    bn: Literal["fresh", "running", "batch"] = "fresh"
    hypergrad: HypergradFn = mixed_mode


def init_state(
    key: jax.Array,
    variables: PyTree,
    tx: optax.GradientTransformation,
    init_phi: Callable[[jax.Array], PyTree] | None = None,
    phi_tx: optax.GradientTransformation | None = None,
) -> BilevelState:
    """Returns the state before the first step.

    Args:
      key: typed PRNG key; seeds phi and the randomness of the steps.
      variables: what the module's `init` returned: `params`, and `batch_stats` where it has batch norm.
      tx: the classifier's optax chain.
      init_phi: `key -> phi`, the `init` of a modulator or meta learner; None for plain training.
      phi_tx: phi's optax chain; None where phi stays as it starts.
    """
    phi_key, step_key = jax.random.split(key)
    phi = init_phi(phi_key) if init_phi else {}
    return BilevelState(
        step=jnp.zeros((), jnp.int32),
        key=step_key,
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=tx.init(variables["params"]),
        phi=phi,
        phi_opt_state=phi_tx.init(phi) if phi_tx else (),
    )


def make_step(
    forward: Pass,
    loss: LossFn,
    tx: optax.GradientTransformation,
    governed: Modulator | MetaLearner,
    phi_tx: optax.GradientTransformation,
    rule: MetaRule = MetaRule(),  # noqa: B008 (immutable)
    *,
    class_weights: ClassWeights | None = None,
    sharpness: Sharpness | None = None,
) -> Step:
    """Returns the step `(state, batch, meta_batch) -> (state, metrics)`, which updates w and phi.

    Args:
      forward: the classifier's pass; `Pass.of(module)` for a Flax module.
      loss: the per-example training loss.
      tx: the classifier's optax chain; the meta-gradient goes through it.
      governed: a modulator from `modulation`, or another meta learner.
      phi_tx: phi's optax chain.
      rule: how the meta-step is taken.
      class_weights: multiply each example's loss by its class's weight at this step; None for no weights.
      sharpness: where the gradient is taken (`sharpness`); None for at w. The meta-gradient goes `through` it.

    Raises:
      ValueError: `lagged` with a meta learner whose phi belongs to one batch; at the first call, a virtual group that
        the parameters do not have.
      UserError: at the first call, a site that the module never calls, or of another width, or what `Pass.logits`
        refuses.
    """
    learner = outer_lib.of(governed)
    if learner.per_batch and rule.lagged:
        raise ValueError("lagged = True: the weights belong to one batch, the next step cannot use them")
    two_halves = halves(forward, loss, tx, learner, class_weights)
    outer = optax.with_extra_args_support(phi_tx)

    def step(state: BilevelState, batch: Batch, meta_batch: Batch) -> tuple[BilevelState, Metrics]:
        train_loss, update = two_halves(state, batch)
        meta_loss = _meta_loss(forward, rule, state, batch, meta_batch)
        active = _active(state.params, rule.virtual_groups)
        before = learner.per_batch(batch.label) if learner.per_batch else state.phi
        gradient = sharpness_lib.gradient(train_loss, sharpness)
        route = functools.partial(through, gradient) if sharpness else functools.partial(rule.hypergrad, train_loss)
        found = route(meta_loss, update, state.params, before, active)
        mean = functools.partial(forward.mean, batch=batch)
        changes, phi_opt_state = outer.update(found.grad, state.phi_opt_state, before, mean=mean)
        phi = optax.apply_updates(before, changes)

        (value, aux), inner_grad, updated = found.train, found.inner_grad, found.updated
        if not rule.lagged:
            (value, aux), inner_grad = gradient(state.params, phi)
            updated = update(inner_grad)
        averages = _plain_averages(forward, state, phi, batch, train_loss, aux[1])
        new_state = _advance(state, updated, averages).replace(
            phi=state.phi if learner.per_batch else phi, phi_opt_state=phi_opt_state
        )
        metrics = {
            "loss": value,
            "accuracy": aux[0],
            "grad_norm": optax.tree.norm(inner_grad),
            "meta_loss": found.meta[0],
            "hypergrad_norm": forward.norm(found.grad, by_example=learner.per_batch is not None),
            "hypergrad_agreement": _agreement(found.grad, state.phi_opt_state),
        }
        return new_state, metrics

    return step


def _meta_loss(forward: Pass, rule: MetaRule, state: BilevelState, batch: Batch, meta_batch: Batch) -> MetaLoss:
    """Returns the meta loss of a step (point 1 of the policy)."""

    def meta_loss(params: PyTree) -> tuple[jax.Array, None]:
        measured = state
        if rule.bn == "fresh":
            statistics = forward.statistics(state, jax.lax.stop_gradient(params), batch)
            measured = state.replace(batch_stats=statistics)
        logits, _ = forward.logits(measured, params, meta_batch, train=rule.bn == "batch")
        return forward.mean(_example_losses(rule.loss, logits, meta_batch), meta_batch), None

    return meta_loss


def make_plain_step(
    forward: Pass,
    loss: LossFn,
    tx: optax.GradientTransformation,
    governed: Modulator | MetaLearner | None = None,
    *,
    class_weights: ClassWeights | None = None,
    sharpness: Sharpness | None = None,
) -> PlainStep:
    """Returns the step `(state, batch) -> (state, metrics)` that updates w alone.

    Without a meta learner it is ordinary training. With one, its phi governs the pass and does not change: the steps
    between two meta-steps, or a frozen modulator. A phi that belongs to one batch does not exist between meta-steps;
    those steps are plain. Arguments as in `make_step`.
    """
    learner = outer_lib.of(governed)
    learner = outer_lib.NOTHING if learner.per_batch else learner
    two_halves = halves(forward, loss, tx, learner, class_weights)

    def step(state: BilevelState, batch: Batch) -> tuple[BilevelState, Metrics]:
        train_loss, update = two_halves(state, batch)
        gradient = sharpness_lib.gradient(train_loss, sharpness)
        (value, (accuracy, written)), grad = gradient(state.params, state.phi)
        averages = _plain_averages(forward, state, state.phi, batch, train_loss, written)
        metrics = {"loss": value, "accuracy": accuracy, "grad_norm": optax.tree.norm(grad)}
        return _advance(state, update(grad), averages), metrics

    return step


def make_retrain_step(
    forward: Pass, loss: LossFn, tx: optax.GradientTransformation, attach: Callable[[PyTree, PyTree], PyTree]
) -> PlainStep:
    """Returns the step `(state, batch) -> (state, metrics)` of a second stage, which updates `phi` alone.

    The classifier is frozen and passes are as at test time, by running averages: what is trained is fitted to the
    features that the test will see, and no backward pass goes below it. `forward` and `loss` are as in `make_step`.

    Args:
      tx: the optax chain of what is trained; its state is `phi_opt_state`.
      attach: `(params, phi) -> params` of the classifier with what is trained in its place.
    """

    def step(state: BilevelState, batch: Batch) -> tuple[BilevelState, Metrics]:
        def train_loss(phi: PyTree) -> tuple[jax.Array, jax.Array]:
            logits, _ = forward.logits(state, attach(state.params, phi), batch, train=False)
            return forward.mean(_example_losses(loss, logits, batch), batch), forward.accuracy(logits, batch)

        (value, accuracy), grad = jax.value_and_grad(train_loss, has_aux=True)(state.phi)
        changes, phi_opt_state = tx.update(grad, state.phi_opt_state, state.phi)
        phi = optax.apply_updates(state.phi, changes)
        metrics = {"loss": value, "accuracy": accuracy, "grad_norm": optax.tree.norm(grad)}
        return state.replace(step=state.step + 1, phi=phi, phi_opt_state=phi_opt_state), metrics

    return step


def halves(
    forward: Pass,
    loss: LossFn,
    tx: optax.GradientTransformation,
    learner: MetaLearner,
    class_weights: ClassWeights | None = None,
) -> Callable[[BilevelState, Batch], tuple[TrainLoss, Update]]:
    """Returns `(state, batch) -> (train_loss, update)`, the two halves that every training step is made of.

    `train_loss` takes a third argument, too: what each class's loss counts, [K].
    """

    def build(state: BilevelState, batch: Batch) -> tuple[TrainLoss, Update]:
        chex.assert_equal_shape_prefix(jax.tree.leaves(batch), 1)
        weights = class_weights(state.step) if class_weights else None
        mean = functools.partial(forward.mean, batch=batch)

        def train_loss(
            params: PyTree, phi: PyTree, counted: jax.Array | None = None
        ) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
            modulate_by, check_sites = outer_lib.noting(learner, functools.partial(learner.modulate, phi, params))
            logits, averages = forward.logits(state, params, batch, modulate_by, train=True)
            check_sites()
            values = learner.weigh(phi, _example_losses(loss, logits, batch, weights), mean)
            if counted is not None:
                values = values * _of_labels(lambda labels: counted.astype(values.dtype)[labels], batch)
            return mean(values), (forward.accuracy(logits, batch), averages)

        def update(grads: PyTree) -> tuple[PyTree, PyTree]:
            changes, opt_state = tx.update(grads, state.opt_state, state.params)
            return optax.apply_updates(state.params, changes), opt_state

        return train_loss, update

    return build


def _agreement(grad: PyTree, opt_state: PyTree) -> jax.Array:
    """Returns the cosine of the angle between the meta-gradient and Adam's running mean of those before it.

    0 where there is no such mean: at the first meta-step, and under an optimizer that keeps none.
    """
    mean = optax.tree.get(opt_state, "mu")
    if mean is None:
        return jnp.zeros((), jnp.float32)
    length = optax.tree.norm(grad) * optax.tree.norm(mean)
    return jnp.where(length > 0, optax.tree.vdot(grad, mean) / jnp.where(length > 0, length, 1), 0)


def _example_losses(loss: LossFn, logits: jax.Array, batch: Batch, class_weights: jax.Array | None = None) -> jax.Array:
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


def _plain_averages(
    forward: Pass, state: BilevelState, phi: PyTree, batch: Batch, train_loss: TrainLoss, written: PyTree
) -> PyTree:
    """Returns the running averages after this batch (point 2 of the policy).

    What the training pass has `written` are the plain ones if the modulation cannot reach them; otherwise a plain pass
    is run.
    """
    if depends(lambda phi: train_loss(state.params, phi)[1][1], phi):
        return forward.averages(state, state.params, batch)
    return written


def _advance(state: BilevelState, updated: tuple[PyTree, PyTree], batch_stats: PyTree) -> BilevelState:
    params, opt_state = updated
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state, batch_stats=batch_stats)


def _active(params: PyTree, groups: tuple[str, ...] | None) -> PyTree | None:
    """Returns a tree like `params` that is True in the chosen top-level groups; None for all."""
    if groups is None:
        return None
    if not set(groups) <= set(params):
        raise ValueError(f"virtual_groups = {groups}: the parameters have the groups {tuple(params)}")
    return {name: jax.tree.map(lambda _, on=name in groups: on, group) for name, group in params.items()}
