"""A run on several devices is the run on one, padded batches included; what the devices say to each other."""

import functools
import json
import re
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Tiny, arrays, benchmark, configured, slow, to_double

from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax import models
from mfm_jax.bilevel import losses, optim
from mfm_jax.errors import UserError
from mfm_jax.machine import parallel
from mfm_jax.methods.table import BUILT_IN
from mfm_jax.models import native
from mfm_jax.models.convolution import convolution
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.training import feed as feed_lib
from mfm_jax.training import inputs
from mfm_jax.training import loop as loop_lib
from mfm_jax.types import Batch
from mfm_jax.workdir.checkpoint import Checkpointer

STEPS = 20
GOLDEN = Path(__file__).parent / "golden" / "collectives.json"
_compiled: list[str] = []


@pytest.fixture(autouse=True, scope="module")
def _listener():
    """Notes every compilation."""

    def note(event: str, seconds: float, **facts) -> None:
        if "backend_compile" in event:
            _compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(models, "create", lambda name, classes, width, dtype, **_: Tiny(classes, dtype))


def several_epochs(name: str, batch: int, **overrides):
    """A run of 20 steps, augmented, of which the second stage has the last half; meta batches do not divide.

    MFM has what composes with every method, too: mixed and smoothed labels, costs, class weights, a
    site before batch norm.
    """
    settings = {"data__imbalance_factor": 10.0, "train__epochs": 5, "train__batch_size": batch, "meta__batch_size": 50}
    if name == "mfm":
        settings |= {"modulation__sites": "stage3,pooled", "modulation__form": "network", "augment__mixup": 0.5}
        settings |= {"method__base": "class_balanced", "method__label_smoothing": 0.1}
        settings |= {"method__cost_share": 0.2, "eval__costs": "9>*=5"}
    return configured(name, **settings | overrides)


@functools.cache
def data_of(config):
    return data_lib.build(config)


def trajectory(config, mesh, steps: int = STEPS):
    """Takes `steps` steps of the compiled loop in float64.

    Each kind of step compiles once, gives its old state away, and moves nothing between host and device.
    """
    data = data_of(config)
    experiment = experiment_lib.build(config, data, mesh)
    loop = to_double(loop_lib.initial(experiment))
    loop = loop.replace(sums=jax.tree.map(lambda x: x.astype(jnp.float32), loop.sums))
    loop = jax.device_put(loop, parallel.state_sharding(loop, mesh) if mesh else inputs.everywhere(None))
    feed = feed_lib.make(data, experiment, config, inputs.to_device(data))
    call, seen, one = loop_lib.make_call(experiment, config), set(), jax.device_put(jnp.int32(1))
    for step in range(steps):
        epoch, at = divmod(step, experiment.steps_per_epoch)
        if at == 0:
            feed.start_epoch(epoch, step, loop.bilevel)
        kind, before, compiled = loop_lib.kind_of(experiment, config, step), loop, len(_compiled)
        guard = "disallow" if kind in seen else "allow"
        with jax.transfer_guard_device_to_host(guard), jax.transfer_guard_host_to_device(guard):
            loop = call(loop, feed.next(), one, kind)
        assert kind not in seen or len(_compiled) == compiled
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
        seen.add(kind)
    return loop


def assert_same(found, expected, tolerance: float, floor: float = 1e-6):
    """Each array to `tolerance` of its largest entry, or of `floor` where all are smaller.

    The bias before a batch norm has no gradient: what it holds is rounding.
    """
    pairs = zip(jax.tree.leaves_with_path(arrays(expected)), jax.tree.leaves(arrays(found)), strict=True)
    for (path, one), other in pairs:
        error, size = np.abs(one.astype(float) - other).max(initial=0), np.abs(one.astype(float)).max(initial=0)
        assert error <= tolerance * max(size, floor), f"{jax.tree_util.keystr(path)}: {error:.1e} of {size:.1e}"


_on_one: dict = {}


def check_trajectory(name, batch, devices, fsdp=1, steps=STEPS, **overrides):
    config = several_epochs(name, batch, **overrides)
    if (config, steps) not in _on_one:
        _on_one[config, steps] = trajectory(config, None, steps).bilevel
    loop = trajectory(config, parallel.data_mesh(jax.devices()[:devices], fsdp), steps)
    assert_same(loop.bilevel, _on_one[config, steps], 1e-8)
    return loop


class Convolutional(Tiny):
    """Two convolutions, of stride 1 and 2, before the layers of `Tiny`."""

    @nn.compact
    def __call__(self, image, **options):
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), dtype=self.dtype, conv_general_dilated=convolution)
        x = nn.relu(conv(5)(image.astype(self.dtype)))
        return Tiny(self.num_classes, self.dtype, self.axis_name)(nn.relu(conv(10, strides=2)(x)), **options)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [8, 4, 2, 1])
