"""The figures of the report: drawn with matplotlib, returned as SVG to be set inline in an HTML page.

Their ink is `currentColor` and their background is transparent, so that the page's style sheet decides light or
dark, and their words are real text that the browser sets in its own font (class names in any script work) and the
reader can search. Names are drawn with mathematical markup switched off: a class may be called `$x$`.

Each `draw_*` function draws on the figure it is given and returns the caption; `render` makes the picture.
"""

import dataclasses
import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import markupsafe
import numpy as np

from mfm_jax.finished import Classes
from mfm_jax.gallery import Gallery

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

LABELLED_CLASSES = 30  # up to this many classes a figure names each of them
CELL_CLASSES = 12  # up to this many classes the confusion matrix prints its numbers
_WIDE_CLASSES = 200  # above this many classes bars touch
_LINES = 20  # up to this many channels or classes the modulation is drawn as one line each
_NAMED_POINTS = 8  # up to so many methods have their names at their points
_GALLERY_COLUMNS = 8
_CURVE_POINTS = 400  # longer curves are averaged down to this many points

# Blue is the head and orange is the tail, in every figure; both are legible on white and on near-black.
GROUP_COLORS = {"many": "#3b7dd8", "medium": "#9a6bc9", "few": "#e8743b"}
_BLUE, _PURPLE, _ORANGE = GROUP_COLORS.values()
_MUTED = "#8a94a3"
# Drawn in this colour and written out as `currentColor`; black would also match what matplotlib leaves unset.
INK = "#010203"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _MUTED,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}

Rows = Sequence[dict[str, Any]]


class Picture(NamedTuple):
    """A finished figure: an `<svg>` element, its caption, and the width in inches it was drawn for."""

    svg: markupsafe.Markup
    caption: str
    inches: float


def render(draw: Callable[..., str], inches: tuple[float, float], *what: Any) -> Picture:
    """Calls `draw(figure, *what)` on a new figure and returns it as inline SVG.

    `draw` returns the caption, which is also what a screen reader says in the figure's place. Pyplot and its global
    state are not touched.
    """
    import matplotlib  # here, because it takes longer to import than the rest of the package's command line
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    # The salt makes the ids inside the SVG the same on every run, and different from figure to figure.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": draw.__name__}), warnings.catch_warnings():
        # The browser brings the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=inches, layout="constrained")
        caption = draw(figure, *what)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing, dpi=200)
    return Picture(_inline(buffer.getvalue(), caption), caption, inches[0])


def _inline(svg: str, alt: str) -> markupsafe.Markup:
    """Turns matplotlib's SVG file into an HTML element that takes its colour and width from the page."""
    head, body = svg[svg.index("<svg") :].split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    # Group names (`axes_1`) repeat from figure to figure; only definitions, whose ids are hashes, are used.
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace(INK, "currentColor")
    start = markupsafe.Markup('<svg role="img" {} aria-label="{}">')
    return start.format(markupsafe.Markup(box.group()), alt) + markupsafe.Markup(body)


def percent(value: float | None) -> str:
    """Returns a fraction as percent with two decimals; a dash for None."""
    return "–" if value is None else f"{100 * value:.2f}"


def draw_classes(figure: "Figure", classes: Classes, found: dict[str, Any]) -> str:
    """Training images of each class above its accuracy; `found` is what `metrics.evaluate` returned."""
    top, bottom = figure.subplots(2, 1, sharex=True)
    place = np.arange(len(classes.counts))
    counts = classes.counts[classes.order]
    accuracy = _as_percent(found["per_class_accuracy"])[classes.order]
    groups = np.array(classes.groups)[classes.order]
    many = len(counts) > _WIDE_CLASSES
    for name, color in GROUP_COLORS.items():
        here = groups == name
        if here.any():
            label = f"{name}-shot ({here.sum()} {'class' if here.sum() == 1 else 'classes'})"
            width = 1.0 if many else 0.8
            top.bar(place[here], counts[here], width=width, color=color, label=label, rasterized=many)
            bottom.vlines(place[here], 0, accuracy[here], color=color, alpha=0.3, rasterized=many)
            bottom.plot(place[here], accuracy[here], "o", color=color, markersize=3 if many else 5, rasterized=many)
    above: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
    top.set_yscale("log")
    # Bars on a log scale need a floor; this one leaves the rarest class a visible bar.
    top.set_ylim(counts[counts > 0].min() / 3, counts.max() * 1.5)
    _plain_logs(top.yaxis)
    top.yaxis.set_major_formatter("{x:,.0f}")
    top.set_title("Training images (log scale)")
    top.legend(**above, ncols=3)
    bottom.axhline(np.nanmean(accuracy), color=_MUTED, linestyle="--", linewidth=1.2, label="balanced accuracy")
    bottom.set_ylim(-4, 104)
    bottom.set_title("Accuracy, last epoch (%)")
    bottom.legend(**above)
    bottom.set_xlim(-0.8, len(counts) - 0.2)
    bottom.set_xlabel("class, from most to fewest training images")
    top.grid(axis="x", visible=False)
    bottom.grid(axis="x", visible=False)
    if len(counts) <= LABELLED_CLASSES:
        _name_ticks(bottom, classes)
    return (
        f"Training images per class, from {counts[0]:,} down to {counts[-1]:,}, above the accuracy of each class"
        f" at the last epoch: {percent(found.get('head_third'))} % over the head third,"
        f" {percent(found.get('rarest_third'))} % over the rarest third."
    )


