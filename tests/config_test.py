"""Config files in, frozen dataclasses out; a mistake is one line."""

import dataclasses
import json
import math
import runpy

import ml_collections
import pytest
from helpers import OWN, REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from mfm_jax import config as config_lib
from mfm_jax.config import FIELDS, Config
from mfm_jax.errors import UserError
from mfm_jax.fields import Bounds

FILES = sorted((REPOSITORY / "configs").glob("*.py"))


def override(path: str, value) -> dict:
    group, name = path.split(".")
    return {group: {name: value}}


def refusal(config) -> str:
    """Returns the one line that `resolve` refuses `config` with."""
    with pytest.raises(UserError) as caught:
        config_lib.resolve(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_go_round():
    assert config_lib.resolve(config_lib.default()) == config_lib.resolve({}) == Config()
    assert config_lib.resolve(Config().to_dict()) == Config()
    through_json = json.loads(json.dumps(Config().to_dict()))
    assert config_lib.resolve(through_json) == Config()


def test_a_field_that_a_config_file_invents_is_refused_with_those_that_exist():
    config = config_lib.default()
    config.parallel.depth = 3
    assert refusal(config) == "parallel.depth: no such field; allowed: parallel.batch_norm, parallel.fsdp"


def test_the_default_config_keeps_its_types():
    with pytest.raises(TypeError):
        config_lib.default().train.epochs = "ten"


def test_the_result_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_lib.resolve({}).train.epochs = 3
    assert hash(config_lib.resolve({})) == hash(Config())


def test_there_are_config_files():
    assert {"cifar10_lt.py", "digits_lt.py"} <= {file.name for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_file_resolves(file):
    config = runpy.run_path(str(file))["get_config"]()
    assert isinstance(config, ml_collections.ConfigDict)
    resolved = config_lib.resolve(config)
    assert resolved != Config()
    assert resolved.to_dict() == config.to_dict()  # no value was left behind


def test_what_is_given_replaces_the_default_and_nothing_else():
    resolved = config_lib.resolve({"optim": {"learning_rate": 0.25}, "train": {"epochs": 7}})
    assert resolved == dataclasses.replace(
        Config(),
        optim=dataclasses.replace(Config().optim, learning_rate=0.25),
        train=dataclasses.replace(Config().train, epochs=7),
    )


def test_an_integer_is_welcome_where_a_float_is_due():
    value = config_lib.resolve({"data": {"imbalance_factor": 50}}).data.imbalance_factor
    assert (value, type(value)) == (50.0, float)


# --- refusals -------------------------------------------------------------------------------------


def test_every_field_is_declared_with_a_default_of_its_type_and_a_meaning():
    assert list(FIELDS) == [f"{group}.{name}" for group, fields in Config().to_dict().items() for name in fields]
    for field in FIELDS.values():
        assert type(field.default) is field.kind
        assert field.checked(field.default) == field.default
        assert field.meaning == " ".join(field.meaning.split())
        assert len(field.meaning) > 3


def test_a_field_by_value():
    meaning = "over all devices together; at most what the meta set has"
    assert FIELDS["meta.batch_size"] == ("meta.batch_size", int, 100, (), Bounds(1), meaning, False, False)
    assert FIELDS["eval.batch_size"].bounds == Bounds(1)
    assert FIELDS["eval.batch_size"].may_change
    assert FIELDS["meta.loss"].choices == ("ce", "gce", "cost")
    assert FIELDS["meta.loss"].kind is str
    assert FIELDS["meta.loss"].bounds is None


def test_unknown_fields():
    assert refusal({"optimizer": {}}) == (
        "optimizer: no such field; allowed: data, augment, model, method, modulation, meta, optim, train, parallel,"
        " eval, checkpoint"
    )
    assert refusal({"parallel": {"depth": 3}}) == (
        "parallel.depth: no such field; allowed: parallel.batch_norm, parallel.fsdp"
    )
    assert refusal({"model": "resnet32"}) == "model = 'resnet32': expected a group of fields"


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_refuses_another_type(path):
    kind = FIELDS[path].kind
    for wrong in [["x"], None, 1 if kind in (bool, str) else "1", 1 if kind is bool else True]:
        message = refusal(override(path, wrong))
        assert message == f"{path} = {wrong!r}: expected {kind.__name__}, got {type(wrong).__name__}"


# What some choices ask of other fields.
NEEDED = {
    "l2rw": {"meta": {"lagged": False}},
    "resized": {"data": {"source": "folder"}},
    **{tune: {"model": {"name": "vit_b16"}} for tune in ("adapters", "lora")},
    "balanced": {"augment": {"mixup": 0.4}},  # partners
    "cost": {"eval": {"costs": "a>b=2"}},
    "rotation": {"method": {"name": "ce"}},
    **{name: {"method": fields} for name, fields in OWN.items()},
}


@pytest.mark.parametrize("path", [path for path, field in FIELDS.items() if field.choices])
def test_every_choice_is_accepted_and_no_other(path):
    choices = FIELDS[path].choices
    assert len(choices) > 1
    for choice in choices:
        group, name = path.split(".")
        given = override(path, choice)
        for other, values in NEEDED.get(choice, {}).items():
            given[other] = given.get(other, {}) | values
        assert getattr(getattr(config_lib.resolve(given), group), name) == choice
    allowed = [*sorted(choices), *["an import path package.module:name"] * FIELDS[path].own]
    assert refusal(override(path, "nonsense")) == f"{path} = 'nonsense': allowed: {', '.join(allowed)}"


@pytest.mark.parametrize("path", ["model.name", "data.source", "method.loss", "method.learner"])
def test_a_part_of_ones_own_has_an_import_path(path):
    assert FIELDS[path].own
    for value in ("a:B", "a.b_c:D.e", "given"):
        assert FIELDS[path].checked(value) == value
    for value in ("a:", ":b", "a-b:c", "a b:c", "a:b:c", "Given"):
        assert refusal(override(path, value)).endswith("an import path package.module:name")


@pytest.mark.parametrize("path", [path for path, field in FIELDS.items() if field.kind in (int, float)])
def test_every_number_has_bounds_that_are_enforced(path):
    field = FIELDS[path]
    kind, low, high = field.kind, field.bounds.low, field.bounds.high
    assert low <= field.default <= high
    bound = f"{low:.10g} or more" if high == math.inf else f"{low:.10g} to {high:.10g}"
    outside = [kind(low - 1)] + ([] if high == math.inf else [kind(high + 1)])
    if kind is float:
        outside += [math.nan, math.inf]
    for value in outside:
        assert refusal(override(path, value)) == f"{path} = {value!r}: allowed: {bound}"
    config_lib.resolve(override(path, kind(low)))  # the bound itself is allowed


def test_the_bounds_that_matter_by_value():
    assert refusal({"data": {"imbalance_factor": 0.5}}) == "data.imbalance_factor = 0.5: allowed: 1 or more"
    assert refusal({"optim": {"momentum": 1.5}}) == "optim.momentum = 1.5: allowed: 0 to 0.9999"
    assert refusal({"meta": {"every": 0}}) == "meta.every = 0: allowed: 1 or more"


def test_what_a_model_does_not_have_is_refused():
    for tune in ("adapters", "lora"):
        assert refusal({"model": {"tune": tune}}) == (
            f"model.tune = {tune!r}: only the model.name vit_b16, clip_vit_b16, dinov2_vit_b14, dinov2_reg_vit_b14 can,"
            " not 'resnet32'; choose 'head' or 'all'"
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": {"name": "resnet8"}}, "model.scan_blocks = True: the stages of resnet8 have no equal blocks"),
        ({"model": {"name": "resnet10"}}, "model.scan_blocks = True: the stages of resnet10 have no equal blocks"),
        ({"parallel": {"fsdp": 2}}, "parallel.fsdp = 2: would divide stacked blocks"),
        (
            {"model": {"name": "vit_b16"}, "modulation": {"sites": "pooled,block11"}},
            "modulation.sites = 'pooled,block11': block11 is inside of scanned blocks",
        ),
        ({"model": {"name": "vit_b16"}, "meta": {"virtual": "last_stage"}}, "meta.virtual = 'last_stage': is one"),
        ({"model": {"name": "package.module:Name"}}, "model.scan_blocks = True: not read with model.name"),
    ],
)
def test_what_scanned_blocks_do_not_go_with(fields, message):
    fields = fields | {"model": {**fields.get("model", {}), "scan_blocks": True}}
    assert refusal(fields).startswith(message)
    config_lib.resolve(fields | {"model": {**fields["model"], "scan_blocks": False}})
    config_lib.resolve({"model": {"name": "vit_b16", "scan_blocks": True}, "modulation": {"sites": "block12,pooled"}})


def test_what_would_not_be_read_is_refused():
    assert refusal({"modulation": {"use_count": True}}) == (
        "modulation.use_count = True: only the form 'network' joins the count to its input, not 'frequency'"
    )
    assert refusal({"data": {"meta_fraction": 0.1}}) == (
        "data.meta_fraction = 0.1: not read under data.protocol = 'meta_held_out'; choose another protocol, or"
        " meta.images_per_class"
    )
    assert refusal({"data": {"protocol": "natural", "val_images_per_class": 5}}) == (
        "data.val_images_per_class = 5: not read under data.protocol = 'natural'; choose another protocol, or"
        " data.val_fraction"
    )


def test_validation_may_come_with_the_data():
    natural = {"protocol": "natural", "val_fraction": 0.0}
    assert config_lib.resolve({"data": natural | {"source": "npz"}, "eval": {"test": False}}).data.validates
    assert "there is nothing else to show" in refusal({"data": natural, "eval": {"test": False}})


@pytest.mark.parametrize("sites", ["", "stage3,", "pooled, pooled", ",logits"])
def test_sites_must_be_distinct_names(sites):
    message = f"modulation.sites = {sites!r}: expected distinct, comma-separated site names, SITE or SITE:FORM"
    assert refusal({"modulation": {"sites": sites}}) == message


def test_sites_are_split_and_stripped_in_order():
    assert config_lib.resolve({"modulation": {"sites": "stage3, pooled,stem"}}).sites == ("stage3", "pooled", "stem")


def test_a_site_may_have_a_form_of_its_own():
    config = config_lib.resolve({"modulation": {"sites": "stage3:network, pooled : direct,logits", "use_count": True}})
    assert config.forms == (("stage3", "network"), ("pooled", "direct"), ("logits", "frequency"))
    assert config.sites == ("stage3", "pooled", "logits")
    assert refusal({"modulation": {"sites": "pooled:film,logits"}}) == (
        "modulation.sites = 'pooled:film,logits': no form 'film'; allowed: frequency, direct, network"
    )
    given = {"sites": "pooled,logits:direct", "per_class": True}
    assert "at site 'logits' a row looked up by the label" in refusal({"modulation": given})


def test_values_that_do_not_go_together():
    per_class = {"per_class": True, "form": "direct", "sites": "pooled"}
    assert config_lib.resolve({"modulation": per_class}).modulation.per_class
    assert refusal({"modulation": per_class | {"form": "network"}}) == (
        "modulation.per_class = True: only the form 'direct' has one row a class, not 'network'"
    )
    assert refusal({"modulation": per_class | {"sites": "pooled,logits"}}) == (
        "modulation.per_class = True: at site 'logits' a row looked up by the label gives the label away;"
        " choose other modulation.sites"
    )
    assert refusal({"optim": {"warmup_epochs": 5}, "train": {"epochs": 5}}) == (
        "optim.warmup_epochs = 5: allowed: less than train.epochs = 5"
    )
    assert config_lib.resolve({"optim": {"warmup_epochs": 4}, "train": {"epochs": 5}}).optim.warmup_epochs == 4


# --- differences ----------------------------------------------------------------------------------


def test_differences_name_the_field_and_both_values():
    old = Config().to_dict()
    new = config_lib.resolve({"train": {"seed": 3}, "model": {"name": "resnet8"}, "data": {"train_on_meta": True}})
    assert [str(change) for change in config_lib.differences(old, new.to_dict())] == [
        "data.train_on_meta: false -> true",
        'model.name: "resnet32" -> "resnet8"',
        "train.seed: 0 -> 3",
    ]


def test_a_field_that_only_one_side_knows_differs():
    assert list(config_lib.differences({"a": {"x": 1}}, {"a": {"x": 1, "y": 2}})) == [("a.y", None, 2)]
    (change,) = config_lib.differences({"a": {"x": 1}}, {})
    assert str(change) == 'a: {"x": 1} -> null'


values = st.dictionaries(st.sampled_from("abc"), st.integers(0, 3) | st.booleans() | st.sampled_from(["x", "y"]))


@given(st.dictionaries(st.sampled_from("xyz"), values), st.dictionaries(st.sampled_from("xyz"), values))
def test_no_difference_exactly_between_equal_configs(old, new):
    assert not list(config_lib.differences(old, old))
    assert bool(list(config_lib.differences(old, new))) == (old != new)
