"""Mistakes that config, data and devices show only together; they are reported before anything is compiled."""

from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

from mfm_jax.config import VITS, Config
from mfm_jax.data import LongTailData, sizes
from mfm_jax.data.streaming import Streamed
from mfm_jax.errors import UserError
from mfm_jax.evaluation import decisions
from mfm_jax.machine import parallel
from mfm_jax.methods import table
from mfm_jax.methods.table import METHODS, Method, modulating
from mfm_jax.models.own import Adapted, Seen
from mfm_jax.types import PyTree


def check(config: Config, data: LongTailData, mesh: Mesh | None) -> None:
    """Checks that the images and the batches suit `config` and `mesh` (None for one device), and a frozen phi its use.

    Raises:
      UserError: one line with all that is wrong: the field, its value and a way out of each.
    """
    method, devices = METHODS[config.method.name], mesh.size if mesh else 1
    streamed = isinstance(data.train_images, Streamed)
    problems = (
        *_images(config, method, data.train_images.shape[1:], streamed),
        # A run has cut them (`sizes.cut`) before it is built.
        *(f"{what}; choose at most {most}" for _, most, what in sizes.too_large(config, data.manifest)),
        *_devices(config, devices),
        *_parts(config, mesh, streamed, has_meta_step=method.learner is not None),
        *_frozen(config, method),
        *_taught(config, streamed=streamed),
        *_unsettled(config, streamed=streamed),
        *_rare(config, data),
        *_wanted(config, data),
    )
    if problems:
        raise UserError("; ".join(problems))


def warnings(config: Config, data: LongTailData) -> list[str]:
    """Returns what will not be as wanted, though nothing forbids it."""
    return decisions.check(config.eval.costs, config.eval.recall, data.class_names, _validation(data))


def check_own(config: Config, module: Adapted, seen: Seen, mesh: Mesh | None) -> None:
    """Checks that a module of the user's own has what the config asks of it.

    Raises:
      UserError: one line with all that is wrong, as `check`.
    """
    problems = (*_head(config, seen), *_sites(config, seen), *_averages(config, module, seen, mesh))
    if problems:
        raise UserError("; ".join(problems))


def check_start(config: Config, drawn: PyTree, found: PyTree) -> None:
    """Checks that the weights that a run starts from have the head, too; `drawn` are parameters at random.

    Raises:
      UserError: the head of `found` is that of `drawn`, and a field asks for what it learned.
    """
    share, tau = config.model.start_share, config.method.pretraining_tau
    if not (share or tau):
        return
    kernels = [tree["head"]["kernel"] for tree in (drawn, found) if "head" in tree]
    if kernels and np.array_equal(*kernels):
        field, why = f"model.start_share = {share}", "weights at random have no share in what is tested"
        if not share:
            field, why = f"method.pretraining_tau = {tau}", "one at random has learned no prior"
        raise UserError(
            f"{field}: the head starts fresh, and {why}; start from weights with a head of these classes, or leave it"
            " out"
        )


def _head(config: Config, seen: Seen) -> Iterator[str]:
    """What reads or trains the last layer."""
    method, name = METHODS[config.method.name], config.method.name
    reads = "head" in method.needs
    contrasts = {field: getattr(config.method, field) for field in ("proco_weight", "bcl_weight", "sbcl_weight")}
    asking = {
        f"method.name = {name!r}": method.prior_bias or method.retraining or method.posthoc or reads,
        f"the head of {name!r} or its method.base": config.method.head == "own" and table.head(config) == "cosine",
        f"method.head = {config.method.head!r}": config.method.head != "own",
        **{f"method.{field} = {value}": value for field, value in contrasts.items()},
        f"the projection of {config.method.trained!r}": config.method.mixed_views,
        "model.tune = 'head'": config.model.tune == "head",
        "meta.virtual = 'head'": method.learner and config.meta.virtual == "head",
        f"optim.head_max_norm = {config.optim.head_max_norm}": config.optim.head_max_norm,
        f"optim.head_decay = {config.optim.head_decay}": config.optim.head_decay,
    }
    for field in (field for field, asks in asking.items() if asks and not seen.has_head):
        yield f"{field}: needs the last layer; call your module's last nn.Dense `head`, with a bias, or choose another"


def _sites(config: Config, seen: Seen) -> Iterator[str]:
    """Where features are modulated or read."""
    method, objective, name = METHODS[config.method.name], table.objective(config), config.method.name
    needed = [*(config.sites if method.modulates else ()), *(one for one in method.needs if one != "head")]
    synthetic = bool(method.retraining and method.retraining.synthetic)
    needed += ["pooled"] * bool(
        synthetic or table.head(config) != "linear" or objective.later or config.method.projects
    )
    for site in (site for site in dict.fromkeys(needed) if site not in seen.sites):
        yield (
            f"method.name = {name!r}: needs the site {site!r}, and your module calls {', '.join(seen.sites) or 'none'};"
            f" add x = modulate({site!r}, x) to its __call__(self, x, modulate=mfm_jax.no_modulation)"
        )


