"""What an MFM step costs: time and temporary memory as ratios to the plain step, in one run.

    python benchmarks/run.py                      # ResNet-32, batch 100 + 100, float32
    python benchmarks/run.py --quick              # ResNet-8, a minute

Every contender is compiled first; then one step of each is timed in turn, over and over, so that a machine whose speed
drifts slows all of them alike. Reported: median seconds and spread, the median over rounds of the ratio to the plain
step of the same round, XLA's temporary memory, its FLOP count, and compile time. Batches are on the device; sampling
and augmentation are not part of the step here.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mfm_jax import bilevel, config, hypergrad, losses, models, modulation, optim
from mfm_jax.types import Batch, BilevelState

ALL_SITES = ("stage1", "stage2", "stage3", "pooled")


class Contender(NamedTuple):
    """One way to make a step; `None` sites mean the plain step."""

    name: str
    sites: tuple[str, ...] | None = None
    options: dict[str, Any] | None = None
    every: int = 1


CONTENDERS = (
    Contender("plain"),
    Contender("lagged, pooled", ("pooled",)),
    Contender("lagged, four feature sites", ALL_SITES),
    Contender("lagged, logits", ("logits",)),
    Contender("lagged, pooled, every 5", ("pooled",), every=5),
    Contender("lagged, pooled, virtual head", ("pooled",), {"virtual_groups": ("head",)}),
    Contender("not lagged, pooled", ("pooled",), {"lagged": False}),
    Contender("reverse over reverse, pooled", ("pooled",), {"hypergrad": hypergrad.reverse_over_reverse}),
    Contender("reverse over reverse, four sites", ALL_SITES, {"hypergrad": hypergrad.reverse_over_reverse}),
)


class Program(NamedTuple):
    """A compiled contender: `run(state)` does `steps` steps."""

    run: Callable[[BilevelState], BilevelState]
    state: BilevelState
    steps: int
    memory: float
    flops: float
    compile_seconds: float


def build(contender: Contender, model: str, batch_size: int) -> Program:
    """Compiles a contender's step, and for `every > 1` the plain modulated step between two meta-steps."""
    module = models.create(model, 10, 16)
    keys = jax.random.split(jax.random.key(0), 3)
    batches = [
        Batch(jax.random.normal(key, (batch_size, 32, 32, 3)), jnp.arange(batch_size, dtype=jnp.int32) % 10)
        for key in keys[:2]
    ]
    variables = module.init(keys[2], batches[0].image)
    tx, mod_tx = optim.classifier(config.Optim(), 0.1), optax.adam(1e-2)
    arguments = (module.apply, losses.cross_entropy, tx)
    modulator = None
    if contender.sites:
        channels = modulation.site_channels(
            lambda modulate: module.apply(variables, batches[0].image, modulate=modulate), contender.sites
        )
        modulator = modulation.direct(channels)
    # Copied, because a donated buffer must be no one else's.
    state = jax.tree.map(jnp.copy, bilevel.init_state(keys[2], variables, tx, modulator, modulator and mod_tx))
    programs = []
    began = time.perf_counter()
    if modulator:
        meta_step = bilevel.make_step(*arguments, modulator, mod_tx, **(contender.options or {}))
        programs.append(jax.jit(meta_step, donate_argnums=0).lower(state, *batches).compile())
    if not modulator or contender.every > 1:
        step = jax.jit(bilevel.make_plain_step(*arguments, modulator), donate_argnums=0)
        programs.append(step.lower(state, batches[0]).compile())
    compile_seconds = time.perf_counter() - began

    def run(state: BilevelState) -> BilevelState:
        for i in range(contender.every):
            program, count = (programs[0], 2 if modulator else 1) if i == 0 else (programs[-1], 1)
            state, _ = program(state, *batches[:count])
        return jax.block_until_ready(state)

    flops = [program.cost_analysis()["flops"] for program in programs]
    memory = max(program.memory_analysis().temp_size_in_bytes for program in programs)
    mean_flops = (flops[0] + (contender.every - 1) * flops[-1]) / contender.every
    return Program(run, state, contender.every, memory, mean_flops, compile_seconds)


def measure(programs: dict[str, Program], rounds: int) -> dict[str, list[float]]:
    """Returns seconds a step of each contender in each round, after one round that is not counted."""
    states = {name: program.run(program.state) for name, program in programs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in track(range(rounds), description="measuring"):
        for name, program in programs.items():
            began = time.perf_counter()
            states[name] = program.run(states[name])
            seconds[name].append((time.perf_counter() - began) / program.steps)
    return seconds


def rows(programs: dict[str, Program], seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    plain = programs["plain"]
    return [
        {
            "contender": name,
            "seconds": statistics.median(seconds[name]),
            "seconds_min": min(seconds[name]),
            "seconds_max": max(seconds[name]),
            "time_ratio": statistics.median(a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)),
            "memory_mb": program.memory / 1e6,
            "memory_ratio": program.memory / plain.memory,
            "flop_ratio": program.flops / plain.flops,
            "compile_seconds": program.compile_seconds,
        }
        for name, program in programs.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ResNet-8, batch 32, three rounds")
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write the table here as JSON")
    options = parser.parse_args()
    if options.quick:
        options.model, options.batch_size, options.rounds = "resnet8", 32, 3
    programs = {
        contender.name: build(contender, options.model, options.batch_size)
        for contender in track(CONTENDERS, description="compiling")
    }
    table = rows(programs, measure(programs, options.rounds))
    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    shown = Table(*table[0], title=f"{options.model}, batch {options.batch_size} + {options.batch_size}, {device}")
    for row in table:
        shown.add_row(*(value if isinstance(value, str) else f"{value:.3g}" for value in row.values()))
    Console(width=140).print(shown)
    if options.out:
        options.out.write_text(json.dumps({"device": device, "options": vars(options) | {"out": ""}, "rows": table}))


if __name__ == "__main__":
    main()
