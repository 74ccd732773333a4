"""The JAX contenders: each `Spec` as a compiled, donated step on batches that stay on the device."""

import importlib.util
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contenders import MATMUL_SIZE, Program, Spec
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mfm_jax import augment, bilevel, experiment, hypergrad, longtail, losses, models, modulation, optim, parallel
from mfm_jax import config as config_lib
from mfm_jax.data import batches as batches_lib
from mfm_jax.methods.meta import meta_weight_net
from mfm_jax.models import native
from mfm_jax.types import Batch, BilevelState


def build(spec: Spec) -> Program:
    """Compiles the contender's step, and where not every step is a meta-step, the plain one between."""
    if spec.step == "matmul":
        return _matmul(spec)
    if spec.step == "input":
        return _input(spec)
    if spec.step == "recipe":
        state, meta_step, plain_step, decided = _recipe(spec)
    else:
        state, meta_step, plain_step = _explicit(spec)
        decided = {}
    every = decided.get("every", spec.every)
    batches = [_batch(key, size, spec) for key, size in ((1, spec.batch), (2, spec.meta_batch))]
    if spec.devices > 1:
        mesh = _mesh(spec)
        batches = [jax.device_put(batch, NamedSharding(mesh, P(parallel.AXIS))) for batch in batches]
        state = jax.device_put(state, parallel.replicated(mesh))
    began = time.perf_counter()
    options = parallel.compiler_options()
    meta = meta_step and jax.jit(meta_step, donate_argnums=0, compiler_options=options).lower(state, *batches).compile()
    plain = None
    if not meta or every > 1:
        plain = jax.jit(plain_step, donate_argnums=0, compiler_options=options).lower(state, batches[0]).compile()
    programs = [program for program in (meta, plain) if program]
    memory = [program.memory_analysis() for program in programs]
    facts = {
        "compile_seconds": time.perf_counter() - began,
        "temp_mb": max(m.temp_size_in_bytes for m in memory if m) / 1e6,
        "spec": decided,
        **_device(),
    }
    return _program(state, meta, plain, batches, every, facts)


def _program(state, meta, plain, batches: list[Batch], every: int, facts: dict[str, Any]) -> Program:
    done, loss = 0, jnp.zeros(())

    def run(steps: int) -> None:
        nonlocal state, done, loss
        for _ in range(steps):
            is_meta = meta is not None and done % every == 0
            state, metrics = meta(state, *batches) if is_meta else plain(state, batches[0])
            loss, done = metrics["loss"], done + 1
        jax.block_until_ready(state)

    def finish() -> dict[str, Any]:
        if not np.isfinite(float(loss)):
            raise FloatingPointError(f"the loss is {float(loss)} after {done} steps")
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return {"device_mb": peak / 1e6} if peak else {}

    return Program(run, finish, facts)


def _device() -> dict[str, Any]:
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "version": f"jax {jax.__version__}",
        "convolutions": native.lowering(),
    }


def _batch(seed: int, size: int, spec: Spec) -> Batch:
    image = np.random.default_rng(seed).normal(size=(size, spec.image_size, spec.image_size, 3))
    return Batch(jnp.asarray(image, jnp.float32), jnp.asarray(np.arange(size) % spec.classes, jnp.int32))


def _drawn(init: Callable[[], BilevelState]) -> BilevelState:
    """Returns a state like `init()`, filled in by NumPy: compiling an initialisation takes seconds a worker.

    Kernels are drawn as `init` draws them; scales and variances are one, all else zero.
    """
    rng = np.random.default_rng(0)

    def draw(path: tuple, like: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if path[0].name == "params" and like.ndim > 1:
            return jnp.array(rng.normal(0, (2 / np.prod(like.shape[:-1])) ** 0.5, like.shape), like.dtype)
        ones = path[0].name in ("params", "batch_stats") and path[-1].key in ("scale", "var")
        return jnp.array(np.full(like.shape, float(ones)), like.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init))


def _mesh(spec: Spec):
    return parallel.data_mesh(jax.devices()[: spec.devices])


