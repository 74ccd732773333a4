"""The tutorials run from top to bottom as they stand, small, and are kept with what they show."""

import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))


def named(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


@named(TUTORIALS)
def test_a_tutorial_is_kept_with_the_outputs_of_a_whole_run(path):
    cells = nbformat.read(path, as_version=4).cells
    assert 8 <= len(cells) <= 16
    codes = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in codes] == [*range(1, len(codes) + 1)]
    outputs = [output for cell in codes for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    text = json.dumps(outputs)
    assert not re.search(r"/(home|root|work|tmp|var)/", text), "no path of a machine"
    assert "\\u001b" not in text, "no colours of a terminal"
    assert max(len(json.dumps(output)) for output in outputs) < 100_000
    assert "There is no CIFAR-10" not in text


@pytest.mark.slow
@named(TUTORIALS)
def test_a_tutorial_runs(path, tmp_path, monkeypatch):
    notebook = run(path, tmp_path, monkeypatch)
    if folder := os.environ.get("MFM_JAX_TUTORIALS"):  # docs/site.md
        nbformat.write(notebook, ROOT / folder / path.name)


@pytest.mark.slow
@named([path for path in TUTORIALS if path.stem in ("cifar_lt", "transfer")])
def test_a_tutorial_runs_on_digits_where_there_is_no_cifar(path, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    outputs = [output for cell in run(path, tmp_path, monkeypatch).cells for output in cell.get("outputs", [])]
    assert "There is no CIFAR-10 in TFDS_DATA_DIR" in outputs[0].text


def run(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> nbformat.NotebookNode:
    """Runs a notebook in `folder`, up to the first cell that fails, and returns it with its outputs."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("XLA_FLAGS")  # the eight devices of the tests
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(folder)}}, record_timing=False, coalesce_streams=True).execute()
    return notebook
