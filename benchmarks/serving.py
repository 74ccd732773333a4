"""What a trained classifier costs its user: folders of pictures through `predict`, and the exported forward pass.

    python benchmarks/serving.py                     # some minutes on two cores
    python benchmarks/serving.py --model=resnet32 --image_size=32 --workers=4

The classifier has had one training step, on scikit-learn's digits, and the pictures are random 64 x 64 JPEGs: what is
measured does not depend on what was learned.

  predict   `python -m mfm_jax.predict` on folders of two sizes: the pictures a second (the difference of the sizes
            over that of the times, so without start and compilation), the seconds that the start takes, and the peak
            resident memory of its largest process
  exported  the exported forward pass and the classifier's own, by turns in one process, compiled for the same batch:
            the median ratio of their times, and the largest difference of a probability
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mfm_jax import config as config_lib
from mfm_jax import export
from mfm_jax.evaluation import classifier
from mfm_jax.training import train

BATCHES = (1, 7, 64)
ROUNDS = 50


class Cost(NamedTuple):
    """Of one command: its seconds, and the peak resident memory of its largest process in bytes."""

    seconds: float
    peak: int


def train_one_step(workdir: Path, model: str, image_size: int) -> None:
    config = config_lib.default()
    config.data.update(source="digits", name="digits", image_size=image_size)
    config.augment.pad = 1
    config.model.name = model
    config.method.name = "ce"
    config.train.max_steps = 1
    train.train_and_evaluate(config, workdir)


def make_pictures(folder: Path, number: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in track(range(number), f"{number} pictures"):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        coarse.resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{i:06}.jpg", quality=90)


def predict(workdir: Path, folder: Path, workers: int) -> Cost:
    """Runs the command once.

    Raises:
      RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "mfm_jax.predict", f"--checkpoint={workdir}", str(folder), f"--workers={workers}"]
    began = time.perf_counter()
    process = subprocess.Popen([*command, f"--out={folder}.csv"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)}: failed")
    return Cost(time.perf_counter() - began, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def exported_against_own(workdir: Path) -> list[tuple[int, float, float, float]]:
    """Returns for each batch (its size, milliseconds of the own pass, ratio, largest difference)."""
    trained = classifier.load(workdir)
    own = jax.jit(trained.forward)
    program = jax.jit(jax.export.deserialize(export.exported(trained).serialize()).call)
    found = []
    for size in BATCHES:
        images = np.random.default_rng(size).integers(0, 256, (size, *trained.image_shape), np.uint8)
        gap = float(np.abs(np.asarray(own(images)) - np.asarray(program(images))).max())
        times = [(_seconds(own, images), _seconds(program, images)) for _ in range(ROUNDS)]
        ratio = statistics.median(b / a for a, b in times)
        found.append((size, 1000 * statistics.median(a for a, _ in times), ratio, gap))
    return found


def _seconds(run, images: np.ndarray) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run(images))
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--pictures", type=int, nargs=2, default=(1_000, 10_000))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_one_step(folder / "run", options.model, options.image_size)
        table = Table("pictures", "seconds", "peak memory, MB", title=f"predict, {options.model}")
        costs = []
        for number in options.pictures:
            make_pictures(folder / str(number), number)
            predict(folder / "run", folder / str(number), options.workers)  # compiles, and warms the file cache
            costs.append(predict(folder / "run", folder / str(number), options.workers))
            table.add_row(f"{number:,}", f"{costs[-1].seconds:.1f}", f"{costs[-1].peak / 2**20:.0f}")
        console.print(table)
        (few, many), (short, long) = options.pictures, (cost.seconds for cost in costs)
        rate = (many - few) / (long - short)
        console.print(f"{rate:.0f} pictures a second, after {short - few / rate:.1f} s to start")
        table = Table("batch", "own pass, ms", "exported / own", "largest difference", title="exported")
        for size, own, ratio, gap in exported_against_own(folder / "run"):
            table.add_row(str(size), f"{own:.2f}", f"{ratio:.3f}", f"{gap:.1e}")
        console.print(table)


if __name__ == "__main__":
    main()
