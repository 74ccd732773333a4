"""A trained classifier laid out for a model hub: `python -m mfm_jax.export --checkpoint=RUN --hub=FOLDER`.

The folder gets the weights and their config (`evaluation.hub_folder`), a model card with the front matter that hubs
read (`README.md`), and the card's figures. `mfm_jax.load(FOLDER)` is the classifier again. Nothing is uploaded.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mfm_jax.errors import UserError
from mfm_jax.evaluation import classifier, hub_folder
from mfm_jax.evaluation.classifier import Classifier
from mfm_jax.evaluation.hub_folder import Stored
from mfm_jax.machine import disk, versions
from mfm_jax.pages import card, figures, front_matter, style
from mfm_jax.workdir import finished
from mfm_jax.workdir.files import Workdir
from mfm_jax.workdir.finished import Finished

CARD = "README.md"
NO_LICENSE = "unknown"  # as hubs spell it


def loaded(workdir: Path, which: str, module: Any = None) -> tuple[Classifier, Finished, dict[str, Any]]:
    """Returns the classifier of a finished run, the run, and its results of that checkpoint, of its step."""
    trained, run = classifier.load(workdir, which, module=module), finished.read(workdir)
    found = run.results.get(which)
    if found is None or trained.step != found["step"]:
        at = found and found["step"]
        raise UserError(f"{Workdir(workdir).results}: of step {at}, the checkpoint of step {trained.step}")
    return trained, run, found


def lay_out(workdir: Path, out: Path, which: str = "last", *, license_id: str = NO_LICENSE, made_by: str = "") -> None:
    """Writes the classifier of a finished run to the folder `out`, as a hub takes it.

    Args:
      workdir: of the run.
      out: the folder; files of an earlier export there are replaced, its card among them.
      which: "last" or "best", the checkpoint.
      license_id: of the weights, as hubs spell it, e.g. `apache-2.0`.
      made_by: the command, for the card.

    Raises:
      UserError: the run has not finished or cannot be loaded, or `out` holds a run.
      RuntimeError: what was written gives other probabilities than the checkpoint.
    """
    if not hub_folder.is_one(out):
        Workdir(out).check_no_run("--hub")
    trained, run, found = loaded(workdir, which)
    config, calibration = hub_folder.published(trained.config), found.get("calibration")
    out.mkdir(parents=True, exist_ok=True)
    stored = Stored(config, trained.facts, which, trained.step, trained.variables, trained.sets, trained.decisions)
    more = {
        "method": run.results["method"],
        "temperature": calibration and calibration["temperature"],  # not applied
        "manifest": run.manifest.get("hash"),
        "versions": versions.versions(),
    }
    hub_folder.write(out, stored, more)
    check(hub_folder.WEIGHTS, trained, classifier.load(out).probabilities)
    run = dataclasses.replace(run, config=config.to_dict())
    captions = _draw(run, which, out / "figures")
    sizes = {path.name: path.stat().st_size for path in (out / hub_folder.WEIGHTS, Workdir(out).config)}
    text = card.text(run, which, made_by, sizes, captions)
    disk.write(out / CARD, front_matter.text(run, which, license_id) + text)


def _draw(run: Finished, which: str, folder: Path) -> dict[str, str]:
    """Draws the card's figures; returns the caption of each by its file's name without the suffix."""
    folder.mkdir(exist_ok=True)
    shown, when = run.results[which][run.split], "last epoch" if which == "last" else "epoch best on validation"
    train, val = run.rows["train"], run.rows["val"]
    drawn = {
        "classes": style.png(figures.draw_classes, (9.0, 4.8), run.classes, shown, when),
        "reliability": style.png(figures.draw_reliability, (5.6, 3.8), shown, when),
        "curves": style.png(figures.draw_curves, (9.0, 3.4), train, val, None),
    }
    for name, (content, _) in drawn.items():
        disk.write(folder / f"{name}.png", content)
    return {name: caption for name, (_, caption) in drawn.items()}


def check(name: str, trained: Classifier, program: Callable[[np.ndarray], np.ndarray]) -> None:
    """Refuses a file that does not give the checkpoint's probabilities, on seven noisy images."""
    images = np.random.default_rng(0).integers(0, 256, (7, *trained.image_shape), np.uint8)
    gap = float(np.abs(program(images) - trained.probabilities(images)).max())
    if not gap <= classifier.TOLERANCE:
        raise RuntimeError(f"{name}: its probabilities differ from the checkpoint's by {gap:.1e}")
