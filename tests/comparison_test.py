"""The page of a comparison, from results made by hand."""

import re

import numpy as np
import pytest

from mfm_jax import compare
from mfm_jax.evaluation import metrics
from mfm_jax.pages import comparison

COUNTS = np.array([500, 60, 7])
MANIFEST = {
    "dataset": "made <up>",
    "protocol": "full",
    "imbalance_factor": 71.4,
    "class_names": ["a", "b", "<c>"],
    "splits": {"train": {"class_counts": COUNTS.tolist()}},
}


def run(seed: int, skill: float, seconds: float) -> dict:
    """Returns results whose balanced accuracy is `skill`."""
    labels = np.repeat(np.arange(3), 20)
    hit = np.tile(np.arange(20) < round(20 * skill), 3)
    probs = np.full((60, 3), 0.1)
    probs[np.arange(60), np.where(hit, labels, (labels + 1) % 3)] = 0.8
    test = metrics.evaluate(probs, labels, COUNTS)
    return {"seed": seed, "split": "test", "last": {"test": test}, "best": None, "train_seconds": seconds}


def page(tmp_path, results, baseline="ce", failed=None, memory=None, tuned=None) -> str:
    rows = compare.table(results, baseline, memory or {})
    path = comparison.write_page(tmp_path, rows, results, failed or {}, tuned or {}, MANIFEST, baseline)
    assert path == tmp_path / "compare.html"
    return path.read_text()


def test_what_runs_were_warned_of_is_listed(tmp_path, results):
    told = [("mfm seed 1", "phi stands still; look at <meta.learning_rate>")]
    path = comparison.write_page(tmp_path, compare.table(results, "ce"), results, {}, {}, MANIFEST, "ce", told)
    assert "<li>mfm seed 1: phi stands still; look at &lt;meta.learning_rate&gt;</li>" in path.read_text()
    assert 'class="warning"' not in page(tmp_path, results)


def rows_of(html: str) -> dict[str, list[str]]:
    found = {}
    for row in re.findall(r"<tr><td>(.*?)</tr>", html, re.DOTALL):
        cells = [" ".join(re.sub(r"<[^>]*>", " ", cell).split()) for cell in row.split("</td>")]
        found[cells[0]] = cells[1:-1]
    return found


@pytest.fixture
def results():
    return {
        "ce": [run(0, 0.5, 10.0), run(1, 0.4, 10.0), run(2, 0.3, 12.0)],
        "mfm": [run(0, 0.7, 20.0), run(1, 0.6, 25.0), run(2, 0.6, 30.0)],
    }


def test_differences_with_their_interval_and_costs_as_ratios(tmp_path, results):
    found = rows_of(page(tmp_path, results, memory={"ce": 100.0, "mfm": 150.0}))
    # Gaps 20, 20, 30: mean 23.33, standard error 3.333; t(0.975, 2) is 4.3027, half the width 14.34.
    assert found["mfm"][2:3] + found["mfm"][-2:] == ["23.3 [9.0, 37.7]", "2.50", "1.50"]
    assert found["ce"][2:3] + found["ce"][-2:] == ["–", "1.00", "1.00"]
    assert found["ce"][1] == "40.0 ± 10.0"
    head = ["balanced", "minus ce", "many", "medium", "few", "rarest third", "macro F1", "ROC AUC", "ECE"]
    assert re.findall(r"<th>([^<]*)", page(tmp_path, results))[: len(head) + 1] == ["method", *head]
    assert "±" in found["mfm"][7]


def test_memory_that_was_not_measured_and_a_single_seed(tmp_path, results):
    one_seed = {name: runs[:1] for name, runs in results.items()}
    found = rows_of(page(tmp_path, one_seed, memory={"ce": None, "mfm": 1.0}))
    assert found["mfm"][2:3] + found["mfm"][-2:] == ["20.0", "2.00", "–"]


def test_it_is_one_page_with_three_figures_and_escapes_names(tmp_path, results):
    html = page(tmp_path, results, failed={"focal": "focal seed 1: <b>loss</b> became non-finite"})
    assert html.count("<svg") == 3
    assert "mathdefault" not in html  # TeX, which a browser shows as it is
    assert "made &lt;up&gt;" in html
    assert "<b>loss" not in html
    assert "focal: focal seed 1: &lt;b&gt;loss" in html
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", html)


def test_data_taken_as_it_is_has_the_factor_of_its_counts(tmp_path, results, monkeypatch):
    assert "<li>imbalance factor 71.4</li>" in page(tmp_path, results)
    monkeypatch.setitem(MANIFEST, "protocol", "natural")
    monkeypatch.setitem(MANIFEST, "imbalance_factor", 1.0)
    assert "<li>imbalance factor 71.4 (natural)</li>" in page(tmp_path, results)  # 500 / 7


def test_what_tuning_chose_is_said(tmp_path, results):
    html = page(tmp_path, results, tuned={"ce": {}, "mfm": {"meta.learning_rate": 0.25, "method.hidden": 3}})
    (said,) = re.findall(r"<p[^>]*>([^<]*was tuned[^<]*)</p>", html)
    assert " ".join(said.split()) == "mfm was tuned on validation: meta.learning_rate = 0.25, method.hidden = 3."


def test_a_failed_baseline_leaves_the_rest(tmp_path, results):
    html = page(tmp_path, {"mfm": results["mfm"]}, failed={"ce": "out of memory"})
    assert html.count("<svg") == 2
    assert rows_of(html)["mfm"][2:3] + rows_of(html)["mfm"][-2:] == ["–", "–", "–"]
    assert "nothing to measure costs by" in html
