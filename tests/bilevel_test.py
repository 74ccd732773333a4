"""The steps: identities, the batch-norm policy, the plain meta and test passes, and four devices against one."""

import os
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Small, slow, to_double

from mfm_jax import bilevel, models
from mfm_jax.bilevel import MetaRule, hypergrad, losses, modulation
from mfm_jax.bilevel.passes import Pass
from mfm_jax.errors import UserError
from mfm_jax.machine import parallel
from mfm_jax.types import Batch, Modulator, no_modulation

CLASSES, BATCH, WIDTH = 4, 16, 4
COUNTS = jnp.array([500, 120, 40, 7])


MODULE = Small(CLASSES, WIDTH)
FORWARD = Pass.of(MODULE)


def batch(seed: int) -> Batch:
    image = jax.random.normal(jax.random.key(seed), (BATCH, 8, 8, 3))
    return Batch(image, jnp.arange(BATCH, dtype=jnp.int32) % CLASSES)


def make_modulator(form: str, sites: tuple[str, ...], module=MODULE) -> Modulator:
    channels = modulation.site_channels(lambda m: module.init(jax.random.key(0), batch(0).image, modulate=m), sites)
    if form.startswith("direct"):
        return modulation.direct(channels, CLASSES if form == "direct_per_class" else 0)
    return modulation.frequency(channels, COUNTS) if form == "frequency" else modulation.network(channels, COUNTS)


def setup(form: str = "direct", sites: tuple[str, ...] = ("pooled",), noise: float = 0.0, module=MODULE):
    """Returns (state, tx, modulator, phi_tx), the modulator `noise` away from the identity."""
    tx = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, 0.9, nesterov=True))
    phi_tx, modulator = optax.adam(1e-2), make_modulator(form, sites, module)
    variables = module.init(jax.random.key(1), batch(0).image)
    state = bilevel.init_state(jax.random.key(2), variables, tx, modulator.init, phi_tx)
    shift = jax.tree.map(lambda x: x + noise * jax.random.normal(jax.random.key(3), x.shape), state.phi)
    return state.replace(phi=shift), tx, modulator, phi_tx


def plain_statistics(state, data: Batch):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return MODULE.apply(variables, data.image, train=True, mutable=["batch_stats"])[1]["batch_stats"]


def compile_fully(step, state):
    """Compiles as users' programs are compiled; the tests' own flags optimize less (conftest)."""
    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    if "--xla_cpu_use_fusion_emitters=false" in os.environ["XLA_FLAGS"]:
        options["xla_cpu_use_fusion_emitters"] = True
    return jax.jit(step).lower(state, batch(0)).compile(compiler_options=options)


RESNET = models.create("resnet8", CLASSES, 16)


@pytest.mark.parametrize(
    ("form", "module"),
    [
        ("frequency", Small(CLASSES, 16)),
        *(slow(form, RESNET) for form in ("direct", "direct_per_class", "frequency", "network")),
    ],
)
def test_identity_modulation_is_the_plain_step_bit_for_bit(form, module):
    """At the width that is trained; for much narrower networks the compiler may order a sum in another way."""
    more = ("stage2", "stage3") if module is RESNET else ()
    sites = ("stem", "stage1", *more, "pooled", *([] if form == "direct_per_class" else ["logits"]))
    state, tx, modulator, _ = setup(form, sites, module=module)
    plain = compile_fully(bilevel.make_plain_step(Pass.of(module), losses.cross_entropy, tx), state)
    modulated = compile_fully(bilevel.make_plain_step(Pass.of(module), losses.cross_entropy, tx, modulator), state)
    one = two = state
    for seed in range(3):
        one, _ = plain(one, batch(seed))
        two, _ = modulated(two, batch(seed))
    chex.assert_trees_all_equal((one.params, one.opt_state), (two.params, two.opt_state))
    chex.assert_trees_all_close(one.batch_stats, two.batch_stats, rtol=1e-6)


