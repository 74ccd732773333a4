"""The meta learners beside MFM: what phi is, and where in the training pass it acts.

All of them are learned by the same meta-gradient, through the same optimizer step and under the same batch-norm policy
(`bilevel.make_step`), so that a difference between two of them is a difference between two ideas.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mfm_jax.bilevel.auxiliary import soft_labels
from mfm_jax.bilevel.modulation import mlp, mlp_init, unit
from mfm_jax.bilevel.outer import MetaLearner
from mfm_jax.types import Batch, Modulate, PyTree

Mean = Callable[[jax.Array], jax.Array]  # of [B], over the whole batch


def meta_weight_net(hidden: int = 100) -> MetaLearner:
    """A weight for each example, from its loss alone: `v_i = sigmoid(MLP(l_i))`, loss `sum(v_i l_i) / sum(v_i)`.

    The MLP has one hidden layer of ReLUs; the loss goes into it as a number, without its gradient. Its last layer
    starts at zero, so that all weights start equal. The paper's eq. 3 does not divide by the sum; without that all
    weights can go to zero together, and training then stands still.

    References:
      Shu et al., Meta-Weight-Net: learning an explicit mapping for sample weighting, NeurIPS 2019, eq. 1 to 5.
    """

    def init(key: jax.Array) -> PyTree:
        return mlp_init(key, 1, hidden, 1)

    def weigh(phi: PyTree, losses: jax.Array, mean: Callable[[jax.Array], jax.Array]) -> jax.Array:
        inputs = jax.lax.stop_gradient(losses)[:, None].astype(phi["w1"].dtype)
        weights = jax.nn.sigmoid(mlp(phi, inputs))[:, 0]
        return (weights / (mean(weights) + 1e-12)).astype(losses.dtype) * losses

    return MetaLearner("meta_weight_net", init, weigh=weigh)


def l2rw() -> MetaLearner:
    """A free weight for each example of the batch: phi is `[B]`, starts at zero at every step and is not kept.

    Moved by `positive_part`, the weights are the meta-gradient's negative, cut off at zero and scaled to
    the mean 1: an example counts as far as a step on it alone would lower the meta loss. They belong to this batch, so
    the real step has to be taken again with them (`meta.lagged = False`).

    References:
      Ren et al., Learning to reweight examples for robust deep learning, ICML 2018, eq. 12 to 14 and algorithm 1.
    """

    def start(labels: jax.Array) -> jax.Array:
        # A multiple of the labels, so that under `shard_map` it is split over the devices as labels are.
        return 0.0 * labels.astype(jnp.result_type(float))

    def weigh(phi: PyTree, losses: jax.Array, mean: Callable[[jax.Array], jax.Array]) -> jax.Array:
        weights: jax.Array = phi.astype(losses.dtype)
        return weights * losses

    return MetaLearner("l2rw", lambda key: {}, weigh=weigh, optimizer=lambda schedule: positive_part(), per_batch=start)


def positive_part() -> optax.GradientTransformationExtraArgs:
    """Returns the change from zero to `max(-gradient, 0)`, scaled to the mean 1 over the batch; zero if all are zero.

    Its `update` takes `mean`, which averages `[B]` over the whole batch, on however many devices it is.

    References:
      Ren et al. 2018, eq. 13 and 14.
    """

    def update(
        gradient: jax.Array, state: optax.EmptyState, phi: PyTree = None, *, mean: Mean = jnp.mean, **others: Any
    ) -> tuple[jax.Array, optax.EmptyState]:
        del phi, others
        wanted = jnp.maximum(-gradient, 0)
        average = mean(wanted)
        return jnp.where(average > 0, wanted / jnp.where(average > 0, average, 1), 0), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def l2ac(num_classes: int, hidden: int = 100) -> MetaLearner:
    """A residual on the logits of the training pass: `z + MLP(z / |z|)`, the MLP reading z without its gradient.

    The MLP has one hidden layer of ReLUs; its last layer starts at zero, hence the residual too. At test time there is
    none. This is the network form of MFM's modulation with the shift alone, at `logits` (tests hold the two together).

    References:
      Wang et al., Imbalanced semi-supervised learning with bias adaptive classifier, ICLR 2023 (the bias adaptive
      classifier, here on labelled images).
    """

    def init(key: jax.Array) -> PyTree:
        return mlp_init(key, num_classes, hidden, num_classes)

    def modulate(phi: PyTree, params: PyTree, labels: jax.Array) -> Modulate:
        return _at_logits(lambda logits: mlp(phi, unit(jax.lax.stop_gradient(logits)).astype(phi["w1"].dtype)))

    return MetaLearner("l2ac", init, modulate)


def metasaug(
    num_classes: int,
    channels: int,
    strength: float = 0.5,
    kernel_of: Callable[[PyTree], jax.Array] = lambda params: params["head"]["kernel"],
) -> MetaLearner:
    """Implicit semantic augmentation, each class's feature covariance learned on the meta set.

    Augmenting the features of class y by draws from `N(0, strength * Sigma_y)`, infinitely often, has the upper bound

        loss(z'),  z'_k = z_k + strength / 2 (w_k - w_y)^T Sigma_y (w_k - w_y)

    with w the weights that the logits are made with. Here Sigma_y is diagonal, `softplus(rho_y)` `[C]`, and rho
    `[K, C]` is all of phi: where the paper estimates covariances from features and has the meta-gradient correct them,
    they are learned from the meta-gradient alone, and the strength is constant where the paper lets it grow with the
    epoch.

    Args:
      num_classes: K.
      channels: C, width of the features below the head.
      strength: lambda; 0 leaves the loss unchanged.
      kernel_of: `params -> w [C, K]`; by default the head's own weights.

    References:
      Li et al., MetaSAug: meta semantic augmentation for long-tailed visual recognition, CVPR 2021.
      Wang et al., Implicit semantic data augmentation for deep networks, NeurIPS 2019, proposition 1.
    """

    def init(key: jax.Array) -> PyTree:
        del key
        return {"rho": jnp.full((num_classes, channels), -4.0, jnp.float32)}  # a variance of 0.018

    def modulate(phi: PyTree, params: PyTree, labels: jax.Array) -> Modulate:
        kernel = kernel_of(params)
        variance = jax.nn.softplus(phi["rho"]).astype(kernel.dtype)
        # sum_c variance_yc (w_ck - w_cy)^2, multiplied out: [K, K] for the classes, then a row for each example.
        square = variance @ kernel**2
        cross = (variance * kernel.T) @ kernel
        spread = square - 2 * cross + jnp.diag(square)[:, None]
        return _at_logits(lambda logits: strength / 2 * spread[labels])

    return MetaLearner("metasaug", init, modulate)


def tgeo_kd(num_classes: int, hidden: int = 100, start: float = 0.5) -> MetaLearner:
    """What a teacher counts for each example: `a_i = sigmoid(MLP(edges_i) + s)`, of the geometry of three predictions.

    With the student's probabilities p, the teacher's q, the label g and the mean r of the teacher's probabilities for
    training images of the label's class, each `[K]`, the MLP reads the edges of two triangles as vectors:

        g - p,  g - q,  q - p        of the example
        g - r,  r - p                with the teacher's typical prediction, which an outlier does not move

    without their gradient. It has one hidden layer of `hidden` ReLUs; its last layer starts at zero, so that all
    examples start with the same share, `sigmoid(s) = start`, and training as a fixed mixture.

    References:
      Hu et al., Less or more from teacher: exploiting trilateral geometry for knowledge distillation, ICLR 2024
      (TGeo-KD), section 3.
    """
    offset = math.log(start / (1 - start))

    def init(key: jax.Array) -> PyTree:
        return mlp_init(key, 5 * num_classes, hidden, 1)

    def share(phi: PyTree, logits: jax.Array, batch: Batch) -> jax.Array:
        assert batch.teacher is not None
        assert batch.teacher.typical is not None
        student, teacher = (jax.nn.softmax(jax.lax.stop_gradient(z)) for z in (logits, batch.teacher.logits))
        label, typical = soft_labels(batch, num_classes), batch.teacher.typical
        edges = (label - student, label - teacher, teacher - student, label - typical, typical - student)
        inputs = jnp.concatenate(edges, axis=-1).astype(phi["w1"].dtype)
        return jax.nn.sigmoid(mlp(phi, inputs)[:, 0] + offset)

    return MetaLearner("tgeo_kd", init, share=share)


def _at_logits(shift: Callable[[jax.Array], jax.Array]) -> Modulate:
    def modulate(site: str, features: jax.Array) -> jax.Array:
        return features + shift(features).astype(features.dtype) if site == "logits" else features

    return modulate
