"""What several seeds in one program cost an accelerator, by the form of their convolutions (`forms.py`).

    python benchmarks/seeds.py --minutes=4 --out=measured
    python benchmarks/seeds.py --minutes=1 --out=measured --only='^step, float32'
    python benchmarks/seeds.py --count --out=counted

Rows are whole plain steps of the network, one seed alone and several together, and single layers: the convolution
forward, its input gradient and its weight gradient. Where a layer has as many channels before as behind it and no
stride, the input gradient is the same convolution as the forward pass and has no row. A layer runs `--repeats` times in
a loop inside one program.

Rows come in waves, in the order of their worth: those of a wave are compiled side by side, then timed one after the
other. `seeds.csv` and `seeds.md` in the folder `--out` are whole after every row; what is not there when the time is up
was not reached. `--count` times nothing, and gives XLA's counts of the operations and of the bytes accessed of each
layer's program, compiled for the backend at hand.

Columns: `ms` is the median of the turns, and half the range in percent of it; `a seed / alone` divides it by the seeds
and by the time of the same step or layer of one seed alone.
"""

import argparse
import functools
import os
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerator import line
from contenders import Spec
from run import ENVIRONMENT

from mfm_jax.machine import disk

BEGAN = time.monotonic()
LAYERS = {  # channels before and behind, side before it, stride; of ResNet-32 on images of 32 pixels
    "16 at 32": (16, 16, 32, 1),
    "32 at 16": (32, 32, 16, 1),
    "64 at 8": (64, 64, 8, 1),
    "16 to 32": (16, 32, 32, 2),
    "32 to 64": (32, 64, 16, 2),
    "stem": (3, 16, 32, 1),
}
SQUARE, OTHER = tuple(LAYERS)[:3], tuple(LAYERS)[3:]
FORMS = ("grouped", "unrolled", "folded to 128", "folded to 256", "folded", "patches", "taps")
ALONE = "alone"
PATIENCE = 45  # seconds for which a wave waits for its compilations


