"""Images to look at again, by a classifier's probabilities and features: wrong labels, outliers, near duplicates."""

import warnings
from typing import NamedTuple

import numpy as np

from mfm_jax.errors import UserError, install

LABEL, OUTLIER, NEAR_DUPLICATE = KINDS = ("label", "outlier", "near duplicate")
_NEIGHBOURS = 20  # that the density around an image is taken from
_NEAR = 0.13  # of the median distance to the nearest neighbour: closer ones are near duplicates


class Suspect(NamedTuple):
    """An image to look at.

    kind: one of `KINDS`. image: its position. score: the smaller the more suspicious; what it is, the function that
    found it says. other: the position of the image that it nearly repeats, else -1.
    """

    kind: str
    image: int
    score: float
    other: int = -1


def installed() -> None:
    """Raises a UserError where `wrong_labels` lacks its library."""
    try:
        import cleanlab  # noqa: F401 (whether it is installed)
    except ImportError as error:
        raise UserError(f"audit: cleanlab is not installed; {install('audit')}") from error


def wrong_labels(probabilities: np.ndarray, labels: np.ndarray) -> list[Suspect]:
    """Returns the images whose label is likely wrong, the likeliest first; the score is the label's probability.

    Confident learning (Northcutt, Jiang, Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR
    70, 2021, section 3). Class k has the threshold t_k, the mean of p(k | x) over the images labelled k: so a rare
    class, to which a classifier gives little, is not judged by the confidence of a large one. An image with label i is
    counted as a j where p(j | x) >= t_j, for the likeliest such j. These counts, calibrated to the labels' own, tell
    how many with label i are j; that many are flagged, by the largest p(j | x) - p(i | x) (prune by noise rate), unless
    the classifier names their label.

    `probabilities` are float [N, K], by classifiers that were not trained on the image; `labels` are int [N].

    Raises:
      UserError: cleanlab is not installed.
    """
    installed()
    from cleanlab import filter as confident_learning

    with warnings.catch_warnings():  # a class with too few images to be pruned is no news here
        warnings.filterwarnings("ignore", "May not flag all label issues")
        flagged = confident_learning.find_label_issues(
            labels,
            probabilities.astype(np.float64),
            return_indices_ranked_by="self_confidence",
            n_jobs=1,  # a process for each core would be forked, beside threads
        )
    return [Suspect(LABEL, int(i), float(probabilities[i, labels[i]])) for i in flagged]


def by_features(features: np.ndarray, labels: np.ndarray) -> list[Suspect]:
    """Returns the outliers, the farthest first, then the near duplicates, those with two labels first.

    Distances are Euclidean between features of unit length. An outlier is far from its neighbours as measured by their
    distances to their own: its local outlier factor (Breunig et al., "LOF: Identifying Density-Based Local Outliers",
    SIGMOD 2000), by 20 neighbours, is above 1.5; the score is one over it. The density is local, so that the thinly
    filled place of a rare class is none. A near duplicate is closer to an earlier image than 0.13 times the median
    distance between nearest neighbours (the rule of cleanlab's Datalab); the score is that ratio, 0 of a copy.

    `features` are float [N, C], N at least 3, `labels` int [N].
    """
    from sklearn.neighbors import LocalOutlierFactor

    length = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.maximum(length, 1e-12)
    with warnings.catch_warnings():  # of many copies of one image, which have no density
        warnings.filterwarnings("ignore", "Duplicate values are leading to incorrect results")
        found = LocalOutlierFactor(n_neighbors=min(_NEIGHBOURS, len(unit) - 1))
        outlying = np.flatnonzero(found.fit_predict(unit) == -1)
    factor = -found.negative_outlier_factor_
    outliers = [Suspect(OUTLIER, int(i), float(1 / factor[i])) for i in outlying[np.argsort(-factor[outlying])]]
    distance, nearest = (column[:, 0] for column in found.kneighbors(n_neighbors=1))
    ratio = distance / max(float(np.median(distance)), 1e-12)
    pairs = {(min(i, j), max(i, j)): float(ratio[i]) for i, j in enumerate(nearest.tolist()) if ratio[i] < _NEAR}
    near = [Suspect(NEAR_DUPLICATE, second, ratio, first) for (first, second), ratio in pairs.items()]
    return outliers + sorted(near, key=lambda one: (labels[one.image] == labels[one.other], one.score))
