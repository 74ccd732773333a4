"""The compiled part of the training loop: sample, augment, step and add up, without leaving the device.

Everything is a function of the state, the input, the seed and the step, so a run that goes on from a checkpoint repeats
the same batches with the same augmentation.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from mfm_jax.bilevel import averaging
from mfm_jax.bilevel.passes import Pass
from mfm_jax.config import Config, Train
from mfm_jax.data import augment
from mfm_jax.data.sources import Images
from mfm_jax.machine import parallel
from mfm_jax.models import stacked
from mfm_jax.training import anomalies, inputs
from mfm_jax.training.experiment import Experiment
from mfm_jax.training.inputs import Examples, Features, Input, ResidentSet
from mfm_jax.types import META_METRICS, Batch, BilevelState, Metrics, PyTree

Kind = Literal["meta", "plain", "retrain"]  # of a step: updates w and phi, w alone, or what a second stage trains
KINDS: tuple[Kind, ...] = get_args(Kind)
_SETTLING_IMAGES = 2000  # 500 to 2,000 measured alike on CIFAR-10
_SECOND = 2**31 - 1  # folded into a batch's key: smaller numbers give keys of its examples
_TURNS = 2**31 - 2  # the same


class LoopState(struct.PyTreeNode):
    """What the loop carries on the device, and what a checkpoint holds.

    bilevel: the training state.
    sums: running sums of the epoch's metrics; `steps` and `meta_steps` are their divisors.
    bad: [m, 2] int32, the first m steps (of the epoch, where such steps are skipped) with an anomaly, and its index in
      `anomalies.ANOMALIES`; -1 where there were fewer.
    norms: [2] float32, sum and weight of the running mean of grad_norm; zero without `train.spike_factor`.
    """

    bilevel: BilevelState
    sums: Metrics
    bad: jax.Array
    norms: jax.Array


def make_call(experiment: Experiment, config: Config, seeds: int = 1) -> Callable[..., LoopState]:
    """Returns the compiled call `(loop, data, count, kind) -> loop`: `count` times sample, augment, step, add up.

    `data` is an `inputs.Input`. With `seeds > 1` the loop state and the data are stacked, and every step is mapped over
    them.

    `kind`, of all the steps of the call, is static. `count`, int32 on the device, is a value of the run: each kind is
    one program that holds its step once, however long epochs and the blocks between meta-steps are. Where a call has
    one step at most (`steps_per_call`), it is compiled without a loop: XLA's CPU backend runs convolutions
    inside a loop many times slower than outside. The loop state is donated.
    """
    single = steps_per_call(config) == 1

    def step(loop: LoopState, data: Input, kind: Kind) -> LoopState:
        each = functools.partial(_step, experiment, config, kind=kind)
        return each(loop, data) if seeds == 1 else jax.vmap(each, in_axes=(0, inputs.SEED_AXES))(loop, data)

    @functools.partial(jax.jit, static_argnums=3, donate_argnums=0, compiler_options=parallel.compiler_options())
    @stacked.within(experiment.blocks, mapped=seeds > 1)
    def call(loop: LoopState, data: Input, count: jax.Array, kind: Kind) -> LoopState:
        if single:
            return step(loop, data, kind)
        return jax.lax.fori_loop(0, count, lambda _, carried: step(carried, data, kind), loop)

    return call


def _step(experiment: Experiment, config: Config, loop: LoopState, data: Input, kind: Kind) -> LoopState:
    """Returns the loop after one step."""
    state = loop.bilevel
    keys = inputs.step_keys(state.key, state.step)
    batch = _training_batch(keys, data, state.step, config, experiment.mesh)
    if experiment.teacher and not isinstance(data, Features):
        batch = experiment.teacher.of_batch(batch, data.teacher, data.mean, data.std)
    if kind == "retrain" and experiment.retrain_step is not None:
        new_state, metrics = experiment.retrain_step(state, batch)
    elif kind == "meta" and experiment.meta_step is not None:
        meta = inputs.meta(data, state.key, state.step, config.meta.batch_size, experiment.mesh)
        new_state, metrics = experiment.meta_step(state, batch, _prepared(keys[2], meta, data, config))
    else:
        new_state, metrics = experiment.plain_step(state, batch)
    return _accumulate(loop, new_state, metrics, kind == "meta", config.train)


def _training_batch(keys: jax.Array, data: Input, step: jax.Array, config: Config, mesh: Mesh | None) -> Batch:
    examples = inputs.training(data, step)
    if isinstance(data, Features):
        return Batch(*examples)
    batch, settings = _views(keys[0], examples, data, config), config.augment
    if not (settings.mixup or settings.cutmix or config.method.mixed_views):
        return batch
    partners = None
    if settings.partners == "balanced":
        index_key, augment_key = (jax.random.fold_in(keys[3], which) for which in (4, 5))
        drawn = inputs.balanced(data, index_key, len(batch.label), mesh)
        partners = _views(augment_key, drawn, data, config)
    if config.method.mixed_views:
        return _mixed_views(keys[3], batch, partners, config.method.mixing)
    given = partners and (partners.image, partners.label)
    image, label, partner, share = augment.mixed(keys[3], batch.image, batch.label, settings, given)
    return Batch(image, label, partner, share, second=batch.second)


def _mixed_views(key: jax.Array, batch: Batch, partners: Batch | None, alpha: float) -> Batch:
    """Returns the mixtures of `augment.mixed_views`: the first as the batch, the other as its second view."""

    def both(one: Batch) -> tuple[augment.Pair, jax.Array]:
        first, second = one.views
        return (first.image, second.image), one.label

    mixtures = augment.mixed_views(key, *both(batch), alpha, partners and both(partners))
    first, second = (Batch(image, label, partner, share) for image, label, partner, share in mixtures)
    return first._replace(second=second)


def _views(key: jax.Array, examples: Examples, data: Input, config: Config) -> Batch:
    """Returns images as `_prepared` does, and a second view of them where the method compares two.

    Of streamed pictures both are views of the part that was read.
    """
    if not config.method.second_view:
        return _prepared(key, examples, data, config)
    keys = key, jax.random.fold_in(key, _SECOND)
    drawn = [_augmented(one, examples, config) for one in keys]
    # Normalised together: XLA may divide the same pixels with another last bit where a program does it twice.
    both = augment.normalize(jnp.stack([images for images, _ in drawn], axis=1), data.mean, data.std)
    first, second = (
        Batch(_cut_out(one, both[:, i], config), labels)
        for i, (one, (_, labels)) in enumerate(zip(keys, drawn, strict=True))
    )
    return first._replace(second=second)


def _prepared(key: jax.Array, examples: Examples, data: Input, config: Config) -> Batch:
    """Returns images, augmented and normalised, with their labels."""
    images, labels = _augmented(key, examples, config)
    return Batch(_cut_out(key, augment.normalize(images, data.mean, data.std), config), labels)


def _augmented(key: jax.Array, examples: Examples, config: Config) -> Examples:
    """Returns images, augmented, with their labels."""
    images, labels = examples
    if config.data.pretext == "rotation":  # augmented upright: a mirrored quarter turn is one the other way round
        images = augment.turned(images, -labels)
        labels = jax.random.randint(jax.random.fold_in(key, _TURNS), labels.shape, 0, 4, jnp.int32)
    images = augment.augment_batch(key, images, config.augment)
    if config.data.pretext == "rotation":
        images = augment.turned(images, labels)
    return images, labels


def _cut_out(key: jax.Array, images: jax.Array, config: Config) -> jax.Array:
    return augment.cutout(key, images, config.augment.cutout) if config.augment.cutout else images


@jax.jit
def glance(loop: LoopState) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns copies of `bad` and of the sums `loss` and `steps`: what the host reads while the next call is under way.

    The loop itself is donated to that call.
    """
    return jax.tree.map(jnp.copy, (loop.bad, loop.sums["loss"], loop.sums["steps"]))


