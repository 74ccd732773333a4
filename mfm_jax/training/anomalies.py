"""Steps that must not count: a loss or gradient that is not finite, or a gradient far above what it was."""

import jax
import jax.numpy as jnp

from mfm_jax.config import Train
from mfm_jax.errors import UserError
from mfm_jax.types import Metrics

WATCHED = ("loss", "grad_norm", "meta_loss", "hypergrad_norm")  # must stay finite
ANOMALIES = (
    *(f"{name} became non-finite" for name in WATCHED),
    "grad_norm rose above train.spike_factor times its running mean",
)
_NOTED = 32  # skipped steps of an epoch that are noted one by one; the others are counted
_NORM_DECAY, _NORM_WARMUP = 0.99, 10  # of the running mean of grad_norm: decay a step, steps before it is trusted


class NonFiniteError(UserError):
    """A loss or gradient became infinite or NaN; the checkpoints before it are untouched."""


def none_noted(train: Train) -> jax.Array:
    """Returns the notes `[m, 2]` int32 of a loop that has met no anomaly: -1 in the place of (step, anomaly)."""
    return jnp.full((_NOTED if train.on_nonfinite == "skip" else 1, 2), -1, jnp.int32)


def note(notes: jax.Array, step: jax.Array, anomaly: jax.Array) -> jax.Array:
    """Returns the notes with an anomaly of a step in the first free row, if there is one and `anomaly` is not -1."""
    free = jnp.cumsum(notes[:, 0] < 0) == 1
    return jnp.where(((anomaly >= 0) & free)[:, None], jnp.stack([step, anomaly])[None], notes)


def find(metrics: Metrics, norms: jax.Array, train: Train) -> tuple[jax.Array, jax.Array]:
    """Returns the index in `ANOMALIES` of what is wrong with a step's metrics, or -1, and the new `norms`."""
    found = {index: ~jnp.isfinite(metrics[name]) for index, name in enumerate(WATCHED) if name in metrics}
    if train.spike_factor:
        norms, found[len(WATCHED)] = watch_norm(norms, metrics["grad_norm"], train.spike_factor)
    anomaly = jnp.int32(-1)
    for index in reversed(found):
        anomaly = jnp.where(found[index], index, anomaly)
    return anomaly, norms


def watch_norm(norms: jax.Array, norm: jax.Array, factor: float) -> tuple[jax.Array, jax.Array]:
    """Returns the running mean's new sum and weight [2], and whether `norm` is a spike: above `factor` times the mean.

    The mean is exponential. A spike enters it as `factor` times the mean, so that a lasting rise is caught up with.
    """
    warm, bound = norms[1] > _NORM_WARMUP, factor * norms[0] / jnp.maximum(norms[1], 1.0)
    seen = jnp.stack([jnp.where(warm, jnp.minimum(norm, bound), norm), jnp.float32(1)])
    return _NORM_DECAY * norms + jnp.where(jnp.isfinite(norm), seen, 0.0), warm & (norm > bound)
