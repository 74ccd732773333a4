"""Checkpoints: Orbax does the work; what is kept, and where, is decided here.

A checkpoint holds the whole loop state, the metric rows so far, and phi once more by itself, so that another run can
start from a modulator without knowing the classifier it was learned with. Saving is asynchronous and atomic.

Every checkpoint is sealed with digests of its files (`integrity`). One that is damaged is set aside when the folder is
opened, and the one before it counts as the latest. A save that fails, on a full disk say, is a warning that leaves the
earlier checkpoints alone, and the next save tries again.
"""

import contextlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mfm_jax.bilevel import averaging
from mfm_jax.config import Checkpoint
from mfm_jax.errors import UserError
from mfm_jax.machine import cluster
from mfm_jax.types import Average, BilevelState, PyTree
from mfm_jax.workdir import integrity
from mfm_jax.workdir.files import Workdir

_METRIC = "val_balanced_accuracy"


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Keeps Orbax from warning, of a reader, that it does not write."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)


class Checkpointer:
    """The checkpoints of one run, in `workdir/checkpoints/<step>`.

    Keeps the last `config.keep` and, where there is a validation split, the best on it.
    """

    def __init__(self, workdir: Path, config: Checkpoint, *, has_validation: bool, read_only: bool = False):
        """Opens the folder; with `read_only`, as a reader beside the run that owns it: nothing there is touched."""
        policies: list[preservation_policy.PreservationPolicy] = [preservation_policy.LatestN(config.keep)]
        if has_validation:
            policies.append(preservation_policy.BestN(get_metric_fn=_metric, n=1))
        self._has_validation = has_validation
        self._folder, self._saving = _folder(workdir), -1
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            best_fn=_metric if has_validation else None,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,  # of saves that were killed or failed
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        if cluster.is_primary() and not read_only:
            _set_aside_damaged(self._folder)
        cluster.barrier("damaged checkpoints are set aside")
        self._manager = ocp.CheckpointManager(self._folder, options=self._options)

    def _seal(self) -> None:
        """Seals the checkpoint that is about to get its final name; Orbax calls this, on process 0."""
        for unnamed in self._folder.glob(f"{self._saving}.*"):
            integrity.seal(unnamed)

    def save(self, step: int, state: PyTree, phi: PyTree, record: dict[str, Any], metric: float | None) -> None:
        """Starts saving; returns once the state may be overwritten. A save that fails warns and does not raise.

        `record` is kept as JSON beside the arrays: the metric rows, the seconds so far, what kind phi is.
        `metric` is the validation's balanced accuracy, None where this step was not validated.
        """
        self.wait()
        if self._manager.latest_step() == step:
            return
        items = {"state": ocp.args.StandardSave(state), "record": ocp.args.JsonSave(record)}
        if phi:
            items["phi"] = ocp.args.StandardSave(phi)
        # A step that was not validated (an interrupted epoch's) ranks below every one that was.
        metrics = {_METRIC: -1.0 if metric is None else metric} if self._has_validation else None
        self._saving = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)
        except (OSError, ValueError) as error:  # TensorStore's own errors are ValueErrors
            self._tell_failure(error)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self, highest: float) -> int | None:
        """The kept step whose validation metric is `highest`, the run's best.

        None without a validation split, or with a warning where that checkpoint was lost.
        """
        if not self._has_validation:
            return None
        step = self._manager.best_step()
        if step is None or self._manager.metrics(step) != {_METRIC: highest} or self._damage(step):
            print("warning: the checkpoint that was best on validation is lost; no `best` is reported", file=sys.stderr)
            return None
        return step

    def _damage(self, step: int) -> str:
        return integrity.damage(self._folder / str(step))

    def _check(self, step: int) -> None:
        if reason := self._damage(step):
            raise UserError(f"{self._folder / str(step)}: damaged: {reason}")

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Returns (state, record) of `step`, placed like the arrays of `like`.

        Raises:
          UserError: the checkpoint was damaged since the folder was opened.
        """
        self._check(step)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), record=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return restored["state"], restored["record"]

    def restore_tested(self, step: int) -> tuple[BilevelState, dict[str, Any]]:
        """Returns (state, record) of `step`, of the state what the tested classifier is made of, on one device.

        The shapes are the checkpoint's own, so that neither the data nor the optimizers need be known. The state has no
        optimizer's state, no average beside the tested weights, and another key.

        Raises:
          UserError: the checkpoint is damaged.
        """
        self._check(step)
        path, place = self._folder / str(step) / "state", jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        with ocp.PyTreeCheckpointer() as reader:
            saved = reader.metadata(path).item_metadata.tree["bilevel"]
            wanted = {name: saved.get(name) or {} for name in ("step", "params", "batch_stats", "phi", "average")}
            like = {"bilevel": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), wanted)}
            arguments = ocp.checkpoint_utils.construct_restore_args(like)
            found = reader.restore(path, item=like, restore_args=arguments, partial_restore=True)
        record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
        average = found["bilevel"].pop("average")
        state = BilevelState(key=jax.random.key(0), opt_state=(), phi_opt_state=(), **found["bilevel"])
        average = {"batch_stats": {}} | average if average else {}
        return averaging.tested(state.replace(average=Average(**average) if average else ())), record

    def wait(self) -> None:
        """Blocks until what was saved is on disk, or has failed with a warning."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            self._tell_failure(error)

    def _tell_failure(self, error: Exception) -> None:
        """Says that the save failed and why, and forgets it; in a job of several processes it raises."""
        if jax.process_count() > 1:  # they would disagree on which checkpoints there are
            raise UserError(f"the checkpoint of step {self._saving} could not be saved: {_reason(error)}") from error
        last = self._reopened().latest_step()
        kept = "there is none before it" if last is None else f"the one of step {last} is kept"
        print(
            f"warning: the checkpoint of step {self._saving} could not be saved: {_reason(error)}; {kept};"
            " training goes on, and the next save tries again",
            file=sys.stderr,
        )

    def _reopened(self) -> ocp.CheckpointManager:
        """Returns the manager made anew, which reads from disk what there is and removes what is unfinished."""
        with contextlib.suppress(OSError, ValueError):  # the failure once more
            self._manager.close()
        self._manager = ocp.CheckpointManager(self._folder, options=self._options)
        return self._manager

    def close(self) -> None:
        self.wait()
        self._manager.close()


