"""Parts of the user's own in the whole trainer: by import path and by object, from training to an exported file."""

import csv
import json
import os
import signal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import own_parts
import pytest
from flax import nnx
from helpers import arrays, overridden, stored, tiny
from PIL import Image

import mfm_jax as mfm
from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax import predict
from mfm_jax.bilevel import passes
from mfm_jax.config import Own
from mfm_jax.data import own as own_source
from mfm_jax.errors import UserError
from mfm_jax.export import export
from mfm_jax.machine import parallel
from mfm_jax.machine.interruption import Interrupted
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.workdir.files import Workdir

PATHS = {
    "model__name": "own_parts:Linen",
    "data__source": "own_parts:source",
    "method__loss": "own_parts:loss",
    "method__learner": "own_parts:learner",
}
SHAPE = (own_parts.SIDE, own_parts.SIDE, 1)


def plain(**overrides):
    """Returns the config of two epochs of three steps on the images of `own_parts`, of cross-entropy."""
    config = tiny(model__name="own_parts:Bare", model__width=0, method__name="ce", train__batch_size=8)
    config.data.update(source="own_parts:source", imbalance_factor=4.0, val_images_per_class=2)
    config.meta.update(images_per_class=4, batch_size=16, every=2)
    return overridden(config, **overrides)


def by_path():
    """Returns the config that names all four parts."""
    return plain(method__name="own_learner", method__base="own_loss", **PATHS)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of all four parts by import path."""
    workdir = tmp_path_factory.mktemp("own") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        results = mfm.train_and_evaluate(by_path(), workdir)
    assert np.isfinite(results["last"]["test"]["nll"])
    return workdir


@pytest.fixture(scope="module")
def data():
    return data_lib.build(config_lib.resolve(plain()))


def built(data, mesh=None, *, own=Own(), **overrides):  # noqa: B008 (frozen)
    return experiment_lib.build(config_lib.resolve(plain(**overrides), own), data, mesh)


# --- by import path -------------------------------------------------------------------------------


def test_the_run_says_which_parts_it_had(run):
    told = json.loads((run / "config.json").read_text())
    for field, path in PATHS.items():
        group, name = field.split("__")
        assert told[group][name] == path
    assert json.loads((run / "manifest.json").read_text())["dataset"] == "rows"
    assert "own_parts:Linen" in (run / "report.html").read_text()


def test_interrupted_and_resumed_is_bit_identical(run, tmp_path, stepping):
    def act(step, data):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return data

    stepping(act)
    with pytest.raises(Interrupted, match="saved at step 4"):
        mfm.train_and_evaluate(by_path(), tmp_path)
    stepping(lambda step, data: data)
    mfm.train_and_evaluate(by_path(), tmp_path)
    chex.assert_trees_all_equal(stored(tmp_path), stored(run))


def test_predicts_and_exports_as_it_was_tested(run, tmp_path):
    images, labels = own_parts.arrays(5, 1000)
    probabilities = mfm.load(run).probabilities(images[..., None])
    told = json.loads((run / "results.json").read_text())["last"]["test"]["accuracy"]
    assert (probabilities.argmax(1) == labels).mean() == pytest.approx(told)
    Image.fromarray(images[0]).save(tmp_path / "one.png")
    predict.write_csv(mfm.load(run), [tmp_path / "one.png"], tmp_path / "out.csv", workers=0)
    (row,) = csv.DictReader((tmp_path / "out.csv").read_text().splitlines())
    assert float(row["probability"]) == pytest.approx(probabilities[0].max(), abs=1e-5)
    export(run, tmp_path / "exported")  # compares the file's probabilities with the checkpoint's
    assert json.loads((tmp_path / "exported" / "classifier.json").read_text())["method"] == "own_learner"


class Counting(nn.Module):
    """Needs the batch size as a number."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(own_parts.CLASSES)(x.reshape(len(x), -1))


def test_a_module_that_needs_the_batch_size_is_told(tmp_path, one_device):
    mfm.train_and_evaluate(plain(train__max_steps=1), tmp_path, module=Counting())
    with pytest.raises(UserError, match=r"model.name = 'given': fails where the batch size is free \(TypeError: .*len"):
        export(tmp_path, tmp_path / "exported", module=Counting())


@pytest.mark.slow
def test_compares_in_processes_of_their_own(tmp_path, processes):
    from mfm_jax import compare

    results, failed, _ = compare.run_all(by_path(), ["ce", "own_learner"], [0], tmp_path)
    assert not failed
    assert set(results) == {"ce", "own_learner"}


