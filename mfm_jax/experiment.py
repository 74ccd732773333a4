"""From a config and its data to the pure functions of a run: model, modulator, optimizers, steps.

This is where a method's choices meet the bilevel step; nothing here loops, prints or touches a file.
"""

from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mfm_jax import bilevel, losses, models, modulation, optim, parallel
from mfm_jax.config import Config
from mfm_jax.data import LongTailData
from mfm_jax.data.batches import steps_per_epoch
from mfm_jax.errors import UserError
from mfm_jax.methods import METHODS
from mfm_jax.types import BilevelState, Modulator, PyTree


@dataclass(frozen=True)
class Experiment:
    """The pure functions of one run.

    init: `() -> BilevelState`, the state before the first step.
    plain_step: `(state, batch) -> (state, metrics)`; modulated by a modulator that stays as it is, if there is one.
    meta_step: `(state, batch, meta_batch) -> (state, metrics)`; None where no modulator learns.
    eval_step: `(params, batch_stats, image) -> probabilities`.
    modulator: None for plain training.
    module: the Flax module.
    learning_rate: schedule, by step.
    steps_per_epoch: batches in an epoch.
    total_steps: steps in the run.
    """

    init: Callable[[], BilevelState]
    plain_step: Callable
    meta_step: Callable | None
    eval_step: Callable
    modulator: Modulator | None
    module: nn.Module
    learning_rate: optax.Schedule
    steps_per_epoch: int
    total_steps: int


def build(config: Config, data: LongTailData, mesh: Mesh | None = None) -> Experiment:
    """Returns the experiment that `config` describes on `data`, its steps spread over `mesh` if given.

    Raises:
      UserError: a site that the model does not have; padding as wide as the images; a batch that does not divide by
        the devices.
    """
    method = METHODS[config.method.name]
    side = min(data.train_images.shape[1:3])
    if config.augment.pad >= side:
        raise UserError(f"augment.pad = {config.augment.pad}: images are {side} pixels wide; choose at most {side - 1}")
    axis_name = parallel.AXIS if mesh else None
    if mesh:
        _check_divisible(config, mesh.size)
    module = models.create(
        config.model.name, data.num_classes, config.model.width, jnp.dtype(config.train.dtype), axis_name
    )
    image = jnp.zeros((1, *data.train_images.shape[1:]), jnp.float32)
    configured = _modulator(config, module, image, jnp.asarray(data.counts))  # checks the sites for every method
    modulator = configured if method.modulated else None
    per_epoch = steps_per_epoch(len(data.train_labels), config.train.batch_size)
    learning_rate = optim.schedule(config.optim, config.train.epochs, per_epoch)
    tx, mod_tx = optim.classifier(config.optim, learning_rate), optim.modulator(config.meta)
    loss_fn = method.loss(config.method, jnp.asarray(data.counts))
    learns = modulator is not None and not config.meta.freeze

    @jax.jit  # hundreds of small operations otherwise, each compiled by itself
    def init() -> BilevelState:
        model_key, state_key = jax.random.split(jax.random.key(config.train.seed))
        variables = module.clone(axis_name=None).init(model_key, image)
        return bilevel.init_state(state_key, variables, tx, modulator, mod_tx if learns else None)

    plain_step: Callable = bilevel.make_plain_step(module.apply, loss_fn, tx, modulator, axis_name=axis_name)
    meta_step: Callable | None = None
    if modulator and learns:
        meta_step = _meta_step(config, module, loss_fn, tx, modulator, mod_tx, axis_name)
    if mesh:
        plain_step = parallel.shard_step(plain_step, mesh, 1)
        meta_step = meta_step and parallel.shard_step(meta_step, mesh, 2)
    total = config.train.epochs * per_epoch
    return Experiment(
        init,
        plain_step,
        meta_step,
        bilevel.make_eval_step(module.clone(axis_name=None).apply),
        modulator,
        module,
        learning_rate,
        per_epoch,
        min(total, config.train.max_steps or total),
    )


def _meta_step(config, module, loss_fn, tx, modulator, mod_tx, axis_name) -> Callable:
    meta_losses = {"ce": losses.cross_entropy, "gce": losses.generalized_cross_entropy}
    return bilevel.make_step(
        module.apply,
        loss_fn,
        tx,
        modulator,
        mod_tx,
        meta_loss_fn=losses.with_temperature(meta_losses[config.meta.loss], config.meta.temperature),
        lagged=config.meta.lagged,
        virtual_groups=models.VIRTUAL_GROUPS.get(config.meta.virtual),
        bn=config.meta.bn,
        axis_name=axis_name,
    )


def _modulator(config: Config, module: nn.Module, image: jax.Array, counts: jax.Array) -> Modulator:
    """Returns the modulator of `config.modulation`, its widths read off the model."""

    def run(modulate: modulation.Modulate) -> PyTree:
        return module.clone(axis_name=None).init(jax.random.key(0), image, modulate=modulate)

    channels = modulation.site_channels(run, config.sites)
    chosen = config.modulation
    if chosen.form == "direct":
        return modulation.direct(channels, len(counts) if chosen.per_class else 0)
    if chosen.form == "frequency":
        return modulation.frequency(channels, counts)
    return modulation.network(
        channels,
        counts if chosen.use_count else None,
        hidden=chosen.hidden,
        detach_inputs=chosen.detach_inputs,
    )


def _check_divisible(config: Config, devices: int) -> None:
    for field, size in (("train.batch_size", config.train.batch_size), ("meta.batch_size", config.meta.batch_size)):
        if size % devices:
            raise UserError(f"{field} = {size}: does not divide by {devices} devices; use a multiple of {devices}")
