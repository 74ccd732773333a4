"""Values that are possible alone but not together. A rule yields its message, which names a field and a way out."""

import itertools
import re
from collections.abc import Iterator
from typing import get_args

from mfm_jax.config import wanted
from mfm_jax.config.groups import FORMS, LOGGERS, VITS, Config, Data, OtherSmall
from mfm_jax.fields import names_own


def problems(config: Config) -> Iterator[str]:
    """Yields a line for every rule that `config` breaks."""
    yield from _modulation(config)
    yield from _head(config)
    yield from _own_method(config)
    yield from _own_module(config)
    yield from _tuned(config)
    yield from _scanned(config)
    yield from _start_prior(config)
    yield from _per_batch(config)
    yield from _mixed_views(config)
    if config.method.taught and config.method.distill in (0, 1):
        learns = f"{config.method.name} learns the share, and could not leave that one"
        yield f"method.distill = {config.method.distill}: {learns}; choose one between 0 and 1"
    yield from _unread(config.data)
    yield from _pretext(config)
    yield from _noise(config.data)
    if config.augment.crop == "resized" and config.data.source not in ("folder", "list"):
        yield (
            f"augment.crop = 'resized': needs whole pictures, which only data.source = 'folder' or 'list' has, not"
            f" {config.data.source!r}; use 'shift'"
        )
    mixes = config.augment.mixup or config.augment.cutmix or config.method.mixed_views
    if config.augment.partners != "batch" and not mixes:
        yield (
            f"augment.partners = {config.augment.partners!r}: not read without partners; set augment.mixup or"
            " augment.cutmix, or leave it out"
        )
    if 0 < config.train.spike_factor <= 1:
        yield f"train.spike_factor = {config.train.spike_factor}: allowed: more than 1, or 0 for none"
    yield from _stages(config)
    yield from _averages(config)
    yield from _lengths(config)
    yield from _sharpness(config)
    yield from _restarts(config)
    yield from _wanted(config)
    names = config.train.logger_names
    if not set(names) <= set(LOGGERS) or len(set(names)) != len(names):
        yield f"train.loggers = {config.train.loggers!r}: expected some of {', '.join(LOGGERS)}, comma-separated"
    if config.model.pretrained and config.model.name in get_args(OtherSmall):
        yield (
            f"model.pretrained = {config.model.pretrained!r}: no files are read for model.name = {config.model.name!r};"
            " leave it out, or start from a run by model.init_from"
        )
    if config.model.pretrained and config.model.init_from:
        yield (
            f"model.init_from = {config.model.init_from!r}: so does model.pretrained = {config.model.pretrained!r} set"
            " the initial weights; leave one of them out"
        )
    if not config.eval.test and not config.data.validates:
        yield (
            "eval.test = False: there is nothing else to show; choose data.val_images_per_class, or under protocol"
            " natural data.val_fraction, above 0"
        )
    begins = {"optim.warmup_epochs": config.optim.warmup_epochs, "meta.start_epoch": config.meta.start_epoch}
    for name, epochs in begins.items():
        if epochs >= config.train.epochs:
            yield f"{name} = {epochs}: allowed: less than train.epochs = {config.train.epochs}"


def _modulation(config: Config) -> Iterator[str]:
    modulation, sites, forms = config.modulation, config.sites, {form for _, form in config.forms}
    field = f"modulation.sites = {modulation.sites!r}"
    if "" in sites or len(set(sites)) != len(sites):
        yield f"{field}: expected distinct, comma-separated site names, SITE or SITE:FORM"
    if unknown := forms.difference(FORMS):
        yield f"{field}: no form {min(unknown)!r}; allowed: {', '.join(FORMS)}"
    if modulation.per_class and "direct" not in forms:
        yield f"modulation.per_class = True: only the form 'direct' has one row a class, not {min(forms)!r}"
    if modulation.per_class and ("logits", "direct") in config.forms:
        yield (
            "modulation.per_class = True: at site 'logits' a row looked up by the label gives the label away;"
            " choose other modulation.sites"
        )
    if modulation.shift_only and "direct" in forms:
        yield (
            "modulation.shift_only = True: modulation.form = 'direct' cannot leave the scale out; use 'frequency' or"
            " 'network'"
        )
    if modulation.use_count and "network" not in forms:
        yield f"modulation.use_count = True: only the form 'network' joins the count to its input, not {min(forms)!r}"


