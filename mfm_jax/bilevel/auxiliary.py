"""Losses of a whole batch, which are added to the mean of its examples' losses."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mfm_jax.bilevel.losses import log_prior
from mfm_jax.bilevel.passes import Pass
from mfm_jax.types import PROJECTION, ApplyFn, Batch, PyTree


class Seen(NamedTuple):
    """What a training pass over a batch gives, or over one of its views."""

    batch: Batch
    logits: jax.Array  # [B, K]
    features: Mapping[str, jax.Array]  # [B, ..., C] by site, of the sites that are asked for


class BatchLoss(Protocol):
    """`(params, memory, seen of each view, forward) -> (scalar, memory afterwards)`.

    Means are taken by `forward`, over the whole batch, on however many devices it is.
    """

    def __call__(
        self, params: PyTree, memory: PyTree, seen: Sequence[Seen], forward: Pass, /
    ) -> tuple[jax.Array, PyTree]: ...


def _nothing() -> PyTree:
    return {}


class Auxiliary(NamedTuple):
    """A loss of the whole batch beside those of its examples.

    name: under which `BilevelState.memory` has what it keeps.
    loss: see `BatchLoss`.
    sites: whose features it reads.
    init: `() -> memory`, what it keeps from step to step, outside of the gradient; an empty dict for nothing.
    projection: `(key, params) -> PyTree`, what it trains beside the classifier: `PROJECTION`, by its name, of the
      classifier's parameters.
    """

    name: str
    loss: BatchLoss
    sites: tuple[str, ...] = ()
    init: Callable[[], PyTree] = _nothing
    projection: Callable[[jax.Array, PyTree], PyTree] | None = None


def without_projection(params: PyTree) -> PyTree:
    """Returns the classifier's `params` that are tested: all but what a loss of the batch trains beside them."""
    return {name: tree for name, tree in params.items() if name != PROJECTION}


def classifier_alone(apply_fn: ApplyFn) -> ApplyFn:
    """Returns `apply_fn` of a module that is not given `PROJECTION`."""

    def apply(variables: PyTree, image: PyTree, **options: Any) -> PyTree:
        return apply_fn({**variables, "params": without_projection(variables["params"])}, image, **options)

    return apply


def new_layers(key: jax.Array, sizes: Mapping[str, tuple[int, int]], dtype: DTypeLike) -> PyTree:
    """Returns parameters of linear layers by name, each of `(inputs, outputs)`, to train beside a classifier."""
    draw = jax.nn.initializers.he_normal()
    return {
        name: {"kernel": draw(key, size, dtype), "bias": jnp.zeros(size[1], dtype)}
        for key, (name, size) in zip(jax.random.split(key, len(sizes)), sizes.items(), strict=True)
    }


def linear(layer: PyTree, x: jax.Array) -> jax.Array:
    """Returns `[B, D]`, what one of `new_layers` makes of `x` `[B, C]`."""
    found: jax.Array = x @ layer["kernel"] + layer["bias"][None, :]
    return found


def soft_labels(batch: Batch, classes: int) -> jax.Array:
    """Returns what each example has of each class, `[B, K]` float32: one-hot labels, mixed where examples are."""
    own = jax.nn.one_hot(batch.label, classes)
    if batch.partner is None or batch.share is None:
        return own
    share = batch.share.astype(own.dtype)[:, None]
    return share * own + (1 - share) * jax.nn.one_hot(batch.partner, classes)


def label_distribution(counts: jax.Array, weight: float = 0.1, spread: float = 0.1) -> Auxiliary:
    """Returns LADE's regulariser, `weight sum_c pi_c (-mean_{y=c} z_c + l_c + spread l_c^2)`.

    `l_c = log mean_i ((1 / K) / pi_y e^{z_c})` is over the batch as if its classes were balanced, `pi` the training
    prior: each logit is held to the log ratio of `p(x | c)` to a balanced `p(x)`, by the Donsker-Varadhan bound. A
    class that the batch has no example of has the mean 0. The authors' code has `pi_c` in the place of `pi_y`; this is
    the paper's.

    Args:
      counts: training images of each class, `[K]`, all at least 1.
      weight: the paper's alpha.
      spread: the paper's lambda, which keeps `l_c` near 0.

    References:
      Hong et al., Disentangling label distribution for long-tailed visual recognition, CVPR 2021, section 3.3 (LADER).
    """
    log_pi = log_prior(counts)

    def loss(params: PyTree, memory: PyTree, seen: Sequence[Seen], forward: Pass) -> tuple[jax.Array, PyTree]:
        del params
        batch, logits, _ = seen[0]
        prior = jnp.exp(log_pi).astype(logits.dtype)
        labels = soft_labels(batch, len(prior)).astype(logits.dtype)
        share = forward.mean(labels, batch)
        own = forward.mean(labels * logits, batch) / jnp.where(share > 0, share, 1)
        ratio = labels @ (1 / (len(prior) * prior))
        balanced = forward.log_mean_exp(logits + jnp.log(ratio)[:, None], batch)
        return weight * prior @ (balanced + spread * balanced**2 - own), memory

    return Auxiliary("label_distribution", loss)
