"""Where images come from: a small built-in set, or any classification set that TFDS has prepared; `files` has more.

Every source ends as the same thing, uint8 images and int32 labels, with the id of each record so that a split can be
written down. `digits` (1797 images of 8x8, part of scikit-learn) needs no download and is what tests and first runs
use. `tfds` reads prepared array_record files without TensorFlow.

Decoding 60,000 PNG files takes seconds to half a minute, so it is done once: the decoded arrays are kept in
the user's cache folder ($MFM_JAX_CACHE, else the platform's), under a name that holds the set, its version,
split and size and a fingerprint of the prepared files. A cache entry is trusted only if its checksums fit;
anything else is decoded again.
"""

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from mfm_jax import cache
from mfm_jax.config import Data
from mfm_jax.data.streaming import Rows, Streamed
from mfm_jax.errors import UserError

Pixels = npt.NDArray[np.uint8]
Images = Pixels | Streamed
Labels = npt.NDArray[np.int32]

DIGITS_TEST_PER_CLASS = 50
TEST_SEED = 2020  # a constant: the test set must not change with `data.seed`
_DECODE_BATCH = 256
PROGRESS_FROM = 5_000  # records; fewer decode before a bar could be read


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset before it is split. A record is named by (pool, id); both splits may lie in one pool."""

    name: str
    version: str
    class_names: tuple[str, ...]
    train_images: Images  # [N, H, W, C]
    train_labels: Labels  # [N]
    train_ids: npt.NDArray[np.int64]  # [N], sorted
    train_pool: str
    test_images: Images
    test_labels: Labels
    test_ids: npt.NDArray[np.int64]
    test_pool: str
    given: npt.NDArray[np.str_] | None = None  # [N], "train", "val" or "meta", as the data itself says; None: all train
    groups: tuple[str, ...] = ()  # N group keys, "" for none; empty: no groups
    facts: Mapping[str, Any] = field(default_factory=dict)  # what else the manifest is to say
    manifest: dict[str, Any] | None = None  # of the split that the data was packed with, where it was


def load(config: Data) -> Source:
    """Loads `digits` or the TFDS set that `config` names, at `config.image_size` pixels a side (0 = as stored).

    Raises:
      UserError: the set is unknown, cannot be prepared or read, or does not hold images with labels.
    """
    return streamed_if_large(config, {"digits": _load_digits, "tfds": _load_tfds}[config.source](config))


def streamed_if_large(config: Data, source: Source) -> Source:
    """Returns `source`, its training images as `Rows` where they exceed `data.resident_mb`."""
    images = source.train_images
    if isinstance(images, np.ndarray) and images.nbytes > config.resident_mb * 1e6:
        return replace(source, train_images=Rows(images, np.arange(len(images))))
    return source


def resize(images: Pixels, size: int) -> Pixels:
    """Averages images [N, H, W, C] to [N, size, size, C]: each new pixel is the mean of the area it covers.

    A side that is not `size` is squeezed or stretched on its own. The mean is rounded to the nearest integer,
    halves to even. 0, or the size the images have, returns them untouched.
    """
    height, width = images.shape[1:3]
    if size == 0 or (height, width) == (size, size):
        return images
    rows, columns = _averaging(height, size), _averaging(width, size)
    result = np.empty((len(images), size, size, images.shape[3]), np.uint8)
    for i in range(0, len(images), _DECODE_BATCH):  # in parts: the float copies are ten times the images
        part = images[i : i + _DECODE_BATCH].astype(np.float32)
        mean = np.einsum("ih,nhwc,jw->nijc", rows, part, columns, optimize=True)
        result[i : i + _DECODE_BATCH] = np.clip(np.rint(mean), 0, 255)
    return result


def _averaging(old: int, new: int) -> npt.NDArray[np.float32]:
    """Returns the matrix [new, old] whose row i holds the share of each old pixel in new pixel i."""
    edges = np.arange(new + 1) * (old / new)
    pixel = np.arange(old)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return (np.clip(overlap, 0, None) * (new / old)).astype(np.float32)


def _load_digits(config: Data) -> Source:
    """Loads scikit-learn's digits, values 0..16 scaled to 0..255.

    The set has no test split of its own. 50 images a class, drawn with a constant seed and so the same for
    every `data.seed`, are its test split; 124 to 133 a class are left to train on.
    """
    import sklearn.datasets  # here: a second that the processes that decode do not pay

    digits = sklearn.datasets.load_digits()
    images = resize(np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None], config.image_size)
    labels = digits.target.astype(np.int32)
    is_test = np.zeros(len(labels), bool)
    for c in range(10):
        members = np.random.default_rng([TEST_SEED, c]).permutation(np.flatnonzero(labels == c))
        is_test[members[:DIGITS_TEST_PER_CLASS]] = True
    return Source(
        name="digits",
        version="1",  # scikit-learn has shipped one version only
        class_names=tuple(str(c) for c in range(10)),
        train_images=images[~is_test],
        train_labels=labels[~is_test],
        train_ids=np.flatnonzero(~is_test).astype(np.int64),
        train_pool="all",
        test_images=images[is_test],
        test_labels=labels[is_test],
        test_ids=np.flatnonzero(is_test).astype(np.int64),
        test_pool="all",
    )


def _load_tfds(config: Data) -> Source:
    """Loads a TFDS set's `train` split, and `test` (else `validation`) as the test split."""
    with _quiet_tfds():
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


