"""One HTML page that shows a finished run, built from nothing but the files the run left in its workdir.

A long-tailed result is a trade between classes, so a page that prints one accuracy explains nothing. This one
puts side by side what a reader needs to judge a run: how many images each class had and how well it came out,
what the last epoch gave and what selection on validation would have given, where the confusions go, whether
the confidences can be trusted, how training went, and what the modulation learned.

The page is one file. It holds no script and no outside link, so it can be mailed, archived beside the
checkpoint and opened in ten years. Its figures are inline SVG: their ink is `currentColor` and their
background is transparent, so that the page's style sheet decides light or dark, and their words are real text
that the browser sets in its own font (class names in any script work) and the reader can search.

Everything from a file is data and may be strange: a class may be called `<b>` or `$x$`. The template escapes
by default, and figures are drawn with mathematical markup switched off.

The files, all in the workdir:

- `config.json`: the run's configuration, a nested object.
- `manifest.json`: the split, of `longtail.make_manifest`; its training counts a class are required.
- `metrics.jsonl`: one object a line, with `kind` (`train`, `val`, `modulation`) and `step`.
- `results.json`: `last` and `best`, each `{"step", "epoch", "test", "val"}`, the last two what
  `metrics.evaluate` returned.
"""

import dataclasses
import importlib.resources
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import markupsafe
import numpy as np

from mfm_jax import longtail
from mfm_jax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASH = "–"
# The summary's rows: label, key of `metrics.evaluate`.
SUMMARY_ROWS = (
    ("Overall accuracy", "accuracy"),
    ("Balanced accuracy", "balanced_accuracy"),
    ("Many-shot classes (> 100 images)", "many"),
    ("Medium-shot classes (20–100)", "medium"),
    ("Few-shot classes (< 20)", "few"),
    ("Head third of the classes", "head_third"),
    ("Middle third", "middle_third"),
    ("Rarest third", "rarest_third"),
    ("Macro F1", "macro_f1"),
    ("ROC AUC (one-vs-rest, macro)", "roc_auc"),
    ("Expected calibration error", "ece"),
)
TABLE_CLASSES = 200  # above this many classes the per-class table is left out
LABELLED_CLASSES = 30  # up to this many classes a figure names each of them
CELL_CLASSES = 12  # up to this many classes the confusion matrix prints its numbers
LINES = 20  # up to this many channels or classes the modulation is drawn as one line each
CURVE_POINTS = 400  # longer curves are averaged down to this many points

# Blue is the head and orange is the tail, in every figure; both are legible on white and on near-black.
GROUP_COLORS = {"many": "#3b7dd8", "medium": "#9a6bc9", "few": "#e8743b"}
MUTED = "#8a94a3"
# Drawn in this colour and written out as `currentColor`; black would also match what matplotlib leaves unset.
_INK = "#010203"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": MUTED,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


@dataclasses.dataclass(frozen=True)
class _Run:
    """The workdir's files, checked; `order` lists the classes from most to fewest training images."""

    config: dict[str, Any]
    manifest: dict[str, Any]
    results: dict[str, Any]
    rows: dict[str, list[dict[str, Any]]]
    counts: np.ndarray
    names: list[str]
    order: np.ndarray

    @property
    def test(self) -> dict[str, Any]:
        return self.results["last"]["test"]


@dataclasses.dataclass(frozen=True)
class _Picture:
    svg: markupsafe.Markup
    caption: str
    inches: float  # the width it was drawn for


def write_report(workdir: Path) -> Path:
    """Writes `workdir/report.html` and returns its path.

    Reads `config.json`, `manifest.json`, `metrics.jsonl` and `results.json` (see the module's docstring) and
    nothing else: no device, no data set and no checkpoint is needed. Pieces a run need not have (validation
    rows, a best checkpoint, a modulation) are replaced by a sentence. Fractions are printed in percent.

    Raises:
      UserError: a file is missing, is not the JSON it should be, or lacks a field; the message names
        the file.
    """
    workdir = Path(workdir)
    page = _template().render(**_content(_read(workdir)))
    path = workdir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _template() -> jinja2.Template:
    # An undefined field prints as nothing and counts as false: which fields are required, `_read` decides.
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = _percent
    environment.filters["number"] = _number
    source = importlib.resources.files("mfm_jax").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source)