# --- by object ------------------------------------------------------------------------------------


def test_objects_that_can_be_imported_are_recorded_by_path(tmp_path, one_device):
    objects = {"loss": own_parts.loss, "learner": own_parts.learner, "source": own_parts.source}
    config = plain(method__name="own_learner", method__base="own_loss", train__epochs=1)
    mfm.train_and_evaluate(config, tmp_path, module=own_parts.NNX, **objects)
    told = Workdir(tmp_path).read_config()
    assert (told.model.name, told.data.source) == ("own_parts:NNX", "own_parts:source")
    assert (told.method.loss, told.method.learner) == ("own_parts:loss", "own_parts:learner")
    export(tmp_path, tmp_path / "exported")  # from the path alone
    assert set(stored(tmp_path).batch_stats["norm"]) == {"mean", "var"}


def test_objects_that_cannot_be_imported_are_passed_again(tmp_path, one_device):
    class Local(own_parts.Bare):
        pass

    config = plain(train__max_steps=1)
    source = own_parts.source(config_lib.Data())
    mfm.train_and_evaluate(config, tmp_path, module=Local(own_parts.CLASSES), source=source)
    told = Workdir(tmp_path).read_config()
    assert (told.model.name, told.data.source) == ("given", "given")
    message = (
        r"model.name = 'given': an object that no import path leads to; pass it from Python, module=\.\.\., or put"
    )
    with pytest.raises(UserError, match=message):
        mfm.load(tmp_path)
    with pytest.raises(UserError, match=message):
        mfm.train_and_evaluate(told, tmp_path)
    image = np.zeros((1, *SHAPE), np.uint8)
    expected = mfm.load(tmp_path, module=Local).probabilities(image)
    export(tmp_path, tmp_path / "exported", module=Local)
    # From now on by its path, in whose place only the user can put it.
    overridden(config, model__name="own_parts:Bare")
    mfm.train_and_evaluate(config, tmp_path, source=source)
    assert Workdir(tmp_path).read_config().model.name == "own_parts:Bare"
    np.testing.assert_array_equal(mfm.load(tmp_path).probabilities(image), expected)


def test_a_module_that_has_changed_since_is_told(run):
    message = r"model.name = 'own_parts:Bare': its \['BatchNorm_0'\]\['bias'\] is absent, and was \[8\] in the run"
    with pytest.raises(UserError, match=message):
        mfm.load(run, module=own_parts.Bare)


# --- NNX ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nnx_pass():
    """The pass of the NNX module, its state, and a batch."""
    module, tx = mfm.from_nnx(own_parts.NNX, own_parts.CLASSES), optax.sgd(0.1)
    image = jax.random.normal(jax.random.key(1), (16, *SHAPE))
    variables = module.init(passes.rngs(jax.random.key(0)), image)
    modulator = mfm.modulation.direct({"hidden": 8})
    state = mfm.init_state(jax.random.key(2), variables, tx, modulator.init)
    phi = jax.tree.map(lambda leaf: leaf + 0.5, state.phi)
    return mfm.Pass.of(module), state.replace(phi=phi), mfm.Batch(image, jnp.arange(16) % 4), modulator


def test_nnx_statistics_are_those_of_the_batch(nnx_pass):
    """NNX cuts the derivative by which they are told from running averages; without it these would be the latter."""
    forward, state, batch, _ = nnx_pass
    first = state.params["first"]
    hidden = np.asarray(batch.image.reshape(16, -1) @ first["kernel"] + first["bias"][None, :])
    found = forward.statistics(state, state.params, batch)["norm"]
    np.testing.assert_allclose(found["mean"], hidden.mean(0), atol=1e-5)
    np.testing.assert_allclose(found["var"], hidden.var(0), rtol=1e-4)


def test_nnx_averages_describe_the_plain_network(nnx_pass):
    """With a modulation before the batch norm, of which the training pass has the statistics of a modulated network."""
    forward, state, batch, modulator = nnx_pass
    step = mfm.make_plain_step(forward, mfm.losses.cross_entropy, optax.sgd(0.1), modulator)
    found = step(state, batch)[0].batch_stats["norm"]
    modulated = forward.logits(
        state, state.params, batch, lambda labels: mfm.modulation.modulate(modulator, state.phi, labels), train=True
    )[1]["norm"]
    expected = forward.averages(state, state.params, batch)["norm"]
    for name in ("mean", "var"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)
        assert np.abs(found[name] - modulated[name]).max() > 1e-4


