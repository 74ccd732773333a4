"""Tunes methods on the validation split, every one over its own declared space with the same number of trials.

A trial is an ordinary run with one training seed; its score is the balanced accuracy on validation at the last epoch.
Optuna's TPE proposes, `runs` trains. Finished trials stay in their workdirs, and proposals follow from the seed and the
scores, so that tuning that was interrupted goes on with the same command. A trial never reads the test split
(`eval.test = False`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfm_jax import config as config_lib
from mfm_jax.errors import UserError
from mfm_jax.machine import disk
from mfm_jax.methods.table import METHODS, Choice, Span
from mfm_jax.study import runs

if TYPE_CHECKING:
    import optuna

BEST = "best.json"  # in the folder of trials: the values, and how many trials they took
Fields = dict[str, dict[str, Any]]
# What is searched for every method: methods differ in the gradient's size, so one rate for all would favour some.
COMMON: Mapping[str, Span | Choice] = {"optim.learning_rate": Span(0.01, 0.3, log=True)}


def tune(method: str, fields: Fields, trials: int, folder: Path, jobs: int = 1) -> dict[str, Any]:
    """Returns the best values by `group.field`, and writes them to `folder/best.json`.

    `fields` are those of the config, of that method, a name of `METHODS`. The runs are in `folder/trialN`, `jobs` side
    by side: as many are proposed at a time.

    Raises:
      UserError: there is no validation split, or every trial failed.
    """
    if not config_lib.Data(**fields["data"]).validates:
        raise UserError(
            "data.val_images_per_class = 0: --tune compares on validation; choose 1 or more (protocol natural:"
            " data.val_fraction)"
        )
    import optuna  # here, since it takes longer to import than all of a run that tunes nothing

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=fields["train"]["seed"])
    study = optuna.create_study(direction="maximize", sampler=sampler)
    unread = with_values(fields, {"eval.test": False})
    space, error = {**COMMON, **METHODS[method].search}, ""
    while len(study.trials) < trials:
        asked = [study.ask() for _ in range(min(jobs, trials - len(study.trials)))]
        planned = [
            [
                runs.Task(
                    f"{method} trial {trial.number + 1}/{trials}",
                    config_lib.resolve(with_values(unread, _proposed(trial, space))),
                    folder / f"trial{trial.number}",
                )
            ]
            for trial in asked
        ]
        for trial, outcome in zip(asked, runs.train_all(planned, jobs), strict=True):
            if outcome.results is None:
                error = outcome.error
                print(f"{method} trial {trial.number + 1} counts for nothing: {error}")
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            elif outcome.results["last"]["val"] is None:
                raise UserError("--tune: the data has neither a validation nor a test split; choose data.val_fraction")
            else:
                study.tell(trial, outcome.results["last"]["val"]["balanced_accuracy"])
    scored = [trial for trial in study.trials if trial.value is not None]
    if not scored:
        raise UserError(f"--tune={trials}: every trial of {method} failed; the last: {error}")
    best = {
        "values": study.best_params,
        "val_balanced_accuracy": study.best_value,
        "trials": trials,
        "scored": len(scored),
    }
    disk.write_object(folder / BEST, best)
    return study.best_params


def with_values(fields: Fields, values: Mapping[str, Any]) -> Fields:
    """Returns `fields` with `values`, by `group.field`, in their places."""
    changed = {group: dict(members) for group, members in fields.items()}
    for path, value in values.items():
        group, name = path.split(".")
        changed[group][name] = value
    return changed


def _proposed(trial: "optuna.Trial", space: Mapping[str, Span | Choice]) -> dict[str, Any]:
    return {
        path: trial.suggest_categorical(path, list(where.values))
        if isinstance(where, Choice)
        else trial.suggest_float(path, where.low, where.high, log=where.log)
        for path, where in space.items()
    }
