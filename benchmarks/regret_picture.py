"""The picture of the table of regret: a dot for each setting, methods in the order of their means."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from regret_measure import Summary

from mfm_jax.pages import style


def write(path: Path, lines: Sequence[Mapping[str, Any]], over: Mapping[str, Summary]) -> None:
    """Writes an SVG file of the CSV file's lines that have a regret, and of the methods' summaries."""
    with matplotlib.rc_context({**style.STYLE, "svg.hashsalt": "regret"}):
        figure = Figure(figsize=(8.0, 0.42 * len(over) + 1.2), layout="constrained")
        draw(figure, lines, over)
        figure.savefig(path, facecolor="white", metadata={"Date": None})


def draw(figure: Figure, lines: Sequence[Mapping[str, Any]], over: Mapping[str, Summary]) -> None:
    """Draws each method's regrets, their mean, and their worst."""
    axes = figure.subplots()
    methods = sorted(over, key=lambda name: -over[name].mean)
    known = [line for line in lines if line["regret"]]
    for height, method in enumerate(methods):
        regrets = [float(line["regret"]) for line in known if line["method"] == method]
        mean = over[method].mean - over[method].level_mean
        axes.hlines(height, min(regrets), max(regrets), color=style.MUTED, linewidth=1)
        axes.scatter(regrets, [height] * len(regrets), s=18, color=style.BLUE, alpha=0.6, linewidths=0)
        axes.scatter([mean], [height], s=60, marker="D", color=style.ORANGE, zorder=3)
        axes.annotate(f"{mean:.1f}", (mean, height), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    axes.axvline(0, color=style.INK, linewidth=1)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_xlabel("points of balanced test accuracy below the best; 0: as a method that is level with it")
    settings = len({line["setting"] for line in known})
    axes.set_title(f"Regret in {settings} settings: each (dots), their mean (diamond)")