def draw_curves(figure: "Figure", train: Rows, val: Rows, best_step: int | None) -> str:
    """Loss and accuracy over steps, from the metric rows of kind `train` and `val`."""
    loss, accuracy = figure.subplots(1, 2)
    _curve(loss, train, "loss", "training", _MUTED)
    _curve(loss, train, "meta_loss", "meta (balanced)", _ORANGE)
    _curve(loss, val, "nll", "validation (nll)", _BLUE)
    loss.set_ylim(bottom=0)
    loss.set_title("Loss")
    _curve(accuracy, train, "accuracy", "training batches", _MUTED, scale=100)
    _curve(accuracy, val, "balanced_accuracy", "validation, balanced", _BLUE, scale=100)
    accuracy.set_ylim(0, 100)
    accuracy.set_title("Accuracy (%)")
    if best_step is not None:
        accuracy.axvline(best_step, color=_PURPLE, linestyle=":", label="best on validation")
    for axes in (loss, accuracy):
        _along_steps(axes)
        if axes.lines:
            axes.legend()
    return (
        "Loss (left) and accuracy (right) over training. Training curves are of the batches as the method"
        " draws and modulates them, so head classes may dominate; validation is of the plain classifier."
    )


def _along_steps(axes: "Axes") -> None:
    """Labels the x axis as steps, which are whole."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _plain_logs(axis: "Axis") -> None:
    """Writes the numbers of a log axis without TeX, those between powers of ten too where it spans few of them."""
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter())


def _curve(axes: "Axes", rows: Rows, key: str, label: str, color: str, scale: float = 1.0) -> None:
    """Plots a column of the rows that have it; a long one as means of equal runs of rows."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    if not points:
        return
    steps, values = np.array(points, np.float64).T
    if len(steps) > _CURVE_POINTS:
        starts = np.linspace(0, len(steps), _CURVE_POINTS, endpoint=False).astype(int)
        sizes = np.diff(starts, append=len(steps))
        steps, values = np.add.reduceat(steps, starts) / sizes, np.add.reduceat(values, starts) / sizes
    axes.plot(steps, scale * values, color=color, label=label, marker="o" if len(steps) == 1 else None)


def draw_confusion(figure: "Figure", classes: Classes, found: dict[str, Any]) -> str:
    """Confusion matrix, a row in percent of its true class."""
    confusion = np.array(found["confusion"], np.float64)[np.ix_(classes.order, classes.order)]
    total = confusion.sum(axis=1, keepdims=True)
    share = 100 * np.divide(confusion, total, out=np.full_like(confusion, np.nan), where=total > 0)
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    axes.grid(visible=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    figure.colorbar(image, ax=axes, label="% of the true class", fraction=0.046, pad=0.03).outline.set_visible(False)
    if len(share) <= LABELLED_CLASSES:
        _name_ticks(axes, classes)
        axes.set_yticks(range(len(share)), [_short(classes.names[k]) for k in classes.order])
    for (i, j), value in np.ndenumerate(share):
        # What would print as zero is left blank; so is a class without images (NaN).
        if len(share) <= CELL_CLASSES and value >= 0.5:
            color = "white" if value > 55 else "#1b2733"
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=color)
    return (
        "Confusion matrix at the last epoch. Each row is a true class and sums to 100 %."
        " Classes run from most to fewest training images; left of the diagonal, a larger class was named."
    )


