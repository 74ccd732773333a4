"""Configuration: ml_collections config files in, validated frozen dataclasses out.

The dataclasses below are the only place where a field, its type, its default and its allowed values are
written. `default()` turns them into a `ConfigDict` that a config file edits and the command line
overrides (`--config.optim.learning_rate=0.05`); `resolve` turns that back into dataclasses, so that code
behind it never meets an unknown field or an impossible value. What only the data can tell (how many images a
class holds) is checked by `data.build`, what only the model can tell (its sites) by `models.create`; all of it
happens before the first training step.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_collections

from mfm_jax.errors import UserError


def _one_of(default: str, *others: str) -> Any:
    return dataclasses.field(default=default, metadata={"choices": (default, *others)})


def _between(default: float, low: float, high: float = math.inf) -> Any:
    return dataclasses.field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True)
class Data:
    """Which images, and how they are made long-tailed (see `longtail`)."""

    source: str = _one_of("tfds", "digits", "folder", "list", "npz")
    name: str = "cifar10"  # tfds: its name there
    root: str = ""  # tfds: prepared data ("" = $TFDS_DATA_DIR, else TFDS's default); else the folder, or the file
    train_list: str = ""  # list: file of `path label` lines, or CSV with the columns path, label (and group)
    val_list: str = ""  # list: likewise; a split without a list is made, meta apart
    meta_list: str = ""
    test_list: str = ""
    imbalance_factor: float = _between(100.0, 1.0)  # largest class count / smallest; `natural`: 1 = as it is
    protocol: str = _one_of("meta_held_out", "full", "natural")
    val_images_per_class: int = _between(0, 0)  # meta_held_out, full
    val_fraction: float = _between(0.1, 0.0, 0.9)  # natural: of each class, where the data has no validation split
    meta_fraction: float = _between(0.0, 0.0, 0.5)  # natural: likewise for the meta set; 0 = redraw it from training
    test_fraction: float = _between(0.2, 0.0, 0.9)  # folder, list: of each class, where the data has no test split
    group: str = ""  # folder, list: regular expression; files whose paths match it with equal groups stay in one split
    on_bad_image: str = _one_of(
        "error", "skip"
    )  # folder, list: an image that cannot be used ends the run, or is left out
    seed: int = _between(0, 0, 2**31 - 1)  # picks the images of each split; not the training randomness
    train_on_meta: bool = False  # also train on the meta images: a baseline then sees what MFM sees
    image_size: int = _between(0, 0)  # pixels a side; 0 = as stored
    fit: str = _one_of("crop", "pad", "squeeze")  # folder, list: how a picture of another shape becomes square
    channels: int = _between(0, 0, 3)  # folder, list: 1 grey, 3 colour; 0 = grey where every image is
    normalize: str = _one_of("own", "imagenet", "half", "pytorch_cifar")  # mean and std
    resident_mb: int = _between(4096, 0)  # decoded images up to this many MB stay on the device; more are streamed
    workers: int = _between(2, 0)  # streaming: processes that decode; 0 = in the main process
    manifest: str = ""  # re-use this split manifest instead of drawing one

    @property
    def validates(self) -> bool:
        """Whether images are set aside for validation, or the data may bring them."""
        if self.protocol != "natural":
            return self.val_images_per_class > 0
        return bool(self.val_list or self.val_fraction) or self.source in ("folder", "npz")


@dataclass(frozen=True)
class Augment:
    """Training-time augmentation: on the device, but for `crop = "resized"`, which needs the whole picture."""

    crop: str = _one_of("shift", "resized")  # shift by up to `pad`; resized: streamed files, RandomResizedCrop
    min_area: float = _between(0.08, 0.01, 1.0)  # crop resized: least part of the picture that is seen
    color_jitter: float = _between(0.0, 0.0, 1.0)  # brightness, contrast, saturation vary by up to this factor; 0 = off
    pad: int = _between(4, 0)  # reflect-pad this many pixels, then crop at random; 0 = off
    flip: bool = True  # mirror left-right with probability 1/2
    mixup: float = _between(0.0, 0.0)  # mix images in pairs, shares from Beta(mixup, mixup); 0 = off


SMALL_RESNETS = ("resnet32", "resnet8", "resnet20", "resnet44", "resnet56")  # for 16 to 64 pixels a side


@dataclass(frozen=True)
class Model:
    """The classifier (see `models`)."""

    name: str = _one_of(
        *SMALL_RESNETS,
        *("resnet10", "resnet18", "resnet50", "resnet101", "resnet152", "resnext50", "vit_b16"),  # for 224
    )
    width: int = _between(0, 0)  # channels of the stem, or of a token; 0 = 16 for small images, 64 for 224, 768 for ViT
    pretrained: str = ""  # weights to start from: .safetensors, .npz, or a PyTorch state dict; the head may differ
    tune: str = _one_of("all", "head", "adapters")  # what is trained; adapters: ViT, beside each MLP, and the head
    adapter_size: int = _between(64, 1)  # tune adapters: hidden units of each
    remat: bool = False  # compute activations again in the backward pass: less memory, a third more time


# The methods that go on in a second stage, which gets the last part of the epochs and its own learning-rate schedule.
STAGED = ("two_phase", "crt", "lws", "smote")


@dataclass(frozen=True)
class Method:
    """How the classifier is trained (see `methods` and docs/methods.md). A field is read by the methods it names."""

    name: str = _one_of(
        "mfm",
        *("ce", "focal", "class_balanced", "ldam", "ldam_drw", "logit_adjusted", "dice", "sampling_free"),
        *("oversample", "undersample", "sqrt_sample", "progressive", "two_phase", "crt", "lws", "smote"),
        *("posthoc_la", "tau_norm", "meta_weight_net", "l2rw", "l2ac", "metasaug"),
    )
    # The loss under a meta learner.
    base: str = _one_of("ce", "focal", "class_balanced", "ldam", "ldam_drw", "logit_adjusted")
    tau: float = _between(1.0, 0.0)  # logit_adjusted, posthoc_la: strength of the prior; tau_norm: power of the norm
    label_smoothing: float = _between(0.0, 0.0, 1.0)  # any method; 0 = off
    focal_gamma: float = _between(2.0, 0.0)  # focal; 0 = cross-entropy
    weighting: str = _one_of("effective_number", "inverse_frequency", "sqrt_frequency")  # class_balanced, ldam_drw
    effective_beta: float = _between(0.9999, 0.0, 0.999999)  # weighting effective_number; 0 = no weights
    ldam_margin: float = _between(0.5, 0.0)  # ldam, ldam_drw: margin of the rarest class, in cosines
    ldam_scale: float = _between(30.0, 1.0)  # ldam, ldam_drw: what cosines are multiplied by
    dice_alpha: float = _between(0.1, 0.0)  # dice
    # How often classes are drawn, for any method; "own" as the method says.
    sampling: str = _one_of(
        "own", *("natural", "square_root", "square_root_later", "balanced", "balanced_later", "progressive")
    )
    first_stage: float = _between(0.8, 0.01, 0.99)  # ldam_drw, two_phase, crt, lws, smote, *_later: its part of epochs
    pretrain: str = _one_of("oversample", "undersample")  # two_phase: the first phase's sampling
    smote_neighbors: int = _between(5, 1)  # smote: nearest neighbours to interpolate to
    hidden: int = _between(100, 1)  # meta_weight_net, l2ac: hidden units
    isda_strength: float = _between(0.5, 0.0)  # metasaug; 0 = no augmentation


@dataclass(frozen=True)
class Modulation:
    """What is modulated, and what generates the modulation (see `modulation`)."""

    form: str = _one_of("frequency", "direct", "network")
    sites: str = "logits"  # comma-separated, e.g. "stage3,pooled"
    per_class: bool = False  # `direct`: one row a class, looked up by the training label
    hidden: int = _between(64, 1)  # `network`: hidden units
    use_count: bool = False  # `network`: join log(n_y / n_max) to the input
    detach_inputs: bool = True  # `network`: no gradient into the features the modulator reads
    shift_only: bool = False  # `frequency`, `network`: generate beta alone
    init_from: str = ""  # workdir of a run whose modulator to start from


@dataclass(frozen=True)
class Meta:
    """The balanced meta set and the outer update (see `hypergrad` and `bilevel`)."""

    images_per_class: int = _between(10, 1)
    batch_size: int = _between(100, 1)
    every: int = _between(8, 1)  # update the modulator every k-th step
    start_epoch: int = _between(0, 0)  # no modulator update before this epoch
    lagged: bool = True  # the real step re-uses the virtual one
    virtual: str = _one_of("all", "last_stage", "head")  # parameters that move in the virtual step
    bn: str = _one_of("fresh", "running", "batch")  # statistics that normalise the meta pass (see `bilevel`)
    loss: str = _one_of("ce", "gce")
    temperature: float = _between(1.0, 1e-3)  # divides the logits in the meta loss
    learning_rate: float = _between(0.01, 0.0)  # how far phi moves in a meta-step where meta-gradients agree
    freeze: bool = False  # keep the modulator as it starts; the meta-step is not paid for


@dataclass(frozen=True)
class Optim:
    """The classifier's optimizer (see `optim`)."""

    name: str = _one_of("sgd", "adamw")
    learning_rate: float = _between(0.1, 0.0)
    momentum: float = _between(0.9, 0.0, 0.9999)  # Nesterov momentum of SGD, b1 of AdamW
    weight_decay: float = _between(5e-4, 0.0)
    clip_norm: float = _between(0.0, 0.0)  # clip the gradient's global norm to this; 0 = off
    schedule: str = _one_of("cosine", "step", "constant")
    warmup_epochs: int = _between(0, 0)
    reference_batch_size: int = _between(0, 0)  # learning_rate is for this batch, and scaled to train's; 0 = as it is


