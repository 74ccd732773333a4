"""Training on two views of each image whose features are to agree.

The classifier is trained on both views, by the mean of their losses. Their features go through a projection h and a
predictor q, z = h(x) and p = q(z), and each view's p is drawn to the other's z, which is held:

    L = (L(view 1) + L(view 2)) / 2 + weight * (D(p1, sg(z2)) + D(p2, sg(z1))) / 2        D(p, z) = 1 - cos(p, z)

Projection and predictor are phi: they learn beside the classifier, from the same loss, and are no part of it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mfm_jax.bilevel.passes import Pass
from mfm_jax.bilevel.steps import ClassWeights, PlainStep, example_losses
from mfm_jax.types import Batch, BilevelState, LossFn, Metrics, Modulate, PyTree


class Projection(NamedTuple):
    """What two views are compared behind.

    init: `key -> phi`.
    apply: `(phi, features [B, C]) -> (z, p)`, each `[B, D]`: the projection, and what is predicted from it.
    weight: what the comparison counts beside the loss; 0 leaves the classifier to its loss alone.
    """

    init: Callable[[jax.Array], PyTree]
    apply: Callable[[PyTree, jax.Array], tuple[jax.Array, jax.Array]]
    weight: float


def linear(channels: int, size: int, weight: float) -> Projection:
    """Returns a projection of features `[B, channels]` to `size` numbers, and a predictor, each one linear layer.

    SimSiam has several layers of each; GLMC's code has these, and no batch norm between them.
    """

    def init(key: jax.Array) -> PyTree:
        keys, he = jax.random.split(key), jax.nn.initializers.he_normal()
        inputs = {"project": channels, "predict": size}
        return {
            name: {"kernel": he(key, (width, size), jnp.float32), "bias": jnp.zeros(size, jnp.float32)}
            for key, (name, width) in zip(keys, inputs.items(), strict=True)
        }

    def layer(of: PyTree, x: jax.Array) -> jax.Array:
        found: jax.Array = x @ of["kernel"] + of["bias"][None, :]
        return found

    def apply(phi: PyTree, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = layer(phi["project"], features.astype(phi["project"]["kernel"].dtype))
        return z, layer(phi["predict"], z)

    return Projection(init, apply, weight)


def disagreement(predicted: jax.Array, target: jax.Array) -> jax.Array:
    """Returns `1 - cos(predicted, target)` of each row `[B]`, 0 to 2; no gradient goes into the target.

    The negative cosine similarity and 1, so that a loss with it stays positive.

    References:
      Chen and He, Exploring simple Siamese representation learning, CVPR 2021, eq. 1 to 3.
    """
    target = jax.lax.stop_gradient(target)
    squares = [jnp.sum(x * x, axis=-1) for x in (predicted, target)]
    # Away from zero, where the norm has no derivative.
    lengths = jnp.sqrt(squares[0] + 1e-12) * jnp.sqrt(squares[1] + 1e-12)
    return 1 - jnp.sum(predicted * target, axis=-1) / lengths


def make_views_step(
    forward: Pass,
    loss: LossFn,
    tx: optax.GradientTransformation,
    projection: Projection,
    phi_tx: optax.GradientTransformation,
    *,
    class_weights: ClassWeights | None = None,
) -> PlainStep:
    """Returns the step `(state, batch) -> (state, metrics)` on batches of two views, which updates w and phi.

    The formula is the module's. Each view is normalised by its own batch statistics; the running averages and the
    accuracy are those of the first.

    Args:
      forward: the classifier's pass, which calls the site `pooled`; a batch in one part.
      loss: the per-example training loss.
      tx: the classifier's optax chain.
      projection: what the views are compared behind; its phi is the state's.
      phi_tx: phi's optax chain.
      class_weights: multiply each example's loss by its class's weight at this step; None for no weights.

    Raises:
      ValueError: a pass in several parts.

    References:
      Du et al., Global and local mixture consistency cumulative learning for long-tailed visual recognitions, CVPR
      2023, whose code adds what is averaged here.
    """
    if forward.parts > 1:
        raise ValueError(f"parts = {forward.parts}: features of a whole batch are compared")

    def step(state: BilevelState, batch: Batch) -> tuple[BilevelState, Metrics]:
        weights = class_weights(state.step) if class_weights else None

        def train_loss(params: PyTree, phi: PyTree) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
            params, phi = _of_each_device((params, phi), forward.axis_name)
            seen = [_seen(forward, state, params, view) for view in batch.views]
            values = [
                forward.mean(example_losses(loss, one.logits, view, weights), view)
                for one, view in zip(seen, batch.views, strict=True)
            ]
            (z1, p1), (z2, p2) = (projection.apply(phi, one.features) for one in seen)
            apart = forward.mean((disagreement(p1, z2) + disagreement(p2, z1)) / 2, batch)
            value = (values[0] + values[1]) / 2 + projection.weight * apart
            return value, (forward.accuracy(seen[0].logits, batch), seen[0].averages)

        differentiated = jax.value_and_grad(train_loss, argnums=(0, 1), has_aux=True)
        (value, (accuracy, averages)), (grad, phi_grad) = differentiated(state.params, state.phi)
        changes, opt_state = tx.update(grad, state.opt_state, state.params)
        phi_changes, phi_opt_state = phi_tx.update(phi_grad, state.phi_opt_state, state.phi)
        metrics = {"loss": value, "accuracy": accuracy, "grad_norm": optax.tree.norm(grad)}
        new_state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, changes),
            batch_stats=averages,
            opt_state=opt_state,
            phi=optax.apply_updates(state.phi, phi_changes),
            phi_opt_state=phi_opt_state,
        )
        return new_state, metrics

    return step


def _of_each_device(tree: PyTree, axis_name: str | None) -> PyTree:
    """Returns `tree` as each device's own, so that its gradient is summed over them once, and not once a view."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axis_name, to="varying"), tree)


class _Seen(NamedTuple):
    """What a training pass over a view gives."""

    logits: jax.Array
    features: jax.Array  # [B, C], at `pooled`
    averages: PyTree


def _seen(forward: Pass, state: BilevelState, params: PyTree, view: Batch) -> _Seen:
    found: dict[str, jax.Array] = {}

    def record(site: str, features: jax.Array) -> jax.Array:
        found[site] = features
        return features

    def recording(labels: jax.Array) -> Modulate:
        del labels
        return record

    logits, averages = forward.logits(state, params, view, recording, train=True)
    return _Seen(logits, found["pooled"], averages)
