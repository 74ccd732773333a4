"""A 2-D convolution whose weight gradient XLA's CPU backend runs well.

XLA computes the weight gradient of a convolution as another convolution, with the batch in the place of the channels.
On CPU that transposes both operands, and a large batch leaves the cache on the way: the gradient then costs two to four
times the forward pass. A sum over the batch may be taken in slices that stay in the cache:

    dw = sum_{slices S of the batch} dw(x_S, dy_S).

The convolution and its weight gradient are bilinear, and the transposes of each are the two again. They are written as
two JAX primitives with that closed algebra, so they can be differentiated any number of times, in either mode, and
every derivative is sliced too. Slices are the lowering for CPU alone; other platforms get what `lowering` chooses.

Where `native` has kernels of the project's own for the processor, they are the lowering on CPU. The operands of both
primitives may have leading axes, the same ones: `vmap` adds them, and each entry is a convolution of its own.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mfm_jax.models import lowering, native
from mfm_jax.models.lowering import LAYOUT, Window

_SLICE_BYTES = 2**20  # of the input; about a core's second-level cache


def convolution(
    x: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[Sequence[int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    **options: Any,
) -> jax.Array:
    """Returns the convolution of `x [B, H, W, C]` with `kernel [kh, kw, C, N]`, as `lax.conv_general_dilated` does.

    For `flax.linen.Conv(conv_general_dilated=convolution)`, with that function's arguments.

    Raises:
      NotImplementedError: groups, a dilated kernel or another layout.
    """
    layout = lax.conv_dimension_numbers(x.shape, kernel.shape, dimension_numbers or LAYOUT)
    other = {name: value for name, value in options.items() if value not in (None, 1)}
    if (
        other
        or tuple(rhs_dilation or (1, 1)) != (1, 1)
        or layout != lax.conv_dimension_numbers(x.shape, kernel.shape, LAYOUT)
    ):
        raise NotImplementedError(f"convolution: only plain 2-D convolutions of NHWC images, not {other or layout}")
    size = kernel.shape[:2]
    dilation = tuple(lhs_dilation or (1, 1))
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], size, window_strides, padding)
    window = Window(size, tuple(window_strides), tuple((low, high) for low, high in padding), dilation)
    return _bind(_convolve, x, kernel, window)


def _bind(primitive: Primitive, a: jax.Array, b: jax.Array, window: Window) -> jax.Array:
    """Binds after marking both operands as varying over the same mesh axes, as `shard_map` asks of every operation."""
    axes = _varying(a) | _varying(b)
    a, b = (lax.pcast(v, tuple(rest), to="varying") if (rest := axes - _varying(v)) else v for v in (a, b))
    return primitive.bind(a, b, window=window)


def _varying(x: jax.Array) -> frozenset[str]:
    """Returns the mesh axes over which `x` varies inside `shard_map`; JAX has renamed the attribute."""
    kind = jax.typeof(x)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma


def _weight_gradient_in_slices(x: jax.Array, dy: jax.Array, *, window: Window) -> jax.Array:
    slices = min(x.shape[0], -(-x.size * x.dtype.itemsize // _SLICE_BYTES))
    edges = [round(i * x.shape[0] / slices) for i in range(slices + 1)]
    parts = (lowering.weight_gradient(x[i:j], dy[i:j], window=window) for i, j in itertools.pairwise(edges))
    return functools.reduce(jnp.add, parts)


def _input_gradient(dy: jax.Array, kernel: jax.Array, shape: tuple[int, ...], window: Window) -> jax.Array:
    """Returns the convolution's transpose in x, as a convolution of the dilated `dy` with the flipped kernel."""
    padding = []
    for axis in range(2):
        low = window.kernel[axis] - 1 - window.padding[axis][0]
        dilated = (dy.shape[axis - 3] - 1) * window.stride[axis] + 1
        wanted = (shape[axis - 3] - 1) * window.dilation[axis] + 1
        padding.append((low, wanted + window.kernel[axis] - 1 - dilated - low))
    flipped = Window(window.kernel, window.dilation, tuple(padding), window.stride)
    return _bind(_convolve, dy, jnp.flip(kernel, (-4, -3)).swapaxes(-1, -2), flipped)


