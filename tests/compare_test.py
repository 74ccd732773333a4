"""The comparison table on results made by hand."""

import csv

import pytest
from absl import flags
from absl.testing import flagsaver

from mfm_jax import compare
from mfm_jax.config import Config
from mfm_jax.errors import UserError
from mfm_jax.methods.table import METHODS
from mfm_jax.study import runs


def result(balanced: float, *, best: float | None = None, few: float | None = 0.5, seconds: float = 1.0) -> dict:
    def split(value: float) -> dict:
        return {"test": dict.fromkeys(compare._COLUMNS, 0.5) | {"balanced_accuracy": value, "few": few}}

    last_and_best = {"last": split(balanced), "best": None if best is None else split(best)}
    return {"split": "test", "train_seconds": seconds, **last_and_best}


@pytest.fixture
def rows():
    return compare.table(
        {
            "ce": [result(0.1, best=0.2, seconds=1.0), result(0.2, best=0.3, seconds=2.0), result(0.6, best=0.4)],
            "mfm": [result(0.4, few=None), result(0.3, few=0.2, seconds=9.0), result(0.8, seconds=5.0)],
        }
    )


# --- table ----------------------------------------------------------------------------------------


def test_a_row_for_each_method_and_selection_that_exists(rows):
    assert [(row["method"], row["epoch"], row["seeds"]) for row in rows] == [
        ("ce", "last", 3),
        ("ce", "best", 3),
        ("mfm", "last", 3),
    ]


def test_mean_and_sample_deviation_by_hand(rows):
    last, best, _ = rows
    # 0.1, 0.2, 0.6: mean 0.3, deviations -0.2, -0.1, 0.3, sum of squares 0.14, over two.
    assert last["balanced_accuracy_mean"] == pytest.approx(0.3)
    assert last["balanced_accuracy_std"] == pytest.approx(0.07**0.5)
    assert (best["balanced_accuracy_mean"], best["balanced_accuracy_std"]) == pytest.approx((0.3, 0.1))
    assert (last["accuracy_mean"], last["accuracy_std"]) == pytest.approx((0.5, 0.0))


def test_the_difference_is_paired_by_seed(rows):
    # Gaps 0.3, 0.1, 0.2: mean 0.2, standard deviation 0.1, over the root of three seeds.
    mfm = rows[2]
    assert (mfm["difference"], mfm["difference_se"]) == pytest.approx((0.2, 0.1 / 3**0.5))
    for row in rows[:2]:
        assert (row["difference"], row["difference_se"]) == (None, None)


def test_best_is_compared_with_best():
    rows = compare.table({"ce": [result(0.1, best=0.2)], "mfm": [result(0.9, best=0.5)]})
    assert {row["epoch"]: row["difference"] for row in rows if row["method"] == "mfm"} == {
        "last": pytest.approx(0.8),
        "best": pytest.approx(0.3),
    }


def test_a_number_that_one_seed_lacks_is_none(rows):
    assert (rows[2]["few_mean"], rows[2]["few_std"]) == (None, None)


def test_seconds_are_the_median_and_their_ratio_to_the_baselines(rows):
    assert [row["train_seconds"] for row in rows] == [1.0, 1.0, 5.0]
    assert [row["time_ratio"] for row in rows] == [1.0, 1.0, 5.0]


def test_memory_as_a_ratio_where_both_are_known():
    found = {name: [result(0.5)] for name in ("ce", "ldam", "mfm")}
    rows = compare.table(found, "ce", {"ce": 100.0, "ldam": None, "mfm": 150.0})
    assert [row["memory_ratio"] for row in rows] == [1.0, None, 1.5]


def test_without_the_test_split_validation_is_shown():
    chosen = result(0.9) | {"split": "val"}
    chosen["last"]["val"] = chosen["last"].pop("test") | {"balanced_accuracy": 0.25}
    (row,) = compare.table({"ce": [chosen]})
    assert row["balanced_accuracy_mean"] == 0.25


