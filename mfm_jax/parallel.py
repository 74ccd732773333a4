"""Data parallelism: one mesh axis `data`, and the step under `shard_map`.

State is replicated, batches are split. The losses average over the axis before they are differentiated
(`bilevel.make_step(axis_name=AXIS)`), so with `check_vma=True` every gradient, the virtual step's pulled-back vector
and the meta-gradient come out as the global ones, equal on all devices, and nothing else needs a collective. Batch
norm averages its statistics over the same axis.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from mfm_jax.types import PyTree

AXIS = "data"


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of all `devices` (default: every device) along the axis `data`."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), devices=devices, axis_types=(AxisType.Auto,))


def shard_step(step: Callable, mesh: Mesh, batches: int) -> Callable:
    """Returns `step(state, *batches) -> (state, metrics)` spread over `mesh`.

    Args:
      step: from `bilevel`, made with `axis_name=AXIS`.
      mesh: from `data_mesh`.
      batches: how many batches the step takes; the leading axis of each must divide by the number of devices.
    """
    return jax.shard_map(step, mesh=mesh, in_specs=(P(), *[P(AXIS)] * batches), out_specs=P())


def compiler_options() -> dict[str, str] | None:
    """Returns what XLA is told beside its defaults.

    On CPU its scheduler computes weight gradients' operands long before they are used; the scheduler that spares memory
    is as fast, and needs half as much.
    """
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if jax.default_backend() == "cpu" else None


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of whatever every device holds in full."""
    return NamedSharding(mesh, P())


def split(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: each device's part along its first axis, which must divide by their number."""
    return NamedSharding(mesh, P(AXIS))


def place(tree: PyTree, sharding: PyTree) -> PyTree:
    """Returns `tree` under `sharding` (one for all, or one a leaf) on the devices of all processes.

    Where these are several, each has the whole of `tree` and places its own devices' part; nothing is sent.
    """

    def one(leaf: jax.Array, where: Sharding) -> jax.Array:
        if where.is_fully_addressable:
            return jax.device_put(leaf, where)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(leaf), where), impl=jax.random.key_impl(leaf))
        own = np.asarray(leaf)
        return jax.make_array_from_callback(own.shape, where, lambda index: own[index])

    return jax.tree.map(one, tree, jax.tree.broadcast(sharding, tree))
