"""The training steps, as pure functions of state and batches.

`make_step` updates classifier and meta learner, `make_plain_step` the classifier alone, `make_retrain_step` what a
second stage trains on a frozen classifier; `make_eval_step` tests. Every meta learner goes through the same step: MFM,
which modulates features, or one that weighs examples or augments logits (`types.MetaLearner`).

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
     classifier takes them anew first, by plain passes over training batches (`make_statistics`): they lag behind w.

No function here jits, shards or donates; the caller does. Inside `shard_map`, pass `axis_name`: losses are averaged
over that mesh axis before they are differentiated, so that every derivative below is the global one.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.interpreters import partial_eval

from mfm_jax import losses
from mfm_jax.hypergrad import HypergradFn, mixed_mode
from mfm_jax.modulation import learner as modulating
from mfm_jax.types import (
    ApplyFn,
    Batch,
    BilevelState,
    LossFn,
    MetaLearner,
    Metrics,
    Modulate,
    Modulator,
    PyTree,
    no_modulation,
)

Step = Callable[[BilevelState, Batch, Batch], tuple[BilevelState, Metrics]]
PlainStep = Callable[[BilevelState, Batch], tuple[BilevelState, Metrics]]
# step int32 scalar -> weight of each class's loss, [K]
ClassWeights = Callable[[jax.Array], jax.Array]


def init_state(
    key: jax.Array,
    variables: PyTree,
    tx: optax.GradientTransformation,
    modulator: Modulator | MetaLearner | None = None,
    mod_tx: optax.GradientTransformation | None = None,
) -> BilevelState:
    """Returns the state before the first step.

    Args:
      key: typed PRNG key; seeds the modulator and the randomness of the steps.
      variables: what the module's `init` returned: `params`, and `batch_stats` where it has batch norm.
      tx: the classifier's optax chain.
      modulator: None for plain training.
      mod_tx: the modulator's optax chain; needed where there is a modulator that learns.
    """
    mod_key, step_key = jax.random.split(key)
    mod_params = modulator.init(mod_key) if modulator else {}
    return BilevelState(
        step=jnp.zeros((), jnp.int32),
        key=step_key,
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=tx.init(variables["params"]),
        mod_params=mod_params,
        mod_opt_state=mod_tx.init(mod_params) if mod_tx else (),
    )


def make_step(
    apply_fn: ApplyFn,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    modulator: Modulator | MetaLearner,
    mod_tx: optax.GradientTransformation,
    *,
    class_weights: ClassWeights | None = None,
    meta_loss_fn: LossFn = losses.cross_entropy,
    hypergrad: HypergradFn = mixed_mode,
    lagged: bool = True,
    virtual_groups: tuple[str, ...] | None = None,
    bn: str = "fresh",
    parts: int = 1,
    axis_name: str | None = None,
) -> Step:
    """Returns the step `(state, batch, meta_batch) -> (state, metrics)`, which updates w and phi.

    Args:
      apply_fn: `module.apply` of any Flax module whose `__call__` takes the images and `modulate`, and calls
        `modulate(site, features)` at its sites. `train` is passed if `__call__` takes it.
      loss_fn: the per-example loss that is modulated.
      tx: the classifier's optax chain; the meta-gradient goes through it.
      modulator: from `modulation`, or another meta learner.
      mod_tx: the modulator's optax chain.
      class_weights: multiply each example's loss by its class's weight at this step; None for no weights.
      meta_loss_fn: per-example loss of the plain pass on the meta batch.
      hypergrad: the route to the meta-gradient.
      lagged: take w_hat as the real step; otherwise repeat the step under the new phi.
      virtual_groups: top-level groups of `params` that move in the virtual step; None for all. The real step moves
        all parameters in any case.
      bn: statistics of the meta pass, "fresh", "running" or "batch" (above).
      parts: compute each pass over so many equal parts of its batch, one after another, and their activations again in
        the backward pass: less memory, a third more time, and the same losses, derivatives and update but that batch
        norm sees a part at a time (its running averages move by the mean of the parts' statistics).
      axis_name: mesh axis over which batches are split.

    Raises:
      ValueError: `lagged` with a meta learner whose phi belongs to one batch; at the first call, a virtual group that
        the parameters do not have.
    """
    learner = modulating(modulator) if isinstance(modulator, Modulator) else modulator
    if learner.per_batch and lagged:
        raise ValueError("lagged = True: the weights belong to one batch, the next step cannot use them")
    forward = _forward(apply_fn, axis_name)
    gradient_step = _gradient_step(forward, loss_fn, tx, learner, parts, axis_name, class_weights)
    plain_statistics = _plain_statistics(forward, parts)
    fresh_statistics = make_statistics(apply_fn, parts=parts, axis_name=axis_name)
    outer = optax.with_extra_args_support(mod_tx)

    def step(state: BilevelState, batch: Batch, meta_batch: Batch) -> tuple[BilevelState, Metrics]:
        def meta_loss(params: PyTree) -> tuple[jax.Array, None]:
            measured = state
            if bn == "fresh":
                measured = state.replace(batch_stats=fresh_statistics(state, jax.lax.stop_gradient(params), batch))

            def logits_of(part: Batch) -> tuple[jax.Array, PyTree]:
                return forward(measured, params, part, no_modulation, train=bn == "batch")

            logits, _ = _in_parts(logits_of, meta_batch, parts)
            return _mean(meta_loss_fn(logits, meta_batch.label), meta_batch, axis_name), None

        train_loss, update = gradient_step(state, batch)
        active = _active(state.params, virtual_groups)
        before = learner.per_batch(batch.label) if learner.per_batch else state.mod_params
        found = hypergrad(train_loss, meta_loss, update, state.params, before, active)
        mean = functools.partial(_mean, batch=batch, axis_name=axis_name)
        changes, mod_opt_state = outer.update(found.grad, state.mod_opt_state, before, mean=mean)
        mod_params = optax.apply_updates(before, changes)

        (loss, aux), inner_grad, updated = found.train, found.inner_grad, found.updated
        if not lagged:
            (loss, aux), inner_grad = jax.value_and_grad(train_loss, has_aux=True)(state.params, mod_params)
            updated = update(inner_grad)
        statistics = plain_statistics(state, mod_params, batch, train_loss, aux[1])
        new_state = _advance(state, updated, statistics).replace(
            mod_params=state.mod_params if learner.per_batch else mod_params, mod_opt_state=mod_opt_state
        )
        metrics = {
            "loss": loss,
            "accuracy": aux[0],
            "grad_norm": optax.tree.norm(inner_grad),
            "meta_loss": found.meta[0],
            "hypergrad_norm": _norm(found.grad, axis_name if learner.per_batch else None),
            "hypergrad_agreement": _agreement(found.grad, state.mod_opt_state),
        }
        return new_state, metrics

    return step


def make_plain_step(
    apply_fn: ApplyFn,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    modulator: Modulator | MetaLearner | None = None,
    *,
    class_weights: ClassWeights | None = None,
    parts: int = 1,
    axis_name: str | None = None,
) -> PlainStep:
    """Returns the step `(state, batch) -> (state, metrics)` that updates w alone.

    Without a modulator it is ordinary training. With one, the pass is modulated and phi stays as it is: the steps
    between two meta-steps, or a frozen modulator. A phi that belongs to one batch does not exist between meta-steps;
    those steps are plain. Arguments as in `make_step`.
    """
    learner = modulating(modulator) if isinstance(modulator, Modulator) else modulator
    if learner is None or learner.per_batch:
        learner = MetaLearner(init=lambda key: {})
    forward = _forward(apply_fn, axis_name)
    gradient_step = _gradient_step(forward, loss_fn, tx, learner, parts, axis_name, class_weights)
    plain_statistics = _plain_statistics(forward, parts)

    def step(state: BilevelState, batch: Batch) -> tuple[BilevelState, Metrics]:
        train_loss, update = gradient_step(state, batch)
        (loss, (accuracy, statistics)), grad = jax.value_and_grad(train_loss, has_aux=True)(
            state.params, state.mod_params
        )
        statistics = plain_statistics(state, state.mod_params, batch, train_loss, statistics)
        metrics = {"loss": loss, "accuracy": accuracy, "grad_norm": optax.tree.norm(grad)}
        return _advance(state, update(grad), statistics), metrics

    return step


def make_retrain_step(
    apply_fn: ApplyFn,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    attach: Callable[[PyTree, PyTree], PyTree],
    *,
    axis_name: str | None = None,
) -> PlainStep:
    """Returns the step `(state, batch) -> (state, metrics)` of a second stage, which updates `mod_params` alone.

    The classifier is frozen and passes are as at test time, by running averages: what is trained is fitted to the
    features that the test will see, and no backward pass goes below it.

    Args:
      apply_fn: as in `make_step`.
      loss_fn: the per-example training loss.
      tx: the optax chain of what is trained; its state is `mod_opt_state`.
      attach: `(params, mod_params) -> params` of the classifier with what is trained in its place.
      axis_name: mesh axis over which batches are split.
    """
    forward = _forward(apply_fn, axis_name)

    def step(state: BilevelState, batch: Batch) -> tuple[BilevelState, Metrics]:
        def train_loss(trained: PyTree) -> tuple[jax.Array, jax.Array]:
            logits, _ = forward(state, attach(state.params, trained), batch, no_modulation, train=False)
            return _mean(_example_losses(loss_fn, logits, batch), batch, axis_name), _accuracy(logits, batch, axis_name)

        (loss, accuracy), grad = jax.value_and_grad(train_loss, has_aux=True)(state.mod_params)
        changes, mod_opt_state = tx.update(grad, state.mod_opt_state, state.mod_params)
        trained = optax.apply_updates(state.mod_params, changes)
        metrics = {"loss": loss, "accuracy": accuracy, "grad_norm": optax.tree.norm(grad)}
        return state.replace(step=state.step + 1, mod_params=trained, mod_opt_state=mod_opt_state), metrics

    return step


def make_eval_step(apply_fn: ApplyFn) -> Callable[[PyTree, PyTree, jax.Array], jax.Array]:
    """Returns `(params, batch_stats, image) -> probabilities [B, K]`: plain, running averages, no modulator."""
    options: dict[str, Any] = {"modulate": no_modulation} | ({"train": False} if _takes_train(apply_fn) else {})

    def eval_step(params: PyTree, batch_stats: PyTree, image: jax.Array) -> jax.Array:
        return jax.nn.softmax(apply_fn({"params": params, "batch_stats": batch_stats}, image, **options))

    return eval_step


def make_statistics(
    apply_fn: ApplyFn, *, parts: int = 1, axis_name: str | None = None
) -> Callable[[BilevelState, PyTree, Batch], PyTree]:
    """Returns `(state, params, batch) -> batch statistics` of a plain training pass alone, without the averages so far.

    Running averages are linear in what they were, after = m before + (1 - m) new, with a slope m that forward mode
    reads off, so that new = before + (after - before) / (1 - m), whatever momentum the module has. A frozen layer, of
    slope 1, keeps its averages, which it is tested with.

    Args:
      apply_fn, parts, axis_name: as in `make_step`.
    """
    plain_pass = _plain_pass(_forward(apply_fn, axis_name), parts)

    def statistics(state: BilevelState, params: PyTree, batch: Batch) -> PyTree:
        def averages(before: PyTree) -> PyTree:
            return plain_pass(state.replace(batch_stats=before), params, batch)

        def fresh(before: jax.Array, after: jax.Array, m: jax.Array) -> jax.Array:
            return jnp.where(m < 1, before + (after - before) / jnp.where(m < 1, 1 - m, 1), before)

        before = state.batch_stats
        after, slope = jax.jvp(averages, (before,), (jax.tree.map(jnp.ones_like, before),))
        return jax.tree.map(fresh, before, after, slope)

    return statistics


def _forward(apply_fn: ApplyFn, axis_name: str | None = None) -> Callable[..., tuple[jax.Array, PyTree]]:
    """Returns `(state, params, batch, modulate, train) -> (logits, new batch statistics)`."""
    takes_train = _takes_train(apply_fn)

    def forward(
        state: BilevelState, params: PyTree, batch: Batch, modulate: Modulate, *, train: bool
    ) -> tuple[jax.Array, PyTree]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        options: dict[str, Any] = {"modulate": modulate}
        if takes_train:
            options["train"] = train
        if not train:
            return apply_fn(variables, batch.image, **options), state.batch_stats
        if batch.weight is not None and state.batch_stats:
            options["weight"] = batch.weight
        key = jax.random.fold_in(state.key, state.step)
        if axis_name:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        logits, written = apply_fn(variables, batch.image, mutable=["batch_stats"], rngs={"dropout": key}, **options)
        return logits, written.get("batch_stats", {})

    return forward


def _takes_train(apply_fn: ApplyFn) -> bool:
    """Whether to pass `train`: where the module's `__call__` takes it, or is out of sight."""
    module = getattr(apply_fn, "__self__", None)
    return module is None or "train" in inspect.signature(type(module).__call__).parameters


def _gradient_step(
    forward: Callable[..., tuple[jax.Array, PyTree]],
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    learner: MetaLearner,
    parts: int,
    axis_name: str | None,
    class_weights: ClassWeights | None,
) -> Callable[[BilevelState, Batch], tuple[Callable, Callable]]:
    """Returns `(state, batch) -> (train_loss, update)`, the two halves that every training step is made of."""

    def build(state: BilevelState, batch: Batch) -> tuple[Callable, Callable]:
        chex.assert_equal_shape_prefix(jax.tree.leaves(batch), 1)
        weights = class_weights(state.step) if class_weights else None
        mean = functools.partial(_mean, batch=batch, axis_name=axis_name)

        def train_loss(params: PyTree, mod_params: PyTree) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
            def logits_of(part: Batch) -> tuple[jax.Array, PyTree]:
                return forward(state, params, part, learner.modulate(mod_params, params, part.label), train=True)

            logits, statistics = _in_parts(logits_of, batch, parts)
            values = learner.weigh(mod_params, _example_losses(loss_fn, logits, batch, weights), mean)
            return mean(values), (_accuracy(logits, batch, axis_name), statistics)

        def update(grads: PyTree) -> tuple[PyTree, PyTree]:
            changes, opt_state = tx.update(grads, state.opt_state, state.params)
            return optax.apply_updates(state.params, changes), opt_state

        return train_loss, update

    return build


def _in_parts(logits_of: Callable[[Batch], tuple[jax.Array, PyTree]], batch: Batch, parts: int) -> tuple:
    """Returns `logits_of(batch)`, computed over parts of the batch in turn; batch statistics are the parts' mean."""
    if parts == 1:
        return logits_of(batch)
    split = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch)
    # Within a scan a checkpoint is kept by every backend: what lives at once is one part's activations.
    _, (logits, statistics) = jax.lax.scan(jax.checkpoint(lambda _, part: (None, logits_of(part))), None, split)
    return logits.reshape(-1, logits.shape[-1]), jax.tree.map(lambda leaf: leaf.mean(0), statistics)


