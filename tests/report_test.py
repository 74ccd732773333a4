"""The report is one self-contained page whose numbers are the workdir's."""

import html.parser
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mfm_jax.errors import UserError
from mfm_jax.evaluation import metrics
from mfm_jax.pages import report
from mfm_jax.pages.style import INK
from mfm_jax.workdir import finished
from mfm_jax.workdir.files import Workdir

STRANGE_NAMES = ["<b>bold</b>", 'quo"te & co', "$\\notmath$", "猫"]


def write_workdir(
    workdir: Path,
    classes: int = 10,
    *,
    best: bool = True,
    trained: bool = True,
    modulated: bool = True,
    channels: int = 64,
) -> dict[str, Any]:
    """A finished run with plausible values; returns its results."""
    rng = np.random.default_rng(0)
    counts = [int(5000 * 0.01 ** (c / (classes - 1))) for c in range(classes)]
    names = (STRANGE_NAMES + [f"class {c}" for c in range(classes)])[:classes]

    def evaluation(skill: float) -> dict[str, Any]:
        labels = np.repeat(np.arange(classes), 40)
        logits = rng.normal(size=(len(labels), classes)) + skill * np.eye(classes)[labels] + 0.2 * np.log(counts)
        probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        return metrics.evaluate(probs.astype(np.float32), labels, np.array(counts))

    rows: list[dict[str, Any]] = []
    for step in range(100, 4001, 100) if trained else ():
        loss = 2.3 * np.exp(-step / 1500) + 0.05 * rng.random()
        train = {"loss": loss, "accuracy": 1 - loss / 3, "learning_rate": 0.1, "meta_loss": loss + 0.3}
        learned = {"hypergrad_norm": 0.01, "hypergrad_agreement": 0.3}
        rows.append({"kind": "train", "step": step, "epoch": step // 400, **train, **learned})
        if step % 400 == 0:
            value = 0.6 - loss / 5
            scores = {"balanced_accuracy": value, "accuracy": value, "nll": loss + 0.5}
            rows.append({"kind": "val", "step": step, "epoch": step // 400, **scores})
    for step in range(400, 4001, 400) if modulated else ():
        direct = {
            "gamma": (step * 1e-4 * rng.normal(size=channels)).tolist(),
            "beta": [step * 1e-4] * channels,
        }
        logits = {"gamma": [0.0] * classes, "beta": (step * 1e-4 * np.linspace(0, -1, classes)).tolist()}
        rows.append(
            {
                "kind": "modulation",
                "step": step,
                "epoch": step // 400,
                "sites": {"pooled": direct, "logits": logits},
            }
        )

    results = {
        "method": "mfm",
        "split": "test",
        "seed": 3,
        "last": {"step": 4000, "epoch": 10, "test": evaluation(2.6), "val": evaluation(2.5)},
        "best": {"step": 3200, "epoch": 8, "test": evaluation(2.7), "val": evaluation(2.8)} if best else None,
        "versions": {"jax": "0.10.2", "mfm_jax": "0.1.0"},
        "train_seconds": 1234.5,
    }
    manifest = {
        "dataset": "cifar10",
        "version": "3.0.2",
        "protocol": "meta_held_out",
        "imbalance_factor": 100,
        "seed": 7,
        "class_names": names,
        "splits": {
            "train": {"pool": "train", "class_counts": counts, "ids": []},
            "test": {"pool": "test", "class_counts": [40] * classes, "ids": []},
        },
        "hash": "sha256:0123abcd",
    }
    config = {"method": "mfm", "data": {"name": "cifar10"}, "note": "</pre><script>alert(1)</script>"}
    for name, value in (("config", config), ("manifest", manifest), ("results", results)):
        (workdir / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (workdir / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return results


class Page(html.parser.HTMLParser):
    """What the tests ask of a page: its tags with attributes, tables as rows, text by section."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text: dict[str | None, str] = {}
        self._section: str | None = None
        self._cell = False
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self._section = dict(attrs).get("id")
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        if tag == "section":
            self._section = None
        elif tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data):
        self.text[self._section] = self.text.get(self._section, "") + data
        if self._cell:
            self.tables[-1][-1][-1] += data

    def figures(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "svg"]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("full")
    results = write_workdir(workdir)
    path = report.write_report(workdir)
    assert path == workdir / "report.html"
    return Page(path), results


def test_is_one_file_without_links_or_scripts(full):
    page, _ = full
    assert not re.search(r"https?://|<script|@import|//[a-z]", page.source.replace("</script", ""), re.IGNORECASE)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "img", "object"), tag
        for name in ("src", "href", "xlink:href", "data", "action"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:image/png;base64,")), (tag, name, target[:80])
    assert not re.search(r"url\((?!#)", page.source)
    assert len(page.source) < 1_000_000


def test_references_inside_figures_resolve(full):
    page, _ = full
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", page.source)
    assert used
    assert {a or b for a, b in used} <= set(ids)


def test_every_figure_is_there_with_its_alternative_text(full):
    page, _ = full
    figures = page.figures()
    assert len(figures) == 6
    for figure in figures:
        assert figure["role"] == "img"
        assert len(figure["aria-label"] or "") > 60
        assert "viewbox" in figure
    assert page.source.count("currentColor") > 50  # the ink follows the page's light or dark scheme
    assert INK not in page.source


def test_summary_prints_the_numbers_of_the_results(full):
    page, results = full
    head, *rows = page.tables[0]
    sources = [
        results["last"]["test"],
        results["best"]["test"],
        results["last"]["val"],
        results["best"]["val"],
    ]
    assert [cell.rsplit("epoch", 1)[1].strip() for cell in head[1:]] == ["10", "8", "10", "8"]
    assert len(rows) == len(report.SUMMARY_ROWS) + 1
    for (label, key), row in zip(report.SUMMARY_ROWS, rows, strict=False):
        assert row[0] == label
        for cell, source in zip(row[1:], sources, strict=True):
            if source[key] is None:
                assert cell == "–"
            else:
                assert float(cell) == pytest.approx(100 * source[key], abs=0.005 + 1e-9)
    assert float(rows[-1][1]) == pytest.approx(sources[0]["nll"], abs=0.0005 + 1e-9)
    few = next(row for row in rows if row[0].startswith("Few"))
    assert few[1:] == ["–"] * 4  # the rarest class has 50 images


def test_class_table_prints_counts_and_accuracies(full):
    page, results = full
    rows = page.tables[1][1:]
    assert len(rows) == 10
    for k, row in enumerate(rows):  # the classes of this run are already ordered from most to fewest images
        assert row[0] == str(k)
        assert row[3] == f"{int(5000 * 0.01 ** (k / 9)):,}"
        assert row[4] == "40"
        for cell, entry in zip(row[5:], ("last", "best"), strict=True):
            expected = results[entry]["test"]["per_class_accuracy"][k]
            assert float(cell) == pytest.approx(100 * expected, abs=0.006)
    assert rows[0][2] == "many"
    assert rows[-1][2] == "medium"


def test_names_are_data_not_markup(full):
    page, _ = full
    assert [row[1] for row in page.tables[1][1:5]] == STRANGE_NAMES
    assert "<b>" not in page.source
    assert "alert(1)" in page.text["config"]
    for name in STRANGE_NAMES:  # in the axis labels of both figures too
        assert name in page.text["classes"]
        assert name in page.text["confusion"]


def test_title_and_record(full):
    page, _ = full
    for fact in ("mfm on cifar10", "imbalance factor 100", "meta_held_out", "seed 3", "10 classes"):
        assert fact in page.text[None], fact
    facts = ("sha256:0123abcd", "jax 0.10.2", "version 3.0.2", "split seed 7")
    for fact in facts:
        assert fact in page.text["record"], fact


def test_missing_pieces_are_left_out_with_a_sentence(tmp_path):
    results = write_workdir(tmp_path, best=False, trained=False, modulated=False)
    for key in ("versions", "train_seconds", "best"):
        del results[key]
    results["last"]["val"] = None
    results["last"]["test"]["per_class_accuracy"][4] = None
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = Page(report.write_report(tmp_path))
    assert "No epoch was selected" in page.text["summary"]
    assert "no learning curves" in page.text["curves"]
    assert "recorded no modulation" in page.text["modulation"]
    assert len(page.figures()) == 3
    assert [len(row) for row in page.tables[0]] == [2] * len(page.tables[0])
    assert page.tables[1][5][5] == "–"


def test_many_classes(tmp_path):
    write_workdir(tmp_path, classes=250, channels=300)
    page = Page(report.write_report(tmp_path))
    assert len(page.tables) == 1
    assert "too many for a table" in page.text["per-class"]
    assert len(page.figures()) == 6
    assert len(page.source) < 1_500_000


@pytest.mark.parametrize("counts", [[7, 7, 7], [3, 1, 0]])
def test_odd_counts_are_drawn(tmp_path, counts):
    write_workdir(tmp_path, classes=3)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["splits"]["train"]["class_counts"] = counts
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert len(Page(report.write_report(tmp_path)).figures()) == 6


def test_counts_at_the_top_and_no_class_names(tmp_path):
    write_workdir(tmp_path, classes=4)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["class_counts"] = manifest.pop("splits")["train"]["class_counts"]
    del manifest["class_names"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    page = Page(report.write_report(tmp_path))
    assert [row[1] for row in page.tables[1][1:]] == ["0", "1", "2", "3"]


def test_resumed_run_keeps_the_later_row_and_the_order_of_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written = [(1, 1.0), (2, 9.0), (3, 9.0), (2, 0.5)]
    rows = [{"kind": "train", "step": step, "loss": loss} for step, loss in written]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    read = [(row["step"], row["loss"]) for row in finished._rows(Workdir(tmp_path))["train"]]
    assert read == [(1, 1.0), (2, 0.5), (3, 9.0)]


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "metrics.jsonl", "results.json"])
@pytest.mark.parametrize("content", [None, b"{", b"[1]", b"\xff\xfe"])
def test_missing_or_garbled_file_is_named(tmp_path, name, content):
    write_workdir(tmp_path, classes=3)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(name)):
        report.write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("results.json", lambda value: value.pop("last"), "last.test"),
        ("results.json", lambda value: value.pop("method"), "'method'"),
        ("results.json", lambda value: value["best"]["test"].pop("confusion"), "best.test.*'confusion'"),
        ("results.json", lambda value: value["last"]["test"]["confusion"].pop(), "not of the 3 classes"),
        ("results.json", lambda value: value["best"]["test"]["confusion"][1].pop(), "not of the 3 classes"),
        ("manifest.json", lambda value: value["splits"]["train"].pop("class_counts"), "class_counts"),
        (
            "manifest.json",
            lambda value: value["splits"]["train"]["class_counts"].append("many"),
            "class_counts",
        ),
        ("manifest.json", lambda value: value["class_names"].pop(), "2 class names"),
    ],
)
def test_wrong_field_is_named(tmp_path, name, change, message):
    write_workdir(tmp_path, classes=3)
    value = json.loads((tmp_path / name).read_text())
    change(value)
    (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(UserError, match=rf"{re.escape(name)}.*{message}"):
        report.write_report(tmp_path)


def test_modulation_that_changes_length_is_refused(tmp_path):
    write_workdir(tmp_path, classes=3)
    sites = {"pooled": {"gamma": [0.0], "beta": [0.0]}}
    row = {"kind": "modulation", "step": 9000, "epoch": 1, "sites": sites}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="gamma at site 'pooled'"):
        report.write_report(tmp_path)


def test_warnings_stand_before_the_summary(tmp_path, full):
    write_workdir(tmp_path, classes=3)
    rows = [{"kind": "warning", "step": 4000, "epoch": 10, "code": c, "sentence": f"<{c}>; look at x"} for c in "ab"]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(report.write_report(tmp_path))
    assert page.text["warnings"].split("\n")[-4:-2] == ["<a>; look at x", "<b>; look at x"]
    assert page.source.index('id="warnings"') < page.source.index('id="summary"')
    assert "warnings" not in full[0].text


def test_modulation_of_other_classes_is_refused(tmp_path):
    write_workdir(tmp_path, classes=3, modulated=False)
    row = {"kind": "modulation", "step": 9, "sites": {"logits": {"gamma": [0.0, 0.0], "beta": [0.0, 0.0]}}}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="gamma at site 'logits'"):
        report.write_report(tmp_path)


def test_modulation_at_logits_names_classes(full):
    page, _ = full
    for name in STRANGE_NAMES:
        assert name in page.text["modulation"]
    for color in ("#3b7dd8", "#e8743b"):  # the largest and the smallest class
        assert f"stroke: {color}" in page.source.split('id="modulation"')[1]


def test_matplotlib_state_is_left_alone(full):
    import matplotlib

    assert matplotlib.rcParams["svg.fonttype"] == matplotlib.rcParamsDefault["svg.fonttype"]
    assert "matplotlib.pyplot" not in sys.modules or not matplotlib.pyplot.get_fignums()
