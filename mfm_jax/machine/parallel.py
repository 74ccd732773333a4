"""Data parallelism: the step under `shard_map` over the mesh axis `data`, and state sharded over the axis `model`.

State is the same on all devices of `data`, batches are split over it. Let device d of D hold the part B_d of the
batch B, |B_d| = |B| / D. What the step computes, and where the devices communicate:

    L_train = mean_B l_i = mean_d mean_{B_d} l_i          averaged: the scalar
    g       = grad_w L_train = sum_d grad_w (1/D) mean_{B_d} l_i        summed: |w| numbers
    w_hat   = U(w, g)                                     no collective: U of what is equal everywhere
    L_meta  = mean over the meta batch at w_hat           averaged: the scalar
    u       = grad L_meta(w_hat)                          summed: |w| numbers that move in the virtual step
    v       = (dU/dg)^T u                                 no collective, since U and u are equal everywhere
    dL_meta/dphi = d/deps grad_phi L_train(w + eps v)     summed: |phi| numbers

The losses are averaged over the axis before they are differentiated. With `check_vma=True` JAX knows which values are
equal on all devices; where such a value (w, phi, v) meets a device's examples, the transpose of that meeting is a sum
over the axis, so g, u and the meta-gradient come out as the global ones, each summed once. `w_hat`, `v`, the
optimizers' states and phi' are functions of global values and need nothing. A tangent needs no collective of its
own but where its primal does.

Batch norm is the one operation that couples examples. Its statistics are means over the batch (one collective a
layer: mean and mean square together), their transposes are sums over the batch (one a layer in every pass that is
differentiated back to there), and their tangents are means again (one a layer in a tangent pass). The meta pass runs
by fresh statistics, means that cost one a layer (or by running averages, which are equal everywhere: none). With
`parallel.batch_norm = local` each device normalises by its own part of the batch, and only the running averages are
averaged. Three more collectives are scalars that a method needs over the whole batch: the accuracy; the sum of
Meta-Weight-Net's or L2RW's weights; the norm of a meta-gradient that belongs to the examples.

The lowered program has a collective for each array; XLA merges those that do not wait for one another. What is left is
the chain of dependences: with n batch norms 2 n + 1 in a plain step, 4 n + 3 in a meta-step (lagged, at a late site).
`tests/golden/collectives.json` has the counts and bytes of every method.

**A batch that does not divide** is padded with blank examples of weight 0, the others' weight raised so that the mean
is 1. Every mean over the batch is then `mean(weight * value)`, device by device and without another collective:
the losses, the accuracy, batch norm's moments, the weights' sums. A local batch norm has no such mean: refused.

**The axis `model`** (`parallel.fsdp` devices along it; absent by default) divides the state too: every kernel, matrix
and what an optimizer keeps of it is split along its longest axis that divides. It is an automatic axis inside
`shard_map`: XLA's partitioner divides each device's part of the batch over it, and the optimizers work on their part of
the state. Each pass begins by gathering the parameters that it uses (`gathered`): w in the training pass, v in the
tangent pass, w_hat in the meta pass. Gradients are summed over the axis and cut down to each device's part. At rest a
device has 1/fsdp of the divided arrays; within a step it has the gathered parameters too, whole, for as long as a
backward pass still needs them, and its part alone of the optimizer's state.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from mfm_jax.errors import UserError
from mfm_jax.types import ApplyFn, Batch, PyTree

AXIS = "data"
MODEL_AXIS = "model"
_LEVEL = "xla_backend_optimization_level"


def data_mesh(devices: Sequence[jax.Device] | None = None, fsdp: int = 1) -> Mesh:
    """Returns a mesh of all `devices` (default: every device) along `data`; with `fsdp > 1`, that many along `model`.

    Raises:
      UserError: the devices do not divide by `fsdp`.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) % fsdp:
        raise UserError(
            f"parallel.fsdp = {fsdp}: does not divide the number of devices, {len(devices)}; use a divisor or 1"
        )
    shape, names = ((len(devices) // fsdp, fsdp), (AXIS, MODEL_AXIS)) if fsdp > 1 else ((len(devices),), (AXIS,))
    return jax.make_mesh(shape, names, devices=devices, axis_types=(AxisType.Auto,) * len(names))


def shard_step(step: Callable[..., Any], mesh: Mesh, batches: int) -> Callable[..., Any]:
    """Returns `step(state, *batches) -> (state, metrics)` spread over `mesh`.

    Args:
      step: from `bilevel`, made with `axis_name=AXIS`.
      mesh: from `data_mesh`; with an axis `model`, the step's `apply_fn` is to be `gathered`.
      batches: how many batches the step takes. One that does not divide by the devices is padded (`padded`); a module
        with batch norm must then take `weight`, as `models` do.
    """

    def part(state: PyTree, *given: Batch) -> tuple[PyTree, PyTree]:
        if MODEL_AXIS in mesh.axis_names:
            along_model = NamedSharding(jax.sharding.get_abstract_mesh(), P(MODEL_AXIS))
            given = jax.lax.with_sharding_constraint(given, along_model)
        return step(state, *given)

    spread = jax.shard_map(part, mesh=mesh, in_specs=(P(), *[P(AXIS)] * batches), out_specs=P(), axis_names={AXIS})

    def sharded(state: PyTree, *given: Batch) -> tuple[PyTree, PyTree]:
        state, metrics = spread(state, *(padded(batch, mesh.size) for batch in given))
        if MODEL_AXIS in mesh.axis_names:
            state = jax.lax.with_sharding_constraint(state, state_sharding(state, mesh))
        return state, metrics

    return sharded


def padded(batch: Batch, devices: int) -> Batch:
    """Returns `batch` with blank examples of weight 0 until it divides by `devices`; the mean weight stays 1."""
    size = len(batch.label)
    blank = -size % devices
    if not blank:
        return batch
    weight = jnp.ones(size, jnp.result_type(float)) if batch.weight is None else batch.weight
    batch = batch._replace(weight=weight * ((size + blank) / size))
    return jax.tree.map(lambda leaf: jnp.pad(leaf, [(0, blank)] + [(0, 0)] * (leaf.ndim - 1)), batch)


def averaged_statistics(apply_fn: ApplyFn) -> ApplyFn:
    """Returns `apply_fn` of a module with local batch norm, its running averages averaged over the devices."""

    def apply(variables: PyTree, image: jax.Array, **options: Any) -> PyTree:
        result = apply_fn(variables, image, **options)
        if not options.get("mutable"):
            return result
        logits, written = result
        return logits, jax.lax.pmean(written, AXIS)

    return apply


def gathered(apply_fn: ApplyFn) -> ApplyFn:
    """Returns `apply_fn` that begins by gathering the parameters over the axis `model`."""

    def apply(variables: PyTree, image: jax.Array, **options: Any) -> PyTree:
        whole = NamedSharding(jax.sharding.get_abstract_mesh(), P())
        params = jax.lax.with_sharding_constraint(variables["params"], whole)
        return apply_fn({**variables, "params": params}, image, **options)

    return apply


def state_sharding(state: PyTree, mesh: Mesh) -> PyTree:
    """Returns the sharding of each array of `state`: whole on every device, or split over the axis `model`.

    Floating-point arrays of two or more axes are split, along the longest axis that divides (the last of equal ones).
    """
    parts = mesh.shape.get(MODEL_AXIS, 1)

    def place(leaf: jax.Array) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
        if parts == 1 or leaf.ndim < 2 or not axes or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return replicated(mesh)
        longest = max(axes, key=lambda axis: (leaf.shape[axis], axis))
        return NamedSharding(mesh, P(*[None] * longest, MODEL_AXIS))

    return jax.tree.map(place, state)


def compiler_options() -> dict[str, str] | None:
    """Returns the options of XLA that differ from its defaults; None for none.

    On CPU its scheduler computes weight gradients' operands long before they are used; the scheduler that spares memory
    is as fast, and needs half as much.
    """
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if jax.default_backend() == "cpu" else None


def jit_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `jax.jit(function)` for a program that runs once: on CPU, compiled in a quarter of the time, same bits.

    A random generator for each parameter is much code, on which LLVM's default level spends seconds. Where `XLA_FLAGS`
    has a level, that one is taken, and inside another program that of the other.
    """
    plain = jax.jit(function)
    if jax.default_backend() != "cpu" or _LEVEL in os.environ.get("XLA_FLAGS", ""):
        return plain
    quick = jax.jit(function, compiler_options={_LEVEL: 1})

    def call(*args: Any) -> Any:
        traced = isinstance(jnp.zeros(()), jax.core.Tracer)
        return (plain if traced else quick)(*args)

    return call


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds in full."""
    return NamedSharding(mesh, P())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Returns the sharding of a batch: each device's part along `axis`, which must divide by their number."""
    return NamedSharding(mesh, P(*[None] * axis, AXIS))


def whole(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Returns `tree` under the constraint that every device computes the whole of it."""
    return jax.lax.with_sharding_constraint(tree, replicated(mesh)) if mesh else tree


def place(tree: PyTree, sharding: PyTree) -> PyTree:
    """Returns `tree` under `sharding` (one for all, or one a leaf) on the devices of all processes.

    Each process has the whole of `tree` and places the part of its own devices; nothing is sent.
    """

    def one(leaf: jax.Array, where: Sharding) -> jax.Array:
        if where.is_fully_addressable:
            return jax.device_put(leaf, where)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(leaf), where), impl=jax.random.key_impl(leaf))
        own = np.asarray(leaf)
        return jax.make_array_from_callback(own.shape, where, lambda index: own[index])

    return jax.tree.map(one, tree, jax.tree.broadcast(sharding, tree))
