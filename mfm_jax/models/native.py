"""The convolution's own CPU kernels (the folder `cpu`): compiled on first use, checked, and left out where they fail.

XLA's convolutions reach a third of a CPU's rate. The kernels are compiled with an installed C++ compiler into the cache
folder, once for each type, source, jaxlib, compiler and kind of processor. Before use, their results are compared with
XLA's. If anything goes wrong, XLA's own convolutions are used, and `lowering` and `reason` say so.
`MFM_JAX_NATIVE=0` turns the kernels off.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.version import __version__ as jaxlib_version

from mfm_jax.machine import cache

_FOLDER = Path(__file__).with_name("cpu")
SOURCE = _FOLDER / "convolution.cc"
SOURCE_OF_BFLOAT16 = _FOLDER / "bfloat16.cc"
TARGETS = {"mfm_convolution": "MfmConvolution", "mfm_convolution_weight_gradient": "MfmWeightGradient"}
_FLAGS = ("-std=c++17", "-O2", "-ffp-contract=fast", "-fPIC", "-shared")
_BY_FEATURE = {  # widest first: features that the processor must have, and the compiler's flags
    "avx512": (("avx512f", "fma"), ("-mavx512f", "-mfma")),
    "avx2": (("avx2", "fma"), ("-mavx2", "-mfma")),
}
_OF_BFLOAT16 = (  # the same
    ("avx512f", "fma", "bmi2", "avx512bw", "avx512vl", "avx512_bf16", "amx_tile", "amx_bf16"),
    ("-mavx512f", "-mfma", "-mbmi2", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
)
_VALUES = {"float32": "float", "float64": "double"}  # what `SOURCE` is compiled for
_PERMISSION = (158, 0x1023, 18)  # Linux: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), once in a process
_COMPILE_SECONDS = 300
# Of the largest entry, where sums are taken in another order; in bfloat16 both round theirs, by up to 2^-8.
TOLERANCE = {"float32": 1e-5, "float64": 1e-13, "bfloat16": 2**-7}
_CASES = ((3, 16, 1, 1), (16, 40, 2, 1), (20, 5, 1, 2))  # input channels, output channels, stride, dilation


class Unavailable(Exception):
    """Why the kernels are left out."""


def lowering(dtype: str = "float32") -> str:
    """Returns what computes convolutions of `dtype`: `native` and the kind of vectors, as `native avx2`, or `xla`."""
    return _load(dtype)[0] if jax.default_backend() == "cpu" and dtype in TOLERANCE else "xla"


def reason(dtype: str = "float32") -> str:
    """Returns why the kernels of `dtype` are left out on CPU; "" where they are not, or there are none."""
    return _load(dtype)[1] if jax.default_backend() == "cpu" and dtype in TOLERANCE else ""


def target(operation: str, dtype: str) -> str:
    """Returns the name by which XLA calls the kernel of an operation, a key of `TARGETS`."""
    return f"{operation}_{dtype}"


def prepare(dtype: str = "float32") -> None:
    """Compiles the kernels ahead; why they cannot be compiled, `reason` says later.

    A thread that does this may be left behind: a program that ends while another thread runs JAX is aborted.
    """
    if jax.default_backend() == "cpu":
        with contextlib.suppress(Unavailable, OSError):
            _made(dtype)


@functools.cache
def _load(dtype: str = "float32") -> tuple[str, str]:
    """Compiles, loads, registers and checks the kernels of `dtype`, a library of their own, once in a process.

    Returns what `lowering` and `reason` do.
    """
    try:
        vectors, path = _made(dtype)
        if dtype == "bfloat16" and ctypes.CDLL(None).syscall(*_PERMISSION) != 0:
            raise Unavailable("the system does not let this process use AMX")
        library = ctypes.CDLL(str(path))
        for operation, symbol in TARGETS.items():
            kernel = jax.ffi.pycapsule(getattr(library, symbol))
            jax.ffi.register_ffi_target(target(operation, dtype), kernel, platform="cpu")
        with jax.ensure_compile_time_eval():
            _check(dtype)
    except (Unavailable, OSError, AttributeError) as error:  # a library that does not load, or lacks a symbol
        return "xla", f"{error}"
    return f"native {vectors}", ""


def _made(dtype: str) -> tuple[str, Path]:
    """Returns the kind of vectors and the compiled kernels."""
    if os.environ.get("MFM_JAX_NATIVE") == "0":
        raise Unavailable("MFM_JAX_NATIVE=0")
    if dtype != "bfloat16":
        vectors, flags = _vectors()
        return vectors, _compiled((*flags, f"-DMFM_VALUE={_VALUES[dtype]}"), SOURCE)
    needed, flags = _OF_BFLOAT16
    if not _cpu_features().issuperset(needed):
        raise Unavailable("no kernels in bfloat16 for a processor without AMX")
    return "amx", _compiled(flags, SOURCE_OF_BFLOAT16)


def _vectors() -> tuple[str, tuple[str, ...]]:
    """Returns the widest vectors that the processor has, and the compiler's flags for them."""
    machine = platform.machine().lower()
    if machine in ("arm64", "aarch64"):
        return "neon", ()
    features = _cpu_features()
    for name, (needed, flags) in _BY_FEATURE.items():
        if features.issuperset(needed):
            return name, flags
    raise Unavailable(f"no kernels for a processor of type {machine} without AVX2 and FMA")


