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
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from mfm_jax.bilevel.auxiliary import Auxiliary, Seen, linear, new_layers
from mfm_jax.bilevel.passes import Pass
from mfm_jax.types import PROJECTION, Batch, PyTree

NAME = "agreement"

Normalize = Callable[[jax.Array], jax.Array]  # batch norm of [B, C]
# (layers, features [B, C], batch norm) -> z and p, each [B, size]
Projected = Callable[[PyTree, jax.Array, Normalize], tuple[jax.Array, jax.Array]]


def of_views(weight: float, size: int) -> Auxiliary:
    """Returns the loss of the module, `weight` times, with z and p of `size` numbers.

    h and q are a linear layer each, as in GLMC's code.
    """

    def init(key: jax.Array, params: PyTree) -> PyTree:
        kernel = params["head"]["kernel"]
        return new_layers(key, {"project": (kernel.shape[0], size), "predict": (size, size)}, kernel.dtype)

    def projected(layers: PyTree, x: jax.Array, normalize: Normalize) -> tuple[jax.Array, jax.Array]:
        del normalize
        z = linear(layers["project"], x)
        return z, linear(layers["predict"], z)

    return _between(projected, init, weight)


def siamese(size: int) -> Auxiliary:
    """Returns SimSiam's loss, of whose z and p a classifier learns without a label.

    h has three layers of `size` units, each followed by batch norm without gain and bias, the first two by a ReLU; q
    has two, with a quarter of the units and batch norm and a ReLU between. Without batch norm it learns little.

    References:
      Chen and He, Exploring simple Siamese representation learning, CVPR 2021, section 3.
    """
    narrow = max(size // 4, 1)

    def init(key: jax.Array, params: PyTree) -> PyTree:
        kernel = params["head"]["kernel"]
        sizes = {"first": (kernel.shape[0], size), "second": (size, size), "third": (size, size)}
        return new_layers(key, {**sizes, "narrow": (size, narrow), "predict": (narrow, size)}, kernel.dtype)

    def projected(layers: PyTree, x: jax.Array, normalize: Normalize) -> tuple[jax.Array, jax.Array]:
        for name in ("first", "second"):
            x = jax.nn.relu(normalize(linear(layers[name], x)))
        z = normalize(linear(layers["third"], x))
        return z, linear(layers["predict"], jax.nn.relu(normalize(linear(layers["narrow"], z))))

    return _between(projected, init)


def _between(projected: Projected, init: Callable[[jax.Array, PyTree], PyTree], weight: float = 1.0) -> Auxiliary:
    def loss(params: PyTree, memory: PyTree, seen: Sequence[Seen], forward: Pass) -> tuple[jax.Array, PyTree]:
        layers = params[PROJECTION][NAME]
        dtype = layers["predict"]["kernel"].dtype
        (z1, p1), (z2, p2) = (
            projected(layers, one.features["pooled"].astype(dtype), functools.partial(_normalized, one.batch, forward))
            for one in seen
        )
        return weight * forward.mean((disagreement(p1, z2) + disagreement(p2, z1)) / 2, seen[0].batch), memory

    return Auxiliary(NAME, loss, ("pooled",), projection=init)


def _normalized(batch: Batch, forward: Pass, x: jax.Array) -> jax.Array:
    """Returns `x` `[B, C]` of mean 0 and variance 1 over the whole batch."""
    centred = x - forward.mean(x, batch)[None]
    return centred * jax.lax.rsqrt(forward.mean(centred**2, batch) + 1e-5)[None]


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