@pytest.mark.parametrize("how", ["native", "xla"])
def test_convolutions_take_the_same_twenty_steps(how, devices, monkeypatch, record_property):
    """On one device by XLA's convolutions, on one and several by the native ones and by XLA's."""
    there, by_xla = native.lowering("float64"), lambda dtype="float32": "xla"
    if how == "native" and there == "xla":
        pytest.skip(f"no native kernels: {native.reason()}")
    config = several_epochs("mfm", 91)
    monkeypatch.setattr(models, "create", lambda name, classes, width, dtype, **_: Convolutional(classes, jnp.float64))
    monkeypatch.setattr(native, "lowering", by_xla)
    with jax.enable_x64(True):
        if "convolutional" not in _on_one:
            _on_one["convolutional"] = trajectory(config, None).bilevel
        if how == "native":
            monkeypatch.setattr(native, "lowering", lambda dtype="float32": there)
        record_property("lowering", native.lowering("float64"))
        loop = trajectory(config, parallel.data_mesh(jax.devices()[:devices]))
        assert_same(loop.bilevel, _on_one["convolutional"], 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BUILT_IN))
@pytest.mark.parametrize("devices", [8, 4, 2, 1])
@pytest.mark.parametrize("batch", [91, 96])
def test_every_method_takes_the_same_twenty_steps(name, batch, devices, wide):
    check_trajectory(name, batch, devices)


@pytest.mark.parametrize("policy", ["autoaugment", slow("randaugment"), slow("trivialaugment")])
def test_a_batch_that_is_augmented_on_several_devices_is_that_of_one(policy):
    """Boxes are cut from the whole training set, which every device has: no image is sent.

    The devices agree on when the draws from a Beta distribution, a loop, have ended.
    """
    options = {"policy": policy, "cutout": 3, "cutmix": 1.0, "partners": "balanced"}
    config = several_epochs("ce", 96, **{f"augment__{name}": value for name, value in options.items()})
    data, mesh = data_of(config), parallel.data_mesh()
    order = jnp.arange(96, dtype=jnp.int32)[None] * 7 % len(data.train_labels)
    given = inputs.to_device(data).replace(order=order, meta_table=jnp.asarray(data.meta_table(0), jnp.int32))
    given = given.replace(mean=jnp.zeros(1), std=jnp.ones(1))  # two programs may divide with another last bit

    def make(mesh, given):
        keys = inputs.step_keys(jax.random.key(3), 0)
        batch = loop_lib._training_batch(keys, given, jnp.int32(0), config, mesh)
        return jax.lax.with_sharding_constraint(batch, parallel.split(mesh)) if mesh else batch

    one = jax.jit(functools.partial(make, None))(given)
    assert (one.share < 1).any()
    program = jax.jit(functools.partial(make, mesh)).lower(jax.device_put(given, parallel.replicated(mesh))).compile()
    chex.assert_trees_all_equal(arrays(program(jax.device_put(given, parallel.replicated(mesh)))), arrays(one))
    kinds = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
    found = re.findall(rf"= (\S+) (?:{kinds})(?:-start)?\(", program.as_text())
    assert set(found) == {"pred[]"}


def one_step(experiment, config, data, kind):
    """Takes one step of a kind from the initial state on the first images."""

    def batch(images, labels, size):
        return Batch(jnp.asarray(images[:size], jnp.float32) / 16, jnp.asarray(labels[:size]))

    given = [batch(data.train_images, data.train_labels, config.train.batch_size)]
    if config.method.second_view:
        given = [given[0]._replace(second=given[0]._replace(image=given[0].image[:, ::-1]))]
    if kind == "meta":
        given.append(batch(data.meta_images, data.meta_labels, config.meta.batch_size))
    if kind == "retrain" and experiment.synthetic:
        given = [given[0]._replace(image=jnp.ones((config.train.batch_size, 8)).at[0].set(0.5))]
    return jax.jit(getattr(experiment, f"{kind}_step"))(experiment.init(), *given)


def test_what_is_compiled_quickly_has_the_same_bits(monkeypatch):
    def draw(key):
        keys = jax.random.split(key, 3)
        return [jax.random.truncated_normal(k, -2, 2, (3, 3, 8, 8)) / 3 for k in keys], jax.random.normal(key, (40,))

    monkeypatch.setenv("XLA_FLAGS", "")  # those of the tests have a level
    key, drawn = jax.random.key(3), parallel.jit_once(draw)
    default = jax.jit(draw).lower(key).compile(compiler_options={"xla_backend_optimization_level": 3})
    chex.assert_trees_all_equal(drawn(key), default(key))
    chex.assert_trees_all_equal_shapes(jax.eval_shape(lambda: drawn(key)), drawn(key))  # inside another program


