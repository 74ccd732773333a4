"""Kills, damages and starves a small run, and compares each end with that of a run that was left alone.

    python benchmarks/kill_campaign.py --workdir=/tmp/campaign --out=docs/results/kill_campaign.json

`--kills` SIGKILLs and SIGTERMs arrive at random moments of real processes: while they start, while a checkpoint is
written, just after an epoch, anywhere. The checkpoints of an interrupted run are then damaged in 20 ways, and at last
the disk (a tmpfs in a user namespace) fills up during a run. A run must end with the same bits in its last checkpoint,
`metrics.jsonl` and `results.json` (but for its seconds), or stop with one clear line; a process that does not end
within `--patience` seconds of a signal hangs. Exit status 1 if any of this fails.

The full disk needs Linux, `unshare` and permission to use it; where they lack, it is left out, and said so.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from mfm_jax import config as config_lib
from mfm_jax.errors import UserError
from mfm_jax.training import train
from mfm_jax.workdir import integrity

REPOSITORY = Path(__file__).parents[1]
EPOCHS = 15
FIELDS = {
    "data.source": "digits",
    "data.name": "digits",
    "data.imbalance_factor": 10.0,
    "data.val_images_per_class": 5,
    "augment.pad": 1,
    "augment.flip": False,
    "model.name": "resnet8",
    "model.width": 2,
    "meta.batch_size": 20,
    "meta.every": 2,
    "optim.learning_rate": 0.05,
    "train.epochs": EPOCHS,
    "train.batch_size": 64,
    "checkpoint.every_epochs": 1,
}


def command(workdir: Path) -> list[str]:
    """Returns the command of the run, as a user gives it."""
    fields = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    config = REPOSITORY / "configs" / "digits_lt.py"
    return [sys.executable, "-m", "mfm_jax.main", f"--config={config}", f"--workdir={workdir}", *fields]


def config() -> config_lib.Config:
    """Returns the same run's config."""
    found = config_lib.default()
    for name, value in FIELDS.items():
        group, field = name.split(".")
        found[group][field] = value
    return config_lib.resolve(found)


def content(workdir: Path) -> dict[str, Any]:
    """Returns all of a finished run that must be the same every time; arrays as bytes."""
    with ocp.CheckpointManager(workdir.absolute() / "checkpoints") as manager:
        step = manager.latest_step()
        state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    results = json.loads((workdir / "results.json").read_text())
    del results["train_seconds"]
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays = {jax.tree_util.keystr(path): _bytes(leaf) for path, leaf in leaves}
    return {"step": step, "rows": (workdir / "metrics.jsonl").read_bytes(), "results": results, **arrays}


def _bytes(leaf: Any) -> bytes:
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


