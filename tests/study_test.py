"""The accuracy study: its rows are runs that can be trained, and its tables say what the results say."""

import csv
import importlib
import shlex
import sys
from pathlib import Path

import pytest
from helpers import benchmark

from mfm_jax import config as config_lib
from mfm_jax.methods.table import BUILT_IN
from mfm_jax.training import train


@pytest.fixture(scope="module")
def study():
    with benchmark("study") as module:
        yield module


@pytest.fixture(scope="module")
def pictures(study):
    return importlib.import_module("pictures")


def results(balanced: float, tail: float, split: str = "test") -> dict:
    found = {"balanced_accuracy": balanced, "head_third": 0.8, "middle_third": 0.5, "rarest_third": tail}
    others = ("accuracy", "many", "medium", "few", "macro_f1", "roc_auc", "ece")
    found |= dict.fromkeys(others, 0.5)
    return {"last": {split: found}, "best": None, "split": split, "train_seconds": 1.0}


def test_every_row_is_a_run_of_its_own(study, tmp_path):
    rows = [row for tier in study.tiers(100.0, "runs/source").values() for row in tier]
    planned = [run for row in rows for run in study.runs_of(row, config_lib.default(), tmp_path)]
    # `borrowed` at 100 has ce's and mfm's of `main`; `noise` without noise has 3 seeds of these and of `peers`, and one
    # of each of the two that `others` has.
    assert len({run.label for run in planned}) == len(planned) - 10 - 9 - 2
    assert len({run.workdir: run.config for run in planned}) == len({run.label for run in planned})
    configs = {run.label: run.config for run in planned}
    assert all(run.config == configs[run.label] for run in planned)
    frozen = next(run.config for run in planned if run.label == "mfm_frozen, factor 200, seed 1")
    assert frozen.meta.freeze
    assert frozen.modulation.init_from == "runs/source"
    assert (frozen.data.imbalance_factor, frozen.train.seed) == (200.0, 1)
    assert {row.method for row in rows} == set(BUILT_IN)


def test_rcal_after_mfm_starts_from_the_mfm_of_its_seed_and_noise(study, tmp_path):
    rows = study.tiers(100.0, "")
    mfm = {
        run.workdir: run.config for row in rows["noise"] for run in study.runs_of(row, config_lib.default(), tmp_path)
    }
    joint = [run.config for row in rows["joint"] for run in study.runs_of(row, config_lib.default(), tmp_path)]
    assert len(joint) == 9
    for config in joint:
        first = mfm[Path(config.model.init_from)]
        assert (first.method.name, first.data.label_noise) == ("mfm", config.data.label_noise)
        assert first.train.seed == config.train.seed
    assert {config.data.label_noise for config in joint} == {0.0, 0.2, 0.4}


def test_tables_by_hand(study, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "shell", lambda row: shlex.join(["train", row.name]))
    ce = study.Row("ce", "ce", 100.0, 3), [results(0.50, 0.1), results(0.52, 0.2), results(0.54, 0.3)]
    mfm = study.Row("mfm", "mfm", 100.0, 2), [results(0.60, 0.5), results(0.64, 0.5)]
    lines = study.markdown([ce, mfm]).splitlines()
    assert lines[0] == "Imbalance factor 100"
    # Pairs 10 and 12: mean 11, standard error 1, Student's 97.5 % quantile at one degree of freedom 12.7.
    assert lines[4] == "| `mfm` | 62.0 ± 2.8 | 11.0 [-1.7, 23.7] | 80.0 | 50.0 | 50.0 | 2 |"
    assert lines[5] == "| `ce` | 52.0 ± 2.0 | – | 80.0 | 50.0 | 20.0 | 3 |"
    assert study.markdown([(mfm[0], mfm[1][:1])]).splitlines()[4] == "| `mfm` | 60.0 | 80.0 | 50.0 | 50.0 | 2 |"
    study.write_csv([ce, mfm], tmp_path / "table.csv")
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert rows[1] == {
        "method": "mfm",
        "imbalance_factor": "100",
        "seeds": "2",
        "balanced_accuracy_mean": "62.00",
        "balanced_accuracy_std": "2.83",
        "head_third": "80.00",
        "middle_third": "50.00",
        "tail_third": "50.00",
        "command": "train mfm",
    }


def test_the_file_of_costs_by_hand(study, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "shell", lambda row: row.name)

    def priced(decided: float, reached: float) -> dict:
        measured = {name: {"mean_cost": cost} for name, cost in (("likeliest", 1.0), ("by_cost", 0.5))}
        recalls = {"wanted": 0.9, "reached": reached, "likeliest_reached": 0.3, "others": 0.6, "likeliest_others": 0.7}
        measured |= {"decided": {"mean_cost": decided}, "recalls": [recalls]}
        return {"last": {"decisions": {"measured": {"test": measured}}}, "split": "test"}

    rows = [
        (study.Row("ce", "ce", 100.0, 1), [results(0.5, 0.1)]),
        (study.Row("ce_priced", "ce", 100.0, 2), [priced(0.6, 0.8), priced(0.8, 1.0)]),
    ]
    study.write_costs(rows, tmp_path / "costs.csv")
    (row,) = csv.DictReader((tmp_path / "costs.csv").read_text().splitlines())
    means = {"cost_likeliest": "1.0000", "cost_by_cost": "0.5000", "cost_with_recall": "0.7000"}
    spread = {"cost_likeliest_std": "0.0000", "cost_by_cost_std": "0.0000", "cost_with_recall_std": "0.1414"}
    recalls = {"wanted": "90.00", "reached": "90.00", "likeliest_reached": "30.00"}
    recalls |= {"others": "60.00", "likeliest_others": "70.00"}
    assert row == {"method": "ce_priced", "seeds": "2", **means, **spread, **recalls, "command": "ce_priced"}


@pytest.mark.slow
def test_pictures_of_finished_runs(pictures, study, tmp_path, monkeypatch):
    config = config_lib.default()
    config.data.update(source="digits", name="digits", imbalance_factor=20.0)
    config.augment.update(pad=1, flip=False)
    config.model.update(name="resnet8", width=2)
    config.train.update(epochs=1, batch_size=64, max_steps=2)
    for method in study.MAIN:
        for run in study.runs_of(study.Row(method, method, 20.0, 1), config, tmp_path):
            train.train_and_evaluate(run.config, run.workdir)
    monkeypatch.setattr(sys, "argv", ["pictures", f"--runs={tmp_path / 'factor20'}", f"--out={tmp_path}"])
    pictures.main()
    assert "log odds of 9 against 1" in (tmp_path / "boundary.svg").read_text()
    assert "training images of the class" in (tmp_path / "classes.svg").read_text()
