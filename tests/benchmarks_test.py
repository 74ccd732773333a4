"""The PyTorch twin is the same network and the same step; the arithmetic of the benchmark is that of the network."""

import argparse
import csv
import re
import subprocess
import sys

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import REPOSITORY, benchmark, slow

from mfm_jax import bilevel, config, models
from mfm_jax.bilevel import losses, modulation, optim
from mfm_jax.bilevel.passes import Pass
from mfm_jax.types import Batch

CLASSES, WIDTH = 5, 8
FEATURE_SITES = ("stage1", "stage2", "stage3", "pooled")


@pytest.fixture(scope="module")
def contenders():
    with benchmark("contenders") as module:
        yield module


def test_arithmetic_is_that_of_the_network(contenders):
    """Against the products that XLA is asked for, read off the jaxpr of a forward pass."""
    spec = contenders.Spec("", model="resnet20", image_size=16, classes=7, width=4)
    module = models.create("resnet20", 7, 4)
    image = jnp.zeros((1, 16, 16, 3))
    variables = jax.eval_shape(module.init, jax.random.key(0), image)
    jaxpr = jax.make_jaxpr(module.apply)(variables, image)
    assert sum(contenders.forward_flops(spec).values()) == sum(map(_products, jaxpr.eqns))


@pytest.fixture(scope="module")
def steps():
    with benchmark("jax_steps") as module:
        yield module


def test_every_kind_of_step_can_be_built_and_run(contenders, steps):
    small = {"model": "resnet8", "image_size": 8, "width": 2, "batch": 8, "meta_batch": 10}
    for kind, seeds in {"plain": 2, "mfm": 1, "meta_weight_net": 1}.items():
        spec = contenders.Spec("", step=kind, seeds=seeds, form="patches" if seeds > 1 else "", **small)
        program = steps.build(spec)
        program.run(2)
        program.finish()


def test_the_frozen_recipe_takes_plain_steps(contenders, steps):
    small = {"model": "resnet8", "image_size": 8, "width": 2, "batch": 8, "meta_batch": 10}
    config = str(REPOSITORY / "configs" / "cifar10_lt.py")
    program = steps.build(contenders.Spec("", step="recipe", config=config, overrides=contenders.FROZEN, **small))
    assert program.facts["spec"]["every"] == 1
    program.run(1)
    program.finish()


def test_the_loop_of_main_runs_its_meta_steps(contenders, steps):
    small = {"model": "resnet8", "image_size": 8, "width": 2, "batch": 8, "meta_batch": 10}
    config = str(REPOSITORY / "configs" / "cifar10_lt.py")
    overrides = (("train.steps_per_call", 3), ("meta.every", 2))
    spec = contenders.Spec("", step="loop", config=config, seeds=2, overrides=overrides, **small)
    program = steps.build(spec)
    assert program.facts["unit"] == 2
    program.run(6)
    program.finish()


def test_published_networks_are_counted_at_their_own_size(contenders):
    spec = contenders.Spec("", model="resnet50", step="plain", image_size=224, classes=1000, width=0, batch=1)
    assert contenders.step_flops(spec) == pytest.approx(3 * 2 * 4.09e9)
    with pytest.raises(ValueError, match="224 pixels"):
        contenders.step_flops(contenders.Spec("", model="resnet50"))


def test_the_page_has_what_the_accelerator_took():
    docs = REPOSITORY / "docs"
    with (docs / "results" / "accelerator.csv").open(newline="") as file:
        took = [
            (1e3 * float(row["seconds"]), 100 * float(row["half_range"]))
            for row in csv.DictReader(file)
            if row["seconds"]
        ]
    shown = re.findall(
        r"\| ([\d.]+ ± [\d.]+ %) (?=\|)", (docs / "performance.md").read_text().partition("## Seen on")[2]
    )
    assert len(shown) == 14
    assert set(shown) <= {f"{ms:.2f} ± {half:.1f} %" for ms, half in took}


