"""What an accelerator does in the minutes that one has it: ceilings, steps, epochs, PyTorch, seeds, large networks.

    python benchmarks/accelerator.py --minutes=10 --out=measured
    python benchmarks/accelerator.py --minutes=1.7 --out=measured
    python benchmarks/accelerator.py --minutes=3 --out=measured --only='copy|matmul|plain' --model=resnet8

Rows come in the order of their worth, in groups: those of a group are traced and compiled side by side, then timed one
after the other. A row that fails says why and the next one follows; one that roughly takes longer than what is left is
left out. `accelerator.csv` and `accelerator.md` in the folder `--out` are whole after every row, and name the rows that
were not reached when the time was up. JAX's steps run in this process, PyTorch's each in one of its own.

Columns, those of the same name as in `run.py`, and:

  ms          median over the turns of the time of a step, and half the range in percent of it; a turn is at least
              `--turn_seconds` and, of steps under 2 ms, at least 50 steps, between two waits for the device
  / plain     time over that of the plain step of the same library, precision, network and batch; of one seed
  needs       arithmetic over that of a plain step, counted by hand (`contenders.step_flops`); of one seed
  TFLOP/s     by that count, and its share of the large matrix product in the same precision, float32 being TF32 on GPUs
  GB/s        by XLA's count of the bytes that the step accesses, and its share of a large copy; a loop has no count
  compile s   tracing and compiling, the compiler's part beside the others of the group, whose choice of algorithms it
              shares; `alone`: in a new process, with nothing beside it and nothing cached
  operations  of the lowered programs together; `transposes`, of the compiled ones: transposes and copies, such as the
              changes of layout around convolutions; in the CSV, with the number of `programs`
"""

import argparse
import dataclasses
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from contenders import FEATURE_SITES, PUBLISHED_FORWARD, Spec, step_flops
from run import ENVIRONMENT, Worker

from mfm_jax.machine import disk

BEGAN = time.monotonic()
CONFIG = Path(__file__).parents[1] / "configs" / "cifar10_lt.py"
QUICK_STEP, QUICK_STEPS = 2e-3, 50  # of steps under so many seconds, a turn has at least so many
MEASURING = 2.5  # seconds that timing a compiled row takes, roughly
FACTS = (  # as they are, in the CSV
    *("compile_seconds", "trace_seconds", "start_seconds", "temp_mb", "device_mb"),
    *("programs", "operations", "transposes"),
)
HEADS = [
    *("row", "ms, half the range", "images/s", "/ plain", "needs", "TFLOP/s, of the product", "GB/s, of the copy"),
    *("compile s, of it tracing", "temporary MB", "note"),
]
NOT_REACHED = "not reached before the time was up"


class InProcess:
    """A JAX contender in this process, with the face of `run.Worker`."""

    def __init__(self, spec: Spec):
        self.spec = spec

    def wait(self) -> None:
        """Builds the step: traces and compiles."""
        from jax_steps import build  # here, so that a package that it lacks costs its rows and no others

        self._program = build(self.spec)
        self.facts = dict(self._program.facts)
        self.spec = Spec.read(dataclasses.asdict(self.spec) | self.facts.pop("spec", {}))

    def step_seconds(self, steps: int) -> float:
        began = time.perf_counter()
        self._program.run(steps)
        return (time.perf_counter() - began) / steps

    def finish(self) -> None:
        """Checks that the training is sound; the peak of memory that is told here would be that of all rows."""
        self._program.finish()

    def kill(self) -> None:
        """Does nothing: it ends with this process."""