def _agreement(grad: PyTree, opt_state: PyTree) -> jax.Array:
    """Returns the cosine of the angle between the meta-gradient and Adam's running mean of those before it.

    0 where there is no such mean: at the first meta-step, and under an optimizer that keeps none.
    """
    mean = optax.tree.get(opt_state, "mu")
    if mean is None:
        return jnp.zeros((), jnp.float32)
    length = optax.tree.norm(grad) * optax.tree.norm(mean)
    return jnp.where(length > 0, optax.tree.vdot(grad, mean) / jnp.where(length > 0, length, 1), 0)


def _example_losses(
    loss_fn: LossFn, logits: jax.Array, batch: Batch, class_weights: jax.Array | None = None
) -> jax.Array:
    """Returns the loss of each example, `[B]`; on mixed labels, the mixture of the two labels' losses."""

    def losses_of(labels: jax.Array) -> jax.Array:
        values = loss_fn(logits, labels)
        return values if class_weights is None else values * class_weights.astype(values.dtype)[labels]

    own = losses_of(batch.label)
    if batch.partner is None or batch.share is None:
        return own
    share = batch.share.astype(own.dtype)
    return share * own + (1 - share) * losses_of(batch.partner)


def _accuracy(logits: jax.Array, batch: Batch, axis_name: str | None) -> jax.Array:
    return _mean((jnp.argmax(logits, axis=-1) == batch.label).astype(logits.dtype), batch, axis_name)


