"""The methods by name, in one explicit table.

A method is what distinguishes one way of training from another; data, budget, model, optimizer and evaluation are
the same for all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax

from mfm_jax import losses
from mfm_jax.config import Method as MethodConfig
from mfm_jax.types import LossFn


@dataclass(frozen=True)
class Method:
    """One way of training.

    loss: from the method's config and the training counts `[K]`, the per-example training loss.
    modulated: whether training passes are modulated, and the modulator learned on the meta set.
    """

    loss: Callable[[MethodConfig, jax.Array], LossFn]
    modulated: bool = False


def _cross_entropy(config: MethodConfig, counts: jax.Array) -> LossFn:
    return losses.cross_entropy


def _logit_adjusted(config: MethodConfig, counts: jax.Array) -> LossFn:
    """Menon et al., ICLR 2021; balanced softmax (Ren et al., NeurIPS 2020) at tau = 1."""
    return losses.logit_adjusted(counts, config.tau)


def _modulated(config: MethodConfig, counts: jax.Array) -> LossFn:
    """Wang et al., arXiv:2008.03428: the loss that the modulated classifier trains on."""
    return METHODS[config.base].loss(config, counts)


METHODS = {
    "ce": Method(_cross_entropy),
    "logit_adjusted": Method(_logit_adjusted),
    "mfm": Method(_modulated, modulated=True),
}
