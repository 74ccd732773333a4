"""The training run: `train_and_evaluate(config, workdir)`.

The host drives the compiled calls of `loop`, looks at their sums about twice a second, and logs, validates and saves at
the end of an epoch. A run that is interrupted and started again with the same command goes on from its last checkpoint
and ends with the same bits.

Selection is honest: epochs are compared on the validation split; the test split is read once, at the end.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from mfm_jax import classifier, cluster, gallery, inputs, metrics, parallel, progress, report, versions
from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax import experiment as experiment_lib
from mfm_jax import feed as feed_lib
from mfm_jax import loop as loop_lib
from mfm_jax.anomalies import ANOMALIES, NonFiniteError
from mfm_jax.checkpoint import Checkpointer, restore_modulator
from mfm_jax.config import Config
from mfm_jax.data import LongTailData, batches
from mfm_jax.epoch_log import EpochLog
from mfm_jax.errors import UserError
from mfm_jax.experiment import Experiment
from mfm_jax.inputs import Input, ResidentSet, StepBatches
from mfm_jax.interruption import EXIT_INTERRUPTED, Interrupted, listening
from mfm_jax.logs import MetricLog, RowList
from mfm_jax.longtail import manifest_hash, read_manifest, write_manifest
from mfm_jax.loop import LoopState
from mfm_jax.methods import METHODS
from mfm_jax.models import native
from mfm_jax.ownership import owned
from mfm_jax.types import BilevelState

EPOCH_EVENT = "/mfm_jax/epoch"  # to listeners of `jax.monitoring`: seconds of an epoch's steps, how many there were


def train_and_evaluate(
    config: ml_collections.ConfigDict | Mapping[str, Any] | Config, workdir: str | Path
) -> dict[str, Any]:
    """Trains as `config` says, in `workdir`, and returns the results.

    A workdir that holds an interrupted run of the same config is resumed; a finished one is returned as it is.
    Leaves `config.json`, `manifest.json`, `classifier.json`, `metrics.jsonl`, `checkpoints/`, `tensorboard/`,
    `results.json` and `report.html`.

    Args:
      config: from a config file, or a dict of the same form.
      workdir: the run's folder; made if absent.

    Returns:
      The content of `results.json`: `last` and `best` (on validation; None without one), each with the metrics of
      `metrics.evaluate` on `val` and `test` (None where there is no such split, or `eval.test` is False), and the
      `calibration` by a temperature that was fitted on validation; `split` is the one to show.

    Raises:
      UserError: a config or data mistake, before training starts; the workdir belongs to another config.
      NonFiniteError: a loss or gradient became non-finite.
      Interrupted: SIGTERM or Ctrl-C; everything is saved.
    """
    config = config if isinstance(config, Config) else config_lib.resolve(config)
    return train_together([config], [Path(workdir)])[0]


def train_together(configs: Sequence[Config], workdirs: Sequence[Path]) -> list[dict[str, Any]]:
    """Trains runs that differ in `train.seed` alone, in one program: the step is mapped over them with `vmap`.

    Each run has its own workdir, checkpoints and results, as if it had been trained by `train_and_evaluate`, and the
    same numbers up to the rounding of batched operations. Small networks leave an accelerator idle; several at once
    fill it.

    Args:
      configs: one a run.
      workdirs: one a run.

    Returns:
      The results of each run.

    Raises:
      UserError: as `train_and_evaluate`, or runs that differ in more than the seed.
      NonFiniteError: a loss or gradient of one of the runs became non-finite.
      Interrupted: SIGTERM or Ctrl-C; all runs are saved.
    """
    for config, workdir in zip(configs, workdirs, strict=True):
        claim_workdir(config, workdir)
        seedless = [dataclasses.replace(c, train=dataclasses.replace(c.train, seed=0)) for c in (configs[0], config)]
        if changed := list(config_lib.differences(*(c.to_dict() for c in seedless))):
            raise UserError(f"runs trained together may differ in train.seed alone, not in {'; '.join(changed)}")
    todo = [pair for pair in zip(configs, workdirs, strict=True) if not (pair[1] / "results.json").exists()]
    if todo:
        with contextlib.ExitStack() as stack:
            for _, workdir in todo if cluster.is_primary() else ():
                stack.enter_context(owned(workdir))
            data = data_lib.build(configs[0])
            fsdp = configs[0].parallel.fsdp
            mesh = parallel.data_mesh(fsdp=fsdp) if jax.device_count() > 1 or fsdp > 1 else None
            on_device = inputs.to_device(data)
            cluster.barrier("all have read the data")
            runs = [
                stack.enter_context(contextlib.closing(_start(config, workdir, data, on_device, mesh)))
                for config, workdir in todo
            ]
            if cluster.is_primary():
                print(progress.summary(configs[0], data))
                print(f"convolutions: {runs[0].convolutions}{f' ({why})' if (why := native.reason()) else ''}")
            stack.enter_context(cluster.bound_together(EXIT_INTERRUPTED))
            # Apart: runs that were interrupted at different steps, and runs with training data of their own making.
            runs.sort(key=lambda run: run.step)
            groups = itertools.groupby(runs, key=lambda run: run.step if run.feed.is_shared else run.workdir)
            for _, group in groups:
                _train(list(group))
            for run in runs:
                results = run.results()
                if cluster.is_primary():
                    write(run.workdir / "results.json", json.dumps(results, indent=1))
    for workdir in workdirs:
        if cluster.is_primary() and not (workdir / "report.html").exists():
            report.write_report(workdir)
    cluster.barrier("written")
    return [read_object(workdir / "results.json") for workdir in workdirs]


def _start(
    config: Config, workdir: Path, data: LongTailData, on_device: ResidentSet | StepBatches, mesh: Mesh | None
) -> "_Run":
    """Returns the run, restored if it was interrupted; leaves its config, manifest and classifier's facts there."""
    experiment = experiment_lib.build(config, data, mesh)
    _check_meta(config, data, experiment)
    check_split(data, workdir)
    run = _Run(config, workdir, data, experiment, on_device)
    path = workdir / "config.json"
    # Before the first config.json what is there is of a start that failed; an older run may go on without any.
    if cluster.is_primary() and not (path.exists() and (workdir / classifier.FILE).exists()):
        write(workdir / classifier.FILE, json.dumps(dataclasses.asdict(classifier.describe(config, data)), indent=1))
    if cluster.is_primary() and not path.exists():  # a mistake found so far leaves the workdir free for another config
        write_manifest(data.manifest, workdir / "manifest.json")
        write(path, json.dumps(config.to_dict(), indent=2))
    cluster.barrier(f"{path} is written")
    cluster.check_agreed(
        f"{config} {data.manifest['hash']} {run.step} {path.exists()}",
        f"--workdir={workdir}: the processes differ in config, data or checkpoints; start all with the same command,"
        " on a file system that they share",
    )
    return run


