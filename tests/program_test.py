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

BATCH, CHANNELS = 100, 4  # of the head: [B, C] is the largest array that may be float32 where it is stored
HOST = re.compile(r"callback|stablehlo\.(?:send|recv|infeed|outfeed)")


@pytest.fixture(scope="module", params=["plain", "meta"])
def traced(request):
    """A call of ten steps of a kind, and the number of arrays in its state."""
    config = configured("mfm", model__name="resnet8", model__width=1, train__dtype="bfloat16", train__steps_per_call=10)
    data = data_lib.build(config)
    experiment = experiment_lib.build(config, data)
    feed, loop = feed_lib.make(data, experiment, config, inputs.to_device(data)), loop_lib.initial(experiment)
    feed.start_epoch(0, 0, loop.bilevel)
    call = loop_lib.make_call(experiment, config)
    return call.trace(loop, feed.next(), jnp.int32(3), request.param), len(jax.tree.leaves(loop))


@pytest.fixture(scope="module", params=["cuda", "tpu"])
def program(request, traced):
    """The text of the call as it is lowered for a platform."""
    return traced[0].lower(lowering_platforms=(request.param,)).as_text()


def wide(kinds):
    """Returns the shapes among those of a line's operands and results that are float32 and larger than [B, C]."""
    shapes = [shape.split("x")[:-1] for shape in re.findall(r"tensor<((?:\d+x)*)f32>", kinds)]
    return [shape for shape in shapes if math.prod(map(int, shape)) > BATCH * CHANNELS]


def test_no_activation_is_stored_in_float32(program):
    """What XLA stores in any case: operands and results of convolutions and matrix products.

    Between them it fuses what is elementwise, such as batch norm's float32 copy of what it sums, with the reduction
    that reads it; whether it did shows in the program that is compiled on the device alone.
    """
    lines = [line for line in program.splitlines() if re.search(r"stablehlo\.(convolution|dot_general)", line)]
    assert sum(f"tensor<{BATCH}x" in line for line in lines) > 20
    assert not [line for line in lines if wide(line[line.rindex(" : ") :])]


def test_the_state_is_donated(program, traced):
    signature = re.search(r"func\.func public @main\((.*?)\) ->", program)[1]
    state = signature.split("%arg")[1 : traced[1] + 1]
    assert not [one for one in state if "tf.aliasing_output" not in one and "jax.buffer_donor" not in one]


def test_the_host_is_not_called(program):
    assert not HOST.findall(program)


def test_a_callback_would_have_stopped_the_lowering():
    def told(x):
        jax.debug.print("{}", x)
        return x

    with pytest.raises(ValueError, match="lowering platform"):
        jax.jit(told).trace(1.0).lower(lowering_platforms=("cuda",))
