"""The fields of the configuration, a dataclass a group: the only place where a field, its values and its default stand.

`mfm_jax.fields` says how an annotation is read, `methods.settings` has the group `method`.
"""

import dataclasses
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, get_args

from mfm_jax.config import own as own_lib
from mfm_jax.config.own import Own
from mfm_jax.fields import MAY_CHANGE, OWN, Bounds, Field, declared, names_own
from mfm_jax.methods.settings import Method

_SEED = Bounds(0, 2**31 - 1)


@dataclass(frozen=True)
class Data:
    """The images, and how they become long-tailed (see `longtail`). A meaning begins with the sources that read it."""

    source: Annotated[
        Literal["tfds", "digits", "folder", "list", "npz"], MAY_CHANGE, OWN, "what kind of place images come from"
    ] = "tfds"
    name: Annotated[str, "tfds: the set"] = "cifar10"
    root: Annotated[
        str, MAY_CHANGE, "tfds: prepared data, '' = $TFDS_DATA_DIR, else TFDS's default; others: folder or file"
    ] = ""
    train_list: Annotated[
        str, MAY_CHANGE, "list: file of `path label` lines, or CSV with the columns path, label (and group)"
    ] = ""
    val_list: Annotated[str, MAY_CHANGE, "list: as train_list; a split without a list is made from train_list"] = ""
    meta_list: Annotated[
        str, MAY_CHANGE, "list: as train_list; without one the meta set is made as for other sources"
    ] = ""
    test_list: Annotated[str, MAY_CHANGE, "list: as val_list"] = ""
    imbalance_factor: Annotated[float, Bounds(1), "largest class count / smallest; natural: 1 keeps all images"] = 100.0
    protocol: Annotated[
        Literal["meta_held_out", "full", "natural"],
        "meta_held_out: the meta set leaves, then a long tail is made; full: it is drawn after that; natural: as it is",
    ] = "meta_held_out"
    val_images_per_class: Annotated[int, Bounds(0), "meta_held_out, full: validation images of each class"] = 0
    val_fraction: Annotated[float, Bounds(0, 0.9), "natural: of each class, where no validation split exists"] = 0.1
    meta_fraction: Annotated[float, Bounds(0, 0.5), "natural: of each class, held out as meta set; 0 = redrawn"] = 0.0
    test_fraction: Annotated[float, Bounds(0, 0.9), "folder, list: of each class, where no test split exists"] = 0.2
    group: Annotated[str, "folder, list: regular expression; paths with equal matches stay in one split"] = ""
    on_bad_image: Annotated[
        Literal["error", "skip"], MAY_CHANGE, "folder, list: a bad image ends the run or is left out"
    ] = "error"
    seed: Annotated[int, _SEED, "of the draw of each split, not of training"] = 0
    label_noise: Annotated[float, Bounds(0, 0.9), "share of each class's training labels to make wrong; 0 = off"] = 0.0
    noise_kind: Annotated[
        Literal["symmetric", "proportional", "confusion"],
        "label_noise: a wrong label is any other class; one by the classes' sizes; the one with the nearest mean image",
    ] = "symmetric"
    train_on_meta: Annotated[bool, "also train on the meta images: a baseline then sees what MFM sees"] = False
    image_size: Annotated[int, Bounds(0), "pixels a side; 0 = as stored"] = 0
    fit: Annotated[Literal["crop", "pad", "squeeze"], "folder, list: how another shape becomes square"] = "crop"
    channels: Annotated[int, Bounds(0, 3), "folder, list: 1 grey, 3 colour; 0 = grey if every image is"] = 0
    white: Annotated[int, Bounds(0, 65535), "folder, list: value of 16-bit files that is white; 0 = by their bits"] = 0
    normalize: Annotated[Literal["own", "imagenet", "half", "clip", "pytorch_cifar"], "mean and std"] = "own"
    resident_mb: Annotated[int, Bounds(0), "MB of decoded images that stay on the device; more are streamed"] = 4096
    workers: Annotated[
        int, Bounds(0), MAY_CHANGE, "processes that decode: the check, streaming, a TFDS set's first reading; 0 = none"
    ] = 2
    manifest: Annotated[str, MAY_CHANGE, "reuse this split manifest; '' = draw a split"] = ""
    pretext: Annotated[
        Literal["none", "rotation"],
        "a first stage for model.init_from: labels are not the classes, but how images were turned",
    ] = "none"

    @property
    def validates(self) -> bool:
        """Whether images are set aside for validation, or the data may bring them."""
        if self.protocol != "natural":
            return self.val_images_per_class > 0
        return bool(self.val_list or self.val_fraction) or self.source in ("folder", "npz") or names_own(self.source)


