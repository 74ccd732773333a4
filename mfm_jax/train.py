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
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh
from rich import progress

from mfm_jax import cluster, disk, facts, gallery, health, losses, parallel, preflight, recipe, report
from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax import experiment as experiment_lib
from mfm_jax import loop as loop_lib
from mfm_jax import results as results_lib
from mfm_jax.checkpoint import Checkpointer, restore_phi
from mfm_jax.classifier import Classifier
from mfm_jax.config import Config
from mfm_jax.data import LongTailData
from mfm_jax.data.streaming import Streamed
from mfm_jax.errors import UserError
from mfm_jax.experiment import Experiment
from mfm_jax.feed import Feed
from mfm_jax.interruption import EXIT_INTERRUPTED, Interrupted, listening
from mfm_jax.logs import MetricLog
from mfm_jax.loop import DeviceData, LoopState
from mfm_jax.manifest import factor_in_words
from mfm_jax.models import native
from mfm_jax.results import Answers, Asked
from mfm_jax.types import META_METRICS, BilevelState
from mfm_jax.versions import versions
from mfm_jax.workdir import Workdir, read_object

EPOCH_EVENT = "/mfm_jax/epoch"  # to listeners of `jax.monitoring`: seconds of an epoch's steps, how many there were
_SYNC_SECONDS = 0.5
_SYNC_CALLS = 20


class NonFiniteError(UserError):
    """A loss or gradient became infinite or NaN; the checkpoints before it are untouched."""


def train_and_evaluate(
    config: ml_collections.ConfigDict | Mapping[str, Any] | Config, workdir: str | Path
) -> dict[str, Any]:
    """Trains as `config` says, in `workdir`, and returns the results.

    A workdir that holds an interrupted run of the same config is resumed; a finished one is returned as it is.
    Leaves the files that `Workdir` names.

    Args:
      config: from a config file, or a dict of the same form.
      workdir: the run's folder; made if absent.

    Returns:
      The content of `results.json` (`results.of_run`): `last` and `best` (on validation; None without one), each with
      the metrics of `metrics.evaluate` on `val` and `test` (None where there is no such split, or `eval.test` is
      False), and the `calibration` by a temperature that was fitted on validation; `split` is the one to show.

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
        Workdir(workdir).claim(config)
        seedless = [dataclasses.replace(c, train=dataclasses.replace(c.train, seed=0)) for c in (configs[0], config)]
        if changed := list(config_lib.differences(*(c.to_dict() for c in seedless))):
            raise UserError(f"runs trained together may differ in train.seed alone, not in {'; '.join(changed)}")
    todo = [pair for pair in zip(configs, workdirs, strict=True) if not Workdir(pair[1]).results.exists()]
    if todo:
        with contextlib.ExitStack() as stack:
            for _, workdir in todo if cluster.is_primary() else ():
                stack.enter_context(Workdir(workdir).owned())
            data = data_lib.build(configs[0])
            fsdp = configs[0].parallel.fsdp
            mesh = parallel.data_mesh(fsdp=fsdp) if jax.device_count() > 1 or fsdp > 1 else None
            device_data = loop_lib.to_device(data)
            cluster.barrier("all have read the data")
            runs = [
                stack.enter_context(contextlib.closing(_start(config, workdir, data, device_data, mesh)))
                for config, workdir in todo
            ]
            if cluster.is_primary():
                print(_summary(configs[0], data))
                print(f"convolutions: {runs[0].convolutions}{f' ({why})' if (why := native.reason()) else ''}")
            stack.enter_context(cluster.bound_together(EXIT_INTERRUPTED))
            # Apart: runs that were interrupted at different steps, and runs with training data of their own making.
            runs.sort(key=lambda run: run.step)
            groups = itertools.groupby(runs, key=lambda run: run.workdir if run.has_own_data else run.step)
            for _, group in groups:
                _drive(list(group))
            for run in runs:
                results = run.results()
                if cluster.is_primary():
                    disk.write_object(Workdir(run.workdir).results, results)
    for workdir in workdirs:
        if cluster.is_primary() and not Workdir(workdir).report.exists():
            report.write_report(workdir)
    cluster.barrier("written")
    return [read_object(Workdir(workdir).results) for workdir in workdirs]


def _start(config: Config, workdir: Path, data: LongTailData, device_data: DeviceData, mesh: Mesh | None) -> "_Run":
    """Returns the run, restored if it was interrupted; leaves its config, manifest and classifier's facts there."""
    experiment, files = experiment_lib.build(config, data, mesh), Workdir(workdir)
    preflight.check_meta(config, data)
    files.check_split(data.manifest)
    run = _Run(config, workdir, data, experiment, device_data, mesh)
    if cluster.is_primary():  # not before: after a mistake so far the workdir is free for another config
        files.begin(config, data.manifest, dataclasses.asdict(run.facts))
    cluster.barrier(f"{files.config} is written")
    cluster.check_agreed(
        f"{config} {data.manifest['hash']} {run.step} {files.config.exists()}",
        f"--workdir={workdir}: the processes differ in config, data or checkpoints; start all with the same command,"
        " on a file system that they share",
    )
    return run


