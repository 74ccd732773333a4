"""The compiled call: one program for each kind of step, whatever the pattern, and the steps of single calls."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import arrays, changed, configured, slow, stopped_at, tiny, to_double

from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax.evaluation import results
from mfm_jax.machine import interruption, parallel
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.training import feed as feed_lib
from mfm_jax.training import inputs, train
from mfm_jax.training import loop as loop_lib
from mfm_jax.training.run import Run


def trained(config, stops=()):
    """Trains in float64, in calls that end at `stops` too; returns the loop, the kinds of steps, and the call."""
    data = data_lib.build(config)
    experiment = experiment_lib.build(config, data)
    feed = feed_lib.make(data, experiment, config, inputs.to_device(data))
    call, loop = loop_lib.make_call(experiment, config), to_double(loop_lib.initial(experiment))
    loop = loop.replace(sums=jax.tree.map(lambda x: x.astype(jnp.float32), loop.sums))
    step, kinds, per_epoch, total = 0, set(), experiment.steps_per_epoch, experiment.total_steps
    loop = jax.device_put(loop, inputs.everywhere(None))
    while step < total:
        if step % per_epoch == 0 or step in stops:  # as a run that was stopped there
            feed.start_epoch(step // per_epoch, step, loop.bilevel)
        ends = [stop for stop in stops if stop > step]
        end = min(total, (step // per_epoch + 1) * per_epoch, step + feed.steps_per_call, *ends)
        kind, count = loop_lib.next_steps(experiment, config, step, end)
        loop = call(loop, feed.next(), jax.device_put(np.int32(count)), kind)
        step, kinds = step + count, kinds | {kind}
    return loop, kinds, call


@functools.cache
def one_by_one(method, batch, **meta):
    return trained(configured(method, train__batch_size=batch, train__epochs=3, **meta))[0]


@pytest.mark.parametrize(
    ("method", "batch", "every", "start", "most", "stops"),
    [
        ("mfm", 100, 1, 0, 4, ()),
        ("mfm", 40, 3, 0, 10, (7,)),  # in the middle of a block
        ("crt", 60, 2, 0, 4, (5,)),
        ("ce", 40, 2, 0, 10, (9,)),
        slow("mfm", 40, 2, 0, 10, ()),
        slow("mfm", 40, 3, 1, 2, ()),
        slow("mfm", 40, 8, 0, 3, (5, 6)),
        slow("mfm", 40, 8, 2, 50, (13,)),
        slow("mfm", 60, 50, 0, 10, ()),  # an epoch without a meta-step
        slow("meta_weight_net", 60, 2, 0, 3, (4,)),
    ],
)
def test_a_kind_is_one_program_and_its_steps_those_of_single_calls(method, batch, every, start, most, stops, wide):
    """Epochs, blocks between meta-steps, and what a stop leaves of them have many lengths; float64."""
    meta = {"meta__every": every, "meta__start_epoch": start}
    config = configured(method, train__batch_size=batch, train__epochs=3, train__steps_per_call=most, **meta)
    loop, kinds, call = trained(config, stops)
    assert call._cache_size() == len(kinds)
    assert len(kinds) == (1 if method == "ce" or every == 1 else 2)
    single = one_by_one(method, batch, **meta)
    chex.assert_trees_all_close(arrays(loop.bilevel), arrays(single.bilevel), rtol=1e-12, atol=1e-12)
    chex.assert_trees_all_close(loop.sums, single.sums, rtol=1e-5)


def lowered(call, *given):
    return call.trace(*given).lower(lowering_platforms=("cuda",)).as_text()


def test_a_call_holds_one_step_of_its_kind():
    """However many steps it takes: the program of a plain call has no meta-step in it, and neither has a branch."""
    config = configured("mfm", train__steps_per_call=10)
    data = data_lib.build(config)
    experiment = experiment_lib.build(config, data)
    feed = feed_lib.make(data, experiment, config, inputs.to_device(data))
    feed.start_epoch(0, 0, experiment.init())
    call, loop = loop_lib.make_call(experiment, config), loop_lib.initial(experiment)
    single = loop_lib.make_call(experiment, configured("mfm", train__steps_per_call=1))
    for kind in ("plain", "meta"):
        several, one = (lowered(each, loop, feed.next(), jnp.int32(3), kind) for each in (call, single))
        assert "stablehlo.case" not in several
        assert several.count("stablehlo.convolution") == one.count("stablehlo.convolution") > 0


def test_a_run_of_several_steps_a_call_goes_on_in_the_middle_of_a_block(tmp_path, quick_runs):
    """SIGTERM between two calls: the same programs, and the same bits."""
    config = tiny(train__steps_per_call=4, meta__every=3, train__epochs=3)
    with stopped_at(3), pytest.raises(interruption.Interrupted, match="saved at step 4"):
        train.train_and_evaluate(config, tmp_path / "stopped")
    stopped, whole = (train.train_and_evaluate(config, tmp_path / name) for name in ("stopped", "whole"))
    assert stopped["last"] == whole["last"]
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("stopped", "whole")]
    assert rows[0] == rows[1]


@pytest.mark.usefixtures("quick_runs")
@pytest.mark.parametrize("devices", [1, 8])
def test_a_split_is_evaluated_in_one_call_where_calls_hold_loops(devices, tmp_path):
    """One program for each split, and the answers of a call a batch; the last batch is padded."""
    config = config_lib.resolve(tiny(train__steps_per_call=4, eval__batch_size=24))
    data = data_lib.build(config)
    assert not loop_lib.at_once(changed(config, train={"steps_per_call": 0}), data.test_images)  # on a CPU
    assert not loop_lib.at_once(changed(config, data={"resident_mb": 0}), data.test_images)
    experiment = experiment_lib.build(config, data, parallel.data_mesh() if devices > 1 else None)
    with contextlib.closing(Run(config, tmp_path, data, experiment, inputs.to_device(data))) as run:
        tested, calls = run.classifier(run.loop.bilevel, 0), []
        counted = tested._replace(probabilities=lambda images: calls.append(1) or tested.probabilities(images))
        found = {split: run.asked(split)(counted).probabilities for split in ("val", "test")}
        assert len(calls) == run.eval_step._cache_size() == len(found)
        for split, rows in found.items():
            expected = results.on_split(data, split, 24)(counted).probabilities
            np.testing.assert_allclose(rows, expected, rtol=1e-5)
        assert len(calls) > 2 * len(found)
