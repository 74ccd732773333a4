"""What pre-training already favours: the prior over classes that the first classifier shows on balanced images."""

import jax
import jax.numpy as jnp
import numpy as np

from mfm_jax.config import Config
from mfm_jax.data import LongTailData, augment, batches
from mfm_jax.evaluation.tested import Tested
from mfm_jax.types import PyTree

_LEAST = 1e-7  # of a class's mean probability, so that its log is finite


def of_start(config: Config, data: LongTailData, plain: Tested, params: PyTree, batch_stats: PyTree) -> jax.Array:
    """Returns the log of the prior that a classifier has before it is trained here, `[K]` float32.

    It is the mean of the probabilities that it gives to the meta images of the first epoch, as many of each class:

        log q_k,  q_k = mean_x p(k | x)

    which is log(1 / K) for one that favours no class. A loss of `z + log pi + tau log q` then corrects both what the
    training data favours and what pre-training does (`method.pretraining_tau`).

    Args:
      config: of the run, for the batches of the evaluation.
      data: whose meta images are looked at, without augmentation.
      plain: the classifier.
      params: its parameters before the first step.
      batch_stats: its running averages then.

    References:
      Chen et al., Rethinking the bias of foundation model under long-tailed distribution, ICML 2025, section 3
      (parameter imbalance).
      Zhu et al., Generalized logit adjustment: calibrating fine-tuned models by removing label bias in foundation
      models, NeurIPS 2023, whose prior is fitted to balanced images; this is the mean over them.
    """

    mean, std = jnp.asarray(data.mean), jnp.asarray(data.std)

    @jax.jit
    def total(images: jax.Array, mask: jax.Array) -> jax.Array:
        found = plain.of_params(params, batch_stats, augment.normalize(images, mean, std))
        return jnp.where(mask[:, None], found, 0).sum(axis=0)

    chosen = data.meta_table(0).ravel()
    parts = batches.eval_batches(data.meta_images[chosen], config.eval.batch_size, config.data.workers)
    totals = np.sum([np.asarray(total(images, mask), np.float64) for images, mask in parts], axis=0)
    return jnp.log(jnp.asarray(np.maximum(totals / len(chosen), _LEAST), jnp.float32))