def _content(run: _Run) -> dict[str, Any]:
    """What the template shows: plain values and finished figures, no decisions left but layout."""
    best = run.results.get("best")
    evaluations = [("Test, last epoch", run.results["last"], "test")]
    if best:
        evaluations.append(("Test, best on validation", best, "test"))
    evaluations += [
        (f"Validation, {title}", source, "val")
        for title, source in (("last epoch", run.results["last"]), ("best", best))
        if source and source.get("val")
    ]
    return {
        "manifest": run.manifest,
        "results": run.results,
        "best": best,
        "columns": [(title, source.get("epoch"), source[split]) for title, source, split in evaluations],
        "summary_rows": SUMMARY_ROWS,
        "tiles": [(SUMMARY_ROWS[i][0], run.test.get(SUMMARY_ROWS[i][1])) for i in (1, 0, 7, 10)],
        "pictures": _pictures(run),
        "class_rows": _class_rows(run) if len(run.counts) <= TABLE_CLASSES else [],
        "num_classes": len(run.counts),
        "num_train": int(run.counts.sum()),
        "config": json.dumps(run.config, indent=2, ensure_ascii=False),
    }


def _pictures(run: _Run) -> dict[str, _Picture | None]:
    """Every figure by name; None where the run has nothing to draw it from."""
    sites = _modulation(run)
    # The names of the classes, where they are written out, take room.
    side = 7.0 if CELL_CLASSES < len(run.counts) <= LABELLED_CLASSES else 4.3
    trained = run.rows["train"] or run.rows["val"]
    return {
        "classes": _picture(_draw_classes, run, (9.0, 4.8)),
        "curves": _picture(_draw_curves, run, (9.0, 3.4)) if trained else None,
        "confusion": _picture(_draw_confusion, run, (side + 0.3, side - 0.1)),
        "reliability": _picture(_draw_reliability, run, (4.6, 4.3)),
        "modulation": _picture(_draw_modulation, sites, (9.0, 0.6 + 2.3 * len(sites))) if sites else None,
    }


# --- reading ------------------------------------------------------------------------------------------------


def _read(workdir: Path) -> _Run:
    config = _read_object(workdir / "config.json")
    manifest = _read_object(workdir / "manifest.json", "dataset")
    results = _read_object(workdir / "results.json", "method")
    counts = _counts(manifest, workdir / "manifest.json")
    names = [str(name) for name in manifest.get("class_names") or range(len(counts))]
    if len(names) != len(counts):
        raise UserError(f"{workdir / 'manifest.json'}: {len(counts)} class counts but {len(names)} class names")
    for title in ("last", "best"):
        if title == "last" or results.get("best") is not None:
            _check_evaluation(results.get(title), len(counts), f"{workdir / 'results.json'}: {title}.test")
    order = np.argsort(-counts, kind="stable")
    rows = _read_rows(workdir / "metrics.jsonl")
    return _Run(config=config, manifest=manifest, results=results, rows=rows, counts=counts, names=names, order=order)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the report is built from a workdir whose run has finished") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a JSON object, not {type(value).__name__}")
    return value


def _read_object(path: Path, *required: str) -> dict[str, Any]:
    value = _object(_read_text(path), str(path))
    for key in required:
        if key not in value:
            raise UserError(f"{path}: no field '{key}'")
    return value


