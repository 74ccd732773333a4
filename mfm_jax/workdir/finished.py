"""A finished run, read from the files in its folder and checked; nothing else of it need be at hand, nor JAX.

`results.json` has `last` and `best`, each `{"step", "epoch", SPLIT: what metrics.evaluate returned}`; `split` names the
one to show.
"""

import dataclasses
import functools
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mfm_jax.data import longtail
from mfm_jax.errors import UserError
from mfm_jax.evaluation import gallery
from mfm_jax.evaluation.gallery import Gallery
from mfm_jax.workdir.files import Workdir, read_object, read_objects

# As readers call them; "outside" are pictures from outside the run's data.
SPLITS = {"test": "test", "val": "validation", "train": "training", "outside": "outside"}
Start = tuple[dict[str, Any], dict[str, Any]]  # a config and a manifest, as in their files


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of a run: `names` and training `counts`, both of length K."""

    names: list[str]
    counts: np.ndarray

    @functools.cached_property
    def order(self) -> np.ndarray:
        """The classes from most to fewest training images, int [K]."""
        return np.argsort(-self.counts, kind="stable")

    @functools.cached_property
    def groups(self) -> list[str]:
        """The shot group of each class: many, medium or few."""
        members = longtail.shot_groups(self.counts)
        name_of = {int(k): name for name in ("many", "medium", "few") for k in members[name]}
        return [name_of[k] for k in range(len(self.counts))]


@dataclasses.dataclass(frozen=True)
class Finished:
    """The content of a finished run's files, checked.

    rows: those of `Workdir.metrics` by kind (`train`, `val`, `modulation`, `warning`), in the order of their steps.
    gallery: None where there is no sound one.
    """

    config: dict[str, Any]
    manifest: dict[str, Any]
    results: dict[str, Any]
    rows: dict[str, list[dict[str, Any]]]
    classes: Classes
    gallery: Gallery | None

    @property
    def split(self) -> str:
        """The split to show."""
        return self.results["split"]

    @property
    def title(self) -> str:
        """What `last` is, in words: pretrained weights have had no epoch."""
        return "as read from the file" if self.results.get("pretrained") else "last epoch"

    @property
    def shown(self) -> dict[str, Any]:
        """The evaluation that the figures show."""
        return shown(self.results)

    def modulation(self) -> dict[str, dict[str, np.ndarray]]:
        """Returns, by site, `step` [T] and `gamma`, `beta` [T, C or K]; what no row has is left out.

        Raises:
          UserError: the rows do not fit each other or the classes.
        """
        sites: dict[str, dict[str, np.ndarray]] = {}
        rows = self.rows["modulation"]
        for site in dict.fromkeys(site for row in rows for site in row.get("sites", {})):
            having = [row for row in rows if site in row.get("sites", {})]
            sites[site] = {"step": np.array([row["step"] for row in having])}
            for parameter in ("gamma", "beta"):
                history = [np.ravel(row["sites"][site].get(parameter) or []) for row in having]
                lengths = {len(entry) for entry in history}
                # A row of another length belongs to another architecture: an old run's file was continued.
                if len(lengths) != 1:
                    raise UserError(f"the metric rows: the length of {parameter} at site '{site}' changes between rows")
                if site == "logits" and not lengths <= {0, len(self.classes.names)}:
                    raise UserError(f"the metric rows: {parameter} at site 'logits' is not of the manifest's classes")
                if lengths != {0}:
                    sites[site][parameter] = np.array(history, np.float64)
        return sites


def shown(results: Mapping[str, Any], which: str = "last") -> dict[str, Any]:
    """Returns the evaluation to show of a run's `last` checkpoint, or of its `best`, which must be there."""
    return results[which][results["split"]]


