"""Distillation: the loss of an example is mixed with its distance to a teacher's prediction.

    (1 - a) l(z, y) + a t^2 KL(softmax(u / t) || softmax(z / t))

with z the student's logits, u the teacher's and t the temperature. The share a is one number for all, or what a meta
learner says of each example (`outer.Sharing`). The divergence reads z before a modulation at the site `logits`: what
the tested classifier says is compared with what the teacher's says. The weight of a class multiplies l alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from mfm_jax.bilevel.auxiliary import Seen
from mfm_jax.bilevel.passes import UNMODULATED
from mfm_jax.errors import UserError
from mfm_jax.types import Batch


class Distillation(NamedTuple):
    """How a teacher is learned from; its logits are in `Batch.teacher`.

    share: a, where no meta learner says it.
    temperature: t.
    """

    share: float
    temperature: float

    def mixed(
        self, losses: jax.Array, seen: Seen, share_of: Callable[[jax.Array, Batch], jax.Array] | None = None
    ) -> jax.Array:
        """Returns the mixture of the module for each example, `[B]`, of its `losses` `[B]`.

        `share_of` gives a `[B]` of the logits and the batch; None for `share`.

        Raises:
          UserError: at the first call, a batch without a teacher's logits.
        """
        if seen.batch.teacher is None:
            raise UserError("Batch.teacher: missing; distillation needs the teacher's logits of the batch")
        logits, teacher = seen.features[UNMODULATED], seen.batch.teacher.logits
        far = divergence(logits, teacher, self.temperature).astype(losses.dtype)
        share = self.share if share_of is None else share_of(logits, seen.batch).astype(losses.dtype)
        return (1 - share) * losses + share * far


def divergence(logits: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
    """Returns `t^2 KL(softmax(teacher / t) || softmax(logits / t))` of each row `[B]`, in nats.

    The square keeps the gradient's size when t changes. No gradient goes into the teacher.

    References:
      Hinton et al., Distilling the knowledge in a neural network, arXiv:1503.02531, 2015, section 2.
    """
    student, target = (
        jax.nn.log_softmax(x / temperature) for x in (logits, jax.lax.stop_gradient(teacher).astype(logits.dtype))
    )
    found: jax.Array = optax.losses.kl_divergence_with_log_targets(student, target)
    return temperature**2 * found
