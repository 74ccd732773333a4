"""One run's host side: it restores, logs, validates, saves and evaluates; `train` says when."""

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mfm_jax.config import Config
from mfm_jax.data import LongTailData, batches
from mfm_jax.errors import UserError
from mfm_jax.evaluation import decisions, facts, gallery, tested
from mfm_jax.evaluation import results as results_lib
from mfm_jax.evaluation.classifier import Classifier
from mfm_jax.evaluation.results import Answers, Asked
from mfm_jax.machine import cluster, parallel, versions
from mfm_jax.models import native
from mfm_jax.training import feed as feed_lib
from mfm_jax.training import inputs, progress
from mfm_jax.training import loop as loop_lib
from mfm_jax.training.anomalies import ANOMALIES, NonFiniteError
from mfm_jax.training.epoch_log import EpochLog
from mfm_jax.training.experiment import Experiment
from mfm_jax.training.inputs import Input, ResidentSet, StepBatches
from mfm_jax.training.loop import LoopState
from mfm_jax.types import BilevelState
from mfm_jax.workdir import loggers, modulators
from mfm_jax.workdir.checkpoint import Checkpointer
from mfm_jax.workdir.files import Workdir
from mfm_jax.workdir.loggers import Row
from mfm_jax.workdir.logs import MetricLog


