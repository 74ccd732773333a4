"""The report is one self-contained page whose numbers are the workdir's."""

import base64
import hashlib
import html.parser
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import STRANGE_NAMES, write_run

from mfm_jax.errors import UserError
from mfm_jax.pages import report
from mfm_jax.pages.style import INK
from mfm_jax.workdir import finished

pytestmark = pytest.mark.usefixtures("drawn")


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
    results = write_run(workdir)
    path = report.write_report(workdir)
    assert path == workdir / "report.html"
    return Page(path), results


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The report of a run that left nothing that it need not: neither names of classes nor splits in its manifest."""
    workdir = tmp_path_factory.mktemp("bare")
    results = write_run(workdir, classes=5, best=False, trained=False, modulated=False)
    for key in ("versions", "provenance", "train_seconds", "best"):
        del results[key]
    results["last"]["val"] = None
    results["last"]["test"]["per_class_accuracy"][4], results["last"]["test"]["per_class_images"][4] = None, 0
    (workdir / "results.json").write_text(json.dumps(results))
    manifest = json.loads((workdir / "manifest.json").read_text())
    manifest["class_counts"] = manifest.pop("splits")["train"]["class_counts"]
    del manifest["class_names"]
    (workdir / "manifest.json").write_text(json.dumps(manifest))
    (workdir / "gallery.npz").unlink()
    return Page(report.write_report(workdir))


def test_is_one_file_without_links_and_with_one_script(full):
    page, _ = full
    assert not re.search(r"https?://|@import|url\((?!#)", page.source, re.IGNORECASE)
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]
    (script,) = re.findall("<script>(.*)</script>", page.source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.source  # the browser runs no other
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object"), tag
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "data", "action"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:image/png;base64,")), (tag, name, target[:80])
    assert len(page.source) < 500_000


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
    sources = [results["last"]["test"], results["best"]["test"], results["last"]["val"], results["best"]["val"]]
    assert [cell.rsplit("epoch", 1)[1].strip() for cell in head[1:]] == ["10", "8", "10", "8"]
    assert len(rows) == len(report.SUMMARY_ROWS) + 1
    for (label, key), row in zip(report.SUMMARY_ROWS, rows, strict=False):
        assert row[0] == label
        for cell, source in zip(row[1:], sources, strict=True):
            value, _, reach = cell.partition("[")
            if source[key] is None:
                assert cell == "–"
                continue
            assert float(value) == pytest.approx(100 * source[key], abs=0.05 + 1e-9)
            if key in ("macro_f1", "roc_auc", "ece"):
                assert not reach
            else:
                low, high = map(float, reach.rstrip("]").split(","))
                assert low < float(value) < high
    assert float(rows[-1][1]) == pytest.approx(sources[0]["nll"], abs=0.0005 + 1e-9)
    few = next(row for row in rows if row[0].startswith("Few"))
    assert few[1:] == ["–"] * 4  # the rarest class has 50 images


def test_best_that_is_the_last_is_not_shown_twice(tmp_path):
    results = write_run(tmp_path, classes=3, trained=False, modulated=False)
    results["best"] = results["last"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = Page(report.write_report(tmp_path))
    assert [len(row) for row in page.tables[0]] == [3] * len(page.tables[0])
    assert "The last epoch is also the best on validation" in page.text["summary"]
    assert "best" not in page.text["per-class"]


def test_mistakes_are_named_with_their_pictures(full):
    page, results = full
    confusion = np.array(results["last"]["test"]["confusion"])
    _, worst, pairs, every = page.tables
    named = [row[1] for row in every[1:]]
    k = confusion.diagonal().argmin()
    assert worst[1][0].split("→")[0] == named[k]
    assert worst[1][1] == f"{confusion[k, k]} of 40"
    np.fill_diagonal(confusion, 0)
    i, j = np.unravel_index(confusion.argmax(), confusion.shape)
    assert (pairs[1][0], pairs[1][1]) == (f"{named[i]}→ {named[j]}", str(confusion.max()))
    alternatives = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert f"a picture of {named[9]}" in alternatives
    assert page.text["gallery"].index(named[8]) < page.text["gallery"].index(named[9])  # in the order of classes


def test_every_cell_of_the_confusion_matrix_tells_its_numbers(full):
    page, results = full
    confusion = np.array(results["last"]["test"]["confusion"])
    told = re.findall(r"<rect x=[^>]*><title>(.*?)</title>", page.source, re.DOTALL)
    assert len(told) == np.count_nonzero(confusion)
    assert f"猫 was right\n{100 * confusion[3, 3] / 40:.1f} %: {confusion[3, 3]} of 40 images" in told


def test_class_table_prints_counts_and_accuracies(full):
    page, results = full
    rows = page.tables[3][1:]
    assert len(rows) == 10
    for k, row in enumerate(rows):  # the classes of this run are already ordered from most to fewest images
        assert row[0] == str(k)
        assert row[3] == f"{int(5000 * 0.01 ** (k / 9)):,}"
        assert row[4] == "40"
        for cell, entry in zip(row[5:7], ("last", "best"), strict=True):
            expected = results[entry]["test"]["per_class_accuracy"][k]
            assert float(cell.partition("[")[0]) == pytest.approx(100 * expected, abs=0.051)
    assert rows[0][2] == "many"
    assert rows[-1][2] == "medium"


def test_names_are_data_not_markup(full):
    page, _ = full
    assert [row[1] for row in page.tables[3][1:5]] == STRANGE_NAMES
    assert "<b>" not in page.source
    assert "alert(1)" in page.text["config"]
    for name in STRANGE_NAMES:  # in the axis labels of both figures too
        assert name in page.text["classes"]
        assert name in page.text["confusion"]


def test_title_and_record(full):
    page, _ = full
    for fact in ("mfm on cifar10", "imbalance factor 100", "meta_held_out", "seed 3", "10 classes"):
        assert fact in page.text[None], fact
    facts = ("sha256:0123abcd", "jax 0.10.2", "version 3.0.2", "split seed 7", "2026-01-02", "0123abc", "1 x cpu")
    assert "devices" not in page.text["record"]  # the hardware has a line of its own
    for fact in facts:
        assert fact in page.text["record"], fact


def test_missing_pieces_are_left_out_with_a_sentence(bare):
    assert "No epoch was selected" in bare.text["summary"]
    assert "no learning curves" in bare.text["curves"]
    assert "recorded no modulation" in bare.text["modulation"]
    assert "warnings" not in bare.text
    assert "gallery" not in bare.text
    assert len(bare.figures()) == 3
    assert [len(row) for row in bare.tables[0]] == [2] * len(bare.tables[0])
    assert bare.tables[3][5][5] == "–"


def test_many_classes(tmp_path):
    write_run(tmp_path, classes=201, channels=300, images=5, best=False, trained=False)
    page = Page(report.write_report(tmp_path))
    assert len(page.tables) == 3
    assert "too many for a table" in page.text["per-class"]
    assert len(page.figures()) == 4
    assert len(page.source) < 1_000_000


@pytest.mark.parametrize("counts", [[7, 7, 7], [3, 1, 0]])
def test_odd_counts_are_drawn(tmp_path, counts):
    write_run(tmp_path, classes=3, trained=False)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["splits"]["train"]["class_counts"] = counts
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert len(Page(report.write_report(tmp_path)).figures()) == 4


def test_counts_at_the_top_and_no_class_names(bare):
    assert [row[1] for row in bare.tables[3][1:]] == ["0", "1", "2", "3", "4"]


def test_resumed_run_keeps_the_later_row_and_the_order_of_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written = [(1, 1.0), (2, 9.0), (3, 9.0), (2, 0.5)]
    rows = [{"kind": "train", "step": step, "loss": loss} for step, loss in written]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    read = [(row["step"], row["loss"]) for row in finished.rows(tmp_path)["train"]]
    assert read == [(1, 1.0), (2, 0.5), (3, 9.0)]


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "metrics.jsonl", "results.json"])
@pytest.mark.parametrize("content", [None, b"{", b"[1]", b"\xff\xfe"])
def test_missing_or_garbled_file_is_named(tmp_path, name, content):
    write_run(tmp_path, classes=3)
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
        ("manifest.json", lambda value: value["splits"]["train"]["class_counts"].append("many"), "class_counts"),
        ("manifest.json", lambda value: value["class_names"].pop(), "2 class names"),
    ],
)
def test_wrong_field_is_named(tmp_path, name, change, message):
    write_run(tmp_path, classes=3)
    value = json.loads((tmp_path / name).read_text())
    change(value)
    (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(UserError, match=rf"{re.escape(name)}.*{message}"):
        report.write_report(tmp_path)


@pytest.mark.parametrize(("site", "size", "modulated"), [("pooled", 1, True), ("logits", 2, False)])
def test_modulation_of_another_length_or_of_other_classes_is_refused(tmp_path, site, size, modulated):
    write_run(tmp_path, classes=3, modulated=modulated)
    sites = {site: {"gamma": [0.0] * size, "beta": [0.0] * size}}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "modulation", "step": 9000, "epoch": 1, "sites": sites}) + "\n")
    with pytest.raises(UserError, match=f"gamma at site '{site}'"):
        report.write_report(tmp_path)


def test_warnings_stand_before_the_summary(full):
    page, _ = full
    assert page.text["warnings"].split("\n")[-4:-2] == ["<a>; look at x", "<b>; look at x"]
    assert page.source.index('id="warnings"') < page.source.index('id="summary"')


def test_the_modulation_is_told_in_words(full):
    told = " ".join(full[0].text["modulation"].split())
    assert "The meta loss, on balanced images, went from 2." in told
    assert "an equal guess has 2.30." in told  # log 10
    assert "At logits, beta ended between -0.40 and 0.00: " in told
    assert "2 warnings, at the top." in told
    assert "logits: gamma" in told  # of pooled it is not zero


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
