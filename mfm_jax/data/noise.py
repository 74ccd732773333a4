"""Wrong labels for a long-tailed training set, to measure what a method makes of them (`data.label_noise`).

The long tail is made first, by the true labels. Then labels of training images alone are changed: validation, meta and
test images keep theirs. The manifest lists the records that were changed, each with the label that it got.

Symmetric noise is that of Patrini et al., Making deep neural networks robust to label noise: a loss correction
approach, CVPR 2017. Noise by confusion goes to one similar class, as their asymmetric noise does; which one that is,
the images say here.

NumPy only.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

_STREAM = 3  # first entry of the seed; those of `longtail` are 0 to 2

Labels = npt.NDArray[np.int32]


def nearest(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.integer], num_classes: int) -> Labels:
    """Returns for each class the other one whose mean image is nearest, int32 [K]; every class has an image.

    Distances are Euclidean, between means of `images` [N, H, W, C] with these `labels` [N]. Of equally near ones it is
    the first.
    """
    means = np.stack([images[labels == k].mean(axis=0, dtype=np.float64).ravel() for k in range(num_classes)])
    distance = np.stack([np.linalg.norm(means - mean, axis=1) for mean in means])
    np.fill_diagonal(distance, np.inf)
    return distance.argmin(axis=1).astype(np.int32)


def changed(
    labels: npt.NDArray[np.integer],
    num_classes: int,
    share: float,
    kind: Literal["symmetric", "proportional", "confusion"],
    seed: int,
    confused: npt.NDArray[np.integer] | None = None,
) -> Labels:
    """Returns labels [N] of which `share` is wrong, int32 [N].

    Of a class with n images `int(share * n)` get another label, so that none loses all of its own. Symmetric: each of
    the K - 1 other classes is as likely. Proportional: each by its size, `n_j / (N - n_k)`, so that rare classes stay
    rare. Confusion: class k becomes `confused[k]`, [K].
    """
    found = np.array(labels, np.int32)
    for k in range(num_classes):
        rng, members = np.random.default_rng([_STREAM, seed, k]), np.flatnonzero(labels == k)
        # The nudge keeps whole numbers whole: 0.29 * 100 is 28.999999999999996 in float64.
        wrong = rng.permutation(members)[: int(share * len(members) + 1e-9)]
        if kind == "confusion":
            assert confused is not None
            found[wrong] = confused[k]
        else:
            odds = np.bincount(labels, minlength=num_classes) if kind == "proportional" else np.ones(num_classes)
            odds = np.where(np.arange(num_classes) == k, 0, odds)
            found[wrong] = rng.choice(num_classes, size=len(wrong), p=odds / odds.sum())
    return found


def observed(ids: npt.NDArray[np.integer], labels: Labels, manifest: Mapping[str, Any]) -> Labels:
    """Returns the labels [N] of the records `ids` [N], sorted, as `manifest` changed them."""
    noise = manifest.get("noise", {"ids": [], "labels": []})
    found, wrong = labels.copy(), np.array(noise["ids"], np.int64)
    there = np.isin(wrong, ids)
    found[np.searchsorted(ids, wrong[there])] = np.array(noise["labels"], np.int32)[there]
    return found
