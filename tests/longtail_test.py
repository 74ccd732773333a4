"""Class counts and splits: the published table, golden index hashes, and properties."""

import hashlib
import json
from pathlib import Path

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfm_jax.data import longtail
from mfm_jax.errors import UserError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "class_counts.json").read_text())
SETS = {"cifar10": (10, 50_000), "cifar100": (100, 50_000)}


def balanced_labels(num_classes: int, total: int) -> np.ndarray:
    return np.arange(total) % num_classes


def split_of(labels: np.ndarray, num_classes: int, **changes) -> longtail.Split:
    fields = {"protocol": "meta_held_out", "imbalance_factor": 10.0, "meta_images_per_class": 2}
    fields |= {"val_images_per_class": 1, "seed": 0}
    return longtail.make_split(labels, num_classes, **{**fields, **changes})


def digest(indices: np.ndarray) -> str:
    return hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()


@pytest.mark.parametrize("case", GOLDEN["counts"], ids=lambda c: f"{c['set']}-{c['protocol']}-{c['factor']}")
def test_class_counts_are_the_published_table(case):
    num_classes, total = SETS[case["set"]]
    asked = {"protocol": case["protocol"], "imbalance_factor": float(case["factor"]), "meta_images_per_class": 10}
    split = split_of(balanced_labels(num_classes, total), num_classes, val_images_per_class=0, **asked)
    counts = np.bincount(split.train % num_classes, minlength=num_classes)
    assert counts.tolist() == case["counts"]
    assert (counts.sum(), counts[0], counts[-1]) == (case["total"], case["largest"], case["smallest"])


def test_class_counts_by_hand():
    chex.assert_trees_all_equal(longtail.class_counts(100, 3, 100), np.array([100, 10, 1]))
    chex.assert_trees_all_equal(longtail.class_counts(99, 3, 9), np.array([99, 33, 11]))
    chex.assert_trees_all_equal(longtail.class_counts(7, 4, 1), np.array([7, 7, 7, 7]))
    chex.assert_trees_all_equal(longtail.class_counts(7, 1, 50), np.array([7]))
    assert longtail.class_counts(49, 2, 49)[1] == 1  # 49 * (1 / 49) is below 1 in float64
    assert longtail.class_counts(100, 3, 100).dtype == np.int64