def test_weights_of_a_padded_batch(tiny, monkeypatch):
    """The method whose phi belongs to the batch's examples, here with blanks among them."""
    check_step("l2rw", 8, 91, monkeypatch)


def test_running_statistics_of_a_padded_batch(tiny, monkeypatch):
    check_step("mfm", 8, 91, monkeypatch, meta__bn="running")


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "batch"), [(2, 96), (4, 96), (8, 96), (8, 91)])
@pytest.mark.parametrize("name", list(BUILT_IN))
def test_every_method_takes_the_same_step_in_float32(name, devices, batch, tiny, monkeypatch):
    check_step(name, devices, batch, monkeypatch)


def check_step(name, devices, batch, monkeypatch, **overrides):
    # SGD, since the first step of Adam blows the rounding of a gradient near zero up to the size of a whole step.
    monkeypatch.setattr(optim, "outer", lambda *_: optax.sgd(0.1))
    config = several_epochs(name, batch, **overrides)
    data, mesh = data_of(config), parallel.data_mesh(jax.devices()[:devices])
    one, many = (experiment_lib.build(config, data, where) for where in (None, mesh))
    for kind in kinds(one):
        found, expected = (one_step(experiment, config, data, kind) for experiment in (many, one))
        assert_same(found[0], expected[0], 1e-5, floor=0.1)
        # A second derivative is itself no better than 1e-5 in float32, and so is its norm.
        assert_same(found[1], expected[1], 1e-4)


def kinds(experiment):
    return [kind for kind in ("plain", "meta", "retrain") if getattr(experiment, f"{kind}_step")]


def test_padding_keeps_every_mean():
    batch = Batch(jnp.ones((5, 2)), jnp.arange(5), weight=jnp.array([0.5, 1.5, 1.0, 1.0, 1.0]))
    for given in (batch, batch._replace(weight=None)):
        padded, values = parallel.padded(given, 4), jnp.arange(5.0)
        assert len(padded.image) == len(padded.label) == 8
        weight = jnp.ones(5) if given.weight is None else given.weight
        assert padded.weight.mean() == pytest.approx(1)
        assert (padded.weight[:5] * values).sum() / 8 == pytest.approx(float((weight * values).mean()))
        assert not padded.weight[5:].any()
    assert parallel.padded(batch, 5) is batch


# --- local batch norm -----------------------------------------------------------------------------


def test_local_batch_norm_normalises_each_part_and_averages_the_running_averages(tiny):
    config = several_epochs("ce", 96, parallel__batch_norm="local")
    data, mesh = data_of(config), parallel.data_mesh(jax.devices()[:4])
    experiment = experiment_lib.build(config, data, mesh)
    state, metrics = one_step(experiment, config, data, "plain")
    start, images = experiment.init(), jnp.asarray(data.train_images[:96], jnp.float32) / 16
    variables = {"params": start.params, "batch_stats": start.batch_stats}
    parts = [
        Tiny(10, jnp.float32).apply(variables, part, train=True, mutable=["batch_stats"])
        for part in jnp.split(images, 4)
    ]
    logits = jnp.concatenate([part[0] for part in parts])
    loss = losses.cross_entropy(logits, jnp.asarray(data.train_labels[:96])).mean()
    statistics = jax.tree.map(lambda *leaves: sum(leaves) / 4, *(part[1]["batch_stats"] for part in parts))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    chex.assert_trees_all_close(arrays(state.batch_stats), statistics, rtol=1e-5)
    whole = Tiny(10, jnp.float32).apply(variables, images, train=True, mutable=["batch_stats"])[1]["batch_stats"]
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), arrays(state.batch_stats), whole))) > 1e-4


def test_local_batch_norm_cannot_be_padded(tiny):
    for batch, meta_bn, field in ((91, "running", "train.batch_size = 91"), (96, "batch", "meta.batch_size = 50")):
        config = several_epochs("mfm", batch, parallel__batch_norm="local", meta__bn=meta_bn)
        with pytest.raises(UserError, match=f"batch_norm = 'local': {field} does not divide by 4 devices; use a multi"):
            experiment_lib.build(config, data_of(config), parallel.data_mesh(jax.devices()[:4]))


