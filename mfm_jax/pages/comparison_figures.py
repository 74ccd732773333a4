"""The figures of a comparison of methods; as in `figures`, a `draw_*` function returns the caption.

A method has one colour and one marker in all of them, the baseline grey; bars and bands show what seeds did.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mfm_jax.evaluation import intervals
from mfm_jax.pages.style import (
    BLUE,
    INK,
    LABELLED_CLASSES,
    MUTED,
    ORANGE,
    PURPLE,
    along_steps,
    as_percent,
    plain_logs,
    tip,
)
from mfm_jax.workdir.finished import Classes, Cost

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# None is that of a group of classes; each is legible on white and on near-black.
_COLORS = ("#1a9e8f", "#d1495b", "#9a8b1f", "#cf6bb0", "#a86b3c", "#4f9e45", "#6f8f9f", "#b0562f")
_MARKERS = "osD^vP"
_BINS = 15  # many classes are drawn as so many groups of them
_PARTS = (
    ("balanced", "balanced_accuracy", INK, "o"),
    ("head third", "head_third", BLUE, "s"),
    ("middle third", "middle_third", PURPLE, "D"),
    ("rarest third", "rarest_third", ORANGE, "v"),
)
_CURVES = (
    ("val", "balanced_accuracy", "Balanced accuracy on validation (%)", 100),
    ("train", "loss", "Training loss (log scale)", 1),
)


@dataclass(frozen=True)
class Compared:
    """One method in a comparison; every list has an entry for each seed.

    evaluations: what `metrics.evaluate` returned of the last checkpoint, on the split to show.
    rows: the metric rows by kind.
    costs: None of a run that was not accounted.
    steps: of training.
    """

    name: str
    evaluations: Sequence[Mapping[str, Any]]
    rows: Sequence[Mapping[str, Sequence[Mapping[str, Any]]]] = ()
    costs: Sequence[Cost | None] = ()
    steps: int = 0

    def scores(self, name: str) -> np.ndarray:
        """Returns a score of each seed in percent, [seeds]; NaN where there is none."""
        return as_percent(one[name] for one in self.evaluations)


def draw_gains(figure: "Figure", methods: Sequence[Compared], baseline: str) -> str:
    """Draws what each method gains on the baseline, for all classes and for thirds of them, on one scale.

    Without results of the baseline it draws the accuracies themselves.
    """
    axes = figure.subplots()
    against = next((one for one in methods if one.name == baseline), None)
    shown = [one for one in methods if one is not against] if against else list(methods)
    for row, one in enumerate(shown):
        for part, (label, key, color, marker) in enumerate(_PARTS):
            if np.isnan(one.scores(key)).any():  # two classes have no middle third
                continue
            mean, half = _gain(one.scores(key), against.scores(key) if against else None)
            place = row + 0.18 * (part - 1.5)
            bar = None if math.isnan(half) else half
            axes.errorbar(mean, place, xerr=bar, color=color, linewidth=1.3, capsize=2.5)
            (point,) = axes.plot(mean, place, marker, color=color, markersize=6.5, label=None if row else label)
            sign = "+" if against else ""
            reach = "" if bar is None else f" [{mean - half:.1f}, {mean + half:.1f}]" if against else f" ± {half:.1f}"
            tip(point, f"{one.name}, {label}: {mean:{sign}.1f}{reach}")
    if against:
        axes.axvline(0, color=MUTED, linewidth=1.2)
    axes.set_yticks(range(len(shown)), [one.name for one in shown])
    axes.set_ylim(len(shown) - 0.45, -0.55)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"accuracy minus {baseline}'s (percentage points)" if against else "accuracy (%)")
    figure.legend(loc="outside upper left", ncols=4, columnspacing=1.4, handletextpad=0.3)
    several = len(methods[0].evaluations) > 1
    what = "95 % intervals of the difference paired by seed" if against else "one standard deviation over seeds"
    return (
        f"{f'What each method gains on {baseline}' if against else 'Accuracy'}, over all classes and over thirds of"
        " them by training images, on one scale; last epoch, mean over seeds. "
        + (f"Bars are {what}." if several else "There is one seed, and so there are no error bars.")
    )


def _gain(scores: np.ndarray, against: np.ndarray | None) -> tuple[float, float]:
    """Returns the mean difference and half its interval; without `against` the mean and the standard deviation."""
    if against is None:
        mean, spread = _over_seeds(scores)
        return float(mean), float(spread) if len(scores) > 1 else math.nan
    found = intervals.paired(scores.tolist(), against.tolist())
    return found.mean, math.nan if found.half is None else found.half


def _over_seeds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of values [seeds, ...]; the latter is 0 for one seed."""
    spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])
    return values.mean(axis=0), spread


