"""The mean curve of MFM's runs in several settings: the modulator of those that learn none."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mfm_jax.data.manifest import read_manifest
from mfm_jax.machine import disk
from mfm_jax.workdir.files import Workdir, read_objects

Curve = dict[str, float]


def path_of(run: Path) -> list[Curve]:
    """Returns a, b, c of the form `frequency` after each epoch of a run, from gamma and beta of its classes.

    `beta_k = a z_k + c z_k^2 / 10` and `gamma_k = tanh(b z_k / 10)`, with `z_k = log(n_k / n_max)`.
    """
    counts = np.array(read_manifest(Workdir(run).manifest)["splits"]["train"]["class_counts"], float)
    z = np.log(counts / counts.max())
    found = []
    for row in read_objects(Workdir(run).metrics):
        if row["kind"] == "modulation":
            logits = row["sites"]["logits"]
            (a, c), *_ = np.linalg.lstsq(np.stack([z, z**2 / 10], 1), np.array(logits["beta"]), rcond=None)
            (b,), *_ = np.linalg.lstsq(z[:, None] / 10, np.arctanh(np.array(logits["gamma"])), rcond=None)
            found.append({"a": float(a), "b": float(b), "c": float(c)})
    return found


def mean(curves: Sequence[Curve]) -> Curve:
    """Returns the mean of each number."""
    return {name: statistics.fmean(curve[name] for curve in curves) for name in "abc"}


def write(path: Path, curve: Curve, learned: Any) -> None:
    """Writes a file that `modulation.init_from` reads; `learned` says of what the curve is the mean."""
    content = {"phi": {"logits": {name: round(value, 4) for name, value in curve.items()}}, "learned": learned}
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write_object(path, content)