def _plain_statistics(
    forward: Callable, parts: int
) -> Callable[[BilevelState, PyTree, Batch, Callable, PyTree], PyTree]:
    """Returns the function that gives the running averages after this batch (point 2 of the policy).

    It takes the state, phi, the batch, the training loss and the statistics that the training pass wrote; those are the
    plain ones if the modulation cannot reach them, and otherwise a plain pass is run.
    """
    plain_pass = _plain_pass(forward, parts)

    def statistics(
        state: BilevelState, mod_params: PyTree, batch: Batch, train_loss: Callable, written: PyTree
    ) -> PyTree:
        if not _depends(lambda phi: train_loss(state.params, phi)[1][1], mod_params):
            return written
        return plain_pass(state, state.params, batch)

    return statistics


def _plain_pass(forward: Callable, parts: int) -> Callable[[BilevelState, PyTree, Batch], PyTree]:
    """Returns `(state, params, batch) -> running averages` after a plain training pass."""

    def averages(state: BilevelState, params: PyTree, batch: Batch) -> PyTree:
        return _in_parts(lambda part: forward(state, params, part, no_modulation, train=True), batch, parts)[1]

    return averages


def _depends(function: Callable[[PyTree], PyTree], argument: PyTree) -> bool:
    """Whether any output of `function` can depend on `argument`, read off its jaxpr; nothing is computed."""
    jaxpr = jax.make_jaxpr(function)(argument).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return any(used)