@pytest.mark.parametrize("sites", [("stem", "stage1"), slow(("pooled",))], ids="+".join)
@pytest.mark.parametrize("kind", [slow("plain_step"), "meta_step", "not_lagged"])
def test_running_statistics_describe_the_plain_network(sites, kind):
    state, tx, modulator, phi_tx = setup("direct", sites, noise=0.5)
    if kind == "plain_step":
        step = bilevel.make_plain_step(FORWARD, losses.cross_entropy, tx, modulator)
        after, _ = jax.jit(step)(state, batch(0))
    else:
        rule = MetaRule(lagged=kind == "meta_step")
        step = bilevel.make_step(FORWARD, losses.cross_entropy, tx, modulator, phi_tx, rule)
        after, _ = jax.jit(step)(state, batch(0), batch(1))
    chex.assert_trees_all_close(after.batch_stats, plain_statistics(state, batch(0)), rtol=1e-4, atol=1e-6)


def test_statistics_behind_a_modulated_site_would_differ():
    """The test above can fail: the modulated pass itself gathers other statistics."""
    state, _, modulator, _ = setup("direct", ("stem",), noise=0.5)
    film = modulation.modulate(modulator, state.phi, batch(0).label)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    image = batch(0).image
    written = MODULE.apply(variables, image, train=True, modulate=film, mutable=["batch_stats"])[1]["batch_stats"]
    gaps = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), written, plain_statistics(state, batch(0)))
    assert max(jax.tree.leaves(gaps)) > 1e-2


@pytest.mark.parametrize("bn", [slow("running"), "fresh", slow("batch")])
def test_meta_pass_is_plain_and_normalised_as_stated(bn):
    """The reported meta loss is that of the plain network at w_hat, under the statistics that `bn` names."""
    state, tx, modulator, phi_tx = setup("network", ("stage1", "pooled"), noise=0.5)
    state = state.replace(batch_stats=plain_statistics(state, batch(5)))
    step = bilevel.make_step(FORWARD, losses.cross_entropy, tx, modulator, phi_tx, MetaRule(bn=bn))
    after, metrics = jax.jit(step)(state, batch(0), batch(1))
    statistics = state.batch_stats
    if bn == "fresh":  # those of the training batch; averages that were zero keep a tenth of them
        blank = state.replace(params=after.params, batch_stats=jax.tree.map(jnp.zeros_like, statistics))
        statistics = jax.tree.map(lambda tenth: 10 * tenth, plain_statistics(blank, batch(0)))
    variables = {"params": after.params, "batch_stats": statistics}  # lagged: the new params are w_hat
    logits = MODULE.apply(variables, batch(1).image, train=bn == "batch", mutable=["batch_stats"])[0]
    want = losses.cross_entropy(logits, batch(1).label).mean()
    np.testing.assert_allclose(metrics["meta_loss"], want, rtol=1e-5)


@pytest.mark.slow
def test_fresh_statistics_of_a_frozen_layer_are_its_averages():
    """In training, too, `models.frozen` normalises by them and leaves them as they are."""
    state, tx, modulator, phi_tx = setup("direct", ("pooled",), noise=0.5)
    state = state.replace(batch_stats=plain_statistics(state, batch(5)))
    frozen = Pass(models.frozen(MODULE.apply, "head"))
    losses_of = []
    for bn in ("running", "fresh"):
        step = bilevel.make_step(frozen, losses.cross_entropy, tx, modulator, phi_tx, MetaRule(bn=bn))
        losses_of.append(jax.jit(step)(state, batch(0), batch(1))[1]["meta_loss"])
    np.testing.assert_allclose(*losses_of, rtol=1e-6)


def test_probabilities_are_plain():
    state, *_ = setup("direct", ("pooled",), noise=10.0)
    probabilities = jax.jit(FORWARD.probabilities)(state.params, state.batch_stats, batch(0).image)
    logits = MODULE.apply({"params": state.params, "batch_stats": state.batch_stats}, batch(0).image)
    chex.assert_trees_all_close(probabilities, jax.nn.softmax(logits), rtol=1e-5)


