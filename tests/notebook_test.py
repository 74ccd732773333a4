"""The notebook runs from top to bottom on a CPU, with a tiny config; what is Colab's own is left out there."""

import json
import re

import nbformat
import pytest
from helpers import REPOSITORY
from nbclient import NotebookClient
from PIL import Image

TINY = {
    "data.imbalance_factor": 10.0,
    "data.val_images_per_class": 5,
    "model.name": "own_parts:Tiny",
    "train.epochs": 2,
    "train.batch_size": 64,
    "meta.batch_size": 20,
}


def outputs(folder):
    """Returns what the notebook shows when all of its cells are run in `folder`."""
    notebook = nbformat.read(REPOSITORY / "launch/colab_tpu.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        cell |= {"outputs": []} if cell.cell_type == "code" else {}
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(folder)}}).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_the_notebook_is_kept_with_its_outputs():
    cells = nbformat.read(REPOSITORY / "launch/colab_tpu.ipynb", as_version=4).cells
    text = json.dumps([cell["outputs"] for cell in cells if cell.cell_type == "code"])
    assert text.count("<svg") == 2
    assert "image/png" in text
    assert not re.search(r"/(home|root|work|tmp|var)/", text), "no path of a machine"
    assert len(text) < 300_000


@pytest.mark.slow
def test_the_notebook_trains_on_pictures(tmp_path, monkeypatch, processes):
    """A folder with a folder for each class, as on a Drive; a test split is held out."""
    for name, color in (("ant", "red"), ("bee", "green"), ("cat", "blue")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(20):
            picture = Image.blend(
                Image.effect_noise((12, 12), 90 + i).convert("RGB"), Image.new("RGB", (12, 12), color), 0.5
            )
            picture.save(tmp_path / "pictures" / name / f"{i}.png")
    tiny = {"data.image_size": 8, "model.name": "resnet8", "model.width": 2, "train.epochs": 1}
    settings = {"config": "configs/folder_lt.py", "overrides": tiny, "pictures": str(tmp_path / "pictures")}
    settings["folder"] = str(tmp_path / "runs")
    monkeypatch.setenv("MFM_NOTEBOOK", json.dumps(settings))
    printed = "".join(output.get("text", "") for output in outputs(REPOSITORY))
    assert re.search(r"^mfm +\d", printed, re.MULTILINE)


def test_the_notebook_trains_compares_predicts_and_goes_on(tmp_path, monkeypatch, processes):
    Image.effect_noise((50, 40), 80).save(tmp_path / "picture.png")
    settings = {"overrides": TINY, "folder": str(tmp_path / "runs"), "picture": str(tmp_path / "picture.png")}
    monkeypatch.setenv("MFM_NOTEBOOK", json.dumps(settings))
    shown = outputs(REPOSITORY / "launch")
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