def test_a_lent_accelerator_leaves_a_table(tmp_path):
    """One command on the CPU at small shapes: what was measured is positive, what does not fit is named."""
    script = REPOSITORY / "benchmarks" / "accelerator.py"
    options = "--minutes=1.6 --model=resnet8 --batch_size=8 --image_size=8 --turn_seconds=0.01 --rounds=3"
    only = "--only=^copy$|^plain$|^PyTorch MFM, logits, compiled"
    ran = subprocess.run(
        [sys.executable, script, *options.split(), only, f"--out={tmp_path}"], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    with (tmp_path / "accelerator.csv").open(newline="") as file:
        copy, plain, slow = csv.DictReader(file)
    for row in (copy, plain):
        assert not row["note"], row
        assert float(row["seconds"]) > 0
    assert float(copy["share_of_copy"]) == 1
    assert (float(plain["over_plain"]), float(plain["needs"])) == (1, 1)
    assert slow["seconds"] == ""
    assert slow["note"].startswith("left out: takes about 100 s")
    assert slow["note"] in (tmp_path / "accelerator.md").read_text()


@pytest.fixture(scope="module")
def seeds():
    with benchmark("seeds") as module:
        yield module


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_form_is_the_layer_of_each_seed(dtype, seeds):
    """Forward and both gradients, against XLA's derivatives of one seed's convolution in float64."""
    options, rng = argparse.Namespace(batch_size=2, image_size=8), np.random.default_rng(0)
    before, behind, side, stride = seeds.LAYERS["32 to 64"]
    arrays = (
        (2, side // 4, side // 4, before),
        (3, 3, before, behind),
        (2, side // 4 // stride, side // 4 // stride, behind),
    )
    given = x, kernel, dy = [jnp.asarray(rng.normal(size=(3, *shape)), dtype) for shape in arrays]

    def reference(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, ((1, 1),) * 2, dimension_numbers=numbers)

    @jax.vmap
    def of_each(x, kernel, dy):
        y, pull_back = jax.vjp(reference, x, kernel)
        return y, *pull_back(dy)

    with jax.enable_x64(True):
        expected = jax.device_get(of_each(*(np.asarray(value).astype(np.float64) for value in given)))
    turned = jnp.flip(kernel, (1, 2)).swapaxes(3, 4)
    rows = {"forward": (x, kernel), "input gradient": (dy, turned), "weight gradient": (x, dy)}
    for (operation, operands), right in zip(rows.items(), expected, strict=True):
        for form in seeds.FORMS:
            apply, *shapes = seeds.Row("32 to 64", dtype, 3, form, operation).operands(options)
            assert [of.shape for of in shapes] == [of.shape for of in operands]
            found = np.asarray(jax.jit(apply)(*operands), np.float64)
            error = np.abs(found - right).max() / np.abs(right).max()
            assert error < {"float32": 1e-6, "bfloat16": 1e-2}[dtype], (operation, form)


def test_a_layer_of_several_seeds_is_timed(seeds, tmp_path):
    small = ["--batch_size=2", "--image_size=8", "--repeats=2", "--turn_seconds=0", "--rounds=2"]
    options = seeds.arguments([*small, f"--out={tmp_path}"])
    alone, together = (seeds.Row("stem", "float32", *of, "forward") for of in ((1, "alone"), (4, "folded")))
    for row in (alone, together):
        row.time(row.build(options), options)
    seeds.write([alone, together], tmp_path, "a title")
    with (tmp_path / "seeds.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert float(first["over_alone"]) == 1
    assert float(second["over_alone"]) == pytest.approx(float(second["seconds"]) / 4 / float(first["seconds"]))
    assert together.name in (tmp_path / "seeds.md").read_text()


def _products(equation) -> float:
    """Returns twice the multiplications of a convolution or a matrix product, edges counted as inside."""
    output = equation.outvars[0].aval.size
    if equation.primitive.name in ("conv_general_dilated", "convolution"):
        return 2.0 * output * np.prod(equation.invars[1].aval.shape[:-1])
    if equation.primitive.name == "dot_general":
        contracted = equation.params["dimension_numbers"][0][0]
        return 2.0 * output * np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
    return sum(sum(map(_products, sub.eqns)) for sub in jax.extend.core.jaxprs_in_params(equation.params))


@pytest.mark.parametrize(
    ("options", "forward_passes"),
    [
        ({}, 8),
        ({"sites": ("logits",)}, 8),
        ({"virtual": "head"}, 4),
        ({"lagged": False}, 11),
        ({"every": 5}, 4),
        ({"step": "plain"}, 3),
    ],
)
def test_arithmetic_of_a_step(contenders, options, forward_passes):
    spec = contenders.Spec("", **options)
    passes = contenders.step_flops(spec) / sum(contenders.forward_flops(spec).values()) / spec.batch
    assert passes == pytest.approx(forward_passes, rel=1e-3)


@pytest.fixture(scope="module")
def twin():
    pytest.importorskip("torch")
    with benchmark("torch_twin") as module:
        yield module


def _drawn(like, seed: int):
    """Returns a tree like `like` of float64 draws, positive where it holds scales or variances."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(0, 0.3, leaf.shape)
        return np.abs(values) + 0.5 if path[-1].key in ("scale", "var") else values

    return jax.tree_util.tree_map_with_path(draw, like)


def _batch(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(rng.normal(size=(6, 16, 16, 3)), rng.integers(0, CLASSES, 6).astype(np.int32))


def _to_torch(tree):
    """Returns the twin's `{name: tensor}` of a Flax tree of parameters, momenta or running averages."""
    import torch

    leaves = {"kernel": "weight", "scale": "weight"}
    found = {}
    for path, value in jax.tree_util.tree_leaves_with_path(tree):
        *modules, leaf = (key.key for key in path)
        parts = [m.replace("BasicBlock_", "").replace("Conv_", "conv").replace("BatchNorm_", "norm") for m in modules]
        value = np.asarray(value)
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim)
        found[".".join([*parts, leaves.get(leaf, leaf)])] = torch.tensor(value.transpose(axes) if axes else value)
    return found


def _torch_batch(batch: Batch):
    import torch

    return torch.tensor(batch.image.transpose(0, 3, 1, 2)), torch.tensor(batch.label, dtype=torch.long)


@pytest.mark.parametrize("train", [False, True])
def test_twin_has_the_same_logits(twin, train):
    import torch
    from torch.func import functional_call

    batch = _batch(0)
    with jax.enable_x64(True):
        module = models.create("resnet8", CLASSES, WIDTH, jnp.float64)
        variables = _drawn(jax.eval_shape(module.init, jax.random.key(0), batch.image), 1)
        logits = module.apply(variables, batch.image, train=train, mutable=["batch_stats"])[0]
    net = twin.Net(1, CLASSES, WIDTH).double()
    weights = _to_torch(variables["params"]) | _to_torch(variables["batch_stats"])
    assert weights.keys() == net.state_dict().keys()
    with torch.no_grad():
        found = functional_call(net, weights, (_torch_batch(batch)[0], train))
    np.testing.assert_allclose(found.numpy(), np.asarray(logits), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sites", [slow(("pooled",)), FEATURE_SITES], ids=["pooled", "four"])
def test_twin_takes_the_same_step(twin, sites):
    """Losses, meta-gradient, parameters, momenta and running averages after one step of both, in float64."""
    batch, meta_batch = _batch(0), _batch(1)
    with jax.enable_x64(True):
        module = models.create("resnet8", CLASSES, WIDTH, jnp.float64)
        variables = _drawn(jax.eval_shape(module.init, jax.random.key(0), batch.image), 1)
        channels = modulation.site_channels(lambda film: module.apply(variables, batch.image, modulate=film), sites)
        # Plain gradient descent at rate 1 leaves the meta-gradient behind as the change of phi.
        modulator, phi_tx = modulation.direct(channels), optax.sgd(1.0)
        tx = optim.classifier(config.Optim(weight_decay=twin.WEIGHT_DECAY), twin.LEARNING_RATE)
        state = bilevel.init_state(jax.random.key(0), variables, tx, modulator.init, phi_tx)
        state = state.replace(phi=jax.tree.map(lambda x: x + 0.1, state.phi))
        momenta = jax.tree.map(lambda x: 0.01 * np.ones_like(x), variables["params"])
        state = state.replace(opt_state=_with_trace(state.opt_state, momenta))
        step = bilevel.make_step(
            Pass.of(module), losses.cross_entropy, tx, modulator, phi_tx, bilevel.MetaRule(bn="running")
        )
        new, metrics = jax.jit(step)(state, batch, meta_batch)
        meta_gradient = jax.tree.map(lambda a, b: a - b, state.phi, new.phi)
    net = twin.Net(1, CLASSES, WIDTH).double()
    found, (loss, params, moved, averages, meta_loss) = twin.meta_gradient(net, sites)(
        {f"{site}.{name}": value.double() + 0.1 for site, name, value in _parts(twin.identity(channels))},
        _to_torch(variables["params"]),
        _to_torch(momenta),
        _to_torch(variables["batch_stats"]),
        _torch_batch(batch),
        _torch_batch(meta_batch),
    )
    _assert_equal(found, _to_torch(meta_gradient))
    expected_losses = {"loss": metrics["loss"], "meta": metrics["meta_loss"]}
    _assert_equal({"loss": loss, "meta": meta_loss}, _to_torch(expected_losses))
    _assert_equal(params, _to_torch(new.params))
    _assert_equal(moved, _to_torch(_trace(new.opt_state)))
    means = {name: value for name, value in averages.items() if name.endswith("mean")}
    _assert_equal(means, {name: value for name, value in _to_torch(new.batch_stats).items() if name in means})


def _parts(phi):
    for name, value in phi.items():
        yield (*name.split("."), value)


def _with_trace(opt_state, momenta):
    """Returns the optimizer's state with `momenta` as SGD's."""
    return jax.tree.map(lambda x: optax.TraceState(momenta) if _is_trace(x) else x, opt_state, is_leaf=_is_trace)


def _trace(opt_state):
    return next(x.trace for x in jax.tree.leaves(opt_state, is_leaf=_is_trace) if _is_trace(x))


def _is_trace(x) -> bool:
    return isinstance(x, optax.TraceState)


def _assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), value.numpy(), rtol=1e-6, atol=1e-8, err_msg=name)