@dataclass
class Row:
    """One row: what is measured, how long that takes, roughly, on an accelerator, and what came of it."""

    spec: Spec
    cost: float  # seconds, compilation included
    alone: bool = False  # a JAX step in a process of its own
    seconds: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    note: str = NOT_REACHED
    contender: Worker | InProcess | None = None

    def start(self) -> None:
        apart = self.alone or self.spec.library == "torch"
        self.contender = Worker(self.spec) if apart else InProcess(self.spec)
        self.contender.wait()

    def measure(self, options: argparse.Namespace) -> None:
        """Times the step and ends the contender; a slow step is given fewer turns."""
        assert self.contender
        self.spec, self.facts = self.contender.spec, self.contender.facts
        unit = self.facts.get("unit", self.spec.every)
        for _ in range(2):  # the first warms up
            once = self.contender.step_seconds(unit)
        steps = math.ceil(options.turn_seconds / once)
        if once < QUICK_STEP:
            steps = max(steps, QUICK_STEPS)
        steps = math.ceil(steps / unit) * unit
        turns = options.rounds if once * steps < 2 * options.turn_seconds else min(options.rounds, 3)
        seconds = [self.contender.step_seconds(steps) for _ in range(turns)]
        self.contender.finish()
        self.seconds, self.note = seconds, ""


def plan(common: Spec) -> list[list[Row]]:
    """Returns the rows in the order of their worth, in groups that are compiled side by side."""
    product = replace(common, name="matmul float32", step="matmul")
    ceilings = [
        replace(common, name="copy", step="copy"),
        product,
        replace(product, name="matmul bfloat16", dtype="bfloat16"),
        replace(product, name="matmul float32, no TF32", precision="highest"),
    ]
    plain = replace(common, name="plain", step="plain")
    exact = replace(common, name="MFM, logits", sites=("logits",))
    recipe = replace(common, name="default recipe", step="loop")
    torch = replace(plain, library="torch", name="PyTorch plain, channels_last")
    double = replace(exact, library="torch", name="PyTorch MFM, logits")
    single = replace(recipe, name="default recipe, one step a call", overrides=(("train.steps_per_call", 1),))
    scanned = replace(recipe, name="default recipe, scanned blocks", overrides=(("model.scan_blocks", True),))
    large = replace(common, width=0, image_size=224, classes=1000, dtype="bfloat16", sites=("logits",))
    return [
        *([Row(spec, 3)] for spec in ceilings),  # before anything else works, and one at a time
        [
            Row(plain, 20),
            Row(exact, 30),
            Row(recipe, 40),
            Row(_half(plain), 20),
            Row(_half(exact), 30),
            Row(_half(recipe), 40),
            Row(torch, 15),
            Row(double, 20),
            Row(replace(torch, name=f"{torch.name}, compiled", compiled=True), 50),
            Row(replace(torch, name=f"{torch.name}, CUDA graphs", compiled=True, graphs=True), 50),
            *(Row(_together(recipe, seeds), 50) for seeds in (4, 16)),
        ],
        [
            Row(_half(torch), 15),
            Row(single, 40),
            Row(scanned, 40),
            Row(_half(scanned), 40),
            Row(replace(exact, name="MFM, four sites", sites=FEATURE_SITES), 40),
            *(Row(_half(_together(recipe, seeds)), 50) for seeds in (4, 16)),
            Row(replace(double, name=f"{double.name}, compiled", compiled=True), 100),
        ],
        [Row(spec, 60) for spec in _large(large)],
        *([Row(replace(spec, name=f"{spec.name}, alone"), 35, alone=True)] for spec in (plain, exact, recipe)),
    ]


def _half(spec: Spec) -> Spec:
    return replace(spec, name=f"{spec.name}, bfloat16", dtype="bfloat16")


def _together(spec: Spec, seeds: int) -> Spec:
    return replace(spec, name=f"{spec.name}, {seeds} seeds together", seeds=seeds)


def _large(common: Spec) -> Iterator[Spec]:
    for batch, step in ((64, "plain"), (64, "mfm"), (256, "plain")):
        for model in PUBLISHED_FORWARD:
            kind = "plain" if step == "plain" else "MFM, logits"
            name = f"{model}, batch {batch}, {kind}, bfloat16"
            yield replace(common, name=name, model=model, step=step, batch=batch, meta_batch=batch)


Started = tuple[Row, Future]  # and what its compilation ends with


