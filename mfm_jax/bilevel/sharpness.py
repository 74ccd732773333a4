"""Sharpness-aware minimisation: the gradient of a step is taken at weights that are worse, a little way up the loss.

With c_k, from 0 to 1, the share of class k's loss that is to be flat, L_c the training loss with each example's loss
multiplied by its class's c, and L_(1-c) the rest of it,

    g_c = grad_w L_c(w)
    g   = grad_w L_(1-c)(w) + grad_w L_c(w + rho g_c / |g_c|)

is what the optimizer gets in the place of grad_w L(w). All c = 1 is SAM; c = 1 for rare classes and 0 for the others is
ImbSAM; `c_k = (1 - n_k / N)^gamma` is Focal-SAM with its lambda at 1. Batch statistics and the reported loss are those
at w. Whatever the optimizer does with g, the learning rate and decay among it, it does at w.

References:
  Foret et al., Sharpness-aware minimization for efficiently improving generalization, ICLR 2021, eq. 2 and 3.
  Zhou et al., ImbSAM: a closer look at sharpness-aware minimization in class-imbalanced recognition, ICCV 2023.
  Li et al., Focal-SAM: focal sharpness-aware minimization for long-tailed classification, ICML 2025.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mfm_jax.bilevel.hypergrad import Gradient, TrainLoss
from mfm_jax.types import PyTree


class Sharpness(NamedTuple):
    """How flat a minimum is wanted.

    rho: length of the way up the loss.
    share: c of each class, [K]; None for 1 of all.
    """

    rho: float
    share: jax.Array | None = None


def rare(rho: float, counts: jax.Array, below: int) -> Sharpness:
    """Returns ImbSAM: only the loss of classes with fewer training images than `below` is to be flat."""
    return Sharpness(rho, (counts < below).astype(jnp.float32))


def focal(rho: float, counts: jax.Array, gamma: float) -> Sharpness:
    """Returns Focal-SAM: a class's loss is to be flat by `(1 - n_k / N)^gamma`."""
    return Sharpness(rho, (1 - counts / counts.sum()) ** gamma)


def gradient(train_loss: TrainLoss, sharpness: Sharpness | None) -> Gradient:
    """Returns `(params, phi) -> ((loss, aux), g)`; the plain gradient without sharpness.

    `train_loss` takes as its third argument what each class's loss counts, [K], where sharpness has shares. It costs a
    forward and a backward pass more than the plain gradient, with shares two backward passes and a forward pass.
    """
    plain = jax.value_and_grad(train_loss, has_aux=True)
    if sharpness is None:
        return plain
    rho = sharpness.rho

    def whole(params: PyTree, phi: PyTree) -> tuple[tuple[jax.Array, Any], PyTree]:
        found, grad = plain(params, phi)
        return found, plain(_uphill(params, grad, rho), phi)[1]

    def divided(share: jax.Array, params: PyTree, phi: PyTree) -> tuple[tuple[jax.Array, Any], PyTree]:
        (value, aux), grad = plain(params, phi, 1 - share)
        (flat, _), there = plain(params, phi, share)
        there = plain(_uphill(params, there, rho), phi, share)[1]
        return (value + flat, aux), jax.tree.map(jnp.add, grad, there)

    return whole if sharpness.share is None else functools.partial(divided, sharpness.share)


def _uphill(params: PyTree, grad: PyTree, rho: float) -> PyTree:
    """Returns `params` plus `rho` along `grad`; where that is zero, as without images of rare classes, `params`."""
    square = optax.tree.vdot(grad, grad)
    scale = jnp.where(square > 0, rho * jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
    return jax.tree.map(lambda w, g: w + scale.astype(w.dtype) * g, params, grad)
