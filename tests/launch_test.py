"""The launch scripts: linted, checked against schemas, and run dry.

There is no scheduler here. Slurm is faked by its environment variables and by an `srun` and a `scontrol` that write
down how they were called, Cloud TPU by such a `gcloud`; what JAX makes of Slurm's variables is real, and so is the
connection of the two processes that are told by them.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from mfm_jax.machine.interruption import EXIT_INTERRUPTED

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"


SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", *sorted((ROOT / ".ci").iterdir())]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    command = [Path(sys.executable).with_name("shellcheck"), "--external-sources", script]
    done = subprocess.run(command, cwd=LAUNCH if script.parent == LAUNCH else ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["local.sh", "tpu_pod.sh"])
def test_a_script_without_arguments_tells_its_usage(script):
    done = subprocess.run([LAUNCH / script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"usage: launch/{script} ")


def fake(folder: Path, name: str, status: int = 0) -> None:
    """Puts a program on the PATH-to-be that appends its name and arguments to `calls`, one a line."""
    path = folder / name
    path.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" {name} "$@" END >>"{folder}/calls"\nexit {status}\n')
    path.chmod(0o755)


def calls(folder: Path) -> list[list[str]]:
    """Returns the recorded calls, each as a list: the program and its arguments."""
    return [call.strip("\n").split("\n") for call in (folder / "calls").read_text().split("END\n")[:-1]]


def with_path(folder: Path, **variables: str) -> dict[str, str]:
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"} | variables


@pytest.mark.parametrize("status", [0, 2, EXIT_INTERRUPTED, 137])
def test_the_slurm_job_is_requeued_if_and_only_if_it_was_interrupted(tmp_path, status):
    fake(tmp_path, "srun", status)
    fake(tmp_path, "scontrol")
    command = ["bash", LAUNCH / "slurm.sbatch", "--config=configs/a b.py", "--workdir=runs/x"]
    done = subprocess.run(command, env=with_path(tmp_path, SLURM_JOB_ID="7"), capture_output=True, text=True)
    assert done.returncode == status
    flags = ["--coordinator=auto", "--config=configs/a b.py", "--workdir=runs/x"]
    started, requeued = ["srun", "python", "-m", "mfm_jax.main", *flags], ["scontrol", "requeue", "7"]
    assert calls(tmp_path) == ([started, requeued] if status == EXIT_INTERRUPTED else [started])


JOIN = """
import jax
from mfm_jax.machine import cluster
cluster.join("auto", None, None)
cluster.check_agreed("the same", "not the same")
print(jax.process_index(), jax.process_count(), cluster.is_primary())
"""


def test_jax_finds_the_job_in_the_variables_of_slurm():
    """Two real processes that know of each other only what Slurm would have told them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "JAX_COORDINATOR_PORT": port,
        "JAX_NUM_CPU_DEVICES": "1",
        "XLA_FLAGS": "",
        "PYTHONPATH": str(ROOT),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN], env=os.environ | told | {"SLURM_PROCID": i, "SLURM_LOCALID": i}, **pipes
        )
        for i in ("0", "1")
    ]
    ends = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert [out.splitlines()[-1] for out, _ in ends] == ["0 2 True", "1 2 False"]


def test_the_tpu_script_copies_installs_and_starts_on_all_workers(tmp_path):
    fake(tmp_path, "gcloud")
    command = [LAUNCH / "tpu_pod.sh", "slice", "zone", "--config=configs/a b.py", "--workdir=runs/x"]
    subprocess.run(command, env=with_path(tmp_path), check=True)
    made, copied, started = calls(tmp_path)
    for call in (made, copied, started):
        assert call[:4] == ["gcloud", "compute", "tpus", "tpu-vm"]
        assert {"--zone=zone", "--worker=all"} <= set(call)
    assert copied[4] == "scp"
    assert "slice:mfm_jax/" in copied
    assert all((ROOT / name).exists() for name in copied[6:-3])
    remote = tmp_path / "remote.sh"
    remote.write_text("\n".join(started[started.index("--worker=all") + 1 :]).removeprefix("--command="))
    subprocess.run(["bash", "-n", remote], check=True)
    assert r"mfm_jax.main --coordinator=auto --config=configs/a\ b.py --workdir=runs/x" in remote.read_text()


def test_the_jobset_fits_the_schemas_of_jobset_and_kubernetes():
    """Every field is one that the published schema has, of its type: the models keep those and drop all others."""
    given = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert JobsetV1alpha2JobSet.from_dict(given).to_dict() == given
    misspelt = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text().replace("podFailurePolicy", "podFailurPolicy"))
    assert JobsetV1alpha2JobSet.from_dict(misspelt).to_dict() != misspelt


def test_the_jobset_restarts_on_an_interruption_and_ends_on_a_mistake():
    spec = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]
    (train,) = spec["replicatedJobs"]
    job = train["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    (container,) = job["template"]["spec"]["containers"]
    assert rule["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [2, EXIT_INTERRUPTED],
    }
    actions = {rule["onJobFailureMessagePatterns"][0]: rule["action"] for rule in spec["failurePolicy"]["rules"]}
    assert actions == {
        ".* exit code 2 .*": "FailJobSet",
        f".* exit code {EXIT_INTERRUPTED} .*": "RestartJobSetAndIgnoreMaxRestarts",
    }
    assert job["parallelism"] == job["completions"]
    assert container["args"][0] == "--coordinator=auto"
