"""Decisions by expected cost, and thresholds for a wanted recall.

Without either, the class of an image is the likeliest. With costs `C[a, b]` of naming b where a is true it is

    argmin_b sum_a p(a|x) C[a, b]

which is the likeliest class again where every miss costs 1. A class k with a wanted recall r is named where
`p(k|x) >= t_k` and nowhere else, whatever the costs. Of its n validation images t_k is the probability at rank
`ceil((n + 1) r)`, from the highest down: the highest threshold with which a new image of the class, exchangeable with
these, is found with a probability of r or more; exactly rank / (n + 1) where no two are equal. With fewer than
r / (1 - r) images no threshold promises r: the lowest probability of the n then promises n / (n + 1).

Where several classes with a wanted recall pass their thresholds, the first in the config is named: it alone keeps its
promise, the others that of passing.

References:
  Elkan, The foundations of cost-sensitive learning, IJCAI 2001 (eq. 1).
  Vovk, Conditional validity of inductive conformal predictors, ACML 2012 (a rank among the images of one class).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mfm_jax.config import wanted
from mfm_jax.errors import UserError
from mfm_jax.evaluation import intervals


class Threshold(NamedTuple):
    """Where a class is named.

    of: the class.
    recall: that was wanted.
    promised: that the validation images allow to promise, in the mean over draws of them; less where they are too few.
    threshold: on its probability.
    images: validation images of the class.
    """

    of: int
    recall: float
    promised: float
    threshold: float
    images: int


class Decisions(NamedTuple):
    """What makes a class of probabilities.

    costs: float [K, K], what naming the column costs where the row is true; its diagonal is 0.
    thresholds: those of classes with a wanted recall, the first the strongest.
    """

    costs: np.ndarray
    thresholds: tuple[Threshold, ...] = ()

    def expected(self, probs: np.ndarray) -> np.ndarray:
        """Returns the expected cost of naming each class, [..., K], for probabilities [..., K]."""
        return np.asarray(probs, np.float64) @ self.costs

    def named(self, probs: np.ndarray) -> np.ndarray:
        """Returns the class of each image, int [N], for probabilities [N, K]; of equal costs the likeliest."""
        probs = np.asarray(probs, np.float64)
        expected = self.expected(probs)
        blocked = np.zeros(probs.shape, bool)
        for one in self.thresholds:
            blocked[:, one.of] = probs[:, one.of] < one.threshold
        blocked[blocked.all(axis=1)] = False  # every class has a wanted recall, and none passes
        expected = np.where(blocked, np.inf, expected)
        cheapest = np.isclose(expected, expected.min(axis=1, keepdims=True), rtol=0, atol=1e-12)
        found = np.where(cheapest, probs, -1.0).argmax(axis=1)
        for one in reversed(self.thresholds):
            found[probs[:, one.of] >= one.threshold] = one.of
        return found

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON has them."""
        return {"costs": self.costs.tolist(), "thresholds": [one._asdict() for one in self.thresholds]}


def from_dict(found: dict[str, Any]) -> Decisions:
    """Returns the decisions that `Decisions.to_dict` wrote."""
    return Decisions(np.array(found["costs"], np.float64), tuple(Threshold(**one) for one in found["thresholds"]))


def cost_matrix(text: str, names: Sequence[str]) -> np.ndarray:
    """Returns the costs float64 [K, K] that `eval.costs` says; what it does not say costs 1, a right answer 0.

    Raises:
      UserError: it names a class that is not among `names`, or gives a right answer a cost.
    """
    costs, field = 1 - np.eye(len(names)), f"{wanted.COSTS} = {text!r}"
    for true, named, cost in wanted.costs(text):
        rows, columns = (
            slice(None) if word == wanted.ANY else wanted.class_of(word, names, field) for word in (true, named)
        )
        if rows == columns != slice(None) and cost:
            raise UserError(f"{field}: {names[rows]!r} by its name and its number: a right answer costs 0")
        costs[rows, columns] = cost
        np.fill_diagonal(costs, 0)
    return costs


def of(text: str, names: Sequence[str]) -> Decisions | None:
    """Returns the decisions by the costs `text`; None where they are those of the likeliest class."""
    return Decisions(cost_matrix(text, names)) if text.strip() else None


