"""Where the input of a run's steps comes from, epoch by epoch: one protocol, of which the training loop calls no more.

`ResidentFeed`: the training set lies on the device; an epoch's order is put beside it, and a step gathers there.
`StreamedFeed`: the data is too large for that. The order stays on the host, worker processes decode what it asks for
(`data.streaming`), and every step gets its batch, put on the device while the step before it is still computed. Each
host decodes its own part of every batch.

Both see the same examples in the same order. Which examples are in a batch, and which part of each picture is seen,
follows from the seed, the epoch and the step, so that a run goes on in the middle of an epoch with the batches of an
uninterrupted one.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mfm_jax.config import Config
from mfm_jax.data import LongTailData, batches, streaming
from mfm_jax.machine import parallel
from mfm_jax.training import inputs
from mfm_jax.training import loop as loop_lib
from mfm_jax.training.experiment import Experiment
from mfm_jax.training.inputs import Features, Input, ResidentSet, StepBatches
from mfm_jax.types import BilevelState


class Feed(Protocol):
    """The input of one run's steps.

    data: what the last step has read; before the first, nothing but `mean` and `std` counts.
    steps_per_call: the most steps that may read one input, in one compiled call.
    is_shared: whether runs that differ in the seed may be fed by `joined`.
    """

    data: Input
    steps_per_call: int
    is_shared: bool

    def start_epoch(self, epoch: int, step: int, state: BilevelState) -> None:
        """Starts an epoch at a step in it; `state` is the run's there."""

    def next(self) -> Input:
        """Returns what the next call of the compiled steps reads, on the device."""
        return self.data

    def waited(self) -> float:
        """Returns which part of the training time so far, validation apart, was spent waiting for pictures, 0..1."""
        return 0.0

    def close(self) -> None:
        """Ends the processes that decode."""
        return None


def make(data: LongTailData, experiment: Experiment, config: Config, on_device: ResidentSet | StepBatches) -> Feed:
    """Returns the feed of a run; `on_device` is `inputs.to_device(data)`."""
    if experiment.teacher:
        on_device = on_device.replace(teacher=experiment.teacher.arrays)
    # Placed once and for all, one device included: what is not would count as another program at the second call.
    on_device = parallel.place(on_device, inputs.everywhere(experiment.mesh))
    if isinstance(on_device, StepBatches):
        return StreamedFeed(data, experiment, config, on_device)
    return ResidentFeed(data, experiment, config, on_device)


def joined(feeds: Sequence[Feed]) -> Callable[[], Input]:
    """Returns `next` of one run's feed, or of several that share their images; all have started the same epoch."""
    if len(feeds) == 1:
        return feeds[0].next
    together = inputs.stack([feed.next() for feed in feeds])
    return lambda: together


def _orders(data: LongTailData, experiment: Experiment, config: Config, epoch: int) -> tuple[jax.Array, jax.Array]:
    """Returns an epoch's order and meta table: functions of the seed and the epoch."""
    key = jax.random.fold_in(jax.random.key(config.train.seed), 1)
    return experiment.order(key, epoch), jnp.asarray(data.meta_table(epoch), jnp.int32)


class ResidentFeed(Feed):
    """The training set on the device; in a second stage on stored features, these take its place."""

    def __init__(self, data: LongTailData, experiment: Experiment, config: Config, on_device: ResidentSet):
        self.data: Input = on_device
        self.steps_per_call, self.is_shared = loop_lib.steps_per_call(config), not experiment.synthetic
        self._experiment, self._config = experiment, config
        self._orders = functools.partial(_orders, data, experiment, config)

    def start_epoch(self, epoch: int, step: int, state: BilevelState) -> None:
        """Puts the epoch's order on the device."""
        order, table = parallel.place(self._orders(epoch), self.data.labels.sharding)
        if isinstance(self.data, ResidentSet):
            self.data = self.data.replace(order=order, meta_table=table)
            if self._experiment.synthetic and step >= self._experiment.retrain_from:
                self.data = synthetic(self._experiment, self._config, self.data, state)
        else:
            self.data = self.data.replace(order=order)


def synthetic(experiment: Experiment, config: Config, data: ResidentSet, state: BilevelState) -> Features:
    """Returns the frozen classifier's features of all images, made balanced, under the order of `data`.

    Features are computed once, without augmentation, in batches on the device; others are made of them on the host. A
    function of the frozen classifier and the seed, so that a run that goes on makes the same ones again.
    """
    extract = jax.jit(functools.partial(loop_lib.evaluate_batch, experiment.features))
    images, labels = np.asarray(data.images), np.asarray(data.labels)
    parts = batches.eval_batches(images, config.eval.batch_size)
    found = [np.asarray(extract(state, part, data))[mask] for part, mask in parts]
    assert experiment.synthetic
    made = experiment.synthetic(config, np.concatenate(found), labels)
    features, labels = parallel.place(made, data.images.sharding)
    return Features(features, labels, data.order, data.mean, data.std)


