"""How a balanced dataset becomes a long-tailed one, and which images its splits hold; `manifest` writes that down.

A long-tailed benchmark is not a dataset but a recipe: keep all images of class 0, fewer of each later class, and
1/imbalance_factor of them in the last. Two recipes share the name "CIFAR-10-LT, factor 100" and their numbers are
not comparable. In `meta_held_out` (Meta-Weight-Net, MetaSAug) the small balanced meta set leaves the data before it
is imbalanced, so the training set never holds a meta image and the largest class has 4990 images; in `full` (LDAM,
CMW-Net) all 5000 are imbalanced, and the meta set is redrawn from the training set every epoch.

Data that is long-tailed by nature keeps its images (`natural`): parts that it does not bring are held out of every
class in proportion, whole groups at a time where records belong together. So is the meta set, or it is redrawn from
the training set as under `full`.

Picks come from one permutation a class, seeded by (seed, class): validation images are its first entries,
then meta, then training. Training sets of one seed are therefore nested: factor 100 keeps a subset of factor 50.

NumPy only: nothing here needs JAX or the images.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mfm_jax.errors import UserError

Ints = npt.NDArray[np.int64]

# First entries of the seed of each random stream, so that no two of them are ever the same stream.
_PICK, _REDRAW, _HOLD_OUT = 0, 1, 2


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Positions in the labels that were split: int64, sorted, without repeats."""

    train: Ints  # [N], long-tailed
    meta: Ints  # [K * m], balanced; where it is redrawn, a part of `train`, as drawn for epoch 0
    val: Ints  # [K * v], balanced; under `natural` as long-tailed as `train`
    redrawn: bool  # whether the meta set is redrawn from `train` every epoch


def class_counts(n_max: int, num_classes: int, imbalance_factor: float) -> Ints:
    """Returns the images kept of each class, int64 [K].

    `n_c = int(n_max * f ** (c / (K - 1)))` with `f = 1 / imbalance_factor`, truncated: the CIFAR profile of
    Cui et al., "Class-Balanced Loss Based on Effective Number of Samples" (arXiv:1901.05555). Class 0 keeps
    `n_max`; a single class keeps all of it.

    Raises:
      UserError: the factor is below 1, or a class would be left without an image.
    """
    if not imbalance_factor >= 1:
        raise UserError(f"data.imbalance_factor = {imbalance_factor:g}: allowed: 1 or more")
    steps = max(num_classes - 1, 1)
    # The nudge keeps whole numbers whole: 49 * (1 / 49) is 0.9999999999999999 in float64.
    exact = [n_max / imbalance_factor ** (c / steps) * (1 + 1e-12) for c in range(num_classes)]
    counts = np.array([int(n) for n in exact], np.int64)
    if counts.min() < 1:
        raise UserError(
            f"data.imbalance_factor = {imbalance_factor:g}: leaves the rarest class without a training image (the"
            f" largest has {n_max}); choose at most {n_max}"
        )
    return counts


def make_split(
    labels: npt.NDArray[np.integer],
    num_classes: int,
    *,
    protocol: str,
    imbalance_factor: float,
    meta_images_per_class: int,
    val_images_per_class: int,
    seed: int,
) -> Split:
    """Returns positions in `labels` (integers [N]) as a long-tailed training set, a meta set and a validation set.

    Validation images leave first, `val_images_per_class` a class. Under `meta_held_out` the meta images leave
    next; then the rest is imbalanced. `n_max` is the size of the smallest class at that point, so the profile
    is exact also where classes differ in size. Under `full` the rest is imbalanced at once and the meta set
    is `min(meta_images_per_class, smallest training class)` images a class out of the training set.

    Raises:
      UserError: an unknown protocol, or a class holds too few images for what is asked.
    """
    if protocol not in ("meta_held_out", "full"):
        raise UserError(f"data.protocol = {protocol!r}: allowed: full, meta_held_out")
    held_out = meta_images_per_class if protocol == "meta_held_out" else 0
    picks = [
        np.random.default_rng([_PICK, seed, c]).permutation(np.flatnonzero(labels == c)).astype(np.int64)
        for c in range(num_classes)
    ]
    n_max = _left_over([len(pick) for pick in picks], val_images_per_class, held_out)
    counts = class_counts(n_max, num_classes, imbalance_factor)
    first = val_images_per_class + held_out
    val = [pick[:val_images_per_class] for pick in picks]
    train = np.sort(np.concatenate([p[first : first + n] for p, n in zip(picks, counts, strict=True)]))
    if protocol == "full":
        meta = train[redraw_meta(labels[train], num_classes, meta_images_per_class, seed, 0)].ravel()
    else:
        meta = np.concatenate([pick[val_images_per_class:first] for pick in picks])
    return Split(train=train, meta=np.sort(meta), val=np.sort(np.concatenate(val)), redrawn=protocol == "full")


