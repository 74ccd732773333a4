"""What a run of the real command takes beyond its steps.

    python benchmarks/startup.py                     # the config's data must be there, as for training
    python benchmarks/startup.py --skip_run          # without the whole run at the end

Watched from outside, `python -m mfm_jax.main --config=...`:

  first step   from starting the command to the first row of `metrics.jsonl`, in a run that stops after one step:
               imports, data, compilation, that step
  whole        the same command to its end: evaluation, checkpoint and report too
  whole run    the config's epochs with cross-entropy, cached, over the time of the steps alone: the number of epochs
               times the median time between the training rows of one epoch and the next. Where a config validates or
               saves in most epochs, that median holds it too and the ratio is too small.

`nothing cached` is with an empty folder of compiled programs (`MFM_JAX_CACHE`), `cached` the same command once more.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

CONFIG = Path(__file__).parents[1] / "configs" / "cifar10_lt_small.py"
POLL_SECONDS = 0.01


class Watched(NamedTuple):
    """One run of the command: seconds from its start to its end and to each training row."""

    whole: float
    rows: list[float]


def watch(config: Path, cache: Path, overrides: dict[str, Any]) -> Watched:
    """Runs the command in a folder of its own until it ends.

    Raises:
      RuntimeError: it ended with an error; the message is what it said last.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        workdir = Path(folder) / "run"
        fields = [f"--config.{name}={value}" for name, value in overrides.items()]
        command = [sys.executable, "-m", "mfm_jax.main", f"--config={config}", f"--workdir={workdir}", *fields]
        began = time.perf_counter()
        environment = os.environ | {"MFM_JAX_CACHE": str(cache)}
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        rows: list[float] = []
        try:
            while process.poll() is None:
                rows += [time.perf_counter() - began] * (_training_rows(workdir) - len(rows))
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
        whole = time.perf_counter() - began
        if process.returncode:
            said.seek(0)
            raise RuntimeError((said.read().strip().splitlines() or ["no message"])[-1])
        return Watched(whole, rows)


def _training_rows(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="default: %(default)s")
    parser.add_argument("--skip_run", action="store_true", help="leave out the whole run with cross-entropy")
    parser.add_argument("--out", type=Path, help="also write the numbers here, as JSON")
    options = parser.parse_args()
    console, result = Console(width=100), {}
    table = Table("run", "first step, s", "whole, s", title=f"{options.config.name}, one step")
    with tempfile.TemporaryDirectory() as folder, console.status("") as status:
        for method in ("mfm", "ce"):
            for name in ("nothing cached", "cached"):
                status.update(f"{method}, {name}")
                seen = watch(options.config, Path(folder) / method, {"method.name": method, "train.max_steps": 1})
                result[f"{method}, {name}"] = {"first_step_seconds": seen.rows[0], "seconds": seen.whole}
                table.add_row(f"{method}, {name}", f"{seen.rows[0]:.1f}", f"{seen.whole:.1f}")
        console.print(table)
        if not options.skip_run:
            status.update("whole run, ce")
            result["whole run, ce"] = whole_run(options.config, Path(folder) / "ce")
            numbers = result["whole run, ce"]
            console.print(
                f"whole run, ce: {numbers['seconds']:.1f} s, {numbers['over_steps']:.3f} times its steps"
                f" ({numbers['epochs']} epochs of {numbers['epoch_seconds']:.2f} s)"
            )
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def whole_run(config: Path, cache: Path) -> dict[str, float]:
    """Returns the seconds of the config's run with cross-entropy, and their ratio to those of its steps."""
    seen = watch(config, cache, {"method.name": "ce"})
    gaps = [after - before for before, after in zip(seen.rows, seen.rows[1:], strict=False)]
    epoch = statistics.median(gaps)
    epochs = len(seen.rows)
    return {
        "seconds": seen.whole,
        "epochs": epochs,
        "epoch_seconds": epoch,
        "over_steps": seen.whole / (epochs * epoch),
    }


if __name__ == "__main__":
    main()
