"""The classifier as tested: plain, with what a second stage or a post-hoc step does to its head."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mfm_jax import models
from mfm_jax.bilevel import auxiliary, averaging
from mfm_jax.bilevel.passes import Pass
from mfm_jax.config import Config
from mfm_jax.data import batches
from mfm_jax.methods import heads, table
from mfm_jax.methods.table import METHODS, Method
from mfm_jax.models import own
from mfm_jax.types import ApplyFn, BilevelState, PyTree


class Tested(NamedTuple):
    """A tested classifier.

    module: the Flax module.
    apply: `(variables, image, modulate=, train=) -> logits`, the module's own or with a head of the method's.
    params: `state -> params`, averaged where the run averages them.
    of_params: `(params, batch_stats, image) -> [B, K]`, the probabilities, of those parameters.
    """

    module: nn.Module
    apply: ApplyFn
    params: Callable[[BilevelState], PyTree]
    of_params: Callable[[PyTree, PyTree, jax.Array], jax.Array]

    def probabilities(self, state: BilevelState, image: jax.Array) -> jax.Array:
        """Returns the probabilities `[B, K]` for normalised images `[B, H, W, C]`."""
        return self.of_params(self.params(state), averaging.tested(state).batch_stats, image)


def variables(state: BilevelState) -> PyTree:
    """Returns `params` and `batch_stats` of the classifier that is tested, without what is done to its head."""
    state = averaging.tested(state)
    return {"params": state.params, "batch_stats": state.batch_stats}


def of(config: Config, counts: np.ndarray) -> Tested:
    """Returns the classifier that a run of `config` tests; `counts` `[K]` are its training images of each class."""
    method = METHODS[config.method.name]
    module = _module(config, len(counts))
    apply = applied(config, module)
    per_epoch = batches.steps_per_epoch(int(counts.sum()), config.train.batch_size)
    params = _tested_params(config, method, jnp.asarray(counts), config.second_stage * per_epoch)
    return Tested(module, apply, params, Pass(apply).probabilities)


def _module(config: Config, num_classes: int) -> nn.Module:
    if (part := config.own("module")) is not None:
        return own.create(part, num_classes, config)
    return models.create(
        config.model.name,
        num_classes,
        config.model.width,
        jnp.dtype(dtype(config)),
        remat=config.model.remat,
        adapter_size=config.model.adapter_size if config.model.tune == "adapters" else 0,
        lora_rank=config.model.lora_rank if config.model.tune == "lora" else 0,
    )


def dtype(config: Config) -> Literal["float32", "bfloat16"]:
    """Returns the type in which the network computes: `train.dtype`, "auto" decided by the devices of this process.

    A module of the user's own is not changed where nothing else is asked for.
    """
    if config.train.dtype != "auto":
        return config.train.dtype
    plain = jax.default_backend() == "cpu" or config.own("module") is not None
    return "float32" if plain else "bfloat16"


def applied(config: Config, module: nn.Module) -> ApplyFn:
    """Returns the module's `apply`, with the layers that are not tuned frozen, and with a normalised head if any."""
    apply = module.apply if config.model.tune == "all" else models.frozen(module.apply, config.model.tune)
    apply = auxiliary.classifier_alone(apply) if config.method.projects else apply
    head = table.head(config)
    return apply if head == "linear" else heads.cosine(apply, config.method.ldam_scale, fixed=head == "simplex")


def _tested_params(
    config: Config, method: Method, counts: jax.Array, retrain_from: int
) -> Callable[[BilevelState], PyTree]:
    def params(state: BilevelState) -> PyTree:
        state = averaging.tested(state)
        trained = models.merged(auxiliary.without_projection(state.params))
        if method.retraining:
            attached, begun = method.retraining.attach(trained, state.phi), state.step > retrain_from
            return jax.tree.map(lambda new, old: jnp.where(begun, new, old), attached, trained)
        return method.posthoc(config, counts, trained) if method.posthoc else trained

    return params