def draw_class_accuracies(figure: "Figure", classes: Classes, methods: Sequence[Compared]) -> str:
    """Draws accuracy against training images, a line a method: of each class, or of groups of classes if many."""
    axes = figure.subplots()
    parts = [np.array([k]) for k in classes.order]
    if grouped := len(parts) > LABELLED_CLASSES:
        parts = np.array_split(classes.order, _BINS)
    counts = [float(classes.counts[part].mean()) for part in parts]
    for number, one in enumerate(methods):
        accuracy = np.array([as_percent(found["per_class_accuracy"]) for found in one.evaluations])
        mean, spread = _over_seeds(np.array([_mean_of_known(accuracy[:, part]) for part in parts]).T)
        style = _method_style(number)
        axes.fill_between(counts, mean - spread, mean + spread, color=style["color"], alpha=0.16, linewidth=0)
        axes.plot(counts, mean, linewidth=2.2 if number == 0 else 1.4, label=one.name, **style)
        for part, count, middle, width in zip(parts, counts, mean, spread, strict=True):
            of = f"{len(part)} classes of about" if grouped else f"class {classes.names[part[0]]},"
            (point,) = axes.plot(count, middle, linestyle="", alpha=0, **style)
            tip(point, f"{one.name}: {middle:.1f} ± {width:.1f} %\n{of} {count:,.0f} training images")
    axes.set_xscale("log")
    axes.invert_xaxis()
    plain_logs(axes.xaxis, "{x:,.0f}")
    axes.set_ylim(-4, 104)
    axes.set_xlabel(f"training images{' a class' if grouped else ' of the class'} (log scale)")
    axes.set_ylabel("accuracy (%)")
    figure.legend(loc="outside right upper", fontsize=8)
    what = f"{_BINS} groups of classes, of like training images" if grouped else "each class"
    return (
        f"Accuracy of {what}, at the last epoch, from the most training images to the fewest: mean over seeds, with"
        " a band of one standard deviation."
    )


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Returns the means of rows [seeds, classes], without NaN; NaN for a row of nothing else."""
    known = ~np.isnan(values)
    total, count = np.where(known, values, 0).sum(axis=1), known.sum(axis=1)
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def draw_curves(figure: "Figure", methods: Sequence[Compared]) -> str:
    """Draws accuracy on validation, where there is any, and the training loss over steps, a line a method."""
    panels = [one for one in _CURVES if any(row.get(one[0]) for method in methods for row in method.rows)]
    for axes, (kind, key, title, scale) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        for number, one in enumerate(methods):
            steps, values = _curve([rows.get(kind, []) for rows in one.rows], key)
            if not len(steps):
                continue
            mean, spread = _over_seeds(scale * values)
            style = _method_style(number) | {"marker": None if len(steps) > 1 else "o"}
            axes.fill_between(steps, mean - spread, mean + spread, color=style["color"], alpha=0.16, linewidth=0)
            (line,) = axes.plot(steps, mean, label=one.name if axes is figure.axes[0] else None, **style)
            tip(line, f"{one.name}: {mean[-1]:.3f} ± {spread[-1]:.3f} at the end")
        axes.set_title(title)
        if kind == "train":
            axes.set_yscale("log", nonpositive="clip")
            plain_logs(axes.yaxis)
        along_steps(axes)
    figure.legend(loc="outside right upper", fontsize=8)
    return (
        "Learning curves: mean over seeds, with a band of one standard deviation. Each method's training loss is its"
        " own, on the batches that it draws: its level says nothing across methods, its course does."
    )


def _curve(runs: Sequence[Sequence[Mapping[str, Any]]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps [T] at which every run has the value, and the values [runs, T]."""
    found = [{row["step"]: row[key] for row in rows if row.get(key) is not None} for rows in runs]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    return np.array(steps), np.array([[one[step] for step in steps] for one in found])


def draw_time(figure: "Figure", methods: Sequence[Compared]) -> str:
    """Draws where the time of each method's runs went, the mean over seeds."""
    axes = figure.subplots()
    parts = (("steps", 0.85), ("compilation", 0.5), ("start, evaluation, saving", 0.2))
    for row, one in enumerate(methods):
        costs = [cost for cost in one.costs if cost]
        if not costs:
            continue
        steps = [one.steps * (cost.step or 0.0) for cost in costs]
        split = np.array([(s, c.compiling, c.total - c.compiling - s) for s, c in zip(steps, costs, strict=True)])
        mean = np.maximum(split, 0).mean(axis=0)
        left = np.concatenate([[0], np.cumsum(mean)])
        for (label, alpha), start, width in zip(parts, left[:-1], mean, strict=True):
            style: dict[str, Any] = {"color": INK, "alpha": alpha, "linewidth": 0, "label": None if row else label}
            (bar,) = axes.barh(row - 0.1, width, left=start, height=0.5, **style)
            tip(bar, f"{one.name}, {label}: {width:,.1f} s")
        total, wide = _over_seeds(np.array([cost.total for cost in costs]))
        axes.annotate(f" {total:,.0f} s", (left[-1], row - 0.1), va="center", fontsize=8)
        if len(costs) > 1:
            axes.errorbar(left[-1], row + 0.27, xerr=wide, color=MUTED, linewidth=1.3, capsize=2.5)
    axes.set_yticks(range(len(methods)), [one.name for one in methods])
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds of a run")
    figure.legend(loc="outside upper left", ncols=3, columnspacing=1.4)
    return (
        "Where the time of a run went, mean over seeds; the line below its end is one standard deviation of the whole."
        " Compilation is paid once, whatever the number of epochs, and a cache may have spared it. Runs side by side"
        " slow each other down; seeds that were trained together each have the time of them all."
    )


def _method_style(number: int) -> dict[str, Any]:
    """Returns the colour and marker of a method by its place: grey for the baseline, then a pair for each."""
    if number == 0:
        return {"color": MUTED, "marker": "o", "markersize": 5}
    row, column = divmod(number - 1, len(_COLORS))
    return {"color": _COLORS[column], "marker": _MARKERS[(column + row + 1) % len(_MARKERS)], "markersize": 5}
