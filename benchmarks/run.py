"""What an MFM step costs, beside the plain step, other routes to the meta-gradient, and the same in PyTorch.

    python benchmarks/run.py                         # ResNet-32, batch 100 + 100, float32
    python benchmarks/run.py --quick                 # ResNet-8, batch 32, under two minutes
    python benchmarks/run.py --curves                # cost against batch, depth, sites, classes, ... on a ResNet-8
    python benchmarks/run.py --only 'plain|recipe'   # contenders whose name matches

Every contender is a process of its own. Each is started, compiled and warmed up by itself, and then waits; after that
one turn of each is timed in turn, round after round, so that only one works at any time and a machine whose speed
drifts slows all alike. A turn is as many steps as take about `--turn_seconds`. Batches are on the device; sampling and
augmentation are not part of the step here. JAX's contenders keep freed memory as the commands do (`allocator`): the
title says `allocator: kept` then, and `allocator: system` elsewhere. Without PyTorch (extra `bench`) its rows are left
out; its `torch.compile` rows take minutes to compile.

Columns of the main table:

  ms          median over rounds of the time of a step; a contender with `every` is averaged over that many steps
  spread      (slowest - fastest round) / median
  / plain     median over rounds of the ratio to the plain step of the same library and precision in the same round
  / PyTorch   the same, to PyTorch's fastest plain step
  images/s    training images; meta images are not counted
  temp MB     XLA's temporary memory of the step; no such figure for PyTorch
  device MB   peak on the device, where it reports it
  RSS MB      the process's peak resident memory, all of its life, compilation included
  compile s   tracing and compiling; PyTorch: what its first step took beyond its second
  start s     from starting the process to the end of its first step; weights are drawn by NumPy, which is quicker
              than what training does (`startup.py` measures that)
  needs       arithmetic of the step over that of a plain step, counted by hand (`contenders.step_flops`)
  rate        share of the rate of a large matrix product in XLA, by the same count
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from contenders import Spec, curves, main_table, recipe, step_flops
from rich.console import Console
from rich.progress import track
from rich.table import Table

CONFIG = Path(__file__).parents[1] / "configs" / "cifar10_lt_small.py"
# Caches would hide what compiling costs; JAX must not take the whole device for the first of many processes; waiting
# threads of PyTorch's must not take the cores from whoever has its turn.
ENVIRONMENT = {
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
Row = dict[str, Any]


class WorkerFailed(Exception):
    """A contender's process ended or could not build its step; the message is its reason."""


class Worker:
    """The directing end of one contender's process."""

    def __init__(self, spec: Spec):
        """Starts the process; `wait` goes with it."""
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `stop`)
        order = json.dumps({"spec": dataclasses.asdict(spec), "started": time.time()})
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", order],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | ENVIRONMENT,
            text=True,
        )
        self.spec = spec
        self.facts: Row = {}

    def wait(self) -> "Worker":
        """Waits until the step is warm."""
        try:
            self.facts = self._answer()
        except BaseException:
            self.stop()
            raise
        # What a config file decides is known only now.
        self.spec = Spec.read(dataclasses.asdict(self.spec) | self.facts.pop("spec", {}))
        return self

    def step_seconds(self, steps: int) -> float:
        """Returns seconds a step, over `steps` steps."""
        return self._ask(str(steps))["seconds"]

    def finish(self) -> None:
        """Adds the facts that are known at the end to `facts`, and ends the process."""
        try:
            self.facts |= self._ask("end")
        finally:
            self.stop()

    def kill(self) -> None:
        """Ends the process at once, whatever another thread waits for."""
        self._process.kill()

    def stop(self) -> None:
        self.kill()
        self._process.communicate()
        self._errors.close()

    def _ask(self, line: str) -> Row:
        assert self._process.stdin
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `_answer` tells why
        return self._answer()

    def _answer(self) -> Row:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()
            raise WorkerFailed(f"ended with status {self._process.wait()}: {said[-1] if said else 'no message'}")
        answer = json.loads(line)
        if "failed" in answer:
            raise WorkerFailed(answer["failed"])
        return answer


