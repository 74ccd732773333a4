"""Cross-validation over a run's training images: each is answered by a network that was trained without it.

A fold is a run of the same config in a folder of its own. Its split is a manifest: the images that were dealt to the
fold are its validation split, the other training images are trained on, the test split is not read.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mfm_jax.config import Config
from mfm_jax.data import LongTailData, longtail
from mfm_jax.data.manifest import manifest_hash, redrawn, write_manifest
from mfm_jax.errors import UserError
from mfm_jax.study import runs


def dealt(data: LongTailData) -> np.ndarray:
    """Returns the positions of the training images that folds may hold out: all but a held-out meta set."""
    splits = data.manifest["splits"]
    meta = [] if redrawn(data.manifest) else splits["meta"]["ids"]
    return np.flatnonzero(~np.isin(splits["train"]["ids"], meta))


def deal(labels: np.ndarray, copies: Sequence[object], folds: int, seed: int) -> np.ndarray:
    """Returns the fold that holds each image out, int [N]; -1 for one that every fold trains on.

    Each class is dealt to the folds in turn, in a random order, so that they differ by one image a class. Images that
    are equal in `copies` (length N) are in one fold. A class all of whose images would be in one fold, such as a class
    of one, is not held out.
    """
    first: dict[object, int] = {}
    leader = np.array([first.setdefault(key, i) for i, key in enumerate(copies)])
    rng, fold, next_fold = np.random.default_rng(seed), np.full(len(labels), -1), 0
    for k in np.unique(labels):
        members = rng.permutation(np.flatnonzero((labels == k) & (leader == np.arange(len(labels)))))
        fold[members] = (np.arange(len(members)) + next_fold) % folds
        next_fold += len(members)
    fold = fold[leader]
    for k in np.unique(labels):
        if len(np.unique(fold[labels == k])) == 1:
            fold[labels == k] = -1
    return fold


def train(planned: Sequence[runs.Task], jobs: int) -> None:
    """Trains the folds that `plan` returned, `jobs` at a time; finished ones stay, interrupted ones go on.

    Raises:
      UserError: a fold failed.
      Interrupted: as of `runs.train_all`.
    """
    for run, outcome in zip(planned, runs.train_all([[run] for run in planned], jobs), strict=True):
        if outcome.results is None:
            raise UserError(f"{run.label} failed: {outcome.error}")


def plan(config: Config, data: LongTailData, fold: np.ndarray, folder: Path) -> list[runs.Task]:
    """Writes a manifest for each fold to `folder`, made if absent; returns the runs to train there.

    `config` and `data` are the run's, `fold` is what `deal` returned for the images in `dealt`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    planned, folds = [], int(fold.max()) + 1
    # The config must ask for a validation split; the manifest says how large it is.
    settings: dict[str, Any] = {"train_on_meta": False}
    settings |= {"val_fraction": 1 / folds} if config.data.protocol == "natural" else {"val_images_per_class": 1}
    for number in range(folds):
        place = folder / f"fold{number}.manifest.json"
        write_manifest(_manifest(data, fold == number, settings), place)
        of_fold = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, manifest=str(place), **settings),
            eval=dataclasses.replace(config.eval, test=False, recall=""),  # nobody asks a fold for thresholds
        )
        planned.append(runs.Task(f"fold {number}", of_fold, folder / f"fold{number}"))
    return planned


def _manifest(data: LongTailData, held: np.ndarray, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the manifest of a fold: the run's, with other training and validation images."""
    manifest, where = data.manifest, dealt(data)
    ids, labels = np.array(manifest["splits"]["train"]["ids"])[where], data.train_labels[where]
    parts = {"train": (ids[~held], labels[~held]), "val": (ids[held], labels[held])}
    if redrawn(manifest):
        per_class, seed = manifest["meta_images_per_class"], manifest["seed"]
        drawn = np.sort(longtail.redraw_meta(labels[~held], data.num_classes, per_class, seed, 0).ravel())
        parts["meta"] = ids[~held][drawn], labels[~held][drawn]
    changed = {
        name: {
            "pool": manifest["splits"][name]["pool"],
            "class_counts": np.bincount(of_part, minlength=data.num_classes).tolist(),
            "ids": members.tolist(),
        }
        for name, (members, of_part) in parts.items()
    }
    overlaps = manifest["overlaps"] if redrawn(manifest) else []
    found = {**manifest, **settings, "splits": manifest["splits"] | changed, "overlaps": overlaps}
    return {**found, "hash": manifest_hash(found)}
