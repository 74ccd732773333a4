"""Eight fake CPU devices, quick compilation, strict rank promotion, and a cache folder of the test run's own."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

# Little is gained from optimizing programs that run once; compiling them plainly, and in one piece, makes the tests
# several times faster.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if metadata.version("jaxlib").startswith("0.10."):  # later releases may not have the choice, and end at its name
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # the flags above must be set first
import markupsafe
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(50_000, 20, 50)  # what is traced makes objects by the million, nearly all of them reachable


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> None:
    """Keeps the user's own cache out of the tests, and compiles a program that several of them run only once.

    So do the processes that they start, whose settings these variables are. What is compiled is kept from one run of
    the tests to the next, under the names of what it is made of; `pytest --cache-clear` removes it.
    """
    folder = tmp_path_factory.mktemp("cache")
    if cache := getattr(pytestconfig, "cache", None):  # absent with `-p no:cacheprovider`
        for name in ("native", "xla"):
            (folder / name).symlink_to(cache.mkdir(name))
    os.environ["MFM_JAX_CACHE"] = str(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "xla")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.02"


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("MFM_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A folder of two classes with two pictures each: empty files, to be listed and not opened."""
    from helpers import tree

    return tree(tmp_path / "pets", "cat/a.jpg", "cat/b.jpg", "dog/a.jpg", "dog/b.jpg")


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a run use one of the fake devices."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the processes that a test starts one device, this package, and what lies beside the tests."""
    from helpers import environment

    for name, value in environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Gives Ctrl-C back after a command in this process, which ignores it from its end on."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def sketched() -> Iterator[Callable[..., Any]]:
    """Leaves the SVG out of reports, which takes longer than a run of a few steps; gives what would draw it."""
    from mfm_jax.pages import style

    def sketch(draw: Callable[..., str], inches: tuple[float, float], *what: Any) -> style.Picture:
        from matplotlib.figure import Figure

        return style.Picture(markupsafe.Markup(), draw(Figure(figsize=inches), *what), inches[0])

    render = style.render
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "render", sketch)
        yield render


@pytest.fixture(scope="module")
def drawn(sketched: Callable[..., Any]) -> Iterator[None]:
    """Has reports draw their figures, from here to the end of the module."""
    from mfm_jax.pages import style

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "render", sketched)
        yield


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The two-layer network in float64."""
    import jax.numpy as jnp
    from helpers import Tiny

    from mfm_jax import models

    monkeypatch.setattr(models, "create", lambda name, classes, width, dtype, **_: Tiny(classes, jnp.float64))
    with jax.enable_x64(True):
        yield


@pytest.fixture
def quick_runs() -> Iterator[None]:
    """Has a run train a network of two layers on one of the fake devices."""
    from helpers import quick_runs

    with quick_runs():
        yield


@pytest.fixture
def stepping(monkeypatch: pytest.MonkeyPatch, one_device: None) -> Callable[[Callable[[int, Any], Any]], None]:
    """Returns a function that has `act(step, data) -> data` called before every step of the runs that follow."""
    from mfm_jax.training import loop as loop_lib

    make_call = loop_lib.make_call

    def install(act: Callable[[int, Any], Any]) -> None:
        def make(*built: Any) -> Callable[..., Any]:
            compiled = make_call(*built)
            return lambda loop, data, *steps: compiled(loop, act(int(loop.bilevel.step), data), *steps)

        monkeypatch.setattr(loop_lib, "make_call", make)

    return install


class TrainedRun(NamedTuple):
    """A finished run: its config, its folder, and what training returned."""

    config: Any
    workdir: Path
    results: dict[str, Any]


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A run of three epochs on the digits, of a method that is tested with another head than it trains at first."""
    from helpers import tiny

    from mfm_jax import config as config_lib
    from mfm_jax.training import train

    config = tiny(data__workers=0, method__name="crt", method__first_stage=0.5, train__epochs=3, train__dtype="float32")
    config, workdir = config_lib.resolve(config), tmp_path_factory.mktemp("runs") / "crt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        return TrainedRun(config, workdir, train.train_and_evaluate(config, workdir))
