"""Temporary memory and arithmetic of a gradient step of the models for large images, as XLA plans them.

    python benchmarks/memory.py

compiles and runs nothing. 224 x 224 pixels, a batch of 8, 100 classes, plain gradient descent. About a minute a line on
a CPU core.
"""

import jax
import jax.numpy as jnp

from mfm_jax import models
from mfm_jax.machine import parallel

CASES = [
    *((name, "all", remat) for name in ("resnet50", "vit_b16") for remat in (False, True)),
    *(("vit_b16", "adapters", remat) for remat in (False, True)),
    *((name, "head", False) for name in ("resnet50", "vit_b16")),
]


def compiled(name: str, tune: str, remat: bool, batch: int = 8, size: int = 224) -> jax.stages.Compiled:
    """Returns the compiled step; parameters are donated."""
    module = models.create(name, 100, 0, remat=remat, adapter_size=64 if tune == "adapters" else 0)
    apply = module.apply if tune == "all" else models.frozen(module.apply, tune)
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    variables = dict(jax.eval_shape(module.init, jax.random.key(0), images))

    def loss(params, rest, images):
        logits, written = apply({**rest, "params": params}, images, train=True, mutable=["batch_stats"])
        return jax.nn.logsumexp(logits, axis=-1).mean(), written

    def step(params, rest, images):
        gradient, written = jax.grad(loss, has_aux=True)(params, rest, images)
        flags = models.trained(params, tune)
        return jax.tree.map(lambda w, g, on: w - 0.1 * g if on else w, params, gradient, flags), written

    lowered = jax.jit(step, donate_argnums=0).lower(variables.pop("params"), variables, images)
    return lowered.compile(compiler_options=parallel.compiler_options())


if __name__ == "__main__":
    print(f"{jax.default_backend()}: model, tune, remat, temporary memory in MB, GFLOP")
    for case in CASES:
        found = compiled(*case)
        memory, cost = found.memory_analysis(), found.cost_analysis()
        print(*case, round(memory.temp_size_in_bytes / 1e6), round(cost["flops"] / 1e9), flush=True)