def test_a_single_seed_has_no_spread():
    rows = compare.table({"ce": [result(0.5)], "mfm": [result(0.75)]})
    assert (rows[1]["balanced_accuracy_mean"], rows[1]["balanced_accuracy_std"]) == (0.75, None)
    assert (rows[1]["difference"], rows[1]["difference_se"]) == (0.25, None)


# --- write ----------------------------------------------------------------------------------------


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_markdown_table_is_in_percent_with_a_dash_for_nothing(rows, tmp_path):
    compare.write(rows, [0, 1, 2], tmp_path, "ce")
    text = (tmp_path / "compare.md").read_text()
    head, rule, ce, ce_best, mfm = cells(text)
    assert head == ["method", "epoch", *compare._COLUMNS, "balanced - ce", "time", "memory"]
    assert set(rule) == {"---"}
    assert len(rule) == len(head)
    column = {name: i for i, name in enumerate(head)}
    assert ce[:2] == ["ce", "last"]
    assert ce_best[:2] == ["ce", "best"]
    assert ce[column["balanced_accuracy"]] == "30.0 ± 26.5"
    assert ce[column["few"]] == "50.0 ± 0.0"
    assert mfm[column["few"]] == "–"
    assert ce[-3:] == ["–", "1.00", "–"]
    # t(0.975, 2) is 4.3027; times the standard error 5.7735, half the width is 24.84.
    assert mfm[-3:] == ["20.0 [-4.8, 44.8]", "5.00", "–"]
    assert "seeds 0, 1, 2" in text.splitlines()[-1]


def test_the_cost_of_an_image_is_a_column_where_classes_are_decided_by_cost(tmp_path, capsys):
    def priced(*costs):
        measured = [{"measured": {"test": {"decided": {"mean_cost": cost}}}} for cost in costs]
        plain = map(result, (0.5, 0.7))
        return [one | {"last": one["last"] | {"decisions": m}} for one, m in zip(plain, measured, strict=True)]

    rows = compare.table({"ce": priced(1.0, 2.0), "mfm": priced(0.25, 0.75)})
    assert [(row["mean_cost_mean"], row["mean_cost_std"]) for row in rows] == [(1.5, 0.5**0.5), (0.5, 0.125**0.5)]
    compare.write(rows, [0, 1], tmp_path, "ce")
    head, _, ce, mfm = cells((tmp_path / "compare.md").read_text())
    at = head.index("cost")
    assert (ce[at], mfm[at]) == ("1.50 ± 0.71", "0.50 ± 0.35")
    compare.print_table(rows, "ce")
    said = capsys.readouterr().out
    assert "cost" in said
    assert "0.50 ± 0.35" in said


def test_a_checkpoint_without_decisions_has_no_cost():
    measured = {"decisions": {"measured": {"test": {"decided": {"mean_cost": 2.0}}}}}
    one = result(0.5, best=0.4)
    last, best = compare.table({"ce": [one | {"last": one["last"] | measured}]})
    assert (last["mean_cost_mean"], last["mean_cost_std"]) == (2.0, None)
    assert (best["mean_cost_mean"], best["mean_cost_std"]) == (None, None)


def test_what_failed_and_what_was_tuned_is_said_below(rows, tmp_path):
    tuned = {"ce": {}, "mfm": {"meta.learning_rate": 0.0123456, "method.hidden": 3}}
    compare.write(rows, [0], tmp_path, "ce", {"focal": "focal seed 1: loss became non-finite"}, tuned)
    *_, failed, chosen = (tmp_path / "compare.md").read_text().strip().split("\n\n")
    assert failed == "Failed: focal (focal seed 1: loss became non-finite)."
    assert chosen == "Tuned: mfm: meta.learning_rate = 0.01235, method.hidden = 3."


def test_a_single_seed_is_written_without_a_spread(tmp_path):
    compare.write(compare.table({"ce": [result(0.5)], "mfm": [result(0.75)]}), [7], tmp_path, "ce")
    _, _, ce, mfm = cells((tmp_path / "compare.md").read_text())
    assert ce == ["ce", "last", *["50.0"] * len(compare._COLUMNS), "–", "1.00", "–"]
    assert mfm[-3] == "25.0"
    assert "seeds 7;" in (tmp_path / "compare.md").read_text()