def _read_rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each kind, in the order of their steps.

    A run that was stopped and resumed writes the steps after its last checkpoint twice; the later row counts.
    """
    kinds: dict[str, dict[float, dict[str, Any]]] = {"train": {}, "val": {}, "modulation": {}}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        row = _object(line, f"{path}: line {number}")
        if not isinstance(row.get("step"), int | float):
            raise UserError(f"{path}: line {number}: no number in field 'step'")
        kinds.setdefault(str(row.get("kind")), {})[row["step"]] = row
    return {kind: [rows[step] for step in sorted(rows)] for kind, rows in kinds.items()}


def _counts(manifest: dict[str, Any], path: Path) -> np.ndarray:
    """The training images a class: of the split `train`, or at the top of a manifest without splits."""
    train = (manifest.get("splits") or {}).get("train") or manifest
    counts: Any = train.get("class_counts", train.get("counts"))
    valid = isinstance(counts, list) and all(isinstance(n, int) and n >= 0 for n in counts)
    if not valid or len(counts) < 2 or not any(counts):
        raise UserError(f"{path}: 'class_counts' of the training split must list the images of each class")
    return np.array(counts, np.int64)


def _check_evaluation(entry: Any, classes: int, where: str) -> None:
    """Refuses an evaluation without the lists the figures are drawn from, or of another number of classes."""
    test = entry.get("test") if isinstance(entry, dict) else None
    if not isinstance(test, dict):
        raise UserError(f"{where}: missing; write it with mfm_jax.metrics.evaluate")
    for key in ("per_class_accuracy", "confusion", "reliability", "ece"):
        if key not in test:
            raise UserError(f"{where}: no field '{key}'")
    lengths = {len(row) for row in (test["confusion"], test["per_class_accuracy"], *test["confusion"])}
    if lengths != {classes}:
        raise UserError(f"{where}: is not of the {classes} classes of manifest.json")


def _modulation(run: _Run) -> dict[str, dict[str, np.ndarray]]:
    """By site, `step` [T] and `gamma`, `beta` [T, C or K]; what no row has is left out."""
    sites: dict[str, dict[str, np.ndarray]] = {}
    rows = run.rows["modulation"]
    for site in dict.fromkeys(site for row in rows for site in row.get("sites", {})):
        having = [row for row in rows if site in row.get("sites", {})]
        values = {"step": np.array([row["step"] for row in having])}
        for parameter in ("gamma", "beta"):
            history = [np.ravel(row["sites"][site].get(parameter) or []) for row in having]
            # A row of another length belongs to another architecture: an old run's file was continued.
            if len({len(entry) for entry in history}) != 1:
                raise UserError(f"metrics.jsonl: the length of {parameter} at site '{site}' changes between rows")
            if len(history[0]):
                values[parameter] = np.array(history, np.float64)
        sites[site] = values
    return sites


# --- tables -------------------------------------------------------------------------------------------------


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.2f}"


def _number(value: float | None, digits: int = 3) -> str:
    return DASH if value is None else f"{value:,.{digits}f}"


def _class_rows(run: _Run) -> list[dict[str, Any]]:
    """One row a class, from most to fewest training images."""
    group_of = _group_of(run)
    tested = np.sum(run.test["confusion"], axis=1)
    best = run.results.get("best")
    return [
        {
            "index": int(k),
            "name": run.names[k],
            "group": group_of[k],
            "train": int(run.counts[k]),
            "test": int(tested[k]),
            "last": run.test["per_class_accuracy"][k],
            "best": best["test"]["per_class_accuracy"][k] if best else None,
        }
        for k in run.order
    ]


def _group_of(run: _Run) -> list[str]:
    groups = longtail.shot_groups(run.counts)
    name_of = {int(k): name for name in GROUP_COLORS for k in groups[name]}
    return [name_of[k] for k in range(len(run.counts))]


# --- figures ------------------------------------------------------------------------------------------------


def _picture(draw: Callable[["Figure", Any], str], what: Any, inches: tuple[float, float]) -> _Picture:
    """Draws on a figure of its own, without pyplot and its global state, and returns it as inline SVG.

    `draw(figure, what)` returns the caption, which is also what a screen reader says in the figure's place.
    """
    import matplotlib  # here, because it takes longer to import than the rest of the package's command line
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    # The salt makes the ids inside the SVG the same on every run, and different from figure to figure.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": draw.__name__}), warnings.catch_warnings():
        # The browser brings the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=inches, layout="constrained")
        caption = draw(figure, what)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing, dpi=200)
    return _Picture(_inline(buffer.getvalue(), caption), caption, inches[0])


def _inline(svg: str, alt: str) -> markupsafe.Markup:
    """Turns matplotlib's SVG file into an HTML element that takes its colour and width from the page."""
    svg = svg[svg.index("<svg") :]
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    # Group names (`axes_1`) repeat from figure to figure; only definitions, whose ids are hashes, are used.
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace(_INK, "currentColor")
    start = markupsafe.Markup('<svg role="img" {} aria-label="{}">')
    return start.format(markupsafe.Markup(box.group()), alt) + markupsafe.Markup(body)


