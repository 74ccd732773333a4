"""The convolution and all its derivatives are those of `lax.conv_general_dilated`, natively and by XLA."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from mfm_jax.models import convolution as convolution_lib
from mfm_jax.models import native
from mfm_jax.models.convolution import convolution

# image side, kernel side, stride, padding
CASES = [
    (8, 3, 1, ((1, 1), (1, 1))),
    (9, 3, 2, ((1, 1), (1, 1))),
    (8, 3, 2, "SAME"),
    (8, 1, 2, "VALID"),
    (11, 7, 2, ((3, 3), (3, 3))),
]


@pytest.fixture(scope="module")
def native_kernels(cache_folder):
    if native.lowering() == "xla":
        excuses = ("no C++ compiler", "no kernels for a processor", "MFM_JAX_NATIVE=0")  # else they were to be there
        assert native.reason().startswith(excuses)
        pytest.skip(f"no native kernels: {native.reason()}")


@pytest.fixture(scope="module")
def bfloat16_kernels(native_kernels):
    if native.lowering("bfloat16") == "xla":
        excuses = ("no kernels in bfloat16 for a processor", "the system does not let")
        assert native.reason("bfloat16").startswith(excuses)
        pytest.skip(f"no native kernels in bfloat16: {native.reason('bfloat16')}")


@pytest.fixture(params=["native", "xla"])
def lowering(request, monkeypatch):
    """Both ways of computing a convolution on CPU."""
    if request.param == "native":
        request.getfixturevalue("native_kernels")
    else:
        monkeypatch.setattr(native, "lowering", lambda dtype="float32": "xla")


def plain(x, kernel, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def losses(stride, padding):
    """Returns the same nonlinear loss by ours and by XLA's convolution."""
    return tuple(
        lambda x, kernel, conv=conv: jnp.sum(jnp.sin(conv(x, kernel, (stride, stride), padding)))
        for conv in (convolution, plain)
    )


def inputs(side, kernel):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(3, side, side, 3), (kernel, kernel, 3, 4)]
    values = [jax.random.normal(key, shape, jnp.float64) for key, shape in zip(keys, shapes * 2, strict=True)]
    return values[:2], values[2:]


@pytest.mark.parametrize(("side", "kernel", "stride", "padding"), CASES)
def test_values_and_derivatives_in_both_modes(side, kernel, stride, padding, lowering, monkeypatch):
    """First and second derivatives, the second by forward and by reverse mode, with a slice for each image."""
    monkeypatch.setattr(convolution_lib, "_SLICE_BYTES", 1)
    with jax.enable_x64(True):
        primals, tangents = inputs(side, kernel)
        found = []
        for loss in losses(stride, padding):
            gradient = jax.grad(loss, argnums=(0, 1))

            def norm(x, kernel, gradient=gradient):
                return sum(jnp.sum(part**2) for part in gradient(x, kernel))

            def everything(x, kernel, loss=loss, gradient=gradient, norm=norm):
                forward = jax.jvp(gradient, (x, kernel), tuple(tangents))
                return loss(x, kernel), forward, jax.grad(norm, argnums=(0, 1))(x, kernel)

            found.append(jax.jit(everything)(*primals))
        chex.assert_trees_all_close(*found, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mapped", [(0, 0), (0, None), (None, 0)])
def test_maps_over_seeds(mapped, lowering):
    with jax.enable_x64(True):
        first, second = inputs(8, 3)
        pairs = [
            [a if axis is None else v for a, v, axis in zip(first, of, mapped, strict=True)] for of in (first, second)
        ]
        stacked = [a if axis is None else jnp.stack([a, b]) for a, b, axis in zip(first, second, mapped, strict=True)]
        loss, _ = losses(1, "SAME")
        gradient = jax.grad(loss, argnums=(0, 1))
        expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(gradient(*pair) for pair in pairs))
        chex.assert_trees_all_close(jax.vmap(gradient, mapped)(*stacked), expected, rtol=1e-9, atol=1e-12)


