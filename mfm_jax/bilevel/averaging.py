"""Averages of weights: what is tested in the place of the weights that are trained.

An average never enters a training step: the weights, their optimizer and phi take the same way with it and without. It
lies beside them in the state (`types.Average`), and what is tested is

    share a + (1 - share) w,    a <- (1 - r_t) a + r_t w after step t

with w the trained weights. A rule (`Averaging`) says the rate r_t and the share: `exponential` and `equal` test the
mean a alone, `start` holds a at the weights that training began with. Batch statistics are averaged along, and taken
anew for the tested weights before these are evaluated or stored (`training.loop.make_settle`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mfm_jax.models.tuning import merged
from mfm_jax.types import Average, BilevelState, PyTree


class Averaging(NamedTuple):
    """How an average moves.

    rate: steps done, int32 -> r_t, what the newest weights are of the average.
    statistics: the same of the batch statistics.
    share: what the average is of the tested weights; the trained ones are the rest.
    """

    rate: Callable[[jax.Array], jax.Array]
    statistics: Callable[[jax.Array], jax.Array]
    share: float = 1.0


def exponential(decay: float) -> Averaging:
    """Returns the running mean of the weights after each step: `r_t = max(1 / t, 1 - decay)`.

    The first 1 / (1 - decay) steps have an equal mean, so that the weights at random count no longer than others.

    References:
      Tarvainen and Valpola, Mean teachers are better role models, NeurIPS 2017 (evaluation by such a mean).
    """

    def rate(step: jax.Array) -> jax.Array:
        return jnp.maximum(1.0 / step, 1.0 - decay)

    return Averaging(rate, rate)


def equal(begin: int, every: int) -> Averaging:
    """Returns the equal mean of the weights at step `begin` and after every `every` steps from there.

    Up to `begin` the average is the weights themselves.

    References:
      Izmailov et al., Averaging weights leads to wider optima and better generalization, UAI 2018, algorithm 1.
    """

    def rate(step: jax.Array) -> jax.Array:
        seen, past = jnp.divmod(step - begin, every)
        return jnp.where(step <= begin, 1.0, jnp.where(past == 0, 1.0 / (1 + seen), 0.0))

    return Averaging(rate, rate)


def start(share: float) -> Averaging:
    """Returns the interpolation of the trained weights with those at the start, which are `share` of what is tested.

    References:
      Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022 (WiSE-FT; its alpha is
      1 - share).
    """
    return Averaging(jnp.zeros_like, jnp.ones_like, share)


def begun(rule: Averaging, params: PyTree, batch_stats: PyTree) -> Average:
    """Returns the average before the first step: copies of the variables, since a step gives its arguments away."""
    params, batch_stats = jax.tree.map(jnp.copy, (params, batch_stats))
    return Average(params, batch_stats, jnp.float32(rule.share))


def averaged(step: Callable[..., Any], rule: Averaging) -> Callable[..., Any]:
    """Returns a training step `(state, *batches) -> (state, metrics)` after which the average moves."""

    def moved(state: BilevelState, *batches: Any) -> tuple[BilevelState, Any]:
        new, metrics = step(state, *batches)
        average = new.average.replace(
            params=_mixed(new.average.params, new.params, rule.rate(new.step)),
            batch_stats=_mixed(new.average.batch_stats, new.batch_stats, rule.statistics(new.step)),
        )
        return new.replace(average=average), metrics

    return moved


def on_tested(step: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a second stage's step, which then trains on the classifier that is tested."""

    def moved(state: BilevelState, batch: Any) -> tuple[BilevelState, Any]:
        new, metrics = step(tested(state), batch)
        kept = {name: getattr(state, name) for name in ("params", "batch_stats", "average")}
        return new.replace(**kept), metrics

    return moved


def tested(state: BilevelState) -> BilevelState:
    """Returns `state` with the tested classifier's parameters and batch statistics, and no average."""
    average = state.average
    if not average:
        return state
    # LoRA is a product, which is not mixed by mixing its factors.
    params = _mixed(merged(state.params), merged(average.params), average.share)
    return state.replace(params=params, batch_stats=average.batch_stats, average=())


def _mixed(old: PyTree, new: PyTree, rate: jax.Array) -> PyTree:
    """Returns `(1 - rate) old + rate new`: bit for bit `old` at 0 and `new` at 1."""

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        r = rate.astype(jnp.promote_types(a.dtype, jnp.float32))
        return ((1 - r) * a + r * b).astype(a.dtype)

    return jax.tree.map(one, old, new)
