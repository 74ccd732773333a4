"""The table of regret: its measure by hand and by simulation, its settings, and a queue that stops and goes on."""

import csv
import importlib
import json
import math

import numpy as np
import pytest
from helpers import benchmark, quick_runs
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mfm_jax import data
from mfm_jax.errors import UserError
from mfm_jax.machine.interruption import Interrupted
from mfm_jax.training import train
from mfm_jax.workdir import checkpoint


@pytest.fixture(scope="module")
def regret():
    with benchmark("regret") as module:
        yield module


@pytest.fixture(scope="module")
def measure(regret):
    return importlib.import_module("regret_measure")


@pytest.fixture(scope="module")
def of_settings(regret):
    return importlib.import_module("regret_settings")


def noise(measure, *values, test: float = 0.0, draws: int = 20_000):
    return measure.noise([measure.Scores(one, test) for one in values], np.random.default_rng(0), draws)


def test_variances_by_hand(measure):
    assert measure.test_variance([0.5, 1.0], [10, 5]) == pytest.approx(0.25 / 10 / 4)
    assert measure.test_variance([0.5, 0.0, 0.5], [10, 0, 10]) == pytest.approx(2 * 0.025 / 4)
    scores = [measure.Scores([1.0, 3.0]), measure.Scores([5.0, 5.0]), measure.Scores([9.0])]
    assert measure.pooled_variance(scores) == (1.0, 2)
    assert measure.pooled_variance([measure.Scores([9.0])]) == (0.0, 0)


def test_the_best_of_two_equals_shows_the_expected_maximum(measure):
    """Of two normal variables the maximum is sigma / sqrt(pi) above their mean; half of the test's noise is shared."""
    found = noise(measure, [60.0], [60.0], [40.0], test=2.0, draws=200_000)
    np.testing.assert_array_equal(found.level, [True, True, False])
    assert found.excess == pytest.approx(1 / math.sqrt(math.pi), abs=0.01)
    first, second, third = measure.regrets(found)
    assert first.value == second.value == pytest.approx(-found.excess)
    assert third.value == pytest.approx(20 - found.excess)
    assert first.low < 0 < first.high
    # The error of the third is that of a maximum of two, of variance 1 - 1 / pi, and its own, of variance 1.
    assert third.high - third.low == pytest.approx(2 * 1.96 * math.sqrt(2 - 1 / math.pi), rel=0.03)


def test_a_method_far_above_has_no_excess(measure):
    found = noise(measure, [60.0, 60.2], [50.0, 50.2], [49.0, 49.2])
    first, second, third = measure.regrets(found)
    assert abs(first.excess) < 0.01
    np.testing.assert_allclose([first.value, second.value, third.value], [0, 10, 11], atol=0.01)
    np.testing.assert_allclose([first.low, first.high], 0, atol=0.01)  # the best is the best in every draw
    assert second.low < 10 < second.high


def test_without_noise_regret_is_the_distance(measure):
    for one, expected in zip(measure.regrets(noise(measure, [3.0], [5.0], [4.0])), (2, 0, 1), strict=True):
        assert one == (expected, expected, expected, 0)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=5), st.floats(-50, 50))
@example([(0.0, 0.0), (29.0, 85.0)], 0.0)
def test_regret_does_not_depend_on_where_accuracy_begins(measure, pairs, shift):
    found = noise(measure, *map(list, pairs), draws=200)
    here = measure.regrets(found)
    there = measure.regrets(noise(measure, *([a + shift, b + shift] for a, b in pairs), draws=200))
    np.testing.assert_allclose(np.array(here), np.array(there), atol=1e-6)
    error = 0.7 * math.sqrt(found.variances.max())  # of a mean of 200 draws with Student's tails, many times over
    assert all(one.low <= one.high and one.excess >= -error - 1e-6 for one in here)