def test_splits_over_devices(lowering):
    """Under `shard_map` each of eight devices has an image; the kernel's gradient is their sum."""
    with jax.enable_x64(True):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        _, (_, kernel) = inputs(8, 3)
        x = jax.random.normal(jax.random.key(1), (8, 8, 8, 3), jnp.float64)
        loss, _ = losses(2, "SAME")

        def summed(x, kernel):
            return lax.psum(loss(x, kernel), "data")

        spread = jax.shard_map(summed, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
        found, expected = (jax.jit(jax.grad(f, argnums=(0, 1)))(x, kernel) for f in (spread, loss))
        chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("platform", "slices"), [("cpu", 4), ("cuda", 1), ("tpu", 1)])
def test_slices_are_for_cpu_alone(platform, slices, monkeypatch):
    monkeypatch.setattr(native, "lowering", lambda dtype="float32": "xla")
    x, kernel = jnp.zeros((8, 64, 64, 32)), jnp.zeros((3, 3, 32, 4))  # 4 MiB of input
    gradient = jax.jit(jax.grad(lambda kernel: convolution(x, kernel, (1, 1), "SAME").sum()))
    text = gradient.trace(kernel).lower(lowering_platforms=(platform,)).as_text()
    # The forward pass is linear in the kernel: only the weight gradient is left.
    assert text.count("stablehlo.convolution") == slices


def test_refuses_what_it_does_not_do():
    x, kernel = jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 1, 2))
    with pytest.raises(NotImplementedError, match="feature_group_count"):
        convolution(x, kernel, (1, 1), "SAME", feature_group_count=2)


# --- the native kernels ---------------------------------------------------------------------------


@st.composite
def axes(draw):
    """What an operator sees along an image axis: input, kernel, stride, padding, dilation; outputs there are some."""
    size, kernel, stride, dilation = (draw(st.integers(1, most)) for most in (12, 5, 3, 3))
    low, high = (draw(st.integers(-1, 4)) for _ in range(2))
    if low + high + (size - 1) * dilation + 1 < kernel:
        high = kernel - (size - 1) * dilation - 1 - low
    return size, kernel, stride, (low, high), dilation


PRECISION = {"float32": 1e-5, "float64": 1e-13}
SIZES = {"images": st.integers(1, 4), "channels": st.integers(1, 40), "outputs": st.integers(1, 40)}


