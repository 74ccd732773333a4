"""The convolution and all its derivatives are those of `lax.conv_general_dilated`, and slices are for CPU alone."""

import chex
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from mfm_jax.models import convolution as convolution_lib
from mfm_jax.models.convolution import convolution

# image side, kernel side, stride, padding
CASES = [
    (8, 3, 1, ((1, 1), (1, 1))),
    (9, 3, 2, ((1, 1), (1, 1))),
    (8, 3, 2, "SAME"),
    (8, 1, 2, "VALID"),
    (11, 7, 2, ((3, 3), (3, 3))),
]


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
    shapes = [(5, side, side, 3), (kernel, kernel, 3, 4)]
    values = [jax.random.normal(key, shape, jnp.float64) for key, shape in zip(keys, shapes * 2, strict=True)]
    return values[:2], values[2:]


@pytest.mark.parametrize(("side", "kernel", "stride", "padding"), CASES)
def test_values_and_derivatives_in_both_modes(side, kernel, stride, padding, monkeypatch):
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


def test_maps_over_seeds():
    with jax.enable_x64(True):
        (x, kernel), (others, other_kernel) = inputs(8, 3)
        stacked = jnp.stack([x, others]), jnp.stack([kernel, other_kernel])
        loss, _ = losses(1, "SAME")
        gradient = jax.grad(loss, argnums=(0, 1))
        one_by_one = [gradient(x, kernel), gradient(others, other_kernel)]
        expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one)
        chex.assert_trees_all_close(jax.vmap(gradient)(*stacked), expected, rtol=1e-9)


@pytest.mark.parametrize(("platform", "slices"), [("cpu", 4), ("cuda", 1), ("tpu", 1)])
def test_slices_are_for_cpu_alone(platform, slices):
    x, kernel = jnp.zeros((8, 64, 64, 32)), jnp.zeros((3, 3, 32, 4))  # 4 MiB of input
    gradient = jax.jit(jax.grad(lambda kernel: convolution(x, kernel, (1, 1), "SAME").sum()))
    text = gradient.trace(kernel).lower(lowering_platforms=(platform,)).as_text()
    # The forward pass is linear in the kernel: only the weight gradient is left.
    assert text.count("stablehlo.convolution") == slices


def test_refuses_what_it_does_not_do():
    x, kernel = jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 1, 2))
    with pytest.raises(NotImplementedError, match="feature_group_count"):
        convolution(x, kernel, (1, 1), "SAME", feature_group_count=2)
