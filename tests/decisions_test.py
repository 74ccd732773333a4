"""Decisions by expected cost and thresholds for a recall: by hand, their identities, and what a run leaves of them."""

import csv
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_test import alone
from helpers import configured, logged, shipped, stored, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax import export, hub, predict
from mfm_jax.config import wanted
from mfm_jax.errors import UserError
from mfm_jax.evaluation import classifier, decisions, intervals
from mfm_jax.evaluation.decisions import Decisions, Threshold
from mfm_jax.inference import evaluate
from mfm_jax.methods.table import METHODS
from mfm_jax.training import recipe, train
from mfm_jax.types import FeatureLoss
from mfm_jax.workdir.files import Workdir, read_object

NAMES = ("melanoma", "nevus", "1")
COSTS = np.array([[0.0, 10.0, 1.0], [0.5, 0.0, 1.0], [0.5, 1.0, 0.0]])
probabilities = st.lists(
    st.lists(st.floats(2.0**-10, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=20
).map(lambda rows: np.array(rows) / np.array(rows).sum(axis=1, keepdims=True))


@pytest.mark.parametrize(
    ("text", "costs"),
    [
        ("", 1 - np.eye(3)),
        ("melanoma>nevus=10, *>melanoma=0.5", COSTS),
        ("*>melanoma=0.5,0>nevus=10", COSTS),  # by its number
        ("nevus>1=3", [[0, 1, 1], [1, 0, 3], [1, 1, 0]]),  # a name that is a number, before the number
        ("melanoma>*=4, melanoma>nevus=2", [[0, 2, 4], [1, 0, 1], [1, 1, 0]]),  # the later stands
        ("*>*=2, nevus>nevus=0", 2 * (1 - np.eye(3))),
    ],
)
def test_costs_by_hand(text, costs):
    np.testing.assert_array_equal(decisions.cost_matrix(text, NAMES), costs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("melanoma=3", "expected TRUE>NAMED=COST"),
        ("melanoma>nevus", "expected TRUE>NAMED=COST"),
        ("melanoma>nevus=ten", "expected TRUE>NAMED=COST"),
        ("melanoma>nevus=1,", "'': expected TRUE>NAMED=COST"),
        ("melanoma>nevus=-1", "'melanoma>nevus=-1': a cost is 0 or more"),
        ("melanoma>nevus=inf", "a cost is 0 or more"),
        ("melanoma>nevus=nan", "a cost is 0 or more"),
        ("nevus>nevus=1", "'nevus>nevus=1': a right answer costs 0"),
        ("0>melanoma=1", "'melanoma' by its name and its number: a right answer costs 0"),
        ("*>mole=2", "no class 'mole'; the classes are melanoma, nevus, 1"),
        ("3>nevus=2", "no class '3'"),
    ],
)
def test_costs_that_are_refused(text, message):
    with pytest.raises(UserError, match=rf"^eval\.costs = .*{message}"):
        decisions.cost_matrix(text, NAMES)


@pytest.mark.parametrize("text", ["melanoma", "melanoma=1", "melanoma=0", "=0.9", "*=0.9", "melanoma=x", "a=.9,a=.8"])
def test_recalls_that_are_refused(text):
    with pytest.raises(UserError, match=r"^eval\.recall = "):
        wanted.recalls(text)


def test_decisions_by_hand():
    """Expected costs of the first: melanoma 0.85 / 2, nevus 0.15 * 10 + 0.05, the last 0.15 + 0.8."""
    found = Decisions(COSTS)
    probs = np.array([[0.15, 0.8, 0.05], [0.02, 0.95, 0.03], [0.1, 0.1, 0.8]])
    np.testing.assert_allclose(found.expected(probs), [[0.425, 1.55, 0.95], [0.49, 0.23, 0.97], [0.45, 1.8, 0.2]])
    np.testing.assert_array_equal(found.named(probs), [0, 1, 2])
    np.testing.assert_array_equal(probs.argmax(axis=1), [1, 1, 2])


def test_a_class_with_a_threshold_is_named_there_and_nowhere_else():
    threshold = Threshold(0, 0.9, 0.9, 0.3, 9)
    probs = np.array([[0.3, 0.6, 0.1], [0.29, 0.4, 0.31], [0.9, 0.05, 0.05]])
    by_likeliest = Decisions(1 - np.eye(3), (threshold,))
    np.testing.assert_array_equal(by_likeliest.named(probs), [0, 1, 0])
    strict = by_likeliest._replace(thresholds=(threshold._replace(threshold=0.95),))
    np.testing.assert_array_equal(strict.named(probs), [1, 1, 1])  # the last two are equal
    # The first threshold wins; where every class has one and none passes, costs decide.
    two = by_likeliest._replace(thresholds=(threshold, Threshold(1, 0.9, 0.9, 0.5, 9)))
    np.testing.assert_array_equal(two.named(probs), [0, 2, 0])
    none = Decisions(COSTS, tuple(Threshold(k, 0.9, 0.9, 0.99, 9) for k in range(3)))
    np.testing.assert_array_equal(none.named(probs), Decisions(COSTS).named(probs))


@given(probabilities)
@settings(deadline=None)
def test_with_equal_costs_the_likeliest_class_is_named(probs):
    for found in (Decisions(1 - np.eye(4)), Decisions(7.5 * (1 - np.eye(4)))):
        np.testing.assert_array_equal(found.named(probs), probs.argmax(axis=1))


@given(probabilities, st.lists(st.floats(0, 100), min_size=16, max_size=16))
@settings(deadline=None)
def test_no_other_class_is_expected_to_cost_less(probs, costs):
    found = Decisions(np.reshape(costs, (4, 4)) * (1 - np.eye(4)))
    expected = found.expected(probs)
    chosen = np.take_along_axis(expected, found.named(probs)[:, None], axis=1)
    assert (chosen <= expected.min(axis=1, keepdims=True) + 1e-9).all()


@pytest.mark.parametrize(
    ("recall", "promised", "threshold"),
    [
        (0.8, 0.8, 0.2),  # rank 4 of 4
        (0.75, 0.8, 0.2),  # 3.75, rounded up
        (0.6, 0.6, 0.4),
        (0.4, 0.4, 0.6),
        (0.9, 0.8, 0.2),  # needs nine images: the lowest, and its promise
    ],
)
def test_thresholds_by_hand(recall, promised, threshold):
    own = np.array([0.8, 0.2, 0.6, 0.4])
    probs = np.concatenate([np.stack([own, 1 - own], axis=1), [[0.9, 0.1]]])
    (found,) = decisions.fit(None, f"a={recall}", ("a", "b"), probs, np.array([0, 0, 0, 0, 1])).thresholds
    assert found == Threshold(0, recall, pytest.approx(promised), threshold, 4)


def test_a_recall_without_images_or_of_a_class_again_is_refused():
    with pytest.raises(UserError, match=r"eval\.recall = 'b=0\.9': no validation images of 'b'"):
        decisions.check("", "b=0.9", ("a", "b"), [2, 0])
    with pytest.raises(
        UserError, match=r"eval\.recall = 'b=0\.9, 1=0\.5': names 'b' twice, by its name and its number"
    ):
        decisions.check("", "b=0.9, 1=0.5", ("a", "b"), [9, 9])
    assert decisions.check("", "a=0.9,b=0.5", ("a", "b"), [9, 1]) == []
    assert decisions.check("", "a=0.9,b=0.5", ("a", "b"), [8, 1]) == [
        "eval.recall = 'a=0.9,b=0.5': 8 images of 'a' in validation, which promises a recall of 0.889 at"
        " most; 0.9 needs 9"
    ]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0.05, 0.99))
