"""The training run: `train_and_evaluate(config, workdir)`.

The host drives the compiled calls of `loop`, looks about twice a second whether all is finite, and logs, validates and
saves at the end of an epoch. A run that is interrupted and started again with the same command goes on from its last
checkpoint and ends with the same bits.

Selection is honest: epochs are compared on the validation split; the test split is read once, at the end.
"""

import contextlib
import dataclasses
import itertools
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax.config import Config, Own
from mfm_jax.data import LongTailData, sizes
from mfm_jax.errors import UserError
from mfm_jax.evaluation import facts, tested
from mfm_jax.machine import cluster, disk, parallel
from mfm_jax.machine.interruption import EXIT_INTERRUPTED, Interrupted, listening
from mfm_jax.machine.trace import Trace
from mfm_jax.models import native
from mfm_jax.pages import report
from mfm_jax.training import epoch_log, inputs, preflight, progress
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.training import feed as feed_lib
from mfm_jax.training import loop as loop_lib
from mfm_jax.training.experiment import Experiment
from mfm_jax.training.inputs import ResidentSet, StepBatches
from mfm_jax.training.pace import Pace
from mfm_jax.training.run import Run
from mfm_jax.workdir import loggers
from mfm_jax.workdir.files import Workdir, read_object
from mfm_jax.workdir.finished import SPLITS

EPOCH_EVENT = "/mfm_jax/epoch"  # to listeners of `jax.monitoring`: seconds of an epoch's steps, how many there were


def train_and_evaluate(
    config: ml_collections.ConfigDict | Mapping[str, Any] | Config,
    workdir: str | Path,
    *,
    module: Any = None,
    source: Any = None,
    loss: Any = None,
    learner: Any = None,
    pages: bool = True,
    trace: Trace | None = None,
) -> dict[str, Any]:
    """Trains as `config` says, in `workdir`, and returns the results.

    A workdir that holds an interrupted run of the same config is resumed; a finished one is returned unchanged, or goes
    on where it is extended (`optim.restarts`). Leaves the files that `Workdir` names. Batch sizes above what the data
    has are cut to it; a line says so, and the run records it.

    Args:
      config: from a config file, or a dict of the same form.
      workdir: the run's folder; made if absent.
      module: the user's own, in the place of `model.name` (`config.own.Own`; docs/library.md).
      source: in the place of `data.source`.
      loss: in that of `method.loss`; the method `own_loss` reads it, which may be `method.base`.
      learner: in that of `method.learner`; the method `own_learner` reads it.
      pages: whether to write `report.html`, which `report.write_report` can still do later.
      trace: what writes a profile of some steps.

    Returns:
      The content of `results.json` (`results.of_run`): `last` and `best` (on validation; None without one), each with
      the metrics of `metrics.evaluate` on `val` and `test` (None where there is no such split, or `eval.test` is False;
      of `train` where neither is shown), and the `calibration` by a temperature that was fitted on validation; `split`
      is the one to show.

    Raises:
      UserError: a config or data mistake, before training starts; the workdir belongs to another config.
      NonFiniteError: a loss or gradient became non-finite.
      Interrupted: SIGTERM or Ctrl-C; everything is saved.
    """
    config = config_lib.resolve(config, Own(module, source, loss, learner))
    return train_together([config], [Path(workdir)], pages=pages, trace=trace)[0]