@pytest.mark.parametrize("fsdp", [1, slow(2)])
@pytest.mark.parametrize("average", [{"optim__ema": 0.9}, slow({"optim__swa_from": 0.2})])
def test_options_of_the_weights_are_the_same_on_several_devices(average, fsdp, wide):
    """An average, a bound that is reached, a decay by classes, and a gradient up the loss of rare classes."""
    rare = {"optim__sam_rho": 0.1, "optim__sam_below": 20}
    options = {"optim__head_max_norm": 0.4, "optim__head_decay": 0.01} | rare | average
    loop = check_trajectory("mfm", 91, 8, fsdp, steps=6, **options)
    lengths = np.linalg.norm(loop.bilevel.params["head"]["kernel"], axis=0)
    assert lengths.max() == pytest.approx(0.4)


# --- the axis `model` -----------------------------------------------------------------------------


def test_divided_state_takes_the_same_steps_and_is_restored(wide, tmp_path):
    steps = 6  # in two epochs
    loop = check_trajectory("mfm", 91, 8, fsdp=2, steps=steps)
    state = loop.bilevel
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        held = leaf.addressable_shards[0].data.nbytes
        assert held == (leaf.nbytes // 2 if leaf.ndim > 1 else leaf.nbytes)
    checkpoints = Checkpointer(tmp_path, config_lib.Checkpoint(), has_validation=False)
    checkpoints.save(steps, loop, state.phi, {}, None)
    checkpoints.wait()
    again, _ = checkpoints.restore(steps, loop)
    checkpoints.close()
    chex.assert_trees_all_equal(arrays(again), arrays(loop))
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x: x.sharding, tree) for tree in (again, loop)))


@pytest.mark.slow
def test_each_divided_kernel_is_gathered_once_and_nothing_else_is(tiny):
    """Of a plain step: momentum has the kernels' shapes, and would show."""
    config = several_epochs("ce", 96)
    data, mesh = data_of(config), parallel.data_mesh(jax.devices()[:4], 2)
    experiment = experiment_lib.build(config, data, mesh)
    state = experiment.init()
    state = jax.device_put(state, parallel.state_sharding(state, mesh))
    batch = Batch(jnp.zeros((96, *data.train_images.shape[1:])), jnp.zeros(96, jnp.int32))
    text = jax.jit(experiment.plain_step).lower(state, batch).compile().as_text()
    gathered = re.findall(r"= f32\[(\S+?)\]\S* all-gather\(", text)
    kernels = [leaf.shape for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1]
    assert sorted(gathered) == sorted(",".join(map(str, shape)) for shape in kernels)
    assert not re.search(r" (reduce-scatter|collective-permute|all-to-all)\(", text)


def test_devices_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"parallel.fsdp = 3: does not divide the number of devices, 8"):
        parallel.data_mesh(fsdp=3)


# --- what the devices say to each other -----------------------------------------------------------


@functools.cache
def scaling():
    with benchmark("scaling") as module:
        return module


@pytest.mark.parametrize("name", ["mfm", *(slow(name) for name in BUILT_IN if name != "mfm")])
def test_collectives(name):
    assert scaling().collectives_of(name) == json.loads(GOLDEN.read_text())[name]


def test_the_golden_counts_are_those_of_the_derivation():
    """ResNet-8 of width 2: 7 batch norms of 30 channels together, 1356 parameters; `parallel` has the formulas."""
    golden, norms = json.loads(GOLDEN.read_text()), 7
    assert set(golden) == set(BUILT_IN)
    assert golden["ce"]["plain"]["collectives"] == 2 * norms + 1
    assert golden["mfm"]["meta"]["collectives"] == 4 * norms + 3
    assert golden["ce"]["plain"]["bytes"] == scaling().step_bytes(1356, 30, meta=False)
    # At `logits` the modulation meets the examples as gamma and beta of 10 classes.
    assert golden["mfm"]["meta"]["bytes"] == scaling().step_bytes(1356, 30, meta=True, phi=20)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "collectives"), [("ce", 3), ("meta_weight_net", 8)])
def test_sampling_and_padding_add_no_collective(name, collectives, tiny):
    """The compiled call: 2 + 1 and 3 + 3 for one batch norm, and the sum of the weights with its tangent."""
    config = several_epochs(name, 91)
    data, mesh = data_of(config), parallel.data_mesh()
    experiment = experiment_lib.build(config, data, mesh)
    order, table = experiment.order(jax.random.key(1), 0), jnp.asarray(data.meta_table(0), jnp.int32)
    on_device = inputs.to_device(data).replace(order=order, meta_table=table)
    given = jax.device_put((loop_lib.initial(experiment), on_device), parallel.replicated(mesh))
    call = loop_lib.make_call(experiment, config)
    text = call.lower(*given, jnp.int32(1), "plain" if name == "ce" else "meta").compile().as_text()
    found = re.findall(r" (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(", text)
    assert found == ["all-reduce"] * collectives
