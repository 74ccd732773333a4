"""Classification sets that TFDS has prepared, read from array_record files without TensorFlow."""

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from mfm_jax.config import Data
from mfm_jax.data import stamps, workers
from mfm_jax.data.kept import cached
from mfm_jax.data.sources import PROGRESS_FROM, Labels, Pixels, Source, in_two_pools, resize
from mfm_jax.errors import UserError, in_a_line, install
from mfm_jax.machine.disk import expanded

_DECODE_BATCH = 256


def load(config: Data) -> Source:
    """Loads a TFDS set's `train` split, and `test` (else `validation`) as the test split."""
    with _quiet():
        builder = _prepared_builder(config)
        splits = list(builder.info.splits)
        test = next((split for split in ("test", "validation") if split in splits), None)
        if test is None or "train" not in splits:
            raise UserError(
                f"data.name = {config.name!r}: needs the splits train and test (or validation); it has:"
                f" {', '.join(splits)}"
            )
        records = _decoded(builder, "train", config), _decoded(builder, test, config)
    name, version = builder.info.full_name.rsplit("/", 1)
    class_names = tuple(builder.info.features["label"].names)
    return in_two_pools(name, version, class_names, *records, test)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what TFDS logs about paths it tried; what matters is raised."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _prepared_builder(config: Data) -> Any:
    """Returns the TFDS builder of `config.name`, its data prepared (downloaded if that is possible)."""
    import tensorflow_datasets as tfds  # here: half a second that other sources do not pay

    given = config.root or os.environ.get("TFDS_DATA_DIR")
    root = str(expanded(given)) if given else None
    where = root or "~/tensorflow_datasets"
    try:
        builder = tfds.builder(config.name, data_dir=root)
    except Exception as error:  # TFDS raises many types here; its first line says what it misses
        raise UserError(
            f"data.name = {config.name!r}: neither a TFDS set nor one prepared in {where}"
            f" ({in_a_line(error)}); check the name, or set TFDS_DATA_DIR or --config.data.root"
        ) from error
    _check_features(config.name, builder.info.features)  # before a download that would be in vain
    if builder.is_prepared():
        return builder
    ways_out = (
        "set TFDS_DATA_DIR or --config.data.root to data prepared in array_record form,"
        f" or {install('prepare')} on a machine with a connection"
    )
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"data.name = {config.name!r}: not prepared in {where}, and TensorFlow, which prepares it, is not"
            f" installed; {ways_out}"
        )
    try:
        builder = tfds.builder(config.name, data_dir=root, file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:  # network, disk, checksum, manual download: each its own type
        raise UserError(
            f"data.name = {config.name!r}: could not be prepared in {where} ({in_a_line(error)}); {ways_out}"
        ) from error
    return builder


def _check_features(name: str, features: Any) -> None:
    import tensorflow_datasets as tfds

    keys = list(features) if isinstance(features, tfds.features.FeaturesDict) else []
    image, label = (features[key] if key in keys else None for key in ("image", "label"))
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        raise UserError(
            f"data.name = {name!r}: needs an `image` and a class `label`; it has: {', '.join(keys) or 'neither'}"
        )
    if image.np_dtype != np.uint8:
        raise UserError(f"data.name = {name!r}: images are {np.dtype(image.np_dtype)}; only uint8 is supported")


def _decoded(builder: Any, split: str, config: Data) -> tuple[Pixels, Labels]:
    """Returns images and labels of `split`, from the cache where it holds them."""
    name = builder.info.full_name.replace("/", "-")
    size = f"{config.image_size}px" if config.image_size else "as_stored"

    def decode() -> tuple[Pixels, Labels]:
        try:
            records = builder.as_data_source(split=split)
        except (NotImplementedError, ValueError) as error:  # of a format without random access
            raise UserError(
                f"data.name = {config.name!r}: prepared in {builder.data_path} as"
                f" {getattr(builder.info.file_format, 'value', 'an unknown format')}, which only TensorFlow"
                " reads; set TFDS_DATA_DIR or --config.data.root to data prepared in array_record form"
            ) from error
        return _decode(records, config, split)

    return cached(f"{name}-{split}-{size}-{fingerprint(Path(builder.data_path))}", decode)


def fingerprint(folder: Path) -> str:
    """Returns 16 hex digits that change with the place, the files or their stamps.

    The device is left out: on a cluster one drive has another number on each node. TFDS prepares a set once and nobody
    edits its files: what a stamp does not show is not looked for in their gigabytes.
    """
    files = [(f.name, stamps.of(f)._replace(device=0)) for f in sorted(folder.glob("*")) if f.is_file()]
    return hashlib.sha256(repr((str(folder.resolve()), files)).encode()).hexdigest()[:16]


def _decode(records: Sequence[Any], config: Data, split: str) -> tuple[Pixels, Labels]:
    """Decodes all `records` ({"image": uint8 [H, W, C], "label": int}); many in processes, with a bar on stderr."""
    total = len(records)
    many = total >= PROGRESS_FROM
    labels = np.empty(total, np.int32)
    images: Pixels | None = None
    parts = [range(start, min(start + _DECODE_BATCH, total)) for start in range(0, total, _DECODE_BATCH)]
    decoded = workers.mapped(functools.partial(_part, records, config.image_size), parts, config.workers * many)
    found = itertools.chain.from_iterable(decoded)
    try:
        with Progress(console=Console(stderr=True), transient=True, disable=not many) as bar:
            for i, image, label in bar.track(found, total, description=f"decoding {config.name} {split} (once)"):
                if images is None:
                    images = np.empty((total, *image.shape), np.uint8)
                if image.shape != images.shape[1:]:
                    raise UserError(_unequal(config, split, i, images.shape[1:], image.shape))
                images[i], labels[i] = image, label
    except workers.WorkerEnded as error:
        raise UserError(
            f"data.workers = {config.workers}: a process that decodes was ended; is memory short? choose fewer"
        ) from error
    if images is None or labels.min() < 0:
        raise UserError(f"data.name = {config.name!r}: split {split} has no {'labels' if total else 'records'}")
    return images, labels


def _part(records: Any, size: int, indices: range) -> list[tuple[int, Pixels, int]]:
    """Returns index, resized image and label of some records."""
    with _quiet():
        found = records.__getitems__(list(indices))
    images = [record["image"] for record in found]
    if len({image.shape for image in images}) == 1:
        images = list(resize(np.stack(images), size))
    else:
        images = [resize(image[None], size)[0] for image in images]
    return [(i, image, record["label"]) for i, image, record in zip(indices, images, found, strict=True)]


def _unequal(config: Data, split: str, i: int, first: tuple[int, ...], other: tuple[int, ...]) -> str:
    way_out = "use a set with one number of channels" if config.image_size else "set it, e.g. to 32"
    return (
        f"data.image_size = {config.image_size}: images of {config.name!r} differ in shape (in {split},"
        f" record 0 is {first}, record {i} is {other}); {way_out}"
    )