def serve(order: dict[str, Any]) -> None:
    """The worker's end: builds the step, then does one line's order at a time. stdout carries the answers alone."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Row) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        spec = Spec.read(order["spec"])
        allocator_state = "system"
        if spec.library == "torch":
            from torch_twin import build
        else:
            from mfm_jax.machine import allocator

            if allocator.keep_freed_memory():  # as the commands do
                allocator_state = "kept"
            from jax_steps import build
        program = build(spec)
        first = _seconds(program.run, 1)
        ready = {"start_seconds": time.time() - order["started"]}
        every = program.facts.get("spec", {}).get("every", spec.every)
        program.run(every)  # compiles all that a step calls
        if allocator_state == "kept":
            allocator.give_back()  # many contenders wait side by side
            program.run(every)
        second = _seconds(program.run, 1)
        answer({"compile_seconds": max(first - second, 0.0), "allocator": allocator_state} | program.facts | ready)
        for line in sys.stdin:
            if line.strip() == "end":
                answer(program.finish() | {"rss_mb": _peak_rss_mb()})
                return
            steps = int(line)
            answer({"seconds": _seconds(program.run, steps) / steps})
    except Exception as error:  # told to the directing process, which goes on with the others
        answer({"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def _seconds(run, steps: int) -> float:
    began = time.perf_counter()
    run(steps)
    return time.perf_counter() - began


def _peak_rss_mb() -> float:
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def start(specs: list[Spec], failed: dict[str, str], *, quiet: bool = False) -> list[Worker]:
    """Starts the contenders one after the other; one that fails is noted and left out."""
    workers = []
    for spec in specs if quiet else track(specs, "compiling", console=Console(stderr=True)):
        try:
            workers.append(Worker(spec).wait())
        except WorkerFailed as error:
            failed[spec.name] = str(error)
    return workers


def measure(
    workers: list[Worker], rounds: int, turn_seconds: float, failed: dict[str, str], *, quiet: bool = False
) -> dict[str, list[float]]:
    """Returns seconds a step of each contender in each round, by name, and ends their processes."""
    seconds: dict[str, list[float]] = {}
    turns = {worker.spec.name: 0 for worker in workers}
    numbers = range(rounds)
    for _ in numbers if quiet else track(numbers, "measuring", console=Console(stderr=True)):
        for worker in workers:
            name, every = worker.spec.name, worker.spec.every
            if name in failed:
                continue
            try:
                if not turns[name]:  # the first turn says how many steps a turn should have
                    whole = worker.step_seconds(every) * every
                    turns[name] = every * max(1, math.ceil(turn_seconds / whole))
                seconds.setdefault(name, []).append(worker.step_seconds(turns[name]))
            except WorkerFailed as error:
                failed[name] = str(error)
    for worker in workers:
        try:
            if worker.spec.name in failed:
                worker.stop()
            else:
                worker.finish()
        except WorkerFailed as error:
            failed[worker.spec.name] = str(error)
    return {name: values for name, values in seconds.items() if name not in failed}


def rows(workers: list[Worker], seconds: dict[str, list[float]]) -> list[Row]:
    """Returns the main table: one row a contender that lived."""
    twins = [name for name in seconds if name.startswith("PyTorch plain")]
    fastest = min(twins, key=lambda name: statistics.median(seconds[name]), default="")
    flops = {worker.spec.name: step_flops(worker.spec) for worker in workers}
    return [
        {
            "contender": worker.spec.name,
            **_times(seconds[worker.spec.name]),
            "over_plain": _ratio(seconds, worker.spec.name, worker.spec.plain_name),
            "over_pytorch": _ratio(seconds, worker.spec.name, fastest),
            "images_a_second": worker.spec.batch / statistics.median(seconds[worker.spec.name]),
            **{name: worker.facts.get(name) for name in ("temp_mb", "device_mb", "rss_mb")},
            **{name: worker.facts[name] for name in ("compile_seconds", "start_seconds")},
            "predicted_over_plain": _predicted(worker.spec, flops),
            "share_of_matmul": _share(seconds, flops, worker.spec),
        }
        for worker in workers
        if worker.spec.name in seconds and worker.spec.step != "matmul"
    ]


def _times(values: list[float]) -> Row:
    median = statistics.median(values)
    return {"seconds": median, "spread": (max(values) - min(values)) / median, "rounds": values}


def _ratio(seconds: dict[str, list[float]], name: str, base: str) -> float | None:
    if base not in seconds:
        return None
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def _predicted(spec: Spec, flops: dict[str, float]) -> float:
    return flops[spec.name] / step_flops(dataclasses.replace(spec, step="plain"))


def _share(seconds: dict[str, list[float]], flops: dict[str, float], spec: Spec) -> float | None:
    yardstick = f"matmul {spec.dtype}"
    ratio = _ratio(seconds, yardstick, spec.name) if yardstick in seconds else None
    return ratio and flops[spec.name] / flops[yardstick] * ratio


def show(table: list[Row], title: str) -> None:
    """Prints the main table."""
    headings = {
        "contender": ("contender", "{}"),
        "seconds": ("ms", "{:.1f}"),
        "spread": ("spread", "{:.0%}"),
        "over_plain": ("/ plain", "{:.2f}"),
        "over_pytorch": ("/ PyTorch", "{:.2f}"),
        "images_a_second": ("images/s", "{:.0f}"),
        "temp_mb": ("temp MB", "{:.0f}"),
        "device_mb": ("device MB", "{:.0f}"),
        "rss_mb": ("RSS MB", "{:.0f}"),
        "compile_seconds": ("compile s", "{:.1f}"),
        "start_seconds": ("start s", "{:.1f}"),
        "predicted_over_plain": ("needs", "{:.2f}"),
        "share_of_matmul": ("rate", "{:.0%}"),
    }
    wanted = {name: how for name, how in headings.items() if any(row[name] is not None for row in table)}
    shown = Table(title=title)
    for name, (heading, _) in wanted.items():
        shown.add_column(heading, justify="left" if name == "contender" else "right", no_wrap=True)
    for row in table:
        values = {name: row[name] and row[name] * 1e3 if name == "seconds" else row[name] for name in wanted}
        shown.add_row(*("" if v is None else wanted[name][1].format(v) for name, v in values.items()))
    Console(width=170).print(shown)


def measure_curves(common: Spec, devices: int, options: argparse.Namespace, failed: dict[str, str]) -> list[Row]:
    """Returns one row a point: the recipe's step beside the plain one, in a pair of processes of their own."""
    found = []
    points = [(curve, *point) for curve, all_ in curves(common, devices, quick=options.quick) for point in all_]
    points = [point for point in points if re.search(options.only, point[0])]
    for curve, value, spec in track(points, "curves", console=Console(stderr=True)):
        pair = [recipe(spec, "ce"), recipe(spec, "mfm")]
        trouble: dict[str, str] = {}
        workers = start(pair, trouble, quiet=True)
        seconds = measure(workers, options.rounds, options.turn_seconds, trouble, quiet=True)
        failed |= {f"{curve} {value}, {name}": reason for name, reason in trouble.items()}
        if len(seconds) == 2:
            found.append(_point(curve, value, workers, seconds))
    return found


