"""The content of `results.json`, of classifiers that answer by heart."""

import functools
import types

import numpy as np
import pytest

from mfm_jax import config as config_lib
from mfm_jax.evaluation import metrics, results
from mfm_jax.evaluation.classifier import Classifier
from mfm_jax.evaluation.facts import Facts

COUNTS, K = (120, 30, 10), 3
FACTS = Facts(("a", "b", "c"), (2, 2, 1), "squeeze", (0.0,), (1.0,), COUNTS)
RNG = np.random.default_rng(0)
LABELS = {split: RNG.integers(0, K, n) for split, n in (("val", 20), ("test", 31))}
DATA = types.SimpleNamespace()
for split, labels in LABELS.items():
    setattr(DATA, f"{split}_labels", labels)
    # An image's number is its pixels' value.
    numbers = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    setattr(DATA, f"{split}_images", np.broadcast_to(numbers, (len(labels), 2, 2, 1)))


def classifier(step: int, sharpness: float = 2.0) -> Classifier:
    config = config_lib.default()
    config.train.batch_size = 16
    table = np.exp(sharpness * np.random.default_rng(step).normal(size=(40, K))).astype(np.float32)
    table /= table.sum(axis=1, keepdims=True)

    def probabilities(images):
        return table[images[..., 0, 0, 0]]

    return Classifier(FACTS, config_lib.resolve(config), step, probabilities, probabilities)


def asked(split: str) -> results.Asked:
    return results.on_split(DATA, split, batch_size=8)


def test_a_split_is_asked_in_order_and_without_the_padding():
    seen = []

    def watch(parts, text, total):
        seen.append((text, total))
        return parts

    one = classifier(25)
    found = results.on_split(DATA, "test", 8, watch=watch)(one)
    assert seen == [("step 25", 4)]
    np.testing.assert_array_equal(found.probabilities, one.probabilities(DATA.test_images))
    np.testing.assert_array_equal(found.labels, LABELS["test"])


def test_batches_that_are_put_on_the_device_are_put_there_once_and_are_one_call():
    put, asked = [], []

    def noted(into, images):
        into.append(images.shape)
        return images

    one = classifier(25)
    question = results.on_split(DATA, "test", 8, put=functools.partial(noted, put))
    for _ in range(2):
        found = question(one._replace(probabilities=lambda images: one.probabilities(noted(asked, images))))
        np.testing.assert_array_equal(found.probabilities, one.probabilities(DATA.test_images))
    assert put == [(4, 8, 2, 2, 1)]
    assert asked == 2 * put


def test_every_checkpoint_has_its_step_its_epoch_and_its_splits():
    last, best = classifier(25), classifier(20)
    found = results.of_run(last, best, {"val": asked("val"), "test": asked("test")}, "test", calibrate=True)
    assert list(found) == ["method", "seed", "split", "last", "best"]
    assert list(found["last"]) == ["step", "epoch", "val", "test", "calibration", "prediction_sets"]
    assert list(found["best"]) == ["step", "epoch", "val", "test", "calibration"]
    assert [(found[which]["step"], found[which]["epoch"]) for which in ("last", "best")] == [(25, 3), (20, 2)]
    for which, one in (("last", last), ("best", best)):
        for split in ("val", "test"):
            answers = asked(split)(one)
            assert found[which][split] == metrics.evaluate(*answers, np.array(COUNTS)) == results.evaluate(one, answers)
    told, val = found["last"]["calibration"], asked("val")(last)
    assert told["temperature"] == metrics.fit_temperature(*val)
    scaled = metrics.with_temperature(val.probabilities, told["temperature"])
    assert told["ece"].keys() == {"val", "test"}
    assert told["ece"]["val"] == pytest.approx(metrics.evaluate(scaled, val.labels, np.array(COUNTS))["ece"])


def test_what_is_not_read_is_none_and_the_best_is_not_evaluated_twice():
    shown, calls = [], []

    def counted(one):
        calls.append(one.step)
        return asked("test")(one)

    last = classifier(25)
    found = results.of_run(
        last, classifier(25), {"val": None, "test": counted}, "test", calibrate=True, show=shown.append
    )
    assert found["best"] is found["last"]
    assert (found["last"]["val"], found["last"]["calibration"]) == (None, None)
    assert calls == [25]
    np.testing.assert_array_equal(shown[0].probabilities, asked("test")(last).probabilities)
    alone = results.of_run(last, None, {"test": asked("test")}, "test")
    assert alone["best"] is None
    assert list(alone["last"]) == ["step", "epoch", "test"]
