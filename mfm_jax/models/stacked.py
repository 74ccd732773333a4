"""Equal blocks of a classifier as one scanned body, over variables that are stacked along a new first axis.

A program then has the body once, however deep the network is. Where a state is kept, its tree is that of the unrolled
network, whatever the program: `stack` and `unstack` go around a compiled call, and what is in it, the optimizer's
arithmetic too, works on the stacked tree, where `{block1, block2, block3}` with leaves `[...]` is `{block1}` with
leaves `[3, ...]`.
"""

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mfm_jax.types import PyTree

# The names of equal blocks in their order, by the name of the dict that holds them; "" for the outermost.
Runs = dict[str, tuple[str, ...]]
_KEPT = ("convolution", "conv_general_dilated", "dot_general", "reduce_sum", "psum", "psum_invariant")
_BLOCK = re.compile(r"[Bb]lock_?(\d+)")


def runs(params: PyTree) -> Runs:
    """Returns the neighbouring blocks, called `blockI` or `BasicBlock_I`, whose parameters have equal shapes."""
    found: Runs = {}
    for inside, tree in (("", params), *params.items()):
        blocks = sorted((name for name in tree if _BLOCK.search(name)), key=lambda name: int(_number(name)))
        for _, equal in itertools.groupby(blocks, key=functools.partial(_form_in, tree)):
            if len(names := tuple(equal)) > 1:
                found[inside] = names
    return found


def stack(tree: PyTree, runs: Runs) -> PyTree:
    """Returns `tree` with the leaves of each run in one, under the first block's name.

    Every tree of the form of the parameters, or of the batch statistics, is found, wherever in `tree` it is: in the
    states of optimizers, too.
    """

    def joined(blocks: PyTree, names: tuple[str, ...]) -> PyTree:
        first = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(blocks[name] for name in names))
        return {key: value for key, value in blocks.items() if key not in names} | {names[0]: first}

    return _mapped(joined, tree, runs)


def unstack(tree: PyTree, runs: Runs) -> PyTree:
    """Returns the inverse of `stack`."""

    def divided(blocks: PyTree, names: tuple[str, ...]) -> PyTree:
        first = blocks[names[0]]
        return blocks | {
            name: jax.tree.map(lambda leaf, i=i: jax.lax.index_in_dim(leaf, i, keepdims=False), first)
            for i, name in enumerate(names)
        }

    return _mapped(divided, tree, runs)


def within(runs: Runs, *, mapped: bool) -> Callable[[Callable[..., PyTree]], Callable[..., PyTree]]:
    """Returns a decorator of `(state, ...) -> state`, which is then called with a stacked state and returns one.

    Whoever calls what is decorated has the state as stored. With `mapped` all leaves of the state have a first axis
    that stays the first.
    """

    def form(change: Callable[[PyTree, Runs], PyTree], state: PyTree) -> PyTree:
        return jax.vmap(lambda one: change(one, runs))(state) if mapped else change(state, runs)

    def decorate(call: Callable[..., PyTree]) -> Callable[..., PyTree]:
        @functools.wraps(call)
        def wrapped(state: PyTree, *rest: Any) -> PyTree:
            return form(unstack, call(form(stack, state), *rest)) if runs else call(state, *rest)

        return wrapped

    return decorate


def through(block: Callable[[int], nn.Module], blocks: int, alone: int, x: jax.Array, *options: Any) -> jax.Array:
    """Returns `x` after `blocks` blocks, one after the other, each called with `options`.

    Args:
      block: makes the block of an index.
      blocks: how many there are.
      alone: how many of them, the first ones, stay apart; the others are equal, and where there are two or more they
        are one scanned body, whose variables are stacked.
      x: what the first block takes.
      options: what every block takes besides.
    """
    alone = blocks if blocks - alone < 2 else alone
    for i in range(alone):
        x = block(i)(x, *options)
    if alone == blocks:
        return x

    def body(module: nn.Module, carry: jax.Array, _: None) -> tuple[jax.Array, None]:
        return module(carry, *options), None

    scan = nn.scan(
        nn.remat(body, prevent_cse=False, policy=_kept),
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=blocks - alone,
        check_constancy_invariants=False,  # there are none, and the check traces the body once more
    )
    return scan(block(alone), x, None)[0]


def _mapped(change: Callable[[PyTree, tuple[str, ...]], PyTree], tree: PyTree, runs: Runs, inside: str = "") -> PyTree:
    """Returns `tree` with `change(blocks, names)` in the place of every dict that has a run's blocks."""
    if not isinstance(tree, dict):
        is_dict = lambda part: isinstance(part, dict)  # noqa: E731
        return jax.tree.map(lambda part: _mapped(change, part, runs) if is_dict(part) else part, tree, is_leaf=is_dict)
    names = runs.get(inside, ())
    if names and names[0] in tree:
        return change(tree, names)
    return {key: _mapped(change, part, runs, key) for key, part in tree.items()}


def _kept(primitive: Any, *_: Any, **__: Any) -> bool:
    """Returns whether a result is kept for the backward pass; what is elementwise is computed again.

    A loop stacks whatever is kept in memory, and without a choice that is some sixteen activations a block.
    """
    return primitive.name in _KEPT


def _number(name: str) -> str:
    return _BLOCK.search(name)[1]  # type: ignore[index]  # its caller has searched


def _form_in(tree: PyTree, name: str) -> tuple[Any, ...]:
    leaves, structure = jax.tree.flatten(tree[name])
    return structure, *(leaf.shape for leaf in leaves)