@settings(deadline=None)
def test_the_recall_is_reached_on_the_images_of_the_threshold(own, recall):
    """Where they are enough for the promise; else every one of them is found."""
    probs, labels = np.stack([own, 1 - np.array(own)], axis=1), np.zeros(len(own), int)
    found = decisions.fit(None, f"a={recall!r}", ("a", "b"), probs, labels)
    reached = (found.named(probs) == 0).mean()
    assert reached >= recall if len(own) >= decisions.least_images(recall) else reached == 1


def test_the_promise_is_kept_by_new_images():
    """Exactly rank / (n + 1) in the mean: of 19 images at a recall of 0.88, rank 18 of 20."""
    rng, reached = np.random.default_rng(0), []
    for _ in range(2_000):
        own = rng.random(219)
        probs, labels = np.stack([own, 1 - own], axis=1), np.zeros(219, int)
        found = decisions.fit(None, "a=0.88", ("a", "b"), probs[:19], labels[:19])
        reached.append((found.named(probs[19:]) == 0).mean())
    assert found.thresholds[0].promised == pytest.approx(0.9)
    assert np.mean(reached) == pytest.approx(0.9, abs=0.005)


def test_what_is_measured_by_hand():
    found = Decisions(COSTS, (Threshold(0, 0.5, 0.5, 0.4, 1),))
    probs = np.array([[0.45, 0.5, 0.05], [0.3, 0.7, 0.0], [0.4, 0.6, 0.0], [0.1, 0.9, 0.0]])
    measured = decisions.measure(found, probs, np.array([0, 0, 1, 1]))  # named 0, 1 or 2, 0, 1
    np.testing.assert_array_equal(found.named(probs), [0, 2, 0, 1])
    decided, likeliest = measured["decided"], measured["likeliest"]
    assert decided["mean_cost"] == (0 + 1 + 0.5 + 0) / 4
    assert likeliest["mean_cost"] == (10 + 10) / 4
    # By costs alone 0, 2, 0 and, of two that are equal, 1: melanoma is named in the first three.
    assert measured["by_cost"]["mean_cost"] == (0 + 0 + 0.5 + 0.5) / 4
    assert decided["per_class_recall"] == [0.5, 0.5, None]
    assert likeliest["per_class_recall"] == [0.0, 1.0, None]
    (row,) = measured["recalls"]
    assert row | {"interval": None} == {
        **{"of": 0, "wanted": 0.5, "reached": 0.5, "others": 0.5, "interval": None},
        **{"likeliest_reached": 0.0, "likeliest_others": 1.0},
    }
    assert row["interval"] == list(intervals.wilson(0.5, 2))
    json.dumps(measured)


