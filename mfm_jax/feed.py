"""Streams the batches of a run to its devices, where the data is too large to stay there.

The resident path puts an epoch's order on the device and gathers there. Here the order stays on the host, worker
processes decode what it asks for (`data.streaming`), and every step gets its batch, put on the device while the step
before it is still computed. Both paths see the same examples in the same order. Each host decodes its own part of
every batch.

Which examples are in a meta batch, and which part of each picture is seen, follows from the seed, the epoch and the
step, so that a run goes on in the middle of an epoch with the batches of an uninterrupted one.
"""

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from mfm_jax import loop, parallel
from mfm_jax.config import Config
from mfm_jax.data import LongTailData, streaming
from mfm_jax.errors import UserError
from mfm_jax.loop import DeviceData


class Feed:
    """The streams of one epoch after another."""

    def __init__(self, data: LongTailData, config: Config, key: jax.Array, mesh: Mesh | None):
        """Takes the run's data and config, its `BilevelState.key`, and the devices that batches are split over."""
        self._data, self._config, self._key = data, config, key
        self._sharding: Sharding = parallel.split(mesh) if mesh else SingleDeviceSharding(jax.devices()[0])
        _check_sizes(config, mesh.shape[parallel.AXIS] if mesh else 1)
        self._open = contextlib.ExitStack()

    def start_epoch(
        self, epoch: int, start: int, order: np.ndarray, table: np.ndarray, first: int, is_meta: np.ndarray
    ) -> None:
        """Starts to decode what is left of an epoch.

        Args:
          epoch: its number.
          start: the step of the run that it begins with.
          order: int [S, B], the training images of each batch, from the epoch's first on.
          table: int [K, m], each class's meta images.
          first: the batch to begin with.
          is_meta: bool [S], whether each is a meta-step's.
        """
        self.close()
        data, first_meta = self._data, int(is_meta[:first].sum())
        steps = start + np.flatnonzero(is_meta)
        draw = functools.partial(
            loop.meta_index, self._key, table=jnp.asarray(table), batch_size=self._config.meta.batch_size
        )
        meta_order = np.asarray(jax.vmap(draw)(jnp.asarray(steps))) if len(steps) else np.zeros((0, 1), np.int32)
        self._batches = self._stream(data.train_images, order, first, (0, epoch))
        self._meta_batches = self._stream(data.meta_images, meta_order, first_meta, (1, epoch))
        self._labels = iter(data.train_labels[order[first:]])
        self._meta_labels = iter(data.meta_labels[meta_order[first_meta:]])
        self._began, self._waited = time.perf_counter(), 0.0

    def _stream(self, images: Any, order: np.ndarray, first: int, name: tuple[int, ...]) -> Iterator[np.ndarray]:
        settings, seed = self._config.augment, self._config.train.seed
        part = streaming.RandomPart(settings.min_area, (seed, *name)) if settings.crop == "resized" else None
        opened = streaming.stream(
            images, order, workers=self._config.data.workers, part=part, first=first, share=_share(order.shape[1])
        )
        return self._open.enter_context(opened)

    def next(self, data: DeviceData, is_meta: bool) -> DeviceData:
        """Returns `data` with the next batch, and the next meta batch if this is a meta-step."""
        data = data.replace(images=self._wait(self._batches), labels=self._place(next(self._labels)))
        if is_meta:
            image, label = self._wait(self._meta_batches), self._place(next(self._meta_labels))
            data = data.replace(meta_images=image, meta_labels=label)
        return data

    def _wait(self, stream: Iterator[np.ndarray]) -> jax.Array:
        began = time.perf_counter()
        batch = next(stream)
        self._waited += time.perf_counter() - began
        return jax.make_array_from_process_local_data(self._sharding, batch)

    def _place(self, labels: np.ndarray) -> jax.Array:
        return parallel.place(labels, self._sharding)

    def waited(self) -> float:
        """Returns which part of the epoch's time so far was spent waiting for pictures, 0..1."""
        return self._waited / max(time.perf_counter() - self._began, 1e-9)

    def close(self) -> None:
        """Ends the worker processes."""
        self._open.close()


def _share(size: int) -> slice:
    """Returns the places of a batch that this host decodes."""
    part = size // jax.process_count()
    return slice(jax.process_index() * part, (jax.process_index() + 1) * part)


def _check_sizes(config: Config, devices: int) -> None:
    for field, size in (("train.batch_size", config.train.batch_size), ("meta.batch_size", config.meta.batch_size)):
        if size % devices:
            raise UserError(f"{field} = {size}: streamed batches must divide by the {devices} devices")
