"""Which parameters of a classifier are trained, the classifier whose others are frozen, and LoRA merged."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mfm_jax.types import PROJECTION, ApplyFn, PyTree

# What the parameters of a way of tuning are called, in each block.
ADDED = {"adapters": "adapter", "lora": "lora"}
_LORA = ("lora_query", "lora_value")


def is_added(names: Sequence[str]) -> bool:
    """Returns whether the names on the path of a parameter say that it is one of an adapter or of LoRA."""
    return any(name.startswith(tuple(ADDED.values())) for name in names)


def trained(params: PyTree, tune: str) -> PyTree:
    """Returns a tree like `params`, True where `model.tune` trains."""

    def chosen(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        del leaf
        names = [key.key for key in path]
        added = tune in ADDED and any(name.startswith(ADDED[tune]) for name in names)
        return tune == "all" or names[0] in ("head", PROJECTION) or added

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


def merged(params: PyTree) -> PyTree:
    """Returns `params` without LoRA, its products added to the weights of query and value beside which they worked."""

    def of_block(block: PyTree) -> PyTree:
        if not isinstance(block, dict) or "lora_query" not in block:
            return block
        query, value = (block[name]["down"]["kernel"] @ block[name]["up"]["kernel"] for name in _LORA)
        change = jnp.concatenate([query, jnp.zeros_like(query), value], axis=-1)
        kept = {name: part for name, part in block.items() if name not in _LORA}
        return kept | {"qkv": {**kept["qkv"], "kernel": kept["qkv"]["kernel"] + change}}

    return {name: of_block(block) for name, block in params.items()}
