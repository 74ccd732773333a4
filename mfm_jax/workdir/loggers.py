"""Where metrics go besides the run's folder: Weights & Biases and MLflow, behind one protocol, `Logger`.

`metrics.jsonl` stays the source of truth. A logger that fails is named once and stops nothing. The ids of a run with
each are kept in its folder (`Workdir.loggers`), so that a run that is resumed goes on in the same place.
"""

import functools
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mfm_jax.config import Config
from mfm_jax.errors import UserError
from mfm_jax.machine import disk
from mfm_jax.workdir.files import Workdir, read_object

PROJECT = "mfm_jax"  # of W&B, and the experiment of MLflow, unless the environment names another
Row = dict[str, Any]


class Logger(Protocol):
    """One run's place with a service. Any method may raise.

    run_id: what the service calls it.
    resumed: whether it was begun by an earlier process, and has the rows up to the checkpoint.
    """

    run_id: str
    resumed: bool

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the scalars of a row, as `kind/name`. A step comes again where a run was interrupted after it."""

    def finish(self, summary: Mapping[str, float], files: Sequence[Path]) -> None:
        """Takes the final metrics, as `checkpoint/split/name`, and files to keep: the run is complete."""

    def close(self) -> None:
        """Hands over what is under way. A run that was not finished is one that was interrupted."""


class Guarded:
    """A logger that never raises. It warns once of what fails; rows that it has not got follow at the end."""

    def __init__(self, name: str, make: Callable[[], Logger], began_with: int):
        """Calls `make`, which opens it; a resumed one, that the user calls `name`, has got the rows it `began_with`."""
        self.name, self._failed, self._sent = name, False, 0
        self._logger: Logger | None = None
        self._tried(lambda: self._open(make, began_with))

    @property
    def run_id(self) -> str | None:
        """What the service calls the run; None where it could not be opened."""
        return self._logger.run_id if self._logger else None

    def _open(self, make: Callable[[], Logger], began_with: int) -> None:
        self._logger = make()
        self._sent = began_with if self._logger.resumed else 0

    def write(self, rows: Sequence[Row]) -> None:
        """Hands over what it has not got of all the run's rows; nothing after a failure, which may take long."""
        if self._logger and not self._failed:
            self._tried(lambda: self._send(rows))

    def finish(self, rows: Sequence[Row], summary: Mapping[str, float], files: Sequence[Path]) -> None:
        """Hands over the rest of the rows, the final metrics and the files."""
        if logger := self._logger:
            self._tried(lambda: self._send(rows))
            self._tried(lambda: logger.finish(summary, files))

    def close(self) -> None:
        if self._logger:
            self._tried(self._logger.close)
        self._logger = None

    def _send(self, rows: Sequence[Row]) -> None:
        assert self._logger is not None
        for row in rows[self._sent :]:
            if values := scalars(row):
                self._logger.log(row["step"], values)
            self._sent += 1

    def _tried(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:  # whatever a service's client raises
            if not self._failed:
                why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                print(f"warning: {self.name} has failed: {why}; training goes on without it", file=sys.stderr)
            self._failed = True


def scalars(row: Row) -> dict[str, float]:
    """Returns the numbers of a metric row as `kind/name`."""
    return {f"{row['kind']}/{name}": value for name, value in row.items() if isinstance(value, float)}


def summary(results: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of `results.json` as `checkpoint/split/name`."""
    return {
        f"{which}/{split}/{name}": value
        for which in ("last", "best")
        for split in ("test", "val")
        for name, value in ((results.get(which) or {}).get(split) or {}).items()
        if isinstance(value, float)
    }


def check(config: Config) -> None:
    """Raises a UserError where a logger of `train.loggers` is not installed; before anything costly."""
    for name in _MAKERS.keys() & set(config.train.logger_names):
        if find_spec(name) is None:
            raise UserError(
                f"train.loggers = {config.train.loggers!r}: {name} is not installed; python -m pip install -e"
                f' ".[{name}]", or leave {name} out'
            )


def opened(config: Config, workdir: Path, began_with: int) -> list[Guarded]:
    """Returns the loggers of `train.loggers` but for TensorBoard, which is no service; keeps their ids in the folder.

    `began_with` is the number of metric rows that its checkpoint has.
    """
    place = Workdir(workdir).loggers
    kept = read_object(place) if place.exists() else {}
    found = [
        Guarded(name, functools.partial(make, config, workdir, kept.get(name)), began_with)
        for name, make in _MAKERS.items()
        if name in config.train.logger_names
    ]
    ids = kept | {one.name: one.run_id for one in found if one.run_id}
    if ids != kept:
        disk.write_object(place, ids)
    return found


class WandbLogger:
    """A run of Weights & Biases; its variables (WANDB_MODE, WANDB_PROJECT, WANDB_DIR, ...) decide where.

    Without a mode or a key it stays offline, in the run's folder, to be sent by `wandb sync`: nobody is asked anything.
    """

    def __init__(self, config: Config, workdir: Path, run_id: str | None):
        import wandb

        given, self.resumed, self._done = os.environ, bool(run_id), False
        has_key = wandb.run is not None or wandb.login(prompt=False, verify=False)
        self._run = wandb.init(
            project=given.get("WANDB_PROJECT", PROJECT),
            name=given.get("WANDB_NAME", workdir.absolute().name),
            dir=given.get("WANDB_DIR", str(workdir.absolute())),
            mode=None if "WANDB_MODE" in given or has_key else "offline",
            id=run_id,
            resume="allow",
            reinit="create_new",  # runs that are trained together are open together
            settings=wandb.Settings(console="off"),
        )
        self.run_id = str(self._run.id)
        self._run.config.update(config.to_dict(), allow_val_change=True)
        self._run.define_metric("*", step_metric="step")  # W&B's own count would refuse a step that comes again

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def finish(self, summary: Mapping[str, float], files: Sequence[Path]) -> None:
        self._run.summary.update(dict(summary))
        for path in files:
            self._run.save(str(path.absolute()), base_path=str(path.absolute().parent), policy="now")
        self._done = True

    def close(self) -> None:
        self._run.finish(exit_code=0 if self._done else 1)


class MlflowLogger:
    """A run of MLflow, in the store of MLFLOW_TRACKING_URI, or else in an SQLite file in the run's folder."""

    def __init__(self, config: Config, workdir: Path, run_id: str | None):
        given = os.environ
        given.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # a server that is away is no reason to wait
        given.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient, tracking
        from mlflow.entities import Param

        store, artifacts = Workdir(workdir.absolute()).mlflow, None
        if not tracking.is_tracking_uri_set():
            store.mkdir(exist_ok=True)
            artifacts = (store / "artifacts").as_uri()
        self._client = MlflowClient(None if artifacts is None else f"sqlite:///{store / 'runs.db'}")
        self.resumed, self._done = bool(run_id), False
        if run_id:
            self.run_id = run_id
            self._client.update_run(run_id, status="RUNNING")
            return
        name = given.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name, artifacts)
        self.run_id = self._client.create_run(experiment, run_name=workdir.absolute().name).info.run_id
        for group, fields in config.to_dict().items():  # a batch may have a hundred
            params = [Param(f"{group}.{field}", str(value)) for field, value in fields.items()]
            self._client.log_batch(self.run_id, params=params)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        metrics = [Metric(name, value, now, step) for name, value in values.items() if math.isfinite(value)]
        self._client.log_batch(self.run_id, metrics)

    def finish(self, summary: Mapping[str, float], files: Sequence[Path]) -> None:
        self.log(0, summary)
        for path in files:
            self._client.log_artifact(self.run_id, str(path))
        self._done = True

    def close(self) -> None:
        self._client.set_terminated(self.run_id, "FINISHED" if self._done else "KILLED")


_MAKERS: dict[str, Callable[[Config, Path, str | None], Logger]] = {"wandb": WandbLogger, "mlflow": MlflowLogger}
