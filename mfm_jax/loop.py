"""The compiled part of the training loop: sample, augment, step and add up, without leaving the device.

Images, labels and the epoch's order live on the device. Everything is a function of the state, the seed and the step,
so a run that goes on from a checkpoint repeats the same batches with the same augmentation.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mfm_jax import augment, parallel
from mfm_jax.config import Config, Train
from mfm_jax.data import LongTailData, batches
from mfm_jax.data.sources import Images, Labels
from mfm_jax.data.streaming import Streamed
from mfm_jax.experiment import Experiment
from mfm_jax.methods import smote
from mfm_jax.passes import Pass
from mfm_jax.types import META_METRICS, Batch, BilevelState, Metrics, PyTree

WATCHED = ("loss", "grad_norm", "meta_loss", "hypergrad_norm")  # must stay finite
ANOMALIES = (
    *(f"{name} became non-finite" for name in WATCHED),
    "grad_norm rose above train.spike_factor times its running mean",
)
_SETTLING_IMAGES = 2000  # 500 to 2,000 measured alike on CIFAR-10
_NOTED = 32  # skipped steps of an epoch that are noted one by one; the others are counted
_NORM_DECAY, _NORM_WARMUP = 0.99, 10  # of the running mean of grad_norm: decay a step, steps before it is trusted


class LoopState(struct.PyTreeNode):
    """What the loop carries on the device, and what a checkpoint holds.

    bilevel: the training state.
    sums: running sums of the epoch's metrics; `steps` and `meta_steps` are their divisors.
    bad: [m, 2] int32, the first m steps (of the epoch, where such steps are skipped) with an anomaly, and its index in
      `ANOMALIES`; -1 where there were fewer.
    norms: [2] float32, sum and weight of the running mean of grad_norm; zero without `train.spike_factor`.
    """

    bilevel: BilevelState
    sums: Metrics
    bad: jax.Array
    norms: jax.Array


class DeviceData(struct.PyTreeNode):
    """The resident data and one epoch's order; or, where images are streamed, a step's batches.

    images: uint8 [N, H, W, C], or a second stage's features float32 [N, C]; labels: int32 [N].
    meta_images, meta_labels: the pool that the meta table indexes.
    order: int32 [steps, B], None where `images` are the batch itself.
    meta_table: int32 [K, m], None where `meta_images` are the meta batch.
    mean, std: float32 [C].
    """

    images: jax.Array
    labels: jax.Array
    meta_images: jax.Array
    meta_labels: jax.Array
    order: jax.Array | None
    meta_table: jax.Array | None
    mean: jax.Array
    std: jax.Array


def make_call(experiment: Experiment, config: Config, seeds: int = 1) -> Callable[..., LoopState]:
    """Returns the compiled call `(loop, device_data, is_meta, kind) -> loop`: sample, augment, step, add up.

    With `seeds > 1` the loop state and the data are those of `stack`, and every step is mapped over them.

    `is_meta` `[n]` bool says of each of the n steps whether it updates the modulator; `kind` is static: "meta",
    "plain" or "retrain" where all steps are, else "mixed". One step is compiled as it is (XLA's CPU backend
    runs convolutions inside a loop many times slower than outside); several are a `lax.scan`. The loop state is
    donated.
    """

    def sample(
        key: jax.Array, images: jax.Array, labels: jax.Array, index: jax.Array | None, data: DeviceData
    ) -> Batch:
        if index is not None:
            images, labels = batches.gather(images, index), batches.gather(labels, index)
        pictures = augment.augment_batch(key, images, config.augment)
        return Batch(augment.normalize(pictures, data.mean, data.std), labels)

    def training_batch(keys: jax.Array, index: jax.Array | None, data: DeviceData, kind: str) -> Batch:
        if kind == "retrain" and experiment.synthetic and index is not None:
            return Batch(batches.gather(data.images, index), batches.gather(data.labels, index))
        batch = sample(keys[0], data.images, data.labels, index, data)
        if config.augment.mixup:
            image, partner, share = augment.mixup(keys[3], batch.image, batch.label, config.augment.mixup)
            return Batch(image, batch.label, partner, share)
        return batch

    def one(loop: LoopState, data: DeviceData, kind: str) -> LoopState:
        state = loop.bilevel
        keys = _keys(state.key, state.step)
        index = None if data.order is None else data.order[state.step % experiment.steps_per_epoch]
        batch = training_batch(keys, index, data, kind)
        is_meta = kind == "meta"
        if kind == "retrain" and experiment.retrain_step is not None:
            new_state, metrics = experiment.retrain_step(state, batch)
        elif is_meta and experiment.meta_step is not None:
            index = None
            if data.meta_table is not None:
                index = meta_index(state.key, state.step, data.meta_table, config.meta.batch_size)
                # Drawn by each device for itself: divided, the sorting would cost more in messages than it saves.
                index = parallel.whole(index, experiment.mesh)
            meta_batch = sample(keys[2], data.meta_images, data.meta_labels, index, data)
            new_state, metrics = experiment.meta_step(state, batch, meta_batch)
        else:
            new_state, metrics = experiment.plain_step(state, batch)
        return _accumulate(loop, new_state, metrics, is_meta, config.train)

    def step(loop: LoopState, data: DeviceData, kind: str) -> LoopState:
        each = functools.partial(one, kind=kind)
        return each(loop, data) if seeds == 1 else jax.vmap(each, in_axes=(0, _seed_axes()))(loop, data)

    @functools.partial(jax.jit, static_argnums=3, donate_argnums=0, compiler_options=parallel.compiler_options())
    def call(loop: LoopState, data: DeviceData, is_meta: jax.Array, kind: str) -> LoopState:
        if kind == "mixed":
            branches = (lambda c: step(c, data, "meta"), lambda c: step(c, data, "plain"))
            return jax.lax.scan(lambda c, meta: (jax.lax.cond(meta, *branches, c), None), loop, is_meta)[0]
        if len(is_meta) == 1:
            return step(loop, data, kind)
        return jax.lax.scan(lambda c, _: (step(c, data, kind), None), loop, length=len(is_meta))[0]

    return call


def _keys(key: jax.Array, step: jax.Array) -> jax.Array:
    """Returns a step's keys: of the augmentation, the meta batch, its augmentation, and mixup."""
    return jax.random.split(jax.random.fold_in(key, step), 4)


