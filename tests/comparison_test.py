"""The page of a comparison, from results made by hand."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from mfm_jax import compare
from mfm_jax.evaluation import metrics
from mfm_jax.pages import comparison, comparison_figures, style

pytestmark = pytest.mark.usefixtures("drawn")

COUNTS = np.array([500, 60, 7])
MANIFEST = {
    "dataset": "made <up>",
    "protocol": "full",
    "imbalance_factor": 71.4,
    "class_names": ["a", "b", "<c>"],
    "splits": {"train": {"class_counts": COUNTS.tolist()}, "meta": {"class_counts": [10, 10, 10]}},
    "overlaps": [],
}
MADE = {"date": "2026-01-02 03:04:05+00:00", "command": "python -m mfm_jax.compare --seeds=0", "processor": "<CPU>"}


def run(seed: int, skill: float, seconds: float) -> dict:
    """Returns results whose balanced accuracy is `skill`."""
    labels = np.repeat(np.arange(3), 20)
    hit = np.tile(np.arange(20) < round(20 * skill), 3)
    probs = np.full((60, 3), 0.1)
    probs[np.arange(60), np.where(hit, labels, (labels + 1) % 3)] = 0.8
    last = {"step": 10, "epoch": 2, "test": metrics.evaluate(probs, labels, COUNTS)}
    return {"seed": seed, "split": "test", "last": last, "best": None, "train_seconds": seconds}


def write_run(folder: Path, result: dict, method: str, manifest: dict, told: list[str]) -> None:
    """Writes what the page reads of a run: MFM's steps take twice as long as the baseline's."""
    folder.mkdir(parents=True)
    step = 0.2 if method == "mfm" else 0.1
    learned = {"meta_loss": 1.0} if method == "mfm" else {}
    rows = [{"kind": "train", "step": at, "epoch": 0, "loss": 1 / at, **learned} for at in (5, 10)]
    rows += [{"kind": "warning", "step": 10, "epoch": 0, "code": text, "sentence": text} for text in told]
    process = {"seconds": result["train_seconds"], "compile_seconds": 5.0, "step_seconds": step}
    config = {"method": {"name": method}, "meta": {"every": 2 if method == "mfm" else 1}}
    for name, content in (("manifest.json", manifest), ("config.json", config), ("processes.jsonl", process)):
        (folder / name).write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def page(tmp_path, results, *, failed=None, memory=None, tuned=None, manifest=MANIFEST, told=()) -> str:
    folders = {name: [tmp_path / name / f"seed{one['seed']}" for one in runs] for name, runs in results.items()}
    for name, runs in results.items():
        for one, folder in zip(runs, folders[name], strict=True):
            write_run(folder, one, name, manifest, [text for at, text in told if at == f"{name}/{folder.name}"])
    rows = compare.table(results, "ce", memory or {})
    path, _ = comparison.write_page(tmp_path, rows, results, failed or {}, tuned or {}, folders, "ce", MADE)
    assert path == tmp_path / "compare.html"
    return path.read_text()


def rows_of(html: str, section: str) -> dict[str, list[str]]:
    """Returns the cells of a section's table by the head of their row."""
    table = html.split(f'<section id="{section}">')[1].split("</table>")[0]
    found = {}
    for row in re.findall(r"<tr>(.*?)</tr>", table.split("<tbody>")[1], re.DOTALL):
        cells = [
            " ".join(re.sub(r"<[^>]*>", " ", cell).split()) for cell in re.findall(r"<t[dh].*?</t[dh]>", row, re.DOTALL)
        ]
        found[cells[0]] = cells[1:]
    return found


RESULTS = {
    "ce": [run(0, 0.5, 10.0), run(1, 0.4, 10.0), run(2, 0.3, 12.0)],
    "mfm": [run(0, 0.7, 20.0), run(1, 0.6, 25.0), run(2, 0.6, 30.0)],
}


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    """A page with everything on it."""
    return page(
        tmp_path_factory.mktemp("page"),
        RESULTS,
        failed={"focal": "focal seed 1: <b>loss</b> became non-finite"},
        memory={"ce": 100e6, "mfm": 150e6},
        tuned={"ce": {}, "mfm": {"meta.learning_rate": 0.25, "method.hidden": 3}},
        told=[("mfm/seed1", "phi stands still; look at <meta.learning_rate>")],
    )


def test_differences_with_their_interval_and_costs_as_ratios(html):
    found = rows_of(html, "accuracy")
    # Gaps 20, 20, 30: mean 23.33, standard error 3.333; t(0.975, 2) is 4.3027, half the width 14.34.
    assert found["mfm"][1] == "23.3 [9.0, 37.7]"
    assert found["ce"][:2] == ["40.0 ± 10.0", "–"]
    cost = rows_of(html, "cost")
    assert cost["mfm"] == ["200.0 2.00 × ce", "5.0", "25.0", "150 1.50 × ce"]  # not 2.5, the ratio with compilation
    assert cost["ce"] == ["100.0 1.00 × ce", "5.0", "10.0", "100 1.00 × ce"]
    assert rows_of(html, "ranking")["mfm"][0].count("±") == 1


def test_it_says_in_words_what_was_found(html):
    told = "mfm is 23.3 points above ce [9.0, 37.7]; its meta set is 30 images that ce did not see."
    assert f'<p class="headline">{told}</p>' in html


