"""What a convolution and its weight gradient are off CPU: XLA's own, and for several seeds one with all of them.

Seeds that are trained together have a kernel each. `vmap` makes of their convolutions one with `feature_group_count`,
for which accelerators have no good kernel. Here seeds lie side by side in the channels of one plain convolution, whose
kernel is block-diagonal, as many as have 128 channels together: a group of F seeds has F times the arithmetic, for
which a network of few channels leaves an accelerator time enough (docs/performance.md). A number that is not finite
spreads to its group.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LAYOUT = ("NHWC", "HWIO", "NHWC")
_CHANNELS = 128  # of a group of seeds
Pair = tuple[int, ...]  # of the two image axes


class Window(NamedTuple):
    """Where the kernel is laid: `kernel [kh, kw]`, its stride, the input's padding and its dilation."""

    kernel: Pair
    stride: Pair
    padding: tuple[tuple[int, int], ...]
    dilation: Pair


Operation = Callable[..., jax.Array]  # of (a, b, *, window)


def convolve(x: jax.Array, kernel: jax.Array, *, window: Window) -> jax.Array:
    """Returns the convolution `[B, H', W', N]` of `x [B, H, W, C]` with `kernel [kh, kw, C, N]`."""
    return lax.conv_general_dilated(
        x, kernel, window.stride, window.padding, lhs_dilation=window.dilation, dimension_numbers=LAYOUT
    )


def weight_gradient(x: jax.Array, dy: jax.Array, *, window: Window) -> jax.Array:
    """Returns the transpose in the kernel, `[kh, kw, C, N]`: `x` slid over `dy`, images in the place of channels."""
    padding = []
    for axis, (low, _) in enumerate(window.padding):
        covered = (dy.shape[axis + 1] - 1) * window.stride[axis] + window.kernel[axis]
        padding.append((low, covered - ((x.shape[axis + 1] - 1) * window.dilation[axis] + 1) - low))
    return lax.conv_general_dilated(
        x,
        dy,
        (1, 1),
        padding,
        lhs_dilation=window.dilation,
        rhs_dilation=window.stride,
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
    )


def over_seeds(
    operation: Operation, a: jax.Array, b: jax.Array, window: Window, channels: int = _CHANNELS
) -> jax.Array:
    """Returns `operation`, `convolve` or `weight_gradient`, of each pair of `a [S, ...]` and `b [S, ...]`.

    As many seeds are one convolution as have `channels` input or output channels together, or one.
    """
    wide = max(a.shape[-1], b.shape[-1])
    size = max(channels // wide, 1)
    one = functools.partial(_fold, operation, window=window)
    return jnp.concatenate([one(a[i : i + size], b[i : i + size]) for i in range(0, len(a), size)])


def _fold(operation: Operation, a: jax.Array, b: jax.Array, window: Window) -> jax.Array:
    seeds = len(a)
    if seeds == 1:
        return operation(a[0], b[0], window=window)[None]
    if operation is convolve:
        own = jnp.eye(seeds, dtype=bool)[:, None, :, None]
        kernel = jnp.where(own, jnp.moveaxis(b, 0, 2)[..., None, :], 0)  # [kh, kw, F, C, F, N]
        kernel = kernel.reshape(*window.kernel, seeds * a.shape[-1], seeds * b.shape[-1])
        return _apart(convolve(_side_by_side(a), kernel, window=window), seeds)
    both = weight_gradient(_side_by_side(a), _side_by_side(b), window=window)
    both = both.reshape(*window.kernel, seeds, a.shape[-1], seeds, b.shape[-1])
    return jnp.moveaxis(jnp.diagonal(both, axis1=2, axis2=4), -1, 0)


def _side_by_side(x: jax.Array) -> jax.Array:
    """Returns `x [F, B, H, W, C]` as `[B, H, W, F C]`."""
    return jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], -1)


def _apart(x: jax.Array, seeds: int) -> jax.Array:
    return jnp.moveaxis(x.reshape(*x.shape[:3], seeds, -1), 3, 0)


def over_leading(operation: Operation) -> Operation:
    """Returns an operation on arrays of four axes, mapped over the leading axes of its operands."""

    def mapped(a: jax.Array, b: jax.Array, *, window: Window) -> jax.Array:
        leading = a.shape[:-4]
        if not leading:
            return operation(a, b, window=window)
        a, b = (v.reshape(-1, *v.shape[-4:]) for v in (a, b))
        out = over_seeds(operation, a, b, window)
        return out.reshape(*leading, *out.shape[1:])

    return mapped