def fit(before: Decisions | None, text: str, names: Sequence[str], probs: np.ndarray, labels: np.ndarray) -> Decisions:
    """Returns the decisions `before` with a threshold for each recall that `eval.recall`, the `text`, wants.

    The images, with probabilities [N, K] and labels int [N], must have had no part in training, nor in the choice of
    the checkpoint; there is one of each class that is wanted (`check`).
    """
    before, found = before or Decisions(1 - np.eye(len(names))), []
    for word, recall in wanted.recalls(text):
        k = wanted.class_of(word, names, wanted.RECALL)
        own = np.sort(np.asarray(probs, np.float64)[np.asarray(labels) == k, k])[::-1]
        rank = min(rank_of(len(own), recall), len(own))
        found.append(Threshold(k, recall, rank / (len(own) + 1), float(own[rank - 1]), len(own)))
    return before._replace(thresholds=tuple(found))


def check(costs: str, recalls: str, names: Sequence[str], images: Sequence[int] | np.ndarray) -> list[str]:
    """Returns which recalls the validation `images` of each class, [K], are too few to promise, a sentence each.

    Raises:
      UserError: costs or recalls name a class that is not among `names`, or a recall is of one without images, or of
        one that is there already, by its number.
    """
    of(costs, names)
    field, found, seen = f"{wanted.RECALL} = {recalls!r}", [], set()
    for word, recall in wanted.recalls(recalls):
        k = wanted.class_of(word, names, field)
        if k in seen:
            raise UserError(f"{field}: names {names[k]!r} twice, by its name and its number")
        seen.add(k)
        n, least = int(images[k]), least_images(recall)
        if not n:
            raise UserError(f"{field}: no validation images of {word!r}; leave it out, or validate on more images")
        if n < least:
            promised = f"{n} images of {word!r} in validation, which promises a recall of {n / (n + 1):.3g} at most"
            found.append(f"{field}: {promised}; {recall:g} needs {least}")
    return found


def rank_of(images: int, recall: float) -> int:
    """Returns `ceil((n + 1) r)`, which is above n where n images are too few."""
    return math.ceil(round((images + 1) * recall, 9))


def least_images(recall: float) -> int:
    """Returns how many images a threshold needs to promise `recall`."""
    return math.ceil(round(recall / (1 - recall), 6))


def measure(decisions: Decisions, probs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Returns what the decisions come to, beside the likeliest classes.

    Returns:
      For `decided`, for `by_cost`, without the recalls, and for `likeliest`: `mean_cost` over the images, with its
      95 % interval `mean_cost_interval`, `per_class_recall`, [K] with None for a class without images, and
      `balanced_accuracy`, their mean. `recalls` has a row for each threshold: `of`, `wanted`, what was `reached`, its
      `interval`, and the mean recall of the `others`, each also as the likeliest classes have it (`likeliest_reached`,
      `likeliest_others`).
    """
    labels = np.asarray(labels)
    by_cost = decisions._replace(thresholds=()).named(probs)
    answers = {"decided": decisions.named(probs), "by_cost": by_cost, "likeliest": np.asarray(probs).argmax(axis=1)}
    found: dict[str, Any] = {name: _of_answers(decisions.costs, named, labels) for name, named in answers.items()}
    images, rows = np.bincount(labels, minlength=len(decisions.costs)), []
    for one in (one for one in decisions.thresholds if images[one.of]):
        row: dict[str, Any] = {"of": one.of, "wanted": one.recall}
        for name, start in (("decided", ""), ("likeliest", "likeliest_")):
            recalls = found[name]["per_class_recall"]
            others = [value for k, value in enumerate(recalls) if value is not None and k != one.of]
            row[f"{start}reached"] = recalls[one.of]
            row[f"{start}others"] = float(np.mean(others)) if others else None
        rows.append(row | {"interval": list(intervals.wilson(row["reached"], int(images[one.of])))})
    return found | {"recalls": rows}


def _of_answers(costs: np.ndarray, named: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    paid, classes = costs[labels, named], len(costs)
    images, right = np.bincount(labels, minlength=classes), np.bincount(labels[named == labels], minlength=classes)
    recalls = [float(right[k] / images[k]) if images[k] else None for k in range(classes)]
    return {
        "mean_cost": float(paid.mean()),
        "mean_cost_interval": list(intervals.of_values(paid, float(costs.max()))),
        "balanced_accuracy": float(np.mean([value for value in recalls if value is not None])),
        "per_class_recall": recalls,
    }
