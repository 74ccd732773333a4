"""The figures of one run's report, drawn with matplotlib.

Each `draw_*` function draws on the figure it is given and returns the caption; `style.render` makes the picture.
"""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mfm_jax.evaluation.gallery import Gallery
from mfm_jax.pages.style import (
    BLUE,
    GROUP_COLORS,
    LABELLED_CLASSES,
    MUTED,
    ORANGE,
    PURPLE,
    as_percent,
    name_ticks,
    percent,
    plain_logs,
    short,
)
from mfm_jax.workdir.finished import Classes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

CELL_CLASSES = 12  # up to this many classes the confusion matrix prints its numbers
_WIDE_CLASSES = 200  # above this many classes bars touch
_LINES = 20  # up to this many channels or classes the modulation is drawn as one line each
_GALLERY_COLUMNS = 8
_CURVE_POINTS = 400  # longer curves are averaged down to this many points

Rows = Sequence[dict[str, Any]]


def draw_classes(figure: "Figure", classes: Classes, result: dict[str, Any]) -> str:
    """Draws the training images of each class above its accuracy; `result` is what `metrics.evaluate` returned."""
    top, bottom = figure.subplots(2, 1, sharex=True)
    place = np.arange(len(classes.counts))
    counts = classes.counts[classes.order]
    accuracy = as_percent(result["per_class_accuracy"])[classes.order]
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
    plain_logs(top.yaxis)
    top.yaxis.set_major_formatter("{x:,.0f}")
    top.set_title("Training images (log scale)")
    top.legend(**above, ncols=3)
    bottom.axhline(np.nanmean(accuracy), color=MUTED, linestyle="--", linewidth=1.2, label="balanced accuracy")
    bottom.set_ylim(-4, 104)
    bottom.set_title("Accuracy, last epoch (%)")
    bottom.legend(**above)
    bottom.set_xlim(-0.8, len(counts) - 0.2)
    bottom.set_xlabel("class, from most to fewest training images")
    top.grid(axis="x", visible=False)
    bottom.grid(axis="x", visible=False)
    if len(counts) <= LABELLED_CLASSES:
        name_ticks(bottom, classes)
    return (
        f"Training images per class, from {counts[0]:,} down to {counts[-1]:,}, above the accuracy of each class"
        f" at the last epoch: {percent(result.get('head_third'))} % over the head third,"
        f" {percent(result.get('rarest_third'))} % over the rarest third."
    )


def draw_curves(figure: "Figure", train: Rows, val: Rows, best_step: int | None) -> str:
    """Draws loss and accuracy over steps, from the metric rows of kind `train` and `val`."""
    loss, accuracy = figure.subplots(1, 2)
    _curve(loss, train, "loss", "training", MUTED)
    _curve(loss, train, "meta_loss", "meta (balanced)", ORANGE)
    _curve(loss, val, "nll", "validation (nll)", BLUE)
    loss.set_ylim(bottom=0)
    loss.set_title("Loss")
    _curve(accuracy, train, "accuracy", "training batches", MUTED, scale=100)
    _curve(accuracy, val, "balanced_accuracy", "validation, balanced", BLUE, scale=100)
    accuracy.set_ylim(0, 100)
    accuracy.set_title("Accuracy (%)")
    if best_step is not None:
        accuracy.axvline(best_step, color=PURPLE, linestyle=":", label="best on validation")
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


def draw_confusion(figure: "Figure", classes: Classes, result: dict[str, Any]) -> str:
    """Draws the confusion matrix, a row in percent of its true class."""
    confusion = np.array(result["confusion"], np.float64)[np.ix_(classes.order, classes.order)]
    total = confusion.sum(axis=1, keepdims=True)
    share = 100 * np.divide(confusion, total, out=np.full_like(confusion, np.nan), where=total > 0)
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    axes.grid(visible=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    figure.colorbar(image, ax=axes, label="% of the true class", fraction=0.046, pad=0.03).outline.set_visible(False)
    if len(share) <= LABELLED_CLASSES:
        name_ticks(axes, classes)
        axes.set_yticks(range(len(share)), [short(classes.names[k]) for k in classes.order])
    for (i, j), value in np.ndenumerate(share):
        # What would print as zero is left blank; so is a class without images (NaN).
        if len(share) <= CELL_CLASSES and value >= 0.5:
            color = "white" if value > 55 else "#1b2733"
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=color)
    return (
        "Confusion matrix at the last epoch. Each row is a true class and sums to 100 %."
        " Classes run from most to fewest training images; left of the diagonal, a larger class was named."
    )


