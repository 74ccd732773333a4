"""One evaluation of a classifier on long-tailed data, from its probabilities alone.

A single accuracy hides the question: a classifier that has only learned the head can look respectable on a balanced
test set, and an imbalanced one would reward the bias that the methods here remove. So everything starts from the recall
of each class, and the summary numbers are plain means of those recalls: over all classes (balanced accuracy), over the
shot groups of the literature (many, medium, few, by *training* count), and over thirds of the classes ordered by
training count. A shot group may be empty (CIFAR-10 has no few-shot class at any usual factor); a third never is.

Two more questions do not depend on the threshold: does the score of a class rank its images above the others (ROC AUC),
and does the confidence mean what it says (ECE, negative log-likelihood)? Methods that shift logits by a prior change
the second a great deal, often without touching the first.

Numbers are fractions in 0..1. A quantity that does not exist for the data (the accuracy of a class without test images,
the mean of an empty group) is None, never NaN and never 0: None survives JSON, and nobody averages it by mistake.
"""

from typing import Any

import numpy as np

from mfm_jax.data import longtail

ECE_BINS = 15
# How far a row of probabilities may sum from one: bfloat16 softmax stays well inside, logits do not.
_SUM_TOLERANCE = 1e-2
CONFUSION_CLASSES = 1_000  # above this many classes the confusion matrix is not kept


def evaluate(probs: np.ndarray, labels: np.ndarray, train_counts: np.ndarray) -> dict[str, Any]:
    """Returns every reported number of one evaluation.

    With `C[i, j]` the number of images of class i that were predicted as j (the largest probability; the
    lowest class index on a tie) and `N_i = sum_j C[i, j]`:

    - `accuracy`: `sum_i C[i, i] / N`.
    - `per_class_accuracy`: `C[i, i] / N_i`, a list of K; None where `N_i = 0`.
    - `balanced_accuracy`: its mean over the classes with `N_i > 0`.
    - `many`, `medium`, `few`, `head_third`, `middle_third`, `rarest_third`: its mean over the classes of each
      group of `longtail.shot_groups(train_counts)`; None for a group without a tested class.
    - `macro_f1`: mean F1 over the classes with `N_i > 0`; a class that is never predicted counts as 0.
    - `roc_auc`: mean one-vs-rest area over the classes with both positives and negatives; or None.
    - `ece`, `reliability`: see `expected_calibration_error` and `reliability_bins`, 15 bins.
    - `nll`: `-mean log p(label)` in nats; probabilities are floored at the smallest normal float32 (1.2e-38),
      so that a zero costs 87 nats rather than infinity.
    - `confusion`: C, K lists of K ints; None for more than 1,000 classes, where it would be gigabytes of text.
    - `per_class_images`: `N_i`, a list of K. `num_examples`: N.

    Args:
      probs: float[N, K], rows that sum to one (float32; other float types work).
      labels: int[N], in 0..K-1.
      train_counts: int[K], training images a class; used for the groups only.

    Returns:
      A dict of floats, ints, lists and None that `json.dumps` accepts; fractions in 0..1 except `nll`.

    Raises:
      ValueError: shapes that do not fit together, no examples, labels that are not integers in 0..K-1,
        negative counts, or `probs` that are not probabilities (NaN, infinite, negative, rows far from a sum
        of one).

    Source: the shot groups are those of Liu et al., "Large-Scale Long-Tailed Recognition in an Open World"
    (CVPR 2019); ECE is Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017).
    """
    import sklearn.metrics  # here: two seconds that the first step of a run does not wait for

    probs, labels, train_counts = np.asarray(probs), np.asarray(labels), np.asarray(train_counts)
    _check(probs, labels, train_counts)
    predictions = probs.argmax(axis=1)
    confusion = sklearn.metrics.confusion_matrix(labels, predictions, labels=np.arange(probs.shape[1]))
    support = confusion.sum(axis=1)
    present = np.flatnonzero(support)
    recall = np.full(support.shape, np.nan)
    recall[present] = confusion.diagonal()[present] / support[present]

    bins = reliability_bins(probs.max(axis=1), predictions == labels)
    label_probs = probs[np.arange(len(labels)), labels].astype(np.float64)
    return {
        "num_examples": len(labels),
        "accuracy": float(np.mean(predictions == labels)),
        "balanced_accuracy": float(recall[present].mean()),
        **{name: _mean(recall[members]) for name, members in longtail.shot_groups(train_counts).items()},
        # `labels=present` keeps a class without test images from entering the mean as a zero.
        "macro_f1": float(
            sklearn.metrics.f1_score(labels, predictions, labels=present, average="macro", zero_division=0.0)
        ),
        "roc_auc": _roc_auc(probs, labels, present),
        "ece": expected_calibration_error(bins),
        "nll": float(-np.log(np.maximum(label_probs, np.finfo(np.float32).tiny)).mean()),
        "per_class_accuracy": [None if np.isnan(value) else float(value) for value in recall],
        "reliability": bins,
        "per_class_images": support.tolist(),
        "confusion": confusion.tolist() if len(support) <= CONFUSION_CLASSES else None,
    }


