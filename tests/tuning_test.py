"""A frozen backbone: nothing but the head and the adapters moves, and the meta-gradient goes through it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import slow

from mfm_jax import bilevel, models
from mfm_jax.bilevel import hypergrad, losses, modulation, optim, outer
from mfm_jax.bilevel.passes import Pass
from mfm_jax.config import Optim
from mfm_jax.models.imagenet import ResNet
from mfm_jax.models.vit import VisionTransformer
from mfm_jax.types import Batch

CLASSES, WIDTH = 3, 8
IMAGES = np.random.default_rng(0).normal(size=(2, 6, 16, 16, 3)).astype(np.float32)
LABELS = jnp.arange(6, dtype=jnp.int32) % CLASSES
COUNTS = jnp.array([90, 20, 4])
NETS = {
    "adapters": VisionTransformer(CLASSES, WIDTH, depth=1, patch=8, adapter_size=4),
    "head": ResNet((1, 1), CLASSES, 4),
    "lora": VisionTransformer(CLASSES, WIDTH, depth=1, patch=8, lora_rank=2),
}


def names(tree) -> set[str]:
    """Returns the paths at which a tree of booleans is True."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, flag in found if flag}


@functools.cache
def variables_of(tune: str):
    """Returns variables of which nothing is zero: neither the adapters nor the running averages."""
    start = jax.jit(NETS[tune].init)(jax.random.key(0), IMAGES[0])
    leaves, structure = jax.tree.flatten(start)
    rng = np.random.default_rng(1)
    return structure.unflatten([leaf + rng.uniform(-0.2, 0.2, leaf.shape).astype(np.float32) for leaf in leaves])


def chain(tune: str):
    """Every part that could move a frozen leaf, or be moved by one: decay, momentum, the clipped norm."""
    settings = Optim(weight_decay=0.1, clip_norm=0.5, learning_rate=0.1)
    return optim.only(optim.classifier(settings, settings.learning_rate), lambda p: models.trained(p, tune))


def test_what_is_trained_by_name():
    params = jax.eval_shape(NETS["adapters"].init, jax.random.key(0), IMAGES[0])["params"]
    head = {"head/kernel", "head/bias"}
    adapters = {f"block1/adapter_{w}/{n}" for w in ("down", "up") for n in ("kernel", "bias")}
    assert names(models.trained(params, "head")) == head
    assert names(models.trained(params, "adapters")) == head | adapters
    assert all(jax.tree.leaves(models.trained(params, "all")))
    params = jax.eval_shape(NETS["lora"].init, jax.random.key(0), IMAGES[0])["params"]
    thin = {f"block1/lora_{part}/{layer}/kernel" for part in ("query", "value") for layer in ("down", "up")}
    assert names(models.trained(params, "lora")) == head | thin


def test_with_new_adapters_the_network_is_the_one_without():
    module = NETS["adapters"]
    run = jax.jit(lambda variables: module.apply(variables, IMAGES[0]))

    @jax.jit
    def plain(variables):
        own = {
            name: {part: leaf for part, leaf in group.items() if not part.startswith("adapter")}
            for name, group in variables["params"].items()
        }
        return module.clone(adapter_size=0).apply({"params": own}, IMAGES[0])

    new, trained = jax.jit(module.init)(jax.random.key(0), IMAGES[0]), variables_of("adapters")
    chex.assert_trees_all_close(run(new), plain(new), rtol=1e-5)
    assert jnp.abs(run(trained) - plain(trained)).max() > 1e-3


@pytest.mark.parametrize("tune", NETS)
def test_only_what_is_tuned_moves(tune):
    module, tx = NETS[tune], chain(tune)
    modulator = modulation.frequency({"logits": CLASSES}, COUNTS)
    phi_tx = optax.adam(0.1)
    before = bilevel.init_state(jax.random.key(0), variables_of(tune), tx, modulator.init, phi_tx)
    flags = models.trained(before.params, tune)
    kept = [
        leaf.size for leaf, flag in zip(jax.tree.leaves(before.params), jax.tree.leaves(flags), strict=True) if flag
    ]
    momentum = [leaf.size for leaf in jax.tree.leaves(before.opt_state) if leaf.ndim]
    assert sum(momentum) == sum(kept)
    forward = Pass(models.frozen(module.apply, tune))
    step = bilevel.make_step(forward, losses.cross_entropy, tx, modulator, phi_tx)
    after, metrics = jax.jit(step)(before, Batch(IMAGES[0], LABELS), Batch(IMAGES[1], LABELS))
    after, metrics = jax.jit(step)(after, Batch(IMAGES[0], LABELS), Batch(IMAGES[1], LABELS))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, after.params)
    chex.assert_trees_all_equal(changed, flags)
    chex.assert_trees_all_equal(after.batch_stats, before.batch_stats)
    assert float(metrics["hypergrad_norm"]) > 0