def test_level_methods_show_what_is_foretold(measure):
    """Five methods that are equally good, 400 times: corrected, their mean regret is about 0, and intervals hold."""
    rng = np.random.default_rng(1)
    shown, held, over = [], [], {}
    for i in range(400):
        found = noise(measure, *rng.normal(70, 1, (5, 2)), draws=500)
        own = measure.regrets(found)[0]
        shown.append(own.value)
        held.append(own.low <= 0 <= own.high)
        if i < 12:
            over[str(i)] = found
    assert abs(np.mean(shown)) < 0.15
    assert np.mean(held) > 0.9
    summed = measure.summary(over, 0)
    assert summed.level_mean < summed.level_worst
    assert summed.mean == pytest.approx(summed.level_mean, abs=0.6)
    assert summed.mean_low < 0 < summed.mean_high


def test_profiles(of_settings):
    there = [2000] * 10
    assert of_settings.SETTINGS["cifar10_100"].counts(there).tolist()[::9] == [1000, 10]
    assert of_settings.BALANCED.counts(there).tolist() == [248] * 10
    for name, order in (
        ("100", [0, 1, 2]),
        ("reversed", [2, 1, 0]),
        ("hard_tail", [1, 2, 0]),
        ("easy_tail", [0, 2, 1]),
    ):
        assert of_settings.ordered(of_settings.SETTINGS[f"cifar10_{name}"], 3, [0.1, 0.8, 0.5]) == order
    assert of_settings.SETTINGS["cifar10_step"].counts(there).tolist() == [1000] * 5 + [10] * 5
    assert of_settings.thinned(4, 6)([1425, 40, 8, 6, 3]).tolist() == [356, 10, 6, 6, 3]


def test_the_plan(regret, tmp_path, of_settings):
    """Every setting's recipes are configs; a method that a setting does not change has its run in common with it."""
    assert len(regret.SETTINGS) >= 12
    study = regret.Study(tmp_path)
    for setting in regret.SETTINGS.values():
        path = tmp_path / "data" / f"{setting.images or 'x'}.npz"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "data" / "cifar10_100.npz").touch()

    def folder(name, method, values):
        return study.run(name, regret.SETTINGS[name], method, values).workdir.relative_to(tmp_path).as_posix()

    assert folder("cifar10_100", "ce", {}) == folder("cifar10_natural", "ce", {}) == "cifar10_100/ce-own/seed0"
    assert folder("cifar10_square_root", "mfm", {}) == folder("cifar10_100", "mfm", {})
    assert folder("cifar10_natural", "mfm", {}) == "cifar10_100/mfm-natural/seed0"
    assert folder("cifar10_square_root", "crt", {}) == folder("cifar10_100", "crt", {})
    assert folder("cifar10_resnet20", "ce", {}) == "cifar10_resnet20/ce-own/seed0"
    trials = study.trials("cifar10_square_root")
    assert list(trials) == [("square_root", tau) for tau in (0.5, 0.75, 1.0, 1.5, 2.0)]
    for run in (*trials.values(), *study.trials("cifar10_100").values()):
        assert not run.config.eval.test
    later = study.trials("cifar10_100")["square_root_later", 0.75].config.method
    assert (later.sampling, later.first_stage, later.tau) == ("square_root_later", 0.5, 0.75)
    assert study.runs("cifar10_100", regret.TUNED, [0]) == []  # its trials are still to be done


