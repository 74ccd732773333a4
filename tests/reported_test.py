"""What the README and the pages of results say is what the files in docs/results say.

`conformal_test` holds the page of the prediction sets to its file, `benchmarks_test` that of the accelerator.
"""

import csv
import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
README, STUDY, PLANKTON = (
    path.read_text(encoding="utf-8") for path in (ROOT / "README.md", RESULTS / "study.md", RESULTS / "plankton.md")
)
RECIPES, NEIGHBOURS = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("recipes.md", "neighbours.md"))
METHODS = {
    "cross-entropy": "ce",
    "Meta-Weight-Net": "meta_weight_net",
    "LDAM-DRW": "ldam_drw",
    "logit adjustment as published (tau 1)": "logit_adjusted_natural",
    "logit adjustment, sampling and tau tuned": "logit_adjusted",
    "logit adjustment, tuned on the small version": "logit_adjusted",
    "logit adjustment, tuned on the small one": "logit_adjusted",
    "MFM": "mfm",
    "MFM, the default": "mfm",
    "MFM, the default, in bfloat16": "mfm bfloat16",
    "logit adjustment as published (tau 1, images as they are), in bfloat16": "logit_adjusted_natural bfloat16",
    "MFM, AutoAugment and Cutout, in bfloat16": "mfm strong bfloat16",
    "logit adjustment as published, AutoAugment and Cutout, in bfloat16": "logit_adjusted_natural strong bfloat16",
}
TEN = ("undersample", "ce")  # at factor 10, too
REGRETTED = {
    "MFM": "mfm",
    "MFM, with the curve that ships": "mfm_frozen",
    "logit adjustment, as tuned on CIFAR-10 at factor 100": "logit_adjusted_transferred",
    "logit adjustment as published (tau 1)": "logit_adjusted",
    "cRT": "crt",
    "Meta-Weight-Net": "meta_weight_net",
    "LDAM-DRW": "ldam_drw",
    "class-balanced weights": "class_balanced",
    "cross-entropy": "ce",
    "logit adjustment, tuned in each setting": "logit_adjusted_tuned",
}
THIRDS = ("head_third", "middle_third", "tail_third")
DIFFERENCE = re.compile(r"(-?\d+\.\d)(?: \[(-?\d+\.\d), (-?\d+\.\d)\])?")


