"""Tuning on validation, the runs themselves replaced by a formula."""

import json
import math

import pytest
from helpers import OWN

from mfm_jax import compare, config
from mfm_jax.config import GROUPS, Config
from mfm_jax.errors import UserError
from mfm_jax.methods.table import METHODS, Choice
from mfm_jax.study import runs, tune


@pytest.fixture
def fields():
    given = Config().to_dict()
    given["data"]["val_images_per_class"] = 5
    return given


@pytest.fixture
def trained(monkeypatch):
    """Every run so far; its score is best at the learning rate 0.1 and tau 2."""
    done = []

    def train_all(planned, jobs):
        done.extend(run for (run,) in planned)
        outcomes = []
        for (run,) in planned:
            run.workdir.mkdir(parents=True)
            score = 1 - abs(math.log(run.config.optim.learning_rate / 0.1)) / 10 - abs(run.config.method.tau - 2) / 10
            outcomes.append(runs.Outcome({"last": {"val": {"balanced_accuracy": score}}, "best": None}))
        return outcomes

    monkeypatch.setattr(runs, "train_all", train_all)
    return done


@pytest.mark.parametrize("method", METHODS)
def test_every_space_lies_in_what_the_config_allows(method):
    for path, where in {**tune.COMMON, **METHODS[method].search}.items():
        group, name = path.split(".")
        assert name in GROUPS[group].__dataclass_fields__
        base = {"method": {"name": method, **OWN.get(method, {})}, "meta": {"lagged": False}}
        base = {group: base.get(group, {}) for group in GROUPS}
        for value in where.values if isinstance(where, Choice) else (where.low, where.high):
            config.resolve(tune.with_values(base, {path: value}))


def test_the_best_of_the_trials_is_found_again_by_the_same_command(fields, trained, tmp_path):
    best = tune.tune("logit_adjusted", fields, 6, tmp_path / "one")
    assert len(trained) == 6
    assert [run.workdir.name for run in trained] == [f"trial{i}" for i in range(6)]
    scores = [-abs(math.log(run.config.optim.learning_rate / 0.1)) - abs(run.config.method.tau - 2) for run in trained]
    winner = trained[scores.index(max(scores))].config
    assert best == {"optim.learning_rate": winner.optim.learning_rate, "method.tau": winner.method.tau}
    assert json.loads((tmp_path / "one/best.json").read_text())["values"] == best
    assert tune.tune("logit_adjusted", fields, 6, tmp_path / "two") == best


def test_every_method_gets_the_same_number_of_trials_and_its_own_best(fields, trained, tmp_path):
    results, failed, tuned = compare.run_all(fields, ["ce", "logit_adjusted"], [0, 1], tmp_path, trials=3, jobs=2)
    assert failed == {}
    assert set(tuned["logit_adjusted"]) == {"optim.learning_rate", "method.tau"}
    assert {method: len(found) for method, found in results.items()} == {"ce": 2, "logit_adjusted": 2}
    tried = [run.workdir.parts[-3] for run in trained if run.workdir.name.startswith("trial")]
    assert sorted(tried) == ["ce"] * 3 + ["logit_adjusted"] * 3
    for run in trained[-4:]:
        method = run.config.method.name
        best = json.loads((tmp_path / method / "tune/best.json").read_text())["values"]
        assert run.config.optim.learning_rate == best["optim.learning_rate"]
        assert run.workdir == tmp_path / method / f"seed{run.config.train.seed}"
    # Choosing does not read the test split, the runs that are compared do.
    assert [run.config.eval.test for run in trained] == [False] * 6 + [True] * 4


def test_runs_that_were_tuned_otherwise_are_not_gone_on_with(fields, trained, tmp_path):
    (tmp_path / "ce" / "seed1").mkdir(parents=True)
    (tmp_path / "ce" / "seed1" / "config.json").touch()
    with pytest.raises(UserError, match=r"--tune=2: .*ce has runs that followed 0 trials; choose a new --workdir"):
        compare.run_all(fields, ["logit_adjusted", "ce"], [0], tmp_path, trials=2)
    assert trained == []
    (tmp_path / "ce" / "tune").mkdir()
    (tmp_path / "ce" / "tune" / "best.json").write_text('{"trials": 2}')
    compare.run_all(fields, ["ce"], [0], tmp_path, trials=2)
    assert len(trained) == 3


def test_a_trial_that_fails_is_one_of_the_trials(fields, tmp_path, monkeypatch, capsys):
    def train_all(planned, jobs):
        ((run,),) = planned
        run.workdir.mkdir(parents=True)
        if run.workdir.name == "trial0":
            return [runs.Outcome(None, "loss became non-finite")]
        return [runs.Outcome({"last": {"val": {"balanced_accuracy": 0.5}}})]

    monkeypatch.setattr(runs, "train_all", train_all)
    assert set(tune.tune("ce", fields, 2, tmp_path / "one")) == {"optim.learning_rate"}
    assert "ce trial 1 counts for nothing: loss became non-finite" in capsys.readouterr().out
    assert json.loads((tmp_path / "one/best.json").read_text())["scored"] == 1
    with pytest.raises(UserError, match=r"--tune=1: every trial of ce failed; the last: loss became non-finite"):
        tune.tune("ce", fields, 1, tmp_path / "two")


def test_tuning_needs_a_validation_split(tmp_path):
    with pytest.raises(UserError, match=r"data.val_images_per_class = 0: --tune compares on validation"):
        tune.tune("ce", Config().to_dict(), 3, tmp_path)