def _explicit(spec: Spec) -> tuple[BilevelState, Callable | None, Callable]:
    """Returns (state, meta-step, plain step) put together from the library's parts as the spec says."""
    module = models.create(spec.model, spec.classes, spec.width, jnp.dtype(spec.dtype))
    image = jnp.zeros((1, spec.image_size, spec.image_size, 3))
    defaults = config_lib.Config()
    tx, mod_tx = optim.classifier(defaults.optim, defaults.optim.learning_rate), optim.modulator(defaults.meta, 1e-2)
    key, learner = jax.random.key(0), None
    if spec.step == "mfm":
        channels = modulation.site_channels(lambda film: module.init(key, image, modulate=film), spec.sites)
        learner = modulation.learner(modulation.direct(channels))
    elif spec.step == "meta_weight_net":
        learner = meta_weight_net()
    state = _drawn(lambda: bilevel.init_state(key, module.init(key, image), tx, learner, learner and mod_tx))
    plain_step = bilevel.make_plain_step(module.apply, losses.cross_entropy, tx, learner)
    meta_step: Callable | None = None
    if learner:
        meta_step = bilevel.make_step(
            module.apply,
            losses.cross_entropy,
            tx,
            learner,
            mod_tx,
            hypergrad=getattr(hypergrad, spec.route),
            lagged=spec.lagged,
            virtual_groups=models.virtual_groups(spec.model, spec.virtual),
        )
    return state, meta_step, plain_step


def _recipe(spec: Spec) -> tuple[BilevelState, Callable | None, Callable, dict[str, Any]]:
    """Returns what `experiment.build` makes of the config file, and the fields of `Spec` that the file decides.

    Model, images, classes and batches are the spec's; all else is what someone who runs the config gets.
    """
    config = _config(spec)
    counts = longtail.class_counts(5000, spec.classes, config.data.imbalance_factor)
    # Of the data, `experiment.build` reads only shapes and counts.
    images = np.broadcast_to(np.zeros((), np.uint8), (counts.sum(), spec.image_size, spec.image_size, 3))
    long_tailed: Any = SimpleNamespace(
        train_images=images, train_labels=images[:, 0, 0, 0], counts=counts, num_classes=spec.classes
    )
    built = experiment.build(config, long_tailed, _mesh(spec) if spec.devices > 1 else None)
    learns = built.meta_step is not None
    decided = {
        "sites": config.sites if learns else (),
        "every": config.meta.every if learns else 1,
        "lagged": config.meta.lagged,
        "virtual": config.meta.virtual,
    }
    return _drawn(built.init), built.meta_step, built.plain_step, decided


def _config(spec: Spec) -> config_lib.Config:
    source = importlib.util.spec_from_file_location("benchmark_config", spec.config)
    assert source, spec.config
    assert source.loader, spec.config
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    config = module.get_config()
    fixed = {
        "model.name": spec.model,
        "model.width": spec.width,
        "train.batch_size": spec.batch,
        "meta.batch_size": spec.meta_batch,
        "train.dtype": spec.dtype,
    }
    config.update_from_flattened_dict(fixed | dict(spec.overrides))
    return config_lib.resolve(config)


def _input(spec: Spec) -> Program:
    """What the loop does before each step: gather a batch of resident images, pad, crop, flip and normalise it."""
    settings, mean, std = config_lib.Augment(), jnp.zeros(3), jnp.ones(3)
    images = jnp.zeros((10_000, spec.image_size, spec.image_size, 3), jnp.uint8)
    index = jnp.arange(spec.batch, dtype=jnp.int32)

    @jax.jit
    def sample(key: jax.Array) -> jax.Array:
        pictures = augment.augment_batch(key, batches_lib.gather(images, index), settings)
        return augment.normalize(pictures, mean, std)

    began = time.perf_counter()
    jax.block_until_ready(sample(jax.random.key(0)))
    compile_seconds = time.perf_counter() - began

    def run(steps: int) -> None:
        jax.block_until_ready([sample(jax.random.key(0)) for _ in range(steps)])

    return Program(run, dict, {"compile_seconds": compile_seconds, "temp_mb": None, "spec": {}, **_device()})


def _matmul(spec: Spec) -> Program:
    """A square matrix product, the yardstick for shares of the device's rate: one step is one product."""
    size = MATMUL_SIZE.get(jax.default_backend(), 8192)
    both = np.random.default_rng(0).normal(size=(2, size, size))
    left, right = (jnp.asarray(one, jnp.dtype(spec.dtype)) for one in both)
    product = jax.jit(jnp.matmul)

    def run(steps: int) -> None:
        jax.block_until_ready([product(left, right) for _ in range(steps)])

    return Program(run, dict, {"spec": {"batch": size}, **_device()})
