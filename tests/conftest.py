"""Eight fake CPU devices, quick compilation, strict rank promotion, and a cache folder of the test run's own."""

import os

# Little is gained from optimizing programs that run once; compiling them plainly makes the tests several times faster.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # the flags above must be set first
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps the user's own cache out of the tests, and compiles a program that several of them run only once."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["MFM_JAX_CACHE"] = str(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