def train_together(
    configs: Sequence[Config], workdirs: Sequence[Path], *, pages: bool = True, trace: Trace | None = None
) -> list[dict[str, Any]]:
    """Trains runs that differ in `train.seed` alone, in one program: the step is mapped over them with `vmap`.

    Each run has its own workdir, checkpoints and results, as if it had been trained by `train_and_evaluate`, and the
    same numbers up to the rounding of batched operations. Small networks leave an accelerator idle; several at once
    fill it. Arguments, one config and one folder a run, and errors are those of `train_and_evaluate`; runs that differ
    in more than the seed are refused, too.
    """
    config_lib.find_own(configs[0])
    for config, workdir in zip(configs, workdirs, strict=True):
        loggers.check(config)
        Workdir(workdir).claim(config)
        seedless = [dataclasses.replace(c, train=dataclasses.replace(c.train, seed=0)) for c in (configs[0], config)]
        if changed := "; ".join(map(str, config_lib.differences(*(c.to_dict() for c in seedless)))):
            raise UserError(f"runs trained together may differ in train.seed alone, not in {changed}")
    todo = [pair for pair in zip(configs, workdirs, strict=True) if not Workdir(pair[1]).is_finished(pair[0])]
    if todo:
        with contextlib.ExitStack() as stack:
            for _, workdir in todo if cluster.is_primary() else ():
                stack.enter_context(Workdir(workdir).owned())
            data = _read(configs[0])
            todo = [(settled(sizes.cut(config, data.manifest), workdir), workdir) for config, workdir in todo]
            fsdp = configs[0].parallel.fsdp
            mesh = parallel.data_mesh(fsdp=fsdp) if jax.device_count() > 1 or fsdp > 1 else None
            on_device = inputs.to_device(data)
            cluster.barrier("all have read the data")
            runs = [
                stack.enter_context(contextlib.closing(_start(config, workdir, data, on_device, mesh)))
                for config, workdir in todo
            ]
            progress.say(progress.summary(configs[0], data))
            for sentence in preflight.warnings(configs[0], data) if cluster.is_primary() else ():
                print(f"warning: {sentence}", file=sys.stderr)
            why = native.reason(tested.dtype(runs[0].config))
            progress.say(f"convolutions: {runs[0].convolutions}{f' ({why})' if why else ''}")
            stack.enter_context(cluster.bound_together(EXIT_INTERRUPTED))
            # Apart: runs that were interrupted at different steps, and runs with training data of their own making.
            runs.sort(key=lambda run: (run.step, run.config.train.dtype))
            groups = itertools.groupby(
                runs, key=lambda run: (run.step, run.config.train.dtype) if run.feed.is_shared else run.workdir
            )
            for _, group in groups:
                train_runs(list(group), trace)
            progress.say(f"evaluating on {SPLITS[data.shown(test=configs[0].eval.test)]} images")
            for run in runs:
                results = run.results()
                if cluster.is_primary():
                    disk.write_object(Workdir(run.workdir).results, results)
                    if pages:
                        _write_report(run.workdir)
                    run.hand_over(results)
    for workdir in workdirs:
        if pages and cluster.is_primary():
            _write_report(workdir)
    cluster.barrier("written")
    return [read_object(Workdir(workdir).results) for workdir in workdirs]


def _read(config: Config) -> LongTailData:
    """Returns the data; meanwhile a thread compiles the convolution's kernels, where they are not there yet."""
    asked = config.data
    progress.say(f"reading {asked.name if asked.source == 'tfds' else asked.root or asked.source}")
    # A daemon: neither a mistake nor an interruption waits for it.
    making = threading.Thread(target=lambda: native.prepare(tested.dtype(config)), daemon=True)
    making.start()
    data = data_lib.build(config)
    making.join()
    if cuts := sizes.in_words(config, data.manifest):
        progress.say(cuts)
    return data


def _write_report(workdir: Path) -> None:
    if not Workdir(workdir).report.exists():
        progress.say("writing the report")
        report.write_report(workdir)


def settled(config: Config, workdir: Path) -> Config:
    """Returns `config` with the type that its run computes in: that which it began with, wherever it goes on."""
    stored = Workdir(workdir).config
    dtype = read_object(stored)["train"]["dtype"] if stored.exists() else tested.dtype(config)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, dtype=dtype))


def _start(
    config: Config, workdir: Path, data: LongTailData, on_device: ResidentSet | StepBatches, mesh: Mesh | None
) -> Run:
    """Returns the run, restored if it was interrupted; leaves its config, manifest and classifier's facts there."""
    experiment, files = experiment_lib.build(config, data, mesh), Workdir(workdir)
    files.check_split(data.manifest)
    files.check_normalization(dataclasses.asdict(facts.describe(config, data)))
    run = Run(config, workdir, data, experiment, on_device)
    if cluster.is_primary():  # not before: after a mistake so far the workdir is free for another config
        files.begin(config, data.manifest, dataclasses.asdict(run.facts), progress.say)
    cluster.barrier(f"{files.config} is written")
    cluster.check_agreed(
        f"{config} {data.manifest['hash']} {run.step} {files.config.exists()}",
        f"--workdir={workdir}: the processes differ in config, data or checkpoints; start all with the same command,"
        " on a file system that they share",
    )
    return run


