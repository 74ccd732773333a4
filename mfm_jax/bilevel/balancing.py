"""Weight balancing: bounds and decay of each class's weight vector in the last layer, as parts of an optax chain.

Under a long tail the weight vectors of frequent classes grow longer than those of rare ones. Both transformations act
on the kernel `[C, K]` of the last layer alone, wherever it is: under `head` among a classifier's parameters, or by
itself where a second stage trains it.

References:
  Alshammari et al., Long-tailed recognition via weight balancing, CVPR 2022.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mfm_jax.types import PyTree


def max_norm(limit: float) -> optax.GradientTransformation:
    """Returns the last part of a chain: after the update no class's weight vector is longer than `limit`.

        w_k <- min(1, limit / |w_k|) w_k

    The projection is part of the update, so that a virtual step is projected too, and the meta-gradient goes through
    the projection. A change that needs none is left as it is, bit for bit.

    References:
      Alshammari et al. 2022 (MaxNorm, by projected gradient descent).
    """

    def projected(change: jax.Array, kernel: jax.Array) -> jax.Array:
        moved = kernel + change
        square = jnp.sum(moved**2, axis=0, keepdims=True)
        above = square > limit**2
        scale = limit * jax.lax.rsqrt(jnp.where(above, square, 1))
        return jnp.where(above, scale * moved - kernel, change)

    return _of_kernel(projected)


def class_decay(strength: float, counts: jax.Array) -> optax.GradientTransformation:
    """Returns a weight decay of the last layer, of each class by its images: it adds `strength n_k / n_max w_k`.

    `counts` `[K]` are the training images of each class. That it is proportional to them is this project's choice.
    """
    rates = strength * counts / counts.max()

    def decayed(change: jax.Array, kernel: jax.Array) -> jax.Array:
        return change + rates.astype(kernel.dtype)[None, :] * kernel

    return _of_kernel(decayed)


def _of_kernel(change: Callable[[jax.Array, jax.Array], jax.Array]) -> optax.GradientTransformation:
    """Returns a transformation without state that replaces the update u of the head's kernel w by `change(u, w)`."""

    def update(updates: PyTree, state: optax.EmptyState, params: PyTree = None) -> tuple[PyTree, optax.EmptyState]:
        def one(path: tuple[Any, ...], leaf: jax.Array, param: jax.Array) -> jax.Array:
            names = [key.key for key in path]
            is_head = names[-1] == "kernel" and (len(names) == 1 or names[0] == "head")
            return change(leaf, param) if is_head else leaf

        return jax.tree_util.tree_map_with_path(one, updates, params), state

    return optax.GradientTransformation(optax.init_empty_state, update)
