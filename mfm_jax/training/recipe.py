"""What a config prescribes for training, whatever the network and the devices: loss, order, schedules, optimizers."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mfm_jax import models
from mfm_jax.bilevel import MetaRule, averaging, contrast, losses, optim, pairs, sharpness
from mfm_jax.bilevel.auxiliary import Auxiliary
from mfm_jax.bilevel.averaging import Averaging
from mfm_jax.bilevel.distillation import Distillation
from mfm_jax.bilevel.objective import ClassWeights, Objective
from mfm_jax.bilevel.sharpness import Sharpness
from mfm_jax.config import Config
from mfm_jax.data import LongTailData, batches
from mfm_jax.evaluation import decisions
from mfm_jax.methods import sampling, table
from mfm_jax.methods.table import METHODS, Method
from mfm_jax.types import FeatureLoss, LossFn


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The training of one run.

    objective: what is minimised.
    tx: the classifier's optax chain.
    second_tx: of what a second stage trains.
    averaging: how the weights that are tested follow those that are trained; None where they are these.
    learning_rate: schedule to report, by step.
    order: `(key, epoch) -> int32 [steps_per_epoch, B]`, the examples of each batch of an epoch.
    steps_per_epoch: batches in an epoch.
    total_steps: steps in the run.
    meta: how a meta-step is taken.
    """

    objective: Objective
    tx: optax.GradientTransformation
    second_tx: optax.GradientTransformation
    averaging: Averaging | None
    learning_rate: optax.Schedule
    order: Callable[[jax.Array, int], jax.Array]
    steps_per_epoch: int
    total_steps: int
    meta: MetaRule


def of(config: Config, data: LongTailData) -> Recipe:
    """Returns the recipe of a run of `config` on `data`."""
    method, trained, counts = METHODS[config.method.name], table.objective(config), jnp.asarray(data.counts)
    per_epoch = batches.steps_per_epoch(len(data.train_labels), config.train.batch_size)
    first, second, learning_rate = _schedules(config, method, per_epoch)
    tx = optim.classifier(config.optim, first, counts)
    if config.model.tune != "all":
        tx = optim.only(tx, lambda params: models.trained(params, config.model.tune))
    total, begin = config.train.epochs * per_epoch, config.second_stage * per_epoch
    return Recipe(
        objective=Objective(
            _loss(config, trained, data, begin),
            _class_weights(config, trained, counts, per_epoch),
            _beside(config, trained, counts),
            _distillation(config),
            _sharpness(config, counts),
            config.method.pretraining_tau,
        ),
        tx=tx,
        second_tx=optim.classifier(config.optim, second, counts),
        averaging=_averaging(config, per_epoch),
        learning_rate=learning_rate,
        order=_order(config, method, data),
        steps_per_epoch=per_epoch,
        total_steps=min(total, config.train.max_steps or total),
        meta=meta_rule(config, data.class_names),
    )


def meta_rule(config: Config, class_names: Sequence[str] = ()) -> MetaRule:
    """Returns how a meta-step is taken; `class_names` are those that `eval.costs` may name."""
    return MetaRule(
        meta_loss(config, class_names),
        lagged=config.meta.lagged,
        virtual_groups=models.virtual_groups(config.model.name, config.meta.virtual),
        bn=config.meta.bn,
    )


def meta_loss(config: Config, class_names: Sequence[str] = ()) -> LossFn:
    """Returns the per-example loss of the meta pass."""
    meta_losses: dict[str, LossFn] = {"ce": losses.cross_entropy, "gce": losses.generalized_cross_entropy}
    if config.meta.loss == "cost":
        meta_losses["cost"] = _expected_cost(config, class_names)
    return losses.with_temperature(meta_losses[config.meta.loss], config.meta.temperature)


def _expected_cost(config: Config, class_names: Sequence[str]) -> LossFn:
    return losses.expected_cost(jnp.asarray(decisions.cost_matrix(config.eval.costs, class_names)))


