"""Prediction sets with a promise: the classes of an image that hold the true one with a probability chosen beforehand.

A class is in the set of an image where its probability is at least the class's threshold. Thresholds come from held-out
images, each class's own where it has enough of them, so the promise is made for each class and not for all together,
which the head would fill alone. Classes with few held-out images share a threshold with their neighbours by training
count: the promise is then one for these classes together, and not for each.

References:
  Vovk, Conditional validity of inductive conformal predictors, ACML 2012 (classes apart).
  Sadinle, Lei and Wasserman, Least ambiguous set-valued classifiers with bounded error levels, JASA 2019 (the
    score 1 - p_y, whose sets are the smallest on average).
  Ding et al., Class-conditional conformal prediction with many classes, NeurIPS 2023 (classes in clusters).
  Johansson et al., Handling small calibration sets in mondrian inductive conformal regressors, SLDS 2015 (ranks
    between two images).
"""

import math
from typing import Any, NamedTuple

import numpy as np

from mfm_jax.data import longtail


class Sets(NamedTuple):
    """What makes prediction sets of probabilities.

    coverage: the promised probability that the true class is in the set.
    thresholds: float [K]; class k is in the set where `p_k >= thresholds[k]`.
    pools: int [K]; classes of one number share their threshold.
    """

    coverage: float
    thresholds: np.ndarray
    pools: np.ndarray

    def members(self, probs: np.ndarray) -> np.ndarray:
        """Returns which classes are in the set of each image, bool [N, K], for probabilities [N, K].

        A set may be empty: no class is as probable as it mostly is for its own images.
        """
        return np.asarray(probs, np.float64) >= self.thresholds

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON has them."""
        return {
            "coverage": self.coverage,
            "thresholds": np.asarray(self.thresholds).tolist(),
            "pools": np.asarray(self.pools).tolist(),
        }


def from_dict(found: dict[str, Any]) -> Sets:
    """Returns the sets that `Sets.to_dict` wrote."""
    return Sets(found["coverage"], np.array(found["thresholds"], np.float64), np.array(found["pools"], np.int64))


def fit(probs: np.ndarray, labels: np.ndarray, train_counts: np.ndarray, coverage: float) -> Sets:
    """Returns the sets with the promise `coverage`, from held-out images.

    The images must have had no part in training, nor in the choice of the checkpoint. Of the n images of a pool the
    threshold is the value at rank `(n + 1) coverage` of the probabilities of their own classes, from the highest down;
    between two of them it is interpolated. So a new image of the pool's classes is covered with probability
    `coverage`, exactly where the rank is whole, and to less than 1 / (n + 1) elsewhere.

    `probs` are float [N, K], `labels` int [N]; by `train_counts`, int [K], classes are neighbours.
    `coverage` is 0.5 or more, below 1.
    """
    probs, labels = np.asarray(probs, np.float64), np.asarray(labels)
    images = np.bincount(labels, minlength=probs.shape[1])
    found = pools(images, np.asarray(train_counts), least_images(coverage))
    own = probs[np.arange(len(labels)), labels]
    members = [own[found[labels] == pool] for pool in range(max(found) + 1)]
    thresholds = np.array([_at_rank(np.sort(values)[::-1], coverage) for values in members])
    return Sets(coverage, thresholds[found], found)


def least_images(coverage: float) -> int:
    """Returns how many images a threshold needs: `(n + 1) coverage <= n`."""
    return math.ceil(round(coverage / (1 - coverage), 6))


def pools(images: np.ndarray, train_counts: np.ndarray, least: int) -> np.ndarray:
    """Returns the pool of each class, int [K]: as few classes as have `least` held-out images together.

    Classes go from most to fewest training images. A pool ends with its shot group (`longtail.shot_groups`) where it
    can; what is left of a group joins the group's last pool, or else the next group.

    `images`, int [K], are the held-out images of each class.
    """
    groups = longtail.shot_groups(train_counts)
    pool = np.zeros(len(images), np.int64)
    done, waiting = -1, []
    for name in ("many", "medium", "few"):
        first = done + 1
        for k in sorted(groups[name], key=lambda k: -train_counts[k]):
            waiting.append(k)
            if images[waiting].sum() >= least:
                done += 1
                pool[waiting], waiting = done, []
        if waiting and done >= first:
            pool[waiting], waiting = done, []
    pool[waiting] = max(done, 0)
    return pool


def _at_rank(falling: np.ndarray, coverage: float) -> float:
    """Returns the interpolated value at rank `(n + 1) coverage` of n falling values; 0 where there are too few."""
    rank = round((len(falling) + 1) * coverage, 9)
    if rank > len(falling):
        return 0.0
    low = math.floor(rank)
    between = rank - low
    return float(falling[low - 1] + (between * (falling[low] - falling[low - 1]) if between else 0.0))


def measure(sets: Sets, probs: np.ndarray, labels: np.ndarray, train_counts: np.ndarray) -> dict[str, Any]:
    """Returns how the sets do on images that they were not fitted on.

    Returns:
      Of `all` images and those of the classes of each shot group that has some: `images`, `covered` (how many have
      their class in the set), `size` (classes in a set, the mean) and `empty` (sets without a class).
    """
    members, labels = sets.members(probs), np.asarray(labels)
    covered, size = members[np.arange(len(labels)), labels], members.sum(axis=1)
    groups = longtail.shot_groups(np.asarray(train_counts))
    chosen = {name: np.isin(labels, groups[name]) for name in ("many", "medium", "few")}
    return {
        name: {
            "images": int(mask.sum()),
            "covered": int(covered[mask].sum()),
            "size": float(size[mask].mean()),
            "empty": int((size[mask] == 0).sum()),
        }
        for name, mask in ({"all": np.ones(len(labels), bool)} | chosen).items()
        if mask.any()
    }