@pytest.mark.parametrize(
    ("protocol", "changes", "end"),
    [
        (
            "natural",
            {"overlaps": [{"part": "meta", "whole": "train"}], "meta_redrawn": True},
            ", drawn anew every epoch.",
        ),
        ("full", {"overlaps": [{"part": "meta", "whole": "train"}]}, "its meta set is 30 of the training images."),
    ],
)
def test_it_says_where_the_meta_set_is_from(tmp_path, protocol, changes, end):
    html = page(tmp_path, RESULTS, manifest={**MANIFEST, "protocol": protocol, **changes})
    assert end in html


def test_it_claims_nothing_where_nothing_is_shown(tmp_path):
    alike = {**RESULTS, "mfm": [run(0, 0.6, 1.0), run(1, 0.3, 1.0), run(2, 0.4, 1.0)]}
    assert "The interval holds zero: no difference is shown." in page(tmp_path / "alike", alike)
    one_seed = {name: runs[:1] for name, runs in RESULTS.items()}
    html = page(tmp_path / "one", one_seed, memory={"ce": None, "mfm": 1.0})
    assert "mfm is 20.0 points above ce; " in html
    assert "One seed shows no interval." in html
    assert rows_of(html, "accuracy")["mfm"][1] == "20.0"
    assert rows_of(html, "cost")["mfm"][3] == "0"  # a ratio to what was not measured is left out


def test_costs_of_an_image_stand_beside_the_accuracies_where_they_were_asked_for(tmp_path, html):
    assert "Cost of an image" not in html
    results = {"ce": [run(0, 0.5, 1.0)], "mfm": [run(0, 0.7, 1.0)]}
    for cost, (one,) in zip((1.25, 0.5), results.values(), strict=True):
        one["last"]["decisions"] = {"measured": {"test": {"decided": {"mean_cost": cost}}}}
    found = rows_of(page(tmp_path, results), "accuracy")
    assert {name: cells[-1] for name, cells in found.items()} == {"ce": "1.25", "mfm": "0.50"}


def test_it_is_one_page_with_four_figures_and_escapes_names(html):
    assert html.count("<svg") == 4
    assert "mathdefault" not in html  # TeX, which a browser shows as it is
    assert "made &lt;up&gt;" in html
    assert "<b>loss" not in html
    assert "focal: focal seed 1: &lt;b&gt;loss" in html
    assert not re.search(r"https?://(?!www\.w3\.org)", html)


def test_figures_tell_their_values_to_the_pointer(html):
    for told in (
        "mfm, balanced: +23.3 [9.0, 37.7]",
        "mfm, compilation: 5.0 s",
        "ce, steps: 1.0 s",
        "mfm: 63.3 ± 5.8 %\nclass &lt;c&gt;, 7 training images",
        "ce: 0.100 ± 0.000 at the end",
    ):
        assert f"<title>{told}</title>" in html, told


def test_runs_have_links_that_work_beside_them(html):
    assert re.findall('<a href="([^"]*)">', html) == [
        f"{m}/seed{s}/report.html" for m in ("ce", "mfm") for s in range(3)
    ]


def test_the_record_has_config_command_date_and_hardware(html):
    for fact in ("2026-01-02", "python -m mfm_jax.compare --seeds=0", "&lt;CPU&gt;", "meta.every: 1 -&gt; 2"):
        assert fact in html, fact


def test_what_runs_were_warned_of_is_listed(html, tmp_path):
    assert "<li>mfm seed 1: phi stands still; look at &lt;meta.learning_rate&gt;</li>" in html
    assert "Look at this first" not in page(tmp_path, {"ce": RESULTS["ce"]})


def test_data_taken_as_it_is_has_the_factor_of_its_counts(html, tmp_path):
    assert "<li>imbalance factor 71.4</li>" in html
    natural = page(tmp_path, RESULTS, manifest={**MANIFEST, "protocol": "natural", "imbalance_factor": 1.0})
    assert "<li>imbalance factor 71.4 (natural)</li>" in natural  # 500 / 7


def test_what_tuning_chose_is_said(html):
    (said,) = re.findall(r"<p[^>]*>([^<]*was tuned[^<]*)</p>", html)
    assert " ".join(said.split()) == "mfm was tuned on validation: meta.learning_rate = 0.25, method.hidden = 3."


def test_a_failed_baseline_leaves_the_rest(tmp_path):
    html = page(tmp_path, {"mfm": RESULTS["mfm"]}, failed={"ce": "out of memory"})
    assert html.count("<svg") == 4
    assert 'class="headline"' not in html
    assert rows_of(html, "accuracy")["mfm"][1] == "–"
    assert rows_of(html, "cost")["mfm"][0] == "200.0"
    assert "<title>mfm, balanced: 63.3 ± 5.8</title>" in html


def test_two_classes_have_no_middle_third():
    thirds = {"head_third": 0.9, "middle_third": None, "rarest_third": 0.4}
    runs = [{"balanced_accuracy": score, **thirds} for score in (0.6, 0.7, 0.65)]
    methods = [comparison_figures.Compared(name, runs) for name in ('"ce"', "mfm")]
    picture = style.render(comparison_figures.draw_gains, (8.0, 2.0), methods, '"ce"')
    assert "mfm, rarest third: +0.0 [" in picture.svg
    assert "middle" not in picture.svg.split("<title>")[-1]


def test_names_with_quotes_are_shown_to_the_pointer():
    runs = [{"balanced_accuracy": 0.6, "head_third": 0.9, "middle_third": 0.7, "rarest_third": 0.4}]
    methods = [comparison_figures.Compared(name, runs) for name in ("ce", 'the "new" one')]
    picture = style.render(comparison_figures.draw_gains, (8.0, 2.0), methods, "ce")
    assert 'the "new" one, balanced: +0.0' in picture.svg.replace("&quot;", '"')
    assert "tip:" not in picture.svg
