"""The methods by name, in one explicit table.

A method is what distinguishes one way of training from another: how often classes are drawn, the loss of an example
and the weight of its class, what a second stage trains, what is done to the head after training, and what a meta set
governs. Data, budget, model, optimizer and evaluation are the same for all, and so is the training loop.

`docs/methods.md` has a paragraph on each, with its formula, cost and use.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mfm_jax.bilevel import agreement, auxiliary, losses, modulation, outer
from mfm_jax.bilevel.auxiliary import Auxiliary
from mfm_jax.bilevel.outer import MetaLearner
from mfm_jax.config import Config
from mfm_jax.methods import gaussians, heads, learners, own, sampling, smote
from mfm_jax.methods.sampling import Sampler
from mfm_jax.types import LossFn, Modulator, PyTree


class Span(NamedTuple):
    """The interval in which a field is tuned, by its logarithm if `log`."""

    low: float
    high: float
    log: bool = False


class Choice(NamedTuple):
    """The values among which a field is tuned."""

    values: tuple[Any, ...]


# `(config, features [N, C], labels [N])` on the host -> others, equally many of each class as the largest has.
Synthesis = Callable[[Config, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class Retraining(NamedTuple):
    """A second stage on a frozen classifier.

    init: `(key, params) -> trained`, what it trains.
    attach: `(params, trained) -> params`, the classifier with that in its place.
    synthetic: what makes the features to train on out of stored ones, in the place of images; None for images.
    """

    init: Callable[[jax.Array, PyTree], PyTree]
    attach: Callable[[PyTree, PyTree], PyTree]
    synthetic: Synthesis | None = None


@dataclass(frozen=True)
class Method:
    """One way of training. `counts` are the training images of each class, `[K]`.

    loss: `(config, counts) -> LossFn`, the per-example training loss.
    later: `(config, features [B, C]) -> LossFn`, the one in its place from the second stage on, by the features at
      `pooled`; None for the same throughout.
    beside: `(config, counts) -> Auxiliary`, a loss of the whole batch that is added; None for none.
    weights: `(config, counts) -> [K]`, what each class's loss is multiplied by; None for no weights.
    deferred: the weights act from the second stage on.
    cumulative: the weights set in with the square of the epoch.
    sampler: how often each class is drawn, by epoch.
    cosine_head: the classifier compares directions (`heads.cosine`).
    prior_bias: the head's bias starts at the log prior.
    fine_tune: the second stage starts the learning-rate schedule again, at a tenth.
    retraining: the second stage's, where it has one on a frozen classifier.
    posthoc: `(config, counts, params) -> params` that are tested; None for those that were trained.
    learner: `(config, counts, channels by site) -> MetaLearner`, what the meta set governs; None for none.
    modulates: that learner is a modulator, which can be frozen and taken to another run.
    needs: what that learner reads of the classifier: names of sites, and "head".
    overrides: fields that it cannot share with the methods beside it in a comparison, `{group: {field: value}}`.
    search: where the method's own fields are tuned, by `group.field` (`tune`).
    """

    loss: Callable[[Config, jax.Array], LossFn] = lambda config, counts: losses.cross_entropy
    later: Callable[[Config, jax.Array], LossFn] | None = None
    beside: Callable[[Config, jax.Array], Auxiliary | None] | None = None
    weights: Callable[[Config, jax.Array], jax.Array] | None = None
    deferred: bool = False
    cumulative: bool = False
    sampler: Sampler = sampling.natural
    cosine_head: bool = False
    prior_bias: bool = False
    fine_tune: bool = False
    retraining: Retraining | None = None
    posthoc: Callable[[Config, jax.Array, PyTree], PyTree] | None = None
    learner: Callable[[Config, jax.Array, Mapping[str, int]], MetaLearner] | None = None
    modulates: bool = False
    needs: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    search: Mapping[str, Span | Choice] = field(default_factory=dict)


def objective(config: Config) -> Method:
    """Returns the method whose loss, class weights and head are trained: `method.base` under a meta learner."""
    return METHODS[config.method.trained]


def head(config: Config) -> Literal["linear", "cosine", "simplex"]:
    """Returns what the last layer is: as `method.head` says, or as that of the method whose loss is trained."""
    if config.method.head == "own":
        return "cosine" if objective(config).cosine_head else "linear"
    return config.method.head


def _ldam(config: Config, counts: jax.Array) -> LossFn:
    return losses.ldam(counts, config.method.ldam_margin, config.method.ldam_scale)


def _vector_scaling(config: Config, counts: jax.Array) -> LossFn:
    return losses.vector_scaled(counts, config.method.vs_gamma, config.method.tau)


def _label_distribution(config: Config, counts: jax.Array) -> Auxiliary | None:
    weight = config.method.lade_weight
    return auxiliary.label_distribution(counts, weight) if weight else None


def _class_weights(config: Config, counts: jax.Array) -> jax.Array:
    if config.method.weighting == "effective_number":
        return losses.effective_number_weights(counts, config.method.effective_beta)
    return losses.frequency_weights(counts, 1.0 if config.method.weighting == "inverse_frequency" else 0.5)


def _prior_entropy_weights(config: Config, counts: jax.Array) -> jax.Array:
    """One number for all classes: `log K / H(prior)`, so that the loss starts at log K as that of a balanced set does.

    After Chen et al. 2019 (guided loss scaling), whose guide is a detector's localisation loss; a classifier has none.
    """
    log_prior = losses.log_prior(counts)
    entropy = -jnp.sum(jnp.exp(log_prior) * log_prior)
    return jnp.full_like(log_prior, jnp.log(len(log_prior)) / entropy)


def _agreement(config: Config, counts: jax.Array) -> Auxiliary:
    del counts
    return agreement.of_views(config.method.consistency, config.method.consistency_size)


def _siamese(config: Config, counts: jax.Array) -> Auxiliary:
    del counts
    return agreement.siamese(config.method.consistency_size)


def _metasaug(config: Config, counts: jax.Array, channels: Mapping[str, int]) -> MetaLearner:
    size, strength = (len(counts), channels["pooled"]), config.method.isda_strength
    if (last := head(config)) == "linear":
        return learners.metasaug(*size, strength)
    kernel = functools.partial(heads.cosine_kernel, scale=config.method.ldam_scale, fixed=last == "simplex")
    return learners.metasaug(*size, strength, kernel)


def modulator(config: Config, counts: jax.Array, channels: Mapping[str, int]) -> Modulator:
    """Returns MFM's modulator, of the forms that `config.modulation` asks for."""
    chosen, parts = config.modulation, []
    for form in dict.fromkeys(form for _, form in config.forms):
        widths = {site: channels[site] for site, its in config.forms if its == form}
        if form == "direct":
            parts.append(modulation.direct(widths, len(counts) if chosen.per_class else 0))
        elif form == "frequency":
            parts.append(modulation.frequency(widths, counts, shift_only=chosen.shift_only))
        else:
            part = modulation.network(
                widths,
                counts if chosen.use_count else None,
                hidden=chosen.hidden,
                detach_inputs=chosen.detach_inputs,
                shift_only=chosen.shift_only,
            )
            parts.append(part)
    return modulation.joined(parts)