@dataclass
class Row:
    """One row: a step of the network, or an operation of a layer, of so many seeds in a form."""

    what: str  # "step", or a key of `LAYERS`
    dtype: str
    seeds: int
    form: str
    operation: str = ""  # of a layer: forward, input gradient, weight gradient
    seconds: list[float] = field(default_factory=list)
    compile_seconds: float | None = None
    temp_mb: float | None = None
    operations: float | None = None
    bytes_accessed: float | None = None
    note: str = ""

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.what, self.dtype, self.operation, f"{self.seeds} seeds", self.form)))

    def build(self, options: argparse.Namespace) -> Callable[[int], float]:
        """Compiles the row's program; returns the function that runs it so many times and tells the seconds of one."""
        began = time.perf_counter()
        make = self._step if self.what == "step" else self._layer
        run = make(options)
        self.compile_seconds = time.perf_counter() - began
        return run

    def _step(self, options: argparse.Namespace) -> Callable[[int], float]:
        from jax_steps import build  # here, once the environment is set

        form = "" if self.form == ALONE else self.form
        pixels, size = options.image_size, options.batch_size
        spec = Spec("", "plain", model=options.model, image_size=pixels, batch=size, meta_batch=size, dtype=self.dtype)
        program = build(replace(spec, seeds=self.seeds, form=form))
        self.temp_mb = program.facts["temp_mb"]

        def run(steps: int) -> float:
            began = time.perf_counter()
            program.run(steps)
            return (time.perf_counter() - began) / steps

        return run

    def operands(self, options: argparse.Namespace) -> tuple[Callable[..., Any], Any, Any]:
        """Returns the layer's operation on all seeds and the shapes of its operands."""
        import jax
        from forms import FORMS as FORMS_BY_NAME

        from mfm_jax.models import lowering

        before, behind, side, stride = LAYERS[self.what]
        side = side * options.image_size // 32
        window = lowering.Window((3, 3), (stride, stride), ((1, 1), (1, 1)), (1, 1))

        def array(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.seeds, *shape), self.dtype)

        x, kernel = array(options.batch_size, side, side, before), array(3, 3, before, behind)
        dy = array(options.batch_size, side // stride, side // stride, behind)
        operation, a, b = lowering.convolve, x, kernel
        if self.operation == "input gradient":  # the convolution of the dilated dy, as `convolution` transposes it
            window = lowering.Window((3, 3), (1, 1), ((1, stride),) * 2, (stride, stride))
            a, b = dy, array(3, 3, behind, before)
        elif self.operation == "weight gradient":
            operation, b = lowering.weight_gradient, dy
        form = FORMS_BY_NAME["unrolled" if self.form == ALONE else self.form]
        return lambda a, b: form(operation, a, b, window), a, b

    def _layer(self, options: argparse.Namespace) -> Callable[[int], float]:
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax import lax

        operation, *shapes = self.operands(options)

        def repeated(a: jax.Array, b: jax.Array) -> jax.Array:
            def again(_: int, carry: tuple) -> tuple:
                a, b, _ = lax.optimization_barrier(carry)  # so that it is not the same operation every time
                return a, b, operation(a, b)

            nothing = jnp.zeros_like(jax.eval_shape(operation, a, b))
            return lax.fori_loop(0, options.repeats, again, (a, b, nothing))[2]

        compiled = jax.jit(repeated).lower(*shapes).compile()
        self.temp_mb = compiled.memory_analysis().temp_size_in_bytes / 1e6

        @functools.cache  # when the row is timed; a program that draws is slow to compile
        def values() -> list[jax.Array]:
            drawn = np.random.default_rng(0).normal(size=2**16).astype(self.dtype)
            return jax.block_until_ready([jnp.asarray(np.resize(drawn, of.shape)) for of in shapes])

        def run(steps: int) -> float:
            operands = values()
            began = time.perf_counter()
            for _ in range(-(-steps // options.repeats)):
                out = compiled(*operands)
            jax.block_until_ready(out)
            return (time.perf_counter() - began) / (-(-steps // options.repeats) * options.repeats)

        return run

    def time(self, run: Callable[[int], float], options: argparse.Namespace) -> None:
        for _ in range(2):  # the first warms up
            once = run(1 if self.what == "step" else options.repeats)
        steps = max(int(options.turn_seconds / once), 1)
        self.seconds = [run(steps) for _ in range(options.rounds)]

    def count(self, options: argparse.Namespace) -> None:
        import jax

        operation, *shapes = self.operands(options)
        found = jax.jit(operation).lower(*shapes).compile().cost_analysis() or {}
        self.operations, self.bytes_accessed = found.get("flops"), found.get("bytes accessed")


def waves() -> Iterator[list[Row]]:
    """Yields the rows in the order of their worth; one form that takes long to compile by itself, at the end."""
    late = [Row("step", dtype, 16, "unrolled") for dtype in ("float32", "bfloat16")]
    for dtype in ("float32", "bfloat16"):
        yield [Row("step", dtype, 1, ALONE), *(Row("step", dtype, 4, form) for form in FORMS if form != "folded")]
        yield list(_layers(SQUARE, dtype, 4))
        yield [Row("step", dtype, 16, form) for form in FORMS if form != "unrolled"]
        yield list(_layers(SQUARE, dtype, 16))
    for dtype in ("float32", "bfloat16"):
        for seeds in (4, 16):
            yield list(_layers(OTHER, dtype, seeds))
    yield late


def _layers(layers: tuple[str, ...], dtype: str, seeds: int) -> Iterator[Row]:
    for layer in layers:
        before, behind, _, stride = LAYERS[layer]
        operations = ["forward", "weight gradient"]
        if (before, stride) != (behind, 1) and layer != "stem":  # nobody asks for the gradient in the images
            operations.insert(1, "input gradient")
        for operation in operations:
            if seeds == 4:
                yield Row(layer, dtype, 1, ALONE, operation)
            for form in FORMS:
                limit = re.search(r"\d+", form)
                if not limit or seeds * behind > int(limit[0]):  # else all are folded in any case
                    yield Row(layer, dtype, seeds, form, operation)


def write(rows: list[Row], out: Path, title: str) -> None:
    """Writes the CSV and the Markdown, each so that it is there whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    alone = {(row.what, row.dtype, row.operation): row for row in rows if row.form == ALONE and row.seconds}
    values = []
    for row in rows:
        found: dict[str, Any] = asdict(row)
        own = alone.get((row.what, row.dtype, row.operation))
        median = statistics.median(row.seconds) if row.seconds else None
        found["seconds"], found["turns"] = median, len(row.seconds)
        found["half_range"] = (max(row.seconds) - min(row.seconds)) / 2 / median if median else None
        found["over_alone"] = median / row.seeds / statistics.median(own.seconds) if median and own else None
        values.append(found)
    disk.write_rows(out / "seeds.csv", [values[0], *(of.values() for of in values)])
    heads = ["row", "ms", "a seed / alone", "compile s", "temporary MB", "G operations", "MB accessed", "note"]
    lines = [f"# {title}", "", line(heads), "|---" * len(heads) + "|"]
    lines += [line(_cells(row, of)) for row, of in zip(rows, values, strict=True)]
    disk.write(out / "seeds.md", "\n".join(lines) + "\n")


def _cells(row: Row, of: dict[str, Any]) -> list[str]:
    def shown(form: str, value: float | None, scale: float = 1) -> str:
        return "" if value is None else form.format(value * scale)

    return [
        row.name,
        shown("{:.3f}", of["seconds"], 1e3) + shown(" ± {:.1f} %", of["half_range"], 100),
        shown("{:.2f}", of["over_alone"]),
        shown("{:.1f}", row.compile_seconds),
        shown("{:.0f}", row.temp_mb),
        shown("{:.2f}", row.operations, 1e-9),
        shown("{:.0f}", row.bytes_accessed, 1e-6),
        row.note.replace("|", "/"),
    ]


Started = tuple[Row, Future]  # and what its compilation ends with


def measure(
    wave: list[Row], late: list[Started], rows: list[Row], pool: ThreadPoolExecutor, options: argparse.Namespace
) -> list[Started]:
    """Compiles the wave's rows side by side, then times those that are ready; returns the others, for the next wave.

    `late` are those that the wave before returned; `rows` grows by those that came to something.
    """
    started = late + [(row, pool.submit(row.build, options)) for row in wave]
    wait([future for _, future in started], timeout=PATIENCE if wave else None)
    ready = [pair for pair in started if pair[1].done()]
    for row, future in ready:
        try:
            row.time(future.result(), options)
            if not all(other.done() for _, other in started):
                row.note = "timed while others were compiled"
        except Exception as error:  # told in the row's place; the others go on
            row.note = f"failed: {type(error).__name__}: {' '.join(str(error).split())[-300:]}"
        rows.append(row)
        write(rows, options.out, options.title)
        milliseconds = f"{1e3 * statistics.median(row.seconds):.3f} ms" if row.seconds else row.note
        print(f"{time.monotonic() - BEGAN:6.1f} s  {row.name}: {milliseconds}", flush=True)
    return [pair for pair in started if pair not in ready]


def stop(options: argparse.Namespace, rows: list[Row]) -> None:
    """Ends the process, whatever it is at: a compilation cannot be interrupted otherwise."""
    print(f"{time.monotonic() - BEGAN:6.1f} s  {options.out / 'seeds.md'}", flush=True)
    os._exit(0 if any(row.seconds for row in rows) else 1)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4, help="when it ends; default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="the folder of seeds.csv and seeds.md")
    parser.add_argument("--only", default="", help="only rows whose name matches this regular expression")
    parser.add_argument("--count", action="store_true", help="count, do not time; layers only")
    parser.add_argument("--model", default="resnet32", help="of the step; default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=100, help="images a seed; default: %(default)s")
    parser.add_argument(
        "--image_size", type=int, default=32, help="pixels a side, a multiple of 8; default: %(default)s"
    )
    parser.add_argument("--repeats", type=int, default=20, help="of a layer in a program; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="turns of a row; default: %(default)s")
    parser.add_argument("--turn_seconds", type=float, default=0.05, help="least time of a turn; default: %(default)s")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="rows compiled at once; default: all cores")
    return parser.parse_args(given)


def main() -> None:
    options = arguments()
    os.environ.update(ENVIRONMENT)  # before JAX is imported
    chosen = [[row for row in wave if re.search(options.only, row.name)] for wave in waves()]
    if not any(chosen):
        sys.exit(f"--only={options.only!r}: matches no row")
    rows: list[Row] = []
    alarm = threading.Timer(60 * options.minutes - (time.monotonic() - BEGAN), stop, [options, rows])
    alarm.daemon = True
    alarm.start()
    import jax

    what = f"{jax.devices()[0].device_kind}, jax {jax.__version__}, Python {sys.version.split()[0]}"
    options.title = f"{what}: {options.model}, batch {options.batch_size}, {options.image_size} pixels"
    if options.count:
        for row in (row for wave in chosen for row in wave if row.what != "step" and row.form != ALONE):
            row.count(options)
            rows.append(row)
            write(rows, options.out, options.title)
        return
    pool = ThreadPoolExecutor(options.jobs)
    late: list[Started] = []
    for wave in [*filter(None, chosen), []]:
        late = measure(wave, late, rows, pool, options)
    stop(options, rows)


if __name__ == "__main__":
    main()
