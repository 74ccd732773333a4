"""Features drawn from a Gaussian of each class, whose rare classes borrow from frequent ones: RCAL."""

import warnings
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_NEIGHBOURS = 300  # that the density around a feature is taken from, at most: wrong labels lie in clusters, too
_RIDGE = 1e-4  # of the mean variance, added to each: a class of few images has directions without any

Floats = npt.NDArray[np.float64]


class Gaussian(NamedTuple):
    """A class's distribution: `mean` [C], `covariance` [C, C]; `size`: of how many features it was taken."""

    mean: Floats
    covariance: Floats
    size: int


def drawn(
    features: np.ndarray, labels: np.ndarray, trimmed: float, neighbors: int, borrowed: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns features drawn from the calibrated Gaussian of each class, as many of each as the largest class has.

    `features` are float32 [N, C], `labels` int32 [N], of which every class has one. Those that are returned are
    K n_max in all, class by class; `seed` is of the draw. `trimmed` is of `robust`, `neighbors` and
    `borrowed` are of `calibrated`.

    References:
      Zhang et al., When noisy labels meet long tail dilemmas: a representation calibration method, ICCV 2023
      (arXiv:2211.10955), distributional calibration. Theirs are the features of a contrastive first stage; here they
      are those of the trained classifier, and the drawn ones alone train the last layer.
    """
    own = [robust(features[labels == k], trimmed) for k in range(labels.max() + 1)]
    most = np.bincount(labels).max()
    found = [
        np.random.default_rng([seed, k]).multivariate_normal(one.mean, one.covariance, most, method="eigh")
        for k, one in enumerate(calibrated(own, neighbors, borrowed))
    ]
    return np.concatenate(found).astype(features.dtype), np.repeat(np.arange(len(own), dtype=labels.dtype), most)


def robust(features: np.ndarray, trimmed: float) -> Gaussian:
    """Returns the Gaussian of one class's features [n, C], those left out that lie apart: wrong labels, mostly.

    They are the `int(trimmed * n)` with the largest local outlier factor, by half of the class or 300 neighbours
    (Breunig et al., LOF: identifying density-based local outliers, SIGMOD 2000). With fewer neighbours the wrong labels
    of one class, which lie together, would pass for dense. The covariance divides by the number that is left.
    """
    from sklearn.neighbors import LocalOutlierFactor

    kept = features.astype(np.float64)
    if apart := int(trimmed * len(kept) + 1e-9):
        with warnings.catch_warnings():  # of copies of one image, which have no density
            warnings.filterwarnings("ignore", "Duplicate values are leading to incorrect results")
            found = LocalOutlierFactor(n_neighbors=min(_NEIGHBOURS, len(kept) // 2)).fit(kept)
        kept = kept[np.sort(np.argsort(found.negative_outlier_factor_, kind="stable")[apart:])]
    mean = kept.mean(axis=0)
    return Gaussian(mean, (kept - mean).T @ (kept - mean) / len(kept), len(kept))


def calibrated(own: list[Gaussian], neighbors: int, borrowed: float) -> list[Gaussian]:
    """Returns the K Gaussians, those of rare classes moved towards frequent ones nearby.

    A class is rare if it has fewer features than the classes have on average. The `neighbors` frequent classes with the
    nearest means lend to it, by weights `w_j ~ n_j exp(-d_j / d)`, where d_j is the distance of the means and d the
    mean of these. With b = `borrowed`

        mean' = (1 - b) mean + b sum_j w_j mean_j,  covariance' = (1 - b) covariance + b sum_j w_j covariance_j.

    A class of one image has no covariance of its own: its covariance' is the neighbours' alone. b = 0 keeps the rest.
    All get a ridge of 1e-4 of their mean variance.
    """
    sizes = np.array([one.size for one in own])
    frequent = np.flatnonzero(sizes >= sizes.mean())
    found = []
    for one in own:
        mean, covariance = one.mean, one.covariance
        if one.size < sizes.mean():
            distance = np.array([np.linalg.norm(own[j].mean - mean) for j in frequent])
            nearest = np.argsort(distance, kind="stable")[:neighbors]
            weight = sizes[frequent[nearest]] * np.exp(-distance[nearest] / max(distance[nearest].mean(), 1e-12))
            lent = list(zip(weight / weight.sum(), (own[j] for j in frequent[nearest]), strict=True))
            mean = (1 - borrowed) * mean + borrowed * sum(w * other.mean for w, other in lent)
            part = borrowed if one.size > 1 else 1.0
            covariance = (1 - part) * covariance + part * sum(w * other.covariance for w, other in lent)
        ridge = _RIDGE * np.trace(covariance) / len(mean)
        found.append(Gaussian(mean, covariance + ridge * np.eye(len(mean)), one.size))
    return found
