"""A trained run evaluated again: on any split of its data, or on folders of other pictures of the same classes.

Where there is no run, but the config names pretrained weights, these are evaluated without training.
What training wrote is not changed; an evaluation has a folder of its own, with `results.json` and `report.html`.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax import predict
from mfm_jax.config import Config
from mfm_jax.data import listing, walk
from mfm_jax.data.walk import Problem
from mfm_jax.errors import UserError
from mfm_jax.evaluation import classifier
from mfm_jax.evaluation import results as results_lib
from mfm_jax.evaluation.classifier import Classifier
from mfm_jax.evaluation.results import Answers, Asked
from mfm_jax.machine import disk, versions
from mfm_jax.pages import report
from mfm_jax.training import loop
from mfm_jax.training.progress import track
from mfm_jax.workdir.files import Workdir, read_object


def evaluate_run(
    config: ml_collections.ConfigDict | Mapping[str, Any] | Config,
    workdir: Path,
    split: str | None = None,
    folder: Path | None = None,
    out: Path | None = None,
) -> tuple[dict[str, Any], Path]:
    """Evaluates the last checkpoint of a run and the best on validation, as far as there is one.

    In a `workdir` without a run, the weights of `model.pretrained` are evaluated without training. A line on the
    standard error says so, and a run may still begin there.

    Args:
      config: of the run; fields that may change in one (`fields.MAY_CHANGE`), such as `data.root`, may be others.
      workdir: of the run, finished or not.
      split: "test", "val" or "train" (without augmentation) of its data; None for the one that the run itself shows;
        of a run that has not finished, test, and val where `eval.test` is False.
      folder: a folder with a folder of pictures for each class, in the place of the split; the run's data is not
        needed then.
      out: the folder to write to; `workdir/eval/SPLIT`, or `workdir/eval/outside-FOLDER`, by default.

    Returns:
      (the content of `results.json`, the path of the report). The former has the form of a training run's; its `split`
      is "outside" for a folder; `unread` then has the reason of each file that could not be read, and `passed_over` how
      many hidden files, and others that are no pictures, there are of each kind.
      `pretrained` names the file of weights that were not trained on, "" for a run.

    Raises:
      UserError: no such run or split, another config or other data than the run's, other class names, `out` holds a
        run, or pretrained weights that are not this classifier's.
    """
    given, run = config if isinstance(config, Config) else config_lib.resolve(config), Workdir(workdir)
    as_is = bool(given.model.pretrained) and not run.config.exists()
    if not as_is:
        _check_config(given, run)
    if split is None:
        of_config = "test" if given.eval.test else "val"
        split = read_object(run.results, "split")["split"] if run.results.exists() and not as_is else of_config
    out = out or run.evaluations / (f"outside-{folder.resolve().name}" if folder else split)
    Workdir(out).check_no_run()
    data = None
    if as_is:
        print(f"no run in {workdir}: evaluates {given.model.pretrained} without training", file=sys.stderr)
        data = data_lib.build(given)
        last, best = classifier.load_pretrained(given, data), None
    else:
        last, best = classifier.load(workdir, module=given.given.module), None
        with contextlib.suppress(classifier.NoBest):
            best = classifier.load(workdir, "best", module=given.given.module)
        if not run.results.exists():
            print(f"warning: the run in {workdir} has not finished; this is its step {last.step}", file=sys.stderr)
    unread, passed = dict[str, str](), Counter[str]()
    if folder:
        label = _labels(folder, last.class_names, unread, passed)
        split, asked = "outside", _on_files(folder, label, given, unread)
    else:
        data = data or data_lib.build(given)
        run.check_split(data.manifest)
        if not len(getattr(data, f"{split}_labels")):
            raise UserError(f"--split={split}: {data.name} has no such split")
        put = jax.device_put if loop.at_once(given, getattr(data, f"{split}_images")) else None
        asked = results_lib.on_split(data, split, given.eval.batch_size, given.data.workers, watch=track, put=put)
    sets = None if split in ("train", "val") else last.sets
    results = results_lib.of_run(last, best, {split: asked}, split, sets=sets) | {
        "folder": str(folder or ""),
        "pretrained": given.model.pretrained if as_is else "",
        "unread": unread,
        "passed_over": dict(passed),
        "versions": versions.versions(),
        "provenance": versions.provenance(),
    }
    out.mkdir(parents=True, exist_ok=True)
    disk.write_object(Workdir(out).results, results)
    return results, report.write_report(workdir, out, (given.to_dict(), data.manifest) if as_is and data else None)


def _check_config(given: Config, run: Workdir) -> None:
    """Checks the config against that of the run, which must be there; fields that `MAY_CHANGE` may differ."""
    run.read_config()
    if changed := config_lib.refused(run.changes(given)):
        fields = "; ".join(map(str, changed))
        raise UserError(f"--workdir={run.path} belongs to another config ({fields}); leave --config and these out")


def _labels(folder: Path, class_names: Sequence[str], unread: dict[str, str], passed: Counter[str]) -> dict[Path, int]:
    """Returns the label of each file in `folder` that may be a picture; what cannot be is added to the other two."""
    if not folder.is_dir():
        raise UserError(f"--eval_folder={folder}: no such folder")
    problems: list[Problem] = []
    folders = list(listing.class_folders(folder, "", problems, passed))
    number = {walk.class_name(name): k for k, name in enumerate(class_names)}
    _check_classes(folder, {found.name for found in folders}, number.keys(), problems)
    for path, reason in problems:
        if reason == walk.NOT_A_PICTURE:
            passed[reason] += 1
        else:
            unread[str(folder / path)] = reason
    label = {folder / path: number[found.name] for found in folders for path in found.pictures}
    if not label:
        raise UserError(f"--eval_folder={folder}: no pictures there")
    there = set(label.values())
    if absent := [repr(name) for k, name in enumerate(class_names) if k not in there]:
        print(f"warning: no picture of {', '.join(absent)}; means over classes leave them out", file=sys.stderr)
    return label


def _check_classes(folder: Path, there: Set[str], known: Set[str], problems: Sequence[Problem]) -> None:
    missing, unknown = sorted(known - there), sorted(there - known)
    if missing or unknown:
        differences = (("missing", missing), ("unknown", unknown))
        said = "; ".join(f"{word}: {', '.join(names)}" for word, names in differences if names)
        alike = "".join(f"; {name!r} is {reason}" for name, reason in walk.look_alikes([*missing, *unknown]))
        first = f"; {folder / problems[0].path}: {problems[0].reason}" if problems else ""
        raise UserError(
            f"--eval_folder={folder}: its folders are not the classes of the run ({said}); a class without pictures has"
            f" an empty folder{alike}{first}"
        )


def _on_files(folder: Path, label: Mapping[Path, int], config: Config, unread: dict[str, str]) -> Asked:
    """Returns the question for the files in `folder` that can be read; the others are noted in `unread`."""
    size, workers = config.eval.batch_size, config.data.workers

    def asked(trained: Classifier) -> Answers:
        probabilities, labels = [], []
        parts = predict.predicted(trained, label, size, workers)
        for batch, rows in track(parts, f"step {trained.step}", -(-len(label) // size)):
            readable = [item.image is not None for item in batch]
            probabilities.append(rows[readable])
            labels += [label[item.path] for item in batch if item.image is not None]
            unread.update((str(item.path), item.problem) for item in batch if item.image is None)
        if not labels:
            raise UserError(f"--eval_folder={folder}: none of its {len(label)} pictures can be read")
        return Answers(np.concatenate(probabilities), np.asarray(labels))

    return asked