@given(y=axes(), x=axes(), dtype=st.sampled_from(list(PRECISION)), **SIZES)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_operators_are_those_of_xla(y, x, dtype, images, channels, outputs, native_kernels):
    """The convolution and its two transposes, against XLA in float64."""
    (height, width), sides, strides, padding, dilation = zip(y, x, strict=True)
    rng = np.random.default_rng(0)

    def by(conv):
        def all_three(image, kernel):
            result, pull_back = jax.vjp(conv, image, kernel)
            return result, *pull_back(jnp.cos(result))

        return jax.jit(all_three)

    def reference(image, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(image, kernel, strides, padding, dilation, dimension_numbers=numbers)

    with jax.enable_x64(True):
        shapes = (images, height, width, channels), (*sides, channels, outputs)
        operands = [rng.normal(size=shape) for shape in shapes]
        expected = by(reference)(*operands)
        found = by(lambda image, kernel: convolution(image, kernel, strides, padding, dilation))(
            *(v.astype(dtype) for v in operands)
        )
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == dtype
            np.testing.assert_allclose(one, other, rtol=0, atol=PRECISION[dtype] * max(np.abs(other).max(), 1))


@given(y=axes(), x=axes(), **SIZES | {"channels": st.integers(1, 80), "outputs": st.integers(1, 80)})
@settings(max_examples=15, deadline=None, derandomize=True)
def test_operators_in_bfloat16_round_once(y, x, images, channels, outputs, bfloat16_kernels):
    """Each entry of the three is the float64 one rounded, but for the float32 sum's own error."""
    (height, width), sides, strides, padding, dilation = zip(y, x, strict=True)
    rng = np.random.default_rng(0)

    def drawn(shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    def all_three(image, kernel, cotangent, conv):
        result, pull_back = jax.vjp(lambda a, b: conv(a, b, strides, padding, dilation), image, kernel)
        return result, *pull_back(cotangent)

    def reference(*operands):
        return lax.conv_general_dilated(*operands, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    image, kernel = drawn((images, height, width, channels)), drawn((*sides, channels, outputs))
    out = jax.eval_shape(lambda a, b: reference(a, b, strides, padding, dilation), image, kernel)
    operands = image, kernel, drawn(out.shape)
    by = jax.jit(all_three, static_argnames="conv")
    with jax.enable_x64(True):
        exact = by(*(v.astype(jnp.float64) for v in operands), conv=reference)
        for one, other in zip(by(*operands, conv=convolution), exact, strict=True):
            assert one.dtype == jnp.bfloat16
            allowed = 2**-8 * np.abs(other) + 1e-5 * max(np.abs(other).max(), 1)
            assert (np.abs(np.asarray(one, np.float64) - other) <= allowed).all()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_kernels_are_for_what_they_can_do(dtype, native_kernels):
    with jax.enable_x64(True):
        x, kernel = jnp.zeros((8, 4, 4, 3), dtype), jnp.zeros((3, 3, 3, 4), dtype)
        conv = jax.jit(lambda x: convolution(x, kernel, (1, 1), "SAME"))
        there = dtype != "bfloat16" or native.lowering(dtype) != "xla"
        assert ("@mfm_convolution" in conv.lower(x).as_text()) == there
        # Neither where XLA may divide the operation over devices, nor in a program for other machines.
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        divided = jax.device_put(x, jax.NamedSharding(mesh, P("data")))
        assert "@mfm_" not in conv.lower(divided).as_text()
        assert "@mfm_" not in jax.export.export(conv)(x).mlir_module()


DIGESTS = """
import hashlib, os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
import jax, jax.numpy as jnp
from mfm_jax.models import native
from mfm_jax.models.convolution import convolution
shapes = (37, 32, 32, 16), (3, 3, 16, 24)
x, kernel = (jax.random.normal(jax.random.key(i), shape, sys.argv[2]) for i, shape in enumerate(shapes))
gradient = jax.jit(jax.grad(lambda x, k: jnp.sum(jnp.sin(convolution(x, k, (1, 1), "SAME"))), argnums=(0, 1)))
for _ in range(3):
    found = jax.device_get(gradient(x, kernel))
    print(native.lowering(sys.argv[2]), *(hashlib.sha256(v.tobytes()).hexdigest() for v in found))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are limited by Linux's affinity")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_threads(dtype, native_kernels, request):
    if dtype == "bfloat16":
        request.getfixturevalue("bfloat16_kernels")
    flags = "--xla_backend_optimization_level=0"
    found = [run(DIGESTS, threads, dtype, XLA_FLAGS=flags).splitlines() for threads in ("1", "2")]
    assert len({line for lines in found for line in lines}) == 1
    assert found[0][0].startswith("native ")


def run(code, *arguments, **environment):
    """Runs `code` in a fresh interpreter; returns what it printed."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment, check=True)
    return done.stdout


WRONG = """
import sys
from pathlib import Path
from mfm_jax.models import native
path, dtype, name, right, wrong = sys.argv[1:]
text = getattr(native, name).read_text()
assert right in text
setattr(native, name, Path(path))
Path(path).write_text(text.replace(right, wrong))
native._FLAGS = tuple(flag.replace("-O2", "-O0") for flag in native._FLAGS)
print(native.lowering(dtype), native.reason(dtype))
"""


def test_kernels_that_compute_something_else_are_left_out(tmp_path, native_kernels):
    line = "sum[r][v] += grad[v] * p[r]"
    said = run(WRONG, str(tmp_path / "wrong.cc"), "float32", "SOURCE", line, line.replace("+=", "-="))
    assert said.startswith("xla its convolutions differ from XLA's")


def test_bfloat16_kernels_that_compute_something_else_are_left_out(tmp_path, bfloat16_kernels):
    changed = "SOURCE_OF_BFLOAT16", "_tile_dpbf16ps(3, 5, 7)", "_tile_dpbf16ps(3, 5, 6)"
    said = run(WRONG, str(tmp_path / "wrong.cc"), "bfloat16", *changed)
    assert said.startswith("xla its convolutions differ from XLA's")
    assert said.strip().endswith("in bfloat16")


def test_a_processor_without_amx_has_no_kernels_in_bfloat16(monkeypatch):
    monkeypatch.delenv("MFM_JAX_NATIVE", raising=False)
    features = frozenset(native._OF_BFLOAT16[0]) - {"amx_bf16"}
    monkeypatch.setattr(native, "_cpu_features", lambda: features)
    assert native._load.__wrapped__("bfloat16") == ("xla", "no kernels in bfloat16 for a processor without AMX")


def test_a_system_that_forbids_amx_has_no_kernels_in_bfloat16(monkeypatch, bfloat16_kernels):
    monkeypatch.setattr(native, "_PERMISSION", (*native._PERMISSION[:2], 63))  # a part of the state that is none
    assert native._load.__wrapped__("bfloat16") == ("xla", "the system does not let this process use AMX")


def test_without_a_compiler_xla_computes(tmp_path, monkeypatch):
    monkeypatch.setenv("MFM_JAX_CACHE", str(tmp_path))
    monkeypatch.delenv("MFM_JAX_NATIVE", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert native._load.__wrapped__() == ("xla", "no C++ compiler is installed")


def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch, small_source):
    small_source.write_text("int here(")
    how, why = native._load.__wrapped__()
    assert how == "xla"
    assert "failed: " in why
    assert list((tmp_path / "native").iterdir()) == []


def test_the_environment_turns_the_kernels_off(monkeypatch):
    monkeypatch.setenv("MFM_JAX_NATIVE", "0")
    assert native._load.__wrapped__() == ("xla", "MFM_JAX_NATIVE=0")


@pytest.fixture
def small_source(tmp_path, monkeypatch):
    """A source that compiles at once, and a cache folder of its own."""
    if not any(map(shutil.which, native._compilers())):
        pytest.skip("no C++ compiler is installed")
    monkeypatch.delenv("MFM_JAX_NATIVE", raising=False)
    monkeypatch.setenv("MFM_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "SOURCE", tmp_path / "small.cc")
    native.SOURCE.write_text("int here;")
    return native.SOURCE


def test_a_library_without_the_kernels_is_left_out(small_source):
    how, why = native._load.__wrapped__()
    assert how == "xla"
    assert "MfmConvolution" in why


def test_what_is_compiled_ahead_is_not_loaded(tmp_path, small_source):
    loaded = native._load.cache_info()
    native.prepare()
    (path,) = (tmp_path / "native").iterdir()
    assert native._is_whole(path)
    small_source.write_text("int here(")
    native.prepare()  # the reason is said where the kernels are wanted
    assert "failed: " in native._load.__wrapped__()[1]
    assert native._load.cache_info() == loaded


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_library_is_made_again(damage, small_source):
    path = native._compiled((), small_source)
    whole = path.read_bytes()
    changed = whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:]
    path.write_bytes({"cut": whole[: len(whole) // 2], "changed": changed, "empty": b""}[damage])
    assert not native._is_whole(path)
    assert native._compiled((), small_source) == path
    assert native._is_whole(path)


def test_several_may_compile_at_once(small_source):
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: native._compiled((), small_source), range(4)))
    (path,) = paths
    assert native._is_whole(path)
    assert list(path.parent.iterdir()) == [path]


def test_another_source_is_another_library(small_source):
    first = native._compiled((), small_source)
    small_source.write_text("int there;")
    assert native._compiled((), small_source) != first