def _summary(config: Config, data: LongTailData) -> str:
    """Returns one line on the data: which set, which protocol, how many images, where they are."""
    counts, parts = data.counts, [len(x) for x in (data.train_labels, data.val_labels, data.test_labels)]
    where = "streamed" if isinstance(data.train_images, Streamed) else "resident"
    factor = factor_in_words(data.manifest)
    if config.data.protocol == "natural" and config.data.imbalance_factor > 1:
        factor += " (1 takes all images)"
    duplicates = data.manifest.get("duplicates_in_test", {})
    told = "".join(f" {n} test images with a duplicate outside ({kind});" for kind, n in duplicates.items())
    return (
        f"{data.name} {data.version}, protocol {config.data.protocol}, imbalance factor {factor}:"
        f" {parts[0]} training images ({counts.max()}..{counts.min()} a class),"
        f" {min(data.manifest['splits']['meta']['class_counts'])} meta a class, {parts[1]} validation, {parts[2]} test;"
        f" {'x'.join(map(str, data.train_images.shape[1:]))}, {where};{told}"
        f" manifest {data.manifest['hash'].removeprefix('sha256:')[:12]}"
    )


def _drive(runs: list["_Run"]) -> None:
    """Trains runs that stand at the same step to their last step, in one program."""
    first = runs[0]
    total, per_epoch = first.experiment.total_steps, first.experiment.steps_per_epoch
    call = loop_lib.make_call(first.experiment, first.config, len(runs))
    for run in runs:
        run.began = time.perf_counter()  # others may have been trained since it was made
    with listening() as stopped, _progress_bar() as bar:
        task = bar.add_task(first.config.method.name, total=total, completed=first.step, loss="")
        while first.step < total:
            epoch = first.step // per_epoch
            _run_epoch(runs, call, epoch, min(total, (epoch + 1) * per_epoch), bar, task, stopped)
    for run in runs:
        run.finish()


def _run_epoch(
    runs: list["_Run"], call: Callable, epoch: int, end: int, bar: progress.Progress, task: Any, stopped: Callable
) -> None:
    """Runs from the present step to step `end` of `epoch`, then logs, validates and saves what is due."""
    for run in runs:
        run.start_epoch(epoch)
    loop, data = loop_lib.stack([run.loop for run in runs], [run.device_data for run in runs])
    step, calls, looked = runs[0].step, 0, time.perf_counter()
    first, began = step, looked
    while step < end and not stopped(step):
        is_meta, retrain = runs[0].next_steps(step, end), step >= runs[0].experiment.retrain_from
        if runs[0].feed:
            data = runs[0].device_data = runs[0].feed.next()
        loop = call(loop, data, *loop_lib.steps(is_meta, retrain=retrain))
        step, calls = step + len(is_meta), calls + 1
        if _is_due(calls, looked):
            bar.update(task, completed=step, loss=f"loss {_look(runs, loop):.3f}")
            looked = time.perf_counter()
    bar.update(task, completed=step, loss=f"loss {_look(runs, loop):.3f}")
    jax.monitoring.record_event_duration_secs(EPOCH_EVENT, time.perf_counter() - began, steps=step - first)
    stop = stopped(step)  # also after the last step: what is left is an evaluation, and time may be short
    for run, own in zip(runs, loop_lib.unstack(loop, len(runs)), strict=True):
        run.loop, run.step = own, step
        if step == end:
            run.end_epoch(epoch)
        if stop:
            run.save(None)
            run.checkpoints.wait()
    if stop:
        raise Interrupted(f"saved at step {min(run.checkpoints.latest_step() or 0 for run in runs)}")