def test_random_streams_differ_from_step_to_step(nnx_pass):
    linen = own_parts.Linen(own_parts.CLASSES)
    for module in (linen, mfm.from_nnx(own_parts.NNX, own_parts.CLASSES)):
        _, state, batch, _ = nnx_pass
        switch = {"deterministic": True} if module is linen else {}
        variables = module.init(passes.rngs(jax.random.key(0)), batch.image, **switch)
        state = mfm.init_state(jax.random.key(2), variables, optax.sgd(0.1))
        forward = mfm.Pass.of(module)
        first, again, second = (
            forward.logits(state.replace(step=jnp.int32(step)), state.params, batch, train=True)[0]
            for step in (0, 0, 1)
        )
        np.testing.assert_array_equal(first, again)
        assert np.abs(first - second).max() > 1e-3


def test_noise_has_a_key_of_its_own():
    """A stream that nobody names still moves with the step, in linen and in NNX."""

    class Noise(nn.Module):
        @nn.compact
        def __call__(self, x):
            return self.make_rng("noise"), self.make_rng("dropout")

    class NoiseNNX(nnx.Module):
        def __init__(self, *, rngs):
            self.rngs = rngs
            self.kernel = nnx.Param(jnp.zeros(1))

        def __call__(self, x):
            return jnp.stack([self.rngs.noise(), self.rngs.dropout()])

    for module in (Noise(), nnx.bridge.ToLinen(NoiseNNX, metadata_fn=None)):
        variables = module.init(passes.rngs(jax.random.key(0)), jnp.zeros(1))
        keys = [module.apply(variables, jnp.zeros(1), rngs=passes.rngs(jax.random.key(k))) for k in (0, 1)]
        numbers = [np.asarray(jax.random.key_data(key)).tobytes() for pair in keys for key in pair]
        assert len(set(numbers)) == 4


# --- a batch that is a dict -----------------------------------------------------------------------


class Masked(nn.Module):
    """Reads an image and a mask that says which of its pixels count."""

    @nn.compact
    def __call__(self, x, modulate=mfm.no_modulation):
        seen = jnp.where(x["mask"], x["image"], 0.0)
        return modulate("logits", nn.Dense(3)(seen))


