"""Checkpoints: Orbax does the work; what is kept, and where, is decided here.

A checkpoint holds the whole loop state, the metric rows so far, and the modulator once more by itself, so that
another run can start from it without knowing the classifier it was learned with. Saving is asynchronous and atomic.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mfm_jax.config import Checkpoint
from mfm_jax.errors import UserError
from mfm_jax.types import PyTree

_METRIC = "val_balanced_accuracy"


class Checkpointer:
    """The checkpoints of one run, in `workdir/checkpoints/<step>`.

    Keeps the last `config.keep` and, where there is a validation split, the best on it.
    """

    def __init__(self, workdir: Path, config: Checkpoint, *, has_validation: bool):
        policies: list[preservation_policy.PreservationPolicy] = [preservation_policy.LatestN(config.keep)]
        if has_validation:
            policies.append(preservation_policy.BestN(get_metric_fn=_metric, n=1))
        self._has_validation = has_validation
        self._manager = ocp.CheckpointManager(
            _folder(workdir),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                best_fn=_metric if has_validation else None,
            ),
        )

    def save(self, step: int, state: PyTree, mod_params: PyTree, record: dict, metric: float | None) -> None:
        """Starts saving; returns once the state may be overwritten.

        `record` is kept as JSON beside the arrays: the metric rows and the seconds so far.
        `metric` is the validation's balanced accuracy, None where this step was not validated.
        """
        if self._manager.latest_step() == step:
            return
        items = {"state": ocp.args.StandardSave(state), "record": ocp.args.JsonSave(record)}
        if mod_params:
            items["modulator"] = ocp.args.StandardSave(mod_params)
        # A step that was not validated (an interrupted epoch's) ranks below every one that was.
        metrics = {_METRIC: -1.0 if metric is None else metric} if self._has_validation else None
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The kept step with the highest validation metric; None without a validation split."""
        return self._manager.best_step() if self._has_validation else None

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict]:
        """Returns (state, record) of `step`, placed like the arrays of `like`."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), record=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return restored["state"], restored["record"]

    def wait(self) -> None:
        """Blocks until what was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def restore_modulator(workdir: Path, like: PyTree) -> PyTree:
    """Returns the modulator of the last checkpoint in `workdir`.

    Args:
      workdir: of the run that learned it.
      like: freshly initialised parameters of the modulator wanted here.

    Raises:
      UserError: there is no such modulator, or its sites or widths differ from those of `like`.
    """
    if not _folder(workdir).is_dir():
        raise UserError(f"modulation.init_from = {str(workdir)!r}: no checkpoints there; give a run's workdir")
    with ocp.CheckpointManager(_folder(workdir)) as manager:
        step = manager.latest_step()
        if step is None or not (_folder(workdir) / str(step) / "modulator").is_dir():
            raise UserError(f"modulation.init_from = {str(workdir)!r}: that run has no modulator; use an mfm run")
        found = manager.restore(step, args=ocp.args.Composite(modulator=ocp.args.StandardRestore()))
    theirs, ours = _shapes(found["modulator"]), _shapes(like)
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"modulation.init_from = {str(workdir)!r}: its {name} is {theirs.get(name, 'absent')}, this run"
                f" needs {ours.get(name, 'none')}; match modulation.sites, modulation.form and model.width"
            )
    return jax.tree.map(lambda leaf, new: jax.device_put(new, leaf.sharding), like, found["modulator"])


def _folder(workdir: Path) -> Path:
    return workdir.absolute() / "checkpoints"


def _metric(metrics: dict[str, float]) -> float:
    return metrics[_METRIC]


def _shapes(tree: PyTree) -> dict[str, Sequence[int] | Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}