def test_step_that_is_not_lagged_is_the_definition():
    """phi' by the oracle and the modulator's optax; w' = U(w, grad L_train(w, phi'))."""
    with jax.enable_x64(True):
        state, tx, modulator, phi_tx = setup("direct", ("pooled",), noise=0.3)
        state = to_double(state)
        module = MODULE.clone(dtype=jnp.float64)
        data, meta = (Batch(b.image.astype(jnp.float64), b.label) for b in (batch(0), batch(1)))
        rule = MetaRule(lagged=False, bn="running")
        step = bilevel.make_step(Pass.of(module), losses.cross_entropy, tx, modulator, phi_tx, rule)
        after, _ = jax.jit(step)(state, data, meta)

        def train_loss(w, phi):
            film = modulation.modulate(modulator, phi, data.label)
            variables = {"params": w, "batch_stats": state.batch_stats}
            logits, _ = module.apply(variables, data.image, train=True, modulate=film, mutable=["batch_stats"])
            return losses.cross_entropy(logits, data.label).mean()

        def update(grads):
            changes, opt_state = tx.update(grads, state.opt_state, state.params)
            return optax.apply_updates(state.params, changes), opt_state

        def meta_loss(phi):
            w_hat, _ = update(jax.grad(train_loss)(state.params, phi))
            logits = module.apply({"params": w_hat, "batch_stats": state.batch_stats}, meta.image)
            return losses.cross_entropy(logits, meta.label).mean()

        changes, _ = phi_tx.update(jax.jit(jax.grad(meta_loss))(state.phi), state.phi_opt_state)
        phi = optax.apply_updates(state.phi, changes)
        params, opt_state = update(jax.jit(jax.grad(train_loss))(state.params, phi))
        chex.assert_trees_all_close(after.phi, phi, rtol=1e-8)
        chex.assert_trees_all_close((after.params, after.opt_state), (params, opt_state), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("route", [hypergrad.mixed_mode, slow(hypergrad.reverse_over_reverse)])
@pytest.mark.parametrize("form", [slow("direct"), "network"])
def test_four_devices_equal_one(form, route):
    sites = ("stage1", "pooled")
    state, tx, modulator, _ = setup(form, sites, noise=0.3)
    # SGD, since the first step of Adam blows the rounding of a gradient near zero up to the size of a whole step.
    phi_tx = optax.sgd(0.1)
    state = state.replace(phi_opt_state=phi_tx.init(state.phi))
    arguments = (losses.cross_entropy, tx, modulator, phi_tx, MetaRule(hypergrad=route))
    one = jax.jit(bilevel.make_step(FORWARD, *arguments))(state, batch(0), batch(1))
    mesh = parallel.data_mesh(jax.devices()[:4])
    assert mesh.size == 4
    synced = Pass.of(MODULE.clone(axis_name=parallel.AXIS), axis_name=parallel.AXIS)
    step = bilevel.make_step(synced, *arguments)
    four = jax.jit(parallel.shard_step(step, mesh, 2))(state, batch(0), batch(1))
    one, four = (jax.device_get((s.replace(key=0), m)) for s, m in (one, four))
    chex.assert_trees_all_close(four[1], one[1], rtol=1e-5)
    chex.assert_trees_all_close(four[0], one[0], rtol=1e-5, atol=1e-5)


def test_a_late_site_costs_no_forward_pass():
    """Site `pooled` lies behind the last batch norm: as many convolutions as the plain step; `stem` costs more."""

    def convolutions(sites):
        state, tx, modulator, _ = setup("direct", sites or ("pooled",))
        step = bilevel.make_plain_step(FORWARD, losses.cross_entropy, tx, modulator if sites else None)
        text = jax.jit(step).lower(state, batch(0)).compile().as_text()
        return len(re.findall(r" convolution\(|custom_call_target=\"mfm_", text))

    assert convolutions(("pooled",)) == convolutions(())
    assert convolutions(("stem",)) > convolutions(())


def test_restricted_virtual_step_moves_all_parameters_and_changes_the_meta_gradient():
    state, tx, modulator, phi_tx = setup("direct", ("stem",), noise=0.3)
    arguments = (FORWARD, losses.cross_entropy, tx, modulator, phi_tx)
    full = jax.jit(bilevel.make_step(*arguments))(state, batch(0), batch(1))
    head = jax.jit(bilevel.make_step(*arguments, MetaRule(virtual_groups=("head",))))(state, batch(0), batch(1))
    chex.assert_trees_all_close(full[0].params, head[0].params, rtol=1e-4, atol=1e-6)
    assert abs(full[1]["hypergrad_norm"] / head[1]["hypergrad_norm"] - 1) > 1e-2


def test_agreement_is_the_cosine_with_the_meta_gradients_before():
    """Adam's running mean after one step points as the first meta-gradient does, which SGD at rate 1 leaves behind."""
    state, tx, modulator, adam = setup(noise=0.1)
    gradients, sgd = [], optax.sgd(1.0)
    bare, step = (
        jax.jit(bilevel.make_step(FORWARD, losses.cross_entropy, tx, modulator, phi_tx)) for phi_tx in (sgd, adam)
    )
    for _ in range(2):
        after, metrics = bare(state.replace(phi_opt_state=sgd.init(state.phi)), batch(0), batch(1))
        assert metrics["hypergrad_agreement"] == 0  # SGD keeps no mean
        gradients.append(jax.tree.map(lambda old, new: old - new, state.phi, after.phi))
        state, metrics = step(state, batch(0), batch(1))
        if len(gradients) == 1:
            assert metrics["hypergrad_agreement"] == 0  # nothing before
    first, second = gradients
    cosine = optax.tree.vdot(first, second) / (optax.tree.norm(first) * optax.tree.norm(second))
    assert -1 < cosine < 1
    chex.assert_trees_all_close(metrics["hypergrad_agreement"], cosine, rtol=1e-3)


def test_no_modulation_returns_its_input():
    x = jnp.ones((2, 3))
    assert no_modulation("anywhere", x) is x


# --- a batch in parts -----------------------------------------------------------------------------


@pytest.mark.parametrize("lagged", [True, False])
def test_parts_give_the_whole_batch_s_step(lagged):
    """Where no batch norm couples the examples."""
    module = Unnormalized()
    image = jax.random.normal(jax.random.key(0), (BATCH, 6))
    data = Batch(image, jnp.arange(BATCH, dtype=jnp.int32) % CLASSES)
    meta = Batch(-image, data.label)
    modulator = modulation.direct({"pooled": 5})
    tx, phi_tx = optax.sgd(0.1, 0.9), optax.adam(1e-2)
    state = bilevel.init_state(jax.random.key(2), module.init(jax.random.key(1), image), tx, modulator.init, phi_tx)
    rest = losses.cross_entropy, tx, modulator, phi_tx, MetaRule(lagged=lagged)
    (whole, metrics), (parts, found) = (
        jax.jit(bilevel.make_step(Pass.of(module, parts=n), *rest))(state, data, meta) for n in (1, 4)
    )
    chex.assert_trees_all_close((whole.params, whole.phi), (parts.params, parts.phi), atol=1e-6)
    chex.assert_trees_all_close(metrics, found, rtol=1e-5, atol=1e-6)


def test_parts_of_a_batch_norm_are_normalised_by_themselves():
    state, tx, _, _ = setup()
    step = jax.jit(bilevel.make_plain_step(Pass.of(MODULE, parts=2), losses.cross_entropy, tx))
    data = batch(0)
    halves = [jax.tree.map(lambda leaf, i=i: leaf[i * 8 : i * 8 + 8], data) for i in range(2)]
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *(plain_statistics(state, half) for half in halves))
    chex.assert_trees_all_close(step(state, data)[0].batch_stats, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_parts_need_less_memory():
    state, tx, _, _ = setup()
    data = Batch(jnp.zeros((64, 16, 16, 3)), jnp.zeros(64, jnp.int32))

    def temporary(parts: int) -> int:
        step = bilevel.make_plain_step(Pass.of(MODULE, parts=parts), losses.cross_entropy, tx)
        return jax.jit(step).lower(state, data).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) < temporary(1) / 3