class Campaign:
    """The undisturbed run, what is compared with it, and what was found."""

    def __init__(self, workdir: Path, patience: float, seed: int):
        self.workdir, self.patience, self.random = workdir, patience, random.Random(seed)
        self.failures: list[str] = []
        began = time.monotonic()
        if self.start(workdir / "whole").wait():
            raise SystemExit(f"the undisturbed run: {_last_line(workdir / 'whole')}")
        self.seconds = time.monotonic() - began
        self.whole = content(workdir / "whole")

    def start(self, workdir: Path) -> subprocess.Popen:
        """Starts the run in a process of its own; its output goes to a file beside the workdir."""
        workdir.parent.mkdir(parents=True, exist_ok=True)
        with workdir.with_suffix(".log").open("a") as log:
            return subprocess.Popen(command(workdir), stdout=log, stderr=subprocess.STDOUT, cwd=REPOSITORY)

    def compare(self, workdir: Path, label: str) -> bool:
        """Returns whether a finished run is what it should be; notes it if not."""
        found = content(workdir)
        differing = [name for name in self.whole.keys() | found.keys() if self.whole.get(name) != found.get(name)]
        if differing:
            self.failures.append(f"{label}: differs in {sorted(differing)[:5]}")
        return not differing

    def end(self, process: subprocess.Popen, label: str) -> int | None:
        """Waits for a process; one that hangs is noted, and killed."""
        try:
            return process.wait(self.patience)
        except subprocess.TimeoutExpired:
            self.failures.append(f"{label}: hangs")
            process.kill()
            process.wait()
            return None

    # --- kills ---------------------------------------------------------------------------------------

    def kills(self, wanted: int) -> dict[str, Any]:
        """Sends `wanted` signals, to as many runs one after the other as that takes."""
        sent: Counter[str] = Counter()
        statuses: Counter[str] = Counter()
        runs, identical, slowest = 0, 0, 0.0
        while sent.total() < wanted:
            workdir = self.workdir / f"killed{runs}"
            runs += 1
            status: int | None = 75
            while status in (75, -signal.SIGKILL, -signal.SIGTERM):  # the last before its handler was there
                process = self.start(workdir)
                moment = self.random.choice(list(MOMENTS))
                began, what = time.monotonic(), "left alone"
                if sent.total() < wanted and self._wait_for(moment, process, workdir):
                    number = self.random.choice([signal.SIGKILL, signal.SIGTERM])
                    began, what = time.monotonic(), f"{number.name} {moment}"
                    process.send_signal(number)
                    sent[what] += 1
                status = self.end(process, f"{workdir.name}, {what}")
                if what != "left alone":
                    slowest = max(slowest, time.monotonic() - began)
                statuses[str(status)] += 1
                print(f"{sent.total()}/{wanted} {workdir.name}, {what}: status {status}", flush=True)
            if status == 0:
                identical += self.compare(workdir, workdir.name)
            else:
                self.failures.append(f"{workdir.name}: status {status}: {_last_line(workdir)}")
        return {
            "sent": dict(sorted(sent.items())),
            "statuses": dict(sorted(statuses.items())),
            "runs": runs,
            "identical": identical,
            "slowest_end_seconds": round(slowest, 1),
        }

    def _wait_for(self, moment: str, process: subprocess.Popen, workdir: Path) -> bool:
        """Waits for a moment in the life of a process; False if the process ends before."""
        what, delay = MOMENTS[moment]
        before, until = what(workdir), None
        if moment == "at any moment":
            until = time.monotonic() + self.random.uniform(0, self.seconds)
        while process.poll() is None:
            if until is None and what(workdir) not in (before, 0):
                until = time.monotonic() + self.random.uniform(0, delay)
            if until is not None and time.monotonic() >= until:
                return True
            time.sleep(0.002)
        return False

    # --- damage --------------------------------------------------------------------------------------

    def damages(self, interrupted: Path, count: int) -> list[dict[str, str]]:
        """Damages the checkpoints of an interrupted run in each way, and goes on with it in this process."""
        found = []
        for way, harm in list(DAMAGES.items())[:count]:
            workdir = self.workdir / "damaged" / way.replace(" ", "_")
            shutil.copytree(interrupted, workdir)
            steps = sorted((p for p in (workdir / "checkpoints").iterdir()), key=lambda p: int(p.name))
            harm(steps, self.random)
            try:
                train.train_and_evaluate(config(), workdir)
                aside = sorted(path.name for path in (workdir / "damaged-checkpoints").glob("*"))
                same = self.compare(workdir, way)
                outcome = f"identical; set aside: {', '.join(aside) or 'none'}" if same else "differs"
            except UserError as error:
                outcome = f"stopped: {str(error).replace(str(workdir), 'WORKDIR')}"
            except Exception as error:  # anything else is a failure to tell
                outcome = f"{type(error).__name__}: {error}"
                self.failures.append(f"{way}: {outcome}")
            print(f"{way}: {outcome}", flush=True)
            found.append({"damage": way, "outcome": outcome})
            shutil.rmtree(workdir)
        return found

    def interrupted(self) -> Path:
        """Returns the workdir of a run stopped by SIGTERM in its last third."""
        workdir = self.workdir / "interrupted"
        process = self.start(workdir)
        while process.poll() is None and _epochs(workdir) < 2 * EPOCHS // 3:
            time.sleep(0.002)
        process.terminate()
        if self.end(process, "to be damaged") != 75:
            raise RuntimeError(f"the run to be damaged: {_last_line(workdir)}")
        return workdir


def _unnamed(workdir: Path) -> int:
    """Returns how many checkpoints are being written."""
    return len(list((workdir / "checkpoints").glob("*tmp*")))


