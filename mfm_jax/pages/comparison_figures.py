"""The figures of a comparison of methods; as in `figures`, a `draw_*` function returns the caption."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mfm_jax.pages.style import LABELLED_CLASSES, MUTED, Classes, as_percent, plain_logs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMED_POINTS = 8  # up to so many methods have their names at their points


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
    """Draws balanced accuracy against training time, a point a method."""
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
    """Draws the accuracy of each class against its training images, a line a method."""
    axes = figure.subplots()
    counts = classes.counts[classes.order]
    for number, one in enumerate(methods):
        accuracy = as_percent(one.per_class)[classes.order]
        style = _method_style(number) | ({"markersize": 4} if len(counts) <= LABELLED_CLASSES else {"marker": None})
        axes.plot(counts, accuracy, linewidth=2.4 if number == 0 else 1.2, label=one.name, **style)
    axes.set_xscale("log")
    axes.invert_xaxis()
    plain_logs(axes.xaxis)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(-4, 104)
    axes.set_xlabel("training images of the class (log scale)")
    axes.set_ylabel("accuracy (%)")
    figure.legend(loc="outside right upper", fontsize=8)
    return "Accuracy of each class at the last epoch, mean over seeds, from the most training images to the fewest."


def draw_trade_off(figure: "Figure", methods: Sequence[Compared]) -> str:
    """Draws accuracy over the rarest third of the classes against the head third, a point a method."""
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
        return {"color": MUTED, "marker": "o", "markersize": 6}
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
