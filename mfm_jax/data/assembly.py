"""From a config to the arrays of a run: load a source, split it, prove the split sound.

`build` is the only door. What it returns is plain NumPy in memory (`batches` says which of it is in which
batch), together with the manifest that says which record every image was.

Everything that only the data can say, such as how many images a class holds, is checked here and before
anything is compiled.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mfm_jax.config import Config
from mfm_jax.data import arrays, digits, files, longtail, noise, own, pretext, tfds
from mfm_jax.data.longtail import Labelled, Split
from mfm_jax.data.manifest import Records, check_leakage, make_manifest, read_manifest, redrawn
from mfm_jax.data.sources import Images, Labels, Source, streamed_if_large
from mfm_jax.data.streaming import Streamed
from mfm_jax.errors import UserError

# Mean and standard deviation, in units of 0..255: by data set, those of the CIFAR long-tail literature; by
# `data.normalize`, those that published weights were trained with.
_CIFAR = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
_OF_SET = {"cifar10": _CIFAR, "cifar100": _CIFAR}
_NORMALIZATION = {
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "half": ((127.5,) * 3, (127.5,) * 3),
    "clip": ((122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305)),
    # pytorch-cifar's, which LDAM-DRW's code has too; the deviation is that within a picture, averaged.
    "pytorch_cifar": ((125.307, 122.961, 113.8575), (51.5865, 50.847, 51.255)),
}
_SAMPLE = 1_000  # streamed images that mean and standard deviation are taken from; of others, so many at a time


@dataclass(frozen=True, eq=False)
class LongTailData:
    """All data of a run. Images are uint8 [N, H, W, C], in memory or decoded when needed; labels int32 [N]."""

    name: str
    version: str
    class_names: tuple[str, ...]
    train_images: Images  # with `data.train_on_meta`, the meta images too
    train_labels: Labels
    true_labels: Labels  # of the training images; without `data.label_noise`, `train_labels`
    meta_images: Images  # what `meta_table` indexes: the held-out meta set, or `train_images`
    meta_labels: Labels
    val_images: Images  # balanced, or as long-tailed as the data under `natural`; may be empty
    val_labels: Labels
    test_images: Images
    test_labels: Labels
    counts: npt.NDArray[np.int64]  # [K], images of each class in `train_labels`
    mean: npt.NDArray[np.float32]  # [C], in units of 0..255
    std: npt.NDArray[np.float32]  # [C]
    manifest: dict[str, Any]  # see `make_manifest`

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def wrong_images(self) -> Images:
        """The M training images whose label `data.label_noise` has changed."""
        return self.train_images[np.flatnonzero(self.train_labels != self.true_labels)]

    @property
    def wrong_labels(self) -> Labels:
        """The labels that these have in training, [M]."""
        return self.train_labels[self.train_labels != self.true_labels]

    def shown(self, *, test: bool) -> str:
        """Returns the split that a run's tables and pages show; `test` is `eval.test`.

        It is `test`, or else `val`; of data that has neither, `train`, without augmentation: what was learned by heart.
        """
        return "test" if test else "val" if len(self.val_labels) else "train"

    def meta_table(self, epoch: int) -> npt.NDArray[np.int32]:
        """Returns the positions in `meta_images` of each class's meta images, int32 [K, m].

        Drawn for each epoch, with `m` the smaller of `meta.images_per_class` and the smallest class, also from a meta
        set that the data brings; a held-out one of just so many images is the same in every epoch.
        """
        per_class, seed = self.manifest["meta_images_per_class"], self.manifest["seed"]
        table = longtail.redraw_meta(self.meta_labels, self.num_classes, per_class, seed, epoch)
        return table.astype(np.int32)


def build(config: Config) -> LongTailData:
    """Loads and splits the data of a run.

    The split is drawn from `data.seed`, or taken from the manifest that `data.manifest` names, or from that of a packed
    benchmark where the protocol is its own. Methods that use no meta set get the same split: the meta images are set
    aside for them too, unless `data.train_on_meta` adds them to the training set.

    Raises:
      UserError: one line that names the field, the value and what is allowed.
    """
    source = _load(config)
    split, in_training, manifest = divided(config, source)
    if config.data.pretext == "rotation":
        source = pretext.turned(source)
    images, labels = source.train_images, noise.observed(source.train_ids, source.train_labels, manifest)
    train_images, train_labels = images[in_training], labels[in_training]
    mean, std = mean_std(config, source.name, train_images if split.redrawn else images[split.train])
    return LongTailData(
        name=source.name,
        version=source.version,
        class_names=source.class_names,
        train_images=train_images,
        train_labels=train_labels,
        true_labels=source.train_labels[in_training],
        meta_images=train_images if split.redrawn else images[split.meta],
        meta_labels=train_labels if split.redrawn else labels[split.meta],
        val_images=images[split.val],
        val_labels=labels[split.val],
        test_images=source.test_images,
        test_labels=source.test_labels,
        counts=np.bincount(train_labels, minlength=len(source.class_names)).astype(np.int64),
        mean=mean,
        std=std,
        manifest=manifest,
    )


def divided(config: Config, source: Source) -> tuple[Split, longtail.Ints, dict[str, Any]]:
    """Returns the split of a source, the positions of all that is trained on, and the manifest.

    Raises:
      UserError: as `build`.
    """
    if len(source.class_names) < 2:
        raise UserError(f"data: {source.name} has only one class, {source.class_names[0]!r}")
    split = _split(config, source)
    if config.data.pretext == "rotation":
        source = pretext.relabelled(source)
    in_training = split.train
    if config.data.train_on_meta:
        in_training = np.union1d(split.train, split.meta)
    manifest = _manifest(config, source, split, in_training, _noise(config, source, split))
    check_leakage(manifest)
    if config.eval.test and not len(source.test_labels):
        own = f"data.test_fraction = {config.data.test_fraction:g}: leaves no image to test on; choose more"
        none = f"data: {source.name} has no test split; give it one"
        way_out = ", or set eval.test = False"
        raise UserError((own if config.data.source in ("folder", "list") else none) + way_out)
    if not config.eval.test and not len(split.val) and len(source.test_labels):
        raise UserError(
            "eval.test = False, as in tuning: there is no validation split to read instead; the data brings none, and"
            f" data.val_fraction = {config.data.val_fraction:g} makes none; choose more"
        )
    return split, in_training, manifest


def _load(config: Config) -> Source:
    if config.data.source in ("folder", "list"):
        return files.load(config.data, whole=config.augment.crop == "resized")
    if (part := config.own("source")) is not None:
        return streamed_if_large(config.data, own.load(part, config.data))
    load = {"digits": digits.load, "tfds": tfds.load, "npz": arrays.load}[config.data.source]
    return streamed_if_large(config.data, load(config.data))


def _settings(config: Config) -> dict[str, Any]:
    """Returns what decides which images are in which split, by the name it has in a manifest."""
    natural = config.data.protocol == "natural"
    held_out = ("val_fraction", "meta_fraction") if natural else ("val_images_per_class",)
    return {
        "protocol": config.data.protocol,
        "imbalance_factor": config.data.imbalance_factor,
        "meta_images_per_class": config.meta.images_per_class,
        **{name: getattr(config.data, name) for name in held_out},
        "seed": config.data.seed,
    }


def _draw_split(config: Config, source: Source) -> Split:
    labels, settings = source.train_labels, _settings(config)
    given = np.full(len(labels), "train") if source.given is None else source.given
    if settings.pop("protocol") == "natural":
        groups = source.groups or ("",) * len(labels)
        return longtail.natural_split(Labelled(labels, source.class_names, given, groups), **settings)
    if (given != "train").any() or source.groups:
        raise UserError(
            f"data.protocol = {config.data.protocol!r}: draws from all images alike, and {source.name} has splits,"
            " groups or copies of one picture (see --mode=check); set data.protocol = 'natural', or remove the copies"
        )
    return longtail.make_split(labels, len(source.class_names), protocol=config.data.protocol, **settings)


def _split(config: Config, source: Source) -> Split:
    packed = source.manifest
    if config.data.manifest:
        return _read_split(config, source, read_manifest(config.data.manifest))
    if packed and packed["protocol"] == config.data.protocol:
        return _read_split(config, source, packed)
    return _draw_split(config, source)


def _noise(config: Config, source: Source, split: Split) -> dict[str, Any]:
    """Returns what a manifest says of wrong labels; nothing where there are none.

    Raises:
      UserError: the meta set would have wrong labels, too, or images are streamed that have to be compared.
    """
    share, kind, where = config.data.label_noise, config.data.noise_kind, split.train
    if not share:
        return {}
    field, confused = f"data.label_noise = {share:g}", None
    if split.redrawn:
        raise UserError(
            f"{field}: the meta set is redrawn from the training images, whose labels are wrong; hold it out, by"
            " data.protocol = 'meta_held_out' or data.meta_fraction"
        )
    settings = {"label_noise": share, "noise_kind": kind}
    if config.data.manifest:
        return settings | {"noise": read_manifest(config.data.manifest)["noise"]}
    images, labels, num_classes = source.train_images, source.train_labels[where], len(source.class_names)
    if kind == "confusion":
        if isinstance(images, Streamed):
            raise UserError(
                "data.noise_kind = 'confusion': compares all images at once; raise data.resident_mb, or use 'symmetric'"
            )
        confused = noise.nearest(images[where], labels, num_classes)
    found = noise.changed(labels, num_classes, share, kind, config.data.seed, confused)
    wrong = found != labels
    return settings | {"noise": {"ids": source.train_ids[where[wrong]].tolist(), "labels": found[wrong].tolist()}}


def _read_split(config: Config, source: Source, manifest: dict[str, Any]) -> Split:
    """Returns the split that the manifest records, as positions in the source."""
    _check_agrees(config, source, manifest)
    check_leakage(manifest)
    where, labels = {}, noise.observed(source.train_ids, source.train_labels, manifest)
    field = f"data.manifest = {config.data.manifest!r}"
    for name in ("train", "meta", "val"):
        records = manifest["splits"][name]
        ids = np.array(records["ids"], np.int64)
        if records["pool"] != source.train_pool or not np.isin(ids, source.train_ids).all():
            pool = f"pool '{records['pool']}' that {source.name} does not have"
            raise UserError(f"{field}: {name} names records of {pool}; use a manifest of this set")
        position = np.searchsorted(source.train_ids, ids)
        counts = np.bincount(labels[position], minlength=len(source.class_names))
        if counts.tolist() != records["class_counts"]:
            raise UserError(
                f"{field}: the records of {name} have other classes in this copy of {source.name}; it was prepared in"
                " another order than the manifest's"
            )
        where[name] = np.sort(position)
    if manifest["train_on_meta"] and not redrawn(manifest):
        where["train"] = np.setdiff1d(where["train"], where["meta"])
    return Split(train=where["train"], meta=where["meta"], val=where["val"], redrawn=redrawn(manifest))


def _check_agrees(config: Config, source: Source, manifest: dict[str, Any]) -> None:
    """Refuses a manifest of another set, another test split or other settings than the config's."""
    renamed = config.data.source in ("folder", "list")  # may have been given another name; the version names them
    of_source = {
        **({} if renamed else {"dataset": source.name}),
        "version": source.version,
        "class_names": list(source.class_names),
    }
    field = f"data.manifest = {config.data.manifest!r}"
    for key, value in of_source.items():
        if (began := manifest[key]) != value:
            raise UserError(f"{field}: made for {key} {began!r}, the data has {value!r}; use a manifest of this set")
    test = manifest["splits"]["test"]
    if (test["pool"], test["ids"]) != (source.test_pool, source.test_ids.tolist()):
        raise UserError(f"{field}: its test split differs from {source.name}'s")
    noisy = {"noise_kind": config.data.noise_kind} if config.data.label_noise else {}
    for key, value in {**_settings(config), "label_noise": config.data.label_noise, **noisy}.items():
        if manifest.get(key, 0) != value:
            path = "meta.images_per_class" if key == "meta_images_per_class" else f"data.{key}"
            where = config.data.manifest or f"in {config.data.root}"
            otherwise = ", or leave data.manifest empty" if config.data.manifest else ""
            raise UserError(
                f"{path} = {value!r}: the manifest {where} was made with {manifest.get(key, 0)!r};"
                f" set the field to that{otherwise}"
            )