def _advance(state: BilevelState, updated: tuple[PyTree, PyTree], batch_stats: PyTree) -> BilevelState:
    params, opt_state = updated
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state, batch_stats=batch_stats)


def _mean(values: jax.Array, batch: Batch, axis_name: str | None) -> jax.Array:
    """Returns the mean of `values [B]` over the whole batch, on however many devices it is; by its weights if any."""
    mean = (values if batch.weight is None else values * batch.weight.astype(values.dtype)).mean()
    return jax.lax.pmean(mean, axis_name) if axis_name else mean


def _norm(tree: PyTree, axis_name: str | None) -> jax.Array:
    """Returns the global norm; with `axis_name`, of a tree that is split over that axis."""
    norm = optax.tree.norm(tree)
    return jnp.sqrt(jax.lax.psum(norm**2, axis_name)) if axis_name else norm


def _active(params: PyTree, groups: tuple[str, ...] | None) -> PyTree | None:
    """Returns a tree like `params` that is True in the chosen top-level groups; None for all."""
    if groups is None:
        return None
    if not set(groups) <= set(params):
        raise ValueError(f"virtual_groups = {groups}: the parameters have the groups {tuple(params)}")
    return {name: jax.tree.map(lambda _, on=name in groups: on, group) for name, group in params.items()}
