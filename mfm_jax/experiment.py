"""From a config and its data to the pure functions of a run: model, meta learner, optimizers, steps.

This is where a method's choices meet the bilevel step; nothing here loops, and no file is touched but by an
`init` that starts from pretrained weights.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mfm_jax import bilevel, losses, models, modulation, optim, parallel, pretrained
from mfm_jax.config import Config
from mfm_jax.data import LongTailData, batches
from mfm_jax.data.streaming import Streamed
from mfm_jax.errors import UserError
from mfm_jax.methods import heads, sampling, table
from mfm_jax.methods.table import METHODS, Method, Retraining
from mfm_jax.outer import MetaLearner
from mfm_jax.passes import Pass
from mfm_jax.types import ApplyFn, BilevelState, LossFn, Modulator, PyTree


class Tested(NamedTuple):
    """The classifier that is tested: plain, with what a second stage or a post-hoc step does.

    module: the Flax module.
    apply: `(variables, image, modulate=, train=) -> logits`, the module's own or with a head of the method's.
    params: `state -> params`.
    of_params: `(params, batch_stats, image) -> [B, K]`, the probabilities, of those parameters.
    """

    module: nn.Module
    apply: ApplyFn
    params: Callable[[BilevelState], PyTree]
    of_params: Callable[[PyTree, PyTree, jax.Array], jax.Array]

    def probabilities(self, state: BilevelState, image: jax.Array) -> jax.Array:
        """Returns the probabilities `[B, K]` for normalised images `[B, H, W, C]`."""
        return self.of_params(self.params(state), state.batch_stats, image)


@dataclass(frozen=True)
class Experiment:
    """The pure functions of one run.

    init: `() -> BilevelState`, the state before the first step, all parameters drawn at random.
    init_pretrained: the same with the weights of `model.pretrained`, the head among them if `whole`; None where there
      are none to load.
    plain_step: `(state, batch) -> (state, metrics)`; under a meta learner that stays as it is, if there is one.
    meta_step: `(state, batch, meta_batch) -> (state, metrics)`; None where nothing learns from the meta set.
    retrain_step: `(state, batch) -> (state, metrics)` of a second stage on a frozen classifier; None without one.
    retrain_from: the step at which that stage begins.
    synthetic: whether it trains on stored features that SMOTE balances, `[B, C]` in the place of images.
    order: `(key, epoch) -> int32 [steps_per_epoch, B]`, the examples of each batch of an epoch.
    tested: the classifier that is tested.
    features: `(state, image) -> [B, C]`, its `pooled` features.
    apply: the classifier outside `shard_map`; `(variables, image, modulate=, train=) -> logits`.
    modulator: what generates gamma and beta; None for a method without one.
    phi_kind: what phi is, in a word; "" where there is none.
    learning_rate: schedule, by step.
    steps_per_epoch: batches in an epoch.
    total_steps: steps in the run.
    mesh: the devices that the steps are spread over; None for one.
    """

    init: Callable[[], BilevelState]
    init_pretrained: Callable[..., BilevelState] | None
    plain_step: Callable
    meta_step: Callable | None
    retrain_step: Callable | None
    retrain_from: int
    synthetic: bool
    order: Callable[[jax.Array, int], jax.Array]
    tested: Tested
    features: Callable[[BilevelState, jax.Array], jax.Array]
    apply: ApplyFn
    modulator: Modulator | None
    phi_kind: str
    learning_rate: optax.Schedule
    steps_per_epoch: int
    total_steps: int
    mesh: Mesh | None


def tested(config: Config, counts: np.ndarray) -> Tested:
    """Returns the classifier that a run of `config` tests; `counts` `[K]` are its training images of each class."""
    method = METHODS[config.method.name]
    module = models.create(
        config.model.name,
        len(counts),
        config.model.width,
        jnp.dtype(config.train.dtype),
        remat=config.model.remat,
        adapter_size=config.model.adapter_size if config.model.tune == "adapters" else 0,
    )
    apply = _apply(config, table.objective(config), module)
    per_epoch = batches.steps_per_epoch(int(counts.sum()), config.train.batch_size)
    params = _tested_params(config, method, jnp.asarray(counts), config.second_stage * per_epoch)
    return Tested(module, apply, params, Pass(apply).probabilities)


def build(config: Config, data: LongTailData, mesh: Mesh | None = None) -> Experiment:
    """Returns the experiment that `config` describes on `data`, its steps spread over `mesh` if given.

    Raises:
      UserError: a site that the model does not have; padding as wide as the images; local batch norm on a batch that
        does not divide by the devices.
    """
    method, objective, counts = METHODS[config.method.name], table.objective(config), jnp.asarray(data.counts)
    _check_images(config, method, data)
    _check_divisible(config, mesh.size if mesh else 1)
    _check_parts(config, data, mesh, has_meta_step=method.learner is not None)
    plain = tested(config, data.counts)
    local, test_apply = plain.module, plain.apply
    image = jnp.zeros((1, *data.train_images.shape[1:]), jnp.float32)
    channels = _channels(config, local, image)  # checks the sites for every method
    learner = method.learner(config, counts, channels) if method.learner else None
    learns, retraining = learner is not None and not config.meta.freeze, method.retraining
    per_epoch = batches.steps_per_epoch(len(data.train_labels), config.train.batch_size)
    first, second, learning_rate = _schedules(config, method, per_epoch)
    tx = optim.classifier(config.optim, first)
    if config.model.tune != "all":
        tx = optim.only(tx, lambda params: models.trained(params, config.model.tune))
    phi_tx = _phi_tx(config, learner, second, per_epoch)
    loss = objective.loss(config, counts)
    if config.method.label_smoothing:
        loss = losses.smoothed(loss, config.method.label_smoothing)
    class_weights = _class_weights(config, objective, counts, per_epoch)
    apply = _train_apply(config, objective, local, mesh) if mesh else test_apply
    forward = Pass(apply, axis_name=parallel.AXIS if mesh else None, parts=config.train.accumulate)

    def fresh() -> PyTree:
        variables = local.init(jax.random.split(jax.random.key(config.train.seed))[0], image)
        if method.prior_bias:
            variables = {**variables, "params": heads.with_prior_bias(variables["params"], counts)}
        return variables

    def start(variables: PyTree) -> BilevelState:
        state_key = jax.random.split(jax.random.key(config.train.seed))[1]

        def init_phi(key: jax.Array) -> PyTree:
            if retraining:
                return retraining.init(key, variables["params"])
            return learner.init(key) if learner else {}

        return bilevel.init_state(state_key, variables, tx, init_phi, phi_tx if learns or retraining else None)

    @jax.jit  # hundreds of small operations otherwise, each compiled by itself
    def init() -> BilevelState:
        return start(fresh())

    def init_pretrained(*, whole: bool = False) -> BilevelState:
        new, model, normalized = jax.jit(fresh)(), config.model, objective.cosine_head
        new = (new["params"], new.get("batch_stats", {}))
        found = pretrained.load(model.pretrained, *new, model.name, normalized_head=normalized, whole=whole)
        return jax.jit(start)(dict(zip(("params", "batch_stats"), found, strict=True)))

    plain_step: Callable = bilevel.make_plain_step(forward, loss, tx, learner, class_weights=class_weights)
    meta_step: Callable | None = None
    if learner and learns:
        rule = _rule(config)
        meta_step = bilevel.make_step(forward, loss, tx, learner, phi_tx, rule, class_weights=class_weights)
    retrain_step = _retrain_step(retraining, forward, image.shape[1:], loss, phi_tx) if retraining else None
    if mesh:
        plain_step = parallel.shard_step(plain_step, mesh, 1)
        meta_step = meta_step and parallel.shard_step(meta_step, mesh, 2)
        retrain_step = retrain_step and parallel.shard_step(retrain_step, mesh, 1)
    total = config.train.epochs * per_epoch
    total = min(total, config.train.max_steps or total)
    retrain_from = config.second_stage * per_epoch if retrain_step else total
    extract = heads.features(test_apply)
    return Experiment(
        init=init,
        init_pretrained=init_pretrained if config.model.pretrained else None,
        plain_step=plain_step,
        meta_step=meta_step,
        retrain_step=retrain_step,
        retrain_from=retrain_from,
        synthetic=bool(retraining and retraining.synthetic),
        order=_order(config, method, data),
        tested=plain,
        features=lambda state, image: extract({"params": state.params, "batch_stats": state.batch_stats}, image),
        apply=test_apply,
        modulator=learner.modulator if learner else None,
        phi_kind=learner.kind if learner else "second stage" if retraining else "",
        learning_rate=learning_rate,
        steps_per_epoch=per_epoch,
        total_steps=total,
        mesh=mesh,
    )


def _channels(config: Config, module: nn.Module, image: jax.Array) -> dict[str, int]:
    """Returns the widths of the configured sites and of `pooled`, read off the model."""

    def run(modulate: modulation.Modulate) -> PyTree:
        return module.init(jax.random.key(0), image, modulate=modulate)

    return modulation.site_channels(run, (*config.sites, "pooled"))


def _apply(config: Config, objective: Method, module: nn.Module) -> ApplyFn:
    apply = module.apply if config.model.tune == "all" else models.frozen(module.apply, config.model.tune)
    return heads.cosine(apply, config.method.ldam_scale) if objective.cosine_head else apply


def _train_apply(config: Config, objective: Method, module: nn.Module, mesh: Mesh) -> ApplyFn:
    """Returns the classifier inside `shard_map`."""
    if config.parallel.batch_norm == "sync":
        apply = _apply(config, objective, module.clone(axis_name=parallel.AXIS))
    else:
        apply = parallel.averaged_statistics(_apply(config, objective, module))
    return parallel.gathered(apply) if parallel.MODEL_AXIS in mesh.axis_names else apply


def _schedules(config: Config, method: Method, per_epoch: int) -> tuple[optax.Schedule, optax.Schedule, optax.Schedule]:
    """Returns the learning rates of the classifier's optimizer and of the second stage's, and the one to report."""
    settings = optim.scaled(config.optim, config.train.batch_size)
    if not (method.retraining or method.fine_tune):
        whole = optim.schedule(settings, config.train.epochs, per_epoch)
        return whole, whole, whole
    part = config.second_stage
    again = dataclasses.replace(
        settings,
        warmup_epochs=0,
        learning_rate=settings.learning_rate * (0.1 if method.fine_tune else 1),
    )
    first = optim.schedule(settings, part, per_epoch)
    second = optim.schedule(again, config.train.epochs - part, per_epoch)
    joined = optax.join_schedules([first, second], [part * per_epoch])
    return (joined, joined, joined) if method.fine_tune else (first, second, joined)


def _phi_tx(
    config: Config, learner: MetaLearner | None, second: optax.Schedule, per_epoch: int
) -> optax.GradientTransformation:
    """Returns the optimizer of phi: the meta learner's own, or the classifier's again for a second stage."""
    if learner is None:
        return optim.classifier(config.optim, second)
    return learner.optimizer(optim.meta_schedule(config.meta, config.optim, config.train.epochs, per_epoch))


def _class_weights(config: Config, objective: Method, counts: jax.Array, per_epoch: int) -> bilevel.ClassWeights | None:
    if objective.weights is None:
        return None
    weights, begin = objective.weights(config, counts), config.second_stage * per_epoch * objective.deferred
    return lambda step: jnp.where(step >= begin, weights, jnp.ones_like(weights))


def meta_loss(config: Config) -> LossFn:
    """Returns the per-example loss of the meta pass."""
    meta_losses = {"ce": losses.cross_entropy, "gce": losses.generalized_cross_entropy}
    return losses.with_temperature(meta_losses[config.meta.loss], config.meta.temperature)


def _rule(config: Config) -> bilevel.MetaRule:
    return bilevel.MetaRule(
        meta_loss(config),
        lagged=config.meta.lagged,
        virtual_groups=models.virtual_groups(config.model.name, config.meta.virtual),
        bn=config.meta.bn,
    )


def _retrain_step(
    retraining: Retraining,
    forward: Pass,
    image_shape: tuple[int, ...],
    loss: LossFn,
    tx: optax.GradientTransformation,
) -> bilevel.PlainStep:
    # No backward pass goes through the network, so its passes need not be in parts.
    forward = dataclasses.replace(forward, parts=1)
    if retraining.synthetic:
        forward = dataclasses.replace(forward, apply=heads.on_features(forward.apply, image_shape))
    return bilevel.make_retrain_step(forward, loss, tx, retraining.attach)


def _tested_params(
    config: Config, method: Method, counts: jax.Array, retrain_from: int
) -> Callable[[BilevelState], PyTree]:
    def params(state: BilevelState) -> PyTree:
        if method.retraining:
            attached, begun = method.retraining.attach(state.params, state.phi), state.step > retrain_from
            return jax.tree.map(lambda new, old: jnp.where(begun, new, old), attached, state.params)
        return method.posthoc(config, counts, state.params) if method.posthoc else state.params

    return params


def _order(config: Config, method: Method, data: LongTailData) -> Callable[[jax.Array, int], jax.Array]:
    size, labels = config.train.batch_size, jnp.asarray(data.train_labels)
    steps = batches.steps_per_epoch(len(labels), size)
    chosen = config.method.sampling
    sampler = method.sampler if chosen == "own" else sampling.SAMPLERS[chosen]

    def order(key: jax.Array, epoch: int) -> jax.Array:
        if method.retraining and method.retraining.synthetic and epoch >= config.second_stage:
            examples = len(data.counts) * int(data.counts.max())  # balanced already, whatever the sampling
            return batches.epoch_order(key, jnp.int32(epoch), examples, size)[:steps]
        draw = sampler(config, data.counts, epoch)
        if draw is None:
            return batches.epoch_order(key, jnp.int32(epoch), len(labels), size)[:steps]
        share, keep = jnp.asarray(draw.share), jnp.asarray(draw.keep)
        return batches.sampled_order(key, jnp.int32(epoch), labels, share, keep, size)

    return order


def _check_images(config: Config, method: Method, data: LongTailData) -> None:
    side, streamed = min(data.train_images.shape[1:3]), isinstance(data.train_images, Streamed)
    if config.augment.crop == "shift" and config.augment.pad >= side:
        raise UserError(f"augment.pad = {config.augment.pad}: images are {side} pixels wide; choose at most {side - 1}")
    if streamed and method.retraining and method.retraining.synthetic:
        raise UserError(f"method.name = {config.method.name!r}: needs all images at once; raise data.resident_mb")


def _check_divisible(config: Config, devices: int) -> None:
    """Refuses what cannot be padded: a device with no examples has no statistics of its own."""
    sizes = {"train.batch_size": config.train.batch_size}
    if config.meta.bn == "batch":
        sizes["meta.batch_size"] = config.meta.batch_size
    for field, size in sizes.items():
        if config.parallel.batch_norm == "local" and size % devices:
            raise UserError(
                f"parallel.batch_norm = 'local': {field} = {size} does not divide by {devices} devices; use a multiple"
                f" of {devices}, or parallel.batch_norm = 'sync', which pads"
            )


def _check_parts(config: Config, data: LongTailData, mesh: Mesh | None, *, has_meta_step: bool) -> None:
    """Refuses batches that do not divide into `train.accumulate` parts on every device, or are streamed and unequal."""
    parts, streamed = config.train.accumulate, isinstance(data.train_images, Streamed)
    # Batches are padded for all devices; blanks in one part alone would spoil its batch statistics.
    devices = 1 if mesh is None else mesh.size if parts > 1 else mesh.shape[parallel.AXIS]
    unit = parts * devices
    for field, size in (("train.batch_size", config.train.batch_size), ("meta.batch_size", config.meta.batch_size)):
        if (parts > 1 or streamed) and size % unit and (has_meta_step or field == "train.batch_size"):
            raise UserError(
                f"{field} = {size}: does not divide by {unit}, the devices times train.accumulate = {parts}; choose a"
                f" multiple of {unit}"
            )
