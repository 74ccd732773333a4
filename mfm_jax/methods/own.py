"""A loss and a meta learner of the user's own, checked by tracing them abstractly before anything is trained.

The loss is `(logits [B, K], labels [B]) -> [B]`; one with an argument `counts` also gets the training images of each
class, `[K]`. The meta learner is a `MetaLearner` or a `Modulator`, or a function `(config, counts, channels) -> ` one;
`channels` has the width of every site that the classifier calls.
"""

import functools
import inspect
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mfm_jax.bilevel import outer
from mfm_jax.bilevel.outer import MetaLearner
from mfm_jax.config import Config
from mfm_jax.errors import UserError, failing, in_a_line
from mfm_jax.types import LossFn, Modulator


def loss(config: Config, counts: jax.Array) -> LossFn:
    """Returns the loss that `method.loss` names.

    Raises:
      UserError: it is none: no function, one that fails, or one that does not return `[B]`.
    """
    own, field = config.own("loss"), f"method.loss = {config.method.loss!r}"
    if not callable(own):
        raise UserError(f"{field}: is of type {type(own).__name__}; name a function (logits, labels) -> losses [B]")
    of_example: LossFn = own
    if "counts" in inspect.signature(own).parameters:
        of_example = functools.partial(own, counts=counts)
    examples = len(counts) + 1  # another number than that of the classes
    logits = jax.ShapeDtypeStruct((examples, len(counts)), jnp.float32)
    try:
        found = jax.eval_shape(of_example, logits, jax.ShapeDtypeStruct((examples,), jnp.int32))
    except Exception as error:
        raise UserError(f"{field}: fails on logits [B, K] and labels int32 [B]: {in_a_line(error)}") from error
    if getattr(found, "shape", None) != (examples,) or not jnp.issubdtype(found.dtype, jnp.floating):
        what = f"{found.dtype} {list(found.shape)}" if hasattr(found, "shape") else type(found).__name__
        raise UserError(f"{field}: returns {what} for {examples} examples; return the loss of each, [B]")
    return of_example


def learner(config: Config, counts: jax.Array, channels: Mapping[str, int]) -> MetaLearner:
    """Returns the meta learner that `method.learner` names.

    Raises:
      UserError: it is none, making it fails, or its weights of one batch go with other fields than they can.
    """
    own, field = config.own("learner"), f"method.learner = {config.method.learner!r}"
    if callable(own):
        with failing(f"{field}: fails when called with (config, counts, channels)"):
            own = own(config, counts, channels)
    if not isinstance(own, MetaLearner | Modulator):
        raise UserError(
            f"{field}: makes a {type(own).__name__}; make a MetaLearner or a Modulator from (config, counts, channels)"
        )
    found = outer.of(own)
    try:
        phi = jax.eval_shape(lambda: found.init(jax.random.key(0)))
    except Exception as error:
        raise UserError(f"{field}: its init(key) fails: {in_a_line(error)}") from error
    if hasattr(phi, "shape"):  # a checkpoint holds a tree
        raise UserError(f"{field}: its phi is one array; put it in a dict")
    if found.per_batch and (config.meta.lagged or config.optim.clip_norm or config.optim.sam_rho):
        wanted = "meta.lagged = False, optim.clip_norm = 0 and optim.sam_rho = 0"
        raise UserError(f"{field}: its phi belongs to one batch; set {wanted}")
    return found