class Unnormalized(nn.Module):
    """Two layers without batch norm."""

    @nn.compact
    def __call__(self, image, *, train=False, modulate=no_modulation):
        del train
        return nn.Dense(CLASSES)(modulate("pooled", jnp.tanh(nn.Dense(5)(image))))


class Dropping(nn.Module):
    """A network with dropout, whose switch is called as flax's own layers call it."""

    @nn.compact
    def __call__(self, image, *, deterministic: bool = True, modulate=no_modulation):
        x = nn.Dropout(0.5, deterministic=deterministic)(image.reshape(len(image), -1))
        return modulate("logits", nn.Dense(CLASSES, name="head")(x))


class Misnamed(Dropping):
    @nn.compact
    def __call__(self, image, *, is_training: bool = False, modulate=no_modulation):
        return modulate("logits", nn.Dense(CLASSES)(nn.Dropout(0.5, deterministic=not is_training)(image.mean((1, 2)))))


class Switchless(nn.Module):
    @nn.compact
    def __call__(self, image, *, modulate=no_modulation):
        x = nn.BatchNorm(use_running_average=True)(image.mean((1, 2)))
        return modulate("logits", nn.Dense(CLASSES)(x))


def first_step(module, modulator, data: Batch):
    """Traces a meta-step, as its first call does."""
    tx = optax.sgd(0.1)
    variables = module.init(jax.random.key(0), batch(0).image)
    state = bilevel.init_state(jax.random.key(1), variables, tx, modulator.init, tx)
    step = bilevel.make_step(Pass.of(module), losses.cross_entropy, tx, modulator, tx)
    return jax.eval_shape(step, state, data, batch(1))