def in_two_pools(
    name: str,
    version: str,
    class_names: tuple[str, ...],
    train: tuple[Pixels, Labels],
    test: tuple[Pixels, Labels],
    test_pool: str = "test",
) -> Source:
    """Returns the source whose training and test records are numbered apart, each in their order."""
    return Source(
        name=name,
        version=version,
        class_names=class_names,
        train_images=train[0],
        train_labels=train[1],
        train_ids=np.arange(len(train[1]), dtype=np.int64),
        train_pool="train",
        test_images=test[0],
        test_labels=test[1],
        test_ids=np.arange(len(test[1]), dtype=np.int64),
        test_pool=test_pool,
    )


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
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

    root = os.path.expanduser(config.root or os.environ.get("TFDS_DATA_DIR", "")) or None
    where = root or "~/tensorflow_datasets"
    try:
        builder = tfds.builder(config.name, data_dir=root)
    except Exception as error:  # TFDS raises many types here; its first line says what it misses
        raise UserError(
            f"data.name = {config.name!r}: neither a TFDS set nor one prepared in {where}"
            f" ({_first_line(error)}); check the name, or set TFDS_DATA_DIR or --config.data.root"
        ) from error
    _check_features(config.name, builder.info.features)  # before a download that would be in vain
    if builder.is_prepared():
        return builder
    ways_out = (
        "set TFDS_DATA_DIR or --config.data.root to data prepared in array_record form,"
        " or python -m pip install -e '.[prepare]' on a machine with a connection"
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
            f"data.name = {config.name!r}: could not be prepared in {where} ({_first_line(error)}); {ways_out}"
        ) from error
    return builder


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


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
    fields = (
        builder.info.full_name.replace("/", "-"),
        split,
        f"{config.image_size}px" if config.image_size else "as_stored",
        _fingerprint(Path(builder.data_path)),
    )

    def decode() -> tuple[Pixels, Labels]:
        try:
            records = builder.as_data_source(split=split)
        except (NotImplementedError, ValueError) as error:
            raise UserError(
                f"data.name = {config.name!r}: prepared in {builder.data_path} as"
                f" {getattr(builder.info.file_format, 'value', 'an unknown format')}, which only TensorFlow"
                " reads; set TFDS_DATA_DIR or --config.data.root to data prepared in array_record form"
            ) from error
        return _decode(records, config, split)

    return cached("-".join(fields), decode)