@dataclass(frozen=True)
class Train:
    """The training run."""

    epochs: int = _between(200, 1)
    batch_size: int = _between(100, 1)  # over all devices together, as meta.batch_size is
    accumulate: int = _between(1, 1)  # compute a batch in this many parts, one after the other: less memory
    seed: int = _between(0, 0, 2**31 - 1)
    max_steps: int = _between(0, 0)  # stop after this many steps; 0 = after `epochs`
    steps_per_call: int = _between(0, 0)  # steps in one compiled call; 0 = 1 on CPU, 10 elsewhere
    dtype: str = _one_of("float32", "bfloat16")  # of the computation; parameters stay float32
    on_nonfinite: str = _one_of("stop", "skip")  # a loss or gradient that is not finite ends the run, or is left out
    spike_factor: float = _between(0.0, 0.0)  # a grad_norm above this times its running mean counts as such; 0 = off


@dataclass(frozen=True)
class Parallel:
    """How a step is spread over several devices (see `parallel`)."""

    batch_norm: str = _one_of("sync", "local")  # statistics of the whole batch, or of each device's part
    fsdp: int = _between(1, 1)  # divide parameters and optimizer state over this many devices; 1 = off


@dataclass(frozen=True)
class Eval:
    """Evaluation on the validation split while training, and once, at the end, on the test split."""

    every_epochs: int = _between(1, 1)
    batch_size: int = _between(500, 1)
    test: bool = True  # False: choices are still being made; tables and pages show validation, test stays unread


