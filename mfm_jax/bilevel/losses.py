"""Per-example losses on logits, and the class priors and class weights that some of them need.

Every loss maps floating-point logits `[B, K]` and integer labels `[B]` to `[B]` and refuses other ranks and types with
an `AssertionError` (chex). The caller weighs and averages.
"""

import math

import chex
import jax
import jax.numpy as jnp
import optax

from mfm_jax.types import LossFn


def log_prior(counts: jax.Array) -> jax.Array:
    """Returns the log of the training prior, `log(n_k / sum_j n_j)`, `[K]` float32, from class counts `[K]`."""
    counts = jnp.asarray(counts, jnp.float32)
    return jnp.log(counts) - jnp.log(counts.sum())


def of_guesses(loss: LossFn, counts: jax.Array) -> tuple[float, float]:
    """Returns the mean of `loss` over one image of each class for two guesses: of zeros, and of `log_prior(counts)`.

    For the cross-entropy they are `log K` and `-mean_k log(n_k / sum_j n_j)`, which is never less.
    """
    prior, classes = log_prior(counts), jnp.arange(len(counts), dtype=jnp.int32)

    def mean(logits: jax.Array) -> float:
        return float(jax.vmap(lambda k: loss(logits[None], k[None])[0])(classes).mean())

    return mean(jnp.zeros_like(prior)), mean(prior)


