"""The inner (classifier) and outer (modulator) optax chains.

The virtual step differentiates through the classifier's whole chain: clipping, weight decay, momentum and
schedule included. Adam needs `eps_root > 0` for that, since the derivative of `sqrt(v)` at `v = 0` is infinite
and a gradient that is exactly zero would turn the meta-gradient into NaN.
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import optax

from mfm_jax.bilevel import balancing
from mfm_jax.config import Meta, Optim
from mfm_jax.types import PyTree

EPS_ROOT = 1e-8


def scaled(config: Optim, batch_size: int) -> Optim:
    """Returns `config` with its rate for a batch of `batch_size` in all: `rate * batch_size / reference_batch_size`.

    With `reference_batch_size = 0` it is returned unchanged. The rule is one of SGD and small rates; a batch many times
    larger wants `warmup_epochs` too.

    References:
      Goyal et al., Accurate, large minibatch SGD: training ImageNet in 1 hour, arXiv:1706.02677, 2017, section 2.1.
    """
    if not config.reference_batch_size:
        return config
    return dataclasses.replace(config, learning_rate=config.learning_rate * batch_size / config.reference_batch_size)


def schedule(config: Optim, epochs: int, steps_per_epoch: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    It rises linearly over `warmup_epochs`, from rate / warm-up steps. Then `cosine` falls to zero at the end, `step`
    divides by 100 at 80 % and at 90 % of the epochs (160 and 180 of 200: the published CIFAR-LT recipe, Cao et al.
    2019), and `constant` stays. After each of `restart_epochs` it begins anew, without the warm-up, over the epochs up
    to the next or to the end: what comes later changes nothing before.
    """
    bounds = (0, *config.restart_epochs, epochs)
    lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
    again = dataclasses.replace(config, warmup_epochs=0)
    parts = [_part(again if i else config, length, steps_per_epoch) for i, length in enumerate(lengths)]
    return optax.join_schedules(parts, [epoch * steps_per_epoch for epoch in bounds[1:-1]]) if parts[1:] else parts[0]


def _part(config: Optim, epochs: int, steps_per_epoch: int) -> optax.Schedule:
    """Returns the schedule between two restarts."""
    total, warmup = epochs * steps_per_epoch, config.warmup_epochs * steps_per_epoch
    rate = config.learning_rate
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(rate, total - warmup)
    elif config.schedule == "step":
        # One schedule after the other, since in a very short run both boundaries may be the same step.
        boundaries = [max(int(total * part) - warmup, 0) for part in (0.8, 0.9)]
        levels = [optax.constant_schedule(rate * scale) for scale in (1.0, 1e-2, 1e-4)]
        main = optax.join_schedules(levels, boundaries)
    else:
        main = optax.constant_schedule(rate)
    if not warmup:
        return main
    rise = optax.linear_schedule(rate / warmup, rate, max(warmup - 1, 1))
    return optax.join_schedules([rise, main], [warmup])


def classifier(
    config: Optim, learning_rate: optax.ScalarOrSchedule, counts: jax.Array | None = None
) -> optax.GradientTransformation:
    """Returns the classifier's chain: clip, then SGD (Nesterov, L2 decay in the gradient) or AdamW, then MaxNorm.

    The decay of the last layer by classes, which alone reads `counts` `[K]`, goes where the other decay does.

    Raises:
      ValueError: that decay without counts.
    """
    decays = [optax.add_decayed_weights(config.weight_decay)]
    if config.head_decay:
        if counts is None:
            raise ValueError("head_decay: needs counts, the training images of each class")
        decays.append(balancing.class_decay(config.head_decay, counts))
    if config.name == "sgd":
        steps = [*decays, optax.sgd(learning_rate, config.momentum, nesterov=True)]
    else:
        adam = optax.scale_by_adam(b1=config.momentum, eps_root=EPS_ROOT)
        steps = [optax.chain(adam, *decays, optax.scale_by_learning_rate(learning_rate))]  # AdamW
    if config.clip_norm:
        steps.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.head_max_norm:
        steps.append(balancing.max_norm(config.head_max_norm))
    return optax.chain(*steps)


def only(tx: optax.GradientTransformation, trained: Callable[[PyTree], PyTree]) -> optax.GradientTransformation:
    """Returns `tx` on the leaves where `trained(params)` is True; the others never change and have no state.

    Weight decay and clipping see the trained leaves alone.
    """
    return optax.partition({True: tx, False: optax.set_to_zero()}, trained)


def outer(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Returns the chain of phi: Adam on the meta-gradients' directions `g / |g|`.

    By its direction alone, no meta-gradient counts for more than any other, however large it is. Adam then moves phi by
    how far the last ten or so agree: by the rate where they do, by about a quarter of it where they are noise.

    References:
      Hazan, Levy and Shalev-Shwartz, Beyond convexity: stochastic quasi-convex optimization, NeurIPS 2015 (normalised
      gradients). Kingma and Ba, Adam, ICLR 2015, section 2.1 (its step as a signal-to-noise ratio).
    """
    return optax.chain(optax.normalize_by_update_norm(), optax.adam(learning_rate))


def meta_schedule(config: Meta, inner: Optim, epochs: int, steps_per_epoch: int) -> optax.Schedule:
    """Returns phi's rate as a function of the meta-steps done.

    It is `meta.learning_rate` where the classifier's is highest, and rises and falls with it: a meta-gradient goes
    through a step of the classifier, and says as much as that step is long. Arguments as in `schedule`; `inner` has the
    classifier's.
    """
    pace = schedule(dataclasses.replace(inner, learning_rate=config.learning_rate), epochs, steps_per_epoch)
    first = -(-config.start_epoch * steps_per_epoch // config.every)
    return lambda done: pace((first + done) * config.every)
