"""Equal blocks as one scanned body: the same network, over variables that are stacked within the step alone."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import arrays, configured, tiny

from mfm_jax import bilevel, models
from mfm_jax import data as data_lib
from mfm_jax.bilevel import losses, modulation, optim
from mfm_jax.bilevel.passes import Pass
from mfm_jax.config import Optim
from mfm_jax.machine import parallel
from mfm_jax.models import stacked
from mfm_jax.models.imagenet import ResNet
from mfm_jax.models.resnet import CifarResNet
from mfm_jax.models.vit import VisionTransformer
from mfm_jax.models.wide_resnet import WideResNet
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.training import train
from mfm_jax.types import Batch

WIDE = {"dtype": jnp.float64}
NETWORKS = {
    "cifar": (CifarResNet(2, 10, width=2, **WIDE), 8),
    "imagenet": (ResNet((3, 2), 10, width=2, bottleneck=True, **WIDE), 32),
    "remat": (CifarResNet(2, 10, width=2, remat=True, **WIDE), 8),
    "vit": (VisionTransformer(10, width=8, depth=2, patch=4, **WIDE), 8),
    "wide": (WideResNet(3, 10, width=2, widen=2, **WIDE), 8),
}


def batch(size, seed):
    rng = np.random.default_rng(seed)
    return Batch(jnp.asarray(rng.normal(size=(6, size, size, 3))), jnp.arange(6) % 10)


def drawn(module, size):
    """Returns variables of which no parameter is zero, which would keep gradients from others."""
    variables = jax.jit(module.init)(jax.random.key(1), batch(size, 0).image)
    params = jax.tree.map(lambda leaf: jnp.where(leaf == 0, 0.1, leaf), variables["params"])
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), {**variables, "params": params})


def meta_step(module, variables, runs, size, mesh=None):
    """Returns the state after one meta-step of the default form, unrolled, and its metrics."""
    tx = optim.classifier(configured("mfm").optim, 0.1)
    learner, axis = modulation.direct({"logits": 10}), parallel.AXIS if mesh else None
    forward = Pass.of(module.clone(axis_name=axis), axis_name=axis)
    step = bilevel.make_step(forward, losses.cross_entropy, tx, learner, optax.sgd(0.1))
    step = parallel.shard_step(step, mesh, 2) if mesh else step
    state = bilevel.init_state(jax.random.key(0), variables, tx, learner.init, optax.sgd(0.1))
    state, metrics = jax.jit(step)(stacked.stack(state, runs), batch(size, 0), batch(size, 1))
    return stacked.unstack(state, runs), metrics


@functools.cache
def unrolled(name):
    """Returns a network's variables, and what a meta-step without scanned blocks makes of them."""
    module, size = NETWORKS[name]
    variables = drawn(module, size)
    return variables, meta_step(module, variables, {}, size)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_meta_step_is_that_of_the_unrolled_network(name):
    """Parameters, momentum, batch statistics, phi and metrics, in float64."""
    module, size = NETWORKS[name]
    with jax.enable_x64(True):
        variables, (expected, wanted) = unrolled(name)
        runs = stacked.runs(variables["params"])
        assert runs, "there are equal blocks"
        found, metrics = meta_step(module.clone(scan_blocks=True), variables, runs, size)
        chex.assert_trees_all_close(arrays(found), arrays(expected), rtol=1e-10, atol=1e-12)
        chex.assert_trees_all_close(metrics, wanted, rtol=1e-9)


