"""What a step reads on the device: three kinds of input, each a type of its own.

Most data stays on the device whole, and a step gathers its batch by the epoch's order (`ResidentSet`). Of data that is
streamed, a step gets its own batches (`StepBatches`). A second stage on a frozen classifier may read that classifier's
features instead of images (`Features`). `feed` has the host's side.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from mfm_jax.data import LongTailData, batches
from mfm_jax.data.sources import Images, Labels
from mfm_jax.data.streaming import Streamed
from mfm_jax.machine import parallel
from mfm_jax.types import PyTree

Examples = tuple[jax.Array, jax.Array]  # images uint8 [B, H, W, C], or features float32 [B, C]; labels int32 [B]


class ResidentSet(struct.PyTreeNode):
    """The training data and one epoch's order.

    images, labels: uint8 [N, H, W, C], int32 [N].
    meta_images, meta_labels: the pool that the meta table indexes.
    order: int32 [steps, B], of which step t of the run reads row `t % steps`.
    meta_table: int32 [K, m].
    mean, std: float32 [C].
    teacher: what `teacher.Teacher.arrays` has; None where there is none.
    """

    images: jax.Array
    labels: jax.Array
    meta_images: jax.Array
    meta_labels: jax.Array
    order: jax.Array
    meta_table: jax.Array
    mean: jax.Array
    std: jax.Array
    teacher: PyTree = None

    def at(self, index: jax.Array) -> Examples:
        """Returns the training examples at `index`, int [B]."""
        return batches.gather(self.images, index), batches.gather(self.labels, index)


class StepBatches(struct.PyTreeNode):
    """The batches of one step: B training examples and, where it is a meta-step, M meta examples; fields as above."""

    images: jax.Array
    labels: jax.Array
    meta_images: jax.Array
    meta_labels: jax.Array
    mean: jax.Array
    std: jax.Array
    teacher: PyTree = None


class Features(struct.PyTreeNode):
    """A frozen classifier's features float32 [N, C], their labels int32 [N], and the rest as above."""

    features: jax.Array
    labels: jax.Array
    order: jax.Array
    mean: jax.Array  # of images, which are still tested
    std: jax.Array

    def at(self, index: jax.Array) -> Examples:
        """Returns the training examples at `index`, int [B]."""
        return batches.gather(self.features, index), batches.gather(self.labels, index)


Input = ResidentSet | StepBatches | Features

# As `in_axes` of `jax.vmap` over runs with different seeds: the orders differ, the images do not.
SEED_AXES = ResidentSet(None, None, None, None, order=0, meta_table=0, mean=None, std=None)  # type: ignore[arg-type]


def training(data: Input, step: int | jax.Array) -> Examples:
    """Returns the training examples of a step of the run."""
    if isinstance(data, StepBatches):
        return data.images, data.labels
    return data.at(data.order[step % len(data.order)])


def meta(data: Input, key: jax.Array, step: int | jax.Array, size: int, mesh: Mesh | None = None) -> Examples:
    """Returns the `size` meta examples of a step of the run; `key` is `BilevelState.key`."""
    assert not isinstance(data, Features)  # those are of a second stage, which has no meta-steps
    if isinstance(data, StepBatches):
        return data.meta_images, data.meta_labels
    # Drawn by each device for itself: divided, the sorting would cost more in messages than it saves.
    index = parallel.whole(meta_index(key, step, data.meta_table, size), mesh)
    return batches.gather(data.meta_images, index), batches.gather(data.meta_labels, index)


def balanced(data: Input, key: jax.Array, size: int, mesh: Mesh | None = None) -> Examples:
    """Returns `size` training examples in which every class is as likely as any other."""
    assert isinstance(data, ResidentSet)  # `preflight` refuses the others
    index = batches.balanced_indices(key, data.labels, len(data.meta_table), size)
    return data.at(parallel.whole(index, mesh))


def stack(sets: Sequence[Input]) -> ResidentSet:
    """Returns the sets of runs with different seeds as one, their orders along a new first axis, the images shared."""
    first = sets[0]
    assert isinstance(first, ResidentSet)
    order, table = (jnp.stack([getattr(one, name) for one in sets]) for name in ("order", "meta_table"))
    return first.replace(order=order, meta_table=table)


def everywhere(mesh: Mesh | None) -> Sharding:
    """Returns where what every step reads lies: whole on each device of `mesh`, or on the first of all."""
    return parallel.replicated(mesh) if mesh else SingleDeviceSharding(jax.devices()[0])


def step_keys(key: jax.Array, step: int | jax.Array) -> jax.Array:
    """Returns a step's keys: of the augmentation, the meta batch, its augmentation, and mixing."""
    return jax.random.split(jax.random.fold_in(key, step), 4)


def meta_index(key: jax.Array, step: int | jax.Array, table: jax.Array, batch_size: int) -> jax.Array:
    """Returns the meta batch of a step, int32 [batch_size], out of `table` [K, m]; `key` is `BilevelState.key`."""
    return batches.meta_indices(step_keys(key, step)[1], step, table, batch_size)


def meta_order(key: jax.Array, steps: Sequence[int | None], table: jax.Array, batch_size: int) -> list[np.ndarray]:
    """Returns `meta_index` of each step, on the host; nothing where the step is None."""
    drawn = jax.jit(meta_index, static_argnums=3)
    none = np.zeros(0, np.int32)
    return [none if step is None else np.asarray(drawn(key, jnp.int32(step), table, batch_size)) for step in steps]


def to_device(data: LongTailData) -> ResidentSet | StepBatches:
    """Returns the training data on the device, with the order of no epoch yet; of streamed data, empty batches."""

    def put(images: Images, labels: Labels) -> Examples:
        if isinstance(images, Streamed):
            return jnp.zeros((0, *images.shape[1:]), jnp.uint8), jnp.zeros(0, jnp.int32)
        return jnp.asarray(images), jnp.asarray(labels)

    train = put(data.train_images, data.train_labels)
    meta = put(data.meta_images, data.meta_labels) if data.meta_images is not data.train_images else train
    mean, std = (jnp.asarray(value, jnp.float32) for value in (data.mean, data.std))
    if isinstance(data.train_images, Streamed):
        return StepBatches(*train, *meta, mean, std)
    none = jnp.zeros((0, 0), jnp.int32)
    return ResidentSet(*train, *meta, none, none, mean, std)
