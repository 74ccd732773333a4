"""A model card in Markdown, from the files that a finished run left in its workdir and nothing else.

Every sentence states a setting, a count or a measurement of the run; what was not measured is not claimed. Mitchell et
al., Model cards for model reporting, FAT* 2019, is the form's source.
"""

import html
from pathlib import Path
from typing import Any

import numpy as np

from mfm_jax import config as config_lib
from mfm_jax.config import Config
from mfm_jax.data.manifest import factor_in_words, protocol_in_words
from mfm_jax.errors import UserError
from mfm_jax.machine import disk
from mfm_jax.pages import report, style
from mfm_jax.workdir import finished
from mfm_jax.workdir.finished import SPLITS, Finished

LOW_ACCURACY = 0.5  # classes below it are named among the limits


def write_card(workdir: Path, path: Path, which: str, command: str, files: dict[str, int]) -> None:
    """Writes the card of a run's classifier to `path`.

    `which` is "last" or "best", the checkpoint that it describes; `command` made `path`; `files` has the bytes of the
    files that it describes.

    Raises:
      UserError: the run has not finished, or one of its files is damaged.
    """
    run = finished.read(workdir)
    if run.results.get(which) is None:
        raise UserError(f"{workdir}: the run has no results of its {which} checkpoint")
    disk.write(path, text(run, which, command, files))


def text(run: Finished, which: str, command: str, files: dict[str, int], figures: dict[str, str] | None = None) -> str:
    """Returns the card of a run that has results of the checkpoint `which`; the rest is as for `write_card`.

    `figures` are for a hub: the captions of the pictures that lie beside it as `figures/NAME.png`.
    """
    content = _content(run, which) | {"which": which, "command": command, "files": files, "low": LOW_ACCURACY}
    return style.template("card.md.jinja", cell=cell).render(content | {"figures": figures or {}})


def cell(text: object) -> str:
    """Returns a text, a class's name say, as Markdown that means just that, in one cell of a table."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return "".join("\\" + c if c in "\\`*_[]|#~$" else c for c in escaped)


def _content(run: Finished, which: str) -> dict[str, Any]:
    manifest, found, classes = run.manifest, run.results[which], run.classes
    shown, counts = found[run.split], classes.counts
    images = np.array(shown["per_class_images"])
    rows = [
        (classes.names[k], classes.groups[k], int(counts[k]), int(images[k]), shown["per_class_accuracy"][k])
        for k in classes.order
    ]
    summary = [(label, key) for label, key in report.SUMMARY_ROWS if key not in ("ece", "roc_auc")]
    calibration = found.get("calibration")
    return {
        "method": run.results["method"],
        "seed": run.results.get("seed"),
        "epoch": found["epoch"],
        "step": found["step"],
        "manifest": manifest,
        "factor": factor_in_words(manifest),
        "rule": protocol_in_words(manifest),
        "sizes": {name: split["class_counts"] for name, split in manifest["splits"].items()},
        "changed": [str(one) for one in config_lib.differences(Config().to_dict(), run.config)],
        "split": SPLITS[run.split],
        "evaluations": [(SPLITS[s], found[s]) for s in SPLITS if found.get(s)],
        "summary": summary,
        "rows": rows,
        "groups": {name: [row for row in rows if row[1] == name] for name in style.GROUP_COLORS},
        "calibration": calibration,
        "calibrated": calibration and [(SPLITS[s], found[s]["ece"], e) for s, e in calibration["ece"].items()],
        "few": [row[0] for row in rows if row[1] == "few"],
        "inaccurate": [row[0] for row in rows if row[4] is not None and row[4] < LOW_ACCURACY],
        "untested": [row[0] for row in rows if row[4] is None],
        "fewest_tested": int(images.min()),
        "versions": run.results.get("versions") or {},
    }