@dataclass(frozen=True)
class Checkpoint:
    """What is kept of a run."""

    every_epochs: int = _between(1, 1)
    keep: int = _between(2, 1)  # last K; the best on validation is kept beside them


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. Two runs with equal configs on equal software are equal."""

    data: Data = Data()
    augment: Augment = Augment()
    model: Model = Model()
    method: Method = Method()
    modulation: Modulation = Modulation()
    meta: Meta = Meta()
    optim: Optim = Optim()
    train: Train = Train()
    parallel: Parallel = Parallel()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()

    @property
    def sites(self) -> tuple[str, ...]:
        """Names in `modulation.sites`, in the order given."""
        return tuple(site.strip() for site in self.modulation.sites.split(","))

    @property
    def second_stage(self) -> int:
        """The epoch at which the second stage, or a deferred weighting, begins: at least one epoch before it."""
        return max(round(self.method.first_stage * self.train.epochs), 1)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """As nested plain dicts, ready for JSON."""
        return dataclasses.asdict(self)


GROUPS: dict[str, type[Any]] = {group.name: type(group.default) for group in dataclasses.fields(Config)}


def field_type(field: dataclasses.Field[Any]) -> type:
    """Returns the type of a field's values: that of its default."""
    return type(field.default)


def default() -> ml_collections.ConfigDict:
    """Returns every field at its default, as a `ConfigDict` for a config file to edit."""
    return ml_collections.ConfigDict(Config().to_dict())