def reliability_bins(
    confidence: np.ndarray, correct: np.ndarray, num_bins: int = ECE_BINS
) -> list[dict[str, float | int | None]]:
    """Returns confidence and accuracy of predictions in equal-width bins of confidence.

    Args:
      confidence: float[N] in 0..1, the probability of the predicted class.
      correct: bool[N], whether the prediction was right.
      num_bins: M; bin m holds the confidences in `(m / M, (m + 1) / M]`, and the first one holds 0 too.

    Returns:
      M dicts, `lower` and `upper` (the edges), `count`, and the bin's mean `confidence` and `accuracy`, which
      are None for an empty bin.
    """
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    confidence = np.asarray(confidence, np.float64)
    # A float32 softmax may exceed one by rounding: clip it into the last bin.
    index = np.clip(np.digitize(confidence, edges, right=True) - 1, 0, num_bins - 1)
    count = np.bincount(index, minlength=num_bins)
    confidence_sum = np.bincount(index, weights=confidence, minlength=num_bins)
    correct_sum = np.bincount(index, weights=np.asarray(correct, np.float64), minlength=num_bins)
    return [
        {
            "lower": float(edges[m]),
            "upper": float(edges[m + 1]),
            "count": int(count[m]),
            "confidence": float(confidence_sum[m] / count[m]) if count[m] else None,
            "accuracy": float(correct_sum[m] / count[m]) if count[m] else None,
        }
        for m in range(num_bins)
    ]


def expected_calibration_error(bins: list[dict[str, Any]]) -> float:
    """Returns `sum_m (n_m / N) |accuracy_m - confidence_m|` over `reliability_bins`, a fraction in 0..1.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
    """
    filled = [one for one in bins if one["count"]]
    gaps = [one["count"] * abs(one["accuracy"] - one["confidence"]) for one in filled]
    return sum(gaps) / sum(one["count"] for one in filled)


def with_temperature(probs: np.ndarray, temperature: float) -> np.ndarray:
    """Returns `softmax(log(probs) / temperature)`, float64 [N, K]: the softmax of logits divided by `temperature`.

    Probabilities are floored at the smallest normal float32, as in `evaluate`.
    """
    import scipy.special

    logits = np.log(np.maximum(np.asarray(probs, np.float64), np.finfo(np.float32).tiny))
    return scipy.special.softmax(logits / temperature, axis=1)


def fit_temperature(probs: np.ndarray, labels: np.ndarray) -> float:
    """Returns the temperature, 0.05 to 20, at which `with_temperature` has the least negative log-likelihood.

    Above 1 the classifier was too sure, below 1 not sure enough. The likeliest class stays the same.

    Args:
      probs: float[N, K], rows that sum to one; of images that were not trained on.
      labels: int[N], in 0..K-1.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2.
    """
    import scipy.optimize

    def loss(log_temperature: float) -> float:
        of_label = with_temperature(probs, np.exp(log_temperature))[np.arange(len(labels)), labels]
        return -np.log(np.maximum(of_label, np.finfo(np.float32).tiny)).mean()

    return float(np.exp(scipy.optimize.minimize_scalar(loss, bounds=np.log([0.05, 20]), method="bounded").x))


def _roc_auc(probs: np.ndarray, labels: np.ndarray, present: np.ndarray) -> float | None:
    """Returns the mean one-vs-rest ROC AUC over the classes for which it is defined."""
    import sklearn.metrics

    if len(present) < 2:  # every image has the same label: there are no negatives for any class
        return None
    return float(np.mean([sklearn.metrics.roc_auc_score(labels == k, probs[:, k]) for k in present]))


def _mean(recall: np.ndarray) -> float | None:
    tested = recall[~np.isnan(recall)]
    return float(tested.mean()) if len(tested) else None


def _check(probs: np.ndarray, labels: np.ndarray, train_counts: np.ndarray) -> None:
    """Refuses what would otherwise become a plausible but wrong number."""
    if probs.ndim != 2 or probs.shape[0] < 1 or probs.shape[1] < 2:
        raise ValueError(f"probs must be an [N, K] array with N >= 1 and K >= 2, not of shape {probs.shape}")
    examples, classes = probs.shape
    if labels.shape != (examples,):
        raise ValueError(f"labels must have shape ({examples},), not {labels.shape}, for probs {probs.shape}")
    if train_counts.shape != (classes,):
        raise ValueError(
            f"train_counts must have shape ({classes},), not {train_counts.shape}, for probs {probs.shape}"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must be integers in 0..{classes - 1}")
    if train_counts.min() < 0:
        raise ValueError("train_counts must not be negative")
    if not np.isfinite(probs).all():
        raise ValueError("probs must be finite; the model diverged, or its logits overflowed")
    if probs.min() < 0 or np.abs(probs.sum(axis=1, dtype=np.float64) - 1).max() > _SUM_TOLERANCE:
        raise ValueError("probs must be probabilities: not negative, rows that sum to one (were these logits?)")