def train_runs(runs: list[Run], trace: Trace | None = None) -> None:
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
    with progress.TrainingBar(config.method.name, _pace(runs[0]), step, total, -(-(total - step) // per_epoch)) as bar:
        with listening() as stopped, trace or Trace(None) as trace:
            while step < total:
                epoch, first = step // per_epoch, step
                end = min(total, (epoch + 1) * per_epoch)
                for run in runs:
                    run.feed.start_epoch(epoch, step, run.loop.bilevel)
                loop, next_input = loop_lib.stack([run.loop for run in runs]), feed_lib.joined(feeds)
                began = bar.start_steps()
                while step < end and not stopped(step):
                    most = min(step + feeds[0].steps_per_call, end)
                    kind, count = loop_lib.next_steps(experiment, config, step, most)
                    with bar.compiling(kind):
                        loop = call(loop, next_input(), jax.device_put(np.int32(count)), kind)
                    step += count
                    trace.at(step, loop)
                    if mark := bar.sent(step, loop_lib.glance(loop)):
                        _check(runs, mark)
                _check(runs, loop_lib.glance(loop))
                bar.end_steps()
                jax.monitoring.record_event_duration_secs(EPOCH_EVENT, time.perf_counter() - began, steps=step - first)
                stop = stopped(step)  # also after the last step: what is left is an evaluation, and time may be short
                for run, own in zip(runs, loop_lib.unstack(loop, len(runs)), strict=True):
                    run.loop, run.step = own, step
                if step == end:
                    _end_epoch(runs, epoch, bar)
                if stop:
                    bar.doing = "saving"
                    raise Interrupted(f"saved at step {min(run.saved() for run in runs)}")
        bar.doing = "saving"
        for run in runs:
            run.finish()


def _end_epoch(runs: list[Run], epoch: int, bar: progress.TrainingBar) -> None:
    """Logs, validates and saves after an epoch, each where it is due, and says what it has come to."""
    first = runs[0]
    settles, validates, saves = _due(first.config, first.experiment, epoch, has_validation=first.has_validation)
    for run in runs:
        bar.doing = "evaluating" if validates else "logging"
        run.log_epoch(epoch)
        if settles:
            run.settle()
        score = run.validate(epoch) if validates else None
        if saves:
            bar.doing = "saving"
            run.save(score)
    words = epoch_log.in_words([run.log.rows for run in runs], first.data.counts)
    bar.end_epoch(f"epoch {epoch + 1}/{first.config.train.epochs}: {words}")


def _pace(run: Run) -> Pace:
    """Returns the estimate of how long the run takes, which knows the kinds of its steps and of its epochs' ends."""
    config, built, total = run.config, run.experiment, run.experiment.total_steps
    kinds = np.array([loop_lib.KINDS.index(loop_lib.kind_of(built, config, step)) for step in range(total)], np.int8)
    epochs = range(-(-total // built.steps_per_epoch))
    ends = [_due(config, built, epoch, has_validation=run.has_validation) for epoch in epochs]
    return Pace(kinds, ends, built.steps_per_epoch, run.step)


def _due(config: Config, experiment: Experiment, epoch: int, *, has_validation: bool) -> tuple[bool, bool, bool]:
    """Returns whether to take statistics anew, to validate and to save after `epoch`."""
    step = min(experiment.total_steps, (epoch + 1) * experiment.steps_per_epoch)
    final = step == experiment.total_steps or epoch + 1 in config.optim.restart_epochs  # the end of a part
    validate = has_validation and (final or (epoch + 1) % config.eval.every_epochs == 0)
    save = final or validate or (epoch + 1) % config.checkpoint.every_epochs == 0
    # A second stage on a frozen classifier goes on with the statistics that it finds.
    settle = (save and step <= experiment.retrain_from) or step == experiment.retrain_from
    return settle, validate, save


def _check(runs: list[Run], mark: progress.Mark) -> None:
    """Checks that all is finite up to a mark; waits for it."""
    bad = jax.device_get(mark[0])
    for run, own in zip(runs, bad if len(runs) > 1 else bad[None], strict=True):
        run.check_sound(own)
