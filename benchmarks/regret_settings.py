"""The settings of the table of regret (`regret.py`): images of known difficulty in small files, and what a run has set.

A setting's images are chosen once, from the training images of a set that is there, and packed into one `.npz` file:
how many of each class is then free, which `data.imbalance_factor` is not.
"""

import os
import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax.data import longtail
from mfm_jax.study import tune

CONFIGS = Path(__file__).parents[1] / "configs"
Values = Mapping[str, Any]
Counts = Callable[[Sequence[int]], np.ndarray]  # the images that there are of each class -> those to keep of each
_NOTHING: Values = MappingProxyType({})
_LARGEST = 1_000  # CIFAR-10 images of the largest class


class Setting(NamedTuple):
    """One column of the table.

    source: the config whose recipe and images it has.
    counts: how many training images of each class are kept.
    epochs: passes; steps are about as many in every setting of a source.
    values: what else is set, by `group.field`.
    sampling: `method.sampling` of the methods that do not sample in stages; "" leaves each its own.
    images: the setting whose images it has; "" for its own.
    order: which class has the first of the counts, which the next: "" as numbered; or by recall on `BALANCED`.
    """

    source: str
    counts: Counts
    epochs: int
    values: Values = _NOTHING
    sampling: str = ""
    images: str = ""
    order: Literal["", "reversed", "hard_tail", "easy_tail"] = ""

    @property
    def by_recall(self) -> bool:
        """Whether the order follows the recalls of a run on `BALANCED`."""
        return self.order.endswith("_tail")


def exponential(factor: float, largest: int = _LARGEST) -> Counts:
    """Returns the profile of `longtail.class_counts`."""
    return lambda there: longtail.class_counts(min(largest, *there), len(there), factor)


def step(factor: float) -> Counts:
    """Returns the profile of which the second half of the classes has 1/factor of the images of the first."""

    def counts(there: Sequence[int]) -> np.ndarray:
        largest, half = min(_LARGEST, *there), len(there) // 2
        return np.array([largest] * half + [int(largest / factor)] * (len(there) - half))

    return counts


def thinned(part: int, least: int) -> Counts:
    """Returns one image in `part` of each class, but `least`, or all where there are fewer."""
    return lambda there: np.maximum(np.array(there) // part, np.minimum(there, least))


SETTINGS = {
    "cifar10_100": Setting("cifar10", exponential(100), 30),
    "cifar10_10": Setting("cifar10", exponential(10), 18),
    "cifar10_hard_tail": Setting("cifar10", exponential(100), 30, order="hard_tail"),
    "cifar10_step": Setting("cifar10", step(100), 15),
    "digits_50": Setting("digits", exponential(50), 60),
    "plankton": Setting("plankton", thinned(4, 6), 14),
    "cifar10_200": Setting("cifar10", exponential(200), 34),
    "cifar10_easy_tail": Setting("cifar10", exponential(100), 30, order="easy_tail"),
    "cifar10_50": Setting("cifar10", exponential(50), 28),
    "cifar10_reversed": Setting("cifar10", exponential(100), 30, order="reversed"),
    "digits_10": Setting("digits", exponential(10), 40),
    "cifar10_square_root": Setting("cifar10", exponential(100), 30, sampling="square_root", images="cifar10_100"),
    "cifar10_natural": Setting("cifar10", exponential(100), 30, sampling="natural", images="cifar10_100"),
    "cifar10_resnet20": Setting("cifar10", exponential(100), 30, {"model.name": "resnet20"}, images="cifar10_100"),
}
BALANCED = Setting("cifar10", exponential(1, largest=248), 30)  # as many images as `cifar10_100`

# Of the set itself: all training images, and what leaves them for validation and the meta set.
_CONFIG = {"cifar10": "cifar10_lt_small", "digits": "digits_lt", "plankton": "plankton"}
_WHOLE: Mapping[str, Values] = {
    "cifar10": {"data.imbalance_factor": 1.0, "data.val_images_per_class": 500},
    "digits": {"data.imbalance_factor": 1.0, "data.val_images_per_class": 10},
    "plankton": {"data.image_size": 16},
}
_PACKED = {
    "train.dtype": "float32",
    "data.source": "npz",
    "data.protocol": "natural",
    "data.imbalance_factor": 1.0,
    "data.image_size": 0,
}
_ENDING = {"eval.every_epochs": 1_000, "checkpoint.every_epochs": 1_000, "checkpoint.keep": 1, "train.loggers": ""}


def fields(setting: Setting, root: Path) -> tune.Fields:
    """Returns the config's fields of a run on the file `root`, the method still to be set."""
    values = {**_PACKED, **_ENDING, "data.root": str(root), "train.epochs": setting.epochs, **setting.values}
    return tune.with_values(_shipped(setting.source), values)


def pack(setting: Setting, path: Path, plankton: str = "", recalls: Sequence[float] = ()) -> None:
    """Writes the images of a setting.

    Args:
      setting: the setting.
      path: the file.
      plankton: the folder of its pictures.
      recalls: of the classes on `BALANCED`, where the order follows them.
    """
    given = {"data.root": plankton} if setting.source == "plankton" else {}
    whole = tune.with_values(_shipped(setting.source), {**_WHOLE[setting.source], **given})
    found = data_lib.build(config_lib.resolve(whole))
    labels = found.train_labels
    order = ordered(setting, found.num_classes, recalls)
    kept = np.empty(found.num_classes, np.int64)
    kept[order] = setting.counts(np.bincount(labels, minlength=found.num_classes)[order].tolist())
    chosen = np.concatenate(
        [np.random.default_rng([0, c]).permutation(np.flatnonzero(labels == c))[:n] for c, n in enumerate(kept)]
    )
    splits = {
        "train": (found.train_images[np.sort(chosen)], labels[np.sort(chosen)]),
        "val": (found.val_images, found.val_labels),
        "test": (found.test_images, found.test_labels),
    }
    if found.meta_images is not found.train_images:
        splits["meta"] = found.meta_images, found.meta_labels
    arrays = {f"{name}_images": images for name, (images, _) in splits.items()}
    arrays |= {f"{name}_labels": labels for name, (_, labels) in splits.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, class_names=np.array(found.class_names), **arrays)
    os.replace(temporary, path)


def ordered(setting: Setting, classes: int, recalls: Sequence[float] = ()) -> list[int]:
    """Returns the classes in the order of the setting; in `hard_tail` those with the best recall come first."""
    order = np.argsort(-np.array(recalls), kind="stable").tolist() if setting.by_recall else list(range(classes))
    return order[::-1] if setting.order in ("reversed", "easy_tail") else order


def _shipped(source: str) -> tune.Fields:
    """Returns the fields of the shipped config of a source."""
    return runpy.run_path(str(CONFIGS / f"{_CONFIG[source]}.py"))["get_config"]().to_dict()