def _fingerprint(folder: Path) -> str:
    """Returns 16 hex digits that change with the place, the files, their sizes or their times."""
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.glob("*")) if f.is_file()]
    return hashlib.sha256(repr((str(folder.resolve()), files)).encode()).hexdigest()[:16]


def _decode(records: Sequence[Any], config: Data, split: str) -> tuple[Pixels, Labels]:
    """Decodes all `records` ({"image": uint8 [H, W, C], "label": int}); a bar on stderr for many."""
    total = len(records)
    labels = np.empty(total, np.int32)
    images: Pixels | None = None
    quiet = total < PROGRESS_FROM
    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress:
        task = progress.add_task(f"decoding {config.name} {split} (once)", total=total)
        for start in range(0, total, _DECODE_BATCH):
            batch = records.__getitems__(list(range(start, min(start + _DECODE_BATCH, total))))  # type: ignore[attr-defined]
            for i, record in enumerate(batch, start):
                image = resize(record["image"][None], config.image_size)[0]
                if images is None:
                    images = np.empty((total, *image.shape), np.uint8)
                if image.shape != images.shape[1:]:
                    raise UserError(_unequal(config, split, i, images.shape[1:], image.shape))
                images[i], labels[i] = image, record["label"]
            progress.update(task, advance=len(batch))
    if images is None or labels.min() < 0:
        raise UserError(f"data.name = {config.name!r}: split {split} has no {'labels' if total else 'records'}")
    return images, labels


def _unequal(config: Data, split: str, i: int, first: tuple[int, ...], other: tuple[int, ...]) -> str:
    way_out = "use a set with one number of channels" if config.image_size else "set it, e.g. to 32"
    return (
        f"data.image_size = {config.image_size}: images of {config.name!r} differ in shape (in {split},"
        f" record 0 is {first}, record {i} is {other}); {way_out}"
    )


def cached(name: str, build: Callable[[], tuple[Pixels, Labels]]) -> tuple[Pixels, Labels]:
    """Returns what the cache entry `name` holds, or what `build` returns, which is then kept there.

    An entry is a folder that appears whole or not at all (built beside, then renamed), so processes may build
    at once: the first to finish is kept, the others use their own arrays. An entry whose checksums do not fit
    is replaced. A folder that cannot be written costs the cache, not the run.
    """
    root = cache.folder()
    entry = root / name
    found = _read_entry(entry)
    if found is not None:
        return found
    images, labels = build()
    try:
        _write_entry(entry, images, labels)
    except OSError as error:
        logging.getLogger(__name__).warning("decoded images are not kept: %s cannot be written (%s)", root, error)
    return images, labels


def _read_entry(entry: Path) -> tuple[Pixels, Labels] | None:
    """Returns the arrays of a sound entry; None where there is none or it is damaged."""
    try:
        if json.loads((entry / "checksums.json").read_text()) != _checksums(entry):
            return None
        return np.load(entry / "images.npy", mmap_mode="r"), np.load(entry / "labels.npy")
    except (OSError, ValueError):
        return None


def _write_entry(entry: Path, images: Pixels, labels: Labels) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    for left in entry.parent.glob(".building-*"):  # of a process that was killed
        if left.stat().st_mtime < time.time() - 86_400:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=entry.parent) as scratch:
        new = Path(scratch) / "entry"
        new.mkdir()
        np.save(new / "images.npy", images)
        np.save(new / "labels.npy", labels)
        (new / "checksums.json").write_text(json.dumps(_checksums(new)))
        try:
            new.rename(entry)
        except OSError:  # it exists: another process was first, or it is damaged
            if _read_entry(entry) is None:
                shutil.rmtree(entry, ignore_errors=True)
                new.rename(entry)


def _checksums(entry: Path) -> dict[str, str]:
    """Returns the SHA-256 of each array file."""
    result = {}
    for name in ("images.npy", "labels.npy"):
        with open(entry / name, "rb") as file:
            result[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return result
