"""Averages of weights: what is tested in the place of what is trained, which takes the same way with and without."""

import contextlib
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import arrays, changed, configured, slow, stopped_at, tiny

from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax.bilevel import averaging
from mfm_jax.errors import UserError
from mfm_jax.evaluation import classifier
from mfm_jax.machine import interruption
from mfm_jax.models import stacked
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.training import feed as feed_lib
from mfm_jax.training import inputs, preflight, train
from mfm_jax.training import loop as loop_lib
from mfm_jax.types import BilevelState
from mfm_jax.workdir.checkpoint import Checkpointer

pytestmark = pytest.mark.usefixtures("quick_runs")
EMA, SWA = {"optim__ema": 0.9}, {"optim__swa_from": 0.5}


# --- by hand --------------------------------------------------------------------------------------


def counting(state, batch):
    """A step that trains w = 1, 2, 3, ..., with statistics ten times that."""
    step = state.step + 1
    return state.replace(step=step, params={"w": 1.0 * step}, batch_stats={"m": 10.0 * step}), {}


def after(rule: averaging.Averaging, steps: int) -> BilevelState:
    """Returns the state after steps of `counting` from w = 4."""
    w, m = {"w": jnp.float32(4)}, {"m": jnp.float32(40)}
    state = BilevelState(jnp.int32(0), jax.random.key(0), w, m, (), {}, (), averaging.begun(rule, w, m))
    step = jax.jit(averaging.averaged(counting, rule))
    for _ in range(steps):
        state, _ = step(state, None)
    return state


def measured(rule: averaging.Averaging, steps: int) -> tuple[float, float]:
    state = averaging.tested(after(rule, steps))
    assert state.average == ()
    return float(state.params["w"]), float(state.batch_stats["m"])


def test_the_running_mean_begins_as_an_equal_one():
    rule = averaging.exponential(0.75)
    # 1, then (1 + 2) / 2, (1 + 2 + 3) / 3, and from the fourth step on a quarter of the newest.
    by_hand = [1.0, 1.5, 2.0, 0.75 * 2.0 + 0.25 * 4, 0.75 * 2.5 + 0.25 * 5]
    for steps, mean in enumerate(by_hand, start=1):
        assert measured(rule, steps) == pytest.approx((mean, 10 * mean))


def test_the_equal_mean_has_the_end_of_each_epoch_after_its_beginning():
    rule = averaging.equal(begin=4, every=3)
    by_hand = {1: 1.0, 3: 3.0, 4: 4.0, 5: 4.0, 6: 4.0, 7: (4 + 7) / 2, 9: 5.5, 10: (4 + 7 + 10) / 3, 12: 7.0}
    for steps, mean in by_hand.items():
        assert measured(rule, steps)[0] == pytest.approx(mean)
    assert [measured(rule, steps)[0] for steps in (1, 2, 3, 4)] == [1.0, 2.0, 3.0, 4.0]  # the weights, bit for bit


def test_the_start_has_its_share():
    assert measured(averaging.start(0.25), 8) == (0.25 * 4 + 0.75 * 8, 80.0)
    assert measured(averaging.start(1.0), 8) == (4.0, 80.0)


def test_a_state_without_an_average_is_what_is_tested():
    state = after(averaging.start(0.5), 1).replace(average=())
    assert averaging.tested(state) is state


def test_types_are_kept():
    rule = averaging.exponential(0.9)
    params = {"w": jnp.ones(2, jnp.bfloat16), "count": jnp.int32(3)}
    found = averaging._mixed(params, jax.tree.map(lambda x: x + 2, params), rule.rate(jnp.int32(2)))
    assert (found["w"].dtype, found["count"].dtype) == (jnp.bfloat16, jnp.int32)
    assert float(found["w"][0]) == 2.0


# --- in whole runs --------------------------------------------------------------------------------


def final(workdir, config) -> BilevelState:
    """Returns the last state of a run, as numbers."""
    like = loop_lib.initial(experiment_lib.build(config, data_lib.build(config)), anew=False)
    checkpoints = Checkpointer(workdir, config.checkpoint, has_validation=len(data_lib.build(config).val_labels) > 0)
    with contextlib.closing(checkpoints):
        return arrays(checkpoints.restore(checkpoints.latest_step(), like)[0].bilevel)


def run(config, workdir) -> BilevelState:
    train.train_and_evaluate(config, workdir, pages=False)
    return final(workdir, config)


_plain: dict = {}


def plain(name, tmp_path_factory) -> BilevelState:
    if name not in _plain:
        _plain[name] = run(configured(name), tmp_path_factory.mktemp(name))
    return _plain[name]