def _head(config: Config) -> Iterator[str]:
    """A last layer that the method sets or trains in another way, or that has nothing to train."""
    head, name = config.method.head, config.method.name
    if head == "own":
        return
    if config.method.linear:
        yield f"method.head = {head!r}: {name} sets or trains a linear one; leave it out, or choose another method"
    if head == "simplex" and (weight := config.method.bcl_weight):
        yield (
            f"method.bcl_weight = {weight}: contrasts with the weights of the last layer, and method.head = 'simplex'"
            " does not read them; choose another of the two"
        )
    if head == "simplex" and config.model.tune == "head":
        yield "model.tune = 'head': with method.head = 'simplex' nothing of it is trained; choose another of the two"
    if head == "simplex" and config.method.meta_learned and config.meta.virtual == "head":
        yield "meta.virtual = 'head': with method.head = 'simplex' nothing of it moves; choose another of the two"


def _tuned(config: Config) -> Iterator[str]:
    """Parts of a ViT to train in another network, and a head of text features where there is none to take them."""
    model = config.model
    if model.tune in ("adapters", "lora") and model.name not in VITS:
        yield (
            f"model.tune = {model.tune!r}: only the model.name {', '.join(VITS)} can, not {model.name!r}; choose 'head'"
            " or 'all'"
        )
    if model.tune == "head" and config.method.unlabelled:
        first = f"the first stage of {config.method.name}"
        yield f"model.tune = 'head': {first} trains what is below the head; choose another of the two"
    if not model.text_features:
        return
    field = f"model.text_features = {model.text_features!r}"
    if not (model.pretrained or model.init_from):
        yield f"{field}: features of images at random have no meaning; set model.pretrained or model.init_from"
    if not config.method.cosine or config.method.head == "simplex":
        yield f"{field}: are compared by their cosines; set method.head = 'cosine', and method.ldam_scale to CLIP's 100"


def _start_prior(config: Config) -> Iterator[str]:
    """A prior of the first classifier where there is none, where it is of no use, or where labels are no classes."""
    field = f"method.pretraining_tau = {config.method.pretraining_tau}"
    if not config.method.pretraining_tau:
        return
    if not (config.model.pretrained or config.model.init_from):
        yield f"{field}: a head at random has learned no prior; start from model.pretrained or model.init_from"
    if config.method.retrains:
        yield f"{field}: the second stage of {config.method.name} trains another head; choose another method.name"
    if config.data.pretext != "none":
        yield f"{field}: data.pretext = {config.data.pretext!r} has labels that are no classes; leave one of them out"


def _scanned(config: Config) -> Iterator[str]:
    """Scanned blocks where there are none that are equal, or where one of them is wanted by itself."""
    if not config.model.scan_blocks:
        return
    name, fsdp, off = config.model.name, config.parallel.fsdp, "or leave model.scan_blocks out"
    if name in ("efficientnet_b0", "densenet_bc100"):
        yield f"model.scan_blocks = True: {name} is not made of equal blocks; choose a ResNet or ViT, {off}"
    if name in ("resnet8", "resnet10"):
        yield f"model.scan_blocks = True: the stages of {name} have no equal blocks; choose a deeper network, {off}"
    if fsdp > 1:
        yield f"parallel.fsdp = {fsdp}: would divide stacked blocks otherwise than they are kept; set 1, {off}"
    if name not in VITS:
        return
    if inner := [site for site in config.sites if re.fullmatch("block([1-9]|1[01])", site)]:
        sites = config.modulation.sites
        yield f"modulation.sites = {sites!r}: {inner[0]} is inside of scanned blocks; choose others, {off}"
    if config.meta.virtual == "last_stage":
        yield f"meta.virtual = 'last_stage': is one of the scanned blocks; choose 'all' or 'head', {off}"


def _per_batch(config: Config) -> Iterator[str]:
    if config.method.per_batch and config.meta.lagged:
        yield (
            f"meta.lagged = True: {config.method.name}'s weights belong to one batch, so the next step cannot use them;"
            " set meta.lagged = False"
        )
    if config.method.per_batch and config.optim.clip_norm:
        yield (
            f"optim.clip_norm = {config.optim.clip_norm}: {config.method.name}'s virtual step starts from a gradient of"
            " zero, where clipping has no derivative; set it to 0"
        )


