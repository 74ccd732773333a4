"""The derivative of the meta loss through one optimizer step.

    g     = grad_w L_train(w, phi)
    w_hat = U(w, g)                      U: the classifier's real optax update
    want  = d/dphi L_meta(w_hat(phi))

`reverse_over_reverse` differentiates that program as it stands: reverse mode through a program that itself runs
reverse mode. `mixed_mode` gives the same number for less, by the chain rule read from the right:

    v    = (dU/dg)^T grad L_meta(w_hat)                               one vjp of the update
    want = d/deps grad_phi L_train(w + eps v, phi) at eps = 0         forward mode over reverse mode

since d/dphi <g(phi), v> = (d/dw grad_phi L_train) v. The last line is one tangent pass over the part of the
program that grad_phi needs: for a site near the output, a tangent forward pass and next to nothing behind it. The
primal of that pass is the inner gradient's own forward pass (`jax.linearize` shares it).

`through` is reverse mode through a step that does not descend along grad_w L_train itself.

No function here knows about models, batches or modulation: losses and the update come as pure functions.

References:
  Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 1994 (forward over reverse).
  Finn et al., Model-agnostic meta-learning, ICML 2017 (a gradient through a gradient step).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from mfm_jax.types import PyTree

# (params, phi) -> (scalar loss, aux)
TrainLoss = Callable[..., tuple[jax.Array, Any]]
# (params, phi) -> ((scalar loss, aux), what the optimizer gets)
Gradient = Callable[..., tuple[tuple[jax.Array, Any], PyTree]]
# params -> (scalar loss, aux)
MetaLoss = Callable[[PyTree], tuple[jax.Array, Any]]
# grads -> (new params, aux); aux holds the new optimizer state
Update = Callable[[PyTree], tuple[PyTree, Any]]


class Hypergrad(NamedTuple):
    """The meta-gradient and all that was computed on the way to it.

    grad: d L_meta(w_hat(phi)) / d phi, like `phi`.
    train: (loss, aux) of the inner loss at (w, phi).
    meta: (loss, aux) of the meta loss at w_hat.
    inner_grad: g, like `params`.
    updated: (U(w, g), aux): the full update, which is also a lagged real step.
    """

    grad: PyTree
    train: tuple[jax.Array, Any]
    meta: tuple[jax.Array, Any]
    inner_grad: PyTree
    updated: tuple[PyTree, Any]


class HypergradFn(Protocol):
    """The signature that both routes share."""

    def __call__(
        self,
        train_loss: TrainLoss,
        meta_loss: MetaLoss,
        update: Update,
        params: PyTree,
        phi: PyTree,
        active: PyTree | None = None,
    ) -> Hypergrad:
        """Returns the meta-gradient.

        Args:
          train_loss: the inner loss L_train(w, phi).
          meta_loss: the outer loss L_meta(w).
          update: U with w and the optimizer's state closed over.
          params: w.
          phi: phi.
          active: like `params`, a bool a leaf: the leaves that move in the virtual step. For the others w_hat stays at
            w and their gradient counts as a constant. None: all of them.
        """
        ...


def mixed_mode(
    train_loss: TrainLoss,
    meta_loss: MetaLoss,
    update: Update,
    params: PyTree,
    phi: PyTree,
    active: PyTree | None = None,
) -> Hypergrad:
    """Returns the meta-gradient by forward over reverse mode; exact (see the module's text and `HypergradFn`)."""
    select, merge = _partition(params, active)

    def modulation_grad(active_params: list[jax.Array]) -> tuple[PyTree, Any]:
        value, grads = jax.value_and_grad(train_loss, argnums=(0, 1), has_aux=True)(merge(active_params), phi)
        return grads[1], (value, grads[0])

    _, tangent_of_grad, (train, inner_grad) = jax.linearize(modulation_grad, select(params), has_aux=True)
    new_params, pull_back, update_aux = jax.vjp(update, inner_grad, has_aux=True)
    meta, meta_grad = jax.value_and_grad(lambda leaves: meta_loss(merge(leaves)), has_aux=True)(select(new_params))
    zeros = jax.tree.map(jnp.zeros_like, new_params)
    (v,) = pull_back(_partition(zeros, active)[1](meta_grad))
    return Hypergrad(tangent_of_grad(select(v)), train, meta, inner_grad, (new_params, update_aux))


def reverse_over_reverse(
    train_loss: TrainLoss,
    meta_loss: MetaLoss,
    update: Update,
    params: PyTree,
    phi: PyTree,
    active: PyTree | None = None,
) -> Hypergrad:
    """Returns the meta-gradient by reverse over reverse mode: slower, plainer; the oracle for `mixed_mode`."""
    return through(jax.value_and_grad(train_loss, has_aux=True), meta_loss, update, params, phi, active)


def through(
    gradient: Gradient,
    meta_loss: MetaLoss,
    update: Update,
    params: PyTree,
    phi: PyTree,
    active: PyTree | None = None,
) -> Hypergrad:
    """Returns the meta-gradient of a step whose optimizer gets any function of w and phi, such as SAM's.

    Reverse mode through `gradient`; the other arguments are those of `HypergradFn`. What a learner reads without its
    gradient counts as a constant, wherever it is read: at weights that move with phi this leaves a term out.
    """
    select, merge = _partition(params, active)

    def objective(phi: PyTree) -> tuple[jax.Array, Any]:
        train, inner_grad = gradient(params, phi)
        held = _partition(jax.lax.stop_gradient(inner_grad), active)[1](select(inner_grad))
        updated = update(held)
        meta = meta_loss(merge(select(updated[0])))
        return meta[0], (train, meta, inner_grad, updated)

    grad, rest = jax.grad(objective, has_aux=True)(phi)
    return Hypergrad(grad, *rest)


def depends(function: Callable[[PyTree], PyTree], argument: PyTree) -> bool:
    """Returns whether any output of `function` has a derivative by `argument`, by tracing alone."""
    moving: list[bool] = []

    @jax.custom_jvp
    def look(outputs: PyTree) -> PyTree:
        return outputs

    def note(primals: tuple[PyTree], tangents: tuple[PyTree]) -> tuple[PyTree, PyTree]:
        leaves = jax.tree.leaves(tangents[0], is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
        moving.extend(not isinstance(leaf, SymbolicZero) for leaf in leaves)
        return primals[0], tangents[0]

    look.defjvp(note, symbolic_zeros=True)
    ones = jax.tree.map(jnp.ones_like, argument)
    jax.eval_shape(lambda value, tangent: jax.jvp(lambda x: look(function(x)), (value,), (tangent,)), argument, ones)
    return any(moving)


def _partition(
    tree: PyTree, active: PyTree | None
) -> tuple[Callable[[PyTree], list[jax.Array]], Callable[[list[jax.Array]], PyTree]]:
    """Returns (select, merge): the active leaves of a tree, and `tree` with its active leaves replaced."""
    leaves, structure = jax.tree.flatten(tree)
    flags = [True] * len(leaves) if active is None else jax.tree.leaves(active)

    def select(other: PyTree) -> list[jax.Array]:
        return [leaf for leaf, flag in zip(jax.tree.leaves(other), flags, strict=True) if flag]

    def merge(replacement: list[jax.Array]) -> PyTree:
        new = iter(replacement)
        return jax.tree.unflatten(structure, [next(new) if f else x for x, f in zip(leaves, flags, strict=True)])

    return select, merge
