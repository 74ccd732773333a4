"""What the programs of a training call hold that are lowered for accelerators, in bfloat16."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from helpers import configured

from mfm_jax import data as data_lib
from mfm_jax.training import experiment as experiment_lib
from mfm_jax.training import feed as feed_lib
from mfm_jax.training import inputs
from mfm_jax.training import loop as loop_lib

PLATFORMS = ("cuda", "tpu")
BATCH, CHANNELS = 100, 4  # of the head: [B, C] is the largest array that may be float32 where it is stored
HOST = re.compile(r"callback|stablehlo\.(?:send|recv|infeed|outfeed)")


@pytest.fixture(scope="module")
def trace():
    """Traces a call of ten steps, of a kind; gives the number of arrays in its state, too."""
    config = configured("mfm", model__name="resnet8", model__width=1, train__dtype="bfloat16", train__steps_per_call=10)
    data = data_lib.build(config)
    experiment = experiment_lib.build(config, data)
    feed = feed_lib.make(data, experiment, config, inputs.to_device(data))
    loop = loop_lib.initial(experiment)
    feed.start_epoch(0, 0, loop.bilevel)
    call, given = loop_lib.make_call(experiment, config), feed.next()
    return (lambda kind: call.trace(loop, given, jnp.int32(3), kind)), len(jax.tree.leaves(loop))


@pytest.fixture(scope="module", params=["plain", "meta"])
def programs(request, trace):
    """The lowered texts, by platform, and the number of arrays in the state."""
    traced = trace[0](request.param)
    texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in PLATFORMS}
    return texts, trace[1]


def wide(kinds):
    """Returns the shapes among those of a line's operands and results that are float32 and larger than [B, C]."""
    shapes = [shape.split("x")[:-1] for shape in re.findall(r"tensor<((?:\d+x)*)f32>", kinds)]
    return [shape for shape in shapes if math.prod(map(int, shape)) > BATCH * CHANNELS]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_no_activation_is_stored_in_float32(platform, programs):
    """What XLA stores in any case: operands and results of convolutions and matrix products.

    Between them it fuses what is elementwise, such as batch norm's float32 copy of what it sums, with the reduction
    that reads it; whether it did shows in the program that is compiled on the device alone.
    """
    lines = [
        line for line in programs[0][platform].splitlines() if re.search(r"stablehlo\.(convolution|dot_general)", line)
    ]
    activations = [line for line in lines if f"tensor<{BATCH}x" in line]
    assert len(activations) > 20
    assert not [line for line in lines if wide(line[line.rindex(" : ") :])]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_state_is_donated(platform, programs):
    texts, leaves = programs
    signature = re.search(r"func\.func public @main\((.*?)\) ->", texts[platform])[1]
    state = signature.split("%arg")[1 : leaves + 1]
    kept = [
        argument for argument in state if "tf.aliasing_output" not in argument and "jax.buffer_donor" not in argument
    ]
    assert not kept


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_host_is_not_called(platform, programs):
    """A callback would have stopped the lowering for a platform that is not there."""
    assert not HOST.findall(programs[0][platform])

    def told(x):
        jax.debug.print("{}", x)
        return x

    with pytest.raises(ValueError, match="lowering platform"):
        jax.jit(told).trace(1.0).lower(lowering_platforms=(platform,))