def _mixed_views(config: Config) -> Iterator[str]:
    """What does not go with a method that mixes images for itself, and with one that compares single images."""
    if config.method.pairs:
        field = "bcl_weight" if config.method.bcl_weight else "sbcl_weight"
        mixing = [f"augment.{one} = {value}" for one in ("mixup", "cutmix") if (value := getattr(config.augment, one))]
        mixing += [f"the mixtures of {config.method.trained}"] * config.method.mixed_views
        for mixed in mixing:
            yield (
                f"method.{field} = {getattr(config.method, field)}: contrasts images of one class each, not {mixed};"
                " leave one of them out"
            )
    if not config.method.agrees:
        return
    why = "mixes images for itself, by method.mixing" if config.method.mixed_views else "compares views of one image"
    for field in ("mixup", "cutmix"):
        if value := getattr(config.augment, field):
            yield f"augment.{field} = {value}: {config.method.trained} {why}; set the field to 0"


def _own_method(config: Config) -> Iterator[str]:
    """A loss or meta learner of the user's own that is not named, or that nothing reads."""
    method = config.method
    reading = {"method.name": method.name} | ({"method.base": method.base} if method.meta_learned else {})
    for part, way_in in (("loss", "method.name, or method.base under a meta learner,"), ("learner", "method.name")):
        name, value = f"own_{part}", getattr(method, part)
        if value and name not in reading.values():
            now = " and ".join(f"{path} = {which!r}" for path, which in reading.items())
            yield f"method.{part} = {value!r}: not read with {now}; set {way_in} to {name!r}"
        for path, which in reading.items():
            if which == name and not value:
                yield f"method.{part}: missing; {path} = {name!r} needs its import path, package.module:name"


def _own_module(config: Config) -> Iterator[str]:
    """What only the built-in models have."""
    model = config.model
    if not names_own(model.name):
        return
    for field in ("width", "pretrained", "scan_blocks"):
        if value := getattr(model, field):
            yield f"model.{field} = {value!r}: not read with model.name = {model.name!r}, your own; leave it out"
    if config.meta.virtual == "last_stage":
        yield (
            f"meta.virtual = 'last_stage': not known of model.name = {model.name!r}, your own; choose 'all', or 'head'"
            " for a module with a layer of that name"
        )


def _pretext(config: Config) -> Iterator[str]:
    """A first stage whose labels are not the classes."""
    if config.data.pretext != "none" and config.method.name != "ce":
        yield (
            f"data.pretext = {config.data.pretext!r}: its labels have no long tail, and method.name ="
            f" {config.method.name!r} acts on one; set method.name = 'ce'"
        )


def _noise(data: Data) -> Iterator[str]:
    """Wrong labels where the labels are not the classes."""
    if data.label_noise and data.pretext != "none":
        yield f"data.label_noise = {data.label_noise:g}: data.pretext = {data.pretext!r} reads no class; set it to 0"


def _unread(data: Data) -> Iterator[str]:
    for name in ("train_list", "val_list", "meta_list", "test_list", "group"):
        sources = ("folder", "list") if name == "group" else ("list",)
        if (value := getattr(data, name)) and data.source not in sources:
            only = " or ".join(map(repr, sources))
            yield f"data.{name} = {value!r}: not read with data.source = {data.source!r}; only with {only}"
    held_out, natural = ("val_images_per_class", "data.val_fraction"), ("meta_fraction", "meta.images_per_class")
    unread, instead = held_out if data.protocol == "natural" else natural
    if value := getattr(data, unread):
        yield (
            f"data.{unread} = {value}: not read under data.protocol = {data.protocol!r}; choose another protocol, or"
            f" {instead}"
        )


def _stages(config: Config) -> Iterator[str]:
    method, epochs, second = config.method, config.train.epochs, config.second_stage
    if (method.staged or method.deferred) and second >= epochs:
        yield (
            f"method.first_stage = {method.first_stage}: leaves {method.name} no epoch of train.epochs = {epochs} for"
            " its second stage; choose a smaller part or more epochs"
        )
    if method.staged and config.optim.warmup_epochs >= second:
        yield (
            f"optim.warmup_epochs = {config.optim.warmup_epochs}: allowed: less than the {second} epochs of"
            f" {method.name}'s first stage"
        )


