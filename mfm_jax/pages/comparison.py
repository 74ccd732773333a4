"""One HTML page that compares methods: what each reached, for whom, and at what cost.

As the page of a run (`report`), it is one file without scripts or outside links.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mfm_jax.data.manifest import factor_in_words
from mfm_jax.machine import disk
from mfm_jax.pages.comparison_figures import Compared, draw_class_accuracies, draw_cost, draw_trade_off
from mfm_jax.pages.report import template
from mfm_jax.pages.style import render
from mfm_jax.workdir import finished
from mfm_jax.workdir.finished import SPLITS, Classes


def write_page(
    workdir: Path,
    rows: Sequence[dict[str, Any]],
    results: Mapping[str, Sequence[dict[str, Any]]],
    failed: Mapping[str, str],
    tuned: Mapping[str, Mapping[str, Any]],
    manifest: dict[str, Any],
    baseline: str,
    warnings: Sequence[tuple[str, str]] = (),
) -> Path:
    """Writes `workdir/compare.html` and returns its path.

    Args:
      workdir: of the comparison.
      rows: of `compare.table`; accuracies as fractions.
      results: by method, the content of `results.json` of each seed.
      failed: by method, why it has no results.
      tuned: by method, the values that tuning chose, by `group.field`.
      manifest: of the split, which all runs share.
      baseline: the method that the others are compared with.
      warnings: of `finished.warnings`, each with the run's name before it.
    """
    train = manifest["splits"]["train"]
    classes = Classes(list(manifest["class_names"]), np.asarray(train["class_counts"]))
    costs = {row["method"]: row["time_ratio"] for row in rows}
    order = [name for name in results if name == baseline] + [name for name in results if name != baseline]
    methods = [compared(name, results[name], costs[name]) for name in order]
    content = {
        "manifest": manifest,
        "factor": factor_in_words(manifest),
        "seeds": [run["seed"] for run in results[order[0]]],
        "baseline": baseline,
        "split": SPLITS[results[order[0]][0]["split"]],
        "rows": rows,
        "cell": cell,
        "interval": interval,
        "failed": failed,
        "warnings": warnings,
        "tuned": {name: values for name, values in tuned.items() if values},
        "pictures": {
            "classes": render(draw_class_accuracies, (9.0, 4.6), classes, methods),
            "trade_off": render(draw_trade_off, (5.4, 4.6), methods),
            "cost": render(draw_cost, (5.4, 4.6), methods) if costs[order[0]] else None,
        },
    }
    path = workdir / "compare.html"
    disk.write(path, template("compare.html.jinja").render(**content))
    return path


def interval(row: Mapping[str, Any]) -> str:
    """Returns a row's difference to the baseline, in percent, and its 95 % interval."""
    mean, half = row["difference"], row["difference_t95"]
    text = cell(mean, None)
    return text if half is None else f"{text} [{100 * (mean - half):.1f}, {100 * (mean + half):.1f}]"


def cell(mean: float | None, spread: float | None) -> str:
    """Returns a mean and its standard deviation, fractions, in percent with one decimal; a dash for None."""
    if mean is None:
        return "–"
    return f"{100 * mean:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def compared(name: str, runs: Sequence[dict[str, Any]], cost: float | None) -> Compared:
    """Returns a method's numbers: means over `runs`, the content of `results.json` of each seed."""
    found = [finished.shown(run) for run in runs]
    balanced = [one["balanced_accuracy"] for one in found]
    return Compared(
        name=name,
        balanced=statistics.fmean(balanced),
        spread=statistics.stdev(balanced) if len(balanced) > 1 else 0.0,
        cost=cost,
        head=_mean([one["head_third"] for one in found]),
        rarest=_mean([one["rarest_third"] for one in found]),
        per_class=[_mean(list(column)) for column in zip(*(one["per_class_accuracy"] for one in found), strict=True)],
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None
