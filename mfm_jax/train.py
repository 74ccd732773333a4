"""The training run: `train_and_evaluate(config, workdir)`.

The host drives the compiled calls of `loop`, looks at their sums about twice a second, and logs, validates and saves at
the end of an epoch. A run that is interrupted and started again with the same command goes on from its last checkpoint
and ends with the same bits.

Selection is honest: epochs are compared on the validation split; the test split is read once, at the end.
"""

import contextlib
import functools
import json
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from rich import progress

from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax import experiment as experiment_lib
from mfm_jax import loop as loop_lib
from mfm_jax import parallel, report
from mfm_jax.checkpoint import Checkpointer, restore_modulator
from mfm_jax.config import Config
from mfm_jax.data import LongTailData, batches
from mfm_jax.errors import UserError
from mfm_jax.experiment import Experiment
from mfm_jax.logs import MetricLog
from mfm_jax.longtail import read_manifest, write_manifest
from mfm_jax.metrics import evaluate
from mfm_jax.types import BilevelState

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: saved, run the same command again

_SYNC_SECONDS = 0.5


class Interrupted(Exception):
    """SIGTERM or Ctrl-C arrived; the run was saved at `step`."""

    def __init__(self, step: int):
        super().__init__(f"interrupted; saved at step {step}; run the same command to go on")


class NonFiniteError(UserError):
    """A loss or gradient became infinite or NaN; the checkpoints before it are untouched."""


def train_and_evaluate(
    config: ml_collections.ConfigDict | Mapping[str, Any] | Config, workdir: str | Path, *, label: str = ""
) -> dict[str, Any]:
    """Trains as `config` says, in `workdir`, and returns the results.

    A workdir that holds an interrupted run of the same config is resumed; a finished one is returned as it is.
    Leaves `config.json`, `manifest.json`, `metrics.jsonl`, `checkpoints/`, `tensorboard/`, `results.json` and
    `report.html`.

    Args:
      config: from a config file, or a dict of the same form.
      workdir: the run's folder; made if absent.
      label: text beside the progress bar.

    Returns:
      The content of `results.json`: `last` and `best` (on validation; None without one), each with the metrics of
      `metrics.evaluate` on `val` and `test`.

    Raises:
      UserError: a config or data mistake, before training starts; the workdir belongs to another config.
      NonFiniteError: a loss or gradient became non-finite.
      Interrupted: SIGTERM or Ctrl-C; everything is saved.
    """
    config = config if isinstance(config, Config) else config_lib.resolve(config)
    workdir = Path(workdir)
    claim_workdir(config, workdir)
    if (workdir / "results.json").exists():
        if not (workdir / "report.html").exists():
            report.write_report(workdir)
        return json.loads((workdir / "results.json").read_text())
    data = data_lib.build(config)
    mesh = parallel.data_mesh() if jax.device_count() > 1 else None
    experiment = experiment_lib.build(config, data, mesh)
    _check_split(data, workdir)
    run = _Run(config, workdir, data, experiment, mesh)
    if not (workdir / "config.json").exists():  # a mistake found so far leaves the workdir free for another config
        write_manifest(data.manifest, workdir / "manifest.json")
        _write(workdir / "config.json", json.dumps(config.to_dict(), indent=2))
    print(_summary(config, data))
    with contextlib.closing(run):
        seconds = run.train(label)
        results = run.results(seconds)
    _write(workdir / "results.json", json.dumps(results, indent=1))
    report.write_report(workdir)
    return results