def stored(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def table(page: str, after: str) -> list[list[str]]:
    """Returns the rows of the first table after the words `after`, without its head."""
    lines = page.partition(after)[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    assert rows
    return rows


def rounded(cell: str, value: str | float, places: int = 2) -> bool:
    """Whether a cell of one decimal is `value`, which a file has with that many `places`."""
    return abs(float(cell) - float(value)) < 0.05 + 0.51 * 10.0**-places


def is_mean(cell: str, row: Mapping[str, str]) -> bool:
    mean, _, std = cell.partition(" ± ")
    same = rounded(mean, row["balanced_accuracy_mean"])
    return same and (rounded(std, row["balanced_accuracy_std"]) if std else not row["balanced_accuracy_std"])


def check_difference(cell: str, difference: float) -> None:
    """The difference is that of the means; its interval lies about it."""
    middle, *ends = (float(one) for one in DIFFERENCE.match(cell).groups() if one)
    assert middle == pytest.approx(difference, abs=0.11), cell
    assert not ends or sum(ends) / 2 == pytest.approx(middle, abs=0.11), cell


def test_the_main_table_of_the_readme():
    rows = {row["method"]: row for row in stored("cifar10_lt_small.csv") if row["imbalance_factor"] == "100"}
    study = {cells[0]: cells for cells in table(STUDY, "### Imbalance factor 100")}
    shown = table(README, "## What it reaches")
    assert [METHODS[cells[0]] for cells in shown] == [
        "ce",
        "meta_weight_net",
        "ldam_drw",
        "logit_adjusted_natural",
        "logit_adjusted",
        "mfm",
    ]
    for name, balanced, *thirds, difference, seeds in shown:
        row, of_study = rows[METHODS[name]], study[METHODS[name]]
        assert is_mean(balanced, row), name
        assert all(rounded(cell, row[third]) for cell, third in zip(thirds, THIRDS, strict=True)), name
        assert seeds == row["seeds"]
        assert re.findall(r"-?\d+\.\d", difference) == re.findall(r"-?\d+\.\d", of_study[2]), name


@pytest.mark.parametrize("factor", ["100", "200", "50"])
def test_the_tables_of_the_study(factor):
    rows = {row["method"]: row for row in stored("cifar10_lt_small.csv") if row["imbalance_factor"] == factor}
    shown = table(STUDY, f"### Imbalance factor {factor}")
    for name, balanced, minus_ce, minus_adjusted, *thirds, seeds in shown:
        row = rows.pop(name)
        assert is_mean(balanced, row), name
        assert all(rounded(cell, row[third]) for cell, third in zip(thirds, THIRDS, strict=True)), name
        assert seeds == row["seeds"]
        for baseline, cell in (("ce", minus_ce), ("logit_adjusted", minus_adjusted)):
            other = next(
                r for r in stored("cifar10_lt_small.csv") if (r["method"], r["imbalance_factor"]) == (baseline, factor)
            )
            if cell != "–" and other["seeds"] == seeds:  # of fewer seeds, the pairs alone
                check_difference(cell, float(row["balanced_accuracy_mean"]) - float(other["balanced_accuracy_mean"]))
    assert all(factor == "100" and row["seeds"] == "1" for row in rows.values()), "the others have a table of their own"


def test_the_table_of_the_other_methods():
    alone = [row for row in stored("cifar10_lt_small.csv") if row["seeds"] == "1"]
    rows = {row["method"]: row for row in alone if row["imbalance_factor"] == "100"}
    ce = float(re.search(r"seed 0, for which CE has (\d+\.\d)", STUDY)[1])
    for name, balanced, minus_ce, *thirds in table(STUDY, "### The other methods"):
        row = rows.pop(name)
        assert is_mean(balanced, row), name
        check_difference(minus_ce, float(row["balanced_accuracy_mean"]) - ce)
        assert all(rounded(cell, row[third]) for cell, third in zip(thirds, THIRDS, strict=True)), name
    assert not rows
    few, many = (next(row for row in alone if (row["method"], row["imbalance_factor"]) == (name, "10")) for name in TEN)
    figures = [f"{float(row[name]):.1f}" for name in ("balanced_accuracy_mean", "tail_third") for row in (few, many)]
    words = " ".join(STUDY.split())
    assert "it has {} and cross-entropy {}, with {} and {} for the rarest third".format(*figures) in words


def test_the_tables_at_full_and_at_medium_size():
    full = {(row["method"], row["seed"]): row for row in stored("cifar10_lt_full.csv")}
    measures = ("balanced_accuracy", "head_third", "middle_third", "rarest_third", "ece")
    for name, seed, *cells in table(STUDY, "## At full size"):
        row = full.pop((METHODS[name], seed))
        assert all(rounded(cell, row[measure]) for cell, measure in zip(cells, measures, strict=True)), (name, seed)
    assert not full
    medium = {row["method"]: row for row in stored("cifar10_lt_medium.csv")}
    for name, balanced, *thirds in table(STUDY, "ResNet-20 at 32x32"):
        assert is_mean(balanced, medium[METHODS[name]]), name
        assert all(rounded(cell, medium[METHODS[name]][third]) for cell, third in zip(thirds, THIRDS, strict=True)), (
            name
        )


def test_full_size_in_words():
    found: dict[str, list[str]] = {}
    for row in stored("cifar10_lt_full.csv"):
        found.setdefault(row["method"], []).append(f"{float(row['balanced_accuracy']):.1f}")
    names = ("mfm", "mfm bfloat16", "logit_adjusted", "logit_adjusted_natural bfloat16", "ce")
    strong_names = ("mfm strong bfloat16", "logit_adjusted_natural strong bfloat16")
    mfm, mfm_half, tuned, untuned, ce, mfm_strong, untuned_strong = (
        " and ".join(", ".join(found[name]).rsplit(", ", 1)) for name in (*names, *strong_names)
    )
    strong = f"{mfm_strong} %, and {untuned_strong} %."
    words = " ".join(README.split())
    assert f"MFM has {mfm_half} % in bfloat16, and logit adjustment as published {untuned} %; under" in words
    assert f"under AutoAugment and Cutout (`configs/cifar10_lt_strong.py`) {strong}" in words
    tuned_there = f"logit adjustment with the small version's tau and sampling {tuned} %"
    assert f"In float32 MFM has {mfm} %, {tuned_there}, and cross-entropy, with one seed, {ce} %" in words
    words = " ".join((ROOT / "docs" / "faq.md").read_text(encoding="utf-8").split())
    assert f"in bfloat16, MFM has {mfm_half} % and logit adjustment as published {untuned} %" in words
    words = " ".join((ROOT / "docs" / "index.md").read_text(encoding="utf-8").split())
    assert f"MFM has {mfm} % with two seeds, and CE {ce} % with one" in words


def test_the_ingredients_of_strong_recipes():
    rows = {(row["method"], row["ingredient"]): row for row in stored("strong.csv")}
    names = ("", "ema", "cutmix", "cutmix_balanced", "proco", "sam", "max_norm")
    found = table(RECIPES, "## What each ingredient adds")
    for ingredient, (_, *cells) in zip(names, found, strict=True):
        for method in ("mfm", "logit_adjusted_natural", "ce"):
            row = rows.pop((method, ingredient))
            measures = [row[name] for name in ("validation", "balanced_accuracy", "ece")]
            assert all(rounded(cell, measure) for cell, measure in zip(cells[:3], measures, strict=True)), ingredient
            cells = cells[3:]
    assert not rows


def test_contrast_and_a_first_stage_without_labels():
    found = {row["method"]: row for row in stored("contrast.csv")}
    plain, *others = table(RECIPES, "## Contrast of pairs")
    small = {row["method"]: row for row in stored("cifar10_lt_small.csv") if row["imbalance_factor"] == "100"}
    methods = ("ce", "logit_adjusted", "mfm")
    for method, cell in zip(methods, plain[1:], strict=True):
        assert is_mean(cell, small[method])
    for ending, (_, *cells) in zip(("bcl", "sbcl", "after_simsiam"), others, strict=True):
        for method, cell in zip(methods, cells, strict=True):
            assert is_mean(cell, found.pop(f"{method}_{ending}"))
    (alone,) = found.values()
    assert f"Its features alone have {float(alone['balanced_accuracy_mean']):.1f} %" in RECIPES


def test_the_strong_recipe_at_full_size():
    found = {}
    for row in stored("cifar10_lt_full.csv"):
        found.setdefault(row["method"], []).append((float(row["balanced_accuracy"]), float(row["ece"])))
    names = ("mfm", "logit_adjusted_natural")
    tested = table(RECIPES, "## AutoAugment and Cutout, 200 epochs")
    for name, (_, before, after, difference, *errors) in zip(names, tested, strict=True):
        pairs = found[f"{name} bfloat16"], found[f"{name} strong bfloat16"]
        for cell, runs in zip((before, after), pairs, strict=True):
            values = [accuracy for accuracy, _ in runs]
            assert cell == f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
        gain = statistics.mean(after - before for (before, _), (after, _) in zip(*pairs, strict=True))
        assert difference.startswith(f"{gain:.1f} [")
        assert errors == [f"{statistics.mean(error for _, error in runs):.1f}" for runs in pairs]


def test_the_transfer_to_the_digits():
    mean = {row["method"]: float(row["balanced_accuracy_mean"]) for row in stored("digits_lt.csv")}
    (cells,) = (row for row in table(STUDY, "## Transfer") if row[0].startswith("scikit-learn's digits"))
    gain = {method: mean[method] - mean["ce"] for method in ("mfm", "mfm_frozen", "mfm_fine_tuned")}
    for cell, method in ((cells[1], "mfm"), (cells[2], "mfm_frozen"), (cells[4], "mfm_fine_tuned")):
        check_difference(cell, gain[method])
    assert cells[3] == f"{100 * gain['mfm_frozen'] / gain['mfm']:.0f} %"


def test_plankton():
    rows = {row["method"]: row for row in stored("plankton.csv") if row["epoch"] == "last"}
    names = {
        "cross-entropy": "ce",
        "logit adjustment as published (tau 1)": "logit_adjusted",
        "logit adjustment, as tuned on CIFAR-10": "logit_adjusted_tuned_on_cifar10",
        "MFM": "mfm",
        "MFM, the meta recipe before": "mfm_recipe_before",
        "MFM, a modulator from CIFAR-10, frozen": "mfm_frozen_from_cifar10",
    }

    def percent(row: Mapping[str, str], measure: str, spread: bool = False) -> str:
        mean, std = (f"{100 * float(row[f'{measure}_{kind}']):.1f}" for kind in ("mean", "std"))
        return f"{mean} ± {std}" if spread else mean

    for name, balanced, difference, many, medium, few, f1, ece in table(PLANKTON, "Test set, last of 12 epochs"):
        row = rows.pop(names[name])
        assert balanced == percent(row, "balanced_accuracy", spread=True)
        assert few == percent(row, "few", spread=True)
        groups = zip((many, medium, f1, ece), ("many", "medium", "macro_f1", "ece"), strict=True)
        assert all(cell == percent(row, measure) for cell, measure in groups), name
        if row["difference"]:
            middle, half = 100 * float(row["difference"]), 100 * float(row["difference_t95"])
            assert difference == f"{middle:.1f} [{middle - half:.1f}, {middle + half:.1f}]"
        elif difference:
            ce = float(stored("plankton.csv")[0]["balanced_accuracy_mean"])
            check_difference(difference, 100 * (float(row["balanced_accuracy_mean"]) - ce))
    assert not rows
    words = " ".join(README.split())
    assert {*re.findall(r"\d+\.\d ± \d\.\d %", words.partition("121 classes of plankton")[2])} <= {
        f"{percent(row, 'balanced_accuracy', spread=True)} %" for row in stored("plankton.csv")
    }


def test_every_mean_in_the_readme_and_on_the_first_page_is_in_a_file():
    means = []
    for path in RESULTS.glob("*.csv"):
        for row in stored(path.name):
            if row.get("balanced_accuracy_std"):
                scale = 100 if float(row["balanced_accuracy_mean"]) < 1 else 1
                means.append([scale * float(row[f"balanced_accuracy_{kind}"]) for kind in ("mean", "std")])
    for page in ("README.md", "docs/index.md", "docs/faq.md"):
        for told in re.findall(r"(\d+\.\d) ± (\d+\.\d)", (ROOT / page).read_text(encoding="utf-8")):
            assert any(rounded(told[0], mean) and rounded(told[1], std) for mean, std in means), (page, told)


def test_the_campaign_of_kills():
    found = json.loads((RESULTS / "kill_campaign.json").read_text())
    kills, page = found["kills"], (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8")
    sent = kills["sent"]

    def of(words: str) -> int:
        return sum(number for what, number in sent.items() if words in what)

    first, second, *_, hangs = table(page, "kill_campaign.json](")
    signals = (
        f"{sum(sent.values())} signals over {kills['runs']} runs: {of('SIGKILL')} SIGKILL, {of('SIGTERM')} SIGTERM"
    )
    moments = (
        f"{of('any moment')} at any moment, {of('written')} while a checkpoint is written, {of('epoch')} after an epoch"
    )
    assert first[0] == f"{signals}; {moments}"
    assert kills["identical"] == kills["runs"]
    assert not found["failures"]
    same = sum(one["outcome"].startswith("identical") for one in found["damages"])
    assert (second[0].split()[0], second[1].split()[0]) == (str(len(found["damages"])), str(same))
    assert f"ended {kills['slowest_end_seconds']:.0f} s after" in hangs[1]


def test_the_table_of_regret():
    rows = {(row["setting"], row["method"]): row for row in stored("regret.csv")}
    page = (RESULTS / "regret.md").read_text(encoding="utf-8")
    head = re.search(r"^\| setting \| (`mfm`.*) \|$", page, re.MULTILINE)[1]
    methods = [cell.strip().strip("`") for cell in head.split("|")]
    left = dict(rows)
    for setting, *cells in table(page, "### Accuracies"):
        for method, cell in zip(methods, cells, strict=True):
            row = left.pop((setting, method), None)
            assert (cell == "") == (row is None)
            assert row is None or is_mean(cell, row)
    assert not left
    corrected = {}
    names = re.search(r"^\| method \| mean .*\| worst \|[^|]*\| (.*) \|$", page, re.MULTILINE)[1].split(" | ")
    for method, _, mean, _, worst, *cells in table(page, "### Regrets"):
        regrets = [rows[name.strip("`"), method]["regret"] for name in names]
        assert all(map(rounded, cells, regrets))
        over_settings = sum(map(float, regrets)) / len(regrets)
        assert float(mean.split()[0]) == pytest.approx(over_settings, abs=0.15)  # corrected by draws of all settings
        corrected[method] = mean, worst
    assert {row["setting"] for row in rows.values() if row["regret"]} == {name.strip("`") for name in names}
    for method, mean, worst, _ in table(README, "with nothing to tune**"):
        assert (mean, worst) == corrected[REGRETTED[method]]


def test_the_table_of_features():
    rows = stored("features.csv")
    for (_, network, mean, difference, *thirds, fitted, seeds), row in zip(
        table(STUDY, "**16. Modulated features"), rows, strict=True
    ):
        assert (network, seeds) == (row["network"], row["seeds"])
        assert is_mean(mean, row)
        assert rounded(difference or "0.0", row["minus_logits"])
        parts = ("head_third", "middle_third", "rarest_third", "training_accuracy")
        assert all(rounded(cell, row[part]) for cell, part in zip((*thirds, fitted), parts, strict=True))


def test_the_table_of_the_kept_curve():
    means = {(r["setting"], r["method"]): float(r["balanced_accuracy_mean"]) for r in stored("regret.csv")}
    page = (RESULTS / "regret.md").read_text(encoding="utf-8")
    shares = []
    for setting, gained, kept, share in table(page, "### What a curve keeps"):
        gain, left = (means[setting, method] - means[setting, "ce"] for method in ("mfm", "mfm_frozen"))
        assert rounded(gained, gain)
        assert rounded(kept, left)
        assert (share == "–") == (gain < 1)
        if share != "–":
            assert float(share) == pytest.approx(100 * left / gain, abs=0.51)
            shares.append(float(share))
    assert sorted(shares)[1:] == [share for share in sorted(shares) if share >= 85]
    assert (len(shares), min(shares)) == (11, 67)
    for text in (page, README):
        assert "85 % or more of MFM's gain in ten of the eleven" in " ".join(text.split())


def spread(row: Mapping[str, str], name: str = "balanced_accuracy", digits: int = 1) -> str:
    """Returns `mean ± std` of what a row has of both; the file has them as `NAME_mean` and `NAME_std`, or NAME."""
    mean, std = float(row.get(f"{name}_mean", row.get(name, ""))), float(row[f"{name}_std"])
    return f"{mean:.{digits}f} ± {std:.{digits}f}"


@pytest.mark.parametrize(("name", "after"), [("noise", "## Noisy labels"), ("noise_plankton", "\nWrong labels of")])
def test_wrong_labels(name, after):
    found = {row["method"]: row for row in stored(f"{name}.csv")}
    rows = table(NEIGHBOURS, after)
    for method, (_, *cells) in zip(("ce", "mfm", "meta_weight_net", "l2rw", "rcal", "mfm_rcal"), rows, strict=True):
        assert cells == [spread(found.pop(method + ending)) for ending in ("", "_noise20", "_noise40")]
    assert not found


def test_a_backbone_that_favours_classes():
    rows = {(row["method"], float(row["pretraining_tau"])): row for row in stored("foundation.csv")}
    assert f"has {spread(rows.pop(('start', 0.0)))} itself" in " ".join(NEIGHBOURS.split())
    tested = table(NEIGHBOURS, "## Foundation models")
    for method, (_, *cells) in zip(("ce", "logit_adjusted", "mfm"), tested, strict=True):
        assert cells == [spread(rows.pop((method, tau))) for tau in (0.0, 1.0)]
    assert not rows


@pytest.mark.parametrize(
    ("name", "after"), [("distillation", "## A teacher"), ("distillation_plankton", "\nStudents of")]
)
def test_students(name, after):
    found: dict[str, list[float]] = {}
    for row in stored(f"{name}.csv"):
        found.setdefault(row["row"], []).append(float(row["balanced_accuracy"]))
    means = {name: f"{statistics.mean(runs):.1f} ± {statistics.stdev(runs):.1f}" for name, runs in found.items()}
    assert f"teachers have {means.pop('teacher')}" in " ".join(NEIGHBOURS.split())
    assert [cell for _, cell in table(NEIGHBOURS, after)] == list(means.values())


@pytest.mark.parametrize(
    ("name", "after"), [("costs", "## Costs and recalls"), ("costs_plankton", "\nCosts on [plankton]")]
)
def test_costs_and_recalls(name, after):
    rows, tested = stored(f"{name}.csv"), table(NEIGHBOURS, after)
    for row, (_, *cells) in zip(rows, tested, strict=True):
        costs = [spread(row, name, 2) for name in ("cost_likeliest", "cost_by_cost", "cost_with_recall")]
        recalls = [f"{float(row[name]):.1f}" for name in ("reached", "likeliest_reached", "others", "likeliest_others")]
        assert cells == [*costs, *recalls]