@dataclass(frozen=True)
class Augment:
    """Training-time augmentation: on the device, but for `crop = "resized"`, which needs the whole picture."""

    crop: Annotated[Literal["shift", "resized"], "by up to `pad`; or RandomResizedCrop, of streamed files"] = "shift"
    min_area: Annotated[float, Bounds(0.01, 1), "crop resized: least part of the picture that is seen"] = 0.08
    color_jitter: Annotated[float, Bounds(0, 1), "largest change of brightness, contrast, saturation; 0 = off"] = 0.0
    pad: Annotated[int, Bounds(0), "crop shift: reflect-pad this many pixels, then crop at random; 0 = off"] = 4
    flip: Annotated[bool, "mirror left-right with probability 1/2"] = True
    policy: Annotated[
        Literal["none", "autoaugment", "randaugment", "trivialaugment"],
        "operations drawn for each image, of meta batches too",
    ] = "none"
    magnitude: Annotated[int, Bounds(0, 30), "policy randaugment: strength of the operations"] = 9
    operations: Annotated[int, Bounds(1, 8), "policy randaugment: how many an image gets"] = 2
    cutout: Annotated[int, Bounds(0), "blank a square of this many pixels a side, in meta batches too; 0 = off"] = 0
    mixup: Annotated[float, Bounds(0), "mix images in pairs, shares from Beta(mixup, mixup); 0 = off"] = 0.0
    cutmix: Annotated[
        float, Bounds(0), "paste boxes into half of the images, shares from Beta(cutmix, cutmix); 0 = off"
    ] = 0.0
    partners: Annotated[
        Literal["batch", "balanced"], "mixup, cutmix: others of the batch, or of the training set, every class as often"
    ] = "batch"


SmallResNet = Literal["resnet32", "resnet8", "resnet20", "resnet44", "resnet56"]  # for 16 to 64 pixels a side
OtherSmall = Literal["wrn28_10", "densenet_bc100"]  # for the same
LargeResNet = Literal["resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50"]  # for 224
Tower = Literal["clip_vit_b16", "dinov2_vit_b14", "dinov2_reg_vit_b14"]  # image towers of foundation models
ViT = Literal["vit_b16", Tower]
LargeModel = Literal[LargeResNet, "efficientnet_b0", ViT]
SMALL_RESNETS = get_args(SmallResNet)
VITS, TOWERS = get_args(ViT), get_args(Tower)
LOGGERS = ("tensorboard", "wandb", "mlflow")


@dataclass(frozen=True)
class Model:
    """The classifier (see `models`)."""

    name: Annotated[Literal[SmallResNet, OtherSmall, LargeModel], OWN, "the architecture"] = "resnet32"
    width: Annotated[int, Bounds(0), "channels of the stem or a token; 0 = as published"] = 0
    pretrained: Annotated[
        str, "initial weights: .safetensors, .npz, PyTorch state dict, or timm/NAME; the head may differ"
    ] = ""
    init_from: Annotated[str, "run folder whose classifier to start from, not its phi; the head may differ"] = ""
    start_share: Annotated[float, Bounds(0, 1), "share of the initial weights in those that are tested; 0 = off"] = 0.0
    text_features: Annotated[
        str, "zero-shot head: .npy, .npz or .safetensors [K, C] of the classes, in their order; '' = as the weights say"
    ] = ""
    tune: Annotated[
        Literal["all", "head", "adapters", "lora"], "what is trained; adapters, lora: these of a ViT, and the head"
    ] = "all"
    adapter_size: Annotated[int, Bounds(1), "tune adapters: hidden units of each"] = 64
    lora_rank: Annotated[int, Bounds(1), "tune lora: rank of the changes to query and value"] = 8
    remat: Annotated[bool, "compute activations again in the backward pass: less memory, a third more time"] = False
    scan_blocks: Annotated[bool, MAY_CHANGE, "train a stage's equal blocks as one scanned body: small programs"] = False


Form = Literal["frequency", "direct", "network"]
FORMS: tuple[str, ...] = get_args(Form)


@dataclass(frozen=True)
class Modulation:
    """What generates the modulation, and where (see `modulation`). A meaning begins with the forms that read it."""

    form: Annotated[Form, "what generates gamma and beta"] = "frequency"
    sites: Annotated[str, "comma-separated, e.g. stage3,pooled; SITE:FORM for a form of its own"] = "logits"
    per_class: Annotated[bool, "direct: one row a class, looked up by the training label"] = False
    hidden: Annotated[int, Bounds(1), "network: hidden units"] = 64
    use_count: Annotated[bool, "network: join log(n_y / n_max) to the input"] = False
    detach_inputs: Annotated[bool, "network: no gradient into the features that the modulator reads"] = True
    shift_only: Annotated[bool, "frequency, network: generate beta alone"] = False
    init_from: Annotated[
        str, "run folder or JSON file whose modulator to start from, or long_tail; '' = the identity"
    ] = ""


