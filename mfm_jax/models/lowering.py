"""What a convolution and its weight gradient are off CPU: XLA's own, and for several seeds a form without groups.

Seeds that are trained together have a kernel each. `vmap` makes of their convolutions one with `feature_group_count`,
for which accelerators have no good kernel. The forms here compute the same from what accelerators do well:

  grouped    what `vmap` makes
  unrolled   a convolution for each seed, in one program
  folded     the seeds of a group side by side in the channels of one convolution, whose kernel is block-diagonal: a
             group of F seeds has F times the arithmetic, and a number that is not finite spreads to the group
  patches    a matrix product for each seed, of the pixels under the kernel at every output with the kernel
  taps       the same, as a sum over the kernel's positions, in float32 at least

A form is a function of (operation, a `[S, ...]`, b `[S, ...]`, window), with `convolve` or `weight_gradient` for the
operation. `form_of` chooses.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LAYOUT = ("NHWC", "HWIO", "NHWC")
Pair = tuple[int, ...]  # of the two image axes


class Window(NamedTuple):
    """Where the kernel is laid: `kernel [kh, kw]`, its stride, the input's padding and its dilation."""

    kernel: Pair
    stride: Pair
    padding: tuple[tuple[int, int], ...]
    dilation: Pair


Operation = Callable[..., jax.Array]  # of (a, b, *, window)
Form = Callable[[Operation, jax.Array, jax.Array, Window], jax.Array]


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


def grouped(operation: Operation, a: jax.Array, b: jax.Array, window: Window) -> jax.Array:
    return jax.vmap(functools.partial(operation, window=window))(a, b)


def folded(operation: Operation, a: jax.Array, b: jax.Array, window: Window, channels: int) -> jax.Array:
    """Folds as many seeds into one convolution as have `channels` input or output channels together, or one."""
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


def patches(operation: Operation, a: jax.Array, b: jax.Array, window: Window) -> jax.Array:
    seen = jnp.concatenate(list(_taps(a, window)), axis=-1)  # [S, B, H', W', kh kw C]
    if operation is convolve:
        return jnp.einsum("sbhwk,skn->sbhwn", seen, b.reshape(len(b), -1, b.shape[-1]))
    found = jnp.einsum("sbhwk,sbhwn->skn", seen, b)
    return found.reshape(len(a), *window.kernel, a.shape[-1], b.shape[-1])


def taps(operation: Operation, a: jax.Array, b: jax.Array, window: Window) -> jax.Array:
    wide = jnp.promote_types(a.dtype, jnp.float32)
    if operation is convolve:
        product = functools.partial(jnp.einsum, "sbhwc,scn->sbhwn", preferred_element_type=wide)
        kernels = jnp.moveaxis(b.reshape(len(b), -1, *b.shape[-2:]), 1, 0)
        terms = (product(x, kernel) for x, kernel in zip(_taps(a, window), kernels, strict=True))
        return functools.reduce(jnp.add, terms).astype(a.dtype)
    found = jnp.stack([jnp.einsum("sbhwc,sbhwn->scn", x, b) for x in _taps(a, window)], axis=1)
    return found.reshape(len(a), *window.kernel, a.shape[-1], b.shape[-1])


def _taps(x: jax.Array, window: Window) -> Iterator[jax.Array]:
    """Yields for each of the kernel's positions, row by row, the pixel that it meets, `[S, B, H', W', C]`."""
    around = [(*pad, each - 1) for pad, each in zip(window.padding, window.dilation, strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *around, (0, 0, 0)])
    spans = [
        (size - kernel) // stride * stride + 1
        for size, kernel, stride in zip(x.shape[2:4], window.kernel, window.stride, strict=True)
    ]
    rows, columns = window.stride
    for i, j in itertools.product(*map(range, window.kernel)):
        yield x[:, :, i : i + spans[0] : rows, j : j + spans[1] : columns]


FORMS: dict[str, Form] = {
    "grouped": grouped,
    "unrolled": functools.partial(folded, channels=0),
    "folded to 128": functools.partial(folded, channels=128),
    "folded to 256": functools.partial(folded, channels=256),
    "folded": functools.partial(folded, channels=2**20),
    "patches": patches,
    "taps": taps,
}


def form_of(operation: Operation, a: tuple[int, ...], b: tuple[int, ...], window: Window) -> str:
    """Returns the form, a key of `FORMS`, of an operation on operands of these shapes, `[S, ...]` each."""
    return "grouped"


def over_leading(operation: Operation) -> Operation:
    """Returns an operation on arrays of four axes, mapped over the leading axes of its operands."""

    def mapped(a: jax.Array, b: jax.Array, *, window: Window) -> jax.Array:
        leading = a.shape[:-4]
        if not leading:
            return operation(a, b, window=window)
        a, b = (v.reshape(-1, *v.shape[-4:]) for v in (a, b))
        out = FORMS[form_of(operation, a.shape, b.shape, window)](operation, a, b, window)
        return out.reshape(*leading, *out.shape[1:])

    return mapped