def _oversampled(config: Config, features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return smote.oversample(features, labels, config.method.smote_neighbors, config.train.seed)


def _calibrated(config: Config, features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    chosen = config.method
    options = chosen.rcal_trimmed, chosen.rcal_neighbors, chosen.rcal_borrowed
    return gaussians.drawn(features, labels, *options, config.train.seed)


def _mfm(config: Config, counts: jax.Array, channels: Mapping[str, int]) -> MetaLearner:
    return outer.of(modulator(config, counts, channels))


_CRT = Retraining(heads.fresh, heads.replaced)
_LWS = Retraining(
    lambda key, params: {"scale": jnp.ones_like(params["head"]["bias"])},
    lambda params, trained: heads.scaled(params, trained["scale"]),
)

_BETAS = {"method.effective_beta": Choice((0.9, 0.99, 0.999, 0.9999))}
_MARGIN = {"method.ldam_margin": Span(0.1, 0.8)}
_CONSISTENCY = {"method.consistency": Span(1.0, 10.0, log=True)}
_TAU = {"method.tau": Span(0.25, 2.5)}
_GAMMA = {"method.vs_gamma": Span(0.0, 0.5)}
_STAGE = {"method.first_stage": Span(0.5, 0.95)}
_META = {"meta.learning_rate": Span(1e-3, 1.0, log=True)}

METHODS = {
    # Losses.
    "ce": Method(),
    "focal": Method(
        lambda config, _: losses.focal(config.method.focal_gamma), search={"method.focal_gamma": Span(0.5, 5.0)}
    ),
    "class_balanced": Method(weights=_class_weights, search=_BETAS),
    "drw": Method(weights=_class_weights, deferred=True, search={**_BETAS, **_STAGE}),
    "vector_scaling": Method(_vector_scaling, search={**_GAMMA, **_TAU}),
    "cdt": Method(lambda config, counts: losses.vector_scaled(counts, config.method.vs_gamma, 0.0), search=_GAMMA),
    "lade": Method(
        lambda config, counts: losses.logit_adjusted(counts, config.method.tau),
        beside=_label_distribution,
        search={**_TAU, "method.lade_weight": Span(0.01, 1.0, log=True)},
    ),
    "influence_balanced": Method(
        later=lambda config, features: losses.influence_balanced(features, config.method.ib_alpha),
        weights=lambda config, counts: losses.frequency_weights(counts),
        deferred=True,
        search={**_STAGE, "method.ib_alpha": Span(30.0, 30_000.0, log=True)},
    ),
    "ldam": Method(_ldam, cosine_head=True, search=_MARGIN),
    "ldam_drw": Method(_ldam, cosine_head=True, weights=_class_weights, deferred=True, search={**_MARGIN, **_STAGE}),
    "logit_adjusted": Method(lambda config, counts: losses.logit_adjusted(counts, config.method.tau), search=_TAU),
    "dice": Method(
        lambda config, _: losses.dice(config.method.dice_alpha), search={"method.dice_alpha": Span(0.01, 1.0, log=True)}
    ),
    "glmc": Method(weights=_class_weights, cumulative=True, beside=_agreement, search=_CONSISTENCY),
    "own_loss": Method(own.loss),
    "sampling_free": Method(weights=_prior_entropy_weights, prior_bias=True),
    # Sampling.
    "oversample": Method(sampler=sampling.balanced),
    "undersample": Method(sampler=sampling.undersampled),
    "sqrt_sample": Method(sampler=sampling.square_root),
    "progressive": Method(sampler=sampling.progressive),
    # Stages.
    "two_phase": Method(sampler=sampling.pretrained, fine_tune=True, search=_STAGE),
    "crt": Method(sampler=sampling.balanced_later, retraining=_CRT, search=_STAGE),
    "lws": Method(sampler=sampling.balanced_later, retraining=_LWS, search=_STAGE),
    "smote": Method(
        retraining=_CRT._replace(synthetic=_oversampled),
        search={**_STAGE, "method.smote_neighbors": Choice((1, 3, 5, 10))},
    ),
    "rcal": Method(
        retraining=_CRT._replace(synthetic=_calibrated),
        search={**_STAGE, "method.rcal_trimmed": Span(0.0, 0.5), "method.rcal_borrowed": Span(0.0, 0.9)},
    ),
    # No label counts in the first stage, which cross-entropy's weights of zero say; the second has no such weights.
    "simsiam": Method(
        weights=lambda config, counts: jnp.zeros(len(counts)),
        beside=_siamese,
        sampler=sampling.balanced_later,
        retraining=_CRT,
        search=_STAGE,
    ),
    # After training.
    "posthoc_la": Method(
        posthoc=lambda config, counts, params: heads.without_prior(params, counts, config.method.tau), search=_TAU
    ),
    "tau_norm": Method(
        posthoc=lambda config, _, params: heads.tau_normalized(params, config.method.tau),
        search={"method.tau": Span(0.0, 1.5)},
    ),
    # Governed by the meta set, on the loss `method.base`.
    "meta_weight_net": Method(learner=lambda config, *_: learners.meta_weight_net(config.method.hidden), search=_META),
    # Its weights are made for one batch and used on it.
    "l2rw": Method(learner=lambda *_: learners.l2rw(), overrides={"meta": {"lagged": False, "every": 1}}),
    "l2ac": Method(
        learner=lambda config, counts, _: learners.l2ac(len(counts), config.method.hidden),
        needs=("logits",),
        search=_META,
    ),
    "metasaug": Method(
        learner=_metasaug,
        needs=("pooled", "logits", "head"),
        search={**_META, "method.isda_strength": Span(0.1, 2.0, log=True)},
    ),
    "tgeo_kd": Method(
        learner=lambda config, counts, _: learners.tgeo_kd(len(counts), config.method.hidden, config.method.distill),
        search={**_META, "method.distill_temperature": Span(1.0, 8.0, log=True)},
    ),
    "mfm": Method(learner=_mfm, modulates=True, sampler=sampling.square_root, search=_META),
    "mfm_frozen": Method(learner=_mfm, modulates=True, sampler=sampling.square_root),
    "own_learner": Method(learner=own.learner, search=_META),
}

# Those that need nothing else given, neither a part of the user's own nor a teacher.
BUILT_IN = tuple(name for name in METHODS if name not in ("own_loss", "own_learner", "tgeo_kd"))
COMPARED = ("ce", "mfm")  # where no methods are named; the baseline first


def modulating() -> str:
    """Returns the names of the methods that have a modulator, for a message."""
    return " or ".join(name for name, method in METHODS.items() if method.modulates)
