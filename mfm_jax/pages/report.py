"""One HTML page that shows a finished run, built from nothing but the files the run left in its workdir.

A long-tailed result is a trade between classes, which one accuracy does not show. The page puts side by side how many
images each class had and how well it came out, the last epoch and the best on validation, the confusions, how far
confidences can be trusted, how training went, and what the modulation learned. Its form is that of `style`.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from mfm_jax.data import longtail, walk
from mfm_jax.data.manifest import factor_in_words, protocol_in_words
from mfm_jax.evaluation import intervals
from mfm_jax.machine import disk
from mfm_jax.pages import figures, mistakes, style
from mfm_jax.pages.style import Picture
from mfm_jax.workdir import finished
from mfm_jax.workdir.files import Workdir
from mfm_jax.workdir.finished import SPLITS, Finished

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


def write_report(workdir: Path, folder: Path | None = None, untrained: finished.Start | None = None) -> Path:
    """Writes the report of the run in `workdir` and returns its path; with `folder`, of the results there and to there.

    Weights that no run trained have the config and manifest `untrained`. Nothing else than these files is read
    (`finished`): no device, no data set and no checkpoint is needed. Pieces a run need not have (validation rows, a
    best checkpoint, a modulation) are replaced by a sentence. Fractions are printed in percent.

    Raises:
      UserError: a file is missing, damaged, or lacks a field; the message names it.
    """
    path = Workdir(folder or workdir).report
    content = _content(finished.read(workdir, folder, untrained))
    disk.write(path, style.template("report.html.jinja").render(**content))
    return path


def _content(run: Finished) -> dict[str, Any]:
    """What the template shows: plain values and finished figures, no decisions left but layout."""
    best = run.results.get("best")
    if best and best["step"] == run.results["last"]["step"]:
        best = None  # it would be the same columns again
    evaluations = [
        (f"{SPLITS[split].capitalize()}, {title}", source, split)
        for split in SPLITS
        for title, source in ((run.title, run.results["last"]), ("best on validation", best))
        if source and source.get(split)
    ]
    reach = intervals.of_evaluation(run.shown, run.classes.counts)
    return {
        "manifest": run.manifest,
        "protocol": protocol_in_words(run.manifest),
        "split": SPLITS[run.split],
        "which": run.title,
        "factor": factor_in_words(run.manifest) if "imbalance_factor" in run.manifest else "–",
        "results": run.results,
        "best": best,
        "columns": [
            (title, source.get("epoch"), source[split], intervals.of_evaluation(source[split], run.classes.counts))
            for title, source, split in evaluations
        ],
        "summary_rows": SUMMARY_ROWS,
        "warnings": [str(row.get("sentence")) for row in run.rows["warning"]] + _unread(run.results),
        "passed_over": walk.in_words(passed) if (passed := run.results.get("passed_over")) else "",
        "tiles": [(*SUMMARY_ROWS[i], run.shown.get(SUMMARY_ROWS[i][1])) for i in (1, 0, 7, 10)],
        "intervals": reach,
        "range": _range,
        "pictures": _pictures(run),
        "matrix": mistakes.matrix(run.classes, run.shown),
        "worst": mistakes.worst(run),
        "pairs": mistakes.pairs(run),
        "gallery": mistakes.rare(run),
        "sets": _sets(run),
        "decisions": _decisions(run),
        "story": _story(run),
        "class_rows": _class_rows(run, best) if len(run.classes.names) <= TABLE_CLASSES else [],
        "num_classes": len(run.classes.names),
        "num_train": int(run.classes.counts.sum()),
        "config": json.dumps(run.config, indent=2, ensure_ascii=False),
    }


def _unread(results: dict[str, Any]) -> list[str]:
    number = len(results.get("unread", ()))
    which = "One file of the folder" if number == 1 else f"{number:,} files of the folder"
    return [f"{which} could not be read; results.json has the reasons under unread."] if number else []


def _range(interval: intervals.Interval | None) -> str:
    """Returns an interval in percent; nothing for None."""
    return "" if interval is None else f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _pictures(run: Finished) -> dict[str, Picture | None]:
    """Every figure by name; None where the run has nothing to draw it from."""
    render, classes, sites = style.render, run.classes, run.modulation()
    train, val = run.rows["train"], run.rows["val"]
    last, best = run.results["last"], run.results.get("best") or {}
    best_step = best.get("step") if best.get("step") != last.get("step") else None
    learned = [row for row in train if row.get("hypergrad_norm")]
    warned = [row["step"] for row in run.rows["warning"]]
    return {
        "classes": render(figures.draw_classes, (9.0, 4.8), classes, run.shown),
        "curves": render(figures.draw_curves, (9.0, 3.4), train, val, best_step) if train or val else None,
        "reliability": render(figures.draw_reliability, (5.6, 3.8), run.shown),
        "modulation": render(figures.draw_modulation, (9.0, 0.6 + 2.4 * len(sites)), classes, sites) if sites else None,
        "meta_gradient": render(figures.draw_meta_gradient, (9.0, 2.9), learned, _chance(run), warned)
        if learned
        else None,
    }


def _chance(run: Finished) -> float | None:
    """Returns the meta loss of equal probabilities, where it is a cross-entropy."""
    return math.log(len(run.classes.names)) if run.config.get("meta", {}).get("loss") == "ce" else None


def _story(run: Finished) -> list[str]:
    """Returns what the modulation learned, and how, a sentence each."""
    lines = []
    losses = [row["meta_loss"] for row in run.rows["train"] if "meta_loss" in row]
    if losses:
        chance = _chance(run)
        guess = f"; an equal guess has {chance:.2f}" if chance else ""
        lines.append(f"The meta loss, on balanced images, went from {losses[0]:.2f} to {losses[-1]:.2f}{guess}.")
    groups = longtail.shot_groups(run.classes.counts)
    for site, values in run.modulation().items():
        for name in ("gamma", "beta"):
            if name in values and np.any(values[name]):
                last = np.round(values[name][-1], 4) + 0.0  # no minus before a zero
                means = ""
                if site == "logits":
                    head, tail = (last[groups[part]].mean() for part in ("head_third", "rarest_third"))
                    means = f": {head:.2f} on average over the head third, {tail:.2f} over the rarest"
                lines.append(f"At {site}, {name} ended between {last.min():.2f} and {last.max():.2f}{means}.")
    if losses:
        count = len(run.rows["warning"])
        lines.append(f"{count} warning{'s' if count > 1 else ''}, at the top." if count else "No warning was given.")
    return lines


def _sets(run: Finished) -> dict[str, Any] | None:
    """Returns what the page shows of the prediction sets: the promise, the pools, and a row a shot group."""
    sets = run.results["last"].get("prediction_sets")
    measured = sets and sets["measured"].get(run.split)
    if not measured:
        return None
    rows = [
        found
        | {
            "name": "All images" if group == "all" else f"{group.capitalize()}-shot classes",
            "coverage": found["covered"] / found["images"],
            "interval": intervals.wilson(found["covered"] / found["images"], found["images"]),
        }
        for group, found in measured.items()
    ]
    return {"coverage": sets["coverage"], "pools": len(set(sets["pools"])), "rows": rows}


def _decisions(run: Finished) -> dict[str, Any] | None:
    """Returns what the page shows of decisions by costs and wanted recalls, beside the likeliest classes."""
    found = run.results["last"].get("decisions")
    measured = found and found["measured"].get(run.split)
    if not measured:
        return None
    by_class = {one["of"]: one for one in found["thresholds"]}
    recalls = [row | by_class[row["of"]] | {"name": run.classes.names[row["of"]]} for row in measured["recalls"]]
    names = {"decided": "By costs and recalls", "by_cost": "By costs alone", "likeliest": "The likeliest class"}
    rows = [(name, measured[key]) for key, name in names.items() if recalls or key != "decided"]
    return {"rows": rows, "recalls": recalls}


def _class_rows(run: Finished, best: dict[str, Any] | None) -> list[dict[str, Any]]:
    """One row a class, from most to fewest training images."""
    classes, instead = run.classes, mistakes.named_instead(run)
    right, images = intervals.right_of(run.shown)
    return [
        {
            "index": int(k),
            "name": classes.names[k],
            "group": classes.groups[k],
            "train": int(classes.counts[k]),
            "images": int(images[k]),
            "last": run.shown["per_class_accuracy"][k],
            "interval": intervals.wilson(right[k] / images[k], images[k]) if images[k] else None,
            "best": best[run.split]["per_class_accuracy"][k] if best else None,
            "instead": instead[k] if instead else "",
        }
        for k in classes.order
    ]
