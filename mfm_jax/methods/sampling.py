"""How often each class is drawn, by epoch. NumPy on the host; `data.batches.sampled_order` draws on the device.

A sampler maps `(config, counts [K], epoch, config's epochs)` to a `Draw`, or to None for an epoch in which every image
has the same chance. All epochs have as many steps as one over the training set, so that methods stay comparable.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mfm_jax.config import Config


class Draw(NamedTuple):
    """One epoch's distribution over classes.

    share: float32 [K], sums to one.
    keep: int32 [K], images of each class that are used; the same ones in every epoch.
    """

    share: np.ndarray
    keep: np.ndarray


Sampler = Callable[[Config, np.ndarray, int], Draw | None]


def natural(config: Config, counts: np.ndarray, epoch: int) -> Draw | None:
    """Every image once an epoch: the long-tailed distribution itself."""
    return None


def balanced(config: Config, counts: np.ndarray, epoch: int) -> Draw | None:
    """Every class as often as any other, the rare ones' images repeated: random oversampling.

    References:
      Buda et al., A systematic study of the class imbalance problem in convolutional neural networks, Neural Networks
      2018, section 2.1 (oversampling).
    """
    return _draw(np.ones(len(counts)), counts)


def undersampled(config: Config, counts: np.ndarray, epoch: int) -> Draw | None:
    """Every class as often as any other, with `n_min` images of each, picked once: random undersampling.

    The few images are repeated to fill the epoch.

    References:
      Buda et al. 2018, section 2.1 (undersampling).
    """
    return _draw(np.ones(len(counts)), np.full(len(counts), counts.min()))


def square_root(config: Config, counts: np.ndarray, epoch: int) -> Draw | None:
    """Class k in proportion to `sqrt(n_k)`.

    References:
      Mahajan et al., Exploring the limits of weakly supervised pretraining, ECCV 2018; Kang et al., Decoupling
      representation and classifier for long-tailed recognition, ICLR 2020 (square-root sampling).
    """
    return _draw(np.sqrt(counts), counts)


def progressive(config: Config, counts: np.ndarray, epoch: int) -> Draw | None:
    """From the long-tailed to the balanced distribution: `(1 - t/T) n_k / N + t/T / K` in epoch t of T.

    References:
      Kang et al. 2020 (progressively-balanced sampling).
    """
    done = epoch / config.train.epochs
    return _draw((1 - done) * counts / counts.sum() + done / len(counts), counts)


def pretrained(config: Config, counts: np.ndarray, epoch: int) -> Draw | None:
    """Balanced in the first stage, by over- or undersampling; the long-tailed distribution in the second."""
    if epoch >= config.second_stage:
        return None
    return (balanced if config.method.pretrain == "oversample" else undersampled)(config, counts, epoch)


def balanced_later(config: Config, counts: np.ndarray, epoch: int) -> Draw | None:
    """The long-tailed distribution in the first stage, balanced in the second.

    References:
      Cao et al., Learning imbalanced datasets with label-distribution-aware margin loss, NeurIPS 2019 (deferred
      re-sampling).
    """
    return balanced(config, counts, epoch) if epoch >= config.second_stage else None


def square_root_later(config: Config, counts: np.ndarray, epoch: int) -> Draw | None:
    """The long-tailed distribution in the first stage, class k in proportion to `sqrt(n_k)` in the second."""
    return square_root(config, counts, epoch) if epoch >= config.second_stage else None


# By the names of `method.sampling`.
SAMPLERS: dict[str, Sampler] = {
    "natural": natural,
    "square_root": square_root,
    "square_root_later": square_root_later,
    "balanced": balanced,
    "balanced_later": balanced_later,
    "progressive": progressive,
}


def _draw(weights: np.ndarray, keep: np.ndarray) -> Draw:
    return Draw((weights / weights.sum()).astype(np.float32), keep.astype(np.int32))