def meta_index(key: jax.Array, step: jax.Array, table: jax.Array, batch_size: int) -> jax.Array:
    """Returns the meta batch of a step, int32 [batch_size], out of `table` [K, m]; `key` is `BilevelState.key`."""
    return batches.meta_indices(_keys(key, step)[1], step, table, batch_size)


def meta_order(key: jax.Array, steps: Sequence[int | None], table: jax.Array, batch_size: int) -> list[np.ndarray]:
    """Returns `meta_index` of each step, on the host; nothing where the step is None."""
    drawn = jax.jit(meta_index, static_argnums=3)
    none = np.zeros(0, np.int32)
    return [none if step is None else np.asarray(drawn(key, jnp.int32(step), table, batch_size)) for step in steps]


def _seed_axes() -> Any:
    """Which of the data's arrays differ between runs with different seeds: the orders, not the images."""
    shared: Any = dict.fromkeys((field.name for field in dataclasses.fields(DeviceData)), None)
    return DeviceData(**shared | {"order": 0, "meta_table": 0})


def stack(loops: Sequence[LoopState], data: Sequence[DeviceData]) -> tuple[LoopState, DeviceData]:
    """Returns the states of runs with different seeds along a new first axis, and their data, images shared.

    One run is returned as it is.
    """
    if len(loops) == 1:
        return loops[0], data[0]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *loops)
    orders, tables = (jnp.stack([getattr(d, name) for d in data]) for name in ("order", "meta_table"))
    return stacked, data[0].replace(order=orders, meta_table=tables)


def unstack(loop: LoopState, seeds: int) -> list[LoopState]:
    """Returns each run's own state: the inverse of `stack`."""
    return [loop] if seeds == 1 else [jax.tree.map(lambda leaf, i=i: leaf[i], loop) for i in range(seeds)]


def steps(is_meta: Sequence[bool], *, retrain: bool = False) -> tuple[jax.Array, str]:
    """Returns the last two arguments of the compiled call, from one bool a step; `retrain` in the second stage."""
    kind = "retrain" if retrain else "meta" if all(is_meta) else "mixed" if any(is_meta) else "plain"
    return jax.device_put(np.asarray(is_meta)), kind