class Labelled(NamedTuple):
    """The records of data that is long-tailed by nature, before they are split."""

    labels: npt.NDArray[np.integer]  # [N]
    class_names: Sequence[str]  # K
    given: npt.NDArray[np.str_]  # [N], "train", or "val" or "meta" where the data has such a split
    groups: Sequence[str]  # N, "" for none: records of a group are never divided


def natural_split(
    records: Labelled,
    *,
    imbalance_factor: float,
    meta_images_per_class: int,
    val_fraction: float,
    meta_fraction: float,
    seed: int,
) -> Split:
    """Returns positions of `records` as training, meta and validation set.

    Args:
      records: long-tailed by nature.
      imbalance_factor: 1 keeps the training set. A larger factor f keeps of the class with the r-th most images at
        most `int(n_max * f ** (-r / (K - 1)))`.
      meta_images_per_class: a redrawn meta set has so many images a class of the training set, or as many as its
        smallest class has; a meta set that is held out has at most so many.
      val_fraction: part of each class that is held out (`hold_out`); not read where the data has a validation set.
      meta_fraction: part of each class of what is left for training that is held out as the meta set; 0 redraws it
        from the training set every epoch. Not read where the data has a meta set.
      seed: of the draws.

    Raises:
      UserError: a class has no training image, or none in the meta set.
    """
    labels, class_names, given, groups = records
    train, val, meta = (np.flatnonzero(given == name).astype(np.int64) for name in ("train", "val", "meta"))
    num_classes = len(class_names)

    def divided(records: Ints, fraction: float, most: int | None = None) -> tuple[Ints, Ints]:
        of_records = [groups[int(i)] for i in records]
        held = hold_out(labels[records], num_classes, of_records, fraction, seed, most)
        return records[~held], records[held]

    if not len(val) and val_fraction:
        train, val = divided(train, val_fraction)
    train = _longer(train, labels, num_classes, imbalance_factor, seed)
    if not len(meta) and meta_fraction:
        train, meta = divided(train, meta_fraction, most=meta_images_per_class)
    for name, part in (("training", train), ("meta", meta)):
        missing = np.flatnonzero(np.bincount(labels[part], minlength=num_classes) == 0)
        if len(part) and len(missing):
            way_out = ", or set data.meta_fraction = 0" if name == "meta" and meta_fraction else ""
            raise UserError(
                f"data: class {class_names[missing[0]]!r} has no {name} image; every class needs at least one{way_out}"
            )
    redrawn = not len(meta)
    if redrawn:
        meta = np.sort(train[redraw_meta(labels[train], num_classes, meta_images_per_class, seed, 0)].ravel())
    return Split(train=train, meta=meta, val=val, redrawn=redrawn)


def _longer(train: Ints, labels: npt.NDArray[np.integer], num_classes: int, factor: float, seed: int) -> Ints:
    """Returns what a larger imbalance factor leaves of the positions `train`."""
    if factor == 1:
        return train
    counts = np.bincount(labels[train], minlength=num_classes)
    by_count = np.lexsort((np.arange(num_classes), -counts))
    limit = np.empty(num_classes, np.int64)
    limit[by_count] = class_counts(int(counts.max()), num_classes, factor)
    kept = [
        np.random.default_rng([_PICK, seed, c]).permutation(train[labels[train] == c])[: limit[c]]
        for c in range(num_classes)
    ]
    return np.sort(np.concatenate(kept))


