"""The figures of one run's report, drawn with matplotlib.

Each `draw_*` function draws on the figure it is given and returns the caption; `style.render` makes the picture.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mfm_jax.evaluation import intervals
from mfm_jax.pages.style import (
    BLUE,
    GROUP_COLORS,
    LABELLED_CLASSES,
    MUTED,
    ORANGE,
    PURPLE,
    along_steps,
    as_percent,
    name_ticks,
    percent,
    plain_logs,
    short,
    tip,
)
from mfm_jax.workdir.finished import Classes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_WIDE_CLASSES = 200  # above this many classes bars touch
_MEANING = {"gamma": "scale gamma (features are multiplied by 1 + gamma)", "beta": "shift beta (added to them)"}
_LINES = 20  # up to this many channels or classes the modulation is drawn as one line each
_CURVE_POINTS = 400  # longer curves are averaged down to this many points

Rows = Sequence[dict[str, Any]]


def draw_classes(figure: "Figure", classes: Classes, result: dict[str, Any], when: str = "last epoch") -> str:
    """Draws the training images of each class above its accuracy; `result` is what `metrics.evaluate` returned."""
    top, bottom = figure.subplots(2, 1, sharex=True)
    place = np.arange(len(classes.counts))
    counts = classes.counts[classes.order]
    accuracy = as_percent(result["per_class_accuracy"])[classes.order]
    groups = np.array(classes.groups)[classes.order]
    images = np.array(result["per_class_images"])[classes.order]
    many = len(counts) > _WIDE_CLASSES
    for name, color in GROUP_COLORS.items():
        here = groups == name
        if here.any():
            label = f"{name}-shot ({here.sum()} {'class' if here.sum() == 1 else 'classes'})"
            width = 1.0 if many else 0.8
            top.bar(place[here], counts[here], width=width, color=color, label=label, rasterized=many)
            bottom.plot(place[here], accuracy[here], "o", color=color, markersize=3 if many else 5, rasterized=many)
            if not many:
                _intervals(bottom, place[here], accuracy[here], images[here], color)
    for k, at in enumerate(place if not many else ()):
        (point,) = bottom.plot(at, accuracy[k], "o", alpha=0, markersize=7)
        tip(
            point,
            f"{classes.names[classes.order[k]]}\n{accuracy[k]:.1f} % of {images[k]:,} images\n{counts[k]:,} to train",
        )
    above: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
    top.set_yscale("log")
    # Bars on a log scale need a floor; this one leaves the rarest class a visible bar.
    top.set_ylim(counts[counts > 0].min() / 3, counts.max() * 1.5)
    plain_logs(top.yaxis, "{x:,.0f}")
    top.set_title("Training images (log scale)")
    top.legend(**above, ncols=3)
    bottom.axhline(np.nanmean(accuracy), color=MUTED, linestyle="--", linewidth=1.2, label="balanced accuracy")
    bottom.set_ylim(-4, 104)
    bottom.set_title(f"Accuracy, {when} (%)")
    bottom.legend(**above)
    bottom.set_xlim(-0.8, len(counts) - 0.2)
    bottom.set_xlabel("class, from most to fewest training images")
    top.grid(axis="x", visible=False)
    bottom.grid(axis="x", visible=False)
    if len(counts) <= LABELLED_CLASSES:
        name_ticks(bottom, classes)
    return (
        f"Training images per class, from {counts[0]:,} down to {counts[-1]:,}, above the accuracy of each class"
        f" at the {when}, with the 95 % interval that the number of its test images allows:"
        f" {percent(result.get('head_third'), 1)} % over the head third,"
        f" {percent(result.get('rarest_third'), 1)} % over the rarest third."
    )


def _intervals(axes: "Axes", place: np.ndarray, accuracy: np.ndarray, images: np.ndarray, color: str) -> None:
    """Draws the 95 % interval of each class's accuracy, in percent."""
    for at, value, count in zip(place, accuracy, images, strict=True):
        if count:
            low, high = intervals.wilson(value / 100, count)
            axes.vlines(at, 100 * low, 100 * high, color=color, alpha=0.4)


def draw_curves(figure: "Figure", train: Rows, val: Rows, best_step: int | None) -> str:
    """Draws loss and accuracy over steps, from the metric rows of kind `train` and `val`."""
    panels = (_draw_loss, _draw_accuracy)[: 2 if any("accuracy" in row for row in train) or val else 1]
    for axes, draw in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        draw(axes, train, val)
        if best_step is not None:
            axes.axvline(best_step, color=PURPLE, linestyle=":", label="best on validation")
        along_steps(axes)
        axes.legend()
    return (
        "Loss and accuracy over training. Training curves are of the batches as the method draws and modulates them,"
        " so head classes may dominate; validation is of the plain classifier."
    )


def _draw_loss(axes: "Axes", train: Rows, val: Rows) -> None:
    _curve(axes, train, "loss", "training", MUTED)
    _curve(axes, train, "meta_loss", "meta (balanced)", ORANGE)
    _curve(axes, val, "nll", "validation (nll)", BLUE)
    axes.set_ylim(bottom=0)
    axes.set_title("Loss")


def _draw_accuracy(axes: "Axes", train: Rows, val: Rows) -> None:
    _curve(axes, train, "accuracy", "training batches", MUTED, scale=100)
    _curve(axes, val, "balanced_accuracy", "validation, balanced", BLUE, scale=100)
    axes.set_ylim(0, 102)
    axes.set_title("Accuracy (%)")


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