def draw_reliability(figure: "Figure", found: dict[str, Any]) -> str:
    """Accuracy against confidence, from the bins of `metrics.reliability_bins`."""
    bins = [one for one in found["reliability"] if one["count"]]
    accuracy, share = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    left = 100 * np.array([one["lower"] for one in bins])
    right = 100 * np.array([one["upper"] for one in bins])
    bars: dict[str, Any] = {"width": 0.92 * (right - left), "align": "edge"}
    accuracy.bar(left, _as_percent(one["accuracy"] for one in bins), color=_BLUE, label="accuracy", **bars)
    wanted = _as_percent(one["confidence"] for one in bins)
    accuracy.hlines(wanted, left, right, color=_ORANGE, linewidth=2.5, label="mean confidence")
    accuracy.plot([0, 100], [0, 100], color=_MUTED, linestyle="--", linewidth=1.2, label="perfectly calibrated")
    accuracy.set_ylim(0, 102)
    accuracy.set_title("Accuracy by confidence (%)")
    figure.legend(loc="outside upper left", ncols=3, columnspacing=1.2, handlelength=1.4)
    count = np.array([one["count"] for one in bins])
    share.bar(left, 100 * count / count.sum(), color=_MUTED, **bars)
    share.set_title("Share of the images (%)")
    share.set_xlabel("confidence (%)")
    share.set_xlim(0, 100)
    return (
        f"Reliability of the confidences at the last epoch: ECE {percent(found['ece'])} %. A bar that ends"
        " below its mean confidence is over-confident; the lower panel shows how many images each bin holds."
    )


def draw_modulation(figure: "Figure", classes: Classes, sites: dict[str, dict[str, np.ndarray]]) -> str:
    """Gamma and beta over training; `sites` holds by site `step` [T], and `gamma` and `beta` [T, C].

    At `logits` an entry belongs to a class: it has the colour of its training count and, as far as there is room, a
    name. Elsewhere it belongs to a channel, and channels have no order.
    """
    grid = figure.subplots(len(sites), 2, squeeze=False, sharex=True)
    for panels, (site, values) in zip(grid, sites.items(), strict=True):
        named: tuple = ()
        for axes, parameter in zip(panels, ("gamma", "beta"), strict=True):
            axes.set_title(f"{site}: {parameter}")
            axes.axhline(0, color=_MUTED, linewidth=0.8)
            if parameter not in values:
                continue
            if site == "logits":
                named = _class_lines(axes, values["step"], values[parameter], classes)
            else:
                _channels(axes, values["step"], values[parameter])
        if named:
            panels[1].legend(*named, loc="upper left", bbox_to_anchor=(1.0, 1.05), fontsize=7, labelspacing=0.25)
    for axes in grid[-1]:  # the others share its ticks
        _along_steps(axes)
    at_logits = "At logits a line is a class, from the most training images (blue) to the fewest (orange)."
    elsewhere = f"Elsewhere up to {_LINES} channels are a line each, more a median with bands of 50 % and 90 %."
    entries = [at_logits] * ("logits" in sites) + [elsewhere] * bool(sites.keys() - {"logits"})
    return (
        f"The modulation over training, by site ({', '.join(sites)}): scale gamma (left; features are multiplied by"
        f" 1 + gamma) and shift beta (right). Zero is the identity. {' '.join(entries)}"
    )


def draw_meta_gradient(figure: "Figure", train: Rows) -> str:
    """Norm of the meta-gradient over steps, and its agreement with its own past; rows of kind `train`."""
    norm, agreement = figure.subplots(1, 2)
    _curve(norm, train, "hypergrad_norm", "norm", _ORANGE)
    norm.set_yscale("log")
    _plain_logs(norm.yaxis)
    norm.set_title("Norm of the meta-gradient (log scale)")
    _curve(agreement, train, "hypergrad_agreement", "cosine", _BLUE)
    agreement.axhline(0, color=_MUTED, linewidth=0.8)
    agreement.set_ylim(-1, 1)
    agreement.set_title("Cosine with its running mean")
    for axes in (norm, agreement):
        _along_steps(axes)
    return (
        "The meta-gradient, means over each epoch: its norm, and the cosine between each meta-step's and Adam's running"
        " mean of those before it. Near 1 they pull one way; around 0 they are noise, and Adam turns noise into drift."
    )