def hold_out(
    labels: npt.NDArray[np.integer],
    num_classes: int,
    groups: Sequence[str],
    fraction: float,
    seed: int,
    most: int | None = None,
) -> npt.NDArray[np.bool_]:
    """Returns which of the records (labels [N], groups of length N) are held out, bool [N].

    A class with n records gives `round(fraction * n)`, at most `most`, at least one if it has two or more, and never
    all. Records of one group (other than "") stay together: groups are taken at random, for the rarest class first,
    until a class has its share; a group that would leave a class without a record is passed over. So a class may give
    more than its share, or none if all its records are of one group.
    """
    counts = np.bincount(labels, minlength=num_classes)
    wanted = np.zeros_like(counts)
    if fraction:
        share = np.clip(np.rint(fraction * counts), 1, most).astype(np.int64)
        wanted = np.minimum(share, np.maximum(counts - 1, 0))
    held, left = np.zeros(len(labels), bool), counts
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        if group:
            members.setdefault(group, []).append(i)
    taken = np.zeros(num_classes, np.int64)
    for c in np.argsort(counts, kind="stable"):
        for i in np.random.default_rng([_HOLD_OUT, seed, c]).permutation(np.flatnonzero(labels == c)):
            if taken[c] >= wanted[c]:
                break
            together = members.get(groups[i], [i])
            change = np.bincount(labels[together], minlength=num_classes)
            if held[i] or ((change > 0) & (change >= left)).any():
                continue
            held[together] = True
            taken, left = taken + change, left - change
    return held


def _left_over(sizes: Sequence[int], val: int, meta: int) -> int:
    """Returns the size of the smallest class without its validation and meta images."""
    smallest = int(np.argmin(sizes))
    held = sizes[smallest]
    if held == 0:
        raise UserError(f"data: class {smallest} holds no images; every class needs at least one")
    if val >= held:
        raise UserError(
            f"data.val_images_per_class = {val}: class {smallest} holds {held} images;"
            f" choose at most {max(held - meta - 1, 0)}"
        )
    if val + meta >= held:
        raise UserError(
            f"meta.images_per_class = {meta}: class {smallest} holds {held - val} images"
            f"{' beside its validation images' if val else ''}; choose at most {held - val - 1}"
        )
    return held - val - meta


def redraw_meta(
    train_labels: npt.NDArray[np.integer], num_classes: int, images_per_class: int, seed: int, epoch: int
) -> Ints:
    """Returns the meta set of one epoch under `full`, as positions in the training set, int64 [K, m].

    `m = min(images_per_class, smallest class)`; row c holds distinct images of class c, sorted. The draw
    depends on (seed, epoch) and the labels alone, so a resumed run sees an uninterrupted one's meta sets.
    """
    sizes = np.bincount(train_labels, minlength=num_classes)
    members = np.split(np.argsort(train_labels, kind="stable"), np.cumsum(sizes)[:-1])
    m = min(images_per_class, *(len(member) for member in members))
    rows = [
        np.sort(np.random.default_rng([_REDRAW, seed, epoch, c]).permutation(member)[:m])
        for c, member in enumerate(members)
    ]
    return np.stack(rows).astype(np.int64)


def shot_groups(counts: npt.ArrayLike) -> dict[str, Ints]:
    """Returns the classes of each group by training `counts` [K], as sorted int64 indices.

    `many`, `medium` and `few` hold more than 100, 20 to 100 and fewer than 20 training images (Liu et al.,
    "Large-Scale Long-Tailed Recognition in an Open World", arXiv:1904.05160); any of them may be empty.
    `rarest_third` and `head_third` hold the `max(K // 3, 1)` classes with the fewest and the most images,
    `middle_third` the rest (a single class is the rarest). With equal counts the later class passes
    for the rarer: that is their order before the profile was truncated to whole images.
    """
    count = np.asarray(counts, np.int64)
    num_classes = len(count)
    third = max(num_classes // 3, 1)
    by_rarity = np.lexsort((-np.arange(num_classes), count))
    return {
        "many": np.flatnonzero(count > 100),
        "medium": np.flatnonzero((count >= 20) & (count <= 100)),
        "few": np.flatnonzero(count < 20),
        "rarest_third": np.sort(by_rarity[:third]),
        "middle_third": np.sort(by_rarity[third : num_classes - third]),
        "head_third": np.sort(by_rarity[max(third, num_classes - third) :]),
    }