def _mapped(operation: Any) -> Any:
    """Returns an operation on arrays of four axes, mapped over the leading axes of its operands."""

    def over_leading(a: jax.Array, b: jax.Array, *, window: Window) -> jax.Array:
        one = functools.partial(operation, window=window)
        for _ in range(a.ndim - 4):
            one = jax.vmap(one)
        return one(a, b)

    return over_leading


def _lowering_on_cpu(operation: str, by_xla: Any) -> Any:
    """Returns the rule that lowers to the native kernels where it can, and otherwise to `by_xla`."""
    fallback = mlir.lower_fun(by_xla, multiple_results=False)

    def rule(ctx: mlir.LoweringRuleContext, a: Any, b: Any, *, window: Window) -> Any:
        if not _is_native(ctx):
            return fallback(ctx, a, b, window=window)
        fields = native.attributes(window.stride, window.padding, window.dilation)
        operand: Any = ctx.avals_in[0]
        return jax.ffi.ffi_lowering(native.target(operation, operand.dtype.name))(ctx, a, b, **fields)

    return rule


def _is_native(ctx: mlir.LoweringRuleContext) -> bool:
    """Returns whether the native kernels take an operation.

    They do not in an exported program, which runs elsewhere, nor where XLA's partitioner may divide the operation over
    devices, which it cannot do to a kernel that it does not know.
    """
    where: Any = ctx.module_context.axis_context
    if hasattr(where, "manual_axes"):  # inside `shard_map`
        devices = max((size for axis, size in where.mesh.shape.items() if axis not in where.manual_axes), default=1)
    else:
        devices = where.num_devices
    arrays: Any = (*ctx.avals_in, *ctx.avals_out)
    return (
        not ctx.module_context.lowering_parameters.for_export
        and devices == 1
        and all(isinstance(size, int) and size > 0 for array in arrays for size in array.shape)
        and native.lowering(arrays[0].dtype.name) != "xla"
    )


def _primitive(name: str, default: Any, on_cpu: Any, left: Any, right: Any) -> Primitive:
    """Returns a bilinear primitive: `left` and `right` transpose it in its first and its second operand."""
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(primitive.bind, static_argnames="window"))

    def abstract(a: Any, b: Any, *, window: Window) -> Any:
        out = jax.eval_shape(
            functools.partial(_mapped(default), window=window),
            *(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (a, b)),
        )
        return a.update(shape=out.shape, dtype=out.dtype, weak_type=False)

    def batched(args: Any, axes: Any, *, window: Window) -> Any:
        size = next(v.shape[axis] for v, axis in zip(args, axes, strict=True) if axis is not None)
        a, b = (batching.bdim_at_front(v, axis, size) for v, axis in zip(args, axes, strict=True))
        return _bind(primitive, a, b, window), 0

    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = batched
    mlir.register_lowering(primitive, mlir.lower_fun(lowering.over_leading(default), multiple_results=False))
    mlir.register_lowering(primitive, _lowering_on_cpu(f"mfm_{name}", _mapped(on_cpu)), platform="cpu")
    ad.defbilinear(primitive, left, right)
    return primitive


_convolve: Primitive = _primitive(
    "convolution",
    lowering.convolve,
    lowering.convolve,
    lambda ct, x, kernel, *, window: _input_gradient(ct, kernel, x.aval.shape, window),
    lambda ct, x, kernel, *, window: _bind(_weight_gradient, x, ct, window),
)
_weight_gradient: Primitive = _primitive(
    "convolution_weight_gradient",
    lowering.weight_gradient,
    _weight_gradient_in_slices,
    lambda ct, x, dy, *, window: _input_gradient(dy, ct, x.aval.shape, window),
    lambda ct, x, dy, *, window: _bind(_convolve, x, ct, window),
)
