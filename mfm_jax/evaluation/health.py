"""Warnings of a run: signs that the meta pass has come to nothing.

A meta learner that has broken down stops nothing: the training loss goes on falling. `notices` reads the rows that a
run has logged, at the end of an epoch, and returns each sign once a run, with the fields to look at.

  meta_loss      the mean meta loss of an epoch is above that of a guess.
  meta_gradient  its mean norm is 100 times that of one of the last three epochs.
  phi_still      gamma and beta have not moved for three epochs, though the meta loss is far from low.
  phi_bound      gamma has been at the bound of tanh for three epochs, or beta beyond any use.

No sign are these, which happen in runs that end well:

  - Under `meta.bn=running` the averages lag in the first steps, and the meta loss is several times that of a guess.
  - A classifier first learns how often each class comes. On a balanced set such a guess is worse than an equal one, by
    0.9 nats at 10 classes and an imbalance factor of 100.
  - phi rests when the learning rate of w is low, for the meta-gradient is proportional to it, when it has converged,
    and in a single epoch by chance.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mfm_jax.config import Config

KIND = "warning"  # of the rows that hold notices, with their `code` and `sentence`
_YOUNG_STEPS, _YOUNG_FACTOR = 100, 10.0  # an epoch that begins before has this many times the room in its meta loss
_JUMP = 100.0  # of the norm of the meta-gradient
_EPOCHS = 3  # that a norm is compared with, that phi stands still or is at a bound
_STILL = 1e-3  # a tenth of what phi moves in one meta-step at the default rate, where meta-gradients agree
_STILL_LOSS = 0.5  # of an equal guess: below it, phi may have converged
_STILL_RATE = 0.25  # of the largest learning rate
_GAMMA_BOUND, _BETA_BOUND = 0.98, 20.0  # at 0.98 the slope of tanh is 0.04


class Notice(NamedTuple):
    """A warning: the name of the sign, and a sentence for the user."""

    code: str
    sentence: str


@dataclass(frozen=True)
class Guess:
    """The numbers of a classifier that has seen no image.

    equal: the meta loss of equal probabilities; log K for the cross-entropy.
    by_count: the meta loss, on a balanced set, of the classes' shares of the training images.
    accuracy: the share of the largest class.
    """

    equal: float
    by_count: float
    accuracy: float


def notices(rows: Sequence[Mapping[str, Any]], config: Config, guess: Guess) -> list[Notice]:
    """Returns the warnings that the newest epoch gives for the first time.

    `rows` are those of `metrics.jsonl`, in order, with those of kind `warning` and the newest epoch's `train` and
    `modulation`; `guess` is of the run's classes and meta loss.
    """
    given = {row["code"] for row in rows if row["kind"] == KIND}
    train = [row for row in rows if row["kind"] == "train"]
    if not train or "meta_loss" not in train[-1]:  # no meta-step in it: none is due, or phi is frozen
        return []
    signs = {"meta_loss": _meta_loss(train, guess), "meta_gradient": _meta_gradient(train)}
    if modulation := [row for row in rows if row["kind"] == "modulation"]:
        signs["phi_still"] = _phi_still(train, modulation, guess)
        signs["phi_bound"] = _phi_bound(modulation, bounded="direct" not in dict(config.forms).values())
    return [Notice(code, sentence) for code, sentence in signs.items() if sentence and code not in given]


def _meta_loss(train: Sequence[Mapping[str, Any]], guess: Guess) -> str | None:
    newest = train[-1]
    first_step = train[-2]["step"] if len(train) > 1 else 0
    fits = newest["accuracy"] > (1 + guess.accuracy) / 2
    level = guess.equal if fits else guess.by_count
    if newest["meta_loss"] <= level * (_YOUNG_FACTOR if first_step < _YOUNG_STEPS else 1):
        return None
    return (
        f"meta_loss = {newest['meta_loss']:.4g} in epoch {newest['epoch']}, above the {level:.3g} of a guess, with"
        f" training accuracy {100 * newest['accuracy']:.0f} %: what phi learns from is not the network that is tested;"
        " look at meta.bn, optim.learning_rate and meta.learning_rate"
    )


def _meta_gradient(train: Sequence[Mapping[str, Any]]) -> str | None:
    newest, before = train[-1], [row for row in train[:-1] if row.get("hypergrad_norm")][-_EPOCHS:]
    smallest = min(before, key=lambda row: row["hypergrad_norm"], default=None)
    if smallest is None:
        return None
    # A virtual step is as long as the rate, and w_hat as far from w: a rate that rises, as at a restart, is no jump.
    risen = max(newest["learning_rate"], smallest["learning_rate"]) / max(smallest["learning_rate"], 1e-30)
    if newest["hypergrad_norm"] < _JUMP * smallest["hypergrad_norm"] * risen:
        return None
    return (
        f"hypergrad_norm = {newest['hypergrad_norm']:.3g} in epoch {newest['epoch']},"
        f" {newest['hypergrad_norm'] / smallest['hypergrad_norm']:.0f} times that of epoch {smallest['epoch']}: such"
        " steps undo what phi has learned; look at optim.learning_rate, meta.bn and meta.batch_size"
    )


def _phi_still(train: Sequence[Mapping[str, Any]], modulation: Sequence[Mapping[str, Any]], guess: Guess) -> str | None:
    recent = train[-_EPOCHS:]
    if len(modulation) <= _EPOCHS or any("meta_loss" not in row for row in recent):
        return None
    low_rate = _STILL_RATE * max(row["learning_rate"] for row in train)
    if any(row["meta_loss"] < _STILL_LOSS * guess.equal or row["learning_rate"] < low_rate for row in recent):
        return None
    values = [_values(row) for row in modulation[-_EPOCHS - 1 :]]
    moved = max(abs(a - b) for old, new in itertools.pairwise(values) for a, b in zip(old, new, strict=True))
    if moved >= _STILL:
        return None
    return (
        f"gamma and beta have moved by {moved:.1g} or less an epoch up to epoch {recent[-1]['epoch']}, with meta_loss ="
        f" {recent[-1]['meta_loss']:.3g}: phi stands still; look at meta.learning_rate, and in the report for epochs"
        " with a large hypergrad_norm, which slow it for a thousand meta-steps"
    )


def _values(row: Mapping[str, Any]) -> list[float]:
    """Returns every gamma and beta of a row."""
    return [value for site in row["sites"].values() for name in ("gamma", "beta") for value in site[name]]


def _phi_bound(modulation: Sequence[Mapping[str, Any]], *, bounded: bool) -> str | None:
    if len(recent := modulation[-_EPOCHS:]) < _EPOCHS:
        return None
    bounds = {"beta": _BETA_BOUND} | ({"gamma": _GAMMA_BOUND} if bounded else {})
    for site in recent[-1]["sites"]:
        for name, bound in bounds.items():
            largest = [max(row["sites"][site][name], key=abs) for row in recent]
            if min(map(abs, largest)) > bound:
                return (
                    f"{name} at site {site!r} is {largest[-1]:.4g} in epoch {recent[-1]['epoch']}, and has been beyond"
                    f" {bound:g} for {_EPOCHS} epochs: it hardly comes back; look at meta.learning_rate and"
                    " modulation.shift_only"
                )
    return None
