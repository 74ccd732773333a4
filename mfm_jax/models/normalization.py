"""Batch norm whose statistics may leave examples out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last, as `flax.linen.BatchNorm`, with a weight for each example.

        y = (x - mean) / sqrt(var + 1e-5) * scale + bias        var = mean(x^2) - mean^2

    Flax takes a mask too, but averages the devices' means as if each had the same number of examples.

    Attributes:
      use_running_average: normalise by the running averages and leave them alone.
      momentum: what the running averages keep at each update.
      axis_name: mesh axis over which the statistics are averaged; None keeps them local.
      dtype: of the result; statistics are float32 (or wider).
      scale_init: of the scale, ones or zeros.

    References:
      Ioffe and Szegedy, Batch normalization, ICML 2015, algorithm 1.
    """

    use_running_average: bool
    momentum: float = 0.9
    axis_name: str | None = None
    dtype: DTypeLike = jnp.float32
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, weight: jax.Array | None = None) -> jax.Array:
        """Returns `x [B, ..., C]` normalised; `weight [B]`, with mean 1, is the weight of each example."""
        axes, shape = tuple(range(x.ndim - 1)), x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(shape, jnp.float32))
        running_var = self.variable("batch_stats", "var", lambda: jnp.ones(shape, jnp.float32))
        if self.use_running_average:
            mean, var = running_mean.value, running_var.value
        else:
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            powers = [wide, wide**2]
            if weight is not None:
                powers = [weight.astype(wide.dtype).reshape(-1, *(1,) * (x.ndim - 1)) * power for power in powers]
            mean, square = (power.mean(axes) for power in powers)
            if axis := not self.is_initializing() and self.axis_name:
                mean, square = lax.pmean(jnp.stack([mean, square]), axis)  # one collective, not two
            var = jnp.maximum(0.0, square - mean**2)
            if not self.is_initializing():
                running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
                running_var.value = self.momentum * running_var.value + (1 - self.momentum) * var
        scale = self.param("scale", self.scale_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        # As x factor + shift, and not from x - mean: that the backward pass would keep as an array of its own.
        factor = lax.rsqrt(var + 1e-5) * scale
        factor, shift = (v.reshape((1,) * len(axes) + shape) for v in (factor, bias - mean * factor))
        return (x * factor + shift).astype(self.dtype)
