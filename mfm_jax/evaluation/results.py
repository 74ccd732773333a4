"""From a tested classifier to the content of `results.json`, in training and in later evaluations alike."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mfm_jax.data import LongTailData, batches
from mfm_jax.evaluation import conformal, decisions, metrics
from mfm_jax.evaluation.classifier import Classifier


class Answers(NamedTuple):
    """What a classifier answered on some images: probabilities float32 [N, K], beside the labels int [N]."""

    probabilities: np.ndarray
    labels: np.ndarray


# A question: returns a classifier's answers on the images that it stands for.
Asked = Callable[[Classifier], Answers]


def on_split(
    data: LongTailData,
    split: str,
    batch_size: int,
    workers: int = 0,
    *,
    watch: Callable[..., Any] = lambda parts, text, total: parts,
    put: Callable[[np.ndarray], Any] | None = None,
) -> Asked:
    """Returns the question for a split, `train`, `val` or `test`, of one image or more, in order and not augmented.

    The last batch is padded. Streamed images are decoded by `workers` processes. `watch` shows how far it is:
    `(parts, text, how many) -> parts`, such as `rich.progress.track`. With `put`, all batches `[n, B, H, W, C]` are put
    on the device by it, stay there, and are one call.
    """
    images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")

    @functools.cache
    def resident(put: Callable[[np.ndarray], Any]) -> tuple[Any, np.ndarray]:
        image, mask = map(np.stack, zip(*batches.eval_batches(images, batch_size), strict=True))
        return put(image), mask

    def asked(classifier: Classifier) -> Answers:
        parts = iter([resident(put)]) if put else batches.eval_batches(images, batch_size, workers)
        parts = watch(parts, f"step {classifier.step}", 1 if put else -(-len(labels) // batch_size))
        return Answers(np.concatenate([classifier.probabilities(image)[mask] for image, mask in parts]), labels)

    return asked


def evaluate(classifier: Classifier, answers: Answers) -> dict[str, Any]:
    """Returns `metrics.evaluate` of a classifier's answers; shot groups go by what it was trained on."""
    return metrics.evaluate(*answers, np.asarray(classifier.facts.train_class_counts))


def of_wrong_labels(data: LongTailData, answers: Answers) -> dict[str, Any]:
    """Returns what a classifier makes of the training images whose label is wrong, the split `wrong` of `on_split`.

    `wrong` and `images`: how many these are, of how many; `named_true`, `named_wrong`: the share of them for which it
    names the true class, and the one of the label, which it has learned by heart.
    """
    named, wrong = answers.probabilities.argmax(axis=1), data.train_labels != data.true_labels
    return {
        "wrong": len(named),
        "images": len(wrong),
        "named_true": float((named == data.true_labels[wrong]).mean()),
        "named_wrong": float((named == answers.labels).mean()),
    }


def of_run(
    last: Classifier,
    best: Classifier | None,
    asked: Mapping[str, Asked | None],
    split: str,
    *,
    calibrate: bool = False,
    sets: conformal.Sets | None = None,
    show: Callable[[Answers], None] = lambda answers: None,
) -> dict[str, Any]:
    """Evaluates the classifiers of a run's last checkpoint and of the one best on validation.

    Args:
      last, best: the classifiers; where they are of one step, it is evaluated once.
      asked: the questions by split; None for a split that is absent or not to be read.
      split: the one to show.
      calibrate: also fit a temperature on `val`, and the prediction sets of `last`. Those of `best`, which validation
        chose, would not keep their promise.
      sets: prediction sets of `last` that were fitted before.
      show: is called with the answers of `last` on `split`.

    Returns:
      `method`, `seed` and `split`; `last` and `best` (None without one), each with `step`, `epoch`, for each of `asked`
      what `metrics.evaluate` returns or None, and with `calibrate` the `calibration`, None without `val`: the
      `temperature` that suits validation best, and the calibration error with it of each split (`ece`). With prediction
      sets `last` has `prediction_sets`: `Sets.to_dict`, and under `measured` what `conformal.measure` returns of each
      split that was neither trained on nor used for them. With `eval.costs`, and for `last` with `eval.recall`, there
      are `decisions`: `Decisions.to_dict`, and under `measured` what `decisions.measure` returns of each split; the
      thresholds of recalls were made on `val`.
    """

    def checkpoint(classifier: Classifier) -> dict[str, Any]:
        answers = {name: ask(classifier) for name, ask in asked.items() if ask}
        if classifier is last:
            show(answers[split])
        images = sum(classifier.facts.train_class_counts)
        return {
            "step": classifier.step,
            "epoch": -(-classifier.step // batches.steps_per_epoch(images, classifier.config.train.batch_size)),
            **{name: evaluate(classifier, answers[name]) if name in answers else None for name in asked},
            **({"calibration": _calibration(answers)} if calibrate else {}),
            **(_prediction_sets(classifier, answers, sets, fit=calibrate) if classifier is last else {}),
            **_decisions(classifier, answers, fit=calibrate and classifier is last),
        }

    of_last, config = checkpoint(last), last.config
    of_best = best and (of_last if best.step == last.step else checkpoint(best))
    return {"method": config.method.name, "seed": config.train.seed, "split": split, "last": of_last, "best": of_best}


def _prediction_sets(
    classifier: Classifier, answers: Mapping[str, Answers], sets: conformal.Sets | None, *, fit: bool
) -> dict[str, Any]:
    counts = np.asarray(classifier.facts.train_class_counts)
    if fit and "val" in answers:
        sets = conformal.fit(*answers["val"], counts, classifier.config.eval.coverage)
    if not sets:
        return {}
    measured = {
        name: conformal.measure(sets, *found, counts) for name, found in answers.items() if name not in ("val", "train")
    }
    return {"prediction_sets": sets.to_dict() | {"measured": measured}}


def _decisions(classifier: Classifier, answers: Mapping[str, Answers], *, fit: bool) -> dict[str, Any]:
    wanted, found = classifier.config.eval, classifier.decisions
    if fit and wanted.recall.strip():
        found = decisions.fit(found, wanted.recall, classifier.class_names, *answers["val"])
    if not found:
        return {}
    measured = {name: decisions.measure(found, *one) for name, one in answers.items()}
    return {"decisions": found.to_dict() | {"measured": measured}}


def _calibration(answers: Mapping[str, Answers]) -> dict[str, Any] | None:
    if "val" not in answers:
        return None
    temperature = metrics.fit_temperature(*answers["val"])
    errors = {}
    for split, (probabilities, labels) in answers.items():
        scaled = metrics.with_temperature(probabilities, temperature)
        bins = metrics.reliability_bins(scaled.max(axis=1), scaled.argmax(axis=1) == labels)
        errors[split] = metrics.expected_calibration_error(bins)
    return {"temperature": temperature, "ece": errors}
