"""What the programs of a training call hold that are lowered for accelerators, in bfloat16."""

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


@pytest.fixture(scope="module", params=["plain", "meta"])
def programs(request):
    """The texts of a call of ten steps by platform, and the number of arrays in its state."""
    config = configured(
        "mfm", model__name="resnet20", model__width=1, train__dtype="bfloat16", train__steps_per_call=10
    )
    data = data_lib.build(config)
    experiment = experiment_lib.build(config, data)
    feed = feed_lib.make(data, experiment, config, inputs.to_device(data))
    loop = loop_lib.initial(experiment)
    feed.start_epoch(0, 0, loop.bilevel)
    traced = loop_lib.make_call(experiment, config).trace(loop, feed.next(), jnp.int32(3), request.param)
    texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in PLATFORMS}
    return texts, len(jax.tree.leaves(loop))


def wide(kinds):
    """Returns the types among those of a line's operands and results that are float32 and larger than [B, C]."""
    found = []
    for shape, dtype in re.findall(r"tensor<((?:\d+x)*)(\w+)>", kinds):
        size = 1
        for side in shape.split("x")[:-1]:
            size *= int(side)
        if dtype == "f32" and size > BATCH * CHANNELS:
            found.append(shape + dtype)
    return found


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
    assert len(activations) > 50
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
    assert not HOST.findall(programs[0][platform])

    def told(x):
        jax.debug.print("{}", x)
        return x

    assert HOST.search(jax.jit(told).trace(1.0).lower(lowering_platforms=(platform,)).as_text())