def stack(loops: Sequence[LoopState]) -> LoopState:
    """Returns the states of runs with different seeds along a new first axis; that of one run unchanged."""
    return loops[0] if len(loops) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *loops)


def unstack(loop: LoopState, seeds: int) -> list[LoopState]:
    """Returns each run's own state: the inverse of `stack`."""
    return [loop] if seeds == 1 else [jax.tree.map(lambda leaf, i=i: leaf[i], loop) for i in range(seeds)]


def steps_per_call(config: Config) -> int:
    """Returns how many steps one compiled call has at most."""
    return config.train.steps_per_call or (1 if jax.default_backend() == "cpu" else 10)


def at_once(config: Config, images: Images) -> bool:
    """Returns whether a split's images are evaluated in one call: where calls hold loops, if they fit the device."""
    small = isinstance(images, np.ndarray) and images.nbytes <= config.data.resident_mb * 1e6
    return small and steps_per_call(config) > 1


def kind_of(experiment: Experiment, config: Config, step: int) -> Kind:
    """Returns what a step of the run updates: w and phi, w alone, or what the second stage trains."""
    if step >= experiment.retrain_from:
        return "retrain"
    late = step >= config.meta.start_epoch * experiment.steps_per_epoch
    learns = experiment.meta_step is not None and late and step % config.meta.every == 0
    return "meta" if learns else "plain"


