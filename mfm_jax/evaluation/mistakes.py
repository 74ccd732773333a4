"""Which mistakes to look at first: the classes that are surely recognised worst, and the pairs confused most often."""

from typing import NamedTuple

import numpy as np

from mfm_jax.evaluation import intervals

SHOWN = 8  # of either kind, in a report


class Pair(NamedTuple):
    """`images` of class `label` that were taken for class `answer`."""

    label: int
    answer: int
    images: int


def confused(labels: np.ndarray, answers: np.ndarray, images: np.ndarray | int = 1) -> list[Pair]:
    """Returns the pairs of classes that were confused, those with the most images first.

    `labels` and `answers` are int [N]; each entry stands for so many `images`.
    """
    wrong = labels != answers
    pairs, entry = np.unique(np.stack([labels, answers])[:, wrong], axis=1, return_inverse=True)
    total = np.bincount(entry.ravel(), np.broadcast_to(images, labels.shape)[wrong], minlength=pairs.shape[1])
    order = np.argsort(-total, kind="stable")
    return [Pair(*map(int, (*pairs[:, i], total[i]))) for i in order]


def worst(right: np.ndarray, images: np.ndarray) -> list[int]:
    """Returns the tested classes, first the one whose interval ends lowest: not one with few images by chance.

    Of the `images` of each class, int [K], that were tested, `right` were classified rightly.
    """
    tested = np.flatnonzero(images)
    upper = [intervals.wilson(right[k] / images[k], images[k])[1] for k in tested]
    return tested[np.argsort(upper, kind="stable")].tolist()