def write(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file of a workdir.

    Raises:
      UserError: the file is damaged.
    """
    with contextlib.suppress(ValueError):  # not JSON, not text
        if isinstance(content := json.loads(path.read_text()), dict):
            return content
    way_out = "remove it, and it is written again" if path.name == "results.json" else "choose a new --workdir"
    raise UserError(f"{path}: damaged, not a JSON object; {way_out}")


def check_split(data: LongTailData, workdir: Path) -> None:
    """Checks that a run goes on, or is evaluated, with the images that it began with.

    Raises:
      UserError: the manifest in `workdir` is another.
    """
    path = workdir / "manifest.json"
    if not (workdir / "config.json").exists():
        return
    # A folder may have been given another name; what is in it, the version says.
    began, now = (manifest_hash({**manifest, "dataset": ""}) for manifest in (read_manifest(path), data.manifest))
    if began != now:
        raise UserError(f"{path}: the data or its split is not what this run began with; choose a new --workdir")


def claim_workdir(config: Config, workdir: Path) -> None:
    """Makes `workdir` if it is absent.

    Raises:
      UserError: it holds a run of another config (the differences are named), or it is not a folder.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be made: {error.strerror}") from error
    path = workdir / "config.json"
    if path.exists():
        changed = list(config_lib.differences(read_object(path), config.to_dict()))
        if changed:
            raise UserError(f"--workdir={workdir} belongs to another config ({'; '.join(changed)}); choose a new one")


def _check_meta(config: Config, data: LongTailData, experiment: Experiment) -> None:
    """Refuses to keep a modulator that does nothing, and meta batches larger than the meta set."""
    if config.meta.freeze and METHODS[config.method.name].learner:
        if not experiment.modulator:
            raise UserError(
                f"meta.freeze = True: {config.method.name} would learn nothing from the meta set; only mfm can"
            )
        if not config.modulation.init_from:
            raise UserError("meta.freeze = True: would keep a modulator that does nothing; set modulation.init_from")
    if experiment.meta_step and config.meta.batch_size > (images := data.meta_table(0).size):
        raise UserError(
            f"meta.batch_size = {config.meta.batch_size}: the meta set has {images} images; choose at most {images}"
        )


def _train(runs: list["_Run"]) -> None:
    """Trains runs that stand at the same step to their last step, in one program.

    Raises:
      NonFiniteError: a loss or gradient of one of the runs became non-finite.
      Interrupted: the runs are to stop; all are saved.
    """
    config, experiment, feeds = runs[0].config, runs[0].experiment, [run.feed for run in runs]
    step, total, per_epoch = runs[0].step, experiment.total_steps, experiment.steps_per_epoch
    call = loop_lib.make_call(experiment, config, len(runs))
    for run in runs:
        run.began = time.perf_counter()  # others may have been trained since it was made
    with listening() as stopped, progress.TrainingBar(config.method.name, total, step) as bar:
        while step < total:
            epoch, first = step // per_epoch, step
            end = min(total, (epoch + 1) * per_epoch)
            for run in runs:
                run.feed.start_epoch(epoch, step, run.loop.bilevel)
            loop, next_input = loop_lib.stack([run.loop for run in runs]), feed_lib.joined(feeds)
            began = bar.restart()
            while step < end and not stopped(step):
                is_meta = loop_lib.meta_steps(experiment, config, range(step, min(step + feeds[0].steps_per_call, end)))
                kinds = loop_lib.steps(is_meta, retrain=step >= experiment.retrain_from)
                loop = call(loop, next_input(), *kinds)
                step += len(is_meta)
                if bar.is_due():
                    bar.show(step, _look(runs, loop))
            bar.show(step, _look(runs, loop))
            jax.monitoring.record_event_duration_secs(EPOCH_EVENT, time.perf_counter() - began, steps=step - first)
            stop = stopped(step)  # also after the last step: what is left is an evaluation, and time may be short
            settles, validates, saves = _due(config, experiment, epoch, step, has_validation=runs[0].has_validation)
            for run, own in zip(runs, loop_lib.unstack(loop, len(runs)), strict=True):
                run.loop, run.step = own, step
                if step == end:
                    run.log_epoch(epoch)
                    if settles:
                        run.settle()
                    score = run.validate(epoch) if validates else None
                    if saves:
                        run.save(score)
                if stop:
                    run.save(None)
                    run.checkpoints.wait()
            if stop:
                raise Interrupted(f"saved at step {min(run.checkpoints.latest_step() or 0 for run in runs)}")
    for run in runs:
        run.finish()


def _due(
    config: Config, experiment: Experiment, epoch: int, step: int, *, has_validation: bool
) -> tuple[bool, bool, bool]:
    """Returns whether to take statistics anew, to validate and to save after `epoch`, which ends at `step`."""
    final = step == experiment.total_steps
    validate = has_validation and (final or (epoch + 1) % config.eval.every_epochs == 0)
    save = final or validate or (epoch + 1) % config.checkpoint.every_epochs == 0
    # A second stage on a frozen classifier goes on with the statistics that it finds.
    settle = (save and step <= experiment.retrain_from) or step == experiment.retrain_from
    return settle, validate, save


def _look(runs: list["_Run"], loop: LoopState) -> float:
    """Waits for the device, checks that all is finite, and returns the mean loss of the epoch so far."""
    found = jax.device_get((loop.bad, loop.sums["loss"], loop.sums["steps"]))
    if len(runs) == 1:
        found = jax.tree.map(lambda leaf: leaf[None], found)
    losses = []
    for run, bad, loss, steps in zip(runs, *found, strict=True):
        run.check_sound(bad)
        losses.append(float(loss) / max(float(steps), 1))
    return sum(losses) / len(losses)


class _Run:
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
        self.mesh = experiment.mesh
        self.has_validation = len(data.val_labels) > 0
        self.checkpoints = Checkpointer(workdir, config.checkpoint, has_validation=self.has_validation)
        self.feed = feed_lib.make(data, experiment, config, on_device)
        self.convolutions = native.lowering(config.train.dtype) if config.parallel.fsdp == 1 else "xla"
        self.step, self.loop, record = self._restored()
        self.versions = versions.versions()  # before the first step: whatever fails here loses no training
        self.log = MetricLog(workdir, record["rows"]) if cluster.is_primary() else RowList(record["rows"])
        self.epoch_log = EpochLog(self.log, experiment, config, data.counts, self._way_out)
        self.seconds_before, self.began = record["seconds"], time.perf_counter()
        self.train_seconds = record["seconds"]
        self.told_step = -1  # the last skipped step that was told
        self._settled = loop_lib.make_settle(experiment)
        whole = parallel.replicated(self.mesh) if self.mesh else None
        self.eval_step = jax.jit(functools.partial(loop_lib.evaluate_batch, experiment.eval_step), out_shardings=whole)

    def _restored(self) -> tuple[int, LoopState, dict[str, Any]]:
        """Returns the step, the loop and the record of the last checkpoint, or those of a start."""
        config, experiment, latest = self.config, self.experiment, self.checkpoints.latest_step()
        loop = loop_lib.initial(experiment, config.train, anew=latest is None)
        mesh = experiment.mesh
        loop = parallel.place(loop, parallel.state_sharding(loop, mesh) if mesh else inputs.everywhere(None))
        if latest is not None:
            loop, record = self.checkpoints.restore(latest, loop)
            same = " batches and their order stay the same,"
            progress.say_change(latest, "on", versions.devices(), record["devices"], same)
            progress.say_change(latest, "with convolutions by", self.convolutions, record.get("convolutions", "xla"))
            return latest, loop, record
        if experiment.modulator and config.modulation.init_from:
            state = loop.bilevel
            loaded = restore_modulator(Path(config.modulation.init_from), state.mod_params)
            loop = loop.replace(bilevel=state.replace(mod_params=loaded))
        return 0, loop, {"rows": [], "seconds": 0.0}

    @property
    def device_data(self) -> Input:
        """What the last step has read."""
        return self.feed.data

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
        values = self.evaluate(self.loop.bilevel, "val")
        scalars = {name: value for name, value in values.items() if isinstance(value, float)}
        self.log.write("val", self.step, epoch, scalars)
        return values["balanced_accuracy"]

    def save(self, score: float | None) -> None:
        record = {"rows": list(self.log.rows), "seconds": self.seconds(), "devices": versions.devices()}
        record["convolutions"] = self.convolutions
        self.checkpoints.save(self.step, self.loop, self.loop.bilevel.mod_params, record, score)

    def check_sound(self, bad: np.ndarray) -> None:
        """Warns of the steps that were skipped since the last look; `bad` is `LoopState.bad`.

        Raises:
          NonFiniteError: the loop has met an anomaly, and is not to skip it.
        """
        for step, anomaly in bad.tolist():
            if self.config.train.on_nonfinite == "stop" and step >= 0:
                raise NonFiniteError(f"{ANOMALIES[anomaly]} at step {step}; {self._way_out()}")
            if step > self.told_step and cluster.is_primary():
                print(f"warning: {ANOMALIES[anomaly]} at step {step}; skipped", file=sys.stderr)
                self.told_step = step

    def _way_out(self) -> str:
        self.checkpoints.wait()
        last = self.checkpoints.latest_step()
        kept = "no checkpoint was written before" if last is None else f"the checkpoint of step {last} is kept"
        return f"{kept}; lower optim.learning_rate or meta.learning_rate, or set optim.clip_norm"

    def probabilities(self, state: BilevelState, split: str) -> np.ndarray:
        """Returns the plain classifier's probabilities `[N, K]` on the split `val` or `test`."""
        images = getattr(self.data, f"{split}_images")
        probabilities, devices = [], self.mesh.shape[parallel.AXIS] if self.mesh else 1
        size = -(-self.config.eval.batch_size // devices) * devices
        for image, mask in batches.eval_batches(images, size, self.config.data.workers):
            part = parallel.place(image, parallel.split(self.mesh)) if self.mesh else image
            out = self.eval_step(state, part, self.device_data)
            probabilities.append(np.asarray(out)[mask])
        return np.concatenate(probabilities)

    def evaluate(self, state: BilevelState, split: str) -> dict[str, Any]:
        """Returns `metrics.evaluate` of the plain classifier on the split `val` or `test`."""
        return self._evaluation(self.probabilities(state, split), split)

    def _evaluation(self, found: np.ndarray, split: str, *, show: bool = False) -> dict[str, Any]:
        """Returns `metrics.evaluate` of a split's probabilities; with `show`, leaves some pictures for the report."""
        labels = getattr(self.data, f"{split}_labels")
        counts = self.data.counts  # shot groups go by what is trained on
        chosen = gallery.choose(found, labels, counts) if show else ()
        if len(chosen) and cluster.is_primary():
            images = np.stack([getattr(self.data, f"{split}_images")[i] for i in chosen])
            shown = gallery.Gallery(images, labels[chosen], found[chosen].argmax(1), found[chosen].max(1))
            gallery.write(self.workdir / report.GALLERY, shown)
        return metrics.evaluate(found, labels, counts)

    def results(self) -> dict[str, Any]:
        """Evaluates the last and the best-on-validation state; the one time that the test split is read."""
        last = self._result(self.loop.bilevel, self.step, show=True)
        scores = [row["balanced_accuracy"] for row in self.log.rows if row["kind"] == "val"]
        best_step = self.checkpoints.best_step(max(scores, default=0.0))
        best = None
        if best_step is not None:
            same = best_step == self.step
            best = last if same else self._result(self.checkpoints.restore(best_step, self.loop)[0].bilevel, best_step)
        return {
            "method": self.config.method.name,
            "seed": self.config.train.seed,
            "split": "test" if self.config.eval.test else "val",
            "last": last,
            "best": best,
            "train_seconds": self.train_seconds,
            "input_wait": self.feed.waited() if self.feed else 0.0,
            "versions": self.versions,
        }

    def _result(self, state: BilevelState, step: int, *, show: bool = False) -> dict[str, Any]:
        wanted = {"val": self.has_validation, "test": self.config.eval.test}
        found = {split: self.probabilities(state, split) for split, is_there in wanted.items() if is_there}
        *_, shown = found
        evaluations = {s: self._evaluation(p, s, show=show and s == shown) for s, p in found.items()}
        return {
            "step": step,
            "epoch": -(-step // self.experiment.steps_per_epoch),
            **{split: evaluations.get(split) for split in wanted},
            "calibration": self._calibration(found) if self.has_validation else None,
        }

    def _calibration(self, found: dict[str, np.ndarray]) -> dict[str, Any]:
        """Returns the temperature that suits validation best, and each split's calibration error with it."""
        labels = {split: getattr(self.data, f"{split}_labels") for split in found}
        temperature = metrics.fit_temperature(found["val"], labels["val"])
        errors = {}
        for split, probabilities in found.items():
            scaled = metrics.with_temperature(probabilities, temperature)
            bins = metrics.reliability_bins(scaled.max(axis=1), scaled.argmax(axis=1) == labels[split])
            errors[split] = metrics.expected_calibration_error(bins)
        return {"temperature": temperature, "ece": errors}
