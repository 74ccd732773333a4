"""How exact the meta-gradient is: float32 and bfloat16 against float64, and one route against the other.

    python benchmarks/precision.py
    python benchmarks/precision.py --model=resnet50 --image_size=64 --batch_size=32 --sites=logits

By default ResNet-8 at 16x16, batch 100 + 100, weights as they start, cross-entropy, phi away from the identity. The
gradient is what one step of SGD at rate 1 subtracts from phi. `error` is |g - g64| / |g64| in the 2-norm, `cosine` the
cosine of the angle between the two; `routes` is the error of `mixed_mode` against `reverse_over_reverse` in the same
precision.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from mfm_jax import bilevel, config, models
from mfm_jax.bilevel import hypergrad, losses, modulation, optim
from mfm_jax.bilevel.passes import Pass
from mfm_jax.types import Batch, PyTree

SITES = ("logits", "pooled", "stage1,stage2,stage3,pooled")


def meta_gradient(
    options: argparse.Namespace, sites: tuple[str, ...], compute: str, stored: str, route: Callable
) -> np.ndarray:
    """Returns d L_meta(w_hat) / d phi, flat, with the computation and the parameters in the given dtypes."""
    module = models.create(options.model, 10, 0, jnp.dtype(compute))
    rng, size = np.random.default_rng(0), options.image_size
    labels = jnp.arange(options.batch_size, dtype=jnp.int32) % 10
    batches = [Batch(jnp.asarray(rng.normal(size=(len(labels), size, size, 3)), stored), labels) for _ in range(2)]
    key = jax.random.key(0)
    channels = modulation.site_channels(lambda film: module.init(key, batches[0].image, modulate=film), sites)
    modulator = modulation.direct(channels)
    tx = optim.classifier(config.Optim(), 0.1)
    variables = jax.jit(models.create(options.model, 10, 0).init)(key, jnp.zeros((1, size, size, 3)))
    state = bilevel.init_state(key, in_dtype(variables, stored), tx, modulator.init, optax.sgd(1.0))
    phi = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), stored), state.phi)
    rule = bilevel.MetaRule(hypergrad=route)
    step = bilevel.make_step(Pass.of(module), losses.cross_entropy, tx, modulator, optax.sgd(1.0), rule)
    after, _ = jax.jit(step)(state.replace(phi=phi), *batches)
    change = jax.tree.map(lambda old, new: np.asarray(old - new, np.float64).ravel(), phi, after.phi)
    return np.concatenate(jax.tree.leaves(change))


def in_dtype(tree: PyTree, dtype: str) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet8", help="default: %(default)s")
    parser.add_argument("--image_size", type=int, default=16, help="pixels a side; default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=100, help="of both batches; default: %(default)s")
    parser.add_argument("--sites", nargs="*", default=SITES, help="each comma-separated; default: %(default)s")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    table = Table("sites", "precision", "error", "cosine", "routes", title=f"{options.model} on {jax.devices()[0]}")
    for sites in [tuple(names.split(",")) for names in options.sites]:
        with jax.enable_x64(True):
            exact = meta_gradient(options, sites, "float64", "float64", hypergrad.mixed_mode)
        for compute, stored in (("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")):
            with jax.enable_x64(stored == "float64"):
                found, other = (
                    meta_gradient(options, sites, compute, stored, route)
                    for route in (hypergrad.mixed_mode, hypergrad.reverse_over_reverse)
                )
            norm = np.linalg.norm
            error, routes = norm(found - exact) / norm(exact), norm(found - other) / norm(other)
            cosine = found @ exact / norm(found) / norm(exact)
            table.add_row(", ".join(sites), compute, f"{error:.1e}", f"{cosine:.6f}", f"{routes:.1e}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
