"""What may change in a run that has begun: fields marked `MAY_CHANGE`, and `train.epochs`, where a run is extended."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mfm_jax.config.groups import FIELDS, Config
from mfm_jax.fields import GIVEN, names_own


class Change(NamedTuple):
    """A field, `group.name`, in which two configs differ; None for a value that one of them lacks."""

    path: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.path}: {json.dumps(self.before)} -> {json.dumps(self.now)}"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    """Yields every field in which two config dicts differ."""
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from (change._replace(path=f"{name}.{change.path}") for change in differences(before, after))
        elif before != after:
            yield Change(name, before, after)


def changes(began: Mapping[str, Any], config: Config) -> list[Change]:
    """Returns in what `config` differs from the fields that a run began with; one that these lack had its default."""
    known = {
        group: {**defaults, **began[group]} if isinstance(began.get(group), Mapping) else defaults
        for group, defaults in Config().to_dict().items()
    }
    asked = config.to_dict()
    if config.train.dtype == "auto":  # which the run has settled
        asked["train"]["dtype"] = known["train"]["dtype"]
    return list(differences({**began, **known}, asked))


def refused(changed: Sequence[Change]) -> list[Change]:
    """Returns the changes with which a run would be another."""
    return [change for change in changed if not _allowed(change)]


def _allowed(change: Change) -> bool:
    """Whether the field is marked so, or names an object from Python that has got an import path since."""
    field, is_named = FIELDS.get(change.path), change.before == GIVEN and names_own(change.now)
    return field is not None and (field.may_change or (field.own and is_named))


def problem(changed: Sequence[Change], config: Config) -> str:
    """Returns why a run does not go on with the changes that gave `config`, as said of its folder; "" where it does."""
    others = {change.path: change for change in refused(changed)}
    epochs = others.get("train.epochs")
    if not others:
        return ""
    if not epochs or epochs.before >= epochs.now or not others.keys() <= {"train.epochs", "optim.restarts"}:
        return f"belongs to another config ({'; '.join(map(str, others.values()))}); choose a new one"
    begun = f"has a run of train.epochs = {epochs.before}"
    if config.train.max_steps:
        return f"{begun}, which train.max_steps = {config.train.max_steps} ends; for {epochs.now}, choose a new one"
    if config.method.planned:
        return f"{begun}, which {config.method.name} divides into parts; for {epochs.now}, choose a new one"
    if config.optim.swa_from:
        return f"{begun}, of which optim.swa_from is a part; for {epochs.now}, choose a new one"
    restarts = others["optim.restarts"].before if "optim.restarts" in others else config.optim.restarts
    wanted = f"{restarts},{epochs.before}".removeprefix(",")
    if config.optim.restarts.replace(" ", "") == wanted.replace(" ", ""):
        return ""
    return (
        f"{begun}, for which its learning rates were planned; to go on to {epochs.now}, with a plan that begins anew"
        f" after epoch {epochs.before}, set optim.restarts = {wanted!r}; for one plan over all, choose a new one"
    )