def test_a_frozen_network_has_no_backward_pass():
    """The gradient's program has as many convolutions as the forward pass; trained in full it has more."""
    module, variables = NETS["head"], variables_of("head")

    def convolutions(function) -> int:
        return str(jax.make_jaxpr(function)(variables["params"])).count("convolution")

    def loss(apply, params):
        return jax.nn.logsumexp(apply({**variables, "params": params}, IMAGES[0])).sum()

    frozen, full = (functools.partial(loss, apply) for apply in (models.frozen(module.apply, "head"), module.apply))
    assert convolutions(jax.grad(frozen)) == convolutions(full) > 0
    assert convolutions(jax.grad(full)) > 2 * convolutions(full)


def test_a_frozen_batch_norm_normalises_by_its_running_averages_in_training_too():
    module, variables = NETS["head"], variables_of("head")
    apply = jax.jit(functools.partial(models.frozen(module.apply, "head"), train=True, mutable=["batch_stats"]))
    logits, written = apply(variables, IMAGES[0])
    chex.assert_trees_all_equal(written["batch_stats"], variables["batch_stats"])
    chex.assert_trees_all_close(logits, jax.jit(module.apply)(variables, IMAGES[0]), rtol=1e-6)


# --- the meta-gradient ----------------------------------------------------------------------------

FORMS = {
    "direct": modulation.direct,
    "frequency": lambda channels: modulation.frequency(channels, COUNTS),
    "network": lambda channels: modulation.network(channels, COUNTS, hidden=5),
}
TOKENS = {"stem": WIDTH, "block1": WIDTH, "pooled": WIDTH, "logits": CLASSES}
MAPS = {"stem": 4, "stage1": 4, "stage2": 8, "logits": CLASSES}


def both_routes(module, apply, variables, tx, modulator):
    """Returns the meta-gradient by both routes, at a modulation that is not the identity."""
    state = bilevel.init_state(jax.random.key(0), variables, tx, modulator.init)
    phi = jax.tree.map(lambda leaf: leaf + 0.2 * jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape)), state.phi)
    forward = Pass(apply)
    build = bilevel.halves(forward, bilevel.Objective(losses.cross_entropy), tx, outer.of(modulator))

    def meta_loss(state, params):
        logits, _ = forward.logits(state, params, Batch(IMAGES[1], LABELS), train=False)
        return losses.cross_entropy(logits, LABELS).mean(), None

    def run(state, phi):
        parts = build(state, Batch(IMAGES[0], LABELS))
        functions = parts[0], functools.partial(meta_loss, state), parts[1]
        routes = (hypergrad.mixed_mode, hypergrad.reverse_over_reverse)
        return [route(*functions, state.params, phi).grad for route in routes]

    found, oracle = jax.jit(run)(state, phi)
    chex.assert_tree_all_finite(found)
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(oracle))
    assert size > 1e-5
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(oracle))
    chex.assert_trees_all_close(found, oracle, atol=1e-4 * size)


@pytest.mark.parametrize("form", ["frequency", slow("direct"), slow("network")])
@pytest.mark.parametrize("tune", ["adapters", "lora"])
def test_meta_gradient_through_frozen_tokens_and_what_is_trained_beside_them(form, tune):
    apply = models.frozen(NETS[tune].apply, tune)
    both_routes(NETS[tune], apply, variables_of(tune), chain(tune), FORMS[form](TOKENS))


@pytest.mark.parametrize("tune", [slow("all"), "head"])
def test_meta_gradient_through_max_pooling_and_projections(tune):
    module = NETS["head"]
    apply = module.apply if tune == "all" else models.frozen(module.apply, tune)
    both_routes(module, apply, variables_of("head"), chain(tune), FORMS["direct"](MAPS))
