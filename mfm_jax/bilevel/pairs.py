"""Contrast of the examples of a batch with one another, two views of each: balanced (BCL), and by subclasses (SBCL).

V is the unit vectors z of both views of a batch, on all devices. With P_i, the others of i's kind, and A_i, those that
i is told from,

    l_i = log sum_{a in A_i} exp(z_i z_a / t) / n_a  -  mean_{p in P_i} z_i z_p / t

is small where z_i is near its kind and far from the rest; it is 0 where nobody is of i's kind. z is what two layers,
`PROJECTION` of the classifier's parameters, make of the features at `pooled`. The papers have a third view, on which
alone the classifier is trained, and batch norm between the two layers; here both views train it.

References:
  Khosla et al., Supervised contrastive learning, NeurIPS 2020, eq. 2.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mfm_jax.bilevel.auxiliary import Auxiliary, Seen
from mfm_jax.bilevel.contrast import new_projection, project
from mfm_jax.bilevel.passes import Pass
from mfm_jax.types import PROJECTION, PyTree

BCL, SBCL = "bcl", "sbcl"


def balanced(classes: int, weight: float = 1.0, temperature: float = 0.1, size: int = 128) -> Auxiliary:
    """Returns BCL's loss: `weight` times the mean l_i, in which every class counts alike.

    V has a vector of each class, too, so that none is absent: what two further layers make of its weights in the last
    layer. P_i are the others of i's class, A_i all others, and n_a says how many of A_i are of a's class.

    References:
      Zhu et al., Balanced contrastive learning for long-tailed visual recognition, CVPR 2022, eq. 4.
    """

    def projection(key: jax.Array, params: PyTree) -> PyTree:
        keys = zip(("examples", "classes"), jax.random.split(key), strict=True)
        return {name: new_projection(key, params, size) for name, key in keys}

    def loss(params: PyTree, memory: PyTree, seen: Sequence[Seen], forward: Pass) -> tuple[jax.Array, PyTree]:
        layers, own_labels = params[PROJECTION][BCL], _labels(seen)
        own = _vectors(layers["examples"], seen)
        examples, labels, others = _everyone(own, own_labels, seen, forward)
        of_class = project(layers["classes"], params["head"]["kernel"].T)
        everyone = jnp.concatenate([examples, of_class.astype(own.dtype)])
        labels = jnp.concatenate([labels, jnp.arange(classes, dtype=labels.dtype)])
        others = jnp.pad(others, ((0, 0), (0, classes)), constant_values=True)
        of = jax.nn.one_hot(labels, classes, dtype=own.dtype)
        amounts = others.astype(own.dtype) @ of @ of.T  # [R, M], 0 of a class of which i is told from nobody
        same = others & (own_labels[:, None] == labels[None])
        values = _contrast(own @ everyone.T / temperature, same, others, jnp.maximum(amounts, 1))
        return weight * _mean(values, seen, forward), memory

    return Auxiliary(BCL, loss, ("pooled",), projection=projection)


def by_subclasses(
    counts: np.ndarray,
    batch_size: int,
    weight: float = 1.0,
    temperature: float = 0.1,
    size: int = 128,
    images: int = 50,
) -> Auxiliary:
    """Returns SBCL's loss: `weight` times the mean of l_i by subclasses of about equal size, and of l_i by classes.

    Class k has `n_k / images` subclasses, rounded up. In the first l_i, P_i are the others of i's subclass and A_i all
    others; in the second, P_i are those of its class in other subclasses, and A_i all of other subclasses; n_a = 1.

    A subclass has a mean of its members' z and a share, what part of the images of about an epoch it got. An image
    goes to the subclass of its class of which `(1 - cos(z, mean)) share` is least, z that of the first view: what has
    many members is far away, so that none gets all. Means and shares are those of the batches before this one,
    constants of the gradient. The paper clusters all images anew every few epochs, and has a temperature by class and
    a factor in the second l_i.

    Args:
      counts: training images of each class, `[K]`, all at least 1.
      batch_size: of the training batches.
      weight: of the loss.
      temperature: t.
      size: dimensions of z.
      images: of a subclass.

    References:
      Hou et al., Subclass-balancing contrastive learning for long-tailed recognition, ICCV 2023, eq. 4.
      Ahalt et al., Competitive learning algorithms for vector quantization, Neural Networks 1990 (the assignment).
    """
    class_of = np.repeat(np.arange(len(counts)), -(-np.asarray(counts) // images))
    kept = max(1 - batch_size / float(np.sum(counts)), 0.0)  # of a share, after a batch

    def init() -> PyTree:
        mean = jax.random.normal(jax.random.key(0), (len(class_of), size))
        return {"mean": mean, "share": jnp.full(len(class_of), 1 / batch_size)}

    def loss(params: PyTree, memory: PyTree, seen: Sequence[Seen], forward: Pass) -> tuple[jax.Array, PyTree]:
        own, own_labels, batch = _vectors(params[PROJECTION][SBCL], seen), _labels(seen), seen[0].batch
        first = jax.lax.stop_gradient(own[: len(batch.label)])
        subclass = _nearest(memory, first, class_of[None] == batch.label[:, None])
        own_subclass = jnp.tile(subclass, len(seen))
        everyone, of, others = _everyone(own, own_subclass, seen, forward)
        near = others & (own_subclass[:, None] == of[None])
        beyond = others & ~near
        akin = beyond & (own_labels[:, None] == jnp.asarray(class_of)[of][None])
        cosines = own @ everyone.T / temperature
        values = _contrast(cosines, near, others) + _contrast(cosines, akin, beyond)
        members = jax.nn.one_hot(subclass, len(class_of), dtype=first.dtype)
        share, together = forward.mean(members, batch), forward.mean_product(members, first, batch)
        after = kept * memory["share"] + share
        new = together / jnp.where(share > 0, share, 1)[:, None]
        # Where a batch has all images nothing of the share before is kept, and one that gets none has 0 of 0.
        moved = memory["mean"] + (share / jnp.where(share > 0, after, 1))[:, None] * (new - memory["mean"])
        return weight * _mean(values, seen, forward), {"mean": moved, "share": after}

    return Auxiliary(SBCL, loss, ("pooled",), init, functools.partial(new_projection, size=size))


def _nearest(memory: PyTree, unit: jax.Array, of_class: jax.Array) -> jax.Array:
    """Returns the subclass of each example, [B], among those that `of_class` [B, S] has of it."""
    length = jnp.maximum(jnp.linalg.norm(memory["mean"], axis=1), 1e-12)
    distance = (1 - unit @ memory["mean"].T / length[None]) * memory["share"][None]
    return jnp.argmin(jnp.where(of_class, distance, jnp.inf), axis=1)


def _vectors(projection: PyTree, seen: Sequence[Seen]) -> jax.Array:
    """Returns the unit vectors of this device's examples, all views one after the other, `[R, p]`."""
    return jnp.concatenate([project(projection, one.features["pooled"]) for one in seen])