def test_a_queue_stops_and_goes_on(regret, of_settings, tmp_path, monkeypatch, capsys):
    name = "digits_10"
    small = of_settings.Setting("digits", of_settings.exponential(10, largest=30), 1, order="reversed")
    monkeypatch.setattr(regret, "SETTINGS", {name: small})
    monkeypatch.setattr(regret, "FIRST", (name,))
    monkeypatch.setattr(regret, "TUNED_ON", name)
    monkeypatch.setattr(regret, "TRIALS", (("natural", 1.0), ("natural", 2.0)))
    recipes = {method: regret.RECIPES[method] for method in ("ce", regret.TUNED)}
    monkeypatch.setattr(regret, "RECIPES", recipes)
    together, begun = train.train_together, []

    def at_most(runs):
        def counted(configs, workdirs, **settings):
            if len(begun) == runs:
                raise Interrupted("saved")
            begun.append(workdirs[0])
            return together(configs, workdirs, **settings)

        return counted

    path = tmp_path / "regret.csv"
    words = [f"--workdir={tmp_path}", f"--csv={path}", f"--picture={tmp_path}/picture.svg", "--tiers=first"]
    words += ["--methods=ce,logit_adjusted_tuned", f"--settings={name}"]
    with quick_runs():
        monkeypatch.setattr(train, "train_together", at_most(3))
        with pytest.raises(Interrupted):
            regret.main(words)
        rows = list(csv.DictReader(path.read_text().splitlines()))
        assert [(row["method"], row["seeds"], row["regret"]) for row in rows] == [("ce", "2", "")]
        assert not (tmp_path / "picture.svg").exists()
        monkeypatch.setattr(train, "train_together", at_most(4))
        assert regret.main(words) == 0
        assert len(set(begun)) == 4
        assert regret.main(words) == 0  # nothing is left to train
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert tuple(rows[0]) == regret.COLUMNS
    assert [row["seeds"] for row in rows] == ["2", "2"]
    assert all(float(row["regret_low"]) <= float(row["regret"]) <= float(row["regret_high"]) for row in rows)
    assert "--methods=ce --seeds=2" in rows[0]["command"]
    assert "<svg" in (tmp_path / "picture.svg").read_text()
    assert "`ce`" in capsys.readouterr().out
    with np.load(tmp_path / "data" / f"{name}.npz") as packed:
        assert np.bincount(packed["train_labels"]).tolist() == [30, 23, 17, 13, 10, 8, 6, 5, 3, 3][::-1]
    config = regret.Study(tmp_path).run(name, small, "mfm", {}).config
    built = data.build(config)
    assert (len(built.val_labels), len(built.test_labels), len(built.meta_labels)) == (100, 500, 100)


@pytest.mark.slow
def test_the_kept_curve_is_that_of_the_other_settings(regret, of_settings, tmp_path, monkeypatch):
    profiles = {"a": of_settings.exponential(10, 30), "b": of_settings.exponential(5, 30)}
    small = {name: of_settings.Setting("digits", counts, 1) for name, counts in profiles.items()}
    monkeypatch.setattr(regret, "SETTINGS", small)
    monkeypatch.setattr(regret, "FIRST", ("a", "b"))
    monkeypatch.setattr(regret, "RECIPES", {method: regret.RECIPES[method] for method in ("mfm", "mfm_frozen")})
    shipped = tmp_path / "long_tail.json"
    words = [f"--workdir={tmp_path}", "--tiers=first,kept", "--methods=mfm,mfm_frozen", "--settings=a,b"]
    with quick_runs():
        assert regret.main([*words, f"--modulator={shipped}"]) == 0
    learned = {name: [read_phi(tmp_path / name / "mfm-own" / f"seed{seed}") for seed in (0, 1)] for name in small}
    mean = {name: np.mean(of, axis=0) for name, of in learned.items()}
    for name, other in (("a", "b"), ("b", "a")):
        np.testing.assert_allclose(curve(tmp_path / "curves" / f"{name}.json"), mean[other], atol=2e-3)
        kept = json.loads((tmp_path / name / "mfm_frozen-own" / "seed1" / "config.json").read_text())
        assert kept["modulation"]["init_from"] == str(tmp_path / "curves" / f"{name}.json")
    np.testing.assert_allclose(curve(shipped), (mean["a"] + mean["b"]) / 2, atol=2e-3)


def read_phi(run):
    """Returns a, b, c of a run of one epoch, from its checkpoint."""
    phi = checkpoint.restore_phi(run, {"logits": {name: np.zeros((), np.float32) for name in "abc"}}, "modulator")
    return [float(phi["logits"][name]) for name in "abc"]


def curve(path):
    return [json.loads(path.read_text())["phi"]["logits"][name] for name in "abc"]


def test_mistakes(regret, tmp_path):
    with pytest.raises(UserError, match="--methods=cee: allowed: mfm"):
        regret.main([f"--workdir={tmp_path}", "--methods=cee"])
