r"""A queue of runs at full size, which stops at the time given and goes on on another machine.

    TFDS_DATA_DIR=... python benchmarks/subset.py --config=configs/cifar10_lt.py --workdir=packed
    python benchmarks/full.py --config=configs/cifar10_lt.py --data=packed/cifar10.npz --workdir=runs/full \
        --minutes=25 --jobs=3 --pack=kept

and on the next machine the same with `--from=kept` in front of an empty `--workdir`. The order is that of worth: MFM,
logit adjustment as tuned, CE and logit adjustment as published with seed 0, then with the other seeds; then likewise
the shipped curve and the modulated features; LDAM-DRW, Meta-Weight-Net and MetaSAug; and `INGREDIENTS`, each under
three of these methods, for `--config=configs/cifar10_lt_strong.py`. Every `--config.group.field=value` holds for all of
them.

`table.md` and `table.csv` in the workdir have a row for each run, and are written anew when one has ended. `--pack`
keeps what is worth carrying in a few small archives: `results.tar.gz`, written anew with the tables, of the tables and
the records of all runs, and, at the end, for each run that was cut off, its last checkpoint. Exit status: 0 all done;
1 some failed; 75 the time is over, and the same command goes on.
"""

import contextlib
import json
import shlex
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import study
from absl import flags
from ml_collections import config_flags

from mfm_jax import command, compare
from mfm_jax import config as config_lib
from mfm_jax.errors import UserError
from mfm_jax.machine import disk
from mfm_jax.machine.interruption import EXIT_INTERRUPTED, Interrupted
from mfm_jax.study import runs, tune
from mfm_jax.workdir.files import Workdir, read_object
from mfm_jax.workdir.finished import cost, shown

_MINUTES = flags.DEFINE_float(
    "minutes", 0.0, "When to have ended, from the end of the imports; 0: when all is done.", lower_bound=0
)
_MARGIN = flags.DEFINE_float("margin", 60.0, "Seconds before that at which runs are told to save, and stop.")
_DATA = flags.DEFINE_string("data", "", "A benchmark packed by benchmarks/subset.py, to read in the place of the set.")
_PACK = flags.DEFINE_string("pack", "", "Folder for the archives.")
_FROM = flags.DEFINE_string("from", "", "Folder of archives to go on from.")

COLUMNS = (
    *("method", "seed", "state", "epoch", "balanced_accuracy", "head_third", "middle_third", "rarest_third", "ece"),
    *("train_loss", "train_accuracy", "step_ms", "compile_seconds", "device_memory_mb", "seconds", "command"),
)
_WRITING = 30.0  # of the margin, the seconds left for tables and archives where a process had to be killed


class Row(NamedTuple):
    """What is set for the runs of one name."""

    name: str
    method: str
    values: Mapping[str, Any] = MappingProxyType({})


FIRST = (
    Row("mfm", "mfm"),
    Row("logit_adjusted", "logit_adjusted", study.CHOSEN["logit_adjusted"]),
    Row("ce", "ce"),
    Row("logit_adjusted_natural", "logit_adjusted", {"method.sampling": "natural", "method.tau": 1.0}),
)
FORMS = (Row("mfm_frozen", "mfm_frozen"), Row("mfm_features", "mfm", study.FEATURES))
THEN = (*(Row(name, name, study.CHOSEN[name]) for name in study.PEERS), Row("metasaug", "metasaug"))
# What the strong recipes are made of, each alone beside what the config has: under LA as published, MFM and CE.
INGREDIENTS: dict[str, study.Values] = {
    "ema": {"optim.ema": 0.999},
    "cutmix": {"augment.cutmix": 1.0},
    "cutmix_balanced": {"augment.cutmix": 1.0, "augment.partners": "balanced"},
    "proco": {"method.proco_weight": 1.0},
    "bcl": {"method.bcl_weight": 0.5},
    "sbcl": {"method.sbcl_weight": 0.5},
    "sam": {"optim.sam_rho": 0.1},
    "max_norm": {"optim.head_max_norm": 1.0},
}
_MFM, _, _CE, _PUBLISHED = FIRST
MIXED = (
    *(
        Row(f"{row.name}_{name}", row.method, {**row.values, **values})
        for name, values in INGREDIENTS.items()
        for row in (_PUBLISHED, _MFM, _CE)
    ),
    Row("mfm_glmc", "mfm", {"method.base": "glmc"}),
)
TIERS = (FIRST, FORMS, THEN, MIXED)
NAMES = tuple(row.name for tier in TIERS for row in tier)


class Planned(NamedTuple):
    """One run of the queue."""

    row: Row
    seed: int
    run: runs.Task


