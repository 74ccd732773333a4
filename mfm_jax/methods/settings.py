"""The fields of the group `method`: the methods' names, and what a method asks of other groups.

Nothing here imports JAX, so that a config can be checked without it. `table` says what each method does.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from mfm_jax.fields import OWN, Bounds

# A loss that can stand under a meta learner, too.
Loss = Literal["ce", "drw", "focal", "class_balanced", "ldam", "ldam_drw", "logit_adjusted", "own_loss"]
Sampled = Literal["oversample", "undersample", "sqrt_sample", "progressive"]
# A second stage gets the last part of the epochs and its own learning-rate schedule.
Staged = Literal["two_phase", "crt", "lws", "smote"]
MetaLearned = Literal["mfm", "mfm_frozen", "meta_weight_net", "l2rw", "l2ac", "metasaug", "own_learner"]
Name = Literal[Loss, "dice", "sampling_free", Sampled, Staged, "posthoc_la", "tau_norm", MetaLearned]

_DEFERRED = {"drw", "ldam_drw"}  # class weights that act in the second part of the epochs alone
_BASES = {"metasaug": "drw"}  # of the meta learners that were published with another loss than cross-entropy
_PER_BATCH = {"l2rw"}  # weights of examples that belong to one batch
_COSINE = {"ldam", "ldam_drw"}  # losses of a classifier that compares directions
_FINE_TUNED = {"two_phase"}  # second stages that train the whole classifier
_KEPT = {"mfm_frozen": "long_tail"}  # the shipped modulator that a method keeps (`workdir.modulators`)


@dataclass(frozen=True)
class Method:
    """How the classifier is trained (docs/methods.md). A meaning begins with the methods that read the field."""

    name: Annotated[Name, "the method"] = "mfm"
    base: Annotated[Literal["own", Loss], "the loss under a meta learner; own = as the method says"] = "own"
    tau: Annotated[float, Bounds(0), "logit_adjusted, posthoc_la: strength of prior; tau_norm: power of norm"] = 1.0
    label_smoothing: Annotated[float, Bounds(0, 1), "any method; 0 = off"] = 0.0
    focal_gamma: Annotated[float, Bounds(0), "focal; 0 = cross-entropy"] = 2.0
    weighting: Annotated[
        Literal["effective_number", "inverse_frequency", "sqrt_frequency"],
        "class_balanced, drw, ldam_drw: class weights",
    ] = "effective_number"
    effective_beta: Annotated[float, Bounds(0, 0.999999), "weighting effective_number; 0 = no weights"] = 0.9999
    ldam_margin: Annotated[float, Bounds(0), "ldam, ldam_drw: margin of the rarest class, in cosines"] = 0.5
    ldam_scale: Annotated[float, Bounds(1), "ldam, ldam_drw: factor of the cosines"] = 30.0
    dice_alpha: Annotated[float, Bounds(0), "dice; 0 = the plain Dice loss"] = 0.1
    sampling: Annotated[
        Literal["own", "natural", "square_root", "square_root_later", "balanced", "balanced_later", "progressive"],
        "any method: how often classes are drawn; own = as the method says",
    ] = "own"
    first_stage: Annotated[float, Bounds(0.01, 0.99), "drw, ldam_drw, two stages, *_later: first part of epochs"] = 0.8
    pretrain: Annotated[Literal["oversample", "undersample"], "two_phase: the first phase's sampling"] = "oversample"
    smote_neighbors: Annotated[int, Bounds(1), "smote: nearest neighbours to interpolate to"] = 5
    hidden: Annotated[int, Bounds(1), "meta_weight_net, l2ac: hidden units"] = 100
    isda_strength: Annotated[float, Bounds(0), "metasaug; 0 = no augmentation"] = 0.5
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
        return self.trained in _COSINE

    @property
    def deferred(self) -> bool:
        """Whether class weights or a sampling begin with the second part of the epochs."""
        return self.trained in _DEFERRED or self.sampling.endswith("_later")

    @property
    def planned(self) -> bool:
        """Whether what it does in an epoch depends on how many there are in all."""
        return self.staged or self.deferred or "progressive" in (self.name, self.sampling)

    @property
    def meta_learned(self) -> bool:
        """Whether something learns from the meta set."""
        return self.name in get_args(MetaLearned)

    @property
    def kept(self) -> str:
        """The shipped modulator that it keeps unchanged, reading no meta set; "" where there is none."""
        return _KEPT.get(self.name, "")

    @property
    def per_batch(self) -> bool:
        """Whether what the meta set governs belongs to one batch and starts from zero in each."""
        return self.name in _PER_BATCH
