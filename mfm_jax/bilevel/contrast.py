"""ProCo: contrast with infinitely many examples of each class, drawn from a distribution that is estimated on the way.

The unit features z of a class are taken to follow a von Mises-Fisher distribution of direction mu and concentration
kappa on the sphere in p dimensions, whose normaliser is `C_p(kappa) = kappa^nu / ((2 pi)^(p/2) I_nu(kappa))`,
`nu = p / 2 - 1`. The mean of `exp(z z' / t)` over z' of the class is then known:

    log E exp(z z' / t) = log C_p(kappa) - log C_p(|kappa mu + z / t|)

so that the supervised contrastive loss of z with all other examples is a cross-entropy of K such numbers. One pass over
the batch gives it; no second view, no queue and no large batch is needed.

References:
  Du et al., Probabilistic contrastive learning for long-tailed visual recognition, TPAMI 2024, eq. 20.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mfm_jax.bilevel.auxiliary import Auxiliary, Seen, linear, new_layers, soft_labels
from mfm_jax.bilevel.losses import log_prior
from mfm_jax.bilevel.passes import Pass
from mfm_jax.types import PROJECTION, Batch, PyTree

NAME = "proco"
_HIDDEN = 512
_LARGEST = 1e5  # kappa, of a class whose features are all the same


def proco(
    counts: jax.Array, batch_size: int, weight: float = 1.0, temperature: float = 0.1, size: int = 128
) -> Auxiliary:
    """Returns ProCo's loss of one view: `weight` times the mean of `-log softmax(log E exp(z z' / t) + log prior)[y]`.

    z is what two layers, `PROJECTION` of the classifier's parameters, make of the features at `pooled`. The mean of a
    class's z, from which mu and kappa follow, is a running one over as many examples as the class has images, about an
    epoch. It is that of the batches before this one, a constant of the gradient; a class that was not seen yet is taken
    to be everywhere on the sphere. The paper has two further views, on which alone its loss is, and batch norm between
    the two layers.

    Args:
      counts: training images of each class, `[K]`, all at least 1.
      batch_size: of the training batches.
      weight: of the loss.
      temperature: t.
      size: p, dimensions of z.
    """
    classes, log_pi = len(counts), log_prior(counts)
    epoch = jnp.asarray(counts, jnp.float32) / batch_size

    def init() -> PyTree:
        return {"mean": jnp.zeros((classes, size)), "amount": jnp.zeros(classes)}

    def loss(params: PyTree, memory: PyTree, seen: Sequence[Seen], forward: Pass) -> tuple[jax.Array, PyTree]:
        batch, _, features = seen[0]
        unit = project(params[PROJECTION][NAME], features["pooled"])
        labels = soft_labels(batch, classes).astype(unit.dtype)
        contrast = log_moment(memory["mean"], unit, temperature) + log_pi.astype(unit.dtype)[None, :]
        values = -(labels * jax.nn.log_softmax(contrast)).sum(axis=-1)
        return weight * forward.mean(values, batch), _after(memory, jax.lax.stop_gradient(unit), labels, batch, forward)

    def _after(memory: PyTree, unit: jax.Array, labels: jax.Array, batch: Batch, forward: Pass) -> PyTree:
        share, together = forward.mean(labels, batch), forward.mean_product(labels, unit, batch)
        amount = jnp.minimum(memory["amount"] + share, epoch)
        new = together / jnp.where(share > 0, share, 1)[:, None]
        part = jnp.minimum(share / jnp.where(amount > 0, amount, 1), 1)[:, None]
        return {"mean": memory["mean"] + part * (new - memory["mean"]), "amount": amount}

    return Auxiliary(NAME, loss, ("pooled",), init, functools.partial(new_projection, size=size))


def new_projection(key: jax.Array, params: PyTree, size: int) -> PyTree:
    """Returns the parameters of `project` at their start, from the classifier's `params` with a `head`."""
    kernel = params["head"]["kernel"]
    return new_layers(key, {"hidden": (kernel.shape[0], _HIDDEN), "out": (_HIDDEN, size)}, kernel.dtype)


def project(projection: PyTree, features: jax.Array) -> jax.Array:
    """Returns unit vectors `[B, p]`, float32 or wider, of features `[B, C]`: a ReLU between two linear layers."""
    x = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    x = linear(projection["out"], jax.nn.relu(linear(projection["hidden"], x)))
    unit: jax.Array = x / jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-12)
    return unit


def log_moment(mean: jax.Array, unit: jax.Array, temperature: float) -> jax.Array:
    """Returns `log E exp(z z' / t)` for unit vectors z `[B, p]` and each class's z', `[B, K]`.

    `mean` `[K, p]` has the mean of each class's unit vectors, of length R: kappa is `R (p - R^2) / (1 - R^2)`, at most
    about 1e5. `I_nu` is taken from its uniform expansion, whose error falls with `nu^-4`. All differences are taken
    before anything is rounded.

    References:
      Sra, A short note on parameter approximation for von Mises-Fisher distributions, Computational Statistics 2012.
      NIST Digital Library of Mathematical Functions, 10.41.3 (uniform expansion).
    """
    p, nu = mean.shape[1], mean.shape[1] / 2 - 1
    squared = jnp.sum(mean**2, axis=1, keepdims=True)
    leaning = mean * (p - squared) / jnp.maximum(1 - squared, p / _LARGEST)  # kappa mu
    before = nu**2 + jnp.sum(leaning**2, axis=1)[None, :]
    longer = 2 / temperature * unit @ leaning.T + 1 / temperature**2  # |kappa mu + z / t|^2 - kappa^2
    s, after = jnp.sqrt(before), jnp.sqrt(jnp.maximum(before + longer, nu**2))
    gap = longer / (after + s)  # after - s
    return (
        gap
        - nu * jnp.log1p(gap / (nu + s))
        - 0.5 * jnp.log1p(gap / s)
        + jnp.log1p(_correction(nu, after))
        - jnp.log1p(_correction(nu, s))
    )


def _correction(nu: float, s: jax.Array) -> jax.Array:
    """Returns the first terms of the expansion's series, at `s = sqrt(nu^2 + kappa^2)`."""
    t = (nu / s) ** 2
    first = (3 - 5 * t) / 24
    second = (81 - 462 * t + 385 * t**2) / 1152
    third = (30375 - 369603 * t + 765765 * t**2 - 425425 * t**3) / 414720
    return first / s + second / s**2 + third / s**3