def draw_reliability(figure: "Figure", result: dict[str, Any]) -> str:
    """Draws accuracy against confidence, from the bins of `metrics.reliability_bins`."""
    bins = [one for one in result["reliability"] if one["count"]]
    accuracy, share = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    left = 100 * np.array([one["lower"] for one in bins])
    right = 100 * np.array([one["upper"] for one in bins])
    bars: dict[str, Any] = {"width": 0.92 * (right - left), "align": "edge"}
    accuracy.bar(left, as_percent(one["accuracy"] for one in bins), color=BLUE, label="accuracy", **bars)
    wanted = as_percent(one["confidence"] for one in bins)
    accuracy.hlines(wanted, left, right, color=ORANGE, linewidth=2.5, label="mean confidence")
    accuracy.plot([0, 100], [0, 100], color=MUTED, linestyle="--", linewidth=1.2, label="perfectly calibrated")
    accuracy.set_ylim(0, 102)
    accuracy.set_title("Accuracy by confidence (%)")
    figure.legend(loc="outside upper left", ncols=3, columnspacing=1.2, handlelength=1.4)
    count = np.array([one["count"] for one in bins])
    share.bar(left, 100 * count / count.sum(), color=MUTED, **bars)
    share.set_title("Share of the images (%)")
    share.set_xlabel("confidence (%)")
    share.set_xlim(0, 100)
    return (
        f"Reliability of the confidences at the last epoch: ECE {percent(result['ece'])} %. A bar that ends"
        " below its mean confidence is over-confident; the lower panel shows how many images each bin holds."
    )


def draw_modulation(figure: "Figure", classes: Classes, sites: dict[str, dict[str, np.ndarray]]) -> str:
    """Draws gamma and beta over training; `sites` holds by site `step` [T], and `gamma` and `beta` [T, C].

    At `logits` an entry belongs to a class: it has the colour of its training count and, where there is room, a name.
    Elsewhere it belongs to a channel, and channels have no order.
    """
    grid = figure.subplots(len(sites), 2, squeeze=False, sharex=True)
    for panels, (site, values) in zip(grid, sites.items(), strict=True):
        named: tuple = ()
        for axes, parameter in zip(panels, ("gamma", "beta"), strict=True):
            axes.set_title(f"{site}: {parameter}")
            axes.axhline(0, color=MUTED, linewidth=0.8)
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
    names = [short(classes.names[k]) for k in classes.order]
    shown = slice(None, None, len(names) - 1 if many else 1)
    return lines[shown], names[shown]


def _channels(axes: "Axes", steps: np.ndarray, values: np.ndarray) -> None:
    """Draws values [T, C] over steps [T]: C lines, or quantiles over C where lines would be too many."""
    marker = "o" if len(steps) == 1 else None
    if values.shape[1] <= _LINES:
        axes.plot(steps, values, color=BLUE, alpha=0.6, linewidth=1.2, marker=marker)
        return
    low, lower, middle, upper, high = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95), axis=1)
    axes.fill_between(steps, low, high, color=BLUE, alpha=0.18, linewidth=0)
    axes.fill_between(steps, lower, upper, color=BLUE, alpha=0.35, linewidth=0)
    axes.plot(steps, middle, color=BLUE, marker=marker)


def _blend(rarity: float) -> tuple[float, ...]:
    """Returns the colour from blue (0) over purple to orange (1)."""
    stops = np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in GROUP_COLORS.values()])
    return tuple(float(np.interp(rarity, (0, 0.5, 1), channel)) for channel in stops.T)


def draw_meta_gradient(figure: "Figure", train: Rows) -> str:
    """Draws the norm of the meta-gradient over steps, and its agreement with its own past; rows of kind `train`."""
    norm, agreement = figure.subplots(1, 2)
    _curve(norm, train, "hypergrad_norm", "norm", ORANGE)
    norm.set_yscale("log")
    plain_logs(norm.yaxis)
    norm.set_title("Norm of the meta-gradient (log scale)")
    _curve(agreement, train, "hypergrad_agreement", "cosine", BLUE)
    agreement.axhline(0, color=MUTED, linewidth=0.8)
    agreement.set_ylim(-1, 1)
    agreement.set_title("Cosine with its running mean")
    for axes in (norm, agreement):
        _along_steps(axes)
    return (
        "The meta-gradient, means over each epoch: its norm, and the cosine between each meta-step's and Adam's running"
        " mean of those before it. Near 1 they pull one way; around 0 they are noise, and Adam turns noise into drift."
    )


def draw_gallery(figure: "Figure", classes: Classes, gallery: Gallery) -> str:
    """Draws images of rare classes, those with a right answer above those with a wrong one."""
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
        "Images of the classes with the fewest training images, most confident first, at most two of a class:"
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
