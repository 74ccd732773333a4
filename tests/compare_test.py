"""The comparison table on results made by hand."""

import csv

import pytest
from absl import flags
from absl.testing import flagsaver

from mfm_jax import compare, train
from mfm_jax.config import Config
from mfm_jax.errors import UserError
from mfm_jax.methods import METHODS


def result(balanced: float, *, best: float | None = None, few: float | None = 0.5, seconds: float = 1.0) -> dict:
    def split(value: float) -> dict:
        return {"test": dict.fromkeys(compare._COLUMNS, 0.5) | {"balanced_accuracy": value, "few": few}}

    return {"last": split(balanced), "best": None if best is None else split(best), "train_seconds": seconds}


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


def test_seconds_are_the_median(rows):
    assert [row["train_seconds"] for row in rows] == [1.0, 1.0, 5.0]


def test_a_single_seed_has_no_spread():
    rows = compare.table({"ce": [result(0.5)], "mfm": [result(0.75)]})
    assert (rows[1]["balanced_accuracy_mean"], rows[1]["balanced_accuracy_std"]) == (0.75, None)
    assert (rows[1]["difference"], rows[1]["difference_se"]) == (0.25, None)


# --- write ----------------------------------------------------------------------------------------


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_markdown_table_is_in_percent_with_a_dash_for_nothing(rows, tmp_path):
    compare.write(rows, [0, 1, 2], tmp_path)
    text = (tmp_path / "compare.md").read_text()
    head, rule, ce, ce_best, mfm = cells(text)
    assert head == ["method", "epoch", *compare._COLUMNS, "balanced - ce"]
    assert set(rule) == {"---"}
    assert len(rule) == len(head)
    column = {name: i for i, name in enumerate(head)}
    assert ce[:2] == ["ce", "last"]
    assert ce_best[:2] == ["ce", "best"]
    assert ce[column["balanced_accuracy"]] == "30.0 ± 26.5"
    assert ce[column["few"]] == "50.0 ± 0.0"
    assert mfm[column["few"]] == "–"
    assert ce[-1] == "–"
    assert mfm[-1] == "20.0 ± 5.8"
    assert "seeds 0, 1, 2" in text.splitlines()[-1]


def test_a_single_seed_is_written_without_a_spread(tmp_path):
    compare.write(compare.table({"ce": [result(0.5)], "mfm": [result(0.75)]}), [7], tmp_path)
    _, _, ce, mfm = cells((tmp_path / "compare.md").read_text())
    assert ce == ["ce", "last", *["50.0"] * len(compare._COLUMNS), "–"]
    assert mfm[-1] == "25.0"
    assert "seeds 7;" in (tmp_path / "compare.md").read_text()


def test_the_csv_holds_every_number_as_a_fraction(rows, tmp_path):
    compare.write(rows, [0, 1, 2], tmp_path)
    with (tmp_path / "compare.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows)
    for line, row in zip(read, rows, strict=True):
        assert line == {name: "" if value is None else str(value) for name, value in row.items()}


# --- run_all and the flags ------------------------------------------------------------------------


def test_every_method_and_seed_gets_a_folder_and_the_same_split(tmp_path, monkeypatch):
    runs = []

    def pretend(config, workdir, *, label):
        runs.append((config.to_dict(), workdir.relative_to(tmp_path).as_posix(), label))
        return {"folder": runs[-1][1]}

    monkeypatch.setattr(train, "train_and_evaluate", pretend)
    config = Config().to_dict()
    results, failed = compare.run_all(config, ["ce", "mfm"], [3, 5], tmp_path)
    assert failed == {}
    assert results == {
        "ce": [{"folder": "ce/seed3"}, {"folder": "ce/seed5"}],
        "mfm": [{"folder": "mfm/seed3"}, {"folder": "mfm/seed5"}],
    }
    for given, folder, label in runs:
        method, seed = given["method"]["name"], given["train"]["seed"]
        assert (folder, label) == (f"{method}/seed{seed}", f"{method} seed {seed}")
        given["method"]["name"], given["train"]["seed"] = Config().method.name, Config().train.seed
        assert given == Config().to_dict()
    assert config == Config().to_dict()


def test_what_a_method_cannot_share_is_set_for_it_alone(tmp_path, monkeypatch):
    runs = {}
    monkeypatch.setattr(train, "train_and_evaluate", lambda config, *_, **__: runs.update({config.method.name: config}))
    config = Config().to_dict()
    config["data"]["train_on_meta"] = True
    compare.run_all(config, list(METHODS), [0], tmp_path)
    assert {name for name, run in runs.items() if not run.meta.lagged} == {"l2rw"}
    with_learner = {name for name, method in METHODS.items() if method.learner}
    assert {name for name, run in runs.items() if not run.data.train_on_meta} == with_learner


def test_together_a_method_is_one_program_and_a_failure_is_left_to_the_single_runs(tmp_path, monkeypatch, capsys):
    groups = []

    def pretend(configs, workdirs, *, label):
        groups.append(
            [
                (c.method.name, c.train.seed, w.relative_to(tmp_path).as_posix())
                for c, w in zip(configs, workdirs, strict=True)
            ]
        )
        if configs[0].method.name == "mfm":
            raise MemoryError("too many seeds")

    monkeypatch.setattr(train, "train_together", pretend)
    monkeypatch.setattr(train, "train_and_evaluate", lambda *_, label: {"label": label})
    results, failed = compare.run_all(Config().to_dict(), ["ce", "mfm"], [3, 5], tmp_path, together=True)
    assert groups == [[(name, 3, f"{name}/seed3"), (name, 5, f"{name}/seed5")] for name in ("ce", "mfm")]
    assert (len(results["ce"]), len(results["mfm"]), failed) == (2, 2, {})
    assert "2 runs from mfm seed 3: not together: MemoryError: too many seeds" in capsys.readouterr().err


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
