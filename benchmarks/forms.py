"""Other forms of the convolutions of several seeds than `models.lowering.over_seeds`, to compare with it.

grouped    what `vmap` makes: one convolution with `feature_group_count`
unrolled   a convolution for each seed, in one program
folded     the seeds of a group side by side in the channels, as many as have so many channels, or all
patches    a matrix product for each seed, of the pixels under the kernel at every output with the kernel
taps       the same, as a sum over the kernel's positions, in float32 at least
"""

import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import lax

from mfm_jax.models.lowering import Operation, Window, convolve, over_seeds


def grouped(operation: Operation, a: jax.Array, b: jax.Array, window: Window) -> jax.Array:
    return jax.vmap(functools.partial(operation, window=window))(a, b)


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


FORMS: dict[str, Callable[[Operation, jax.Array, jax.Array, Window], jax.Array]] = {
    "grouped": grouped,
    "unrolled": functools.partial(over_seeds, channels=0),
    "folded to 128": functools.partial(over_seeds, channels=128),
    "folded to 256": functools.partial(over_seeds, channels=256),
    "folded": functools.partial(over_seeds, channels=2**20),
    "patches": patches,
    "taps": taps,
}