class Table:
    """The rows and where they are written."""

    def __init__(self, groups: list[list[Row]], out: Path, title: str):
        self.rows = [row for group in groups for row in group]
        self.out, self.title = out, title

    def write(self) -> None:
        """Writes the CSV and the Markdown, each so that it is there whole or not at all."""
        values = [self.values(row) for row in self.rows]
        self.out.mkdir(parents=True, exist_ok=True)
        disk.write_rows(self.out / "accelerator.csv", [values[0], *(row.values() for row in values)])
        disk.write(self.out / "accelerator.md", self.markdown(values))

    def values(self, row: Row) -> dict[str, Any]:
        """Returns the row's cells by column; None where there is nothing to say."""
        spec, facts = row.spec, row.facts
        found: dict[str, Any] = {"row": spec.name, "dtype": spec.dtype, "batch": spec.batch, "seeds": spec.seeds}
        median = statistics.median(row.seconds) if row.seconds else None
        flops = step_flops(spec) or None
        plain = self._median(_plain_of(spec), "step", "library", "dtype", "model", "batch", "compiled", "graphs")
        yardstick = step_flops(_plain_of(spec)) if spec.step not in ("matmul", "copy") else None
        rate, product = _over(flops, median), self._rate("matmul", spec.dtype)
        speed = _over(facts.get("bytes"), median)
        return found | {
            "seconds": median,
            "half_range": _over(max(row.seconds) - min(row.seconds), 2 * median) if median else None,
            "turns": len(row.seconds),
            "images_a_second": _over(spec.batch * spec.seeds, median) if yardstick else None,
            "over_plain": _over(median, plain and spec.seeds * plain) if yardstick else None,
            "needs": _over(flops, yardstick and spec.seeds * yardstick) if median else None,
            "flops_a_second": rate,
            "share_of_matmul": _over(rate, product),
            "bytes_a_second": speed,
            "share_of_copy": _over(speed, self._rate("copy")),
            **{name: facts.get(name) for name in FACTS},
            "note": row.note,
        }

    def _median(self, spec: Spec, *fields: str) -> float | None:
        """Returns the time of the first measured row in this process, or PyTorch's, whose spec agrees in `fields`."""
        for row in self.rows:
            agree = all(getattr(row.spec, name) == getattr(spec, name) for name in fields)
            if agree and row.seconds and not row.alone:
                return statistics.median(row.seconds)
        return None

    def _rate(self, step: str, dtype: str = "float32") -> float | None:
        """Returns the rate of a ceiling: operations a second of the product, bytes a second of the copy."""
        for row in self.rows:
            if row.seconds and (row.spec.step, row.spec.dtype, row.spec.precision) == (step, dtype, "default"):
                work = row.facts["bytes"] if step == "copy" else step_flops(row.spec)
                return work / statistics.median(row.seconds)
        return None

    def markdown(self, values: list[dict[str, Any]]) -> str:
        versions = dict.fromkeys(row.facts["version"] for row in self.rows if "version" in row.facts)
        devices = dict.fromkeys(row.facts["device"] for row in self.rows if "device" in row.facts)
        lines = [f"# {', '.join(devices) or 'no device'}", "", ", ".join([self.title, *versions]), ""]
        lines += [line(HEADS), "|---" * len(HEADS) + "|"]
        return "\n".join(lines + [line(_cells(row)) for row in values]) + "\n"


def _plain_of(spec: Spec) -> Spec:
    return replace(spec, step="plain", seeds=1)