def _is_due(calls: int, looked: float) -> bool:
    """Whether to look at the device: by the clock, or, where processes must agree, at every so many calls."""
    if jax.process_count() > 1:
        return calls % _SYNC_CALLS == 0
    return time.perf_counter() - looked > _SYNC_SECONDS


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
        device_data: DeviceData,
        mesh: Mesh | None,
    ):
        self.config, self.workdir, self.data, self.experiment = config, workdir, data, experiment
        self.facts = facts.describe(config, data)
        self.has_validation = len(data.val_labels) > 0
        self.checkpoints = Checkpointer(workdir, config.checkpoint, has_validation=self.has_validation)
        latest = self.checkpoints.latest_step()
        self.loop, self.device_data = loop_lib.initial(experiment, config.train, anew=latest is None), device_data
        # Placed once and for all, one device included: what is not would count as another program at the second call.
        place = parallel.replicated(mesh) if mesh else jax.sharding.SingleDeviceSharding(jax.devices()[0])
        self.device_data = parallel.place(self.device_data, place)
        self.loop = parallel.place(self.loop, parallel.state_sharding(self.loop, mesh) if mesh else place)
        self.convolutions = native.lowering(config.train.dtype) if config.parallel.fsdp == 1 else "xla"
        record: dict[str, Any] = {"rows": [], "seconds": 0.0, "devices": _devices()}
        if latest is None and experiment.modulator and config.modulation.init_from:
            state = self.loop.bilevel
            loaded = restore_phi(Path(config.modulation.init_from), state.phi, experiment.phi_kind)
            self.loop = self.loop.replace(bilevel=state.replace(phi=loaded))
        if latest is not None:
            self.loop, record = self.checkpoints.restore(latest, self.loop)
            _tell_elastic(latest, record["devices"])
            _tell_convolutions(latest, self.convolutions, record.get("convolutions", "xla"))
        self.step = latest or 0
        streamed = isinstance(data.train_images, Streamed)
        self.feed = Feed(data, config, mesh, self.device_data) if streamed else None
        self.has_own_data = experiment.synthetic or self.feed is not None  # not shared by runs that differ in the seed
        self.versions = versions()  # before the first step: whatever fails here loses no training
        self.log = MetricLog(workdir if cluster.is_primary() else None, record["rows"])
        self.seconds_before, self.began = record["seconds"], time.perf_counter()
        self.train_seconds = record["seconds"]
        self.told_step = -1  # the last skipped step that was told
        self.mesh, whole = mesh, parallel.replicated(mesh) if mesh else None
        self.settle = loop_lib.make_settle(experiment)
        self.describe = jax.jit(functools.partial(loop_lib.describe, experiment), out_shardings=whole)
        self.predict = functools.partial(loop_lib.evaluate_batch, experiment.tested.probabilities)
        self.eval_step = jax.jit(self.predict, out_shardings=whole)

    def close(self) -> None:
        if self.feed:
            self.feed.close()
        self.log.close()
        self.checkpoints.close()

    def finish(self) -> None:
        """Waits for the last checkpoint, stops the clock, and ends the processes that decode.

        Raises:
          UserError: it could not be saved.
        """
        if self.feed:
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

    def start_epoch(self, epoch: int) -> None:
        """Puts the epoch's order on the device: a function of the seed and the epoch."""
        key = jax.random.fold_in(jax.random.key(self.config.train.seed), 1)
        order = self.experiment.order(key, epoch)
        table = jnp.asarray(self.data.meta_table(epoch), jnp.int32)
        if self.feed:
            start = epoch * len(order)
            wanted = np.asarray(order)[: self.experiment.total_steps - start]
            steps = [step if self.is_meta(step) else None for step in range(start, start + len(wanted))]
            meta = loop_lib.meta_order(self.loop.bilevel.key, steps, table, self.config.meta.batch_size)
            self.feed.start_epoch(epoch, wanted, meta, self.step - start)
            return
        if self.experiment.synthetic and self.step >= self.experiment.retrain_from:
            self._store_features()
        sharding = self.device_data.images.sharding
        order, table = parallel.place((order, table), sharding)
        self.device_data = self.device_data.replace(order=order, meta_table=table)

    def _store_features(self) -> None:
        """Puts the frozen classifier's features in the place of the images, once."""
        if self.device_data.images.ndim > 2:
            neighbors, seed = self.config.method.smote_neighbors, self.config.train.seed
            self.device_data = loop_lib.synthetic_data(
                self.experiment, self.device_data, self.loop.bilevel, neighbors, seed, self.config.eval.batch_size
            )

    def next_steps(self, step: int, end: int) -> tuple[bool, ...]:
        """Returns, for each step of the next call, whether it is a meta-step."""
        count = self.config.train.steps_per_call or (1 if jax.default_backend() == "cpu" else 10)
        return tuple(self.is_meta(step) for step in range(step, min(step + (1 if self.feed else count), end)))

    def is_meta(self, step: int) -> bool:
        meta, first = self.config.meta, self.config.meta.start_epoch * self.experiment.steps_per_epoch
        return self.experiment.meta_step is not None and step >= first and step % meta.every == 0

    def end_epoch(self, epoch: int) -> None:
        step, config, final = self.step, self.config, self.step == self.experiment.total_steps
        sums = {name: float(value) for name, value in jax.device_get(self.loop.sums).items()}
        steps, meta_steps = sums.pop("steps"), sums.pop("meta_steps", 0.0)
        row = {"learning_rate": float(self.experiment.learning_rate(step - 1))}
        if "skipped" in sums:
            self._log_skipped(epoch)
            row["skipped"] = sums.pop("skipped")
            if not steps:
                raise NonFiniteError(f"every step of epoch {epoch} was skipped; {self._way_out()}")
        for name, value in sums.items():
            divisor = meta_steps if name in META_METRICS else steps
            if divisor:
                row[name] = value / divisor
        self.log.write("train", step, epoch, row)
        self._log_modulation(step, epoch)
        self._notice(step, epoch)
        self.loop = self.loop.replace(sums=jax.tree.map(jnp.zeros_like, self.loop.sums))
        validates = self.has_validation and (final or (epoch + 1) % config.eval.every_epochs == 0)
        saves = final or validates or (epoch + 1) % config.checkpoint.every_epochs == 0
        # A second stage on a frozen classifier goes on with the statistics that it finds.
        if (saves and step <= self.experiment.retrain_from) or step == self.experiment.retrain_from:
            self.loop = self.loop.replace(bilevel=self.settle(self.loop.bilevel, self.device_data))
        score = None
        if validates:
            tested = self.classifier(self.loop.bilevel, step)
            values = results_lib.evaluate(tested, self.asked("val")(tested))
            score = values["balanced_accuracy"]
            scalars = {name: value for name, value in values.items() if isinstance(value, float)}
            self.log.write("val", step, epoch, scalars)
        if saves:
            self.save(score)

    def _log_modulation(self, step: int, epoch: int) -> None:
        """Logs gamma and beta at each site, averaged over one training batch."""
        if self.experiment.modulator is None:
            return
        found = jax.device_get(self.describe(self.loop.bilevel, self.device_data))
        sites = {site: found[site] for site in self.experiment.modulator.sites}  # in the order of the config
        values = {s: {name: np.round(v, 6).tolist() for name, v in g.items()} for s, g in sites.items()}
        self.log.write("modulation", step, epoch, {"sites": values})

    @functools.cached_property
    def guess(self) -> health.Guess:
        counts = self.data.counts
        equal, by_count = losses.of_guesses(recipe.meta_loss(self.config), jnp.asarray(counts))
        return health.Guess(equal, by_count, float(counts.max() / counts.sum()))

    def _notice(self, step: int, epoch: int) -> None:
        """Logs and tells what the epoch shows for the first time of a meta pass that has come to nothing."""
        if self.experiment.meta_step is None:
            return
        for code, sentence in health.notices(self.log.rows, self.config, self.guess):
            self.log.write(health.KIND, step, epoch, {"code": code, "sentence": sentence})
            if cluster.is_primary():
                print(f"warning: {sentence}", file=sys.stderr)

    def save(self, score: float | None) -> None:
        record = {"rows": list(self.log.rows), "seconds": self.seconds(), "devices": _devices()}
        record |= {"convolutions": self.convolutions, "phi": self.experiment.phi_kind}
        self.checkpoints.save(self.step, self.loop, self.loop.bilevel.phi, record, score)

    def check_sound(self, bad: np.ndarray) -> None:
        """Tells the steps that were skipped since the last look; `bad` is `LoopState.bad`.

        Raises:
          NonFiniteError: the loop has met an anomaly, and is not to skip it.
        """
        for step, anomaly in bad.tolist():
            if self.config.train.on_nonfinite == "stop" and step >= 0:
                raise NonFiniteError(f"{loop_lib.ANOMALIES[anomaly]} at step {step}; {self._way_out()}")
            if step > self.told_step and cluster.is_primary():
                print(f"warning: {loop_lib.ANOMALIES[anomaly]} at step {step}; skipped", file=sys.stderr)
                self.told_step = step

    def _way_out(self) -> str:
        self.checkpoints.wait()
        last = self.checkpoints.latest_step()
        kept = "no checkpoint was written before" if last is None else f"the checkpoint of step {last} is kept"
        return f"{kept}; lower optim.learning_rate or meta.learning_rate, or set optim.clip_norm"

    def _log_skipped(self, epoch: int) -> None:
        """Logs each step that the epoch has skipped, and forgets it."""
        for step, anomaly in jax.device_get(self.loop.bad).tolist():
            if step >= 0:
                self.log.write("skipped", step, epoch, {"because": loop_lib.ANOMALIES[anomaly]})
        bad = parallel.place(loop_lib.no_anomalies(self.config.train), self.loop.bad.sharding)
        self.loop = self.loop.replace(bad=bad)

    def classifier(self, state: BilevelState, step: int) -> Classifier:
        """Returns the classifier that is tested, with the weights of `state`."""

        def probabilities(images: np.ndarray) -> np.ndarray:
            placed = parallel.place(images, parallel.split(self.mesh)) if self.mesh else images
            return np.asarray(self.eval_step(state, placed, self.device_data))

        def forward(images: jax.Array) -> jax.Array:
            return self.predict(state, images, self.device_data)

        return Classifier(self.facts, self.config, step, forward, probabilities)

    def asked(self, split: str) -> Asked:
        """Returns the question for the split `val` or `test`, in batches that divide by the devices."""
        devices = self.mesh.shape[parallel.AXIS] if self.mesh else 1
        size = -(-self.config.eval.batch_size // devices) * devices
        return results_lib.on_split(self.data, split, size, self.config.data.workers)

    def results(self) -> dict[str, Any]:
        """Evaluates the last and the best-on-validation state; the one time that the test split is read."""
        last, best = self.classifier(self.loop.bilevel, self.step), None
        scores = [row["balanced_accuracy"] for row in self.log.rows if row["kind"] == "val"]
        if (step := self.checkpoints.best_step(max(scores, default=0.0))) is not None:
            same = step == self.step
            best = last if same else self.classifier(self.checkpoints.restore(step, self.loop)[0].bilevel, step)
        wanted = {"val": self.has_validation, "test": self.config.eval.test}
        asked = {split: self.asked(split) if is_there else None for split, is_there in wanted.items()}
        split = "test" if self.config.eval.test else "val"

        def show(answers: Answers) -> None:
            if cluster.is_primary():
                images, place = getattr(self.data, f"{split}_images"), Workdir(self.workdir).gallery
                gallery.write(place, images, answers.labels, answers.probabilities, self.data.counts)

        return results_lib.of_run(last, best, asked, split, calibrate=True, show=show) | {
            "train_seconds": self.train_seconds,
            "input_wait": self.feed.waited() if self.feed else 0.0,
            "versions": self.versions,
        }


def _progress_bar() -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[loss]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        disable=not cluster.is_primary(),
    )


def _devices() -> str:
    return f"{jax.device_count()} device(s) in {jax.process_count()} process(es)"


def _tell_elastic(step: int, before: str) -> None:
    """Says so where a run goes on with another number of devices or processes."""
    if before != _devices() and cluster.is_primary():
        print(
            f"goes on from step {step} on {_devices()}, before: {before}; batches and their order stay the same,"
            " sums are rounded differently"
        )


def _tell_convolutions(step: int, now: str, before: str) -> None:
    """Says so where a run goes on with convolutions that are computed in another way."""
    if before != now and cluster.is_primary():
        print(f"goes on from step {step} with convolutions by {now}, before: {before}; sums are rounded differently")