def draw_gallery(figure: "Figure", classes: Classes, gallery: Gallery) -> str:
    """Pictures of rare classes with their right answers above, their wrong ones below."""
    right = gallery.answers == gallery.labels
    rows = [np.flatnonzero(right), np.flatnonzero(~right)]
    lines = [-(-len(row) // _GALLERY_COLUMNS) for row in rows]
    grid = figure.subplots(max(sum(lines), 1), _GALLERY_COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for first, row in zip((0, lines[0]), rows, strict=True):
        for axes, i in zip(grid[first:].flat, row, strict=False):
            image, answer = gallery.images[i], classes.names[gallery.answers[i]]
            axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
            title = [_wrapped(classes.names[gallery.labels[i]])]
            if not right[i]:
                title.append(f"→ {_wrapped(answer)}")
            axes.set_title("\n".join([*title, f"{100 * gallery.confidence[i]:.0f} %"]), fontsize=5.5, loc="center")
    return (
        "Pictures of the classes with the fewest training images, most confident first, at most two of a class:"
        f" {len(rows[0])} that were right, then {len(rows[1])} that were wrong, with what was answered (→)."
    )


def gallery_inches(gallery: Gallery) -> tuple[float, float]:
    """Returns the size to draw a gallery at."""
    right = int((gallery.answers == gallery.labels).sum())
    lines = [-(-count // _GALLERY_COLUMNS) for count in (right, len(gallery.labels) - right)]
    return 9.0, 1.55 * lines[0] + 1.7 * lines[1]


def _wrapped(name: str, width: int = 20) -> str:
    """Returns a class name in lines of at most `width` letters."""
    return "\n".join(textwrap.wrap(name.replace("_", " "), width)) or name


@dataclasses.dataclass(frozen=True)
class Compared:
    """One method's numbers in a comparison, as fractions, means over seeds.

    balanced, spread: balanced accuracy and its standard deviation (0 for one seed).
    cost: training time as a multiple of the baseline's; None where that is not known.
    head, rarest: accuracy over the head third and the rarest third of the classes.
    per_class: accuracy of each class, K floats or None.
    """

    name: str
    balanced: float
    spread: float
    cost: float | None
    head: float | None
    rarest: float | None
    per_class: list[float | None]


def draw_cost(figure: "Figure", methods: Sequence[Compared]) -> str:
    """Balanced accuracy against training time, a point a method."""
    axes = figure.subplots()
    for number, one in enumerate(methods):
        if one.cost is None:
            continue
        point = (one.cost, 100 * one.balanced)
        axes.errorbar(*point, yerr=100 * one.spread, linewidth=1, **_method_style(number), label=one.name)
        _name_point(axes, point, number, methods)
    axes.margins(x=0.15)
    _name_points_beside(figure, methods)
    axes.set_xlabel("training time, multiple of the baseline's")
    axes.set_ylabel("balanced accuracy (%)")
    return (
        "Balanced accuracy at the last epoch against training time, the median over seeds as a multiple of"
        f" {methods[0].name}'s; bars are one standard deviation over seeds."
        " Time includes compilation, which a cache may have spared; runs side by side slow each other down."
    )


def draw_class_accuracies(figure: "Figure", classes: Classes, methods: Sequence[Compared]) -> str:
    """Accuracy of each class against its training images, a line a method."""
    axes = figure.subplots()
    counts = classes.counts[classes.order]
    for number, one in enumerate(methods):
        accuracy = _as_percent(one.per_class)[classes.order]
        style = _method_style(number) | ({"markersize": 4} if len(counts) <= LABELLED_CLASSES else {"marker": None})
        axes.plot(counts, accuracy, linewidth=2.4 if number == 0 else 1.2, label=one.name, **style)
    axes.set_xscale("log")
    axes.invert_xaxis()
    _plain_logs(axes.xaxis)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(-4, 104)
    axes.set_xlabel("training images of the class (log scale)")
    axes.set_ylabel("accuracy (%)")
    figure.legend(loc="outside right upper", fontsize=8)
    return "Accuracy of each class at the last epoch, mean over seeds, from the most training images to the fewest."


def draw_trade_off(figure: "Figure", methods: Sequence[Compared]) -> str:
    """Accuracy over the rarest third of the classes against the head third, a point a method."""
    axes = figure.subplots()
    for number, one in enumerate(methods):
        if one.head is not None and one.rarest is not None:
            point = (100 * one.head, 100 * one.rarest)
            axes.plot(*point, linestyle="", **_method_style(number), label=one.name)
            _name_point(axes, point, number, methods)
    axes.margins(0.15)
    _name_points_beside(figure, methods)
    axes.set_xlabel("head third of the classes (%)")
    axes.set_ylabel("rarest third of the classes (%)")
    return (
        "What the tail gains and the head pays: accuracy over the rarest third of the classes against the head"
        " third, last epoch, mean over seeds. Up and to the right is better for both."
    )


def _method_style(number: int) -> dict[str, Any]:
    """Returns the colour and marker of a method by its place: grey for the baseline, then a pair for each."""
    if number == 0:
        return {"color": _MUTED, "marker": "o", "markersize": 6}
    import matplotlib

    row, column = divmod(number - 1, 9)
    # Of the ten colours the eighth is a grey.
    color = matplotlib.colormaps["tab10"](column + (column >= 7))
    return {"color": color, "marker": "osD^vP"[row % 6], "markersize": 6}


def _name_point(axes: "Axes", point: tuple[float, float], number: int, methods: Sequence[Compared]) -> None:
    """Writes a method's name at its point, where there are few."""
    if len(methods) <= _NAMED_POINTS:
        name, offset = methods[number].name, (5, 4 - 7 * (number % 3))
        axes.annotate(name, point, xytext=offset, textcoords="offset points", fontsize=8)


def _name_points_beside(figure: "Figure", methods: Sequence[Compared]) -> None:
    """Names the points in a legend, where names at the points would lie on top of each other."""
    if len(methods) > _NAMED_POINTS:
        figure.legend(loc="outside right upper", fontsize=7)


def _class_lines(
    axes: "Axes", steps: np.ndarray, values: np.ndarray, classes: Classes
) -> tuple[list["Line2D"], list[str]]:
    """Draws values [T, K] over steps [T], a line a class; returns lines and names for a legend.

    Where there are too many classes for that, the legend holds the largest and the smallest alone.
    """
    size = np.log(np.maximum(classes.counts, 1))
    rarity = (size.max() - size) / max(size.max() - size.min(), 1e-9)
    many = len(size) > _LINES
    style: dict[str, Any] = {"linewidth": 0.8 if many else 1.2, "marker": "o" if len(steps) == 1 else None}
    lines = [
        axes.plot(steps, values[:, k], color=_blend(rarity[k]), rasterized=many, **style)[0] for k in classes.order
    ]
    names = [_short(classes.names[k]) for k in classes.order]
    shown = slice(None, None, len(names) - 1 if many else 1)
    return lines[shown], names[shown]


def _channels(axes: "Axes", steps: np.ndarray, values: np.ndarray) -> None:
    """Draws values [T, C] over steps [T]: C lines, or quantiles over C where lines would be a thicket."""
    marker = "o" if len(steps) == 1 else None
    if values.shape[1] <= _LINES:
        axes.plot(steps, values, color=_BLUE, alpha=0.6, linewidth=1.2, marker=marker)
        return
    low, lower, middle, upper, high = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95), axis=1)
    axes.fill_between(steps, low, high, color=_BLUE, alpha=0.18, linewidth=0)
    axes.fill_between(steps, lower, upper, color=_BLUE, alpha=0.35, linewidth=0)
    axes.plot(steps, middle, color=_BLUE, marker=marker)


def _blend(rarity: float) -> tuple[float, ...]:
    """Returns the colour from blue (0) over purple to orange (1)."""
    stops = np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in GROUP_COLORS.values()])
    return tuple(float(np.interp(rarity, (0, 0.5, 1), channel)) for channel in stops.T)


def _as_percent(values: Iterable[float | None]) -> np.ndarray:
    """Fractions as percent, with NaN (which figures leave blank) for None."""
    return np.array([math.nan if value is None else 100 * value for value in values])


def _short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"


def _name_ticks(axes: "Axes", classes: Classes) -> None:
    """Names the classes along the x axis, turned where they would run into each other."""
    names = [_short(classes.names[k]) for k in classes.order]
    axes.set_xticks(range(len(names)), names)
    if len(names) > 14 and max(map(len, names)) > 2:
        axes.tick_params(axis="x", labelrotation=90)
    elif len(names) * max(map(len, names)) > 40:
        axes.tick_params(axis="x", labelrotation=40)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
            label.set_rotation_mode("anchor")