def _averages(config: Config) -> Iterator[str]:
    """Weights that are tested in the place of those that are trained."""
    fields = {"optim.ema": config.optim.ema, "optim.swa_from": config.optim.swa_from}
    fields["model.start_share"] = config.model.start_share
    asked = [f"{field} = {value}" for field, value in fields.items() if value]
    if len(asked) > 1:
        yield f"{asked[0]}: so does {asked[1]} say what is tested; leave one of them out"
    if config.model.start_share and not (config.model.pretrained or config.model.init_from):
        yield (
            f"model.start_share = {config.model.start_share}: weights at random have no share in what is tested; set"
            " model.pretrained or model.init_from, or leave it out"
        )
    epochs = config.second_stage if config.method.retrains else config.train.epochs
    if config.optim.swa_from and config.swa_begins >= epochs:
        yield (
            f"optim.swa_from = {config.optim.swa_from}: begins after epoch {config.swa_begins}, and the classifier is"
            f" trained for {epochs}; choose a smaller part or more epochs"
        )


def _lengths(config: Config) -> Iterator[str]:
    """Bounds of the last layer's weights where they have no length."""
    for name in ("head_max_norm", "head_decay"):
        if (value := getattr(config.optim, name)) and config.method.cosine:
            yield (
                f"optim.{name} = {value}: the last layer of {config.method.trained} compares directions, so that the"
                " length of its weights says nothing; leave it out, or choose another method.name, method.base or"
                " method.head"
            )


def _sharpness(config: Config) -> Iterator[str]:
    optim = config.optim
    of_classes = {"optim.sam_below": optim.sam_below, "optim.sam_focus": optim.sam_focus}
    asked = [f"{field} = {value}" for field, value in of_classes.items() if value]
    if asked and not optim.sam_rho:
        yield f"{asked[0]}: not read without optim.sam_rho; set that, or leave it out"
    if len(asked) > 1:
        yield f"{asked[0]}: so does {asked[1]} say which classes; leave one of them out"
    if asked and config.method.of_batch:
        yield f"{asked[0]}: a loss of the whole batch, as {config.method.trained} has here, is no class's; leave it out"
    if optim.sam_rho and config.method.per_batch:
        yield (
            f"optim.sam_rho = {optim.sam_rho}: {config.method.name}'s virtual step starts from a gradient of zero,"
            " which has no way up; set it to 0"
        )


def _restarts(config: Config) -> Iterator[str]:
    text, first, last = config.optim.restarts, config.optim.warmup_epochs, config.train.epochs
    if not re.fullmatch(r"([0-9]{1,9}(, *[0-9]{1,9})*)?", text):
        yield f"optim.restarts = {text!r}: expected epochs, comma-separated, e.g. '60,90'"
    elif text and any(a >= b for a, b in itertools.pairwise((first, *config.optim.restart_epochs, last))):
        yield (
            f"optim.restarts = {text!r}: expected rising numbers above optim.warmup_epochs = {first} and below"
            f" train.epochs = {last}"
        )
    elif text and config.method.planned:
        yield f"optim.restarts = {text!r}: {config.method.name} has one plan for all of train.epochs; leave it empty"
    elif text and config.optim.swa_from:
        yield f"optim.restarts = {text!r}: optim.swa_from is a part of all of train.epochs; leave one of them out"


def _wanted(config: Config) -> Iterator[str]:
    """Costs and recalls that are no such, that nothing can be made of, or that are not there."""
    costs, recall = config.eval.costs, config.eval.recall
    yield from wanted.problems(costs, recall)
    priced = {"method.cost_share": config.method.cost_share, "meta.loss": config.meta.loss == "cost" and "cost"}
    for field in (field for field, value in priced.items() if value and not costs.strip()):
        yield f"{field} = {priced[field]!r}: no costs are known; set eval.costs, or leave it out"
    if recall.strip() and not config.data.validates:
        yield (
            f"eval.recall = {recall!r}: thresholds are made of validation images; choose data.val_images_per_class, or"
            " under protocol natural data.val_fraction, above 0"
        )
