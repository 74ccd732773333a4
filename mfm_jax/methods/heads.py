"""What methods do to the classifier's last layer: `params["head"]`, with `kernel [C, K]` and `bias [K]`.

Everything here maps parameters to parameters of the same form, so what is tested is again the plain classifier; only
`cosine` and `on_features` wrap the module's `apply`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mfm_jax.bilevel.losses import log_prior
from mfm_jax.errors import UserError
from mfm_jax.types import ApplyFn, Modulate, PyTree, no_modulation


def with_prior_bias(params: PyTree, counts: jax.Array) -> PyTree:
    """Returns `params` with the log prior as the head's bias: a new classifier then predicts the prior.

    References:
      Chen et al., Is sampling heuristics necessary in training deep object detectors?, arXiv:1909.04868, 2019
      (optimal bias initialization).
    """
    return _with_head(params, bias=log_prior(counts).astype(params["head"]["bias"].dtype))


def without_prior(params: PyTree, counts: jax.Array, tau: float) -> PyTree:
    """Returns `params` whose logits are lower by `tau * log prior`: thresholding by the prior, after training.

    References:
      Menon et al., Long-tail learning via logit adjustment, ICLR 2021, eq. 9; Buda et al. 2018, section 2.2
      (thresholding).
    """
    bias = params["head"]["bias"]
    return _with_head(params, bias=bias - tau * log_prior(counts).astype(bias.dtype))


def tau_normalized(params: PyTree, tau: float) -> PyTree:
    """Returns `params` with each class's weight vector divided by its norm to the power `tau`, the bias with it.

    `tau = 0` changes nothing. The paper leaves the bias out; here it is divided along with the weights.

    References:
      Kang et al., Decoupling representation and classifier for long-tailed recognition, ICLR 2020 (tau-normalized
      classifier).
    """
    return scaled(params, _norms(params["head"]["kernel"]) ** -tau)


def scaled(params: PyTree, scale: jax.Array) -> PyTree:
    """Returns `params` with class k's logit multiplied by `scale_k`, `[K]`."""
    head = params["head"]
    return _with_head(params, kernel=head["kernel"] * scale[None, :], bias=head["bias"] * scale)


def replaced(params: PyTree, head: PyTree) -> PyTree:
    """Returns `params` with another `head`."""
    return {**params, "head": head}


def fresh(key: jax.Array, params: PyTree) -> PyTree:
    """Returns a newly initialised head of the same shape: He-normal weights, no bias."""
    kernel, bias = params["head"]["kernel"], params["head"]["bias"]
    return {"kernel": jax.nn.initializers.he_normal()(key, kernel.shape, kernel.dtype), "bias": jnp.zeros_like(bias)}


def cosine(apply_fn: ApplyFn, scale: float, *, fixed: bool = False) -> ApplyFn:
    """Returns `apply_fn` with a cosine classifier: logits `scale * cos(features, weights of class k)`, no bias.

    The module's own `pooled` features and head weights are divided by their norms on the way, in training and at test
    time alike. With `fixed` the weights are those of `simplex`, and the module's own are not read.

    References:
      Cao et al., Learning imbalanced datasets with label-distribution-aware margin loss, NeurIPS 2019, section 3.1.
      Yang et al., Inducing neural collapse in imbalanced learning: do we really need a learnable classifier at the end
      of deep neural network?, NeurIPS 2022 (fixed weights).
    """

    def apply(variables: PyTree, image: jax.Array, *, modulate: Modulate = no_modulation, **options: Any) -> PyTree:
        params = variables["params"]
        kernel, bias = cosine_kernel(params, scale, fixed=fixed), jnp.zeros_like(params["head"]["bias"])
        unit = _with_head(params, kernel=kernel, bias=bias)

        def normalize(site: str, features: jax.Array) -> jax.Array:
            features = modulate(site, features)
            return features / _norms(features.T)[:, None] if site == "pooled" else features

        return apply_fn({**variables, "params": unit}, image, modulate=normalize, **options)

    return apply


def cosine_kernel(params: PyTree, scale: float, *, fixed: bool = False) -> jax.Array:
    """Returns the weights that a cosine classifier multiplies unit features with: each class's of length `scale`."""
    kernel: jax.Array = params["head"]["kernel"]
    if fixed:
        return jnp.asarray(scale * simplex(*kernel.shape), kernel.dtype)
    return scale * kernel / _norms(kernel)[None, :]


def simplex(channels: int, classes: int) -> np.ndarray:
    """Returns unit vectors as far from each other as so many can be, `[C, K]`: of each two the cosine is -1 / (K - 1).

    They are `sqrt(K / (K - 1)) U (I - 1 1^T / K)`, U with orthonormal columns: a simplex equiangular tight frame. Its
    rotation is random and always the same.

    Raises:
      UserError: `channels < classes - 1`, where there is none.

    References:
      Yang et al., NeurIPS 2022, definition 1.
    """
    if channels < classes - 1:
        raise UserError(
            f"method.head = 'simplex': {classes} classes need {classes - 1} features, the model has {channels};"
            " raise model.width, or use 'cosine'"
        )
    corners = np.eye(classes) - 1 / classes
    # Orthonormal coordinates in the hyperplane that the corners span.
    across = _orthonormal(corners[:, : classes - 1])
    rotated = _orthonormal(np.random.default_rng(0).normal(size=(channels, classes - 1)))
    found: np.ndarray = math.sqrt(classes / (classes - 1)) * rotated @ (across.T @ corners)
    return found


def _orthonormal(matrix: np.ndarray) -> np.ndarray:
    """Returns Q of the QR factors with a positive diagonal of R, which are unique, whatever library finds them."""
    q, r = np.linalg.qr(matrix)
    found: np.ndarray = q * np.sign(np.diag(r))
    return found


def on_features(apply_fn: ApplyFn, image_shape: tuple[int, ...]) -> ApplyFn:
    """Returns `apply_fn` of `pooled` features `[B, C]` in the place of images: the head alone.

    The network below runs on blank images, of `image_shape` (H, W, C), and nothing reads what it computes, so that XLA
    leaves it out.
    """

    def apply(variables: PyTree, features: jax.Array, *, modulate: Modulate = no_modulation, **options: Any) -> PyTree:
        def put(site: str, found: jax.Array) -> jax.Array:
            return modulate(site, features.astype(found.dtype) if site == "pooled" else found)

        blank = jnp.zeros((len(features), *image_shape), jnp.float32)
        return apply_fn(variables, blank, modulate=put, **options)

    return apply


def features(apply_fn: ApplyFn) -> Callable[[PyTree, jax.Array], jax.Array]:
    """Returns `(variables, image) -> features [B, C]` at `pooled`, as at test time, float32."""

    def extract(variables: PyTree, image: jax.Array) -> jax.Array:
        seen = {}

        def record(site: str, found: jax.Array) -> jax.Array:
            seen[site] = found
            return found

        apply_fn(variables, image, train=False, modulate=record)
        return seen["pooled"].astype(jnp.float32)

    return extract


def _with_head(params: PyTree, **leaves: jax.Array) -> PyTree:
    return replaced(params, {**params["head"], **leaves})


def _norms(kernel: jax.Array) -> jax.Array:
    """Returns each column's norm, never quite zero, so that its gradient is finite."""
    return jnp.sqrt(jnp.sum(kernel**2, axis=0) + 1e-12)