def _manifest(
    config: Config, source: Source, split: Split, in_training: longtail.Ints, noisy: dict[str, Any]
) -> dict[str, Any]:
    why = "data.train_on_meta: the meta images are trained on as well" if config.data.train_on_meta else ""
    if split.redrawn:
        why = f"protocol {config.data.protocol}: redrawn from train every epoch; the ids are epoch 0's"
    parts = {"train": in_training, "meta": split.meta, "val": split.val}
    labels = noise.observed(source.train_ids, source.train_labels, noisy)
    records = {
        name: Records(source.train_pool, source.train_ids[position], labels[position])
        for name, position in parts.items()
    }
    return make_manifest(
        dataset=source.name,
        version=source.version,
        class_names=source.class_names,
        settings={
            **_settings(config),
            "train_on_meta": config.data.train_on_meta,
            **({"meta_redrawn": split.redrawn} if config.data.protocol == "natural" else {}),
            **noisy,
            **source.facts,
        },
        splits={**records, "test": Records(source.test_pool, source.test_ids, source.test_labels)},
        overlaps={("meta", "train"): why} if why else {},
    )


def mean_std(config: Config, name: str, images: Images) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Returns each channel's mean and standard deviation, float32 [C], in units of 0..255.

    With `data.normalize = "own"`, CIFAR's are the published ones, in an `.npz` file of its name too. Others come from
    the long-tailed training `images` alone, exactly, through the 256 values a pixel can have, or, where streamed,
    from some of them; a constant channel gets the standard deviation 1.
    """
    published = _NORMALIZATION.get(config.data.normalize)
    if config.data.normalize == "own" and config.data.source in ("tfds", "npz"):  # a folder may have any name
        published = _OF_SET.get(name)
    if published:
        channels = images.shape[-1]
        mean, std = (np.array(values, np.float32) for values in published)
        return (mean, std) if channels == len(mean) else (mean.mean(keepdims=True), std.mean(keepdims=True))
    if isinstance(images, Streamed):
        some = np.random.default_rng(0).permutation(len(images))[:_SAMPLE]
        images = np.stack([images[i] for i in np.sort(some)])
    values = np.arange(256)
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, len(images), _SAMPLE):  # at a time; counting makes each pixel eight bytes
        part = images[start : start + _SAMPLE]
        counts += np.stack([np.bincount(part[..., c].ravel(), minlength=256) for c in range(len(counts))])
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ values
    std = np.sqrt(share @ values**2 - mean**2)
    return mean.astype(np.float32), np.where(std < 1e-3, 1, std).astype(np.float32)