def restore_phi(workdir: Path, like: PyTree, kind: str) -> PyTree:
    """Returns phi of the last checkpoint in `workdir`.

    Args:
      workdir: of the run that learned it.
      like: freshly initialised phi of the form wanted here.
      kind: what phi is here (`outer.MetaLearner.kind`).

    Raises:
      UserError: there is no phi of that kind, or its sites or widths differ from those of `like`.
    """
    field = f"modulation.init_from = {str(workdir)!r}"
    if not _folder(workdir).is_dir():
        raise UserError(f"{field}: no checkpoints there; give a run's workdir")
    with ocp.CheckpointManager(_folder(workdir)) as manager:
        step = manager.latest_step()
        if step is not None and (reason := integrity.damage(_folder(workdir) / str(step))):
            raise UserError(f"{field}: its checkpoint {step} is damaged: {reason}")
        record = {}
        if step is not None:
            record = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
    if (theirs_is := record.get("phi")) != kind:
        learned = f"; what it learned is of the kind {theirs_is!r}" if theirs_is else ""
        raise UserError(f"{field}: that run has no {kind}{learned}; use the run of a method that has one")
    with ocp.StandardCheckpointer() as reader:
        path = _folder(workdir) / str(step) / "phi"
        check_shapes(field, reader.metadata(path).item_metadata.tree, like)
        return reader.restore(path, like)  # on the devices of this run, whatever those of the other were


def check_shapes(field: str, given: PyTree, like: PyTree) -> None:
    """Checks that the phi `given` for a config's field has the names and shapes of `like`.

    Raises:
      UserError: it has others; the message begins with `field`.
    """
    theirs, ours = _shapes(given), _shapes(like)
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"{field}: its {name} is {theirs.get(name, 'absent')}, this run needs {ours.get(name, 'none')};"
                " match modulation.sites, modulation.form and model.width"
            )


def _set_aside_damaged(folder: Path) -> None:
    """Moves damaged checkpoints to a folder beside theirs, and names them; where all are, it raises and moves none."""
    steps = [path for path in folder.glob("*") if path.name.isdecimal()]
    damaged = {path: reason for path in steps if (reason := integrity.damage(path))}
    named = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
    if steps and len(damaged) == len(steps):
        raise UserError(f"{folder}: every checkpoint is damaged ({named}); remove the workdir to start anew")
    for path, reason in damaged.items():
        aside = Workdir(folder.parent).damaged_checkpoints / path.name
        aside.parent.mkdir(exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        print(f"warning: checkpoint {path} is damaged ({reason}); moved to {aside}", file=sys.stderr)


def _reason(error: Exception) -> str:
    """Returns an error's text in one line; of TensorStore's long account, what the operating system said."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else " ".join(str(error).split())


def _folder(workdir: Path) -> Path:
    return Workdir(workdir.absolute()).checkpoints


def _metric(metrics: dict[str, float]) -> float:
    return metrics[_METRIC]


def _shapes(tree: PyTree) -> dict[str, Sequence[int] | Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}


@contextlib.contextmanager
def reading(run: Workdir, config: Checkpoint) -> Iterator[tuple[Checkpointer, int]]:
    """Gives the checkpoints of a run, for a reader beside it, and the step of the last.

    Raises:
      UserError: there is none yet.
    """
    with contextlib.ExitStack() as stack:
        step = None
        if run.checkpoints.is_dir():
            checkpoints = Checkpointer(run.path, config, has_validation=True, read_only=True)
            step = stack.enter_context(contextlib.closing(checkpoints)).latest_step()
        if step is None:
            raise UserError(f"{run.path}: the run there has no checkpoint yet")
        yield checkpoints, step
