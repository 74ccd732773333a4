"""One HTML page that compares methods: what each reached, for whom, and at what cost. Its form is that of `style`."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from mfm_jax import config as config_lib
from mfm_jax.data.manifest import factor_in_words, protocol_in_words
from mfm_jax.machine import disk
from mfm_jax.pages import comparison_figures as figures
from mfm_jax.pages.comparison_figures import Compared
from mfm_jax.pages.style import Picture, percent, render, template
from mfm_jax.workdir import finished
from mfm_jax.workdir.files import Workdir, read_object
from mfm_jax.workdir.finished import SPLITS, Classes


def write_page(
    workdir: Path,
    rows: Sequence[dict[str, Any]],
    results: Mapping[str, Sequence[dict[str, Any]]],
    failed: Mapping[str, str],
    tuned: Mapping[str, Mapping[str, Any]],
    folders: Mapping[str, Sequence[Path]],
    baseline: str,
    provenance: Mapping[str, Any],
) -> tuple[Path, list[str]]:
    """Writes `workdir/compare.html`; returns its path, and what it says in words.

    By method `results` has the content of `results.json` of each seed, `failed` why there is none, `tuned` the values
    that tuning chose, by `group.field`, and `folders` the run folder of each seed, below `workdir`; all runs share one
    split. `rows` are those of `compare.table`, `provenance` is of the comparison (`versions.provenance`).

    Raises:
      UserError: a file of a run is missing or damaged.
    """
    order = [name for name in results if name == baseline] + [name for name in results if name != baseline]
    methods = [_compared(name, results[name], folders[name]) for name in order]
    manifests = {name: read_object(Workdir(folders[name][0]).manifest, "dataset", "splits") for name in order}
    manifest = manifests[order[0]]
    classes = Classes(list(manifest["class_names"]), np.asarray(manifest["splits"]["train"]["class_counts"]))
    configs = {name: read_object(Workdir(folders[name][0]).config) for name in order}
    changes = {name: config_lib.differences(configs[order[0]], configs[name]) for name in order[1:]}
    first, sentences = results[order[0]][0], _sentences(rows, baseline, methods, manifests)
    selected = any(
        run["best"] and run["best"]["step"] != run["last"]["step"] for runs in results.values() for run in runs
    )
    content = {
        "manifest": manifest,
        "factor": factor_in_words(manifest),
        "protocol": protocol_in_words(manifest),
        "num_classes": len(classes.names),
        "num_train": int(classes.counts.sum()),
        "seeds": [run["seed"] for run in results[order[0]]],
        "baseline": baseline,
        "split": SPLITS[first["split"]],
        "sentences": sentences,
        "selected": selected,
        "rows": [row for row in rows if row["epoch"] == "last" or selected],
        "costs": [_cost(one, methods[0], rows) for one in methods],
        "cell": cell,
        "cost": cost,
        "interval": interval,
        "failed": failed,
        "tuned": {name: values for name, values in tuned.items() if values},
        "runs": {name: _runs(results[name], folders[name], workdir) for name in order},
        "provenance": provenance,
        "versions": first.get("versions") or {},
        "config": json.dumps(configs[order[0]], indent=2, ensure_ascii=False),
        "changes": {name: [str(one) for one in of if one.path != "method.name"] for name, of in changes.items()},
        "pictures": _pictures(classes, methods, baseline),
    }
    path = workdir / "compare.html"
    disk.write(path, template("compare.html.jinja").render(**content))
    return path, sentences


def _compared(name: str, runs: Sequence[dict[str, Any]], folders: Sequence[Path]) -> Compared:
    rows, costs = [finished.rows(at) for at in folders], [finished.cost(at) for at in folders]
    return Compared(name, [finished.shown(run) for run in runs], rows, costs, runs[0]["last"]["step"])


def _pictures(classes: Classes, methods: Sequence[Compared], baseline: str) -> dict[str, Picture | None]:
    """Every figure by name; None where there is nothing to draw."""
    compared = len(methods) > 1 or methods[0].name != baseline
    logged = any(rows.get("train") for one in methods for rows in one.rows)
    tall = 0.7 * len(methods)
    return {
        "gains": render(figures.draw_gains, (8.4, 1.1 + tall), methods, baseline) if compared else None,
        "classes": render(figures.draw_class_accuracies, (9.0, 4.2), classes, methods),
        "curves": render(figures.draw_curves, (9.0, 3.4), methods) if logged else None,
        "time": render(figures.draw_time, (8.4, 1.2 + tall / 2), methods) if any(methods[0].costs) else None,
    }


def _sentences(
    rows: Sequence[Mapping[str, Any]],
    baseline: str,
    methods: Sequence[Compared],
    manifests: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Returns what the comparison says in words: of the method ahead of the others, and of the default."""
    gains = {row["method"]: row for row in rows if row["epoch"] == "last" and row["difference"] is not None}
    if not gains:
        return []
    ahead = max(gains, key=lambda name: gains[name]["difference"])
    learning = {
        one.name for one in methods if any("meta_loss" in row for rows in one.rows for row in rows.get("train", ()))
    }
    default, sentences = config_lib.Method.name, []
    for name in dict.fromkeys([ahead, *([default] if default in gains else [])]):
        difference, half = gains[name]["difference"], gains[name]["difference_t95"]
        way = "above" if difference >= 0 else "below"
        reach = "" if half is None else f" [{100 * (difference - half):.1f}, {100 * (difference + half):.1f}]"
        text = f"{name} is {abs(100 * difference):.1f} points {way} {baseline}{reach}"
        if name in learning and baseline not in learning:
            text += f"; {_meta_images(manifests[name], manifests[baseline], baseline)}"
        unsure = half is None or abs(difference) <= half
        doubt = "One seed shows no interval." if half is None else "The interval holds zero: no difference is shown."
        sentences.append(f"{text}. {doubt if unsure else ''}".strip())
    return sentences