def _over(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by


def line(cells: list[str]) -> str:
    """Returns a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _cells(row: dict[str, Any]) -> list[str]:
    """Returns the row of the Markdown table."""

    def shown(form: str, name: str, scale: float = 1) -> str:
        return "" if row[name] is None else form.format(row[name] * scale)

    return [
        row["row"],
        shown("{:.3f}", "seconds", 1e3) + shown(" ± {:.1f} %", "half_range", 100),
        shown("{:.0f}", "images_a_second"),
        shown("{:.2f}", "over_plain"),
        shown("{:.2f}", "needs"),
        shown("{:.2f}", "flops_a_second", 1e-12) + shown(", {:.1f} %", "share_of_matmul", 100),
        shown("{:.0f}", "bytes_a_second", 1e-9) + shown(", {:.0f} %", "share_of_copy", 100),
        shown("{:.1f}", "compile_seconds") + shown(", {:.1f}", "trace_seconds"),
        shown("{:.0f}", "temp_mb"),
        row["note"].replace("|", "/"),
    ]


def measure_group(
    rows: list[Row], late: list[Started], table: Table, pool: ThreadPoolExecutor, options: argparse.Namespace
) -> list[Started]:
    """Compiles the rows side by side, then times those that are ready, one after the other; returns the others.

    `late` are those that the groups before returned. Without rows, it waits for them as long as there is time.
    """
    started = late[:]
    for row in rows:
        left = _left(options)
        if row.cost > left:
            row.note = f"left out: takes about {row.cost:.0f} s, and {left:.0f} s were left"
        else:
            started.append((row, pool.submit(row.start)))
    table.write()
    patience = 20 + 2 * max((row.cost for row in rows), default=math.inf)  # the first one imports JAX, too
    wait([future for _, future in started], timeout=min(patience, _left(options) - MEASURING * len(started)))
    ready = [pair for pair in started if pair[1].done() or not rows]
    for row, future in ready:
        try:
            future.result()
            row.measure(options)
            if not all(other.done() for _, other in started):
                row.note = "timed while others were compiled"
        except Exception as error:  # told in the row's place; the others go on
            row.note = f"failed: {type(error).__name__}: {' '.join(str(error).split())[-300:]}"
        if row.contender:
            row.contender.kill()
            row.contender = None  # and its memory on the device
        table.write()
        name, milliseconds, *_ = _cells(table.values(row))
        print(f"{_passed():6.1f} s  {name}: {f'{milliseconds} ms' if row.seconds else row.note}", flush=True)
    return [pair for pair in started if pair not in ready]


def _passed() -> float:
    return time.monotonic() - BEGAN


def _left(options: argparse.Namespace) -> float:
    return max(60 * options.minutes - _passed(), 0)


def environment() -> str:
    """Returns Python's version, the number of cores and, where there is one, what the GPU's driver says of it."""
    said = [f"Python {sys.version.split()[0]}", f"{os.cpu_count()} cores"]
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        said += [f"nvidia-smi: {' '.join(told.split())}"]
    return ", ".join(said)


def stop(table: Table) -> None:
    """Ends this process and those it started, whatever they are at: a compilation cannot be interrupted otherwise."""
    for row in table.rows:
        if row.contender:
            row.contender.kill()
    print(f"{_passed():6.1f} s  {table.out / 'accelerator.md'}", flush=True)
    os._exit(0 if any(row.seconds for row in table.rows) else 1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="when it ends; default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="the folder of accelerator.csv and accelerator.md")
    parser.add_argument("--only", default="", help="only rows whose name matches this regular expression")
    parser.add_argument("--model", default="resnet32", help="the small network; default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=100, help="of both batches; default: %(default)s")
    parser.add_argument("--image_size", type=int, default=32, help="pixels a side; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="turns of a row; default: %(default)s")
    parser.add_argument("--turn_seconds", type=float, default=0.2, help="least time of a turn; default: %(default)s")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="rows compiled at once; default: all cores")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    os.environ.update(ENVIRONMENT)  # before JAX is imported
    model, size, pixels = options.model, options.batch_size, options.image_size
    common = Spec("", model=model, batch=size, meta_batch=size, image_size=pixels, config=str(CONFIG))
    groups = [[row for row in group if re.search(options.only, row.spec.name)] for group in plan(common)]
    groups = [group for group in groups if group]
    if not groups:
        sys.exit(f"--only={options.only!r}: matches no row")
    table = Table(groups, options.out, f"{model}, batch {size} + {size}, {pixels} pixels, {environment()}")
    alarm = threading.Timer(_left(options), stop, [table])
    alarm.daemon = True
    alarm.start()
    pool, late = ThreadPoolExecutor(options.jobs), []
    for group in [*groups, []]:
        late = measure_group(group, late, table, pool, options)
    stop(table)


if __name__ == "__main__":
    main()