def test_a_dict_of_arrays_goes_to_the_module_as_it_is():
    """In one piece, in two parts, and padded over eight devices: the same step."""
    rng = np.random.default_rng(0)

    def batch(size):
        image = {"image": rng.normal(size=(size, 5)).astype(np.float32), "mask": rng.random((size, 5)) < 0.5}
        return mfm.Batch(image, (np.arange(size) % 3).astype(np.int32))

    module, tx, phi_tx, modulator = Masked(), optax.sgd(0.1), optax.sgd(0.1), mfm.modulation.direct({"logits": 3})
    given = batch(12), batch(6)
    variables = module.init(jax.random.key(1), given[0].image)
    state = mfm.init_state(jax.random.key(0), variables, tx, modulator.init, phi_tx)

    def step(**fields):
        return mfm.make_step(mfm.Pass.of(module, **fields), mfm.losses.cross_entropy, tx, modulator, phi_tx)

    mesh = parallel.data_mesh()
    spread = jax.jit(parallel.shard_step(step(axis_name=parallel.AXIS), mesh, batches=2))
    expected = arrays(step()(state, *given)[0])
    for taken in (step(parts=2), spread):
        chex.assert_trees_all_close(arrays(taken(state, *given)[0]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kinds", [{"image": np.uint8}, {"tokens": np.int32}, {"image": np.float32, "raw": np.uint8}])
def test_a_dict_of_images_as_stored_is_refused(kinds):
    image = {name: np.zeros((2, 3), kind) for name, kind in kinds.items()}
    state = mfm.init_state(jax.random.key(0), {"params": {}}, optax.sgd(0.1))
    with pytest.raises(UserError, match=r"Batch.image: .*; normalise the images"):
        mfm.Pass(lambda *_, **__: None, switch=None).logits(state, {}, mfm.Batch(image, np.zeros(2)), train=True)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_package:Net", r"no_such_package cannot be imported \(ModuleNotFound"),
        ("own_parts:Nothing", "own_parts has no Nothing"),
        ("own-parts:Net", "allowed: .* an import path package.module:name"),
    ],
)
def test_a_path_that_leads_nowhere(path, message, tmp_path):
    with pytest.raises(UserError, match=f"model.name = '{path}': {message}"):
        mfm.train_and_evaluate(plain(model__name=path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Wide(nn.Module):
    """A logit too many."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(own_parts.CLASSES + 1)(x.reshape(x.shape[0], -1))


class Fails(nn.Module):
    def __call__(self, x):
        raise RuntimeError("a mistake\nof two lines")


class Unswitched(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(own_parts.CLASSES)(nn.BatchNorm(use_running_average=False)(x.reshape(x.shape[0], -1)))


class Keeps(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.variable("cache", "seen", jnp.zeros, ())
        return nn.Dense(own_parts.CLASSES)(x.reshape(x.shape[0], -1))


class Otherwise(nn.Module):
    @nn.compact
    def __call__(self, x, training=False):
        return nn.Dense(own_parts.CLASSES)(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (own_parts.NOT_A_PART, "gives a int; give a Flax module, or a callable num_classes -> module"),
        (own_parts.arrays, "fails when called with num_classes: TypeError: .*seed"),
        (lambda num_classes: num_classes, "gives a int; give a Flax module"),
        (Wide(), r"returns float32 \[2, 5\] for 2 images; return logits \[2, 4\]"),
        (Fails(), r"fails on images float32 \[2, 6, 6, 1\]: RuntimeError: a mistake$"),
        (Unswitched(), "has batch statistics and no argument `train`"),
        (Keeps(), "has variables in cache; only params and batch_stats are kept"),
        (Otherwise(), "its argument `training` would never be set; call it `train`"),
        (nnx.eval_shape(lambda: own_parts.NNX(4, rngs=nnx.Rngs(0))), "is an NNX instance; give its class, or mfm_"),
    ],
)
def test_a_module_that_is_none(module, message, data):
    with pytest.raises(UserError, match=f"^model.name = '.*': .*{message}"):
        built(data, own=Own(module=module))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"method__name": "mfm"}, "'mfm': needs the site 'logits', and your module calls none; add x = mod"),
        ({"method__name": "l2ac"}, "needs the site 'logits'"),
        ({"method__name": "metasaug", "method__first_stage": 0.5}, "needs the last layer.*'pooled'"),
        ({"method__name": "crt", "method__first_stage": 0.5}, "'crt': needs the last layer; call your module's last n"),
        ({"method__name": "ldam"}, "needs the last layer.*'pooled'"),
        ({"method__name": "glmc"}, "method.name = 'glmc': needs the site 'pooled'"),
        ({"method__name": "glmc"}, "the projection of 'glmc': needs the last layer"),
        ({"method__name": "posthoc_la"}, "method.name = 'posthoc_la': needs the last layer"),
        ({"model__tune": "head"}, "model.tune = 'head': needs the last layer"),
        ({"optim__head_max_norm": 1.0}, "optim.head_max_norm = 1.0: needs the last layer"),
        ({"optim__head_decay": 0.1}, "optim.head_decay = 0.1: needs the last layer"),
        ({"method__name": "meta_weight_net", "meta__virtual": "head"}, "meta.virtual = 'head': needs the last layer"),
        ({"meta__virtual": "last_stage"}, "meta.virtual = 'last_stage': not known of model.name = 'own_parts:Bare'"),
        ({"model__remat": True}, "model.remat = True: .* has no field `remat`"),
        ({"train__dtype": "bfloat16"}, "train.dtype = 'bfloat16': .* has no field `dtype`"),
        ({"model__width": 8}, "model.width = 8: not read with model.name = 'own_parts:Bare', your own"),
        ({"model__pretrained": "x.npz"}, "model.pretrained = 'x.npz': not read with model.name"),
    ],
)
def test_what_a_bare_module_cannot_be_used_for(overrides, message, data):
    with pytest.raises(UserError, match=message):
        built(data, **overrides)


@pytest.mark.parametrize("name", ["ce", "focal", "meta_weight_net", "oversample", "progressive"])
def test_a_bare_module_serves_methods_without_modulation(name, data):
    assert jax.eval_shape(built(data, method__name=name).init).params["Dense_0"]["kernel"].shape == (36, 4)


def test_batch_norm_over_several_devices(data):
    mesh, names = parallel.data_mesh(), {"model__name": "own_parts:Linen"}
    with pytest.raises(UserError, match=r"parallel.batch_norm = 'sync': your module has batch norm and no field `ax"):
        built(data, mesh, **names)
    with pytest.raises(UserError, match=r"train.batch_size = 12: does not divide by 8 devices, and your module has"):
        built(data, mesh, train__batch_size=12, **names)
    assert built(data, mesh, parallel__batch_norm="local", **names).meta_step is None
    assert built(data, mesh, train__batch_size=12).meta_step is None  # no batch norm, any size


def zeros(*shape, kind=np.uint8):
    return np.zeros(shape, kind)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ((zeros(4, 6, 6, kind=np.float32), zeros(4, kind=int)), r"train images are float32 \(4, 6, 6, 1\); give uint8"),
        ((zeros(0, 6, 6), zeros(0, kind=int)), r"labels of train are int64 \(0,\); give integers"),
        ((zeros(4, 6, 6), zeros(3, kind=int)), r"train labels are int32 \(3,\); give int32 \(4,\)"),
        ((zeros(4, 6, 6), zeros(4)), None),
        ((zeros(4, 6, 6), zeros(4, kind=float)), r"labels of train are float64 \(4,\); give integers"),
        ((zeros(4, 6, 6), zeros(4, kind=int) - 1), "train labels are -1 to -1, with 2 class names"),
        ((zeros(4, 5, 5), zeros(4, kind=int)), "images differ in shape"),
    ],
)
def test_arrays_that_are_no_source(train, message):
    test = zeros(2, 6, 6), np.arange(2)
    if message is None:
        source = mfm.source_of_arrays(train, test, val=test, class_names=("a", "b"))
        assert (source.train_images.shape, source.class_names) == ((6, 6, 6, 1), ("a", "b"))
        assert source.given.tolist() == ["train"] * 4 + ["val"] * 2
    else:
        with pytest.raises(UserError, match=f"source_of_arrays: .*{message}"):
            mfm.source_of_arrays(train, test)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda data: 3, "gives a int; give a Source"),
        (lambda data: data.no_such_field, "fails when called with the fields of `data`: AttributeError"),
    ],
)
def test_a_source_that_is_none(source, message):
    with pytest.raises(UserError, match=f"data.source = 'given': {message}"):
        data_lib.build(config_lib.resolve(plain(), Own(source=source)))


def test_an_own_source_has_the_size_that_is_asked_for():
    config = config_lib.Data(source="own_parts:source", image_size=3)
    assert own_source.load(own_parts.source, config).train_images.shape == (80, 3, 3, 1)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"loss": 3}, "method.loss = 'given': is of type int; name a function"),
        ({"loss": lambda logits, labels: logits.mean()}, r"method.loss = 'given': returns float32 \[\] for 5 examples"),
        ({"loss": lambda logits, labels: labels}, r"returns int32 \[5\] for 5 examples; return the loss of each"),
        ({"loss": lambda logits: logits}, "fails on logits .*TypeError"),
        ({"learner": mfm.MetaLearner("w", lambda key: {}, lambda *_: 1 / 0)}, "a step with it fails: ZeroDivision"),
        ({"learner": lambda *_: 3}, "method.learner = 'given': makes a int; make a MetaLearner or a Modulator"),
        ({"learner": mfm.MetaLearner("w", lambda key: jnp.zeros(2))}, "its phi is one array; put it in a dict"),
        ({"learner": mfm.MetaLearner("w", lambda: {})}, r"its init\(key\) fails: TypeError"),
        ({"learner": lambda config: 3}, "fails when called with .config, counts, channels.: TypeError"),
        ({"learner": mfm.MetaLearner("w", lambda key: {}, per_batch=lambda y: y)}, "its phi belongs to one batch; set"),
    ],
)
def test_a_loss_or_learner_that_is_none(own, message, data):
    (part,) = own
    with pytest.raises(UserError, match=message):
        built(data, own=Own(**own), method__name=f"own_{part}", model__name="own_parts:Linen")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"method__name": "own_loss"}, "method.loss: missing; method.name = 'own_loss' needs its import path"),
        ({"method__name": "mfm", "method__base": "own_loss"}, "method.loss: missing; method.base = 'own_loss' needs"),
        ({"method__loss": "a:b"}, "method.loss = 'a:b': not read with method.name = 'ce'; set method.name, or"),
        ({"method__learner": "a:b", "method__name": "mfm"}, "method.learner = 'a:b': not read with method.name = 'mfm"),
    ],
)
def test_parts_that_nothing_names_or_nothing_reads(overrides, message):
    with pytest.raises(UserError, match=message):
        config_lib.resolve(plain(**overrides))


def test_a_run_of_a_built_in_model_takes_no_module(trained_run):
    with pytest.raises(UserError, match=r"module: the run in .* has model.name = 'resnet8'; leave module out"):
        mfm.load(trained_run.workdir, module=own_parts.Bare)


def test_a_run_does_not_go_on_with_another_module(run):
    with pytest.raises(UserError, match=r'another config \(model.name: "own_parts:Linen" -> "own_parts:NNX"\)'):
        mfm.train_and_evaluate(by_path(), run, module=own_parts.NNX)
