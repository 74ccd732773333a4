"""One HTML page that shows a finished run, built from nothing but the files the run left in its workdir.

A long-tailed result is a trade between classes, so a page that prints one accuracy explains nothing. This one
puts side by side what a reader needs to judge a run: how many images each class had and how well it came out,
what the last epoch gave and what selection on validation would have given, where the confusions go, whether
the confidences can be trusted, how training went, and what the modulation learned.

The page is one file. It holds no script and no outside link, so it can be mailed, archived beside the
checkpoint and opened in ten years. Everything from a file is data and may be strange (a class may be called
`<b>`): the template escapes by default.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from mfm_jax.data import walk
from mfm_jax.data.manifest import factor_in_words
from mfm_jax.machine import disk
from mfm_jax.pages import figures, style
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
    disk.write(path, template("report.html.jinja").render(**content))
    return path


def template(name: str, **filters: Callable[..., str]) -> jinja2.Template:
    """Returns the template `name` of this package, with the filters `percent`, `number` and `filters`."""
    page = name.endswith(".html.jinja")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mfm_jax", "pages"),
        autoescape=page,
        # On a page an undefined field prints as nothing and counts as false: `finished` decides which are required.
        undefined=jinja2.Undefined if page else jinja2.StrictUndefined,
        keep_trailing_newline=not page,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": style.percent, "number": _number, **filters}
    return environment.get_template(name)


def _content(run: Finished) -> dict[str, Any]:
    """What the template shows: plain values and finished figures, no decisions left but layout."""
    best = run.results.get("best")
    evaluations = [
        (f"{SPLITS[split].capitalize()}, {title}", source, split)
        for split in SPLITS
        for title, source in ((run.title, run.results["last"]), ("best on validation", best))
        if source and source.get(split)
    ]
    return {
        "manifest": run.manifest,
        "split": SPLITS[run.split],
        "which": run.title,
        "factor": factor_in_words(run.manifest) if "imbalance_factor" in run.manifest else "–",
        "results": run.results,
        "best": best,
        "columns": [(title, source.get("epoch"), source[split]) for title, source, split in evaluations],
        "summary_rows": SUMMARY_ROWS,
        "warnings": [str(row.get("sentence")) for row in run.rows["warning"]] + _unread(run.results),
        "passed_over": walk.in_words(passed) if (passed := run.results.get("passed_over")) else "",
        "tiles": [(SUMMARY_ROWS[i][0], run.shown.get(SUMMARY_ROWS[i][1])) for i in (1, 0, 7, 10)],
        "pictures": _pictures(run),
        "class_rows": _class_rows(run) if len(run.classes.names) <= TABLE_CLASSES else [],
        "num_classes": len(run.classes.names),
        "num_train": int(run.classes.counts.sum()),
        "config": json.dumps(run.config, indent=2, ensure_ascii=False),
    }


def _unread(results: dict[str, Any]) -> list[str]:
    number = len(results.get("unread", ()))
    which = "One file of the folder" if number == 1 else f"{number:,} files of the folder"
    return [f"{which} could not be read; results.json has the reasons under unread."] if number else []


def _pictures(run: Finished) -> dict[str, Picture | None]:
    """Every figure by name; None where the run has nothing to draw it from."""
    render, classes, sites = style.render, run.classes, run.modulation()
    train, val = run.rows["train"], run.rows["val"]
    best_step = (run.results.get("best") or {}).get("step")
    # The names of the classes, where they are written out, take room.
    side = 7.0 if figures.CELL_CLASSES < len(classes.names) <= style.LABELLED_CLASSES else 4.3
    tall = 0.6 + 2.4 * len(sites)
    learned = [row for row in train if row.get("hypergrad_norm")]
    return {
        "classes": render(figures.draw_classes, (9.0, 4.8), classes, run.shown),
        "curves": render(figures.draw_curves, (9.0, 3.4), train, val, best_step) if train or val else None,
        "confusion": run.shown["confusion"]
        and render(figures.draw_confusion, (side + 0.3, side - 0.1), classes, run.shown),
        "reliability": render(figures.draw_reliability, (4.6, 4.3), run.shown),
        "modulation": render(figures.draw_modulation, (9.0, tall), classes, sites) if sites else None,
        "gallery": run.gallery
        and render(figures.draw_gallery, figures.gallery_inches(run.gallery), classes, run.gallery),
        "meta_gradient": render(figures.draw_meta_gradient, (9.0, 3.0), learned) if learned else None,
    }


def _gallery(run: Finished) -> Picture | None:
    if run.gallery is None or not len(run.gallery.labels):
        return None
    return style.render(figures.draw_gallery, figures.gallery_inches(run.gallery), run.classes, run.gallery)


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _class_rows(run: Finished) -> list[dict[str, Any]]:
    """One row a class, from most to fewest training images."""
    classes = run.classes
    tested = np.sum(run.shown["confusion"], axis=1)
    best = run.results.get("best")
    return [
        {
            "index": int(k),
            "name": classes.names[k],
            "group": classes.groups[k],
            "train": int(classes.counts[k]),
            "images": int(tested[k]),
            "last": run.shown["per_class_accuracy"][k],
            "best": best[run.split]["per_class_accuracy"][k] if best else None,
        }
        for k in classes.order
    ]
