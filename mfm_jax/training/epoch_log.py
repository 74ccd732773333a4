"""What an epoch leaves in the log: its means, skipped steps, the modulation, and notices of a meta pass gone wrong."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mfm_jax.bilevel import losses
from mfm_jax.config import Config
from mfm_jax.evaluation import health
from mfm_jax.machine import cluster, parallel
from mfm_jax.training import anomalies
from mfm_jax.training import loop as loop_lib
from mfm_jax.training.anomalies import ANOMALIES, NonFiniteError
from mfm_jax.training.experiment import Experiment
from mfm_jax.training.inputs import Input
from mfm_jax.training.loop import LoopState
from mfm_jax.types import META_METRICS
from mfm_jax.workdir.loggers import Row
from mfm_jax.workdir.logs import MetricLog


class EpochLog:
    """Writes the rows of one epoch after another."""

    def __init__(
        self, log: MetricLog, built: Experiment, config: Config, counts: np.ndarray, way_out: Callable[[], str]
    ):
        """Takes the classes' training images `[K]`, and what the user can do where training cannot go on."""
        self._log, self._experiment, self._config, self._counts, self._way_out = log, built, config, counts, way_out
        whole = parallel.replicated(built.mesh) if built.mesh else None
        self._describe = jax.jit(functools.partial(loop_lib.describe, built), out_shardings=whole)

    def write(self, loop: LoopState, data: Input, step: int, epoch: int) -> LoopState:
        """Logs the epoch that ends at `step`; returns the loop with its sums at zero and no anomaly noted.

        Raises:
          NonFiniteError: every step of the epoch was skipped.
        """
        sums = {name: float(value) for name, value in jax.device_get(loop.sums).items()}
        steps, meta_steps = sums.pop("steps"), sums.pop("meta_steps", 0.0)
        row = {"learning_rate": float(self._experiment.learning_rate(step - 1))}
        if "skipped" in sums:
            loop = self._log_skipped(loop, epoch)
            row["skipped"] = sums.pop("skipped")
            if not steps:
                raise NonFiniteError(f"every step of epoch {epoch} was skipped; {self._way_out()}")
        for name, value in sums.items():
            divisor = meta_steps if name in META_METRICS else steps
            if divisor:
                row[name] = value / divisor
        self._log.write("train", step, epoch, row)
        self._log_modulation(loop, data, step, epoch)
        self._notice(step, epoch)
        return loop.replace(sums=jax.tree.map(jnp.zeros_like, loop.sums))

    def _log_skipped(self, loop: LoopState, epoch: int) -> LoopState:
        for step, anomaly in jax.device_get(loop.bad).tolist():
            if step >= 0:
                self._log.write("skipped", step, epoch, {"because": ANOMALIES[anomaly]})
        return loop.replace(bad=parallel.place(anomalies.none_noted(self._config.train), loop.bad.sharding))

    def _log_modulation(self, loop: LoopState, data: Input, step: int, epoch: int) -> None:
        """Logs gamma and beta at each site, averaged over one training batch."""
        if self._experiment.modulator is None:
            return
        found = jax.device_get(self._describe(loop.bilevel, data))
        sites = {site: found[site] for site in self._experiment.modulator.sites}  # in the order of the config
        values: dict[str, Any] = {s: {name: np.round(v, 6).tolist() for name, v in g.items()} for s, g in sites.items()}
        self._log.write("modulation", step, epoch, {"sites": values})

    @functools.cached_property
    def _guess(self) -> health.Guess:
        counts = self._counts
        equal, by_count = losses.of_guesses(self._experiment.meta_loss, jnp.asarray(counts))
        return health.Guess(equal, by_count, float(counts.max() / counts.sum()))

    def _notice(self, step: int, epoch: int) -> None:
        """Logs, and warns of, what the epoch shows for the first time of a meta pass that has come to nothing."""
        if self._experiment.meta_step is None:
            return
        for code, sentence in health.notices(self._log.rows, self._config, self._guess):
            self._log.write(health.KIND, step, epoch, {"code": code, "sentence": sentence})
            if cluster.is_primary():
                print(f"warning: {sentence}", file=sys.stderr)


def in_words(logs: Sequence[Sequence[Row]], counts: np.ndarray) -> str:
    """Returns what the newest epoch has come to, the mean over runs: its loss, the score on validation, and phi.

    Takes the rows of each run, and the classes' training images `[K]`. phi in a word is the beta of the rarest class
    where logits are modulated, and otherwise the mean size of beta at the last site.
    """
    newest = [{row["kind"]: row for row in rows if row["epoch"] == rows[-1]["epoch"]} for rows in logs]
    mean = lambda kind, of: float(np.mean([of(rows[kind]) for rows in newest]))  # noqa: E731
    words = [f"loss {mean('train', lambda row: row['loss']):.3f}"]
    if "val" in newest[0]:
        words.append(f"balanced on validation {100 * mean('val', lambda row: row['balanced_accuracy']):.1f} %")
    if "modulation" in newest[0]:
        site = [*newest[0]["modulation"]["sites"]][-1]
        if "logits" in newest[0]["modulation"]["sites"]:
            beta = mean("modulation", lambda row: row["sites"]["logits"]["beta"][int(np.argmin(counts))])
            words.append(f"phi: rarest beta {beta:+.1f}")
        else:
            beta = mean("modulation", lambda row: np.abs(row["sites"][site]["beta"]).mean())
            words.append(f"phi: beta at {site} {beta:.2g}")
    return ", ".join(words)
