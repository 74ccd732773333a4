"""Per-example losses on logits, and the class prior that some of them need.

Every loss maps `(logits [B, K], labels [B])` to `[B]`: weighting and averaging are the caller's business.
"""

import jax
import jax.numpy as jnp
import optax

from mfm_jax.types import LossFn


def log_prior(counts: jax.Array) -> jax.Array:
    """Returns the log of the training prior, `log(n_k / sum_j n_j)`, `[K]` float32, from class counts `[K]`."""
    counts = jnp.asarray(counts, jnp.float32)
    return jnp.log(counts) - jnp.log(counts.sum())


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns `-log softmax(logits)[y]`, `[B]`, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def logit_adjusted(counts: jax.Array, tau: float = 1.0) -> LossFn:
    """Returns the logit-adjusted cross-entropy `-log softmax(logits + tau * log prior)[y]`.

    With `tau = 1` it is balanced softmax, with `tau = 0` the cross-entropy.

    Args:
      counts: training images of each class, `[K]`, all at least 1.
      tau: strength of the adjustment.

    References:
      Menon et al., Long-tail learning via logit adjustment, ICLR 2021, eq. 10.
      Ren et al., Balanced meta-softmax for long-tailed visual recognition, NeurIPS 2020, eq. 4.
    """
    offset = tau * log_prior(counts)[None, :]

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return cross_entropy(logits + offset.astype(logits.dtype), labels)

    return loss


def generalized_cross_entropy(logits: jax.Array, labels: jax.Array, q: float = 0.7) -> jax.Array:
    """Returns `(1 - p_y^q) / q`, `[B]`: bounded by `1 / q`, so no single image rules the mean.

    `q -> 0` gives the cross-entropy, `q = 1` the mean absolute error.

    References:
      Zhang and Sabuncu, Generalized cross entropy loss for training deep neural networks with noisy labels,
      NeurIPS 2018, eq. 6.
    """
    return -jnp.expm1(-q * cross_entropy(logits, labels)) / q


def with_temperature(loss: LossFn, temperature: float) -> LossFn:
    """Returns `loss` of `logits / temperature`: above 1 it softens the probabilities."""
    return lambda logits, labels: loss(logits / temperature, labels)