def _meta_images(own: Mapping[str, Any], other: Mapping[str, Any], baseline: str) -> str:
    """Returns where the images of a method's meta set come from, by its manifest and the baseline's."""
    count = sum(own["splits"]["meta"]["class_counts"])
    shared = {"part": "meta", "whole": "train"}
    within, seen = (any(shared.items() <= pair.items() for pair in one.get("overlaps", [])) for one in (own, other))
    if within:
        return f"its meta set is {count:,} of the training images" + (
            ", drawn anew every epoch" if own.get("meta_redrawn") else ""
        )
    return f"its meta set is {count:,} images that {baseline} {'trained on as well' if seen else 'did not see'}"


def _cost(one: Compared, baseline: Compared, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a method's row of the table of costs: medians over seeds, seconds, and multiples of the baseline's."""
    known = [cost for cost in one.costs if cost]
    step, unit = _step(one), _step(baseline)
    row = next(row for row in rows if row["method"] == one.name)
    return {
        "method": one.name,
        "step": step,
        "step_ratio": step / unit if step and unit and row["time_ratio"] else None,
        "compiling": statistics.median(cost.compiling for cost in known) if known else None,
        "total": statistics.median(cost.total for cost in known) if known else None,
        "memory_bytes": row["memory_bytes"],
        "memory_ratio": row["memory_ratio"],
    }


def _step(one: Compared) -> float | None:
    known = [cost.step for cost in one.costs if cost and cost.step]
    return statistics.median(known) if known else None


def _runs(results: Sequence[Mapping[str, Any]], folders: Sequence[Path], workdir: Path) -> list[dict[str, Any]]:
    """Returns what the page says of each run of a method: its seed, score, report, and what it was warned of."""
    return [
        {
            "seed": run["seed"],
            "score": percent(finished.shown(run)["balanced_accuracy"], 1),
            "link": quote(Workdir(folder).report.relative_to(workdir).as_posix()),
            "warnings": finished.warnings(folder),
        }
        for run, folder in zip(results, folders, strict=True)
    ]


def interval(row: Mapping[str, Any]) -> str:
    """Returns a row's difference to the baseline, in percent, and its 95 % interval."""
    mean, half = row["difference"], row["difference_t95"]
    text = cell(mean, None)
    return text if half is None else f"{text} [{100 * (mean - half):.1f}, {100 * (mean + half):.1f}]"


def cell(mean: float | None, spread: float | None) -> str:
    """Returns a mean and its standard deviation, fractions, in percent with one decimal; a dash for None."""
    return percent(mean, 1) + ("" if mean is None or spread is None else f" ± {100 * spread:.1f}")


def cost(row: Mapping[str, Any]) -> list[str]:
    """Returns the mean cost of an image with its standard deviation, one cell; none where no decisions were wanted."""
    if "mean_cost_mean" not in row:
        return []
    mean, spread = row["mean_cost_mean"], row["mean_cost_std"]
    return ["–" if mean is None else f"{mean:.2f}" + ("" if spread is None else f" ± {spread:.2f}")]