def test_several_devices_and_a_padded_batch():
    """A batch of six, padded for four devices: what one device computes, in float64."""
    module, size = NETWORKS["cifar"]
    with jax.enable_x64(True):
        variables, (expected, wanted) = unrolled("cifar")
        runs = stacked.runs(variables["params"])
        mesh = parallel.data_mesh(jax.devices()[:4])
        found, metrics = meta_step(module.clone(scan_blocks=True), variables, runs, size, mesh)
        chex.assert_trees_all_close(arrays(found), arrays(expected), rtol=1e-9, atol=1e-11)
        chex.assert_trees_all_close(metrics, wanted, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "chain", "tune"),
    [
        ("cifar", {"name": "sgd"}, "all"),
        ("cifar", {"name": "adamw", "clip_norm": 0.1}, "all"),
        ("imagenet", {"name": "adamw"}, "head"),
        ("vit", {"name": "sgd", "clip_norm": 0.1}, "adapters"),
    ],
)
def test_an_optimizer_does_to_stacked_leaves_what_it_does_to_each(name, chain, tune):
    """Weight decay, momentum, clipping and what is frozen; `stack` and `unstack` are inverse on its states."""
    module, size = NETWORKS[name]
    module = module.clone(adapter_size=2) if tune == "adapters" else module
    tx = optim.classifier(Optim(weight_decay=0.3, **chain), 0.1)
    tx = tx if tune == "all" else optim.only(tx, lambda params: models.trained(params, tune))
    with jax.enable_x64(True):
        shapes = jax.eval_shape(module.init, jax.random.key(0), batch(size, 0).image)["params"]
        rng, update = np.random.default_rng(0), jax.jit(tx.update)
        draw = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)))
        params, grads, others = (draw(shapes) for _ in range(3))
        runs = stacked.runs(params)
        there = lambda tree: stacked.stack(tree, runs)  # noqa: E731
        _, state = update(others, tx.init(params), params)
        changes, after = update(grads, state, params)
        chex.assert_trees_all_equal(stacked.unstack(there(after), runs), after)
        found, then = update(there(grads), there(state), there(params))
        chex.assert_trees_all_close(stacked.unstack((found, then), runs), (changes, after), rtol=1e-12)


def test_what_is_stacked_and_back():
    """By hand: neighbours of equal shapes, in whatever tree of that form, and nothing else."""
    params = {
        "stage1": {f"block{i}": {"w": jnp.full((2,), i)} for i in range(3)},
        "stage2": {"block0": {"w": jnp.zeros(5)}, "block1": {"w": jnp.ones(3)}, "block2": {"w": jnp.full((3,), 2.0)}},
        "head": {"w": jnp.zeros(2)},
    }
    runs = stacked.runs(params)
    assert runs == {"stage1": ("block0", "block1", "block2"), "stage2": ("block1", "block2")}
    state = (params, optax.TraceState(params), {"loss": jnp.zeros(())})
    there = stacked.stack(state, runs)
    np.testing.assert_array_equal(there[1].trace["stage1"]["block0"]["w"], [[0, 0], [1, 1], [2, 2]])
    assert set(there[0]["stage2"]) == {"block0", "block1"}
    chex.assert_trees_all_equal(stacked.unstack(there, runs), state)


def operations(config):
    """Returns how many operations the meta-step has that is lowered for a GPU."""
    data = data_lib.build(config)
    built = experiment_lib.build(config, data)
    state = jax.eval_shape(lambda: stacked.stack(built.init(), built.blocks))
    image = jax.ShapeDtypeStruct((4, *data.train_images.shape[1:]), jnp.float32)
    given = Batch(image, jax.ShapeDtypeStruct((4,), jnp.int32))
    text = jax.jit(built.meta_step).trace(state, given, given).lower(lowering_platforms=("cuda",)).as_text()
    return len(re.findall(r" = .*stablehlo\.", text))


def test_the_program_of_a_deep_network_is_small():
    both = [operations(configured("mfm", model__name="resnet32", model__scan_blocks=scan)) for scan in (True, False)]
    assert both[0] <= 0.48 * both[1]


@pytest.mark.usefixtures("one_device")
def test_a_run_goes_on_with_scanned_blocks(tmp_path):
    """What is kept is the unrolled network's: the run is extended without."""
    config = {"model__name": "resnet20", "model__width": 2, "data__val_images_per_class": 0, "meta__every": 2}
    first = train.train_and_evaluate(tiny(**config, model__scan_blocks=True, train__epochs=1), tmp_path)
    second = train.train_and_evaluate(tiny(**config, train__epochs=2, optim__restarts="1"), tmp_path)
    assert second["last"]["step"] == 2 * first["last"]["step"] > 0