def test_the_interval_of_costs_of_0_and_1_is_that_of_the_errors():
    for wrong in (0, 3, 20):
        values = np.arange(20) < wrong
        np.testing.assert_allclose(intervals.of_values(values * 1.0, 1.0), intervals.wilson(wrong / 20, 20))
        np.testing.assert_allclose(
            intervals.of_values(values * 5.0, 5.0), 5 * np.array(intervals.wilson(wrong / 20, 20))
        )
    low, high = intervals.of_values(np.full(50, 2.0), 5.0)
    assert low < 2 < high
    assert intervals.of_values(np.zeros(3), 0.0) == (0.0, 0.0)


WANTED = {"eval__costs": "8>*=5, 9>*=5", "eval__recall": "9=0.8"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with costs and a wanted recall: its folder, and what training returned."""
    workdir = tmp_path_factory.mktemp("runs") / "mfm"
    config = tiny(data__workers=0, train__dtype="float32", method__cost_share=0.5, meta__loss="cost", **WANTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        yield workdir, train.train_and_evaluate(config, workdir)


def test_a_run_leaves_what_it_decides_by(run):
    workdir, results = run
    found = results["last"]["decisions"]
    assert found["costs"] == decisions.cost_matrix(WANTED["eval__costs"], tuple("0123456789")).tolist()
    (threshold,) = found["thresholds"]
    assert (threshold["of"], threshold["recall"], threshold["images"]) == (9, 0.8, 5)
    assert threshold["promised"] == pytest.approx(5 / 6)
    assert found["measured"]["val"]["recalls"][0]["reached"] == 1
    assert found["measured"]["test"]["likeliest"]["per_class_recall"] == results["last"]["test"]["per_class_accuracy"]
    loaded = classifier.load(workdir)
    assert loaded.decisions.to_dict() == {name: found[name] for name in ("costs", "thresholds")}
    assert classifier.load(workdir, "best").decisions.costs.tolist() == found["costs"]
    if results["best"]["step"] != results["last"]["step"]:
        assert not results["best"]["decisions"]["thresholds"]
    again, page = evaluate.evaluate_run(Workdir(workdir).read_config(), workdir, "test")
    assert again["last"]["decisions"]["measured"]["test"] == found["measured"]["test"]
    assert 'id="decisions"' in page.read_text()


def test_prediction_and_export_decide_as_evaluation_does(run, tmp_path):
    workdir, _ = run
    images = data_lib.build(Workdir(workdir).read_config()).test_images
    for i, image in enumerate(images[:12]):
        Image.fromarray(np.squeeze(image)).save(tmp_path / f"{i:02}.png")
    loaded = classifier.load(workdir)
    probs = loaded.probabilities(images[:12])
    named = [loaded.class_names[k] for k in loaded.decisions.named(probs)]
    assert named != [loaded.class_names[k] for k in probs.argmax(axis=1)]
    predict.write_csv(loaded, [tmp_path], tmp_path / "out.csv", workers=0)
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["decision"] for row in rows] == named
    assert float(rows[0]["expected_cost"]) == pytest.approx(
        loaded.decisions.expected(probs[0])[int(named[0])], rel=1e-3
    )
    out = tmp_path / "exported"
    export.export(workdir, out)
    done = alone(out, "how_to_use.py", *sorted(tmp_path.glob("*.png")))
    said = [line.partition("decision: ")[2] for line in done.stdout.splitlines() if "decision: " in line]
    assert said == named, done.stderr
    hub.lay_out(workdir, tmp_path / "hub")
    assert classifier.load(tmp_path / "hub").decisions.to_dict() == loaded.decisions.to_dict()


def test_a_picture_that_cannot_be_read_has_no_decision(run, tmp_path):
    (tmp_path / "two.png").write_bytes(b"no picture")
    predict.write_csv(classifier.load(run[0]), [tmp_path], tmp_path / "out.csv", workers=0)
    with (tmp_path / "out.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["decision"], row["expected_cost"]) == ("", "")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"eval__costs": "cat>*=2"}, r"eval\.costs = 'cat>\*=2': no class 'cat'; the classes are 0, 1, 2, 3, 4 and 5"),
        ({"eval__recall": "cat=0.9"}, r"eval\.recall = 'cat=0\.9': no class 'cat'"),
        ({"eval__costs": "0>1=-2"}, r"eval\.costs = '0>1=-2'.*a cost is 0 or more"),
        ({"eval__recall": "0=2"}, r"eval\.recall = '0=2'"),
        ({"method__cost_share": 0.5}, r"method\.cost_share = 0\.5: no costs are known; set eval\.costs"),
        ({"meta__loss": "cost"}, r"meta\.loss = 'cost': no costs are known; set eval\.costs"),
        ({"eval__recall": "0=0.9", "data__val_images_per_class": 0}, r"eval\.recall = .*data\.val_images_per_class"),
    ],
)
@pytest.mark.usefixtures("quick_runs")
def test_what_is_refused_before_training(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(tiny(**overrides), tmp_path / "run")
    assert not Workdir(tmp_path / "run").config.exists()


@pytest.mark.usefixtures("quick_runs")
def test_a_promise_that_cannot_be_made_is_warned_of(tmp_path, capsys):
    train.train_and_evaluate(tiny(data__workers=0, eval__recall="9=0.9", train__max_steps=1), tmp_path / "run")
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "warning: eval.recall = '9=0.9': 5 images of '9' in validation, which promises a recall of 0.833 at most"
        in said
    )


@pytest.mark.slow
@pytest.mark.usefixtures("quick_runs")
def test_costs_that_nothing_trains_by_leave_the_plain_program(tmp_path):
    """Bit for bit, with all that is logged; what is read of them is the decision."""
    plain = tiny(data__workers=0, train__epochs=1)
    train.train_and_evaluate(plain, tmp_path / "plain")
    priced = tiny(data__workers=0, train__epochs=1, **WANTED)
    results = train.train_and_evaluate(priced, tmp_path / "priced")
    assert logged(tmp_path / "plain") == logged(tmp_path / "priced")
    states = [stored(tmp_path / name) for name in ("plain", "priced")]
    np.testing.assert_equal(*(dataclasses.asdict(state) for state in states))
    assert "decisions" in results["last"]
    assert "decisions" not in read_object(Workdir(tmp_path / "plain").results)["last"]


@functools.cache
def data_of(data):
    return data_lib.build(config_lib.Config(data=data))


@pytest.mark.parametrize("name", METHODS)
def test_costs_stand_beside_the_loss_of_every_method(name):
    """In both parts of the training where its loss changes, with half of the share."""
    options = {"eval__costs": WANTED["eval__costs"], "method__label_smoothing": 0.1}
    plain, priced = configured(name, **options), configured(name, **options, method__cost_share=0.5)
    losses = [recipe.of(config, data_of(config.data)).objective.loss for config in (plain, priced)]
    rng = np.random.default_rng(0)
    logits, features = (jnp.asarray(rng.normal(size=(10, size)), jnp.float32) for size in (10, 4))
    labels, probs = jnp.arange(10, dtype=jnp.int32), np.asarray(jax.nn.softmax(logits))
    cost = (decisions.cost_matrix(WANTED["eval__costs"], tuple("0123456789")) * probs).sum(axis=1)
    for step in (0, 1_000):
        of_step = [loss.at(jnp.int32(step), features) if isinstance(loss, FeatureLoss) else loss for loss in losses]
        before, after = (np.asarray(loss(logits, labels)) for loss in of_step)
        np.testing.assert_allclose(after, (before + cost) / 2, rtol=1e-5)


def test_fields_of_the_shipped_config():
    config = config_lib.resolve(shipped("medical_folder"))
    assert config.method.cost_share == 0
    assert wanted.costs(config.eval.costs)
    assert wanted.recalls(config.eval.recall)