@pytest.mark.parametrize(
    ("name", "options"), [("mfm", EMA), ("ce", SWA), ("crt", EMA), slow("mfm", SWA), slow("l2rw", EMA)]
)
def test_what_is_trained_takes_the_same_way(name, options, tmp_path, tmp_path_factory):
    """Bit for bit; what a second stage trains is fitted to the average, and differs."""
    without, found = plain(name, tmp_path_factory), run(configured(name, **options), tmp_path)
    same = ("step", "params", "batch_stats", "opt_state") + (() if name == "crt" else ("phi", "phi_opt_state"))
    chex.assert_trees_all_equal(*({part: getattr(state, part) for part in same} for state in (found, without)))
    if name == "crt":
        assert np.abs(found.phi["kernel"] - without.phi["kernel"]).max() > 0
    gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), found.average.params, found.params)
    assert max(jax.tree.leaves(gap)) > 1e-4
    assert without.average == ()


@pytest.mark.parametrize(
    ("name", "options"), [("mfm", EMA), ("ce", SWA), ("crt", EMA), slow("smote", EMA), slow("rcal", EMA)]
)
def test_interrupted_and_resumed_is_bit_identical(name, options, tmp_path):
    config = configured(name, train__epochs=4, **options)
    with stopped_at(7), pytest.raises(interruption.Interrupted, match="saved at step 7"):
        train.train_and_evaluate(config, tmp_path / "cut", pages=False)
    chex.assert_trees_all_equal(run(config, tmp_path / "cut"), run(config, tmp_path / "whole"))


def test_the_average_is_evaluated_selected_stored_and_started_from(tmp_path):
    config = config_lib.resolve(tiny(**EMA, train__epochs=3))
    results = train.train_and_evaluate(config, tmp_path / "run", pages=False)
    state, loaded = final(tmp_path / "run", config), classifier.load(tmp_path / "run")
    chex.assert_trees_all_equal(loaded.variables["params"], state.average.params)
    chex.assert_trees_all_equal(loaded.variables["batch_stats"], state.average.batch_stats)
    data = data_lib.build(config)
    answers = loaded.probabilities(data.val_images).argmax(1) == data.val_labels
    by_class = [answers[data.val_labels == k].mean() for k in range(10)]
    assert results["last"]["val"]["balanced_accuracy"] == pytest.approx(np.mean(by_class))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["balanced_accuracy"] for row in rows if row["kind"] == "val"}
    assert results["best"]["val"]["balanced_accuracy"] == pytest.approx(max(scores.values()))
    assert scores[results["best"]["step"]] == max(scores.values())
    begun = experiment_lib.build(configured("ce", model__init_from=str(tmp_path / "run")), data).init_pretrained()
    chex.assert_trees_all_equal(arrays(begun.params), state.average.params)


def test_a_network_without_batch_statistics_is_averaged_and_loaded(tmp_path):
    config = configured("ce", model__name="own_parts:Bare", model__width=0, **EMA)
    state = run(config, tmp_path)
    assert state.average.batch_stats == {}
    chex.assert_trees_all_equal(classifier.load(tmp_path).variables["params"], state.average.params)


def test_statistics_are_taken_anew_for_both(tmp_path):
    config = configured("ce", **EMA)
    data = data_lib.build(config)
    experiment = experiment_lib.build(config, data)
    feed = feed_lib.make(data, experiment, config, inputs.to_device(data))
    feed.start_epoch(0, 0, experiment.init())
    call, loop = loop_lib.make_call(experiment, config), loop_lib.initial(experiment)
    for _ in range(2):
        loop = call(loop, feed.next(), jnp.int32(1), "plain")
    state, settle = loop.bilevel, loop_lib.make_settle(experiment)
    found, at = settle(state, feed.data), averaging.tested(state)
    chex.assert_trees_all_equal(found.average.batch_stats, settle(at, feed.data).batch_stats)
    chex.assert_trees_all_equal(found.batch_stats, settle(state.replace(average=()), feed.data).batch_stats)
    gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), found.average.batch_stats, found.batch_stats)
    assert max(jax.tree.leaves(gap)) > 0


def test_seeds_trained_together_have_averages_of_their_own(tmp_path):
    configs = [config_lib.resolve(tiny(train__seed=seed, train__epochs=1, **EMA)) for seed in (0, 1)]
    folders = [tmp_path / "0", tmp_path / "1"]
    train.train_together(configs, folders, pages=False)
    alone = run(configs[0], tmp_path / "alone")
    chex.assert_trees_all_close(final(folders[0], configs[0]).average, alone.average, rtol=1e-3, atol=1e-5)


