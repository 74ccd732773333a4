"""What augmentation on the device costs: milliseconds of processor time for a batch of 100 RGB images of 32x32 pixels.

    python benchmarks/augmentation.py

Processor time, of all threads together, so that a busy machine says the same. Beside each option stand its ratio to
crop and flip, and what it would add to the plain step of ResNet-32. The last row is TrivialAugment once more, to the
same images, its operation chosen by `lax.switch` under `vmap`.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from contenders import Spec
from jax_steps import build
from rich.console import Console
from rich.table import Table

from mfm_jax.config import Augment
from mfm_jax.data import augment, policies
from mfm_jax.data.policies import Operation

BATCH, SIDE = 100, 32
_CROP = "crop and flip"
_KEY = jax.random.key(0)
Branch = Callable[[jax.Array, Operation], jax.Array]


def options(images: jax.Array) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Returns what is measured, each a function of uint8 `images`."""
    labels = jnp.zeros(len(images), jnp.int32)
    found = {_CROP: lambda x: augment.augment_batch(_KEY, x, Augment())}
    for name in ("autoaugment", "randaugment", "trivialaugment"):
        alone = Augment(policy=name, pad=0, flip=False)
        found[name] = lambda x, alone=alone: augment.augment_batch(_KEY, x, alone)
    found["cutout"] = lambda x: augment.cutout(_KEY, x.astype(jnp.float32), 16)
    found["mixup"] = lambda x: augment.mixup(_KEY, x.astype(jnp.float32), labels, 1.0)[0]
    found["cutmix"] = lambda x: augment.cutmix(_KEY, x.astype(jnp.float32), labels, 1.0)[0]
    found["trivialaugment, lax.switch"] = switched
    return found


def switched(images: jax.Array) -> jax.Array:
    """Returns what `augment_batch` does under TrivialAugment alone, one branch an operation."""
    policy = policies.policy(Augment(policy="trivialaugment"), *images.shape[1:3])
    number = np.zeros(len(policy.operations.affine), np.int32)  # of each row's operation
    kinds = len(policies.OPERATIONS)
    number[policy.rows.reshape(-1)] = np.repeat(np.arange(kinds), policy.rows.size // kinds)

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        (row,) = policies.draw(jax.random.fold_in(key, 2), policy)
        return jax.lax.switch(jnp.asarray(number)[row], _branches(), image, policies.at(policy, row))

    return jax.vmap(one)(jax.random.split(_KEY, len(images)), images)


def _branches() -> list[Branch]:
    """Returns a function for each of `policies.OPERATIONS`, which does no more than that operation."""

    def blend(origin: int) -> Branch:
        return lambda image, to: policies._blended(image.astype(jnp.int32), origin, to.products).astype(jnp.uint8)

    def table(point: int) -> Branch:
        return lambda image, to: policies._looked_up(image.astype(jnp.int32), to._replace(point=point)).astype(
            jnp.uint8
        )

    def of(name: str) -> Branch:
        if name in policies._GEOMETRIC:
            return lambda image, to: policies._moved(image, to.affine)
        if name in policies._ORIGINS:
            return blend(policies._ORIGINS[name])
        return table(policies._POINTS.get(name, policies._FIXED))

    return [(lambda image, to: image) if name == "Identity" else of(name) for name in policies.OPERATIONS]


def milliseconds(run: Callable[[], object], calls: int) -> float:
    """Returns the median processor time of a call, after a first one."""
    jax.block_until_ready(run())
    times = []
    for _ in range(calls):
        began = time.process_time()
        jax.block_until_ready(run())
        times.append(1e3 * (time.process_time() - began))
    return statistics.median(times)


def measured(calls: int, spec: Spec) -> dict[str, float]:
    """Returns the milliseconds of each option, and of the plain step, under "step"."""
    images = np.random.default_rng(0).integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8)
    given = jnp.asarray(images)
    found = {}
    for name, option in options(given).items():
        compiled = jax.jit(option)
        found[name] = milliseconds(lambda compiled=compiled: compiled(given), calls)
    step = build(spec)
    found["step"] = milliseconds(lambda: step.run(1), max(calls // 4, 1))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=40, help="of each program; of the step, a quarter")
    found = measured(parser.parse_args(argv).calls, Spec("", step="plain"))
    step = found.pop("step")
    table = Table("option", "ms", "to crop and flip", "to a step", title=f"a plain step of ResNet-32: {step:,.0f} ms")
    for name, time_of in found.items():
        table.add_row(name, f"{time_of:.2f}", f"{time_of / found[_CROP]:.1f}", f"{time_of / step:.2%}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
