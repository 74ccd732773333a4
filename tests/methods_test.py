"""What every method must pass, on the embedded digits with a class of one image and a network of two layers.

The product of methods and real networks is in the slow tier; `train_test` runs the steps' options.
"""

import contextlib
import dataclasses
import json
import os
import signal
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import OWN, Tiny, arrays, configured, slow

from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax import models
from mfm_jax.bilevel import auxiliary, optim
from mfm_jax.data import augment
from mfm_jax.errors import UserError
from mfm_jax.evaluation import classifier, results
from mfm_jax.evaluation import facts as facts_lib
from mfm_jax.machine import interruption, parallel
from mfm_jax.methods.settings import Staged
from mfm_jax.methods.table import METHODS, objective
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.training import inputs, train
from mfm_jax.training import loop as loop_lib
from mfm_jax.training.run import Run
from mfm_jax.types import Batch
from mfm_jax.workdir.files import Workdir

pytestmark = pytest.mark.usefixtures("quick_runs")
create = models.create
ALL = list(METHODS)
STAGED = get_args(Staged)
# One of each kind for the quick tier, the others in the slow. A sampler and what is done after training show in whole
# runs; their steps are those of plain training.
LOSSES = ("ldam_drw", "influence_balanced", "lade", "glmc")
STEPS = ("mfm", "ce", *LOSSES, "crt", "simsiam", "smote", "rcal", "meta_weight_net", "l2rw", "metasaug", "tgeo_kd")
# `parallel_test` has mfm with class weights, and l2rw.
ON_DEVICES = (
    "influence_balanced",
    "lade",
    "glmc",
    "crt",
    "simsiam",
    "smote",
    "rcal",
    "meta_weight_net",
    "metasaug",
    "tgeo_kd",
)
BY_STEP, BY_DEVICES, BY_KIND = (
    [name if name in quick else slow(name) for name in ALL]
    for quick in (STEPS, ON_DEVICES, (*STEPS, "progressive", "two_phase", "posthoc_la", "mfm_frozen"))
)


class Watched:
    """The compiled call, under a transfer guard from a kind's second step on; stops after `stop_at` steps."""

    def __init__(self, compiled, stop_at: int):
        self.compiled, self.stop_at, self.kinds = compiled, stop_at, []

    def __call__(self, loop, data, count, kind):
        guard = "disallow" if kind in self.kinds else "allow"
        self.kinds.append(kind)
        if len(self.kinds) == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        with jax.transfer_guard(guard):
            return self.compiled(loop, data, count, kind)


def trained(config, workdir, stop_at: int = 0, like: Run | None = None):
    """Trains as `train_and_evaluate` does, without the reports, or by the programs of `like`; returns the run."""
    data = like.data if like else data_lib.build(config)
    experiment = like.experiment if like else experiment_lib.build(config, data)
    run = Run(config, workdir, data, experiment, inputs.to_device(data))
    run.call = Watched(like.call.compiled if like else loop_lib.make_call(experiment, config), stop_at)
    with contextlib.closing(run), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_lib, "make_call", lambda *_: run.call)
        train.train_runs([run])
    return run


_finished: dict = {}


@pytest.fixture
def finished(request, tmp_path_factory):
    """The method's finished run, made once."""
    name = request.getfixturevalue("name")
    if name not in _finished:
        _finished[name] = trained(configured(name), tmp_path_factory.mktemp(name))
    return _finished[name]


def finite(tree) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(arrays(tree)))


@pytest.mark.parametrize("name", BY_KIND)
def test_trains_with_a_class_of_one_image_and_stays_finite(name, finished):
    assert finished.data.counts.min() == 1
    assert finite(finished.loop)
    assert finished.step == 4
    tested = finished.classifier(finished.loop.bilevel, finished.step)
    result = results.evaluate(tested, finished.asked("test")(tested))
    assert np.isfinite(result["nll"])


@pytest.mark.parametrize("name", BY_KIND)
def test_each_kind_of_step_compiles_once_and_nothing_leaves_the_device(name, finished):
    """The run itself was under the guard (`Watched`)."""
    method = METHODS[name]
    second = {"retrain"} if method.retraining else {"plain"}
    learns = method.learner and not configured(name).frozen
    want = {"meta", "plain"} if learns else {"plain"} | second
    assert set(finished.call.kinds) == want
    assert finished.call.compiled._cache_size() == len(want)


@pytest.mark.parametrize("name", BY_KIND)
def test_interrupted_and_resumed_is_bit_identical(name, finished, tmp_path):
    """A second process would do the same: it builds everything anew. So it is deterministic by seed, too."""
    config = configured(name)
    with pytest.raises(interruption.Interrupted, match="saved at step 3"):
        trained(config, tmp_path, stop_at=3, like=finished)
    again = trained(config, tmp_path)
    assert len(again.call.kinds) == 1
    chex.assert_trees_all_equal(arrays(again.loop), arrays(finished.loop))