def _labels(seen: Sequence[Seen]) -> jax.Array:
    return jnp.concatenate([one.batch.label for one in seen])


def _everyone(
    own: jax.Array, kinds: jax.Array, seen: Sequence[Seen], forward: Pass
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns all devices' vectors `[M, p]` and kinds `[M]`, and who of them is another example, no padding, `[R, M]`.

    `own` and `kinds` are the R of this device.
    """
    weights = [jnp.ones(len(one.batch.label)) if one.batch.weight is None else one.batch.weight for one in seen]
    (everyone, kinds, weight), begin = forward.gathered((own, kinds, jnp.concatenate(weights)))
    itself = (begin + jnp.arange(len(own)))[:, None] == jnp.arange(len(everyone))[None]
    return everyone, kinds, (weight > 0)[None] & ~itself


def _contrast(cosines: jax.Array, kind: jax.Array, among: jax.Array, amounts: jax.Array | float = 1.0) -> jax.Array:
    """Returns l_i `[R]`: P_i is `kind`, A_i `among`, n_a `amounts`, all `[R, M]`; `cosines` are divided by t."""
    some = kind.any(axis=1)
    # The logarithm of a sum of nothing has no derivative, used or not.
    rest = jax.nn.logsumexp(cosines, axis=1, b=(among | ~some[:, None]) / amounts)
    near = jnp.where(kind, cosines, 0).sum(axis=1) / jnp.maximum(kind.sum(axis=1), 1)
    return jnp.where(some, rest - near, 0)


def _mean(values: jax.Array, seen: Sequence[Seen], forward: Pass) -> jax.Array:
    """Returns the mean over both views of the whole batch of `values` `[R]`."""
    of_views = [forward.mean(of, one.batch) for of, one in zip(jnp.split(values, len(seen)), seen, strict=True)]
    return sum(of_views[1:], of_views[0]) / len(seen)