def _schedules(config: Config, method: Method, per_epoch: int) -> tuple[optax.Schedule, optax.Schedule, optax.Schedule]:
    """Returns the learning rates of the classifier's optimizer and of the second stage's, and the one to report."""
    settings = optim.scaled(config.optim, config.train.batch_size)
    if not (method.retraining or method.fine_tune):
        whole = optim.schedule(settings, config.train.epochs, per_epoch)
        return whole, whole, whole
    part = config.second_stage
    rate = settings.learning_rate * (0.1 if method.fine_tune else 1)
    again = dataclasses.replace(settings, warmup_epochs=0, learning_rate=rate)
    first = optim.schedule(settings, part, per_epoch)
    second = optim.schedule(again, config.train.epochs - part, per_epoch)
    joined = optax.join_schedules([first, second], [part * per_epoch])
    return (joined, joined, joined) if method.fine_tune else (first, second, joined)


def _averaging(config: Config, per_epoch: int) -> Averaging | None:
    if config.optim.ema:
        return averaging.exponential(config.optim.ema)
    if config.optim.swa_from:
        return averaging.equal(config.swa_begins * per_epoch, per_epoch)
    return averaging.start(config.model.start_share) if config.model.start_share else None


def _distillation(config: Config) -> Distillation | None:
    chosen = config.method
    return Distillation(chosen.distill, chosen.distill_temperature) if chosen.teacher and chosen.distill else None


def _sharpness(config: Config, counts: jax.Array) -> Sharpness | None:
    rho = config.optim.sam_rho
    if rho and config.optim.sam_below:
        return sharpness.rare(rho, counts, config.optim.sam_below)
    if rho and config.optim.sam_focus:
        return sharpness.focal(rho, counts, config.optim.sam_focus)
    return Sharpness(rho) if rho else None


def _loss(config: Config, trained: Method, data: LongTailData, begin: int) -> LossFn | FeatureLoss:
    """Returns the loss of an example; `begin` is the first step of the second stage."""

    def with_options(loss: LossFn) -> LossFn:
        amount, share = config.method.label_smoothing, config.method.cost_share
        loss = losses.smoothed(loss, amount) if amount else loss
        return losses.mixed(loss, _expected_cost(config, data.class_names), share) if share else loss

    first, later = with_options(trained.loss(config, jnp.asarray(data.counts))), trained.later
    if later is None:
        return first

    def at(step: jax.Array, features: jax.Array) -> LossFn:
        second = with_options(later(config, features))
        return lambda logits, labels: jnp.where(step >= begin, second(logits, labels), first(logits, labels))

    return FeatureLoss(at)


def _beside(config: Config, trained: Method, counts: jax.Array) -> tuple[Auxiliary, ...]:
    chosen = config.method
    found = [trained.beside(config, counts) if trained.beside else None]
    size, shared = config.train.batch_size, (chosen.contrast_temperature, chosen.contrast_features)
    if chosen.proco_weight:
        found.append(contrast.proco(counts, size, chosen.proco_weight, *shared))
    if chosen.bcl_weight:
        found.append(pairs.balanced(len(counts), chosen.bcl_weight, *shared))
    if chosen.sbcl_weight:
        found.append(pairs.by_subclasses(np.asarray(counts), size, chosen.sbcl_weight, *shared, chosen.sbcl_images))
    return tuple(one for one in found if one)


def _class_weights(config: Config, trained: Method, counts: jax.Array, per_epoch: int) -> ClassWeights | None:
    if trained.weights is None:
        return None
    weights = trained.weights(config, counts)
    if trained.cumulative:
        return lambda step: 1 + (step // per_epoch / config.train.epochs) ** 2 * (weights - 1)
    begin = config.second_stage * per_epoch * trained.deferred
    return lambda step: jnp.where(step >= begin, weights, jnp.ones_like(weights))


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
