"""Metric rows on disk, in TensorBoard, and after a resume."""

import struct
from pathlib import Path

import pytest
from helpers import logged
from tensorboardX.proto import event_pb2

from mfm_jax.workdir.logs import MetricLog


def events(workdir: Path) -> list[event_pb2.Event]:
    """Reads all TensorBoard records: a length, its checksum, the message, its checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(event_pb2.Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def scalars(workdir: Path) -> list[tuple[str, int, float]]:
    return [(value.tag, event.step, value.simple_value) for event in events(workdir) for value in event.summary.value]


@pytest.fixture
def log(tmp_path):
    log = MetricLog(tmp_path, [])
    yield log
    log.close()


def test_rows_are_kept_and_written_as_they_come(log, tmp_path):
    log.write("train", 5, 0, {"loss": 1.5})
    log.write("modulation", 5, 0, {"sites": {"logits": {"gamma": [0.1]}}})
    expected = [
        {"kind": "train", "step": 5, "epoch": 0, "loss": 1.5},
        {"kind": "modulation", "step": 5, "epoch": 0, "sites": {"logits": {"gamma": [0.1]}}},
    ]
    assert log.rows == expected
    assert logged(tmp_path) == expected  # before the log is closed: a killed run leaves what it has seen


def test_equal_runs_write_equal_files(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        log = MetricLog(tmp_path / name, [])
        log.write("train", 1, 0, {"loss": 0.1 + 0.2})
        log.close()
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()
    assert logged(tmp_path / "a")[0]["loss"] == 0.1 + 0.2  # to the last bit


def test_scalars_go_to_tensorboard_by_kind_and_name(tmp_path):
    log = MetricLog(tmp_path, [])
    log.write("train", 5, 0, {"loss": 1.5, "note": "text", "list": [1.0], "missing": None})
    log.write("val", 10, 1, {"accuracy": 0.25})
    log.close()
    assert scalars(tmp_path) == [("train/loss", 5, 1.5), ("val/accuracy", 10, 0.25)]


def test_a_resumed_log_starts_from_the_rows_of_its_checkpoint(tmp_path):
    first = MetricLog(tmp_path, [])
    first.write("train", 5, 0, {"loss": 3.0})
    checkpointed = list(first.rows)
    first.write("train", 10, 1, {"loss": 2.0})  # lost: after the last checkpoint
    first.close()
    resumed = MetricLog(tmp_path, checkpointed)
    assert logged(tmp_path) == checkpointed
    resumed.write("train", 10, 1, {"loss": 2.5})
    resumed.close()
    assert [row["loss"] for row in logged(tmp_path)] == [row["loss"] for row in resumed.rows] == [3.0, 2.5]
    assert len(checkpointed) == 1  # the checkpoint's list is not the log's own


def test_tensorboard_is_told_to_forget_what_was_lost(tmp_path):
    MetricLog(tmp_path, []).close()
    assert not (tmp_path / "tensorboard").exists()  # nor is there anything to forget
    MetricLog(tmp_path, [{"kind": "train", "step": 5, "epoch": 0, "loss": 3.0}]).close()
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts == [6]
