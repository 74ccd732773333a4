"""The fields of the group `method`: the methods' names, and what a method asks of other groups.

Nothing here imports JAX, so that a config can be checked without it. `table` says what each method does.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from mfm_jax.fields import OWN, Bounds

Adjusted = Literal["logit_adjusted", "vector_scaling", "cdt", "lade"]
# A loss that can stand under a meta learner, too.
Weighted = Literal["class_balanced", "drw", "influence_balanced", "glmc"]
Loss = Literal["ce", "focal", Weighted, "ldam", "ldam_drw", Adjusted, "own_loss"]
Sampled = Literal["oversample", "undersample", "sqrt_sample", "progressive"]
# A second stage gets the last part of the epochs and its own learning-rate schedule.
Staged = Literal["two_phase", "crt", "lws", "smote", "rcal", "simsiam"]
MetaLearned = Literal["mfm", "mfm_frozen", "meta_weight_net", "l2rw", "l2ac", "metasaug", "tgeo_kd", "own_learner"]
Name = Literal[Loss, "dice", "sampling_free", Sampled, Staged, "posthoc_la", "tau_norm", MetaLearned]

_DEFERRED = {"drw", "ldam_drw", "influence_balanced"}  # weights that act in the second part of the epochs alone
_BASES = {"metasaug": "drw"}  # of the meta learners that were published with another loss than cross-entropy
_PER_BATCH = {"l2rw"}  # weights of examples that belong to one batch
_COSINE = {"ldam", "ldam_drw"}  # losses of a classifier that compares directions
_FINE_TUNED = {"two_phase"}  # second stages that train the whole classifier
# What they set or train of the head.
_LINEAR = {"crt", "lws", "smote", "rcal", "simsiam", "posthoc_la", "tau_norm", "sampling_free"}
_KEPT = {"mfm_frozen": "long_tail"}  # the shipped modulator that a method keeps (`workdir.modulators`)
_OF_BATCH = {"lade"}  # that have a loss of the whole batch
_TAUGHT = {"tgeo_kd"}  # whose meta learner says what a teacher counts
_MIXED_VIEWS = {"glmc"}  # that train on two mixtures of each pair of images
_UNLABELLED = {"simsiam"}  # whose first stage reads no label
_AGREEING = _MIXED_VIEWS | _UNLABELLED  # that compare two views of each image, by a projection


@dataclass(frozen=True)
class Method:
    """How the classifier is trained (docs/methods.md). A meaning begins with the methods that read the field."""

    name: Annotated[Name, "the method"] = "mfm"
    base: Annotated[Literal["own", Loss], "the loss under a meta learner; own = as the method says"] = "own"
    tau: Annotated[
        float, Bounds(0), "logit_adjusted, vector_scaling, lade, posthoc_la: strength of prior; tau_norm: power of norm"
    ] = 1.0
    pretraining_tau: Annotated[
        float, Bounds(0), "any method: strength of the prior that the first classifier has on meta images; 0 = off"
    ] = 0.0
    label_smoothing: Annotated[float, Bounds(0, 1), "any method; 0 = off"] = 0.0
    cost_share: Annotated[float, Bounds(0, 1), "any method: what the expected eval.costs have of the loss; 0 = off"] = (
        0.0
    )
    proco_weight: Annotated[float, Bounds(0), "any method: of the probabilistic contrastive loss; 0 = off"] = 0.0
    bcl_weight: Annotated[float, Bounds(0), "any method: of the balanced contrastive loss of two views; 0 = off"] = 0.0
    sbcl_weight: Annotated[
        float, Bounds(0), "any method: of the subclass-balanced contrastive loss of two views; 0 = off"
    ] = 0.0
    sbcl_images: Annotated[int, Bounds(1), "sbcl_weight: images of a subclass"] = 50
    contrast_temperature: Annotated[float, Bounds(0.01), "proco, bcl, sbcl: divides the cosines"] = 0.1
    contrast_features: Annotated[int, Bounds(8), "proco, bcl, sbcl: dimensions in which examples are contrasted"] = 128
    focal_gamma: Annotated[float, Bounds(0), "focal; 0 = cross-entropy"] = 2.0
    weighting: Annotated[
        Literal["effective_number", "inverse_frequency", "sqrt_frequency"],
        "class_balanced, drw, ldam_drw, glmc: class weights",
    ] = "effective_number"
    effective_beta: Annotated[float, Bounds(0, 0.999999), "weighting effective_number; 0 = no weights"] = 0.9999
    vs_gamma: Annotated[float, Bounds(0), "vector_scaling, cdt: power of counts in a logit's factor; 0 = none"] = 0.3
    lade_weight: Annotated[float, Bounds(0), "lade: of the regulariser; 0 = logit_adjusted"] = 0.1
    ib_alpha: Annotated[float, Bounds(1e-3), "influence_balanced: factor of the loss in the second part"] = 1000.0
    ldam_margin: Annotated[float, Bounds(0), "ldam, ldam_drw: margin of the rarest class, in cosines"] = 0.5
    ldam_scale: Annotated[float, Bounds(1), "ldam, ldam_drw, method.head: factor of the cosines"] = 30.0
    head: Annotated[
        Literal["own", "cosine", "simplex"],
        "last layer: cosine = normalised, simplex = that and fixed; own = as the method says",
    ] = "own"
    dice_alpha: Annotated[float, Bounds(0), "dice; 0 = the plain Dice loss"] = 0.1
    mixing: Annotated[float, Bounds(0.01), "glmc: shares of its two mixtures from Beta(mixing, mixing)"] = 0.5
    consistency: Annotated[float, Bounds(0), "glmc: what the agreement of the views counts; 0 = mixtures alone"] = 4.0
    consistency_size: Annotated[int, Bounds(1), "glmc, simsiam: numbers that features are projected to"] = 128
    sampling: Annotated[
        Literal["own", "natural", "square_root", "square_root_later", "balanced", "balanced_later", "progressive"],
        "any method: how often classes are drawn; own = as the method says",
    ] = "own"
    first_stage: Annotated[
        float, Bounds(0.01, 0.99), "drw, ldam_drw, influence_balanced, two stages, *_later: first part of epochs"
    ] = 0.8
    pretrain: Annotated[Literal["oversample", "undersample"], "two_phase: the first phase's sampling"] = "oversample"
    smote_neighbors: Annotated[int, Bounds(1), "smote: nearest neighbours to interpolate to"] = 5
    rcal_trimmed: Annotated[float, Bounds(0, 0.5), "rcal: share of a class's features left out as outliers"] = 0.2
    rcal_neighbors: Annotated[int, Bounds(1), "rcal: frequent classes that a rare one borrows from"] = 3
    rcal_borrowed: Annotated[float, Bounds(0, 1), "rcal: share of their mean and covariance in its own"] = 0.3
    hidden: Annotated[int, Bounds(1), "meta_weight_net, l2ac, tgeo_kd: hidden units"] = 100
    isda_strength: Annotated[float, Bounds(0), "metasaug; 0 = no augmentation"] = 0.5
    teacher: Annotated[str, "any method: run folder whose tested classifier is learned from, too; '' = none"] = ""
    distill: Annotated[float, Bounds(0, 1), "teacher: its share in the loss; tgeo_kd: at the start"] = 0.5
    distill_temperature: Annotated[float, Bounds(0.1), "teacher: divides both logits where they are compared"] = 4.0
    loss: Annotated[str, OWN, "own_loss: the loss of an example (docs/library.md)"] = ""
    learner: Annotated[str, OWN, "own_learner: what the meta set governs (docs/library.md)"] = ""

    @property
    def staged(self) -> bool:
        """Whether a second stage follows, with a learning-rate schedule of its own."""
        return self.name in get_args(Staged)

    @property
    def retrains(self) -> bool:
        """Whether the second stage leaves all of the classifier but its last layer as it is."""
        return self.staged and self.name not in _FINE_TUNED

    @property
    def trained(self) -> str:
        """The method whose loss, class weights and head are trained: the base under a meta learner."""
        if not self.meta_learned:
            return self.name
        return _BASES.get(self.name, "ce") if self.base == "own" else self.base

    @property
    def cosine(self) -> bool:
        """Whether the last layer compares directions, so that its weights have no length."""
        return self.head != "own" or self.trained in _COSINE

    @property
    def deferred(self) -> bool:
        """Whether class weights or a sampling begin with the second part of the epochs."""
        return self.trained in _DEFERRED or self.sampling.endswith("_later")

    @property
    def planned(self) -> bool:
        """Whether what it does in an epoch depends on how many there are in all."""
        return self.staged or self.deferred or self.mixed_views or "progressive" in (self.name, self.sampling)

    @property
    def meta_learned(self) -> bool:
        """Whether something learns from the meta set."""
        return self.name in get_args(MetaLearned)

    @property
    def linear(self) -> bool:
        """Whether it sets or trains a last layer that has to be linear."""
        return self.name in _LINEAR

    @property
    def kept(self) -> str:
        """The shipped modulator that it keeps unchanged, reading no meta set; "" where there is none."""
        return _KEPT.get(self.name, "")

    @property
    def mixed_views(self) -> bool:
        """Whether it mixes each pair of images twice, in two ways, and compares the two."""
        return self.trained in _MIXED_VIEWS

    @property
    def second_view(self) -> bool:
        """Whether a training batch has a second view of its images (`Batch.second`)."""
        return self.agrees or self.pairs

    @property
    def agrees(self) -> bool:
        """Whether the two views of each image are to agree."""
        return self.trained in _AGREEING

    @property
    def unlabelled(self) -> bool:
        """Whether its first stage reads no label, so that the head is as it was drawn until the second."""
        return self.name in _UNLABELLED

    @property
    def pairs(self) -> bool:
        """Whether the examples of a batch are contrasted with one another."""
        return bool(self.bcl_weight or self.sbcl_weight)

    @property
    def projects(self) -> bool:
        """Whether a loss of the whole batch trains a projection of the features beside the classifier."""
        return self.second_view or self.proco_weight > 0

    @property
    def of_batch(self) -> bool:
        """Whether a loss of the whole batch is trained beside that of the examples."""
        return self.projects or self.trained in _OF_BATCH

    @property
    def taught(self) -> bool:
        """Whether its meta learner says what a teacher's predictions count."""
        return self.name in _TAUGHT

    @property
    def per_batch(self) -> bool:
        """Whether what the meta set governs belongs to one batch and starts from zero in each."""
        return self.name in _PER_BATCH