def resolve(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """Validates `config` and returns it as frozen dataclasses.

    Raises:
      UserError: one line that names the field, its value and what is allowed.
    """
    given = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    _no_unknown(given, GROUPS, "")
    parts = {}
    for name, cls in GROUPS.items():
        values = given.get(name, {})
        if not isinstance(values, Mapping):
            raise UserError(f"{name} = {values!r}: expected a group of fields")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        _no_unknown(values, fields, f"{name}.")
        parts[name] = cls(**{key: _checked(f"{name}.{key}", fields[key], v) for key, v in values.items()})
    resolved = Config(**parts)
    _check_together(resolved)
    return resolved


def _no_unknown(given: Mapping[str, Any], allowed: Mapping[str, Any], prefix: str) -> None:
    for key in given:
        if key not in allowed:
            raise UserError(f"{prefix}{key}: no such field; allowed: {', '.join(prefix + a for a in allowed)}")


def _checked(path: str, field: dataclasses.Field[Any], value: Any) -> Any:
    """Returns `value` as the field's type (an int is welcome where a float is due)."""
    want = field_type(field)
    if want is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not want:
        raise UserError(f"{path} = {value!r}: expected {want.__name__}, got {type(value).__name__}")
    choices = field.metadata.get("choices")
    if choices and value not in choices:
        raise UserError(f"{path} = {value!r}: allowed: {', '.join(sorted(choices))}")
    if not isinstance(value, int | float) or isinstance(value, bool):
        return value
    low, high = field.metadata.get("low", -math.inf), field.metadata.get("high", math.inf)
    if not (low <= value <= high and math.isfinite(value)):
        bound = f"{low:.10g} or more" if high == math.inf else f"{low:.10g} to {high:.10g}"
        raise UserError(f"{path} = {value!r}: allowed: {bound}")
    return value


def _check_together(config: Config) -> None:
    """Refuses values that are possible alone but not together."""
    sites = config.sites
    if "" in sites or len(set(sites)) != len(sites):
        raise UserError(
            f"modulation.sites = {config.modulation.sites!r}: expected distinct, comma-separated site names"
        )
    if config.model.tune == "adapters" and config.model.name != "vit_b16":
        raise UserError(
            f"model.tune = 'adapters': only model.name = 'vit_b16' has them, not {config.model.name!r}; choose"
            " 'head' or 'all'"
        )
    if config.modulation.per_class and config.modulation.form != "direct":
        raise UserError(
            f"modulation.per_class = True: only modulation.form = 'direct' has one row a class,"
            f" not {config.modulation.form!r}"
        )
    if config.modulation.per_class and "logits" in sites:
        raise UserError(
            "modulation.per_class = True: at site 'logits' a row looked up by the label gives the label away;"
            " choose other modulation.sites"
        )
    if config.modulation.shift_only and config.modulation.form == "direct":
        raise UserError(
            "modulation.shift_only = True: modulation.form = 'direct' cannot leave the scale out; use 'frequency' or"
            " 'network'"
        )
    if config.method.name == "l2rw" and config.meta.lagged:
        raise UserError(
            "meta.lagged = True: l2rw's weights belong to one batch, so the next step cannot use them;"
            " set meta.lagged = False"
        )
    if config.method.name == "l2rw" and config.optim.clip_norm:
        raise UserError(
            f"optim.clip_norm = {config.optim.clip_norm}: l2rw's virtual step starts from a gradient of zero, where"
            " clipping has no derivative; set it to 0"
        )
    if config.modulation.use_count and config.modulation.form != "network":
        raise UserError(
            f"modulation.use_count = True: only modulation.form = 'network' joins the count to its input, not"
            f" {config.modulation.form!r}"
        )
    for name in ("train_list", "val_list", "meta_list", "test_list", "group"):
        sources = ("folder", "list") if name == "group" else ("list",)
        if (value := getattr(config.data, name)) and config.data.source not in sources:
            raise UserError(
                f"data.{name} = {value!r}: not read with data.source = {config.data.source!r}; only with"
                f" {' or '.join(map(repr, sources))}"
            )
    natural = config.data.protocol == "natural"
    unread, instead = (
        ("val_images_per_class", "data.val_fraction") if natural else ("meta_fraction", "meta.images_per_class")
    )
    if value := getattr(config.data, unread):
        raise UserError(
            f"data.{unread} = {value}: not read under data.protocol = {config.data.protocol!r}; choose another"
            f" protocol, or {instead}"
        )
    if config.augment.crop == "resized" and config.data.source not in ("folder", "list"):
        raise UserError(
            f"augment.crop = 'resized': needs whole pictures, which only data.source = 'folder' or 'list' has, not"
            f" {config.data.source!r}; use 'shift'"
        )
    if 0 < config.train.spike_factor <= 1:
        raise UserError(f"train.spike_factor = {config.train.spike_factor}: allowed: more than 1, or 0 for none")
    method = config.method
    deferred = "ldam_drw" in (method.name, method.base) or method.sampling.endswith("_later")
    if method.name in STAGED or deferred:
        _check_stages(config)
    if not config.eval.test and not config.data.validates:
        raise UserError(
            "eval.test = False: there is nothing else to show; choose data.val_images_per_class, or under protocol"
            " natural data.val_fraction, above 0"
        )
    for name, epochs in (
        ("optim.warmup_epochs", config.optim.warmup_epochs),
        ("meta.start_epoch", config.meta.start_epoch),
    ):
        if epochs >= config.train.epochs:
            raise UserError(f"{name} = {epochs}: allowed: less than train.epochs = {config.train.epochs}")


def _check_stages(config: Config) -> None:
    epochs, second = config.train.epochs, config.second_stage
    if second >= epochs:
        raise UserError(
            f"method.first_stage = {config.method.first_stage}: leaves {config.method.name} no epoch of"
            f" train.epochs = {epochs} for its second stage; choose a smaller part or more epochs"
        )
    if config.method.name in STAGED and config.optim.warmup_epochs >= second:
        raise UserError(
            f"optim.warmup_epochs = {config.optim.warmup_epochs}: allowed: less than the {second} epochs of"
            f" {config.method.name}'s first stage"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yields `field: old value -> new value` for every field in which two config dicts differ."""
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            for line in differences(before, after):
                yield f"{name}.{line}"
        elif before != after:
            yield f"{name}: {json.dumps(before)} -> {json.dumps(after)}"