def queue(config: Any, workdir: Path, names: Sequence[str], seeds: Sequence[int], data: str = "") -> list[Planned]:
    """Returns the runs in the order of worth; `data` is a packed benchmark.

    Raises:
      UserError: an unknown name.
    """
    if unknown := [name for name in names if name not in NAMES]:
        raise UserError(f"--methods={','.join(unknown)}: allowed: {', '.join(NAMES)}")
    shared = {"checkpoint.keep": 1, **({"data.source": "npz", "data.root": data} if data else {})}
    planned = []
    for rows in TIERS:
        for seed in seeds:
            for row in (row for row in rows if row.name in names):
                fields = tune.with_values(compare.run_fields(config, row.method, seed), {**shared, **row.values})
                folder = workdir / row.name / f"seed{seed}"
                run = runs.Task(f"{row.name} seed {seed}", config_lib.resolve(fields), folder)
                planned.append(Planned(row, seed, run))
    return planned


def main(argv: Sequence[str]) -> int:
    began = time.monotonic()
    del argv
    workdir = command.workdir()
    workdir.mkdir(parents=True, exist_ok=True)
    if _FROM.value:
        unpack(Path(_FROM.value), workdir)
    names = flags.FLAGS.methods if flags.FLAGS["methods"].present else NAMES
    planned = queue(command.config(), workdir, names, compare._seeds(flags.FLAGS.seeds), _DATA.value)
    failed: dict[Path, str] = {}

    def ended(group: Sequence[runs.Task], outcomes: Sequence[runs.Outcome]) -> None:
        failed.update({run.workdir: one.error for run, one in zip(group, outcomes, strict=True) if one.error})
        record(planned, workdir, failed)

    todo = [[one.run] for one in planned if not Workdir(one.run.workdir).results.exists()]
    limits: dict[str, float] = {}
    if _MINUTES.value:
        left = 60 * _MINUTES.value - (time.monotonic() - began)
        limits = {"seconds": left - _MARGIN.value, "patience": max(_MARGIN.value - _WRITING, _MARGIN.value / 2)}
    status = 0
    try:
        outcomes = runs.train_all(todo, flags.FLAGS.jobs, **limits, ended=ended)
        failed.update({run.workdir: one.error for (run,), one in zip(todo, outcomes, strict=True) if one.error})
    except Interrupted:
        status = EXIT_INTERRUPTED
    print(record(planned, workdir, failed))
    if _PACK.value:
        for one in planned:
            pack_checkpoint(one.run.workdir, Path(_PACK.value))
    return status or (1 if failed else 0)


def record(planned: Sequence[Planned], workdir: Path, failed: Mapping[Path, str]) -> str:
    """Writes the tables, and the records' archive where one is wanted; returns the table."""
    rows = [row_of(one, failed.get(one.run.workdir, "")) for one in planned]
    disk.write_rows(workdir / "table.csv", [COLUMNS, *([row[name] for name in COLUMNS] for row in rows)])
    text = markdown(rows, planned, flags.FLAGS.jobs)
    disk.write(workdir / "table.md", text)
    if _PACK.value:
        pack_records(planned, workdir, Path(_PACK.value))
    return text


