"""The notebook runs from top to bottom on a CPU, with a tiny config; what is Colab's own is left out there."""

import json
import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]
TINY = {
    "data.imbalance_factor": 10.0,
    "data.val_images_per_class": 5,
    "model.width": 4,
    "train.epochs": 2,
    "train.batch_size": 64,
    "meta.batch_size": 20,
}


def test_the_notebook_trains_compares_predicts_and_goes_on(tmp_path, monkeypatch):
    Image.effect_noise((50, 40), 80).save(tmp_path / "picture.png")
    settings = {"overrides": TINY, "folder": str(tmp_path / "runs"), "picture": str(tmp_path / "picture.png")}
    monkeypatch.setenv("MFM_NOTEBOOK", json.dumps(settings))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", re.sub(r"device_count=\d+", "device_count=1", os.environ["XLA_FLAGS"]))
    notebook = nbformat.read(ROOT / "launch/colab_tpu.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is kept without outputs"
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(ROOT)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output["text"] for output in shown if output.output_type == "stream")
    drawn = [output.data.get("text/html", "").count("<svg") for output in shown if "data" in output]
    assert sum(drawn) == 2, "the curves of MFM and of CE"
    test = {name: json.loads((tmp_path / "runs" / name / "results.json").read_text()) for name in ("mfm", "ce")}
    for name, results in test.items():
        assert f"{name:8} {100 * results['last']['test']['balanced_accuracy']:18.1f}" in printed
    assert len(re.findall(r"^ *\d+\.\d %  \w+$", printed, re.MULTILINE)) == 5, (
        "the five likeliest classes of the picture"
    )
    assert any("image/png" in output.get("data", {}) for output in shown), "the picture"
    assert f"kept in {tmp_path / 'runs'}" in printed