@pytest.mark.parametrize(
    ("module", "channels", "data", "message"),
    [
        (MODULE, {"stage9": WIDTH}, batch(0), "site 'stage9': the module never calls it; it calls logits, pooled, "),
        (Dropping(), {"pooled": 4, "logits": 4}, batch(0), "site 'pooled': the module never calls it; it calls logits"),
        (MODULE, {"stem": WIDTH + 1}, batch(0), "site 'stem': its features are (16, 8, 8, 4), .* gamma is (5,)"),
        (MODULE, {"logits": 1}, batch(0), "site 'logits': its features are (16, 4), the modulator's gamma is (1,)"),
        (MODULE, {"logits": 4}, batch(0)._replace(image=np.zeros((16, 8, 8, 3), np.uint8)), "Batch.image: uint8; norm"),
        (MODULE, {"logits": 4}, batch(0)._replace(image=np.zeros((16, 8, 8, 3), np.int32)), "Batch.image: int32; norm"),
        (Misnamed(), {"logits": 4}, batch(0), "Misnamed: its argument `is_training` would never be set"),
        (Switchless(), {"logits": 4}, batch(0), "batch statistics and no argument `train`"),
    ],
)
def test_what_would_go_wrong_in_silence_is_refused_at_the_first_call(module, channels, data, message):
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(UserError, match=pattern):
        first_step(module, modulation.direct(channels), data)


@pytest.mark.parametrize("wrong", [CLASSES, -1])
def test_a_label_that_is_no_class_makes_the_loss_nan(wrong):
    module, modulator, tx = Dropping(), modulation.direct({"logits": CLASSES}), optax.sgd(0.1)
    state = bilevel.init_state(
        jax.random.key(1), module.init(jax.random.key(0), batch(0).image), tx, modulator.init, tx
    )
    step = jax.jit(bilevel.make_step(Pass.of(module), losses.cross_entropy, tx, modulator, tx))
    sound, broken = batch(0), batch(0)._replace(label=batch(0).label.at[3].set(wrong))
    found = [step(state, *pair)[1] for pair in ((sound, sound), (broken, sound), (sound, broken))]
    told = [(np.isnan(metrics["loss"]), np.isnan(metrics["meta_loss"])) for metrics in found]
    assert told == [(False, False), (True, False), (False, True)]


@pytest.mark.parametrize("counts", [[5, 0, 2], [0, 0], np.array([3.0, 0.5])])
def test_a_class_without_an_image_is_refused(counts):
    with pytest.raises(UserError, match=r"counts: class \d has 0(.5)? images"):
        modulation.frequency({"logits": len(counts)}, counts)


def test_deterministic_is_the_opposite_of_train():
    """Dropout acts in training passes, and not in those of a test."""
    module, data = Dropping(), batch(0)
    forward, variables = Pass.of(module), module.init(jax.random.key(0), data.image)
    state = bilevel.init_state(jax.random.key(1), variables, optax.sgd(0.1))
    plain = module.apply(variables, data.image)
    chex.assert_trees_all_equal(forward.logits(state, state.params, data, train=False)[0], plain)
    trained, _ = forward.logits(state, state.params, data, train=True)
    assert not np.allclose(trained, plain)
    chex.assert_trees_all_equal(forward.probabilities(state.params, {}, data.image), jax.nn.softmax(plain))