@given(st.integers(1, 5000), st.integers(2, 200), st.integers(1, 1000))
def test_class_counts_are_exact_despite_rounding(n_max, num_classes, factor):
    factor = min(factor, n_max)
    counts = longtail.class_counts(n_max, num_classes, factor)
    power = num_classes - 1
    for c in {0, 1, num_classes // 2, num_classes - 1}:  # n_c = floor(n_max * factor**(-c/power)), in integers
        n = int(counts[c])
        assert n**power * factor**c <= n_max**power < (n + 1) ** power * factor**c


@pytest.mark.parametrize("protocol", ["meta_held_out", "full"])
def test_split_indices_are_golden(protocol):
    asked = {"imbalance_factor": 100.0, "meta_images_per_class": 10, "val_images_per_class": 20, "seed": 7}
    split = split_of(balanced_labels(10, 50_000), 10, protocol=protocol, **asked)
    assert {name: digest(getattr(split, name)) for name in ("train", "meta", "val")} == GOLDEN["splits"][protocol]


@settings(deadline=None)
@given(
    st.lists(st.integers(12, 60), min_size=1, max_size=12),
    st.integers(0, 4),
    st.integers(1, 5),
    st.floats(1, 3),
    st.integers(0, 2**31),
    st.sampled_from(["meta_held_out", "full"]),
)
def test_split_properties(sizes, val, meta, factor, seed, protocol):
    """Unequal classes: disjoint, balanced where it must be, and an exact profile."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    asked = {"imbalance_factor": factor, "meta_images_per_class": meta, "val_images_per_class": val, "seed": seed}
    split = split_of(labels, len(sizes), protocol=protocol, **asked)
    for part in (split.train, split.meta, split.val):
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()
    train, picked, held = set(split.train), set(split.meta), set(split.val)
    assert not held & (train | picked)
    assert picked <= train if protocol == "full" else not picked & train
    left = min(sizes) - val - (meta if protocol == "meta_held_out" else 0)
    expected = longtail.class_counts(left, len(sizes), factor)
    chex.assert_trees_all_equal(np.bincount(labels[split.train], minlength=len(sizes)), expected)
    m = meta if protocol == "meta_held_out" else min(meta, expected.min())
    assert (np.bincount(labels[split.meta], minlength=len(sizes)) == m).all()
    assert (np.bincount(labels[split.val], minlength=len(sizes)) == val).all()


def test_splits_of_one_seed_are_nested_in_the_factor():
    labels = balanced_labels(10, 1000)
    low, high = (split_of(labels, 10, imbalance_factor=f) for f in (2.0, 20.0))
    assert set(high.train) < set(low.train)
    chex.assert_trees_all_equal((low.meta, low.val), (high.meta, high.val))
    assert not np.array_equal(low.val, split_of(labels, 10, seed=1).val)


def test_redraw_meta_depends_on_seed_and_epoch_alone():
    labels = np.repeat([0, 1, 2], [9, 6, 4])
    first = longtail.redraw_meta(labels, 3, 10, seed=3, epoch=5)
    chex.assert_trees_all_equal(first, longtail.redraw_meta(labels, 3, 10, seed=3, epoch=5))
    chex.assert_shape(first, (3, 4))  # the smallest class holds 4
    assert (labels[first] == np.arange(3)[:, None]).all()
    assert all(len(set(row)) == 4 for row in first)
    others = [longtail.redraw_meta(labels, 3, 10, seed=3, epoch=e) for e in range(10)]
    assert {int(i) for draw in others for i in draw[0]} == set(range(9))  # every image has its turn


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"imbalance_factor": 0.5}, "data.imbalance_factor = 0.5: allowed: 1 or more"),
        (
            {"imbalance_factor": 50.0},
            "data.imbalance_factor = 50: leaves the rarest class without a training image (the largest has 7);"
            " choose at most 7",
        ),
        (
            {"meta_images_per_class": 9},
            "meta.images_per_class = 9: class 0 holds 9 images beside its validation images; choose at most 8",
        ),
        (
            {"meta_images_per_class": 30, "val_images_per_class": 0},
            "meta.images_per_class = 30: class 0 holds 10 images; choose at most 9",
        ),
        ({"val_images_per_class": 10}, "data.val_images_per_class = 10: class 0 holds 10 images; choose at most 7"),
        ({"protocol": "half"}, "data.protocol = 'half': allowed: full, meta_held_out"),
    ],
)
def test_errors_name_field_value_and_way_out(changes, line):
    with pytest.raises(UserError) as error:
        split_of(balanced_labels(3, 30), 3, **changes)
    assert str(error.value) == line


def test_an_empty_class_is_an_error():
    with pytest.raises(UserError, match="class 2 holds no images"):
        split_of(balanced_labels(2, 30), 3)


def test_shot_groups_by_hand():
    groups = longtail.shot_groups([500, 101, 100, 20, 19, 2, 2])
    expected = {
        "many": [0, 1],
        "medium": [2, 3],
        "few": [4, 5, 6],
        "rarest_third": [5, 6],
        "middle_third": [2, 3, 4],
        "head_third": [0, 1],
    }
    assert {name: group.tolist() for name, group in groups.items()} == expected
    tied = longtail.shot_groups([5, 5, 5])
    assert tied["rarest_third"].tolist() == [2]
    assert tied["many"].shape == (0,)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40))
def test_shot_groups_partition_the_classes(counts):
    groups = longtail.shot_groups(counts)
    for names in (("many", "medium", "few"), ("rarest_third", "middle_third", "head_third")):
        together = np.concatenate([groups[name] for name in names])
        chex.assert_trees_all_equal(np.sort(together), np.arange(len(counts)))
    assert len(groups["rarest_third"]) == max(len(counts) // 3, 1)


# --- long-tailed by nature ------------------------------------------------------------------------


def natural(labels, given=None, groups=None, **fields):
    labels = np.asarray(labels)
    settings_ = {"imbalance_factor": 1.0, "meta_images_per_class": 2, "seed": 0, **fields}
    settings_ = {"val_fraction": 0.25, "meta_fraction": 0.0, **settings_}
    given = np.full(len(labels), "train") if given is None else np.asarray(given)
    groups = groups or ("",) * len(labels)
    names = [f"class{c}" for c in range(labels.max() + 1)]
    return longtail.natural_split(longtail.Labelled(labels, names, given, groups), **settings_)


def test_natural_data_keeps_its_images():
    labels = np.repeat([0, 1, 2], [16, 5, 2])
    split = natural(labels)
    assert np.bincount(labels[split.val]).tolist() == [4, 1, 1]  # rint(4), rint(1.25), at least one of two
    assert np.bincount(labels[split.train]).tolist() == [12, 4, 1]
    assert sorted([*split.train, *split.val]) == list(range(23))
    assert split.redrawn
    assert np.bincount(labels[split.meta]).tolist() == [1, 1, 1]  # the smallest class has one
    assert set(split.meta) <= set(split.train)


def test_a_meta_set_is_held_out_where_asked_for():
    labels = np.repeat([0, 1, 2], [16, 8, 3])
    split = natural(labels, meta_fraction=0.2)
    assert np.bincount(labels[split.val]).tolist() == [4, 2, 1]
    assert np.bincount(labels[split.meta]).tolist() == [2, 1, 1]  # rint(2.4), rint(1.2), at least one
    assert sorted([*split.train, *split.val, *split.meta]) == list(range(27))
    assert not split.redrawn
    most = natural(np.repeat([0, 1], [90, 9]), meta_fraction=0.5, val_fraction=0.0)
    assert len(most.meta) == 4  # meta_images_per_class of each, at most
    groups = ["a"] * 8 + [f"b{i // 2}" for i in range(8)]
    split = natural(np.repeat([1, 0], [8, 8]), groups=groups, val_fraction=0.0)
    assert split.redrawn
    with pytest.raises(UserError, match=r"class 'class1' has no meta image; .*, or set data.meta_fraction = 0$"):
        natural(np.repeat([1, 0], [8, 8]), groups=groups, val_fraction=0.0, meta_fraction=0.2)


def test_splits_that_the_data_brings_are_kept():
    labels = np.array([0, 0, 0, 1, 1, 1, 0, 1, 0, 1])
    given = ["train"] * 6 + ["val", "val", "meta", "meta"]
    split = natural(labels, given)
    assert (split.train.tolist(), split.val.tolist(), split.meta.tolist()) == ([*range(6)], [6, 7], [8, 9])
    assert not split.redrawn


def test_a_larger_imbalance_factor_makes_it_longer():
    labels = np.repeat([0, 1, 2, 3], [8, 100, 90, 30])
    split = natural(labels, val_fraction=0.0, imbalance_factor=8.0)
    # Most images first: 1, 2, 3, 0 may have 100, 100 / 2, 100 / 4, 100 / 8 of them.
    assert np.bincount(labels[split.train]).tolist() == [8, 100, 50, 25]


def test_a_class_without_an_image_is_refused():
    with pytest.raises(UserError, match="class 'class1' has no training image"):
        natural([0, 0, 1], ["train", "train", "val"])
    with pytest.raises(UserError, match="class 'class0' has no meta image"):
        natural([0, 0, 1, 1], ["train", "train", "train", "meta"])


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["", "a", "b", "c", "d"])), min_size=1, max_size=60),
    st.floats(0.01, 0.9),
    st.integers(0, 9),
)
def test_hold_out_keeps_groups_together_and_a_record_of_every_class(records, fraction, seed):
    labels = np.array([label for label, _ in records])
    groups = [group for _, group in records]
    held = longtail.hold_out(labels, 5, groups, fraction, seed)
    chex.assert_trees_all_equal(held, longtail.hold_out(labels, 5, groups, fraction, seed))
    for group in set(groups) - {""}:
        assert len({bool(held[i]) for i, g in enumerate(groups) if g == group}) == 1
    assert set(labels[~held]) == set(labels)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0.01, 0.9), st.integers(0, 9))
def test_without_groups_every_class_gives_its_share(labels, fraction, seed):
    labels = np.array(labels)
    counts, held = np.bincount(labels, minlength=5), longtail.hold_out(labels, 5, [""] * len(labels), fraction, seed)
    share = np.minimum(np.maximum(np.rint(fraction * counts), 1), counts - 1)
    assert np.bincount(labels[held], minlength=5).tolist() == np.maximum(share, 0).tolist()


def test_a_class_whose_records_are_one_group_is_not_held_out():
    held = longtail.hold_out(np.array([0, 0, 0, 1, 1]), 2, ["x", "x", "x", "", ""], 0.5, 0)
    assert not held[:3].any()
    assert held[3:].sum() == 1
