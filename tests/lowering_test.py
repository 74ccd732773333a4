"""Convolutions of several seeds off CPU: the same sums, in convolutions without groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfm_jax.models import lowering
from mfm_jax.models.convolution import convolution
from mfm_jax.models.lowering import Window

PAIRS = st.tuples(st.integers(0, 2), st.integers(0, 2))


@settings(max_examples=12, deadline=None)
@given(
    seeds=st.integers(1, 5),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    together=st.sampled_from((0, 4, 64)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(PAIRS, PAIRS),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_seeds_side_by_side_are_the_seeds_apart(seeds, channels, together, stride, padding, dilation):
    """In float64, for groups of one, some and all seeds; the weight gradient is the convolution's transpose."""
    rng, window = np.random.default_rng(0), Window((3, 2), stride, padding, dilation)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(seeds, 2, 5, 4, channels[0])))
        kernel = jnp.asarray(rng.normal(size=(seeds, 3, 2, *channels)))
        one = functools.partial(lowering.convolve, window=window)
        out, transpose = jax.vjp(jax.vmap(one), x, kernel)
        found = lowering.over_seeds(lowering.convolve, x, kernel, window, together)
        np.testing.assert_allclose(found, out, rtol=1e-12, atol=1e-12)
        dy = jnp.asarray(rng.normal(size=out.shape))
        found = lowering.over_seeds(lowering.weight_gradient, x, dy, window, together)
        np.testing.assert_allclose(found, transpose(dy)[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_program_of_several_seeds_has_no_groups(platform):
    """Nine seeds of 16 channels: eight in one convolution, and the ninth; second derivatives are lowered likewise."""

    def step(x, kernel):
        def loss(kernel):
            return (convolution(x, kernel, (1, 1), "SAME") ** 2).sum()

        return jax.jvp(jax.grad(loss), (kernel,), (kernel,))

    given = jnp.zeros((9, 2, 8, 8, 16)), jnp.zeros((9, 3, 3, 16, 16))
    text = jax.jit(jax.vmap(step)).trace(*given).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") >= 4
    assert text.count("stablehlo.convolution") == text.count("feature_group_count = 1 ")
    assert text.count("stablehlo.convolution") == text.count("batch_group_count = 1 ")