def _point(curve: str, value: str, workers: list[Worker], seconds: dict[str, list[float]]) -> Row:
    plain, mfm = workers
    return {
        "curve": curve,
        "value": value,
        "plain_seconds": statistics.median(seconds["ce"]),
        "mfm_seconds": statistics.median(seconds["mfm"]),
        "over_plain": _ratio(seconds, "mfm", "ce"),
        "predicted_over_plain": step_flops(mfm.spec) / step_flops(plain.spec),
        "plain_temp_mb": plain.facts["temp_mb"],
        "mfm_temp_mb": mfm.facts["temp_mb"],
        "mfm_compile_seconds": mfm.facts["compile_seconds"],
    }


def show_curves(points: list[Row], title: str) -> None:
    """Prints a small table for each curve."""
    for curve in dict.fromkeys(point["curve"] for point in points):
        shown = Table(curve, "plain ms", "MFM ms", "/ plain", "needs", "plain MB", "MFM MB", "compile s", title=title)
        for point in points:
            if point["curve"] == curve:
                _, value, plain, mfm, ratio, needs, *rest = point.values()
                numbers = (f"{1e3 * plain:.1f}", f"{1e3 * mfm:.1f}", f"{ratio:.2f}", f"{needs:.2f}")
                shown.add_row(value, *numbers, *(f"{v:.1f}" for v in rest))
        Console(width=170).print(shown)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ResNet-8, batch 32, three rounds, fewer contenders")
    parser.add_argument("--curves", action="store_true", help="the cost curves instead of the main table")
    parser.add_argument("--model", help="default: resnet32; resnet8 with --quick or --curves")
    parser.add_argument("--batch_size", type=int, help="of both batches; default: 100; 32 with --quick or --curves")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, help="default: 9; 3 with --quick; 5 with --curves")
    parser.add_argument("--turn_seconds", type=float, help="least time of a turn; default: 0.5; 0.1 with --quick")
    parser.add_argument("--config", type=Path, default=CONFIG, help="what `default recipe` is; default: %(default)s")
    parser.add_argument(
        "--only", default="", help="only contenders, or curves, whose name matches this regular expression"
    )
    parser.add_argument("--out", type=Path, help="also write everything here, as JSON")
    options = parser.parse_args()
    small = options.quick or options.curves
    options.model = options.model or ("resnet8" if small else "resnet32")
    options.batch_size = options.batch_size or (32 if small else 100)
    options.rounds = options.rounds or (3 if options.quick else 5 if options.curves else 9)
    options.turn_seconds = options.turn_seconds or (0.1 if small else 0.5)
    return options