@pytest.mark.parametrize("name", BY_STEP)
def test_another_seed_is_another_run(name, finished):
    config = configured(name, train__seed=1)
    other = experiment_lib.build(config, finished.data).init()
    gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), arrays(other.params), arrays(finished.loop.bilevel.params))
    assert max(jax.tree.leaves(gap)) > 0


@pytest.mark.parametrize("name", BY_KIND)
def test_is_the_plain_classifier_at_test_time(name, finished):
    """No modulation, and nothing of what the meta set taught; a second stage is in the parameters themselves."""
    experiment, state = finished.experiment, finished.loop.bilevel
    image = jax.random.normal(jax.random.key(0), (5, *finished.data.test_images.shape[1:]))
    probabilities = experiment.tested.probabilities(state, image)
    variables = {"params": experiment.tested.params(state), "batch_stats": state.batch_stats}
    if not METHODS[name].cosine_head:
        plain = Tiny(10, jnp.float32, None).apply(variables, image)
        chex.assert_trees_all_close(probabilities, jax.nn.softmax(plain), rtol=1e-5)
    noise = jax.tree.map(lambda x: 2 * x + 1, state.phi)
    changed = experiment.tested.probabilities(state.replace(phi=noise), image)
    if METHODS[name].retraining is None:
        chex.assert_trees_all_equal(changed, probabilities)
    else:
        assert np.abs(changed - probabilities).max() > 1e-3
        early = state.replace(step=jnp.int32(experiment.retrain_from))
        chex.assert_trees_all_equal(experiment.tested.params(early), auxiliary.without_projection(state.params))


@pytest.mark.parametrize("name", BY_KIND)
def test_is_loaded_as_it_is_tested(name, finished):
    """From the workdir alone: neither the data nor the experiment is built."""
    config, workdir, images = finished.config, finished.workdir, finished.data.test_images[:50]
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    facts = facts_lib.describe(config, finished.data)
    Workdir(workdir).facts.write_text(json.dumps(dataclasses.asdict(facts)))
    loaded = classifier.load(workdir)
    normalized = augment.normalize(jnp.asarray(images), *map(jnp.asarray, (finished.data.mean, finished.data.std)))
    expected = finished.experiment.tested.probabilities(finished.loop.bilevel, normalized)
    np.testing.assert_allclose(loaded.probabilities(images), expected, rtol=1e-5, atol=1e-7)
    # What is exported holds the classifier's numbers and no others: no modulator, no second head.
    kept = (finished.loop.bilevel.params, finished.loop.bilevel.batch_stats, facts.mean, facts.std)
    inside = jax.make_jaxpr(loaded.forward)(images).consts
    assert sum(np.size(value) for value in inside) <= sum(np.size(leaf) for leaf in jax.tree.leaves(kept))


def stepped(config, data, mesh=None, *, absent: bool = False, mixed: bool = False):
    """Takes one step of each kind from the initial state, without augmentation; returns (state, metrics) by kind."""
    experiment, method = experiment_lib.build(config, data, mesh), METHODS[config.method.name]
    state, size = experiment.init(), 40
    image, meta_image = (
        augment.normalize(jnp.asarray(images[:size]), data.mean, data.std)
        for images in (data.train_images, data.meta_images)
    )
    label = jnp.zeros(size, jnp.int32) if absent else jnp.asarray(data.train_labels[:size])
    batch, meta_batch = Batch(image, label), Batch(meta_image, jnp.asarray(data.meta_labels[:size]))
    if mixed:
        batch = Batch(image, label, label[::-1], jnp.linspace(0.5, 1.0, size))
    if config.method.second_view:
        batch = batch._replace(second=batch._replace(image=image[:, ::-1]))
    if teacher := experiment.teacher:
        batch = teacher.of_batch(batch, teacher.arrays, data.mean, data.std)
    arguments = {"plain": (batch,)}
    if method.learner:
        arguments["meta"] = (batch, meta_batch)
    if method.retraining:
        features = jax.random.normal(jax.random.key(3), (size, 8))
        arguments["retrain"] = (batch._replace(image=features) if experiment.synthetic else batch,)
    return {kind: jax.jit(getattr(experiment, f"{kind}_step"))(state, *given) for kind, given in arguments.items()}