def next_steps(experiment: Experiment, config: Config, step: int, end: int) -> tuple[Kind, int]:
    """Returns the kind of a step, and how many of that kind follow one another from it, `end` left out."""
    kind = kind_of(experiment, config, step)
    of_kind = itertools.takewhile(lambda t: kind_of(experiment, config, t) == kind, range(step, end))
    return kind, sum(1 for _ in of_kind)


def _accumulate(loop: LoopState, state: BilevelState, metrics: Metrics, is_meta: bool, train: Train) -> LoopState:
    """Returns the loop after a step that gave `state`, its metrics added to the sums and an anomaly noted.

    Where `train.on_nonfinite` is "skip", a step with an anomaly changes nothing but the step count: the state is
    what it was, and the sums leave the step out.
    """
    values = {name: value.astype(jnp.float32) for name, value in metrics.items()}
    anomaly, norms = anomalies.find(values, loop.norms, train)
    bad = anomalies.note(loop.bad, loop.bilevel.step, anomaly)
    added = values | {"steps": jnp.float32(1), "meta_steps": jnp.float32(is_meta)}
    if train.on_nonfinite == "skip":
        is_bad = anomaly >= 0
        before = loop.bilevel.replace(step=state.step)
        state = jax.tree.map(lambda old, new: jnp.where(is_bad, old, new), before, state)
        added = {name: jnp.where(is_bad, 0.0, value) for name, value in added.items()}
        added["skipped"] = is_bad.astype(jnp.float32)
    sums = {name: total + added.get(name, 0.0) for name, total in loop.sums.items()}
    return LoopState(state, sums, bad, norms)


def initial(experiment: Experiment, train: Train = Train(), *, anew: bool = True) -> LoopState:  # noqa: B008 (frozen)
    """Returns the loop state before the first step; unless `anew`, to be restored: no weights are loaded for it."""
    init = experiment.init_pretrained if anew and experiment.init_pretrained else experiment.init
    return LoopState(init(), _zero_sums(experiment, train), anomalies.none_noted(train), jnp.zeros(2, jnp.float32))


def _zero_sums(experiment: Experiment, train: Train) -> Metrics:
    names = ["loss", "accuracy", "grad_norm", "steps"]
    if experiment.meta_step is not None:
        names += [*META_METRICS, "meta_steps"]
    if train.on_nonfinite == "skip":
        names += ["skipped"]
    return {name: jnp.zeros((), jnp.float32) for name in names}


def make_settle(experiment: Experiment) -> Callable[[BilevelState, Input], BilevelState]:
    """Returns `(state, data) -> state` with the batch statistics that its classifier has now, for testing and storing.

    So has an average of weights its own, which are not those of the weights that are trained.

    They are the mean over the epoch's first batches, about 2,000 images, as sampled, not augmented; running
    averages are those of the last ten steps' networks and images. Streamed images are not there to be seen again;
    those runs keep the averages.

    References:
      Wu and Johnson, Rethinking "batch" in BatchNorm, arXiv:2105.07576, 2021, section 3 (precise batch norm).
    """
    forward = Pass(experiment.apply)

    @jax.jit
    def added(total: PyTree, state: BilevelState, data: ResidentSet, index: jax.Array) -> PyTree:
        image, label = data.at(index)
        found = forward.statistics(state, state.params, Batch(augment.normalize(image, data.mean, data.std), label))
        return jax.tree.map(jnp.add, total, found)

    def statistics(state: BilevelState, data: ResidentSet) -> PyTree:
        chosen = data.order[: -(-_SETTLING_IMAGES // data.order.shape[1])]
        total = jax.tree.map(jnp.zeros_like, state.batch_stats)
        for index in chosen:
            total = added(total, state, data, index)
        return jax.tree.map(lambda leaf: leaf / len(chosen), total)

    def settle(state: BilevelState, data: Input) -> BilevelState:
        if not isinstance(data, ResidentSet) or not state.batch_stats:
            return state
        if state.average:
            average = state.average.replace(batch_stats=statistics(averaging.tested(state), data))
            state = state.replace(average=average)
        return state.replace(batch_stats=statistics(state.replace(average=()), data))

    return settle


def evaluate_batch(
    eval_step: Callable[[BilevelState, jax.Array], jax.Array], state: BilevelState, image: jax.Array, data: Input
) -> jax.Array:
    """Returns `eval_step(state, image)`, the tested classifier's probabilities `[B, K]`, of stored images."""
    return eval_step(state, augment.normalize(image, data.mean, data.std))


def describe(experiment: Experiment, state: BilevelState, data: Input) -> dict[str, Metrics]:
    """Returns gamma and beta `[C]` by site, averaged over the epoch's first batch, without augmentation.

    Of streamed data it is the last batch that was fed, as the workers cropped it.
    """
    modulator = experiment.modulator
    assert modulator is not None
    image, label = inputs.training(data, 0)
    image = augment.normalize(image, data.mean, data.std)
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
