"""The classifiers: sizes by formula, sites, precision, batch statistics."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import slow

from mfm_jax import config, models
from mfm_jax.bilevel import modulation
from mfm_jax.config import SMALL_RESNETS
from mfm_jax.errors import UserError
from mfm_jax.models.densenet import DenseNet
from mfm_jax.models.efficientnet import B0, EfficientNet, Plan, scaled
from mfm_jax.models.imagenet import Block, ResNet
from mfm_jax.models.resnet import shortcut
from mfm_jax.models.vit import VisionTransformer
from mfm_jax.models.wide_resnet import WideResNet

SITES = ("stem", "stage1", "stage2", "stage3", "pooled", "logits")
LABELS = np.array([0, 2, 1, 2], np.int32)
IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)


def net(dtype=jnp.float32):
    return models.create("resnet8", 3, 8, dtype)


@pytest.fixture(scope="module")
def variables():
    """Returns the variables of `net()` with running averages that are not those of the start."""
    found = jax.jit(net().init)(jax.random.key(0), IMAGES)
    rng = np.random.default_rng(1)
    centre = jax.tree_util.tree_map_with_path(lambda path, _: float(path[-1].key == "var"), found["batch_stats"])
    stats = jax.tree.map(
        lambda x, c: (c + rng.uniform(-0.3, 0.3, x.shape)).astype(np.float32), found["batch_stats"], centre
    )
    return {**found, "batch_stats": stats}


@pytest.fixture(scope="module")
def plain_logits(variables):
    return jax.jit(net().apply)(variables, IMAGES)


def shapes_of(module: nn.Module, size: int = 32):
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))


def recording(of):
    """Returns what `of` gives at each site, in their order, and the `Modulate` that notes it."""
    seen = {}

    def record(site, features):
        assert site not in seen, "each is called once"
        seen[site] = of(features)
        return features

    return seen, record


def parameter_count(blocks: int, num_classes: int, width: int) -> int:
    """Counts by formula: 3x3 convolutions without bias, two numbers a channel for each norm, a dense head."""
    total = 9 * 3 * width + 2 * width
    inputs = width
    for channels in (width, 2 * width, 4 * width):
        total += 9 * inputs * channels + 2 * channels  # the first convolution; the shortcut is free
        total += (2 * blocks - 1) * (9 * channels**2 + 2 * channels)
        inputs = channels
    return total + inputs * num_classes + num_classes


@pytest.mark.parametrize(
    ("name", "blocks", "num_classes", "width", "millions"),
    [("resnet20", 3, 10, 16, 0.27), ("resnet32", 5, 10, 16, 0.46), ("resnet8", 1, 100, 8, None)],
)
def test_parameter_counts(name, blocks, num_classes, width, millions):
    shapes = shapes_of(models.create(name, num_classes, width))["params"]
    found = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert found == parameter_count(blocks, num_classes, width)
    if millions:
        assert round(found / 1e6, 2) == millions


def test_the_name_tells_the_layers():
    for name in SMALL_RESNETS:
        shapes = shapes_of(models.create(name, 10, 1), 4)["params"]
        layers = [path for path, _ in jax.tree_util.tree_leaves_with_path(shapes) if path[-1].key == "kernel"]
        assert f"resnet{len(layers)}" == name


def test_sites_come_in_order_with_their_shapes(variables):
    seen, record = recording(jnp.shape)
    jax.eval_shape(lambda: net().apply(variables, IMAGES, modulate=record))
    shapes = [(4, 8, 8, 8), (4, 8, 8, 8), (4, 4, 4, 16), (4, 2, 2, 32), (4, 32), (4, 3)]
    assert list(seen.items()) == list(zip(SITES, shapes, strict=True))


def test_sites_follow_the_relu(variables):
    smallest, record = recording(jnp.min)
    found = jax.jit(lambda v: (net().apply(v, IMAGES, modulate=record), dict(smallest))[1])(variables)
    assert {site: float(found[site]) for site in SITES[:4]} == dict.fromkeys(SITES[:4], 0.0)
    assert found["pooled"] >= 0 > found["logits"]


def test_virtual_groups_are_groups_of_the_parameters(variables):
    groups = set(variables["params"])
    assert groups == {"stem", "stem_norm", "stage1", "stage2", "stage3", "head"}
    assert models.virtual_groups("resnet8", "last_stage") == ("stage3", "head")
    assert models.virtual_groups("resnet8", "head") == ("head",)
    assert models.virtual_groups("resnet8", "all") is None


# --- the modulated pass ---------------------------------------------------------------------------


@jax.jit
def modulated(variables, gammas):
    """Returns the logits under gamma = beta = `gammas[site]`; they are arguments, so that no zero is compiled away."""
    channels = {"stem": 8, "stage1": 8, "stage2": 16, "stage3": 32, "pooled": 32, "logits": 3}
    modulator = modulation.direct(channels)
    parameters = {
        site: {name: jnp.full(size, gammas[site]) for name in ("gamma", "beta")} for site, size in channels.items()
    }
    return net().apply(variables, IMAGES, modulate=modulation.modulate(modulator, parameters, LABELS))


def only(site, gamma):
    return dict.fromkeys(SITES, jnp.float32(0.0)) | {site: jnp.float32(gamma)}


def test_identity_modulation_equals_the_plain_network_bit_for_bit(variables, plain_logits):
    chex.assert_trees_all_equal(modulated(variables, only("logits", 0.0)), plain_logits)


@pytest.mark.parametrize("site", SITES)
def test_modulation_at_each_site_reaches_the_logits(site, variables, plain_logits):
    assert (modulated(variables, only(site, 0.1)) != plain_logits).all()


def test_modulation_at_the_logits_is_the_last_thing_done(variables, plain_logits):
    chex.assert_trees_all_close(modulated(variables, only("logits", 0.5)), 1.5 * plain_logits + 0.5, rtol=1e-5)


# --- precision ------------------------------------------------------------------------------------


def test_bfloat16_computes_low_and_keeps_parameters_statistics_and_logits_high(variables):
    seen, record = recording(lambda features: features.dtype)
    module = net(jnp.bfloat16)
    found = shapes_of(module, 8)
    chex.assert_type(jax.tree.leaves(found), jnp.float32)
    logits, written = jax.eval_shape(
        lambda: module.apply(variables, IMAGES, train=True, modulate=record, mutable=["batch_stats"])
    )
    assert logits.dtype == jnp.float32
    chex.assert_type(jax.tree.leaves(written), jnp.float32)
    assert seen.pop("logits") == jnp.float32
    assert set(seen.values()) == {jnp.dtype(jnp.bfloat16)}


def test_bfloat16_logits_are_close_to_float32(variables, plain_logits):
    low = jax.jit(net(jnp.bfloat16).apply)(variables, IMAGES)
    chex.assert_trees_all_close(low, plain_logits, atol=0.05 * float(jnp.abs(plain_logits).max()))
    assert (low != plain_logits).any()


# --- batch statistics -----------------------------------------------------------------------------


def test_evaluation_writes_nothing_and_is_per_example(variables, plain_logits):
    run = jax.jit(lambda v, x: net().apply(v, x, train=False, mutable=["batch_stats"]))
    logits, written = run(variables, IMAGES)
    chex.assert_trees_all_equal(written["batch_stats"], variables["batch_stats"])
    shuffled, _ = run(variables, np.concatenate([IMAGES[:1], IMAGES[:3]]))
    chex.assert_trees_all_close(shuffled[0], logits[0], rtol=1e-5)
    chex.assert_trees_all_equal(plain_logits, logits)  # `train` is off unless asked for


def test_training_moves_the_running_averages_by_a_tenth_of_the_way(variables, plain_logits):
    logits, written = jax.jit(lambda v: net().apply(v, IMAGES, train=True, mutable=["batch_stats"]))(variables)
    assert (logits != plain_logits).all()
    before, after = variables["batch_stats"], written["batch_stats"]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, after)
    assert min(jax.tree.leaves(moved)) > 0
    kernel = variables["params"]["stem"]["kernel"]
    stem = jax.lax.conv_general_dilated(
        IMAGES, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    for name, value in (("mean", stem.mean((0, 1, 2))), ("var", stem.var((0, 1, 2)))):
        chex.assert_trees_all_close(after["stem_norm"][name], 0.9 * before["stem_norm"][name] + 0.1 * value, rtol=1e-4)


# --- blocks ---------------------------------------------------------------------------------------


def test_shortcut_subsamples_and_fills_with_zeros_on_both_sides():
    x = np.arange(1, 33, dtype=np.float32).reshape(1, 4, 4, 2)
    out = shortcut(x, 4, 2)
    chex.assert_trees_all_equal(out[..., 1:3], x[:, ::2, ::2])
    chex.assert_trees_all_equal(out[..., [0, 3]], jnp.zeros((1, 2, 2, 2)))
    chex.assert_trees_all_equal(shortcut(x, 2, 1), x)


def test_initial_kernels_have_kaiming_variance(variables):
    params = variables["params"]
    convolution, head = params["stage3"]["BasicBlock_0"]["Conv_1"]["kernel"], params["head"]["kernel"]
    assert float(convolution.std()) == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.03)
    assert float(head.std()) == pytest.approx((2 / 32) ** 0.5, rel=0.25)  # 96 numbers
    chex.assert_trees_all_equal(params["head"]["bias"], jnp.zeros(3))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("running", [True, False])
def test_batch_norm_is_that_of_flax(running, dtype):
    """Bit for bit the statistics, and the names and shapes of what it keeps; the result to rounding."""
    x = (1 + 3 * jax.random.normal(jax.random.key(0), (16, 5, 5, 7))).astype(dtype)
    theirs, ours = nn.BatchNorm(running, momentum=0.9, dtype=dtype), models.BatchNorm(running, dtype=dtype)
    start = theirs.init(jax.random.key(1), x)
    chex.assert_trees_all_equal(ours.init(jax.random.key(1), x), start)
    start = jax.tree.map(lambda leaf: leaf + jax.random.uniform(jax.random.key(2), leaf.shape), start)
    found, expected = (jax.jit(lambda m=m: m.apply(start, x, mutable=["batch_stats"]))() for m in (ours, theirs))
    chex.assert_trees_all_equal(found[1], expected[1])
    chex.assert_trees_all_close(found[0], expected[0], rtol=(ulp := float(jnp.finfo(dtype).eps)), atol=4 * ulp)


def test_batch_norm_leaves_out_examples_of_weight_zero():
    x = 1 + 3 * jax.random.normal(jax.random.key(0), (6, 2, 2, 3))
    module = models.BatchNorm(False)
    start = module.init(jax.random.key(1), x)
    weight = jnp.array([1.5, 1.5, 0.0, 1.5, 1.5, 0.0])
    kept = jnp.array([0, 1, 3, 4])
    y, found = module.apply(start, x, weight, mutable=["batch_stats"])
    expected, statistics = module.apply(start, x[kept], mutable=["batch_stats"])
    chex.assert_trees_all_close((y[kept], found), (expected, statistics), rtol=1e-5, atol=1e-6)


# --- models for large images ----------------------------------------------------------------------

# Small ones of each kind: plain blocks, bottlenecks in groups, a transformer; and of the other families.
SMALL = {
    "resnet": ResNet((1, 1), 3, 4),
    "resnext": ResNet((1, 1), 3, 4, bottleneck=True, groups=4),
    "vit": VisionTransformer(3, 8, depth=1, patch=8),
    "wide": WideResNet(1, 3, 4, widen=2),
    "dense": DenseNet(1, 3, 4),
    "efficient": EfficientNet(3, 8, (Plan(1, 3, 1, 16, 1), Plan(2, 5, 2, 24, 6))),
}
LARGE_IMAGES = np.random.default_rng(2).normal(size=(4, 32, 32, 3)).astype(np.float32)
STAGES = [(4, 8, 8, 4), (4, 8, 8, 4), (4, 4, 4, 8), (4, 8), (4, 3)]
SHAPES = {
    "resnet": STAGES,
    "resnext": [STAGES[0], *((*s[:-1], 4 * s[-1]) for s in STAGES[1:-1]), STAGES[-1]],
    "vit": [*[(4, 17, 8)] * 2, (4, 8), (4, 3)],
    "wide": [(4, 32, 32, 4), (4, 32, 32, 8), (4, 16, 16, 16), (4, 8, 8, 32), (4, 32), (4, 3)],
    "dense": [(4, 32, 32, 4), (4, 16, 16, 3), (4, 8, 8, 2), (4, 8, 8, 4), (4, 4), (4, 3)],
    "efficient": [*[(4, 16, 16, 8)] * 2, (4, 8, 8, 8), (4, 320), (4, 3)],
}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnext50", 25_028_904),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
        ("vit_b16", 86_567_656),
        ("efficientnet_b0", 5_288_548),
    ],
)
def test_models_for_large_images_have_the_published_number_of_parameters(name, parameters):
    """As the documentation of torchvision gives them, with 1000 classes."""
    shapes = shapes_of(models.create(name, 1000, 0), 224)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_block_for_large_images_starts_as_its_shortcut(bottleneck):
    norm = functools.partial(models.BatchNorm, momentum=0.9)
    block = Block(4, 1, bottleneck, 1, jnp.float32, norm)
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 16 if bottleneck else 4))
    variables = block.init(jax.random.key(1), x, True, None)
    found, _ = block.apply(variables, x, True, None, mutable=["batch_stats"])
    chex.assert_trees_all_equal(found, nn.relu(x))
    name, params = "norm3" if bottleneck else "norm2", variables["params"]
    moved = {**params, name: {**params[name], "scale": jnp.ones_like(params[name]["scale"])}}
    found, _ = block.apply({**variables, "params": moved}, x, True, None, mutable=["batch_stats"])
    assert float(jnp.abs(found - nn.relu(x)).max()) > 0.1


def conv_and_norm(inputs: int, outputs: int, side: int) -> int:
    return side**2 * inputs * outputs + 2 * outputs


def test_a_wide_resnet_has_the_published_number_of_parameters():
    """36.5 million (their table 4); by hand, convolutions without bias and a norm in front of each but the stem."""
    total, inputs = 9 * 3 * 16, 16
    for channels in (160, 320, 640):
        total += 2 * inputs + conv_and_norm(inputs, channels, 3) + 9 * channels**2 + inputs * channels
        total += 3 * 2 * (2 * channels + 9 * channels**2)
        inputs = channels
    total += 2 * 640 + 640 * 10 + 10
    shapes = shapes_of(models.create("wrn28_10", 10, 0))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == total == 36_479_194
    layers = [path for path, leaf in jax.tree.leaves_with_path(shapes) if leaf.ndim > 1]
    assert len(layers) == 28 + 1  # convolutions, the three shortcuts among them, and the head


def test_a_densenet_has_the_published_number_of_parameters():
    """0.8 million (their table 2: DenseNet-BC, k = 12, 100 layers)."""
    total, channels, growth = 9 * 3 * 24, 24, 12
    for stage in range(3):
        for _ in range(16):
            total += 2 * channels + conv_and_norm(channels, 4 * growth, 1) + 9 * 4 * growth * growth
            channels += growth
        total += 2 * channels
        if stage < 2:
            total += channels * (channels // 2)
            channels //= 2
    total += channels * 10 + 10
    shapes = shapes_of(models.create("densenet_bc100", 10, 0))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == total == 769_162
    layers = [path for path, leaf in jax.tree.leaves_with_path(shapes) if leaf.ndim > 1]
    assert len(layers) == 100


def test_an_efficientnet_is_scaled_in_eights():
    assert [scaled(plan.channels, 32) for plan in B0] == [16, 24, 40, 80, 112, 192, 320]
    # 1.1 times 16 is 17.6, of 24 26.4, of 1280 1408: to the next eight, but not below nine tenths.
    assert [scaled(channels, 35.2) for channels in (16, 24, 1280)] == [16, 24, 1408]
    assert scaled(24, 16) == 16  # 12 rounds to 16
    assert scaled(40, 8) == 16  # 10 rounds to 8, which is too little


@pytest.mark.parametrize("kind", SMALL)
def test_sites_for_large_images_come_in_order_with_their_shapes(kind):
    seen, record = recording(jnp.shape)
    jax.eval_shape(lambda: SMALL[kind].init(jax.random.key(0), LARGE_IMAGES, modulate=record))
    stages = range(1, len(SHAPES[kind]) - 2)
    middle = [("block{}" if kind == "vit" else "stage{}").format(i) for i in stages]
    assert list(seen.items()) == list(zip(("stem", *middle, "pooled", "logits"), SHAPES[kind], strict=True))


@pytest.mark.parametrize("name", config.FIELDS["model.name"].choices)
def test_every_model_can_be_made_and_has_its_virtual_groups(name):
    width = {"resnext50": 16, "efficientnet_b0": 8}.get(name, 4)
    params = shapes_of(models.create(name, 3, width, jnp.bfloat16, remat=True), 28 if "b14" in name else 32)["params"]
    groups = models.virtual_groups(name, "last_stage")
    assert {"head"} < set(groups) <= set(params)
    chex.assert_type(jax.tree.leaves(params), jnp.float32)


@pytest.mark.parametrize("kind", SMALL)
def test_bfloat16_on_large_images(kind):
    module = SMALL[kind]
    variables = jax.jit(module.init)(jax.random.key(0), LARGE_IMAGES)
    seen, record = recording(lambda features: features.dtype)
    low = jax.jit(lambda v: module.clone(dtype=jnp.bfloat16).apply(v, LARGE_IMAGES, modulate=record))(variables)
    assert low.dtype == seen.pop("logits") == jnp.float32
    assert set(seen.values()) == {jnp.dtype(jnp.bfloat16)}
    high = jax.jit(module.apply)(variables, LARGE_IMAGES)
    chex.assert_trees_all_close(low, high, atol=0.05 * float(jnp.abs(high).max()))
    assert (low != high).any()


@pytest.mark.parametrize("kind", ["resnet", *map(slow, ("cifar", "resnext", "vit", "wide", "dense", "efficient"))])
def test_computing_activations_again_changes_no_gradient(kind):
    module = net() if kind == "cifar" else SMALL[kind]
    images = LARGE_IMAGES[:, :16, :16]
    variables = jax.jit(module.init)(jax.random.key(0), images)
    again = module.clone(remat=True)
    chex.assert_trees_all_equal_shapes(jax.eval_shape(again.init, jax.random.key(0), images), variables)

    def loss(module, params):
        logits, written = module.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        return jax.nn.logsumexp(logits, axis=-1).mean(), written

    gradient = jax.jit(jax.grad(loss, argnums=1, has_aux=True), static_argnums=0)
    found, expected = gradient(again, variables["params"]), gradient(module, variables["params"])
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)
    jaxpr = str(jax.make_jaxpr(jax.grad(loss, argnums=1, has_aux=True), static_argnums=0)(again, variables["params"]))
    assert "remat" in jaxpr


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"^data.image_size: images are 32 x 40 pixels, .* choose a multiple of 16"):
        jax.eval_shape(models.create("vit_b16", 3, 8).init, jax.random.key(0), jnp.zeros((1, 32, 40, 3)))
    with pytest.raises(UserError, match=r"^model.width = 100: vit_b16 .* choose a multiple of 64, or 0$"):
        models.create("vit_b16", 3, 100)
    with pytest.raises(UserError, match=r"^model.width = 8: resnext50 .* choose a multiple of 16, or 0$"):
        models.create("resnext50", 3, 8)
    with pytest.raises(UserError, match=r"^model.width = 12: efficientnet_b0 .* choose a multiple of 8, or 0$"):
        models.create("efficientnet_b0", 3, 12)
    with pytest.raises(UserError, match=r"^model.width = 5: densenet_bc100 .* choose a multiple of 2, or 0$"):
        models.create("densenet_bc100", 3, 5)