def _draw_classes(figure: "Figure", run: _Run) -> str:
    top, bottom = figure.subplots(2, 1, sharex=True)
    place = np.arange(len(run.counts))
    counts = run.counts[run.order]
    accuracy = _as_percent(run.test["per_class_accuracy"])[run.order]
    groups = np.array(_group_of(run))[run.order]
    many = len(counts) > TABLE_CLASSES
    for name, color in GROUP_COLORS.items():
        here = groups == name
        if here.any():
            label = f"{name}-shot ({here.sum()} classes)"
            width = 1.0 if many else 0.8
            top.bar(place[here], counts[here], width=width, color=color, label=label, rasterized=many)
            bottom.vlines(place[here], 0, accuracy[here], color=color, alpha=0.3, rasterized=many)
            bottom.plot(place[here], accuracy[here], "o", color=color, markersize=3 if many else 5, rasterized=many)
    above: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
    top.set_yscale("log")
    # Bars on a log scale need a floor; this one leaves the rarest class a visible bar.
    top.set_ylim(counts[counts > 0].min() / 3, counts.max() * 1.5)
    top.yaxis.set_major_formatter("{x:,.0f}")
    top.yaxis.set_minor_formatter("")
    top.set_title("Training images (log scale)")
    top.legend(**above, ncols=3)
    bottom.axhline(np.nanmean(accuracy), color=MUTED, linestyle="--", linewidth=1.2, label="balanced accuracy")
    bottom.set_ylim(-4, 104)
    bottom.set_title("Test accuracy, last epoch (%)")
    bottom.legend(**above)
    bottom.set_xlim(-0.8, len(counts) - 0.2)
    bottom.set_xlabel("class, from most to fewest training images")
    top.grid(axis="x", visible=False)
    bottom.grid(axis="x", visible=False)
    if len(counts) <= LABELLED_CLASSES:
        _name_ticks(bottom, "x", [run.names[k] for k in run.order])
    head, rare = (_percent(run.test.get(key)) for key in ("head_third", "rarest_third"))
    return (
        f"Training images per class, from {counts[0]:,} down to {counts[-1]:,}, above the test accuracy of"
        f" each class at the last epoch: {head} % over the head third, {rare} % over the rarest third."
    )


def _draw_curves(figure: "Figure", run: _Run) -> str:
    loss, accuracy = figure.subplots(1, 2)
    blue, purple, orange = GROUP_COLORS.values()
    _curve(loss, run.rows["train"], "loss", "training", MUTED)
    _curve(loss, run.rows["train"], "meta_loss", "meta (balanced)", orange)
    _curve(loss, run.rows["val"], "nll", "validation (nll)", blue)
    loss.set_ylim(bottom=0)
    loss.set_title("Loss")
    _curve(accuracy, run.rows["train"], "accuracy", "training batches", MUTED, scale=100)
    _curve(accuracy, run.rows["val"], "balanced_accuracy", "validation, balanced", blue, scale=100)
    accuracy.set_ylim(0, 100)
    accuracy.set_title("Accuracy (%)")
    best = run.results.get("best")
    if best and best.get("step") is not None:
        accuracy.axvline(best["step"], color=purple, linestyle=":", label="best on validation")
    for axes in (loss, accuracy):
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if axes.lines:
            axes.legend()
    return (
        "Loss (left) and accuracy (right) over training. Training curves are of the batches as the method"
        " draws and modulates them, so head classes may dominate; validation is of the plain classifier."
    )


