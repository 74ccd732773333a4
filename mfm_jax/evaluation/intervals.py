"""How far an accuracy, or a difference between methods, may be from the truth.

Of one run, an interval comes from how many images of each class were tested and how many were right. Resampling the
test images cannot give it: where a class has two of them and both are wrong, they are wrong in every resample, and the
interval of a mean over such classes is far too narrow. Wilson's has no such trouble, and a mean over classes has it by
the number of images whose plain accuracy would vary as much (the effective sample size).
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mfm_jax.data import longtail

Interval = tuple[float, float]
_Z = 1.959964  # of a standard normal: 95 % lie within


def wilson(accuracy: float, images: float) -> Interval:
    """Returns the 95 % interval of an accuracy over so many `images`, fractions.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    shrink = 1 + _Z**2 / images
    middle = (accuracy + _Z**2 / (2 * images)) / shrink
    half = _Z / shrink * np.sqrt(accuracy * (1 - accuracy) / images + (_Z / (2 * images)) ** 2)
    return max(float(middle - half), 0.0), min(float(middle + half), 1.0)


def of_mean(right: np.ndarray, images: np.ndarray) -> Interval | None:
    """Returns the 95 % interval of the mean accuracy over classes; None where none of them was tested.

    Of the `images` of each class, int [K], that were tested, `right` were classified rightly.
    """
    right, images = right[images > 0], images[images > 0]
    if not len(images):
        return None
    # Each class borrows one image from all, so that a class with few does not pass for one without variance.
    pooled = (right.sum() + 1) / (images.sum() + 2)
    smooth = (right + pooled) / (images + 1)
    variance = (smooth * (1 - smooth) / images).sum() / len(images) ** 2
    return wilson(float((right / images).mean()), float(smooth.mean() * (1 - smooth.mean()) / variance))


def of_values(values: np.ndarray, most: float) -> Interval:
    """Returns the 95 % interval of the mean of `values` [N] between 0 and `most`, such as costs; of 0 and 1, `wilson`.

    Wilson's for as many images as would vary as much were each value 0 or `most`; a value of either kind is borrowed,
    so that values that are all the same do not pass for ones without variance.
    """
    if not most:
        return 0.0, 0.0
    share = values / most
    mean, borrowed = (share.sum() + 1) / (len(share) + 2), np.append(share, (0.0, 1.0))
    images = len(share) * mean * (1 - mean) / borrowed.var()
    low, high = wilson(float(share.mean()), float(images))
    return most * low, most * high


def right_of(found: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many images of each class were right, and how many were tested, int [K], of `metrics.evaluate`."""
    images = np.array(found["per_class_images"])
    accuracy = np.array([value or 0.0 for value in found["per_class_accuracy"]])
    return np.rint(accuracy * images).astype(int), images


def of_evaluation(found: Mapping[str, Any], train_counts: np.ndarray) -> dict[str, Interval | None]:
    """Returns the 95 % interval of each accuracy that `metrics.evaluate` returned, by its name.

    They are of the test images alone: another seed would move the accuracy further.
    """
    right, images = right_of(found)
    groups = {"balanced_accuracy": np.arange(len(images)), **longtail.shot_groups(train_counts)}
    return {
        "accuracy": wilson(found["accuracy"], int(images.sum())),
        **{name: of_mean(right[members], images[members]) for name, members in groups.items()},
    }


class Difference(NamedTuple):
    """A mean difference, its standard error, and half the width of its 95 % interval (None for a single pair)."""

    mean: float
    error: float | None
    half: float | None


def paired(values: Sequence[float], against: Sequence[float]) -> Difference:
    """Returns the mean of `values - against`, pair by pair, with Student's interval."""
    import scipy.special  # here, because only comparisons need it, and every command imports this module

    gaps = [a - b for a, b in zip(values, against, strict=True)]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None
    half = None if error is None else float(scipy.special.stdtrit(len(gaps) - 1, 0.975)) * error
    return Difference(statistics.fmean(gaps), error, half)
