"""Streams the batches of a run to its devices, where the data is too large to stay there.

The resident path puts an epoch's order on the device and gathers there. Here the order stays on the host, worker
processes decode what it asks for (`data.streaming`), and every step gets its batch, put on the device while the step
before it is still computed. Both paths see the same examples in the same order. Each host decodes its own part of
every batch.

Which examples are in a meta batch, and which part of each picture is seen, follows from the seed, the epoch and the
step, so that a run goes on in the middle of an epoch with the batches of an uninterrupted one.
"""

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from mfm_jax import parallel
from mfm_jax.config import Config
from mfm_jax.data import LongTailData, streaming
from mfm_jax.loop import DeviceData


class Feed:
    """The streams of one epoch after another."""

    def __init__(self, data: LongTailData, config: Config, mesh: Mesh | None, empty: DeviceData):
        """Makes none yet; `empty` is `data` on the device, its batches without an image."""
        self._data, self._config, self._empty = data, config, empty
        self._sharding: Sharding = parallel.split(mesh) if mesh else SingleDeviceSharding(jax.devices()[0])
        self._open = contextlib.ExitStack()
        self._seconds = self._waited = 0.0

    def start_epoch(self, epoch: int, order: np.ndarray, meta_order: Sequence[np.ndarray], first: int) -> None:
        """Starts to decode what is left of an epoch.

        Args:
          epoch: its number.
          order: int [S, B], the training images of each batch from the epoch's first on.
          meta_order: int [S] x [M or 0], the meta images of each.
          first: the batch to begin with.
        """
        self.close()
        data = self._data
        picks = [
            self._picks(data.train_images, list(order), (0, epoch)),
            self._picks(data.meta_images, meta_order, (1, epoch)),
        ]
        self._steps = self._open.enter_context(streaming.stream(picks, workers=self._config.data.workers, first=first))
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

    def next(self) -> DeviceData:
        """Returns the next batch, and the next meta batch where the step has one, or else the empty one.

        So all plain steps have arrays of one shape, and are compiled once.
        """
        began = time.perf_counter()
        image, meta_image = next(self._steps)
        before, self._seen = self._seen, time.perf_counter()
        self._waited, self._seconds = self._waited + self._seen - began, self._seconds + self._seen - before
        label, meta_label = next(self._labels), next(self._meta_labels)
        data = self._empty.replace(
            images=self._from_own(image, len(label)), labels=parallel.place(label, self._sharding)
        )
        if not len(meta_label):
            return data
        return data.replace(
            meta_images=self._from_own(meta_image, len(meta_label)),
            meta_labels=parallel.place(meta_label, self._sharding),
        )

    def _from_own(self, own: np.ndarray, size: int) -> jax.Array:
        """Returns the batch of `size` of which this host has decoded its places, in their order."""
        places = self._places(size)

        def part(index: Any) -> np.ndarray:  # one slice an axis
            begin, end, _ = index[0].indices(size)
            first = np.searchsorted(places, begin)
            return own[first : first + end - begin]

        return jax.make_array_from_callback((size, *own.shape[1:]), self._sharding, part)

    def waited(self) -> float:
        """Returns which part of the training time so far, validation apart, was spent waiting for pictures, 0..1."""
        return self._waited / self._seconds if self._seconds else 0.0

    def close(self) -> None:
        """Ends the worker processes."""
        self._open.close()
