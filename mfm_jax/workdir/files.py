"""A run's folder: the names of its files, how they are read, and whose the folder is.

No other module has a file's name. `config.json` marks a run that has begun, `results.json` one that has finished.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mfm_jax import config as config_lib
from mfm_jax.config import Change, Config
from mfm_jax.data import sizes
from mfm_jax.data.manifest import leaks_in_words, manifest_hash, read_manifest, write_manifest
from mfm_jax.errors import UserError
from mfm_jax.machine import disk
from mfm_jax.workdir import ownership

_BOTH = "results.json beside it and run the training command again, which writes both"
# What to do where a file is missing, and where it is damaged.
_AGAIN = (f"remove {_BOTH}", f"remove it and {_BOTH}")
_UNFINISHED = "no run there has finished; run the training command again"
_ELSE = (_UNFINISHED, "choose a new --workdir")
_WAYS_OUT = {
    "classifier.json": _AGAIN,
    "loggers.json": (_UNFINISHED, "remove it: W&B and MLflow then begin another run"),
    "metrics.jsonl": _AGAIN,
    "results.json": (_UNFINISHED, "remove it, and it is written again"),
}


class _In:
    """A name in the folder; as an attribute of a `Workdir`, its path."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, workdir: "Workdir", kind: type) -> Path:
        return workdir.path / self.name


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The folder of a run, `path`. Its other attributes are the paths of its files, of which any may be absent."""

    path: Path

    config = _In("config.json")  # every field of the configuration
    manifest = _In("manifest.json")  # the split
    facts = _In("classifier.json")  # what else it takes to use the classifier (`facts`)
    metrics = _In("metrics.jsonl")  # rows by epoch (`logs`)
    tensorboard = _In("tensorboard")  # the scalars of the rows
    loggers = _In("loggers.json")  # what W&B and MLflow call the run (`loggers`)
    mlflow = _In("mlflow-store")  # MLflow's runs, where no server has them
    checkpoints = _In("checkpoints")  # a folder for each step
    damaged_checkpoints = _In("damaged-checkpoints")  # those of which a file had changed or gone
    results = _In("results.json")  # of `results.of_run`
    images = _In("images.npz")  # what a run is trained on that was given arrays (`estimator`)
    estimator = _In("estimator.json")  # of such a run
    gallery = _In("gallery.npz")  # pictures for the report
    report = _In("report.html")
    evaluations = _In("eval")  # later evaluations, a folder each
    audit = _In("label_audit")  # of the labels: its runs, its table and its page
    exported = _In("exported")  # what `export` writes, unless `--out` says where
    processes = _In("processes.jsonl")  # what each process took that trained the run (`runs`)
    peak_memory = _In("peak_memory.json")  # of a run that one process trained from start to end
    problems = _In("problems.csv")  # what `--mode=check` found
    duplicates = _In("duplicates.csv")
    owner = _In(".owner")  # the lock

    def owned(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context that holds the folder for this process, or raises a UserError that names its holder."""
        return ownership.owned(self.owner)

    def claim(self, config: Config) -> None:
        """Makes the folder if it is absent.

        Raises:
          UserError: it holds a run that does not go on with `config` (the differences are named), or it is no folder.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--workdir={self.path}: cannot be made: {error.strerror}") from error
        if problem := config_lib.problem(self.changes(config), config):
            raise UserError(f"--workdir={self.path} {problem}")

    def changes(self, config: Config) -> list[Change]:
        """Returns in what `config` differs from the run in the folder; nothing where none has begun.

        Batch sizes beyond the run's images are no difference: they were cut when it began.
        """
        if not self.config.exists():
            return []
        began = read_object(self.config)
        changed = config_lib.changes(began, config)
        if sizes.FIELDS.intersection(change.path for change in changed):
            changed = config_lib.changes(began, sizes.cut(config, read_manifest(self.manifest)))
        return changed

    def is_finished(self, config: Config) -> bool:
        """Whether a run in the folder has finished, with all the epochs of `config`, on data that lies where it did.

        Of data that lies elsewhere only its manifest can show whether it is the same, of a part of the user's own that
        has got a name since, only its parameters.
        """
        of_data = {path for path in config_lib.FIELDS if path.startswith("data.")} - {"data.workers"}
        named = {path for path, field in config_lib.FIELDS.items() if field.own}
        begun_again = {"train.epochs", *of_data, *named}
        return self.results.exists() and begun_again.isdisjoint(change.path for change in self.changes(config))

    def begin(
        self, config: Config, manifest: Mapping[str, Any], facts: Mapping[str, Any], say: Callable[[str], None] = print
    ) -> None:
        """Writes what a run leaves at its start, where it is absent: its facts, its split, and last its config.

        Of a run that goes on, says what has changed and keeps that as its config. Where it is extended, the results so
        far get another name.
        """
        changed = self.changes(config)
        # Without a config, facts are of a start that failed; an older run has a config without facts.
        if not (self.config.exists() and self.facts.exists()):
            disk.write_object(self.facts, facts)
        if not self.config.exists():
            write_manifest(manifest, self.manifest)
        if changed:
            say("going on with " + ", ".join(f"{one.path} = {one.now!r} (was {one.before!r})" for one in changed))
        for epochs in [change.before for change in changed if change.path == "train.epochs" and self.results.exists()]:
            earlier = self.results.rename(self.path / f"results-of-{epochs}-epochs.json")
            self.report.unlink(missing_ok=True)
            self.peak_memory.unlink(missing_ok=True)  # of one process that trained all, which none will have
            say(f"the results of {epochs} epochs are in {earlier}; at the new end, test is read again")
        if changed or not self.config.exists():
            disk.write_object(self.config, config.to_dict(), indent=2)

    def leaks(self, manifest: Mapping[str, Any]) -> str:
        """Returns which images that a split holds out the run was trained on, in words; "" for none."""
        return leaks_in_words(manifest, read_manifest(self.manifest)) if self.manifest.exists() else ""

    def check_split(self, manifest: Mapping[str, Any]) -> None:
        """Raises a UserError where a run has begun in the folder with another split than `manifest`."""
        if not self.config.exists():
            return
        # A folder of pictures may have another name by now, and what was left out be gone: the version has the content.
        manifests = (read_manifest(self.manifest), manifest)
        began, now = (manifest_hash({**one, "dataset": "", "left_out": []}) for one in manifests)
        if began != now:
            raise UserError(
                f"{self.manifest}: the data or its split is not what this run began with; choose a new --workdir"
            )

    def check_normalization(self, facts: Mapping[str, Any]) -> None:
        """Raises a UserError where a run has begun in the folder whose images had another size or normalisation."""
        if not (self.config.exists() and self.facts.exists()):
            return
        began = read_object(self.facts, "mean", "std", "image_shape")
        if began["image_shape"] != list(facts["image_shape"]):
            raise UserError(
                f"{self.facts}: this run began with images of {began['image_shape']}, now they are of"
                f" {list(facts['image_shape'])}; choose a new --workdir"
            )
        for name in ("mean", "std"):
            if any(not math.isclose(a, b, rel_tol=1e-4) for a, b in zip(began[name], facts[name], strict=False)):
                raise UserError(
                    f"{self.facts}: this run began with {name} = {began[name]} of its images, now it is"
                    f" {list(facts[name])}; choose a new --workdir"
                )

    def check_no_run(self, flag: str = "--out") -> None:
        """Raises a UserError where the folder, which `flag` of a command names, holds a run."""
        if self.config.exists():
            raise UserError(f"{flag}={self.path}: holds a run; choose another folder")

    def read_config(self) -> Config:
        """Returns the config of the run.

        Raises:
          UserError: there is no run, or the file is damaged.
        """
        if not self.config.exists():
            raise UserError(f"{self.path}: no run there; give the workdir of one")
        fields = read_object(self.config)
        try:
            return config_lib.resolve(fields)
        except UserError as error:
            raise UserError(f"{self.config}: damaged, or of another version of mfm_jax: {error}") from error

    def progress(self) -> tuple[int, float | None]:
        """Returns how many epochs the run has logged, and its last balanced accuracy on validation."""
        # What follows the last newline is still being written.
        lines = self.metrics.read_text().split("\n")[:-1] if self.metrics.exists() else []
        rows = [json.loads(line) for line in lines[-4:]]
        scores = [row["balanced_accuracy"] for row in rows if row["kind"] == "val"]
        return (rows[-1]["epoch"] + 1 if rows else 0), (scores[-1] if scores else None)

    def read_processes(self) -> list[dict[str, Any]]:
        """Returns what each process took that trained the run; one that was killed has left nothing."""
        return read_objects(self.processes) if self.processes.exists() else []

    def read_peak_memory(self) -> int | None:
        """Returns the peak memory in bytes of a run that had a process of its own; None of one that had not."""
        with contextlib.suppress(UserError):
            return read_object(self.peak_memory)["bytes"]
        return None


def read_object(path: Path, *required: str) -> dict[str, Any]:
    """Returns the JSON object in a file, with the fields `required`.

    Raises:
      UserError: the file is missing or damaged; the message names the way out.
    """
    value = _object(_read(path), path)
    for key in required:
        if key not in value:
            raise _damaged(path, f"no field '{key}'")
    return value


def read_objects(path: Path) -> list[dict[str, Any]]:
    """Returns the JSON objects in a file that has one a line.

    Raises:
      UserError: as `read_object`.
    """
    return [_object(line, path) for line in _read(path).splitlines() if line.strip()]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {_WAYS_OUT.get(path.name, _ELSE)[0]}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _object(content: bytes, path: Path) -> dict[str, Any]:
    with contextlib.suppress(ValueError):  # not JSON, not text
        if isinstance(value := json.loads(content.decode()), dict):
            return value
    raise _damaged(path, "not a JSON object")


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path}: damaged, {why}; {_WAYS_OUT.get(path.name, _ELSE)[1]}")