def _curve(axes: "Axes", rows: list[dict[str, Any]], key: str, label: str, color: str, scale: float = 1.0) -> None:
    """Plots a column of the rows that have it; a long one as means of equal runs of rows."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    if not points:
        return
    steps, values = np.array(points, np.float64).T
    if len(steps) > CURVE_POINTS:
        starts = np.linspace(0, len(steps), CURVE_POINTS, endpoint=False).astype(int)
        sizes = np.diff(starts, append=len(steps))
        steps, values = np.add.reduceat(steps, starts) / sizes, np.add.reduceat(values, starts) / sizes
    axes.plot(steps, scale * values, color=color, label=label, marker="o" if len(steps) == 1 else None)


def _draw_confusion(figure: "Figure", run: _Run) -> str:
    confusion = np.array(run.test["confusion"], np.float64)[np.ix_(run.order, run.order)]
    total = confusion.sum(axis=1, keepdims=True)
    share = 100 * np.divide(confusion, total, out=np.full_like(confusion, np.nan), where=total > 0)
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    axes.grid(visible=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    figure.colorbar(image, ax=axes, label="% of the true class", fraction=0.046, pad=0.03).outline.set_visible(False)
    if len(share) <= LABELLED_CLASSES:
        names = [run.names[k] for k in run.order]
        _name_ticks(axes, "x", names)
        _name_ticks(axes, "y", names)
    for (i, j), value in np.ndenumerate(share):
        # What would print as zero is left blank; so is a class without test images (NaN).
        if len(share) <= CELL_CLASSES and value >= 0.5:
            color = "white" if value > 55 else "#1b2733"
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=color)
    return (
        "Confusion matrix of the test set at the last epoch. Each row is a true class and sums to 100 %."
        " Classes run from most to fewest training images; left of the diagonal, a larger class was named."
    )


def _draw_reliability(figure: "Figure", run: _Run) -> str:
    bins = [one for one in run.test["reliability"] if one["count"]]
    accuracy, share = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    left = 100 * np.array([one["lower"] for one in bins])
    right = 100 * np.array([one["upper"] for one in bins])
    blue, _, orange = GROUP_COLORS.values()
    bars: dict[str, Any] = {"width": 0.92 * (right - left), "align": "edge"}
    accuracy.bar(left, _as_percent([one["accuracy"] for one in bins]), color=blue, label="accuracy", **bars)
    wanted = _as_percent([one["confidence"] for one in bins])
    accuracy.hlines(wanted, left, right, color=orange, linewidth=2.5, label="mean confidence")
    accuracy.plot([0, 100], [0, 100], color=MUTED, linestyle="--", linewidth=1.2, label="perfectly calibrated")
    accuracy.set_ylim(0, 102)
    accuracy.set_title("Accuracy by confidence (%)")
    figure.legend(loc="outside upper left", ncols=3, columnspacing=1.2, handlelength=1.4)
    count = np.array([one["count"] for one in bins])
    share.bar(left, 100 * count / count.sum(), color=MUTED, **bars)
    share.set_title("Share of the images (%)")
    share.set_xlabel("confidence (%)")
    share.set_xlim(0, 100)
    ece = _percent(run.test["ece"])
    return (
        f"Reliability of the test confidences at the last epoch: ECE {ece} %. A bar that ends"
        " below its mean confidence is over-confident; the lower panel shows how many images each bin holds."
    )


def _draw_modulation(figure: "Figure", sites: dict[str, dict[str, np.ndarray]]) -> str:
    grid = figure.subplots(len(sites), 2, squeeze=False, sharex=True)
    for panels, (site, values) in zip(grid, sites.items(), strict=True):
        for axes, parameter in zip(panels, ("gamma", "beta"), strict=True):
            axes.set_title(f"{site}: {parameter}")
            axes.axhline(0, color=MUTED, linewidth=0.8)
            axes.xaxis.set_major_formatter("{x:,.0f}")
            if parameter in values:
                _history(axes, values["step"], values[parameter])
    for axes in grid[-1]:
        axes.set_xlabel("step")
    return (
        f"The modulation over training, by site ({', '.join(sites)}): scale gamma (left; features are"
        " multiplied by 1 + gamma) and shift beta (right). Zero is the identity. Up to 20 entries are"
        " lines, from the first (blue) to the last (orange); more are a median with bands of 50 % and 90 %."
    )


def _history(axes: "Axes", steps: np.ndarray, values: np.ndarray) -> None:
    """Draws values [T, C] over steps [T]: C lines, or quantiles over C where lines would be a thicket."""
    marker = "o" if len(steps) == 1 else None
    if values.shape[1] <= LINES:
        for column, color in zip(values.T, _ramp(values.shape[1]), strict=True):
            axes.plot(steps, column, color=color, linewidth=1.2, marker=marker)
        return
    low, lower, middle, upper, high = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95), axis=1)
    blue = GROUP_COLORS["many"]
    axes.fill_between(steps, low, high, color=blue, alpha=0.18, linewidth=0)
    axes.fill_between(steps, lower, upper, color=blue, alpha=0.35, linewidth=0)
    axes.plot(steps, middle, color=blue, marker=marker)


def _ramp(number: int) -> list[tuple[float, ...]]:
    """Colours from blue (the first) over purple to orange (the last)."""
    stops = np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in GROUP_COLORS.values()])
    at = np.linspace(0, len(stops) - 1, number)
    return [tuple(np.interp(x, range(len(stops)), stops[:, c]) for c in range(3)) for x in at]


def _as_percent(values: Iterable[float | None]) -> np.ndarray:
    """Fractions as percent, with NaN (which figures leave blank) for None."""
    return np.array([math.nan if value is None else 100 * value for value in values])


def _name_ticks(axes: "Axes", axis: str, names: list[str]) -> None:
    short = [name if len(name) <= 18 else name[:17] + "…" for name in names]
    if axis == "x":
        axes.set_xticks(range(len(short)), short)
        if len(short) > 6 or max(map(len, short)) > 10:
            axes.tick_params(axis="x", labelrotation=90 if len(short) > 14 else 40)
            for label in axes.get_xticklabels():
                label.set_horizontalalignment("center" if len(short) > 14 else "right")
                label.set_rotation_mode("anchor" if len(short) <= 14 else "default")
    else:
        axes.set_yticks(range(len(short)), short)