def _cpu_features() -> frozenset[str]:
    """Returns the processor's features by Linux's names; none where Linux does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def _compiled(flags: tuple[str, ...], source: Path) -> Path:
    """Returns the compiled kernels in the cache folder, made there if they are absent or damaged."""
    compiler = next(filter(None, map(shutil.which, _compilers())), None)
    if compiler is None:
        raise Unavailable("no C++ compiler is installed")
    command = [compiler, *_FLAGS, *flags, "-isystem", jax.ffi.include_dir(), f"-I{_FOLDER}", str(source)]
    version = _output([compiler, "--version"])
    texts = [path.read_text() for path in (source, *sorted(_FOLDER.glob("*.h")))]
    facts = (*texts, jaxlib_version, version, platform.platform(), " ".join(command))
    key = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
    path = cache.folder() / "native" / f"{source.stem}-{key}.so"
    if not _is_whole(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Made under a name of its own, so that another process sees all of it or nothing.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            _output([*command, "-o", str(made)])
            content = made.read_bytes()
            made.write_bytes(content + hashlib.sha256(content).digest())
            made.replace(path)
    return path


def _compilers() -> Iterator[str]:
    yield os.environ.get("CXX", "")
    yield from ("c++", "g++", "clang++")


def _is_whole(path: Path) -> bool:
    """Returns whether a library exists and ends, behind what the loader reads, with the digest of the rest."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _output(command: list[str]) -> str:
    """Returns what `command` prints; raises `Unavailable` where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=True)
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines()
        raise Unavailable(f"{command[0]} failed: {said[-1] if said else f'status {error.returncode}'}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} failed: {error}") from error
    return done.stdout


def attributes(
    stride: Sequence[int], padding: Sequence[tuple[int, int]], dilation: Sequence[int]
) -> dict[str, np.ndarray]:
    """Returns the attributes of a call of the kernels; the shapes of the operands say the rest."""
    named = {"stride": stride, "low": [low for low, _ in padding], "dilation": dilation}
    return {name: np.array(values, np.int64) for name, values in named.items()}


def _check(dtype: str) -> None:
    """Compares the kernels with XLA over a stride, a dilation, and widths that fill a vector or not; may raise."""
    rng = np.random.default_rng(0)
    one_device = jax.default_device(jax.local_devices(backend="cpu")[0])
    with jax.enable_x64(True), jax.transfer_guard("allow"), one_device:
        operands = []
        for channels, outputs, *_ in _CASES:
            shapes = (3, 9, 8, channels), (3, 3, channels, outputs)
            operands.append(tuple(rng.normal(size=shape).astype(jnp.dtype(dtype)) for shape in shapes))
        for pair in jax.device_get(jax.jit(_both_ways)(operands)):
            native, expected = (np.asarray(v, np.float64) for v in pair)
            gap = np.abs(native - expected).max() / np.abs(expected).max()
            if not gap <= TOLERANCE[dtype]:
                raise Unavailable(f"its convolutions differ from XLA's by {gap:.1e} of the largest, in {dtype}")


def _both_ways(operands: Sequence[tuple[jax.Array, jax.Array]]) -> list[tuple[jax.Array, jax.Array]]:
    """Returns convolutions and weight gradients, each by the kernels and by XLA."""
    pairs = []
    for (x, kernel), (*_, stride, dilation) in zip(operands, _CASES, strict=True):
        padding = ((1, 1), (2, 0))
        by_xla = functools.partial(
            lax.conv_general_dilated,
            x,
            window_strides=(stride, stride),
            padding=padding,
            lhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        fields = attributes((stride, stride), padding, (dilation, dilation))
        y, pull_back = jax.vjp(by_xla, kernel)
        dy = jnp.sin(y)
        convolved, gradient = (target(operation, x.dtype.name) for operation in TARGETS)
        pairs.append((jax.ffi.ffi_call(convolved, jax.typeof(y))(x, kernel, **fields), y))
        pairs.append((jax.ffi.ffi_call(gradient, jax.typeof(kernel))(x, dy, **fields), *pull_back(dy)))
    return pairs