def draw_reliability(figure: "Figure", result: dict[str, Any], when: str = "last epoch") -> str:
    """Draws accuracy against confidence, from the bins of `metrics.reliability_bins`; fuller bins are stronger."""
    bins = [one for one in result["reliability"] if one["count"]]
    axes = figure.subplots()
    most = max(one["count"] for one in bins)
    for one in bins:
        left, right = 100 * one["lower"], 100 * one["upper"]
        accuracy, wanted, share = 100 * one["accuracy"], 100 * one["confidence"], one["count"] / most
        place: dict[str, Any] = {"width": 0.92 * (right - left), "align": "edge", "linewidth": 0}
        (bar,) = axes.bar(left, max(accuracy, 0.7), color=BLUE, alpha=0.12 + 0.88 * share**0.5, **place)
        tip(bar, f"{one['count']:,} images\nright: {accuracy:.1f} %\nmean confidence: {wanted:.1f} %")
        axes.hlines(wanted, left, right, color=ORANGE, linewidth=2.5, alpha=0.3 + 0.7 * share**0.5)
    axes.plot([0, 100], [0, 100], color=MUTED, linestyle="--", linewidth=1.2, label="perfectly calibrated")
    axes.plot([], color=ORANGE, linewidth=2.5, label="mean confidence")
    axes.bar(0, 0, color=BLUE, label="accuracy")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 102)
    axes.set_xlabel("confidence (%)")
    axes.set_ylabel("accuracy (%)")
    figure.legend(loc="outside upper left", ncols=3, columnspacing=1.2, handlelength=1.4)
    return (
        f"Reliability of the confidences at the {when}: ECE {percent(result['ece'], 1)} %. A bar that ends below"
        f" its mean confidence is over-confident. The stronger a bar, the more of the"
        f" {result['num_examples']:,} images it holds, at most {most:,}."
    )


def draw_modulation(figure: "Figure", classes: Classes, sites: dict[str, dict[str, np.ndarray]]) -> str:
    """Draws gamma and beta over training; `sites` holds by site `step` [T], and `gamma` and `beta` [T, C].

    At `logits` an entry belongs to a class: it has the colour of its training count and, where there is room, a name.
    Elsewhere it belongs to a channel, and channels have no order.
    """
    used = [name for name in ("gamma", "beta") if any(np.any(values.get(name, 0)) for values in sites.values())]
    names = used or ["gamma", "beta"]
    grid = figure.subplots(len(sites), len(names), squeeze=False, sharex=True)
    for panels, (site, values) in zip(grid, sites.items(), strict=True):
        named: tuple[Any, ...] = ()
        for axes, parameter in zip(panels, names, strict=True):
            axes.set_title(f"{site}: {parameter}")
            axes.axhline(0, color=MUTED, linewidth=0.8)
            if parameter not in values:
                continue
            if site == "logits":
                named = _class_lines(axes, values["step"], values[parameter], classes)
            else:
                _channels(axes, values["step"], values[parameter])
        if named:
            panels[-1].legend(*named, loc="upper left", bbox_to_anchor=(1.0, 1.05), fontsize=7, labelspacing=0.25)
    for axes in grid[-1]:  # the others share its ticks
        along_steps(axes)
    at_logits = "At logits a line is a class, from the most training images (blue) to the fewest (orange)."
    elsewhere = f"Elsewhere up to {_LINES} channels are a line each, more a median with bands of 50 % and 90 %."
    entries = [at_logits] * ("logits" in sites) + [elsewhere] * bool(sites.keys() - {"logits"})
    return (
        f"The modulation over training, by site ({', '.join(sites)}): {' and '.join(_MEANING[name] for name in names)}."
        f" Zero is the identity. {' '.join(entries)}"
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


def draw_meta_gradient(figure: "Figure", train: Rows, chance: float | None, warned: Sequence[int]) -> str:
    """Draws the meta loss over steps, the meta-gradient's norm, and its agreement with its own past.

    `chance` is the meta loss of equal probabilities; at the steps `warned` the run was warned of something.
    """
    loss, norm, agreement = figure.subplots(1, 3)
    _curve(loss, train, "meta_loss", "meta loss", ORANGE)
    if chance is not None:
        loss.axhline(chance, color=MUTED, linestyle="--", linewidth=1.2, label="an equal guess")
    loss.set_ylim(0, 1.25 * loss.get_ylim()[1])  # room for the legend
    loss.set_title("Meta loss")
    _curve(norm, train, "hypergrad_norm", "norm", ORANGE)
    norm.set_yscale("log")
    plain_logs(norm.yaxis)
    norm.set_title("Norm of its gradient (log)")
    _curve(agreement, train, "hypergrad_agreement", "cosine", BLUE)
    agreement.axhline(0, color=MUTED, linewidth=0.8)
    agreement.set_ylim(-1, 1)
    agreement.set_title("Cosine with its own past")
    for axes in (loss, norm, agreement):
        for i, step in enumerate(dict.fromkeys(warned)):
            axes.axvline(step, color=PURPLE, linestyle=":", label=None if i else "a warning")
        along_steps(axes)
    loss.legend()
    return (
        "The meta pass, means over each epoch: its loss, the norm of its gradient, and the cosine between each"
        " meta-step's and Adam's running mean of those before it. Near 1 they pull one way; around 0 they are noise,"
        " and Adam turns noise into drift."
    )
