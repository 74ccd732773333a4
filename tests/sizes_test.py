"""Batch sizes above what the data has: cut in training, reported, recorded, and no difference to a run that goes on."""

import pytest
from helpers import changed, configured
from hypothesis import given
from hypothesis import strategies as st

from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax.config import Config
from mfm_jax.data import sizes
from mfm_jax.errors import UserError
from mfm_jax.methods.table import METHODS
from mfm_jax.training import preflight
from mfm_jax.workdir.files import Workdir


def manifest(train: list[int], meta: list[int], per_class: int = 10) -> dict:
    """Returns what is read of a manifest."""
    splits = {"train": {"class_counts": train}, "meta": {"class_counts": meta}}
    return {"splits": splits, "meta_images_per_class": per_class}


SMALL = manifest([20, 14, 8], [8, 8, 8])
TRAIN = "train.batch_size = {}: there are 42 training images; {} is used".format  # asked for, used
META = "meta.batch_size = {}: there are 24 images in the meta set; {} is used".format


def sized(train: int, meta: int, method: str = "mfm", **overrides) -> Config:
    return configured(method, train__batch_size=train, meta__batch_size=meta, **overrides)


@pytest.mark.parametrize(
    ("asked", "overrides", "used", "told"),
    [
        ((42, 24), {}, (42, 24), ""),
        ((43, 25), {}, (42, 24), f"{TRAIN(43, 42)}; {META(25, 24)}"),
        ((50, 8), {}, (42, 8), TRAIN(50, 42)),
        ((8, 50), {}, (8, 24), META(50, 24)),
        ((50, 50), {"method": "ce"}, (42, 50), TRAIN(50, 42)),
        ((8, 50), {"meta__freeze": True}, (8, 50), ""),
        ((50, 8), {"train__accumulate": 4}, (40, 8), TRAIN(50, 40)),
        ((60, 8), {"train__accumulate": 50}, (42, 8), TRAIN(60, 42)),
    ],
)
def test_sizes_by_hand(asked, overrides, used, told):
    config = sized(*asked, **overrides)
    fitting = sizes.cut(config, SMALL)
    assert (fitting.train.batch_size, fitting.meta.batch_size) == used
    assert sizes.in_words(config, SMALL) == told
    same = {"train": {"batch_size": 1}, "meta": {"batch_size": 1}}
    assert changed(fitting, **same) == changed(config, **same)


def test_a_meta_set_gives_as_many_of_each_class_as_its_smallest_has():
    assert sizes.limits(sized(1, 1), manifest([9, 9], [3, 5]))["meta.batch_size"] == (6, "images in the meta set")
    assert sizes.limits(sized(1, 1), manifest([9, 9], [5, 5], per_class=2))["meta.batch_size"][0] == 4
    data = data_lib.build(sized(1, 1))
    assert sizes.limits(sized(1, 1), data.manifest) == {
        "train.batch_size": (len(data.train_labels), "training images"),
        "meta.batch_size": (data.meta_table(0).size, "images in the meta set"),
    }


counts = st.lists(st.integers(1, 30), min_size=2, max_size=5)


@given(counts, counts, st.integers(1, 200), st.integers(1, 200), st.integers(1, 4))
def test_a_cut_size_fits_and_is_cut_no_further(train, meta, batch, meta_batch, parts):
    config, data = sized(batch, meta_batch, train__accumulate=parts), manifest(train, meta)
    fitting = sizes.cut(config, data)
    for field, (most, _) in sizes.limits(config, data).items():
        group = field.partition(".")[0]
        asked, used = (getattr(one, group).batch_size for one in (config, fitting))
        assert 1 <= used <= min(asked, most)
        assert used == asked or used > most - parts
    assert sizes.cut(fitting, data) == fitting
    assert (sizes.in_words(config, data) == "") == (fitting == config)
    assert sizes.in_words(fitting, data) == ""


@pytest.mark.parametrize("method", METHODS)
def test_the_meta_set_is_read_by_methods_that_have_a_learner(method):
    assert config_lib.Method(name=method).meta_learned == (METHODS[method].learner is not None)


def test_what_is_refused_is_refused_at_once():
    config = sized(1000, 500, augment__pad=8, meta__freeze=False)
    with pytest.raises(UserError) as error:
        preflight.check(config, data_lib.build(config), None)
    assert [part.partition(":")[0] for part in str(error.value).split("; ")][::2] == [
        "augment.pad = 8",
        "train.batch_size = 1000",
        "meta.batch_size = 500",
    ]


def test_a_run_goes_on_with_the_sizes_that_were_asked_for(tmp_path):
    """What was asked for and what was cut are one run; a size below the limit is another."""
    asked, data = sized(1000, 500), data_lib.build(sized(1, 1))
    workdir = Workdir(tmp_path)
    workdir.begin(sizes.cut(asked, data.manifest), data.manifest, {})
    most = len(data.train_labels)
    assert workdir.read_config().train.batch_size == most
    for config in (asked, sizes.cut(asked, data.manifest), sized(most, 500), sized(2000, 101)):
        workdir.claim(config)
        assert workdir.changes(config) == []
    for config, told in ((sized(50, 500), f"{most} -> 50"), (sized(1000, 99), "meta.batch_size: 100 -> 99")):
        with pytest.raises(UserError, match=f"belongs to another config .*{told}"):
            workdir.claim(config)
