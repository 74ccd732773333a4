"""A run's folder: files are whole or absent, and what is wrong with one is said in a line with the way out."""

import json

import pytest

from mfm_jax import config as config_lib
from mfm_jax.data import manifest as manifests
from mfm_jax.errors import UserError
from mfm_jax.machine import disk
from mfm_jax.workdir.files import Workdir, read_object, read_objects

CONFIG = config_lib.resolve(config_lib.default())
AGAIN = "remove {}results.json beside it and run the training command again, which writes both"


@pytest.fixture
def workdir(tmp_path):
    return Workdir(tmp_path)


@pytest.mark.parametrize("content", ["words", b"\xff\0"])
def test_a_write_that_fails_leaves_the_old_file(content, tmp_path, monkeypatch):
    path = tmp_path / "file"
    disk.write(path, content)
    written = path.read_bytes()
    assert written == (content.encode() if isinstance(content, str) else content)
    with pytest.raises(TypeError):
        disk.write_object(path, {"a": {1, 2}})
    monkeypatch.setattr(type(path), "replace", None)
    with pytest.raises(TypeError):
        disk.write(path, "new")
    assert path.read_bytes() == written


def test_a_table_is_written_with_empty_cells_and_names_that_are_no_text(tmp_path):
    disk.write_rows(tmp_path / "table.csv", [("a", "b"), ("x,\udcff", None)])
    assert (tmp_path / "table.csv").read_bytes() == b'a,b\r\n"x,\xff",\r\n'


@pytest.mark.parametrize(
    ("name", "missing", "damaged"),
    [
        ("config", "no run there has finished; run the training command again", "choose a new --workdir"),
        ("facts", AGAIN.format(""), AGAIN.format("it and ")),
        ("metrics", AGAIN.format(""), AGAIN.format("it and ")),
        ("results", "no run there has finished; run the training command again", "remove it, and it is written again"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_the_way_out(name, missing, damaged, workdir):
    path = getattr(workdir, name)
    with pytest.raises(UserError) as error:
        read_object(path)
    assert str(error.value) == f"{path}: no such file; {missing}"
    for content in (b"", b"{", b"[1]", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            read_object(path)
        assert str(error.value) == f"{path}: damaged, not a JSON object; {damaged}"
    path.write_text('{"a": 1}')
    assert read_object(path, "a") == {"a": 1}
    with pytest.raises(UserError) as error:
        read_object(path, "a", "b")
    assert str(error.value) == f"{path}: damaged, no field 'b'; {damaged}"
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_object(path)


def test_lines_are_read_up_to_the_first_that_is_damaged(workdir):
    workdir.metrics.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert read_objects(workdir.metrics) == [{"a": 1}, {"a": 2}]
    workdir.metrics.write_text('{"a": 1}\n{"a":')
    with pytest.raises(UserError, match=r"metrics\.jsonl: damaged, not a JSON object"):
        read_objects(workdir.metrics)


def test_a_folder_belongs_to_the_config_that_began_there(tmp_path):
    workdir = Workdir(tmp_path / "runs" / "one")
    manifest = manifests.make_manifest(
        dataset="toy", version="1", class_names=("even", "odd"), settings={"seed": 0}, splits={}, overlaps={}
    )
    workdir.claim(CONFIG)
    workdir.check_no_run()
    workdir.check_split({"hash": "another"})
    assert list(workdir.path.iterdir()) == []
    workdir.facts.write_text("of a start that failed")
    workdir.begin(CONFIG, manifest, {"a": 1})
    assert read_object(workdir.facts) == {"a": 1}
    workdir.begin(CONFIG, {}, {})
    assert read_object(workdir.facts) == {"a": 1}
    assert workdir.read_config() == CONFIG
    assert manifests.read_manifest(workdir.manifest) == manifest
    workdir.facts.unlink()  # as after an older version
    workdir.begin(CONFIG, {}, {"a": 2})
    assert read_object(workdir.facts) == {"a": 2}
    workdir.claim(CONFIG)
    workdir.check_split(manifest | {"dataset": "another name"})
    other = config_lib.default()
    other.train.seed = 1
    with pytest.raises(UserError, match=r"belongs to another config \(train.seed: 0 -> 1\); choose a new one"):
        workdir.claim(config_lib.resolve(other))
    with pytest.raises(UserError, match=r"manifest.json: the data or its split is not what this run began with"):
        workdir.check_split(manifest | {"seed": 1})
    with pytest.raises(UserError, match=r"--out=.*: holds a run"):
        workdir.check_no_run()
    with pytest.raises(UserError, match=r"--workdir=.*: cannot be made: Not a directory"):
        Workdir(workdir.config / "x").claim(CONFIG)


def test_progress_is_that_of_the_lines_that_are_whole(workdir):
    assert workdir.progress() == (0, None)
    rows = [{"kind": "train", "epoch": 0}, {"kind": "val", "epoch": 0, "balanced_accuracy": 0.5}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    workdir.metrics.write_text(text + '{"kind": "train", "epoch": 1')
    assert workdir.progress() == (1, 0.5)


def test_what_was_not_measured_is_none(workdir):
    assert workdir.read_processes() == []
    assert workdir.read_peak_memory() is None
    workdir.processes.write_text('{"seconds": 1}\n{"seconds": 2}\n')
    disk.write_object(workdir.peak_memory, {"bytes": 7})
    assert [line["seconds"] for line in workdir.read_processes()] == [1, 2]
    assert workdir.read_peak_memory() == 7