def _size(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def _epochs(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


def _last_line(workdir: Path) -> str:
    return workdir.with_suffix(".log").read_text().strip().splitlines()[-1]


# When to send a signal: a number that changes at that moment, and seconds that may pass after it.
MOMENTS: dict[str, tuple[Callable[[Path], int], float]] = {
    "at any moment": (lambda _: 0, 0.0),
    "while a checkpoint is written": (_unnamed, 0.2),
    "after an epoch": (_size, 0.5),
}

Harm = Callable[[list[Path], random.Random], None]


def _flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(bytes(data))


def _halve(path: Path, chance: random.Random) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path, chance: random.Random) -> None:
    os.truncate(path, 0)


def _remove(path: Path, chance: random.Random) -> None:
    path.unlink()


def _arrays(step: Path) -> Path:
    """Returns the file with the largest of the state's arrays."""
    return max((step / "state").glob("ocdbt.process_*/d/*"), key=lambda path: path.stat().st_size)


def _last(harm: Callable[[Path, random.Random], None], where: Callable[[Path], Path]) -> Harm:
    return lambda steps, chance: harm(where(steps[-1]), chance)


def _flip_all(steps: list[Path], chance: random.Random) -> None:
    for step in steps:
        _flip(_arrays(step), chance)


def _named(name: str) -> Callable[[Path], Path]:
    return lambda step: step / name


DAMAGES: dict[str, Harm] = {
    "a bit of the arrays flipped": _last(_flip, _arrays),
    "arrays truncated to half": _last(_halve, _arrays),
    "arrays emptied": _last(_empty, _arrays),
    "arrays missing": _last(_remove, _arrays),
    "a bit of the index flipped": _last(_flip, _named("state/manifest.ocdbt")),
    "index truncated": _last(_halve, _named("state/manifest.ocdbt")),
    "index missing": _last(_remove, _named("state/manifest.ocdbt")),
    "a bit of the tree's description flipped": _last(_flip, _named("state/_METADATA")),
    "tree's description missing": _last(_remove, _named("state/_METADATA")),
    "state missing": lambda steps, _: shutil.rmtree(steps[-1] / "state"),
    "a bit of the record flipped": _last(_flip, _named("record/metadata")),
    "record truncated": _last(_halve, _named("record/metadata")),
    "a bit of the validation metric flipped": _last(_flip, _named("metrics/metrics")),
    "modulator missing": lambda steps, _: shutil.rmtree(steps[-1] / "phi"),
    "a bit of the digests flipped": _last(_flip, _named(integrity.SEAL)),
    "digests missing": _last(_remove, _named(integrity.SEAL)),
    "Orbax's own description emptied": _last(_empty, _named("_CHECKPOINT_METADATA")),
    "the whole checkpoint missing": lambda steps, _: shutil.rmtree(steps[-1]),
    "all but the oldest flipped": lambda steps, chance: _flip_all(steps[1:], chance),
    "every checkpoint flipped": lambda steps, chance: _flip_all(steps, chance),
}


# --- a full disk -------------------------------------------------------------------------------------


def full_disk(campaign: Campaign, interrupted: Path) -> dict[str, str]:
    """Returns how the run goes on, on a disk that is full: `_on_full_disk`, with a tmpfs that it alone sees."""
    disk = campaign.workdir / "disk"
    disk.mkdir()
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if shutil.which("unshare") is None or subprocess.run([*alone, *mount], capture_output=True).returncode:
        return {"not run": "no permission to mount a tmpfs in a user namespace"}
    script = [sys.executable, __file__, f"--workdir={campaign.workdir}", f"--interrupted={interrupted}"]
    inside = [*alone, "bash", "-c", f'{shlex.join(mount)} && exec "$@"', "full_disk", *script, f"--disk={disk}"]
    done = subprocess.run(inside, capture_output=True, text=True)
    if done.returncode:
        campaign.failures.append(f"full disk: {done.stderr.strip()[-300:]}")
        return {}
    found = json.loads(done.stdout.splitlines()[-1])
    campaign.failures += found.pop("failures")
    return found


def _on_full_disk(campaign: Campaign, interrupted: Path, disk: Path) -> dict[str, Any]:
    """Goes on with the run on a disk without room: until room is made, and without end."""
    run, ballast, log = disk / "run", disk / "ballast", disk / "run.log"
    log.symlink_to(campaign.workdir / "full_disk.log")
    found = {}
    for name in ("room is made later", "no room is made"):
        shutil.rmtree(run, ignore_errors=True)
        log.write_text("")
        shutil.copytree(interrupted, run)
        with ballast.open("wb") as file:
            file.write(bytes(shutil.disk_usage(disk).free - 16384))
        process = campaign.start(run)
        while process.poll() is None and not (name == "room is made later" and "could not be saved" in log.read_text()):
            time.sleep(0.01)
        status = process.poll()
        told = [line for line in log.read_text().splitlines() if line.startswith(("warning:", "error:"))]
        ballast.unlink()
        if status is None:
            status = campaign.end(process, name)
        else:
            again = campaign.end(campaign.start(run), name)
            told.append(f"status {status}; with room again: status {again}")
        told.append("identical" if campaign.compare(run, name) else "differs")
        found[name] = "; then ".join(line.replace(str(disk), "DISK") for line in told)
    return found | {"failures": campaign.failures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--out", type=Path, help="file for what was found, JSON")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--damages", type=int, default=len(DAMAGES))
    parser.add_argument("--patience", type=float, default=300, help="seconds after which a process hangs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--interrupted", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    logging.set_verbosity(logging.FATAL)
    began = time.monotonic()
    campaign = Campaign(given.workdir.absolute(), given.patience, given.seed)
    if given.disk:
        print(json.dumps(_on_full_disk(campaign, given.interrupted, given.disk)))
        return 0
    found: dict[str, Any] = {"undisturbed_seconds": round(campaign.seconds, 1)}
    interrupted = campaign.interrupted()
    found["full_disk"] = full_disk(campaign, interrupted)
    found["damages"] = campaign.damages(interrupted, given.damages)
    found["kills"] = campaign.kills(given.kills)
    found |= {"failures": campaign.failures, "minutes": round((time.monotonic() - began) / 60, 1)}
    print(json.dumps(found, indent=1))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if campaign.failures else 0


if __name__ == "__main__":
    sys.exit(main())