def _averages(config: Config, module: Adapted, seen: Seen, mesh: Mesh | None) -> Iterator[str]:
    """Batch norm over several devices."""
    if mesh is None or not seen.has_averages:
        return
    if config.parallel.batch_norm == "sync" and not module.averages_over_devices:
        yield (
            "parallel.batch_norm = 'sync': your module has batch norm and no field `axis_name` to average over devices"
            " by; add it, or set 'local'"
        )
    sizes = {"train.batch_size": config.train.batch_size}
    if config.meta.bn == "batch" and METHODS[config.method.name].learner:
        sizes["meta.batch_size"] = config.meta.batch_size
    for field, size in sizes.items():
        if size % mesh.size and "weight" not in module.takes:
            yield (
                f"{field} = {size}: does not divide by {mesh.size} devices, and your module has batch norm and takes no"
                f" `weight` of padded examples; choose a multiple of {mesh.size}"
            )


def _frozen(config: Config, method: Method) -> Iterator[str]:
    if not (config.frozen and method.learner):
        return
    if not method.modulates:
        name = config.method.name
        yield f"meta.freeze = True: {name} would learn nothing from the meta set; only {modulating()} can"
    elif not config.modulator_from:
        yield "meta.freeze = True: would keep a modulator that does nothing; set modulation.init_from"


def _taught(config: Config, *, streamed: bool) -> Iterator[str]:
    """A meta learner that says what a teacher counts, without one or without its typical predictions."""
    name = config.method.name
    if config.method.taught and not config.method.teacher:
        yield f"method.teacher: missing; {name} needs a run folder whose classifier is the teacher"
    if config.method.taught and streamed:
        yield f"method.name = {name!r}: needs all images at once; raise data.resident_mb, or set a fixed method.distill"


def _unsettled(config: Config, *, streamed: bool) -> Iterator[str]:
    """Averages of weights whose batch statistics nothing would take."""
    for field, value in (("optim.swa_from", config.optim.swa_from), ("model.start_share", config.model.start_share)):
        if value and streamed and config.model.name not in VITS:
            yield (
                f"{field} = {value}: batch statistics of the tested weights need all images at once; raise"
                " data.resident_mb, or leave it out"
            )


def _rare(config: Config, data: LongTailData) -> Iterator[str]:
    """A bound of images that leaves no class, or all of them."""
    below, least, most = config.optim.sam_below, int(data.counts.min()), int(data.counts.max())
    if below and not least < below <= most:
        yield (
            f"optim.sam_below = {below}: the classes have {least} to {most} training images; choose from {least + 1} to"
            f" {most}, or 0 for all classes"
        )


def _wanted(config: Config, data: LongTailData) -> Iterator[str]:
    """Costs and recalls of classes that are not there, and recalls of classes without validation images."""
    try:
        warnings(config, data)
    except UserError as error:
        yield str(error)


def _validation(data: LongTailData) -> np.ndarray:
    return np.bincount(data.val_labels, minlength=data.num_classes)


def _images(config: Config, method: Method, shape: tuple[int, ...], streamed: bool) -> Iterator[str]:
    """Images of another size or kind than what is done to them takes; `shape` is `[H, W, C]`."""
    augment, side, channels = config.augment, min(shape[:2]), shape[2]
    lengths = {"pad": augment.pad if augment.crop == "shift" else 0, "cutout": augment.cutout}
    for field in (field for field, length in lengths.items() if length >= side):
        yield f"augment.{field} = {lengths[field]}: images are {side} pixels wide; choose at most {side - 1}"
    if augment.policy != "none" and channels not in (1, 3):
        yield f"augment.policy = {augment.policy!r}: takes 1 or 3 channels, and the images have {channels}; use 'none'"
    if streamed and augment.partners == "balanced":
        yield "augment.partners = 'balanced': needs all images at once; raise data.resident_mb, or use 'batch'"
    if streamed and method.retraining and method.retraining.synthetic:
        yield f"method.name = {config.method.name!r}: needs all images at once; raise data.resident_mb"


def _devices(config: Config, devices: int) -> Iterator[str]:
    """Batches that cannot be padded: a device with no examples has no statistics of its own."""
    sizes = {"train.batch_size": config.train.batch_size}
    if config.meta.bn == "batch":
        sizes["meta.batch_size"] = config.meta.batch_size
    for field, size in sizes.items():
        if config.parallel.batch_norm == "local" and size % devices:
            yield (
                f"parallel.batch_norm = 'local': {field} = {size} does not divide by {devices} devices; use a multiple"
                f" of {devices}, or parallel.batch_norm = 'sync', which pads"
            )


def _parts(config: Config, mesh: Mesh | None, streamed: bool, *, has_meta_step: bool) -> Iterator[str]:
    """Batches that do not divide into `train.accumulate` parts on every device, or are streamed and unequal."""
    parts = config.train.accumulate
    # Batches are padded for all devices; blanks in one part alone would spoil its batch statistics.
    devices = 1 if mesh is None else mesh.size if parts > 1 else mesh.shape[parallel.AXIS]
    unit = parts * devices
    for field, size in (("train.batch_size", config.train.batch_size), ("meta.batch_size", config.meta.batch_size)):
        if (parts > 1 or streamed) and size % unit and (has_meta_step or field == "train.batch_size"):
            yield (
                f"{field} = {size}: does not divide by {unit}, the devices times train.accumulate = {parts}; choose a"
                f" multiple of {unit}, no larger than the data allows"
            )
