"""Data parallelism: one mesh axis `data`, and the step under `shard_map`.

State is replicated, batches are split. The losses average over the axis before they are differentiated
(`bilevel.make_step(axis_name=AXIS)`), so with `check_vma=True` every gradient, the virtual step's pulled-back vector
and the meta-gradient come out as the global ones, equal on all devices, and nothing else needs a collective. Batch
norm averages its statistics over the same axis.
"""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

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
