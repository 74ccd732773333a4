"""The tutorials run from top to bottom as they stand, and are kept with what they show."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = {path.stem: path for path in sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))}
OF_CIFAR = ("cifar_lt", "transfer")
CIFAR = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser() / "cifar10"
MISSING = [name for name in ("nbclient", "ipykernel") if not importlib.util.find_spec(name)]


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_is_in_the_menu_and_is_kept_with_the_outputs_of_a_whole_run(name):
    assert f"tutorials/{name}.md\n" in (ROOT / "mkdocs.yml").read_text()
    cells = json.loads(TUTORIALS[name].read_text(encoding="utf-8"))["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in codes] == [*range(1, len(codes) + 1)]
    outputs = [output for cell in codes for output in cell["outputs"]]
    assert outputs
    assert "error" not in {output["output_type"] for output in outputs}
    text = json.dumps(outputs)
    assert not re.search(r"/(home|root|work|tmp|var)/", text), "no path of a machine"
    assert "\\u001b" not in text, "no colours of a terminal"
    assert len(text) < 200_000


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"needs the extra 'test': no {', '.join(MISSING)}")
@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_runs(name, tmp_path, monkeypatch):
    """With MFM_JAX_TUTORIALS, keeps what it shows (docs/site.md)."""
    import nbformat
    from nbclient import NotebookClient

    if name in OF_CIFAR and not CIFAR.is_dir():
        pytest.skip("TFDS_DATA_DIR holds no prepared cifar10")
    command = tmp_path / "bin" / "mfm-jax"  # of this checkout, whatever is installed
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mfm_jax "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("XLA_FLAGS", re.sub(r"device_count=\d+", "device_count=1", os.environ["XLA_FLAGS"]))
    notebook = nbformat.read(TUTORIALS[name], as_version=4)
    folder = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=500, resources=folder, record_timing=False, coalesce_streams=True).execute()
    if "MFM_JAX_TUTORIALS" in os.environ:
        nbformat.write(notebook, TUTORIALS[name])