def row_of(one: Planned, error: str = "") -> dict[str, Any]:
    """Returns the table's row of a run, by column; None where there is nothing to tell."""
    folder, row = one.run.workdir, dict.fromkeys(COLUMNS)
    row |= {"method": one.row.name, "seed": one.seed, "command": shell(one)}
    files = Workdir(folder)
    results = read_object(files.results) if files.results.exists() else None
    rows = list(_rows(files.metrics))
    epoch = rows[-1]["epoch"] + 1 if rows else 0
    begun = f"at epoch {epoch}" if files.config.exists() else "not begun"
    row |= {"state": "finished" if results else f"failed: {error}" if error else begun, "epoch": epoch}
    if results:
        found = shown(results)
        names = ("balanced_accuracy", "head_third", "middle_third", "rarest_third", "ece")
        row |= {name: round(100 * found[name], 2) for name in names}
    if trained := [line for line in rows if line["kind"] == "train"]:
        row |= {"train_loss": round(trained[-1]["loss"], 4), "train_accuracy": round(100 * trained[-1]["accuracy"], 2)}
    return row | _cost(folder)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a `metrics.jsonl`, whole lines only."""
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        if line.endswith("\n"):
            yield json.loads(line)


def _cost(workdir: Path) -> dict[str, Any]:
    """Returns the time that a run took (`finished.Cost`), and the highest memory of a device."""
    took = cost(workdir)
    if took is None:
        return {}
    memory = [line["bytes"] for line in Workdir(workdir).read_processes() if line["of"] == "accelerator"]
    return {
        "step_ms": took.step and round(1e3 * took.step, 2),
        "compile_seconds": round(took.compiling, 1),
        "device_memory_mb": round(max(memory) / 1e6) if memory else None,
        "seconds": round(took.total),
    }


def shell(one: Planned) -> str:
    """Returns the command that trains the run by itself."""
    values = {"method.name": one.row.method, "train.seed": one.seed, **one.row.values, "checkpoint.keep": 1}
    if _DATA.value:
        values |= {"data.source": "npz", "data.root": _DATA.value}
    words = [f"--config={config_flags.get_config_filename(flags.FLAGS['config'])}"]
    words += [word for word in sys.argv[1:] if word.startswith("--config.")]
    words += [f"--config.{path}={value}" for path, value in values.items()]
    return shlex.join(["python", "-m", "mfm_jax.main", *words, "--workdir=WORKDIR"])


def markdown(rows: Sequence[Mapping[str, Any]], planned: Sequence[Planned], jobs: int) -> str:
    """Returns the table without the commands, which the CSV file has, and below it the data and the devices."""
    shown = COLUMNS[:-1]
    lines = [shown, ["---"] * len(shown)]
    lines += [["–" if row[name] is None else str(row[name]) for name in shown] for row in rows]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    note = (
        "Accuracies and calibration error: test split, last epoch, in percent. Loss and accuracy on the long-tailed"
        " training set, augmented: last epoch. Step: median over epochs but a process's first. Seconds: of the run's"
        " processes, start and evaluation included."
    )
    data, devices = set(), set()
    for one in planned:
        files = Workdir(one.run.workdir)
        if files.manifest.exists():
            data.add(_data(read_object(files.manifest)))
        devices |= {line["device"] for line in files.read_processes()}
    facts = [f"Data: {'; '.join(sorted(data))}."] if data else []
    facts += [f"Devices: {', '.join(sorted(devices))}; {jobs} side by side."] if devices else []
    return "\n\n".join([table, note, *facts]) + "\n"


def _data(manifest: Mapping[str, Any]) -> str:
    counts = manifest["splits"]["train"]["class_counts"]
    return (
        f"{manifest['dataset']} {manifest['version']}, protocol {manifest['protocol']}, seed {manifest['seed']},"
        f" {sum(counts)} training images ({max(counts)}..{min(counts)} a class),"
        f" manifest {manifest['hash'].removeprefix('sha256:')[:12]}"
    )


def pack_records(planned: Sequence[Planned], workdir: Path, folder: Path) -> None:
    """Writes `results.tar.gz`: the tables, and of every run all but its checkpoints."""
    with _archive(folder / "results.tar.gz") as archive:
        for name in ("table.md", "table.csv"):
            archive.add(workdir / name, name)
        for one in planned:
            place = Workdir(one.run.workdir)
            records = (place.results, place.metrics, place.config, place.manifest, place.facts)
            for path in (*records, place.processes, place.peak_memory, place.path.with_suffix(".log")):
                if path.exists():
                    archive.add(path, path.relative_to(workdir))


def pack_checkpoint(run: Path, folder: Path) -> None:
    """Writes `METHOD-seedN.tar.gz` of a run that was cut off: its last checkpoint. Removes it of one that is done."""
    path = folder / f"{run.parent.name}-{run.name}.tar.gz"
    steps = [step for step in Workdir(run).checkpoints.glob("*") if step.name.isdecimal()]
    if Workdir(run).results.exists() or not steps:
        path.unlink(missing_ok=True)
        return
    last = max(steps, key=lambda step: int(step.name))
    with _archive(path) as archive:
        archive.add(last, last.relative_to(run.parents[1]))


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[tarfile.TarFile]:
    """Yields an archive that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with tarfile.open(temporary, "w:gz") as archive:
        yield archive
    temporary.replace(path)


def unpack(folder: Path, workdir: Path) -> None:
    """Unpacks the archives into a workdir that has no runs.

    Raises:
      UserError: there is none, or there are runs in the workdir.
    """
    paths = sorted(folder.glob("*.tar.gz"))
    if folder / "results.tar.gz" not in paths:
        raise UserError(f"--from={folder}: no results.tar.gz there; give the folder that --pack wrote")
    if any(workdir.glob("*/seed*")):
        raise UserError(f"--from={folder}: --workdir={workdir} has runs; leave --from out to go on with them")
    for path in paths:
        with tarfile.open(path) as archive:
            disk.unpack(archive, workdir)


if __name__ == "__main__":
    command.run(main)