def _accumulate(loop: LoopState, state: BilevelState, metrics: Metrics, is_meta: bool, train: Train) -> LoopState:
    """Returns the loop after a step that gave `state`, its metrics added to the sums and an anomaly noted.

    Where `train.on_nonfinite` is "skip", a step with an anomaly changes nothing but the step count: the state is
    what it was, and the sums leave the step out.
    """
    counts = {"steps": jnp.float32(1), "meta_steps": jnp.float32(is_meta)}
    values = {name: value.astype(jnp.float32) for name, value in metrics.items()}
    found = {index: ~jnp.isfinite(values[name]) for index, name in enumerate(WATCHED) if name in values}
    norms = loop.norms
    if train.spike_factor:
        norms, found[len(WATCHED)] = _watch_norm(norms, values["grad_norm"], train.spike_factor)
    anomaly = jnp.int32(-1)
    for index in reversed(found):
        anomaly = jnp.where(found[index], index, anomaly)
    is_bad = anomaly >= 0
    free = jnp.cumsum(loop.bad[:, 0] < 0) == 1  # the first free row
    bad = jnp.where((is_bad & free)[:, None], jnp.stack([loop.bilevel.step, anomaly])[None], loop.bad)
    added = values | counts
    if train.on_nonfinite == "skip":
        before = loop.bilevel.replace(step=state.step)
        state = jax.tree.map(lambda old, new: jnp.where(is_bad, old, new), before, state)
        added = {name: jnp.where(is_bad, 0.0, value) for name, value in added.items()}
        added["skipped"] = is_bad.astype(jnp.float32)
    sums = {name: total + added.get(name, 0.0) for name, total in loop.sums.items()}
    return LoopState(state, sums, bad, norms)


def _watch_norm(norms: jax.Array, norm: jax.Array, factor: float) -> tuple[jax.Array, jax.Array]:
    """Returns the running mean's new sum and weight, and whether `norm` is a spike: above `factor` times the mean.

    The mean is exponential. A spike enters it as `factor` times the mean, so that a lasting rise is caught up with.
    """
    warm, bound = norms[1] > _NORM_WARMUP, factor * norms[0] / jnp.maximum(norms[1], 1.0)
    seen = jnp.stack([jnp.where(warm, jnp.minimum(norm, bound), norm), jnp.float32(1)])
    return _NORM_DECAY * norms + jnp.where(jnp.isfinite(norm), seen, 0.0), warm & (norm > bound)


def initial(experiment: Experiment, train: Train = Train(), *, anew: bool = True) -> LoopState:  # noqa: B008 (frozen)
    """Returns the loop state before the first step; unless `anew`, to be restored: no weights are loaded for it."""
    init = experiment.init_pretrained if anew and experiment.init_pretrained else experiment.init
    return LoopState(init(), _zero_sums(experiment, train), no_anomalies(train), jnp.zeros(2, jnp.float32))


def no_anomalies(train: Train) -> jax.Array:
    """Returns `LoopState.bad` of a loop that has met none."""
    return jnp.full((_NOTED if train.on_nonfinite == "skip" else 1, 2), -1, jnp.int32)


def _zero_sums(experiment: Experiment, train: Train) -> Metrics:
    names = ["loss", "accuracy", "grad_norm", "steps"]
    if experiment.meta_step is not None:
        names += [*META_METRICS, "meta_steps"]
    if train.on_nonfinite == "skip":
        names += ["skipped"]
    return {name: jnp.zeros((), jnp.float32) for name in names}