class StreamedFeed(Feed):
    """The streams of one epoch after another."""

    steps_per_call, is_shared = 1, False

    def __init__(self, data: LongTailData, experiment: Experiment, config: Config, empty: StepBatches):
        """Decodes nothing yet; `empty` is `data` on the device, its batches without an image."""
        self.data: Input = empty
        self._source, self._experiment, self._config, self._empty = data, experiment, config, empty
        self._sharding = parallel.split(experiment.mesh) if experiment.mesh else inputs.everywhere(None)
        self._steps = streaming.stream([], workers=0)  # of no epoch yet
        self._seconds = self._waited = 0.0

    def start_epoch(self, epoch: int, step: int, state: BilevelState) -> None:
        """Starts to decode what is left of the epoch."""
        order, table = _orders(self._source, self._experiment, self._config, epoch)
        start = epoch * len(order)
        steps = range(start, min(start + len(order), self._experiment.total_steps))
        kinds = [loop_lib.kind_of(self._experiment, self._config, t) for t in steps]
        due = [t if kind == "meta" else None for t, kind in zip(steps, kinds, strict=True)]
        meta_order = inputs.meta_order(state.key, due, table, self._config.meta.batch_size)
        self._start(epoch, np.asarray(order)[: len(steps)], meta_order, step - start)

    def _start(self, epoch: int, order: np.ndarray, meta_order: Sequence[np.ndarray], first: int) -> None:
        """Starts the streams of `order`, int [S, B], and `meta_order`, int [S] x [M or 0], at the batch `first`."""
        self.close()
        data = self._source
        picks = [
            self._picks(data.train_images, list(order), (0, epoch)),
            self._picks(data.meta_images, meta_order, (1, epoch)),
        ]
        self._steps = streaming.stream(picks, workers=self._config.data.workers, first=first)
        self._labels = iter([data.train_labels[rows] for rows in order[first:]])
        self._meta_labels = iter([data.meta_labels[rows] for rows in meta_order[first:]])
        self._seen = time.perf_counter()

    def _picks(self, images: Any, order: Sequence[np.ndarray], name: tuple[int, int]) -> streaming.Picks:
        """Returns this host's part of each batch; batches have one size, or none."""
        settings, places = self._config.augment, self._places(max(map(len, order), default=0))
        own = [rows[places] if len(rows) else rows for rows in order]
        if settings.crop != "resized":
            return streaming.Picks(images, own)
        return streaming.Picks(
            images, own, streaming.RandomPart(settings.min_area, (self._config.train.seed, *name), places)
        )

    def _places(self, size: int) -> np.ndarray:
        """Returns the places in a batch of `size` that this host's devices hold, sorted."""
        held = self._sharding.addressable_devices_indices_map((size,)).values()
        return np.unique(np.concatenate([np.arange(size)[index] for index in held]))

    def next(self) -> Input:
        """Returns the next batch, and the next meta batch where the step has one, or else the empty one.

        So all plain steps have arrays of one shape, and are compiled once.
        """
        began = time.perf_counter()
        image, meta_image = next(self._steps)
        before, self._seen = self._seen, time.perf_counter()
        self._waited, self._seconds = self._waited + self._seen - began, self._seconds + self._seen - before
        label, meta_label = next(self._labels), next(self._meta_labels)
        given = self._empty.replace(
            images=self._from_own(image, len(label)), labels=parallel.place(label, self._sharding)
        )
        if len(meta_label):
            given = given.replace(
                meta_images=self._from_own(meta_image, len(meta_label)),
                meta_labels=parallel.place(meta_label, self._sharding),
            )
        self.data = given
        return given

    def _from_own(self, own: np.ndarray, size: int) -> jax.Array:
        """Returns the batch of `size` of which this host has decoded its places, in their order."""
        places = self._places(size)

        def part(index: Any) -> np.ndarray:  # one slice an axis
            begin, end, _ = index[0].indices(size)
            first = np.searchsorted(places, begin)
            return own[first : first + end - begin]

        return jax.make_array_from_callback((size, *own.shape[1:]), self._sharding, part)

    def waited(self) -> float:
        return self._waited / self._seconds if self._seconds else 0.0

    def close(self) -> None:
        self._steps.close()
