"""Agreement of two views of each image, as a loss of the whole batch.

The features x of both views go through a projection h and a predictor q, z = h(x) and p = q(z), and each view's p is
drawn to the other's z, which is held:

    weight * mean_i (D(p1_i, sg(z2_i)) + D(p2_i, sg(z1_i))) / 2        D(p, z) = 1 - cos(p, z)

Projection and predictor are `PROJECTION` of the classifier's parameters, and in no tested classifier.

References:
  Du et al., Global and local mixture consistency cumulative learning for long-tailed visual recognitions, CVPR 2023,
  whose code adds what is averaged here.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mfm_jax.bilevel.auxiliary import Auxiliary, Seen, linear, new_layers
from mfm_jax.bilevel.passes import Pass
from mfm_jax.types import PROJECTION, PyTree

NAME = "agreement"


def of_views(weight: float, size: int) -> Auxiliary:
    """Returns the loss of the module, `weight` times, with z and p of `size` numbers."""

    def loss(params: PyTree, memory: PyTree, seen: Sequence[Seen], forward: Pass) -> tuple[jax.Array, PyTree]:
        one, other = seen
        z1, p1 = project(params[PROJECTION][NAME], one.features["pooled"])
        z2, p2 = project(params[PROJECTION][NAME], other.features["pooled"])
        return weight * forward.mean((disagreement(p1, z2) + disagreement(p2, z1)) / 2, one.batch), memory

    return Auxiliary(NAME, loss, ("pooled",), projection=functools.partial(new_projection, size=size))


def new_projection(key: jax.Array, params: PyTree, size: int) -> PyTree:
    """Returns the parameters of `project` at their start, from the classifier's `params` with a `head`.

    SimSiam has several layers of each; GLMC's code has these, and no batch norm between them.
    """
    kernel = params["head"]["kernel"]
    return new_layers(key, {"project": (kernel.shape[0], size), "predict": (size, size)}, kernel.dtype)


def project(projection: PyTree, features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (z, p), each `[B, size]`, of features `[B, C]`: the projection, and what is predicted from it."""
    z = linear(projection["project"], features.astype(projection["project"]["kernel"].dtype))
    return z, linear(projection["predict"], z)


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