def _write(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _check_split(data: LongTailData, workdir: Path) -> None:
    """Checks that an interrupted run goes on with the images that it began with."""
    path = workdir / "manifest.json"
    if (workdir / "config.json").exists() and read_manifest(path)["hash"] != data.manifest["hash"]:
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
        changed = list(config_lib.differences(json.loads(path.read_text()), config.to_dict()))
        if changed:
            raise UserError(f"--workdir={workdir} belongs to another config ({'; '.join(changed)}); choose a new one")


def _summary(config: Config, data: LongTailData) -> str:
    """Returns one line on the data: which set, which protocol, how many images."""
    counts, parts = data.counts, [len(x) for x in (data.train_labels, data.val_labels, data.test_labels)]
    return (
        f"{data.name} {data.version}, protocol {config.data.protocol}, imbalance factor"
        f" {config.data.imbalance_factor:g}: {parts[0]} training images ({counts.max()}..{counts.min()} a class),"
        f" {min(data.manifest['splits']['meta']['class_counts'])} meta a class, {parts[1]} validation, {parts[2]} test;"
        f" manifest {data.manifest['hash'].removeprefix('sha256:')[:12]}"
    )


class _Run:
    """One run's host side: restores, drives the compiled calls, logs, saves, evaluates."""

    def __init__(self, config: Config, workdir: Path, data: LongTailData, experiment: Experiment, mesh):
        self.config, self.data, self.experiment = config, data, experiment
        self.has_validation = len(data.val_labels) > 0
        self.loop = loop_lib.initial(experiment)
        self.checkpoints = Checkpointer(workdir, config.checkpoint, has_validation=self.has_validation)
        self.device_data = loop_lib.to_device(data)
        # Placed once and for all, one device included: what is not would count as another program at the second call.
        place = parallel.replicated(mesh) if mesh else jax.sharding.SingleDeviceSharding(jax.devices()[0])
        self.loop, self.device_data = jax.device_put((self.loop, self.device_data), place)
        record: dict[str, Any] = {"rows": [], "seconds": 0.0}
        latest = self.checkpoints.latest_step()
        if latest is None and experiment.modulator and config.modulation.init_from:
            state = self.loop.bilevel
            loaded = restore_modulator(Path(config.modulation.init_from), state.mod_params)
            self.loop = self.loop.replace(bilevel=state.replace(mod_params=loaded))
        if latest is not None:
            self.loop, record = self.checkpoints.restore(latest, self.loop)
        self.step = latest or 0
        self.log = MetricLog(workdir, record["rows"])
        self.began = time.perf_counter() - record["seconds"]
        self.call = loop_lib.make_call(experiment, config)
        self.describe = jax.jit(functools.partial(loop_lib.describe, experiment))
        self.eval_step = jax.jit(functools.partial(loop_lib.evaluate_batch, experiment.eval_step))

    def close(self) -> None:
        self.log.close()
        self.checkpoints.close()

    def train(self, label: str) -> float:
        """Runs to the last step; returns the seconds of training, those before an interruption included."""
        total, per_epoch = self.experiment.total_steps, self.experiment.steps_per_epoch
        with _stop_signals() as stopped, _progress_bar() as bar:
            task = bar.add_task(label or self.config.method.name, total=total, completed=self.step, loss="")
            while self.step < total:
                epoch = self.step // per_epoch
                self._run_epoch(epoch, min(total, (epoch + 1) * per_epoch), bar, task, stopped)
        self.checkpoints.wait()
        return self.seconds()

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def _run_epoch(self, epoch: int, end: int, bar: progress.Progress, task: Any, stopped: Callable) -> None:
        """Runs from `self.step` to step `end` of `epoch`, then logs, validates and saves what is due."""
        self._start_epoch(epoch)
        looked = time.perf_counter()
        while self.step < end:
            is_meta = self._next_steps(end)
            retrain = self.step >= self.experiment.retrain_from
            self.loop = self.call(self.loop, self.device_data, *loop_lib.steps(is_meta, retrain=retrain))
            self.step += len(is_meta)
            if stopped() and self.step < end:
                break
            if time.perf_counter() - looked > _SYNC_SECONDS:
                self._look(bar, task)
                looked = time.perf_counter()
        self._look(bar, task)
        if self.step == end:
            self._end_epoch(epoch)
        if stopped() and self.step < self.experiment.total_steps:
            self._save(None)
            self.checkpoints.wait()
            raise Interrupted(self.step)

    def _look(self, bar: progress.Progress, task: Any) -> None:
        """Waits for the device, checks that all is finite, and moves the bar."""
        self._check_finite()
        sums = jax.device_get(self.loop.sums)
        bar.update(task, completed=self.step, loss=f"loss {sums['loss'] / sums['steps']:.3f}")

    def _start_epoch(self, epoch: int) -> None:
        """Puts the epoch's order on the device: a function of the seed and the epoch."""
        key = jax.random.fold_in(jax.random.key(self.config.train.seed), 1)
        order = self.experiment.order(key, epoch)
        table = jnp.asarray(self.data.meta_table(epoch), jnp.int32)
        if self.experiment.synthetic and self.step >= self.experiment.retrain_from:
            self._store_features()
        sharding = self.device_data.images.sharding
        order, table = jax.device_put((order, table), sharding)
        self.device_data = self.device_data.replace(order=order, meta_table=table)

    def _store_features(self) -> None:
        """Puts the frozen classifier's features in the place of the images, once."""
        if self.device_data.images.ndim > 2:
            neighbors, seed = self.config.method.smote_neighbors, self.config.train.seed
            self.device_data = loop_lib.synthetic_data(
                self.experiment, self.device_data, self.loop.bilevel, neighbors, seed, self.config.eval.batch_size
            )

    def _next_steps(self, end: int) -> tuple[bool, ...]:
        """Returns, for each step of the next call, whether it is a meta-step."""
        meta = self.config.meta
        count = self.config.train.steps_per_call or (1 if jax.default_backend() == "cpu" else 10)
        first = meta.start_epoch * self.experiment.steps_per_epoch
        return tuple(
            self.experiment.meta_step is not None and step >= first and step % meta.every == 0
            for step in range(self.step, min(self.step + count, end))
        )

    def _end_epoch(self, epoch: int) -> None:
        step, config, final = self.step, self.config, self.step == self.experiment.total_steps
        sums = {name: float(value) for name, value in jax.device_get(self.loop.sums).items()}
        steps, meta_steps = sums.pop("steps"), sums.pop("meta_steps", 0.0)
        row = {"learning_rate": float(self.experiment.learning_rate(step - 1))}
        for name, value in sums.items():
            divisor = meta_steps if name in ("meta_loss", "hypergrad_norm") else steps
            if divisor:
                row[name] = value / divisor
        self.log.write("train", step, epoch, row)
        self._log_modulation(step, epoch)
        self.loop = self.loop.replace(sums=jax.tree.map(jnp.zeros_like, self.loop.sums))
        score = None
        if self.has_validation and (final or (epoch + 1) % config.eval.every_epochs == 0):
            values = self.evaluate(self.loop.bilevel, "val")
            score = values["balanced_accuracy"]
            scalars = {name: value for name, value in values.items() if isinstance(value, float)}
            self.log.write("val", step, epoch, scalars)
        if final or score is not None or (epoch + 1) % config.checkpoint.every_epochs == 0:
            self._save(score)

    def _log_modulation(self, step: int, epoch: int) -> None:
        """Logs gamma and beta at each site, averaged over one training batch."""
        if self.experiment.modulator is None:
            return
        found = jax.device_get(self.describe(self.loop.bilevel, self.device_data))
        sites = {site: found[site] for site in self.experiment.modulator.sites}  # in the order of the config
        values = {s: {name: np.round(v, 6).tolist() for name, v in g.items()} for s, g in sites.items()}
        self.log.write("modulation", step, epoch, {"sites": values})

    def _save(self, score: float | None) -> None:
        record = {"rows": list(self.log.rows), "seconds": self.seconds()}
        self.checkpoints.save(self.step, self.loop, self.loop.bilevel.mod_params, record, score)

    def _check_finite(self) -> None:
        step, quantity = (int(value) for value in jax.device_get(self.loop.bad))
        if step >= 0:
            last = self.checkpoints.latest_step()
            self.checkpoints.wait()
            kept = "no checkpoint was written before" if last is None else f"the checkpoint of step {last} is kept"
            raise NonFiniteError(
                f"{loop_lib.WATCHED[quantity]} became non-finite at step {step}; {kept};"
                " lower optim.learning_rate or meta.learning_rate, or set optim.clip_norm"
            )

    def evaluate(self, state: BilevelState, split: str) -> dict[str, Any]:
        """Returns `metrics.evaluate` of the plain classifier on the split `val` or `test`."""
        images, labels = getattr(self.data, f"{split}_images"), getattr(self.data, f"{split}_labels")
        probabilities = []
        for image, _, mask in batches.eval_batches(images, labels, self.config.eval.batch_size):
            out = self.eval_step(state, image, self.device_data)
            probabilities.append(np.asarray(out)[mask])
        # Shot groups by the training split, so that they are the same with and without `train_on_meta`.
        counts = self.data.manifest["splits"]["train"]["class_counts"]
        return evaluate(np.concatenate(probabilities), labels, np.asarray(counts))

    def results(self, seconds: float) -> dict[str, Any]:
        """Evaluates the last and the best-on-validation state on the test split: the one time it is read."""
        last = self._result(self.loop.bilevel, self.step)
        best_step = self.checkpoints.best_step()
        best = None
        if best_step is not None:
            same = best_step == self.step
            best = last if same else self._result(self.checkpoints.restore(best_step, self.loop)[0].bilevel, best_step)
        return {
            "method": self.config.method.name,
            "seed": self.config.train.seed,
            "last": last,
            "best": best,
            "train_seconds": seconds,
            "versions": _versions(),
        }

    def _result(self, state: BilevelState, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "epoch": -(-step // self.experiment.steps_per_epoch),
            "val": self.evaluate(state, "val") if self.has_validation else None,
            "test": self.evaluate(state, "test"),
        }


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGTERM or Ctrl-C has arrived; outside the main thread it never does."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:  # asked twice: do not wait for the save
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _progress_bar() -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[loss]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )


def _versions() -> dict[str, str]:
    names = ("mfm-jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {name: metadata.version(name) for name in names} | {
        "python": platform.python_version(),
        "devices": devices,
    }
