"""Regret: how far a method is below the best of a setting, corrected for the luck of a maximum. Pure functions.

The best of several methods that are equally good looks better than it is: the maximum of their means is above what each
of them is worth. In a setting with means `x_j` over `n_j` seeds the noise of a mean is taken as

    v_j = s^2 / n_j + (1 - SHARED) u_j

with the variance `s^2` of seeds, pooled over the methods of the setting, and `u_j` that of a balanced accuracy on so
many test images, of which methods share the part `SHARED`: what is a hard image for one is so for another.
Methods within two standard errors of the best are its *level*. The excess `E max_j e_j` of their noises is what the
best of them shows too much, and so what a method that is level with the best shows as regret. Corrected:

    regret_m = max_j x_j - excess - x_m

which is about 0 on average of a method that is level, and below 0 of a lucky one. Intervals are those of a parametric
bootstrap: means drawn anew around the level and around the others' means, with Student's tails for the pooled variance.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
SHARED = 0.5
DRAWS = 20_000
_LEVEL = 2.0  # standard errors of a difference


class Scores(NamedTuple):
    """What a method showed in one setting: a balanced accuracy a seed, and the test set's variance of one (`u_j`)."""

    values: Sequence[float]
    test_variance: float = 0.0


class Noise(NamedTuple):
    """Of J methods: means [J], variances of these means [J], the methods at the best's level [J], draws [D, J]."""

    means: Floats
    variances: Floats
    level: npt.NDArray[np.bool_]
    draws: Floats

    @property
    def excess(self) -> float:
        """What the best of those at its level shows too much."""
        return float(self.draws[:, self.level].max(1).mean())

    @property
    def best(self) -> float:
        """What the best is worth."""
        return float(self.means.max()) - self.excess


class Regret(NamedTuple):
    """In the unit of the scores: the regret, its 95 % interval, and what a method level with the best would show."""

    value: float
    low: float
    high: float
    excess: float


def test_variance(recalls: Sequence[float], images: Sequence[int]) -> float:
    """Returns the variance of the mean of K recalls, each a share of so many test images: `sum p (1 - p) / n / K^2`.

    Classes without test images, whose recall is none, are left out.
    """
    parts = [p * (1 - p) / n for p, n in zip(recalls, images, strict=True) if n]
    return sum(parts) / len(parts) ** 2


def pooled_variance(scores: Sequence[Scores]) -> tuple[float, int]:
    """Returns the variance of seeds, taken as equal for all methods, and its degrees of freedom (0: one seed each)."""
    free = sum(len(one.values) - 1 for one in scores)
    squares = sum(float(np.sum((np.array(one.values) - np.mean(one.values)) ** 2)) for one in scores)
    return (squares / free if free else 0.0), free


def noise(scores: Sequence[Scores], rng: np.random.Generator, draws: int = DRAWS) -> Noise:
    """Returns the noise of the methods' means in one setting."""
    means = np.array([np.mean(one.values) for one in scores])
    seeds = np.array([len(one.values) for one in scores])
    test = (1 - SHARED) * np.array([one.test_variance for one in scores])
    of_seeds, free = pooled_variance(scores)
    variances = of_seeds / seeds + test
    best = int(means.argmax())
    gap = np.sqrt(variances + variances[best])
    gap[best] = 0.0
    spread = free / rng.chisquare(free, (draws, 1)) if free else np.ones((draws, 1))
    drawn = rng.standard_normal((draws, len(means))) * np.sqrt(of_seeds * spread / seeds + test)
    return Noise(means, variances, means.max() - means <= _LEVEL * gap, drawn)


def regrets(found: Noise) -> list[Regret]:
    """Returns the regret of each method of one setting."""
    worth = np.where(found.level, found.best, found.means)
    too_much = (worth + found.draws).max(1) - found.best - found.excess  # of the best, in each draw
    rows = []
    for mean, own in zip(found.means, found.draws.T, strict=True):
        value = found.best - float(mean)
        low, high = value - np.quantile(too_much - own, [0.975, 0.025])
        rows.append(Regret(value, float(low), float(high), found.excess))
    return rows


class Summary(NamedTuple):
    """Over settings: a method's mean and worst regret, uncorrected, and what one level with the best would show.

    mean_low, mean_high: 95 % interval of `mean - level_mean`, the corrected mean.
    """

    mean: float
    worst: float
    level_mean: float
    level_worst: float
    mean_low: float
    mean_high: float


def summary(settings: Mapping[str, Noise], method: int) -> Summary:
    """Returns the summary of the method at this position in every setting."""
    shown, level, errors = [], [], []
    for found in settings.values():
        worth = np.where(found.level, found.best, found.means)
        own = found.draws[:, method]
        shown.append(float(found.means.max() - found.means[method]))
        errors.append((worth + found.draws).max(1) - found.best - found.excess - own)
        worth[method] = found.best  # as if it were level
        level.append((worth + found.draws).max(1) - found.best - own)
    alike = np.stack(level)  # [settings, D]
    mean, level_mean = float(np.mean(shown)), float(alike.mean())
    low, high = mean - level_mean - np.quantile(np.mean(errors, 0), [0.975, 0.025])
    return Summary(mean, max(shown), level_mean, float(alike.max(0).mean()), float(low), float(high))