def test_an_average_is_stacked_as_the_parameters_are():
    w = {"block1": {"w": jnp.ones(2)}, "block2": {"w": jnp.zeros(2)}, "head": {"w": jnp.ones(1)}}
    state = BilevelState(
        jnp.int32(0), jax.random.key(0), w, {}, (), {}, (), averaging.begun(averaging.exponential(0.9), w, {})
    )
    runs = stacked.runs(w)
    found = stacked.stack(state, runs)
    chex.assert_trees_all_equal(found.average.params, found.params)
    assert found.params["block1"]["w"].shape == (2, 2)
    chex.assert_trees_all_equal(arrays(stacked.unstack(found, runs)), arrays(state))


# --- a start that keeps its share -----------------------------------------------------------------


@pytest.fixture
def started(tmp_path):
    """The folder of a finished run."""
    train.train_and_evaluate(configured("ce"), tmp_path / "start", pages=False)
    return str(tmp_path / "start")


def test_the_classifier_is_interpolated_with_its_start(started, tmp_path):
    config = configured("logit_adjusted", model__init_from=started, model__start_share=0.25, train__seed=1)
    state, begun = run(config, tmp_path / "tuned"), classifier.load(started)
    expected = jax.tree.map(lambda a, b: 0.25 * a + 0.75 * b, begun.variables["params"], state.params)
    found = classifier.load(tmp_path / "tuned")
    chex.assert_trees_all_close(found.variables["params"], expected, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_equal(state.average.params, arrays(begun.variables["params"]))
    gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, state.average.params)
    assert max(jax.tree.leaves(gap)) > 1e-3
    without = run(configured("logit_adjusted", model__init_from=started, train__seed=1), tmp_path / "plain")
    chex.assert_trees_all_equal(state.params, without.params)


def test_a_start_with_all_of_the_share_is_tested_itself(started, tmp_path):
    config = configured("ce", model__init_from=started, model__start_share=1.0)
    train.train_and_evaluate(config, tmp_path / "tuned", pages=False)
    images = data_lib.build(config).test_images[:50]
    found, begun = (classifier.load(folder) for folder in (tmp_path / "tuned", started))
    chex.assert_trees_all_equal(found.variables["params"], begun.variables["params"])
    np.testing.assert_allclose(found.probabilities(images), begun.probabilities(images), rtol=0.2, atol=0.05)


def test_a_head_at_random_has_no_share(started):
    config = configured("ldam", model__init_from=started, model__start_share=0.5)
    with pytest.raises(UserError, match=r"model.start_share = 0.5: the head starts fresh, and weights at random have"):
        experiment_lib.build(config, data_lib.build(config)).init_pretrained()


# --- what does not go together --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("ce", EMA | SWA, "optim.ema = 0.9: so does optim.swa_from = 0.5 say what is tested; leave one of them out"),
        ("ce", {"model__start_share": 0.5}, "model.start_share = 0.5: weights at random have no share in what is"),
        ("crt", SWA, "optim.swa_from = 0.5: begins after epoch 1, and the classifier is trained for 1; choose a"),
        ("ce", {"optim__swa_from": 0.9}, "optim.swa_from = 0.9: begins after epoch 2, and the classifier is trained f"),
        ("ce", SWA | {"train__epochs": 4, "optim__restarts": "3"}, "optim.restarts = '3': optim.swa_from is a part of"),
    ],
)
def test_refusals(name, options, told):
    with pytest.raises(UserError) as caught:
        configured(name, **options)
    assert str(caught.value).startswith(told)


def test_a_second_stage_that_trains_all_may_be_averaged():
    assert configured("two_phase", train__epochs=4, optim__swa_from=0.75).swa_begins == 3


def test_an_equal_mean_is_planned_over_all_epochs():
    config = configured("ce", train__epochs=4, **SWA)
    changes = config_lib.changes(configured("ce", train__epochs=3, **SWA).to_dict(), config)
    assert "of which optim.swa_from is a part; for 4, choose a new one" in config_lib.problem(changes, config)


@pytest.mark.parametrize("options", [SWA, {"model__start_share": 0.5, "model__init_from": "runs/other"}])
def test_streamed_images_leave_no_statistics_to_take(options, tmp_path):
    images, labels = np.zeros((60, 8, 8), np.uint8), np.arange(60) % 10
    images[:, 0, 0] = np.arange(60)
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=labels, test_images=images + 100, test_labels=labels)
    natural = {"data__protocol": "natural", "data__imbalance_factor": 1.0, "train__batch_size": 20}
    settings = natural | {"data__source": "npz", "data__root": str(tmp_path / "a.npz"), "data__resident_mb": 0}
    config = configured("ce", **settings, **options)
    with pytest.raises(UserError, match="batch statistics of the tested weights need all images at once; raise data"):
        experiment_lib.build(config, data_lib.build(config))
    vit = changed(config, model={"name": "vit_b16"})
    assert not list(preflight._unsettled(vit, streamed=True))