@dataclass(frozen=True)
class Meta:
    """The balanced meta set and the outer update (see `hypergrad` and `bilevel`)."""

    images_per_class: Annotated[int, Bounds(1), "meta images of each class"] = 10
    batch_size: Annotated[int, Bounds(1), "over all devices together; at most what the meta set has"] = 100
    every: Annotated[int, Bounds(1), "update the modulator every k-th step"] = 8
    start_epoch: Annotated[int, Bounds(0), "no modulator update before this epoch"] = 0
    lagged: Annotated[bool, "the real step reuses the virtual one"] = True
    virtual: Annotated[Literal["all", "last_stage", "head"], "parameters that move in the virtual step"] = "all"
    bn: Annotated[Literal["fresh", "running", "batch"], "statistics that normalise the meta pass"] = "fresh"
    loss: Annotated[
        Literal["ce", "gce", "cost"], "cross-entropy, generalised (bounded) cross-entropy, or expected eval.costs"
    ] = "ce"
    temperature: Annotated[float, Bounds(1e-3), "divides the logits in the meta loss"] = 1.0
    learning_rate: Annotated[float, Bounds(0), "how far phi moves in a meta-step where meta-gradients agree"] = 0.01
    freeze: Annotated[bool, "keep the modulator as it starts; the meta-step is not paid for"] = False


@dataclass(frozen=True)
class Optim:
    """The classifier's optimizer (see `optim`)."""

    name: Annotated[Literal["sgd", "adamw"], "the optimizer"] = "sgd"
    learning_rate: Annotated[float, Bounds(0), "the largest of the schedule"] = 0.1
    momentum: Annotated[float, Bounds(0, 0.9999), "Nesterov momentum of SGD, b1 of AdamW"] = 0.9
    weight_decay: Annotated[float, Bounds(0), "of SGD added to the gradient, of AdamW decoupled"] = 5e-4
    clip_norm: Annotated[float, Bounds(0), "clip the gradient's global norm to this; 0 = off"] = 0.0
    head_max_norm: Annotated[float, Bounds(0), "longest that a class's weights in the last layer may be; 0 = off"] = 0.0
    head_decay: Annotated[float, Bounds(0), "more weight decay of the last layer, of class k by n_k / n_max"] = 0.0
    sam_rho: Annotated[float, Bounds(0), "SAM: take the gradient this far up the loss; 0 = off"] = 0.0
    sam_below: Annotated[int, Bounds(0), "SAM of classes with fewer training images alone; 0 = of all"] = 0
    sam_focus: Annotated[float, Bounds(0), "SAM of class k by (1 - n_k / N) to this power; 0 = of all alike"] = 0.0
    ema: Annotated[float, Bounds(0, 0.99999), "test the running mean of weights, of this decay a step; 0 = off"] = 0.0
    swa_from: Annotated[float, Bounds(0, 0.99), "test the mean of epochs after this part of the epochs; 0 = off"] = 0.0
    schedule: Annotated[Literal["cosine", "step", "constant"], "of the learning rate after the warm-up"] = "cosine"
    warmup_epochs: Annotated[int, Bounds(0), "epochs of a linear warm-up"] = 0
    restarts: Annotated[str, "epochs, comma-separated, after which the schedule begins anew: of an extended run"] = ""
    reference_batch_size: Annotated[int, Bounds(0), "batch of learning_rate, scaled to train's; 0 = not scaled"] = 0

    @property
    def restart_epochs(self) -> tuple[int, ...]:
        """The numbers in `restarts`."""
        return tuple(map(int, self.restarts.split(","))) if self.restarts else ()


@dataclass(frozen=True)
class Train:
    """The training run."""

    epochs: Annotated[int, Bounds(1), "passes over the training set"] = 200
    batch_size: Annotated[int, Bounds(1), "over all devices together; at most the training images"] = 100
    accumulate: Annotated[int, Bounds(1), "compute a batch in this many parts, one after the other: less memory"] = 1
    seed: Annotated[int, _SEED, "of parameters, order and augmentation"] = 0
    max_steps: Annotated[int, Bounds(0), "stop after this many steps; 0 = after `epochs`"] = 0
    steps_per_call: Annotated[int, Bounds(0), "steps in one compiled call; 0 = 1 on CPU, 10 elsewhere"] = 0
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        "of the computation; auto = bfloat16 on GPU and TPU, float32 on CPU, kept by the run; parameters stay float32",
    ] = "auto"
    on_nonfinite: Annotated[Literal["stop", "skip"], "a non-finite loss or gradient ends the run or is skipped"] = (
        "stop"
    )
    spike_factor: Annotated[float, Bounds(0), "a grad_norm above this times its mean counts as non-finite; 0 = off"] = (
        0.0
    )
    loggers: Annotated[str, MAY_CHANGE, "comma-separated: tensorboard, wandb, mlflow; '' = metrics.jsonl alone"] = (
        "tensorboard"
    )

    @property
    def logger_names(self) -> tuple[str, ...]:
        """The names in `loggers`."""
        return tuple(name.strip() for name in self.loggers.split(",")) if self.loggers else ()