def test_the_csv_holds_every_number_as_a_fraction(rows, tmp_path):
    compare.write(rows, [0, 1, 2], tmp_path, "ce")
    with (tmp_path / "compare.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows)
    for line, row in zip(read, rows, strict=True):
        assert line == {name: "" if value is None else str(value) for name, value in row.items()}


# --- run_all and the flags ------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch):
    """The groups of runs that were to be trained; each has its folder for results."""
    groups = []

    def pretend(planned, jobs):
        groups.extend(planned)
        return [runs.Outcome({"folder": str(run.workdir)}) for group in planned for run in group]

    monkeypatch.setattr(runs, "train_all", pretend)
    return groups


def test_every_method_and_seed_gets_a_folder_and_the_same_split(tmp_path, trained):
    config = Config().to_dict()
    results, failed, tuned = compare.run_all(config, ["ce", "mfm"], [3, 5], tmp_path)
    assert (failed, tuned) == ({}, {"ce": {}, "mfm": {}})
    assert results == {name: [{"folder": f"{tmp_path}/{name}/seed{seed}"} for seed in (3, 5)] for name in ("ce", "mfm")}
    assert [run.label for (run,) in trained] == ["ce seed 3", "mfm seed 3", "ce seed 5", "mfm seed 5"]
    for (run,) in trained:
        given = run.config.to_dict()
        method, seed = given["method"]["name"], given["train"]["seed"]
        assert (run.workdir, run.label) == (tmp_path / method / f"seed{seed}", f"{method} seed {seed}")
        given["method"]["name"], given["train"]["seed"] = Config().method.name, Config().train.seed
        assert given == Config().to_dict()
    assert config == Config().to_dict()


def test_what_a_method_cannot_share_is_set_for_it_alone(tmp_path, trained):
    config = Config().to_dict()
    config["data"]["train_on_meta"] = True
    config["method"].update(loss="helpers:loss", learner="helpers:shift")
    compare.run_all(config, list(METHODS), [0], tmp_path)
    found = {run.config.method.name: run.config for (run,) in trained}
    assert {name for name, run in found.items() if not run.meta.lagged} == {"l2rw"}
    with_learner = {name for name, method in METHODS.items() if method.learner}
    assert {name for name, run in found.items() if not run.data.train_on_meta} == with_learner
    assert [name for name, run in found.items() if run.method.loss] == ["own_loss"]
    assert [name for name, run in found.items() if run.method.learner] == ["own_learner"]


def test_together_a_method_is_one_program(tmp_path, trained):
    results, failed, _ = compare.run_all(Config().to_dict(), ["ce", "mfm"], [3, 5], tmp_path, together=True)
    assert [[run.label for run in group] for group in trained] == [
        [f"{name} seed 3", f"{name} seed 5"] for name in ("ce", "mfm")
    ]
    assert results["mfm"] == [{"folder": f"{tmp_path}/mfm/seed{seed}"} for seed in (3, 5)]
    assert failed == {}


def test_seeds():
    assert compare._seeds(["0", "12"]) == [0, 12]
    for texts in ([], [""], ["1", "x"], ["-1"], ["1.5"], ["2", "2"]):
        with pytest.raises(UserError) as caught:
            compare._seeds(texts)
        assert str(caught.value) == f"--seeds={','.join(texts)}: expected distinct integers, 0 or more"


@pytest.mark.parametrize("names", [["ce", "nope"], [], ["ce", "ce"]])
def test_methods_must_be_distinct_names_of_the_table(names):
    with flagsaver.flagsaver(methods=names):
        flags.FLAGS.mark_as_parsed()
        try:
            with pytest.raises(UserError) as caught:
                compare.main([])
        finally:
            flags.FLAGS.unparse_flags()
    message = f"--methods={','.join(names)}: allowed: distinct names of {', '.join(METHODS)}"
    assert str(caught.value) == message
