"""Which examples are in which batch, as pure functions of a key and a step.

A small dataset lives on the device whole, so a batch is a row of indices and an epoch a table of them.
Nothing here keeps a position: the batch of step t follows from (key, t) alone, so a run that stops and
resumes at any step sees the batches of an uninterrupted one, and there is no iterator state to save.

The training order is a fresh permutation each epoch, its remainder dropped, so that every step has the same
shape and compiles once; where a method draws classes by another distribution, `sampled_order` makes the table. Meta
batches are balanced: class counts differ by at most one. Give each function a key of its own (`fold_in` of a
stream's name), as two that share a key share their randomness.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mfm_jax.data import streaming
from mfm_jax.data.sources import Images
from mfm_jax.data.streaming import Streamed


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Returns the number of whole batches; the remainder is dropped, a different one each epoch."""
    return num_examples // batch_size


@functools.partial(jax.jit, static_argnames=("num_examples", "batch_size"))
def epoch_order(key: jax.Array, epoch: int | jax.Array, num_examples: int, batch_size: int) -> jax.Array:
    """Returns the example indices of one epoch, int32 [steps_per_epoch, batch_size], each at most once."""
    steps = steps_per_epoch(num_examples, batch_size)
    examples = jnp.arange(num_examples, dtype=jnp.int32)
    shuffled = jax.random.permutation(jax.random.fold_in(key, epoch), examples)
    return shuffled[: steps * batch_size].reshape(steps, batch_size)


@functools.partial(jax.jit, static_argnames="batch_size")
def sampled_order(
    key: jax.Array, epoch: int | jax.Array, labels: jax.Array, share: jax.Array, keep: jax.Array, batch_size: int
) -> jax.Array:
    """Returns the example indices of one epoch in which class k has the part `share_k` of the T = steps * B places.

    A class gets `share_k * T` places, rounded up or down at random; its images take turns, so that within an epoch
    none is seen twice before all have been seen once.

    Args:
      key: typed PRNG key of the order's stream.
      epoch: the epoch; another one gives another draw.
      labels: int32 [N], every class present.
      share: [K], the distribution over classes; sums to one.
      keep: int32 [K], images of each class that are used at all, 1 to n_k: the same ones in every epoch.
      batch_size: static.

    Returns:
      int32 [steps_per_epoch, batch_size].
    """
    steps = steps_per_epoch(len(labels), batch_size)
    chosen, epoch_key = jax.random.uniform(key, labels.shape), jax.random.fold_in(key, epoch)
    turn_key, place_key, shuffle_key = jax.random.split(epoch_key, 3)
    counts = jnp.bincount(labels, length=len(share))
    first = jnp.cumsum(counts) - counts  # of each class, in an array that is sorted by class
    rank = jnp.arange(len(labels)) - first[jnp.sort(labels)]
    by_choice = jnp.lexsort((chosen, labels))
    kept = jnp.zeros(labels.shape, bool).at[by_choice].set(rank < keep[jnp.sort(labels)])
    pool = jnp.lexsort((jax.random.uniform(turn_key, labels.shape), ~kept, labels))  # by class, kept ones first
    places = steps * batch_size
    position = (jnp.arange(places) + jax.random.uniform(place_key)) / places
    label = jnp.searchsorted(jnp.cumsum(share), position, side="right").clip(0, len(share) - 1)
    turn = jnp.arange(places) - jnp.searchsorted(label, label, side="left")
    order = pool[first[label] + turn % keep[label]]
    return jax.random.permutation(shuffle_key, order).reshape(steps, batch_size).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="batch_size")
def meta_indices(key: jax.Array, step: int | jax.Array, table: jax.Array, batch_size: int) -> jax.Array:
    """Returns the indices of one balanced meta batch, int32 [batch_size], without repeats.

    Each class's images are shuffled; the batch takes every class's first image, then every class's second,
    and so on, the classes in random order within each round. Class counts thus differ by at most one for any
    batch size up to K * m, and every image is equally likely.

    Args:
      key: typed PRNG key of the meta stream.
      step: the training step.
      table: int32 [K, m], the indices of each class's meta images.
      batch_size: static, at most K * m.

    Raises:
      ValueError: `batch_size` exceeds K * m.
    """
    if batch_size > table.size:
        raise ValueError(f"a meta batch of {batch_size} from {table.size} meta images would repeat some")
    key_image, key_class = jax.random.split(jax.random.fold_in(key, step))
    drawn = jax.random.permutation(key_image, table, axis=1, independent=True)
    turn = jax.random.uniform(key_class, table.shape, jnp.float32)  # order of the classes within a round
    position = jnp.argsort(turn, axis=0)
    return jnp.take_along_axis(drawn, position, axis=0).T.reshape(-1)[:batch_size].astype(jnp.int32)


def balanced_indices(key: jax.Array, labels: jax.Array, num_classes: int, size: int) -> jax.Array:
    """Returns the indices of `size` examples, int32 [size]: a class at random, then one of its images.

    So an image of class k has the weight `1 / n_k`, as the partners of CMO with r = 1.

    Args:
      key: typed PRNG key of this draw.
      labels: int32 [N], every class present.
      num_classes: K.
      size: static; repeats are possible.

    References:
      Park et al., The majority can help the minority: context-rich minority oversampling for long-tailed
      classification, CVPR 2022, section 3.2, whose code weighs images so.
    """
    class_key, image_key = jax.random.split(key)
    counts = jnp.bincount(labels, length=num_classes)
    label = jax.random.randint(class_key, (size,), 0, num_classes, jnp.int32)
    place = jax.random.randint(image_key, (size,), 0, counts[label], jnp.int32)
    first = jnp.cumsum(counts) - counts  # of each class, in an array that is sorted by class
    return jnp.argsort(labels)[first[label] + place].astype(jnp.int32)


def gather(values: jax.Array, index: jax.Array) -> jax.Array:
    """Returns `values` [N, ...] at `index` (int [B], in range) as [B, ...], in their own dtype."""
    return jnp.take(values, index, axis=0, mode="clip")


def each(apply: Callable[[jax.Array], jax.Array], images: jax.Array) -> jax.Array:
    """Returns `apply` of a batch [B, H, W, C], or of several, [n, B, H, W, C], one after the other in one program."""
    return jax.lax.map(apply, images) if images.ndim == 5 else apply(images)


def eval_batches(images: Images, batch_size: int, workers: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (images [B, ...], mask bool [B]) over all examples in order, NumPy on the host.

    The last batch is padded with zeros where `mask` is False, so that a jitted evaluation step compiles once. Files are
    decoded ahead by `workers` processes.
    """
    if isinstance(images, Streamed):
        parts = streaming.in_batches(images, batch_size, workers)
    else:
        parts = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
    for batch in parts:
        mask = np.arange(batch_size) < len(batch)
        if not mask.all():  # the others are passed on uncopied
            batch = np.pad(batch, [(0, batch_size - len(batch))] + [(0, 0)] * (batch.ndim - 1))
        yield batch, mask