def _check(logits: jax.Array, labels: jax.Array) -> None:
    chex.assert_rank([logits, labels], [2, 1])
    chex.assert_type([logits, labels], [float, int])
    chex.assert_equal_shape_prefix([logits, labels], 1)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns `-log softmax(logits)[y]`, `[B]`, in nats.

    >>> cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))
    Array([1.386...], dtype=float32)
    """
    _check(logits, labels)
    values: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return values


def logit_adjusted(counts: jax.Array, tau: float = 1.0) -> LossFn:
    """Returns the logit-adjusted cross-entropy `-log softmax(logits + tau * log prior)[y]`.

    With `tau = 1` it is balanced softmax, with `tau = 0` the cross-entropy.

    >>> logit_adjusted(jnp.array([3, 1]))(jnp.zeros((1, 2)), jnp.array([1]))
    Array([1.386...], dtype=float32)

    Args:
      counts: training images of each class, `[K]`, all at least 1.
      tau: strength of the adjustment.

    References:
      Menon et al., Long-tail learning via logit adjustment, ICLR 2021, eq. 10.
      Ren et al., Balanced meta-softmax for long-tailed visual recognition, NeurIPS 2020.
    """
    offset = tau * log_prior(counts)[None, :]

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        _check(logits, labels)
        return cross_entropy(logits + offset.astype(logits.dtype), labels)

    return loss


def with_prior(loss: LossFn, log_prior: jax.Array, tau: float) -> LossFn:
    """Returns `loss` of `logits + tau * log_prior`, `[K]`: one more prior, beside that of the training set."""

    def adjusted(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return loss(logits + (tau * log_prior).astype(logits.dtype)[None, :], labels)

    return adjusted


def vector_scaled(counts: jax.Array, gamma: float = 0.3, tau: float = 1.0) -> LossFn:
    """Returns the vector-scaling loss `-log softmax(delta * logits + tau * log prior)[y]`.

    `delta_k = (n_k / n_max)^gamma`: the logits of rare classes count for less while training, so that the classifier
    makes them larger. With `gamma = 0` it is the logit-adjusted loss; with `tau = 0` it is the loss of class-dependent
    temperatures `1 / delta_k` (CDT), with both the cross-entropy. The defaults are those of its authors' code.

    >>> vector_scaled(jnp.array([4, 1]), gamma=0.5, tau=0.0)(jnp.array([[0.0, 2.0]]), jnp.array([1]))
    Array([0.313...], dtype=float32)

    Args:
      counts: training images of each class, `[K]`, all at least 1.
      gamma: power of the counts in the factor of a logit.
      tau: strength of the adjustment.

    References:
      Kini et al., Label-imbalanced and group-sensitive classification under overparameterization, NeurIPS 2021 (VS).
      Ye et al., Identifying and compensating for feature deviation in imbalanced deep learning, arXiv:2001.01385, 2020.
    """
    counts = jnp.asarray(counts, jnp.float32)
    scale = ((counts / counts.max()) ** gamma)[None, :]
    adjusted = logit_adjusted(counts, tau)

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        _check(logits, labels)
        return adjusted(logits * scale.astype(logits.dtype), labels)

    return loss


def focal(gamma: float = 2.0) -> LossFn:
    """Returns the focal loss `-(1 - p_y)^gamma log p_y`: images that are classified well count for little.

    With `gamma = 0` it is the cross-entropy.

    >>> focal(gamma=2.0)(jnp.zeros((1, 2)), jnp.array([0]))
    Array([0.173...], dtype=float32)

    References:
      Lin et al., Focal loss for dense object detection, ICCV 2017, eq. 4.
    """

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        nats = cross_entropy(logits, labels)
        # Away from zero, where the power's derivatives are infinite for a gamma below 1, and its second below 2.
        miss = jnp.maximum(-jnp.expm1(-nats), jnp.finfo(logits.dtype).eps)
        return miss**gamma * nats

    return loss


def ldam(counts: jax.Array, max_margin: float = 0.5, scale: float = 30.0) -> LossFn:
    """Returns the label-distribution-aware margin loss: cross-entropy with the label's logit less `scale * margin_y`.

    The margin of class k is `max_margin (n_min / n_k)^(1/4)`: rarer classes are held further from the boundary. The
    logits are `scale` times a cosine, as `methods.heads.cosine` makes them, so that the margin is one of cosines. With
    `max_margin = 0` it is the cross-entropy of those scaled cosines.

    >>> ldam(jnp.array([16, 1]), max_margin=0.5, scale=2.0)(jnp.zeros((1, 2)), jnp.array([1]))
    Array([1.313...], dtype=float32)

    Args:
      counts: training images of each class, `[K]`, all at least 1.
      max_margin: margin of the rarest class.
      scale: factor of the cosines.

    References:
      Cao et al., Learning imbalanced datasets with label-distribution-aware margin loss, NeurIPS 2019 (LDAM loss).
    """
    counts = jnp.asarray(counts, jnp.float32)
    offset = -scale * max_margin * (counts.min() / counts) ** 0.25

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        _check(logits, labels)
        own = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        return cross_entropy(logits + own * offset.astype(logits.dtype)[None, :], labels)

    return loss


def influence_balanced(features: jax.Array, alpha: float = 1000.0, epsilon: float = 1e-3) -> LossFn:
    """Returns the influence-balanced loss `alpha ce / (|p - y|_1 |h|_1 + epsilon)`, of examples with the `features` h.

    The denominator is the size of the cross-entropy's gradient by the last layer's weights: examples that hold the
    boundary where it is count for less. As in the authors' code, it is not a constant of the gradient.

    Args:
      features: `[B, C]`, what the last layer reads.
      alpha: factor of the loss.
      epsilon: keeps the denominator from 0.

    References:
      Park et al., Influence-balanced loss for imbalanced visual classification, ICCV 2021 (IB loss).
    """
    length = jnp.abs(features).sum(axis=-1)

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        chex.assert_equal_shape([length, labels])
        nats = cross_entropy(logits, labels)
        # The other classes have together what the label lacks of 1.
        return alpha * nats / (-2 * jnp.expm1(-nats) * length.astype(nats.dtype) + epsilon)

    return loss


def dice(alpha: float = 0.1) -> LossFn:
    """Returns the self-adjusting Dice loss `1 - (2 f + 1) / (f + 2)`, `f = (1 - p_y)^alpha p_y`.

    The number of easy negatives does not enter. `f` is largest, and the loss smallest, at `p_y = 1 / (1 + alpha)`: a
    large alpha keeps a classifier from becoming sure. With `alpha = 0` it is the Dice loss.

    >>> dice(alpha=1.0)(jnp.zeros((1, 2)), jnp.array([0]))
    Array([0.333...], dtype=float32)

    References:
      Li et al., Dice loss for data-imbalanced NLP tasks, ACL 2020 (DSC), with the smoothing term 1.
    """

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        nats = cross_entropy(logits, labels)
        miss = jnp.maximum(-jnp.expm1(-nats), jnp.finfo(logits.dtype).eps)
        adjusted = miss**alpha * jnp.exp(-nats)
        return 1 - (2 * adjusted + 1) / (adjusted + 2)

    return loss


def smoothed(loss: LossFn, amount: float) -> LossFn:
    """Returns `(1 - amount) loss(z, y) + amount / K sum_k loss(z, k)`; label smoothing, for any per-example loss.

    For the cross-entropy this is the cross-entropy to the smoothed label. `loss` is evaluated for every class: K times
    its cost, and `[K, B]` of memory where it only looks the label up, `[K, B, K]` for LDAM.

    >>> smoothed(cross_entropy, 0.5)(jnp.array([[0.0, 1.0]]), jnp.array([1]))
    Array([0.563...], dtype=float32)

    References:
      Szegedy et al., Rethinking the Inception architecture for computer vision, CVPR 2016, section 7.
    """

    def smooth(logits: jax.Array, labels: jax.Array) -> jax.Array:
        classes = jnp.arange(logits.shape[-1], dtype=labels.dtype)
        every = jax.vmap(lambda k: loss(logits, jnp.full_like(labels, k)))(classes)
        return (1 - amount) * loss(logits, labels) + amount * every.mean(axis=0)

    return smooth


def frequency_weights(counts: jax.Array, power: float = 1.0) -> jax.Array:
    """Returns `n_k^-power`, scaled to the mean 1, `[K]` float32: inverse frequency (1), inverse square root (0.5).

    References:
      Huang et al., Learning deep representation for imbalanced classification, CVPR 2016 (inverse frequency).
      Mahajan et al., Exploring the limits of weakly supervised pretraining, ECCV 2018 (square root).
    """
    weights = jnp.asarray(counts, jnp.float32) ** -power
    return weights / weights.mean()


def effective_number_weights(counts: jax.Array, beta: float = 0.9999) -> jax.Array:
    """Returns `(1 - beta) / (1 - beta^n_k)`, scaled to the mean 1, `[K]` float32.

    `beta = 0` weighs all classes the same; `beta -> 1` is inverse frequency.

    References:
      Cui et al., Class-balanced loss based on effective number of samples, CVPR 2019, eq. 5.
    """
    counts = jnp.asarray(counts, jnp.float32)
    # By way of the logarithm: in float32, 1 - beta^n is otherwise lost to rounding for small n.
    number = -jnp.expm1(counts * math.log(beta)) if beta else jnp.ones_like(counts)
    weights = 1 / number
    return weights / weights.mean()


def generalized_cross_entropy(logits: jax.Array, labels: jax.Array, q: float = 0.7) -> jax.Array:
    """Returns `(1 - p_y^q) / q`, `[B]`: bounded by `1 / q`, so no single image rules the mean.

    `q -> 0` gives the cross-entropy, `q = 1` the mean absolute error.

    >>> generalized_cross_entropy(jnp.zeros((1, 2)), jnp.array([0]))
    Array([0.549...], dtype=float32)

    References:
      Zhang and Sabuncu, Generalized cross entropy loss for training deep neural networks with noisy labels,
      NeurIPS 2018, eq. 6.
    """
    return -jnp.expm1(-q * cross_entropy(logits, labels)) / q


def expected_cost(costs: jax.Array) -> LossFn:
    """Returns `sum_b C[y, b] softmax(logits)_b`: what an answer drawn from the probabilities costs in the mean.

    With 1 for every miss it is `1 - p_y`. It is bounded, so its gradient vanishes on images that are surely wrong:
    beside another loss it leaves that the images to learn from (`mixed`).

    >>> expected_cost(jnp.array([[0.0, 10.0], [1.0, 0.0]]))(jnp.zeros((1, 2)), jnp.array([0]))
    Array([5.], dtype=float32)

    Args:
      costs: of naming b where a is true, `[K, K]`.

    References:
      Elkan, The foundations of cost-sensitive learning, IJCAI 2001.
    """
    costs = jnp.asarray(costs, jnp.float32)

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        _check(logits, labels)
        return (costs.astype(logits.dtype)[labels] * jax.nn.softmax(logits)).sum(axis=-1)

    return loss


def mixed(loss: LossFn, other: LossFn, share: float) -> LossFn:
    """Returns `(1 - share) loss + share other`.

    >>> mixed(cross_entropy, generalized_cross_entropy, 0.0)(jnp.zeros((1, 4)), jnp.array([2]))
    Array([1.386...], dtype=float32)
    """
    return lambda logits, labels: (1 - share) * loss(logits, labels) + share * other(logits, labels)


def with_temperature(loss: LossFn, temperature: float) -> LossFn:
    """Returns `loss` of `logits / temperature`: above 1 it softens the probabilities.

    >>> with_temperature(cross_entropy, 2.0)(jnp.array([[0.0, 2.0]]), jnp.array([0]))
    Array([1.313...], dtype=float32)
    """

    def softened(logits: jax.Array, labels: jax.Array) -> jax.Array:
        _check(logits, labels)
        return loss(logits / temperature, labels)

    return softened
