"""What numbers depend on beside config and data: versions and devices, as results and checkpoints record them."""

import platform
from importlib import metadata

import jax

import mfm_jax
from mfm_jax.models import native


def versions() -> dict[str, str]:
    """Returns the versions of packages, and the devices; "unknown" where a package does not tell."""
    names = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "mfm-jax": mfm_jax.__version__,  # of this source, which need not be installed
        **{name: _version(name) for name in names},
        "python": platform.python_version(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "convolutions": native.lowering(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def devices() -> str:
    """Returns how many devices there are, in how many processes."""
    return f"{jax.device_count()} device(s) in {jax.process_count()} process(es)"
