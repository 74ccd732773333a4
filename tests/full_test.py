"""The queue at full size: its order, its table, and that it goes on elsewhere with the same bits."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile

import pytest
from helpers import REPOSITORY, benchmark, environment

from mfm_jax import config as config_lib
from mfm_jax import data
from mfm_jax.errors import UserError
from mfm_jax.workdir.files import Workdir, read_object


@pytest.fixture(scope="module")
def full():
    with benchmark("full") as module:
        yield module


def test_the_queue_is_in_the_order_of_worth(full, tmp_path):
    planned = full.queue(config_lib.default(), tmp_path, full.NAMES, [0, 1], "packed/cifar10.npz")
    first = ("mfm", "logit_adjusted", "ce", "logit_adjusted_natural")
    forms = ("mfm_frozen", "mfm_features")
    then = ("ldam_drw", "meta_weight_net", "metasaug")
    mixed = [
        f"{name}_{ingredient}"
        for ingredient in ("ema", "cutmix", "cutmix_balanced", "proco", "bcl", "sbcl", "sam", "max_norm")
        for name in ("logit_adjusted_natural", "mfm", "ce")
    ]
    assert [one.run.label for one in planned] == [
        f"{name} seed {seed}"
        for names in (first, forms, then, [*mixed, "mfm_glmc"])
        for seed in (0, 1)
        for name in names
    ]
    tuned, published = (planned[i].run.config.method for i in (1, 3))
    assert (tuned.name, tuned.sampling, tuned.tau) == ("logit_adjusted", "square_root_later", 0.75)
    assert (published.name, published.sampling, published.tau) == ("logit_adjusted", "natural", 1.0)
    assert {one.run.config.data.root for one in planned} == {"packed/cifar10.npz"}
    assert {one.run.config.data.protocol for one in planned} == {"meta_held_out"}
    assert {one.run.config.checkpoint.keep for one in planned} == {1}
    assert [one.run.label for one in full.queue(config_lib.default(), tmp_path, ["ce"], [2])] == ["ce seed 2"]
    with pytest.raises(UserError, match="--methods=cee: allowed: mfm, logit_adjusted, ce"):
        full.queue(config_lib.default(), tmp_path, ["cee"], [0])


def test_table_and_archives_of_runs(full, tmp_path, trained_run, monkeypatch):
    """One finished, one cut off after its last epoch, one failed, one that was not begun."""
    monkeypatch.setattr(full, "shell", lambda one: f"train {one.run.label}")
    workdir = tmp_path / "here"
    planned = full.queue(config_lib.default(), workdir, full.NAMES[:4], [0])
    finished, cut, failed, waiting = (one.run.workdir for one in planned)
    line = {"seconds": 20.0, "compile_seconds": 5.04, "step_seconds": 0.0123, "device": "GPU"}
    for folder in (finished, cut):
        shutil.copytree(trained_run.workdir, folder)
        lines = [line | {"bytes": 3e9, "of": "accelerator"}, line | {"bytes": 1e9, "of": "accelerator"}]
        (folder / "processes.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    (cut / "results.json").unlink()
    rows = [full.row_of(one, "no memory" if one.run.workdir == failed else "") for one in planned]
    found = trained_run.results["last"]["test"]
    assert [row["state"] for row in rows] == ["finished", "at epoch 3", "failed: no memory", "not begun"]
    assert [row["balanced_accuracy"] for row in rows] == [round(100 * found["balanced_accuracy"], 2), None, None, None]
    assert rows[0]["rarest_third"] == round(100 * found["rarest_third"], 2)
    assert rows[0]["ece"] == round(100 * found["ece"], 2)
    logged = [json.loads(text) for text in (cut / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["train_loss"] == round([row["loss"] for row in logged if row["kind"] == "train"][-1], 4)
    costs = [rows[1][name] for name in ("step_ms", "compile_seconds", "device_memory_mb", "seconds")]
    assert costs == [12.3, 10.1, 3000, 40]
    text = full.markdown(rows, planned, 2)
    assert "| logit_adjusted | 0 | at epoch 3 | 3 | – | – |" in text
    assert "Data: digits 1, protocol meta_held_out, seed 0" in text
    assert "Devices: GPU; 2 side by side." in text
    for name in ("table.md", "table.csv"):
        (workdir / name).write_text(text)
    full.pack_records(planned, workdir, tmp_path / "kept")
    for folder in (finished, cut, failed, waiting):
        full.pack_checkpoint(folder, tmp_path / "kept")
    assert sorted(os.listdir(tmp_path / "kept")) == ["logit_adjusted-seed0.tar.gz", "results.tar.gz"]
    with tarfile.open(tmp_path / "kept" / "logit_adjusted-seed0.tar.gz") as archive:
        steps = {name.split("/")[3] for name in archive.getnames()}
    assert steps == {str(trained_run.results["last"]["step"])}
    full.unpack(tmp_path / "kept", tmp_path / "there")
    moved = full.queue(config_lib.default(), tmp_path / "there", full.NAMES[:4], [0])
    assert [full.row_of(one) for one in moved[:2]] == rows[:2]
    with pytest.raises(UserError, match="has runs; leave --from out to go on with them"):
        full.unpack(tmp_path / "kept", tmp_path / "there")
    with pytest.raises(UserError, match=r"no results.tar.gz there; give the folder that --pack wrote"):
        full.unpack(tmp_path / "there", tmp_path / "third")


@pytest.mark.slow
def test_it_stops_at_its_time_and_goes_on_elsewhere_with_the_same_bits(full, tmp_path):
    """The archives and the packed set at other paths; against a run that nothing has interrupted."""
    config = config_lib.default()
    config.data.update(source="digits", name="digits", imbalance_factor=20.0)
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        importlib.import_module("subset").pack(data.build(config_lib.resolve(config)), tmp_path / place / "digits.npz")

    def train_queue(place: str, runs: str, *more: str) -> int:
        arguments = [
            *("--config=configs/cifar10_lt.py", f"--data={tmp_path / place / 'digits.npz'}"),
            *(f"--workdir={tmp_path / runs}", "--methods=mfm,ce", "--seeds=0", "--jobs=2"),
            *("--config.data.imbalance_factor=20", "--config.augment.pad=1", "--config.model.name=resnet8"),
            *("--config.model.width=2", "--config.meta.batch_size=20", "--config.train.batch_size=4"),
            *("--config.train.epochs=60", *more),
        ]
        command = [sys.executable, "benchmarks/full.py", *arguments]
        return subprocess.run(command, cwd=REPOSITORY, env=environment(), timeout=1200).returncode

    names = ("mfm", "ce")
    cut = []
    for minutes in (0.6, 1, 2, 4, 8):  # until one has begun, on a machine however slow
        stop = (f"--minutes={minutes}", "--margin=20", f"--pack={tmp_path / 'kept'}")
        assert train_queue("one", "cut", *stop) == 75
        if cut := [name for name in names if (tmp_path / "kept" / f"{name}-seed0.tar.gz").exists()]:
            break
    assert cut
    shutil.move(tmp_path / "kept", tmp_path / "carried")
    shutil.rmtree(tmp_path / "cut")
    shutil.rmtree(tmp_path / "one")
    assert train_queue("two", "moved", f"--from={tmp_path / 'carried'}", f"--pack={tmp_path / 'all'}") == 0
    assert os.listdir(tmp_path / "all") == ["results.tar.gz"]
    assert train_queue("two", "whole") == 0
    for name in names:
        moved, whole = (tmp_path / runs / name / "seed0" for runs in ("moved", "whole"))
        assert (moved / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
        found, expected = (read_object(Workdir(folder).results) for folder in (moved, whole))
        assert found["last"] == expected["last"]
        assert f"| {name} | 0 | finished | 60 |" in (tmp_path / "moved" / "table.md").read_text()