@dataclass(frozen=True)
class Parallel:
    """How a step is spread over several devices (see `parallel`)."""

    batch_norm: Annotated[Literal["sync", "local"], "statistics of the whole batch, or of a device's part"] = "sync"
    fsdp: Annotated[int, Bounds(1), "divide parameters and optimizer state over this many devices; 1 = off"] = 1


@dataclass(frozen=True)
class Eval:
    """Evaluation on the validation split while training, and once, at the end, on the test split."""

    every_epochs: Annotated[int, Bounds(1), "epochs between two evaluations on validation"] = 1
    batch_size: Annotated[int, Bounds(1), MAY_CHANGE, "over all devices together"] = 500
    test: Annotated[bool, "False while choices are being made: tables and pages show validation, test stays unread"] = (
        True
    )
    coverage: Annotated[float, Bounds(0.5, 0.999), "promised coverage of prediction sets, which validation makes"] = 0.9
    costs: Annotated[str, "of a miss of TRUE as NAMED: 'a>b=10, *>a=0.5', others 1; '' = the likeliest is named"] = ""
    recall: Annotated[str, "wanted of classes: 'a=0.95', by thresholds that validation makes; '' = none"] = ""


@dataclass(frozen=True)
class Checkpoint:
    """What is kept of a run."""

    every_epochs: Annotated[int, Bounds(1), "epochs between two checkpoints"] = 1
    keep: Annotated[int, Bounds(1), MAY_CHANGE, "how many of the last; the best on validation is kept beside them"] = 2


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
    given: Own = field(default=Own(), compare=False, repr=False)  # the objects behind fields that name the user's own

    @property
    def forms(self) -> tuple[tuple[str, str], ...]:
        """Pairs of a site and its form in `modulation.sites`, in the order given; `modulation.form` where none is."""
        parts = (part.partition(":") for part in self.modulation.sites.split(","))
        return tuple((site.strip(), form.strip() or self.modulation.form) for site, _, form in parts)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names in `modulation.sites`, in the order given."""
        return tuple(site for site, _ in self.forms)

    @property
    def frozen(self) -> bool:
        """Whether the modulator stays as it starts."""
        return self.meta.freeze or bool(self.method.kept)

    @property
    def modulator_from(self) -> str:
        """Where the modulator comes from that a run starts with; "" for the identity."""
        return self.modulation.init_from or self.method.kept

    @property
    def second_stage(self) -> int:
        """The epoch at which the second stage, or a deferred weighting, begins: at least one epoch before it."""
        return max(round(self.method.first_stage * self.train.epochs), 1)

    @property
    def swa_begins(self) -> int:
        """The epoch after which weights enter an equal mean (`optim.swa_from`)."""
        return max(round(self.optim.swa_from * self.train.epochs), 1)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Returns nested plain dicts, ready for JSON."""
        return {name: dataclasses.asdict(getattr(self, name)) for name in GROUPS}

    def own(self, part: str) -> Any:
        """Returns the user's own `part`, a key of `own.FIELD`; None where the config names a built-in one.

        Raises:
          UserError: there is no such object, or it has to be given from Python.
        """
        group, name = own_lib.FIELD[part].split(".")
        return own_lib.find(part, getattr(getattr(self, group), name), getattr(self.given, part))

    def with_own(self, own: Own) -> "Config":
        """Returns the config with objects from Python; the fields that name such parts then say which they are."""
        parts = {part: value for part, value in vars(own).items() if value is not None}
        config = replace(self, given=replace(self.given, **parts))
        for part, value in parts.items():
            group, name = own_lib.FIELD[part].split(".")
            named = replace(getattr(config, group), **{name: own_lib.path_of(value)})
            config = replace(config, **{group: named})
        return config


GROUPS: dict[str, type[Any]] = {
    group.name: type(group.default) for group in dataclasses.fields(Config) if group.name != "given"
}
FIELDS: dict[str, Field] = {one.path: one for name, cls in GROUPS.items() for one in declared(name, cls).values()}
