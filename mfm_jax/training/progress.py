"""What a run shows while it trains: its data in a line, what has changed since it was stopped, and a bar."""

import time

import jax
from rich import progress

from mfm_jax.config import Config
from mfm_jax.data import LongTailData
from mfm_jax.data.manifest import factor_in_words
from mfm_jax.data.streaming import Streamed
from mfm_jax.machine import cluster

_LOOK_SECONDS = 0.5
_LOOK_CALLS = 20


class TrainingBar(progress.Progress):
    """How many steps are done, and the loss; process 0 alone shows it."""

    def __init__(self, name: str, total: int, step: int):
        super().__init__(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[loss]}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            disable=not cluster.is_primary(),
        )
        self._task = self.add_task(name, total=total, completed=step, loss="")
        self.restart()

    def restart(self) -> float:
        """Counts calls and time from now; returns the time."""
        self._calls, self._looked = 0, time.perf_counter()
        return self._looked

    def is_due(self) -> bool:
        """Counts a call; says whether to look: by the clock, or at every so many calls where processes must agree."""
        self._calls += 1
        if jax.process_count() > 1:
            return self._calls % _LOOK_CALLS == 0
        return time.perf_counter() - self._looked > _LOOK_SECONDS

    def show(self, step: int, loss: float) -> None:
        """Shows what a look has found."""
        self.update(self._task, completed=step, loss=f"loss {loss:.3f}")
        self._looked = time.perf_counter()


def summary(config: Config, data: LongTailData) -> str:
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


def say_change(step: int, how: str, now: str, before: str, same: str = "") -> None:
    """Says so where a run goes on in a way that rounds sums differently."""
    if before != now and cluster.is_primary():
        print(f"goes on from step {step} {how} {now}, before: {before};{same} sums are rounded differently")