@pytest.mark.parametrize("name", BY_DEVICES)
def test_four_devices_equal_one(name, finished, monkeypatch):
    # SGD, since the first step of Adam blows the rounding of a gradient near zero up to the size of a whole step.
    monkeypatch.setattr(optim, "outer", lambda *_: optax.sgd(0.1))
    config = configured(name)
    one = arrays(stepped(config, finished.data))
    four = arrays(stepped(config, finished.data, parallel.data_mesh(jax.devices()[:4])))
    chex.assert_trees_all_close(four, one, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", BY_STEP)
def test_bfloat16_absent_classes_and_mixed_smoothed_labels(name, finished):
    """Nine classes are absent from the batch; label smoothing and mixup compose with the method."""
    config = configured(name, train__dtype="bfloat16", method__label_smoothing=0.1)
    for state, metrics in stepped(config, finished.data, absent=True, mixed=True).values():
        assert finite((state, metrics))
        assert float(metrics["loss"]) >= 0
        trees = (state.params, state.phi, state.batch_stats)
        assert {leaf.dtype for leaf in jax.tree.leaves(trees)} == {np.dtype("float32")}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ALL)
def test_whole_runs_of_a_residual_network(name, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "create", create)
    config = configured(name, train__dtype=dtype, model__name="resnet8", model__width=4, train__epochs=4)
    results = train.train_and_evaluate(config, tmp_path)
    assert np.isfinite(results["last"]["test"]["nll"])


# --- what a config may not ask for ----------------------------------------------------------------


def test_the_table_and_the_config_have_the_same_names():
    assert set(config_lib.FIELDS["method.name"].choices) == set(METHODS)
    assert {name for name, m in METHODS.items() if m.retraining or m.fine_tune} == set(STAGED)
    assert set(config_lib.FIELDS["method.base"].choices) <= {"own", *METHODS}
    counts, channels = jnp.array([4, 2]), {"pooled": 3, "logits": 2}
    for name, method in METHODS.items():
        settings = config_lib.Method(name=name, **OWN.get(name, {}))
        config = config_lib.Config(method=settings)
        learner = method.learner and method.learner(config, counts, channels)
        assert settings.per_batch == bool(learner and learner.per_batch)
        assert settings.taught == bool(learner and learner.share)
        assert settings.deferred == objective(config).deferred
        assert settings.cosine == objective(config).cosine_head
        assert settings.retrains == bool(method.retraining)


def test_the_loss_under_a_meta_learner():
    given = (("mfm", "own"), ("metasaug", "own"), ("metasaug", "ce"), ("focal", "ldam"))
    assert [config_lib.Method(name, base).trained for name, base in given] == ["ce", "drw", "ce", "focal"]


def test_weights_of_one_batch_cannot_be_lagged():
    with pytest.raises(UserError, match=r"meta.lagged = True: l2rw's weights belong to one batch.*set meta.lagged"):
        configured("l2rw", meta__lagged=True)


@pytest.mark.parametrize("name", ["smote", "rcal"])
def test_ends_on_synthetic_features_under_any_sampling(name):
    config = configured(name, method__sampling="square_root", train__batch_size=50)
    data = data_lib.build(config)
    order = experiment_lib.build(config, data).order
    first, second = (np.asarray(order(jax.random.key(0), epoch)) for epoch in (0, 1))
    images = len(data.train_labels)
    assert first.max() < images <= second.max() < data.num_classes * data.counts.max()
    assert len(np.unique(second)) == second.size  # each once, not by the counts


def test_clipping_a_gradient_of_zero_has_no_derivative():
    with pytest.raises(UserError, match=r"optim.clip_norm = 1.0: l2rw's virtual step starts from a gradient of zero"):
        configured("l2rw", optim__clip_norm=1.0)


@pytest.mark.parametrize("name", STAGED)
def test_a_second_stage_needs_an_epoch(name):
    with pytest.raises(UserError, match=r"method.first_stage = 0.5: leaves .* no epoch of train.epochs = 1"):
        configured(name, train__epochs=1)
    with pytest.raises(UserError, match=r"optim.warmup_epochs = 1: allowed: less than the 1 epochs"):
        configured(name, optim__warmup_epochs=1)


@pytest.mark.parametrize(("name", "base"), [("ldam_drw", "ce"), ("mfm", "ldam_drw")])
def test_deferred_weights_need_an_epoch(name, base):
    with pytest.raises(UserError, match=r"method.first_stage = 0.5: leaves .* no epoch of train.epochs = 1"):
        configured(name, method__base=base, train__epochs=1)


def test_only_the_network_form_can_leave_the_scale_out():
    with pytest.raises(UserError, match=r"modulation.shift_only = True: modulation.form = 'direct' cannot"):
        configured("mfm", modulation__shift_only=True, modulation__form="direct")