def to_device(data: LongTailData) -> DeviceData:
    """Returns the training data on the device, with the order of no epoch yet; of streamed data, empty batches."""
    streamed = isinstance(data.train_images, Streamed)
    held_out = data.meta_images is not data.train_images

    def put(images: Images, labels: Labels) -> tuple[jax.Array, jax.Array]:
        if isinstance(images, Streamed):
            return jnp.zeros((0, *images.shape[1:]), jnp.uint8), jnp.zeros(0, jnp.int32)
        return jnp.asarray(images), jnp.asarray(labels)

    train = put(data.train_images, data.train_labels)
    meta = put(data.meta_images, data.meta_labels) if held_out else train
    return DeviceData(
        images=train[0],
        labels=train[1],
        meta_images=meta[0],
        meta_labels=meta[1],
        order=None if streamed else jnp.zeros((0, 0), jnp.int32),
        meta_table=None if streamed else jnp.zeros((0, 0), jnp.int32),
        mean=jnp.asarray(data.mean, jnp.float32),
        std=jnp.asarray(data.std, jnp.float32),
    )


def make_settle(experiment: Experiment) -> Callable[[BilevelState, DeviceData], BilevelState]:
    """Returns `(state, data) -> state` with the batch statistics that its classifier has now, for testing and storing.

    They are the mean over the epoch's first batches, about 2,000 images, as sampled, not augmented; running
    averages are those of the last ten steps' networks and images. Streamed images are not there to be seen again;
    those runs keep the averages.

    References:
      Wu and Johnson, Rethinking "batch" in BatchNorm, arXiv:2105.07576, 2021, section 3 (precise batch norm).
    """
    forward = Pass(experiment.apply)

    @jax.jit
    def added(total: PyTree, state: BilevelState, data: DeviceData, index: jax.Array) -> PyTree:
        image = augment.normalize(batches.gather(data.images, index), data.mean, data.std)
        found = forward.statistics(state, state.params, Batch(image, batches.gather(data.labels, index)))
        return jax.tree.map(jnp.add, total, found)

    def settle(state: BilevelState, data: DeviceData) -> BilevelState:
        if data.order is None or not state.batch_stats:
            return state
        chosen = data.order[: -(-_SETTLING_IMAGES // data.order.shape[1])]
        total = jax.tree.map(jnp.zeros_like, state.batch_stats)
        for index in chosen:
            total = added(total, state, data, index)
        return state.replace(batch_stats=jax.tree.map(lambda leaf: leaf / len(chosen), total))

    return settle


def evaluate_batch(eval_step: Callable, state: BilevelState, image: jax.Array, data: DeviceData) -> jax.Array:
    """Returns `eval_step(state, image)`, the tested classifier's probabilities `[B, K]`, of stored images."""
    return eval_step(state, augment.normalize(image, data.mean, data.std))


def synthetic_data(
    experiment: Experiment, data: DeviceData, state: BilevelState, neighbors: int, seed: int, batch_size: int
) -> DeviceData:
    """Returns `data` with the frozen classifier's features, balanced by SMOTE, in the place of the images.

    Features are computed once, without augmentation, in batches of `batch_size` on the device; SMOTE runs on the host.
    A function of the frozen classifier and the seed, so that a run that goes on makes the same ones again.
    """
    extract = jax.jit(functools.partial(evaluate_batch, experiment.features))
    images, labels = np.asarray(data.images), np.asarray(data.labels)
    parts = batches.eval_batches(images, batch_size)
    found = [np.asarray(extract(state, part, data))[mask] for part, mask in parts]
    features, labels = smote.oversample(np.concatenate(found), labels, neighbors, seed)
    placed = parallel.place((features, labels), data.images.sharding)
    return data.replace(images=placed[0], labels=placed[1])


def describe(experiment: Experiment, state: BilevelState, data: DeviceData) -> dict[str, Metrics]:
    """Returns gamma and beta `[C]` by site, averaged over the epoch's first batch, without augmentation.

    Of streamed data it is the last batch that was fed, as the workers cropped it.
    """
    modulator = experiment.modulator
    assert modulator is not None
    first = slice(None) if data.order is None else data.order[0]
    image, label = augment.normalize(data.images[first], data.mean, data.std), data.labels[first]
    seen: dict[str, Metrics] = {}

    def record(site: str, features: jax.Array) -> jax.Array:
        if site in modulator.sites:
            pair = modulator.parameters(state.phi, site, features, label)
            seen[site] = {
                name: x.reshape(-1, x.shape[-1]).mean(axis=0) for name, x in zip(("gamma", "beta"), pair, strict=True)
            }
        return features

    experiment.apply({"params": state.params, "batch_stats": state.batch_stats}, image, train=False, modulate=record)
    return seen