def main() -> int:
    options = arguments()
    size = options.batch_size
    common = Spec(
        "", model=options.model, batch=size, meta_batch=size, image_size=options.image_size, config=str(options.config)
    )
    probe = Worker(dataclasses.replace(common, name="probe", step="matmul")).wait()  # asks JAX what the device is
    probe.stop()
    known = ("backend", "device", "device_count", "version", "convolutions", "allocator")
    device = {name: probe.facts[name] for name in known}
    failed: dict[str, str] = {}
    how = f"{device['version']}, convolutions {device['convolutions']}, allocator {device['allocator']}"
    title = f"{options.model}, batch {size} + {size}, {device['device']}, {how}"
    result: Row = {"device": device, "options": {k: str(v) for k, v in vars(options).items()}}
    if options.curves:
        result["curves"] = measure_curves(common, device["device_count"], options, failed)
        show_curves(result["curves"], title)
    else:
        result["rows"], versions = main_rows(common, device["backend"], options, failed)
        show(result["rows"], ", ".join([title, *versions]))
    for name, reason in failed.items():
        Console(width=170).print(f"failed: {name}: {reason}", highlight=False)
    if options.out:
        options.out.write_text(json.dumps(result | {"failed": failed}, indent=1) + "\n")
    return 1 if failed else 0


def main_rows(
    common: Spec, backend: str, options: argparse.Namespace, failed: dict[str, str]
) -> tuple[list[Row], list[str]]:
    """Measures the main table; returns its rows and PyTorch's version if it took part."""
    torch = importlib.util.find_spec("torch") is not None
    if not torch:
        print('PyTorch is not installed, so its rows are left out: pip install -e ".[bench]"')
    specs = main_table(common, backend, torch=torch, quick=options.quick)
    specs = [spec for spec in specs if re.search(options.only, spec.name) or spec.step == "matmul"]
    workers = start(specs, failed)
    seconds = measure(workers, options.rounds, options.turn_seconds, failed)
    versions = sorted({worker.facts["version"] for worker in workers if worker.spec.library == "torch"})
    return rows(workers, seconds), versions


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        serve(json.loads(sys.argv[2]))
    else:
        sys.exit(main())