class Run:
    """One run's host side: restores, logs, saves, evaluates."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        data: LongTailData,
        experiment: Experiment,
        on_device: ResidentSet | StepBatches,
    ):
        self.config, self.workdir, self.data, self.experiment = config, workdir, data, experiment
        self.mesh, self.facts = experiment.mesh, facts.describe(config, data)
        self.has_validation = len(data.val_labels) > 0
        self.checkpoints = Checkpointer(workdir, config.checkpoint, has_validation=self.has_validation)
        self.feed = feed_lib.make(data, experiment, config, on_device)
        self.convolutions = native.lowering(tested.dtype(config)) if config.parallel.fsdp == 1 else "xla"
        self.step, self.loop, record = self._restored()
        # Before the first step: whatever fails here loses no training.
        self.versions = versions.versions() | {"convolutions": self.convolutions}
        self.log = self._log(record["rows"])
        self.epoch_log = EpochLog(self.log, experiment, config, data.counts, self._way_out)
        self.seconds_before, self.began = record["seconds"], time.perf_counter()
        self.train_seconds = record["seconds"]
        self._warned_of = -1  # the last skipped step that a warning names
        self._settled = loop_lib.make_settle(experiment)
        whole = parallel.replicated(self.mesh) if self.mesh else None
        self.predict = functools.partial(loop_lib.evaluate_batch, experiment.tested.probabilities)
        self.eval_step = jax.jit(self._of_each, out_shardings=whole)
        self._on_validation = self.asked("val")

    def _restored(self) -> tuple[int, LoopState, dict[str, Any]]:
        """Returns the step, the loop and the record of the last checkpoint, or those of a start."""
        config, experiment, latest = self.config, self.experiment, self.checkpoints.latest_step()
        loop = loop_lib.initial(experiment, config.train, anew=latest is None)
        mesh = experiment.mesh
        loop = parallel.place(loop, parallel.state_sharding(loop, mesh) if mesh else inputs.everywhere(None))
        if latest is not None:
            loop, record = self.checkpoints.restore(latest, loop)
            if experiment.teacher and record["teacher"] != experiment.teacher.digest:
                raise UserError(
                    f"method.teacher = {config.method.teacher!r}: its classifier is not the one that the run in"
                    f" {self.workdir} began with; bring that back, or choose a new --workdir"
                )
            same = " batches and their order stay the same,"
            progress.say_change(latest, "on", versions.devices(), record["devices"], same)
            progress.say_change(latest, "with convolutions by", self.convolutions, record.get("convolutions", "xla"))
            return latest, loop, record
        if experiment.modulator and config.modulator_from:
            state = loop.bilevel
            loaded = modulators.phi(config.modulator_from, state.phi, experiment.phi_kind)
            loop = loop.replace(bilevel=state.replace(phi=loaded))
        return 0, loop, {"rows": [], "seconds": 0.0}

    def _log(self, rows: list[Row]) -> MetricLog:
        """Returns the log of metrics, which goes on after `rows`; on the primary process alone it writes."""
        if not cluster.is_primary():
            return MetricLog(None, rows)
        named = loggers.opened(self.config, self.workdir, len(rows))
        return MetricLog(self.workdir, rows, named, tensorboard="tensorboard" in self.config.train.logger_names)

    def hand_over(self, results: dict[str, Any]) -> None:
        """Gives the loggers what a complete run has come to: its final metrics, config and report."""
        files = Workdir(self.workdir)
        there = [file for file in (files.config, files.report) if file.exists()]
        self.log.finish(loggers.summary(results), there)

    def close(self) -> None:
        self.feed.close()
        self.log.close()
        self.checkpoints.close()

    def finish(self) -> None:
        """Waits for the last checkpoint, stops the clock, and ends the processes that decode.

        Raises:
          UserError: it could not be saved.
        """
        self.feed.close()
        self.checkpoints.wait()
        if self.checkpoints.latest_step() != self.step:
            raise UserError(
                f"--workdir={self.workdir}: the last checkpoint could not be saved; make room, and run the same command"
                " to go on"
            )
        self.train_seconds = self.seconds()

    def seconds(self) -> float:
        """Seconds of training so far, those before an interruption included."""
        return self.seconds_before + time.perf_counter() - self.began

    def log_epoch(self, epoch: int) -> None:
        """Logs the epoch that has ended, and begins the sums of the next."""
        self.loop = self.epoch_log.write(self.loop, self.feed.data, self.step, epoch)

    def settle(self) -> None:
        """Takes batch statistics anew (`loop.make_settle`)."""
        self.loop = self.loop.replace(bilevel=self._settled(self.loop.bilevel, self.feed.data))

    def validate(self, epoch: int) -> float:
        """Logs what the validation split says, and returns the score by which epochs are compared."""
        tested = self.classifier(self.loop.bilevel, self.step)
        values = results_lib.evaluate(tested, self._on_validation(tested))
        scalars = {name: value for name, value in values.items() if isinstance(value, float)}
        self.log.write("val", self.step, epoch, scalars)
        return values["balanced_accuracy"]

    def save(self, score: float | None) -> None:
        record = {"rows": list(self.log.rows), "seconds": self.seconds(), "devices": versions.devices()}
        record |= {"convolutions": self.convolutions, "phi": self.experiment.phi_kind}
        record |= {"teacher": self.experiment.teacher.digest} if self.experiment.teacher else {}
        self.checkpoints.save(self.step, self.loop, self.loop.bilevel.phi, record, score)

    def saved(self) -> int:
        """Saves where the run stands, if that is not saved yet; returns the step of the last checkpoint."""
        self.save(None)
        self.checkpoints.wait()
        return self.checkpoints.latest_step() or 0

    def check_sound(self, bad: np.ndarray) -> None:
        """Warns of the steps that were skipped since the last look; `bad` is `LoopState.bad`.

        Raises:
          NonFiniteError: the loop has met an anomaly, and is not to skip it.
        """
        for step, anomaly in bad.tolist():
            if self.config.train.on_nonfinite == "stop" and step >= 0:
                raise NonFiniteError(f"{ANOMALIES[anomaly]} at step {step}; {self._way_out()}")
            if step > self._warned_of and cluster.is_primary():
                print(f"warning: {ANOMALIES[anomaly]} at step {step}; skipped", file=sys.stderr)
                self._warned_of = step

    def _way_out(self) -> str:
        self.checkpoints.wait()
        last = self.checkpoints.latest_step()
        kept = "no checkpoint was written before" if last is None else f"the checkpoint of step {last} is kept"
        return f"{kept}; lower optim.learning_rate or meta.learning_rate, or set optim.clip_norm"

    def classifier(self, state: BilevelState, step: int) -> Classifier:
        """Returns the classifier that is tested, with the weights of `state`."""

        def probabilities(images: np.ndarray) -> np.ndarray:
            if self.mesh and isinstance(images, np.ndarray):
                images = parallel.place(images, parallel.split(self.mesh))
            return np.asarray(self.eval_step(state, images, self.feed.data))

        def forward(images: jax.Array) -> jax.Array:
            return self.predict(state, images, self.feed.data)

        by_cost = decisions.of(self.config.eval.costs, self.facts.class_names)
        return Classifier(self.facts, self.config, step, forward, probabilities, decisions=by_cost)

    def _of_each(self, state: BilevelState, images: jax.Array, data: Input) -> jax.Array:
        return batches.each(lambda batch: self.predict(state, batch, data), images)

    def asked(self, split: str, watch: Callable[..., Any] = lambda parts, text, total: parts) -> Asked:
        """Returns the question for a split, in batches that divide by the devices."""
        devices = self.mesh.shape[parallel.AXIS] if self.mesh else 1
        size = -(-self.config.eval.batch_size // devices) * devices
        where = parallel.split(self.mesh, axis=1) if self.mesh else inputs.everywhere(None)
        at_once = loop_lib.at_once(self.config, getattr(self.data, f"{split}_images"))
        put = functools.partial(parallel.place, sharding=where) if at_once else None
        return results_lib.on_split(self.data, split, size, self.config.data.workers, watch=watch, put=put)

    def results(self) -> dict[str, Any]:
        """Evaluates the last and the best-on-validation state; the one time that the test split is read."""
        last, best = self.classifier(self.loop.bilevel, self.step), None
        scores = [row["balanced_accuracy"] for row in self.log.rows if row["kind"] == "val"]
        if (step := self.checkpoints.best_step(max(scores, default=0.0))) is not None:
            same = step == self.step
            best = last if same else self.classifier(self.checkpoints.restore(step, self.loop)[0].bilevel, step)
        split = self.data.shown(test=self.config.eval.test)
        wanted = {"val": self.has_validation, "test": self.config.eval.test} | {split: True}
        asked = {split: self.asked(split, progress.track) if is_there else None for split, is_there in wanted.items()}

        def show(answers: Answers) -> None:
            if cluster.is_primary():
                images, place = getattr(self.data, f"{split}_images"), Workdir(self.workdir).gallery
                gallery.write(place, images, answers.labels, answers.probabilities, self.data.counts)

        noise = {}
        if len(self.data.wrong_labels):
            noise["label_noise"] = results_lib.of_wrong_labels(self.data, self.asked("wrong")(last))
        return results_lib.of_run(last, best, asked, split, calibrate=True, show=show) | {
            **noise,
            "restarts": [epoch * self.experiment.steps_per_epoch for epoch in self.config.optim.restart_epochs],
            "train_seconds": self.train_seconds,
            "input_wait": self.feed.waited(),
            "versions": self.versions,
            "provenance": versions.provenance(),
        }
