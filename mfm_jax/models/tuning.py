"""Which parameters of a classifier are trained, and the classifier whose others are frozen."""

from typing import Any

import jax

from mfm_jax.types import PROJECTION, ApplyFn, PyTree


def trained(params: PyTree, tune: str) -> PyTree:
    """Returns a tree like `params`, True where `model.tune` trains."""

    def chosen(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        del leaf
        names = [key.key for key in path]
        in_adapter = any(name.startswith("adapter") for name in names)
        return tune == "all" or names[0] in ("head", PROJECTION) or (tune == "adapters" and in_adapter)

    return jax.tree_util.tree_map_with_path(chosen, params)


def frozen(apply_fn: ApplyFn, tune: str) -> ApplyFn:
    """Returns `apply_fn` that is constant in the parameters that `model.tune` does not train.

    No gradient is computed for them, and no backward pass goes below the first trained one, except to a modulation
    there. Batch norm uses its running averages in training too: they belong to the frozen part.
    """

    def apply(variables: PyTree, image: jax.Array, *, train: bool = False, **options: Any) -> PyTree:
        params = variables["params"]
        held = jax.tree.map(lambda on, leaf: leaf if on else jax.lax.stop_gradient(leaf), trained(params, tune), params)
        return apply_fn({**variables, "params": held}, image, train=False, **options)

    return apply
