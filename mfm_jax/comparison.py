"""One HTML page that compares methods: what each reached, for whom, and at what cost.

As the page of a run (`report`), it is one file without scripts or outside links.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mfm_jax import figures
from mfm_jax.figures import Classes, Compared
from mfm_jax.report import template


def write_page(
    workdir: Path,
    rows: Sequence[dict[str, Any]],
    results: Mapping[str, Sequence[dict[str, Any]]],
    failed: Mapping[str, str],
    memory: Mapping[str, float | None],
    manifest: dict[str, Any],
    baseline: str,
) -> Path:
    """Writes `workdir/compare.html` and returns its path.

    Args:
      workdir: of the comparison.
      rows: of `compare.table`; accuracies as fractions.
      results: by method, the content of `results.json` of each seed.
      failed: by method, why it has no results.
      memory: by method, peak memory in bytes; None where it was not measured.
      manifest: of the split, which all runs share.
      baseline: the method that the others are compared with.
    """
    train = manifest["splits"]["train"]
    classes = Classes(list(manifest["class_names"]), np.asarray(train["class_counts"]))
    costs = _ratios({name: _seconds(runs) for name, runs in results.items()}, baseline)
    order = [name for name in results if name == baseline] + [name for name in results if name != baseline]
    compared = [_compared(name, results[name], costs[name]) for name in order]
    content = {
        "manifest": manifest,
        "factor": f"{manifest['imbalance_factor']:g}",
        "seeds": [run["seed"] for run in results[order[0]]],
        "baseline": baseline,
        "rows": [row | {"time": costs[row["method"]]} for row in rows],
        "memory": _ratios(memory, baseline),
        "failed": failed,
        "pictures": {
            "classes": figures.render(figures.draw_class_accuracies, (9.0, 4.6), classes, compared),
            "trade_off": figures.render(figures.draw_trade_off, (5.4, 4.6), compared),
            "cost": figures.render(figures.draw_cost, (5.4, 4.6), compared) if costs[order[0]] else None,
        },
    }
    path = workdir / "compare.html"
    path.write_text(template("compare.html.jinja").render(**content), encoding="utf-8")
    return path


def _compared(name: str, runs: Sequence[dict[str, Any]], cost: float | None) -> Compared:
    tests = [run["last"]["test"] for run in runs]
    balanced = [test["balanced_accuracy"] for test in tests]
    return Compared(
        name=name,
        balanced=statistics.fmean(balanced),
        spread=statistics.stdev(balanced) if len(balanced) > 1 else 0.0,
        cost=cost,
        head=_mean([test["head_third"] for test in tests]),
        rarest=_mean([test["rarest_third"] for test in tests]),
        per_class=[_mean(list(column)) for column in zip(*(test["per_class_accuracy"] for test in tests), strict=True)],
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _seconds(runs: Sequence[dict[str, Any]]) -> float:
    return statistics.median(run["train_seconds"] for run in runs)


def _ratios(values: Mapping[str, float | None], baseline: str) -> dict[str, float | None]:
    """Returns each value over the baseline's; None where one of the two is not known."""
    unit = values.get(baseline)
    return {name: value / unit if value and unit else None for name, value in values.items()}