def read(workdir: Path, folder: Path | None = None, untrained: Start | None = None) -> Finished:
    """Returns the finished run in `workdir`.

    Args:
      workdir: of the run.
      folder: where the results and the gallery are, if not there.
      untrained: in the place of a run's files, the config and manifest of weights that no run trained.

    Raises:
      UserError: a file is missing, damaged, or lacks a field; the message names it.
    """
    run, place = Workdir(workdir), Workdir(folder or workdir)
    where = "the manifest" if untrained else str(run.manifest)
    config, manifest = untrained or (read_object(run.config), read_object(run.manifest, "dataset"))
    results = read_object(place.results, "method", "split")
    counts = _counts(manifest, where)
    names = [str(name) for name in manifest.get("class_names") or range(len(counts))]
    if len(names) != len(counts):
        raise UserError(f"{where}: {len(counts)} class counts but {len(names)} class names")
    for title in ("last", "best"):
        if title == "last" or results.get("best") is not None:
            at = f"{place.results}: {title}.{results['split']}"
            _check_evaluation((results.get(title) or {}).get(results["split"]), len(counts), at)
    kinds: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "modulation": [], "warning": []}
    kinds |= {} if untrained else rows(workdir)
    return Finished(config, manifest, results, kinds, Classes(names, counts), gallery.read(place.gallery))


class Cost(NamedTuple):
    """The time that a run's processes took, seconds.

    total: from their starts to their ends, evaluation and saving included.
    compiling: XLA's.
    step: of one training step, the median over epochs but each process's first; None where no process had two.
    """

    total: float
    compiling: float
    step: float | None


def cost(workdir: Path) -> Cost | None:
    """Returns what the run in `workdir` took; None of one whose process was not accounted (`study.runs`)."""
    lines = Workdir(workdir).read_processes()
    if not lines:
        return None
    steps = [line["step_seconds"] for line in lines if line["step_seconds"]]
    total, compiling = (sum(line[name] for line in lines) for name in ("seconds", "compile_seconds"))
    return Cost(total, compiling, statistics.median(steps) if steps else None)


def warnings(workdir: Path) -> list[str]:
    """Returns what the run in `workdir` was warned of, a sentence each (`health.notices`)."""
    return [str(row.get("sentence")) for row in rows(workdir).get("warning", [])]


def rows(workdir: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns the metric rows of each kind, in the order of their steps; of two of one step and code the later counts.

    Raises:
      UserError: the file is missing or damaged.
    """
    path = Workdir(workdir).metrics
    kinds: dict[str, dict[tuple[float, str], dict[str, Any]]] = {}
    for row in read_objects(path):
        if not isinstance(row.get("step"), int | float):
            raise UserError(f"{path}: a row has no number in field 'step'")
        kinds.setdefault(str(row.get("kind")), {})[row["step"], str(row.get("code", ""))] = row
    return {kind: [found[key] for key in sorted(found)] for kind, found in kinds.items()}


def _counts(manifest: dict[str, Any], where: str) -> np.ndarray:
    """Returns the training images of each class: of the split `train`, or at the top of a manifest without splits."""
    train = (manifest.get("splits") or {}).get("train") or manifest
    counts: Any = train.get("class_counts")
    valid = isinstance(counts, list) and all(isinstance(n, int) and n >= 0 for n in counts)
    if not valid or len(counts) < 2 or not any(counts):
        raise UserError(f"{where}: 'class_counts' of the training split must list the images of each class")
    return np.array(counts, np.int64)


def _check_evaluation(found: Any, classes: int, where: str) -> None:
    """Refuses an evaluation without the lists that figures are drawn from, or of another number of classes."""
    if not isinstance(found, dict):
        raise UserError(f"{where}: missing; write it with mfm_jax.evaluation.metrics.evaluate")
    for key in ("per_class_accuracy", "per_class_images", "confusion", "reliability", "ece"):
        if key not in found:
            raise UserError(f"{where}: no field '{key}'")
    confusion = found["confusion"] or []  # not kept for very many classes
    lengths = {len(row) for row in (found["per_class_accuracy"], *([confusion, *confusion] if confusion else []))}
    if lengths != {classes}:
        raise UserError(f"{where}: is not of the {classes} classes of the manifest")
