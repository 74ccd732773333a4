"""The exported classifier, in a process that has no mfm_jax, gives the checkpoint's probabilities; its card is true."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import png, slow
from PIL import Image

from mfm_jax import config as config_lib
from mfm_jax import export, models, predict
from mfm_jax.data import digits
from mfm_jax.errors import UserError
from mfm_jax.evaluation import classifier
from mfm_jax.pages import card

SIZES = (1, 7, 64)


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.fixture(scope="module")
def folder(trained_run, tmp_path_factory):
    """The exported best checkpoint."""
    out = tmp_path_factory.mktemp("export") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "load", None)  # the data set is not there any more
        export.export(trained_run.workdir, out, "best", made_by="the command")
    return out


def alone(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Runs Python in a folder, without this package, and returns its status and what it printed."""
    hidden = "import sys; sys.modules['mfm_jax'] = None; sys.argv = sys.argv[1:];"
    runs = "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", hidden + runs, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"XLA_FLAGS": ""},
        errors="surrogateescape",
    )


def test_a_process_without_the_package_gets_the_same_probabilities(trained_run, folder, tmp_path):
    rng = np.random.default_rng(1)
    images = {f"b{size}": rng.integers(0, 256, (size, 8, 8, 1), np.uint8) for size in SIZES}
    np.savez(tmp_path / "images.npz", **images)
    (tmp_path / "use.py").write_text(
        "import sys\nimport jax.export\nimport numpy as np\n"
        "content = bytearray(open(sys.argv[1], 'rb').read())\n"
        "call = jax.export.deserialize(content).call\n"
        "given = np.load('images.npz')\n"
        "np.savez('found.npz', **{name: call(given[name]) for name in given})\n"
    )
    done = alone(tmp_path, "use.py", folder / "classifier.bin")
    assert done.returncode == 0, done.stderr
    found, loaded = np.load(tmp_path / "found.npz"), classifier.load(trained_run.workdir, "best")
    for name, given in images.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], loaded.probabilities(given), atol=1e-5, rtol=0)


def test_the_artifact_is_for_every_platform_and_any_batch(trained_run):
    program = export.exported(classifier.load(trained_run.workdir))
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert str(program.in_avals[0]) == "uint8[b,8,8,1]"
    assert str(program.out_avals[0]) == "float32[b,10]"


NAMES = config_lib.FIELDS["model.name"].choices
QUICK = ("resnet8", "resnet10", "vit_b16")


@pytest.mark.parametrize("name", [n if n in QUICK else slow(n) for n in NAMES])
def test_every_model_is_lowered_for_every_platform_and_any_batch(name):
    """With parameters that have a shape and no values."""
    module = models.create(name, 5, 0)
    side = 28 if name.endswith("b14") else 32
    image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), image)
    many = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"b, {side}, {side}, 3"), np.float32)
    program = jax.export.export(jax.jit(module.apply), platforms=export.PLATFORMS)(variables, many)
    assert str(program.out_avals[0]) == "float32[b,5]"


def kinds(folder: Path) -> dict[Path, str]:
    """Writes a picture of every kind, and what is none; returns for each why it cannot be read, "" where it can."""
    rng = np.random.default_rng(2)
    color = Image.fromarray(rng.integers(0, 256, (9, 40, 3), np.uint8))
    grey = Image.fromarray(rng.integers(0, 256, (30, 17), np.uint8))
    clear = Image.fromarray(rng.integers(0, 256, (12, 12, 4), np.uint8))
    deep = Image.fromarray(rng.integers(0, 4096, (9, 7), np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6
    saved = {
        "grey.png": (grey, {"exif": turned}),
        "color.png": (color, {"exif": turned}),
        "small.png": (grey.crop((0, 0, 6, 5)), {}),
        "large.jpg": (color.resize((400, 300)), {}),  # decoded coarser
        "turned.jpg": (color.resize((40, 28)), {"exif": turned}),
        "palette.png": (color.quantize(16), {"transparency": 3}),
        "la.png": (clear.convert("LA"), {}),
        "rgba.png": (clear, {}),
        "rgba.webp": (clear, {"lossless": True}),
        "cmyk.jpg": (color.convert("CMYK"), {}),
        "one.png": (grey.convert("1"), {}),
        "deep.png": (deep, {}),
        "deep.tif": (deep, {}),
        "moving.gif": (color, {"save_all": True, "append_images": [color.rotate(90)]}),
    }
    for name, (picture, options) in saved.items():
        picture.save(folder / name, **options)
    (folder / "rgb16.png").write_bytes(png([rng.integers(0, 4096, 24).astype(">u2").tobytes()], 8, 16, 2))
    (folder / "la16.png").write_bytes(png([rng.integers(0, 4096, 16).astype(">u2").tobytes()], 8, 16, 4))
    (folder / "\udcff.png").write_bytes((folder / "la.png").read_bytes())  # a name that is not UTF-8
    bad = {
        "cut.png": ((folder / "color.png").read_bytes()[:500], "damaged: "),
        "text.png": (b"no picture", "not an image"),
        "empty.jpg": (b"", "empty"),
        "short.png": (png([b""], 20_000, 8, 2), "damaged: "),
        "huge.ppm": (b"P6 20000 19000 255\n", "has more than 100 million pixels"),
    }
    for name, (content, _) in bad.items():
        (folder / name).write_bytes(content)
    reasons = {path: bad.get(path.name, ("", ""))[1] for path in sorted(folder.iterdir())}
    return reasons | {folder: "not a file", folder / "absent.png": "cannot be read: No such file"}


@pytest.mark.parametrize("fit", [slow("squeeze"), slow("crop"), "pad"])
def test_the_script_decodes_and_predicts_as_the_package_does(fit, trained_run, folder, tmp_path):
    """Picture by picture; what cannot be read has a line, and does not keep the others from being read."""
    out, given = tmp_path / "out", tmp_path / "given"
    shutil.copytree(folder, out)
    given.mkdir()
    facts = json.loads((folder / "classifier.json").read_text()) | {"fit": fit, "white": 4095}
    (out / "classifier.json").write_text(json.dumps(facts))
    loaded, reasons = classifier.load(trained_run.workdir, "best"), kinds(given)
    loaded = loaded._replace(facts=dataclasses.replace(loaded.facts, fit=fit, white=4095))
    done = alone(out, out / "how_to_use.py", *sorted(reasons, key=lambda path: not reasons[path]))
    assert done.returncode == 1, done.stderr
    told = dict(line.split(": ", 1) for line in done.stderr.splitlines())
    assert told.keys() == {str(path) for path, reason in reasons.items() if reason}
    printed = re.findall(r"^(.*)  +([\d.]+) %  (\d)$", done.stdout, re.MULTILINE)
    assert len(printed) == 5 * sum(not reason for reason in reasons.values())
    for batch, rows in predict.predicted(loaded, reasons, 32, 0):
        for item, row in zip(batch, rows, strict=True):
            assert told.get(str(item.path), "") == item.problem
            assert item.problem.startswith(reasons[item.path])
            for percent, name in [(p, n) for path, p, n in printed if path.strip() == str(item.path)]:
                assert float(percent) == pytest.approx(100 * row[int(name)], abs=0.051)


def test_the_facts_name_the_checkpoint_and_its_temperature(trained_run, folder):
    facts, best = json.loads((folder / "classifier.json").read_text()), trained_run.results["best"]
    assert facts["class_names"] == list("0123456789")
    assert (facts["which"], facts["step"]) == ("best", best["step"])
    assert facts["temperature"] == best["calibration"]["temperature"]


def test_onnx_gives_the_same_numbers(trained_run, tmp_path):
    pytest.importorskip("jax2onnx")
    runtime = pytest.importorskip("onnxruntime")
    export.export(trained_run.workdir, tmp_path, onnx=True)
    session, loaded = runtime.InferenceSession(tmp_path / "classifier.onnx"), classifier.load(trained_run.workdir)
    for size in SIZES:
        images = np.random.default_rng(size).integers(0, 256, (size, 8, 8, 1), np.uint8)
        found = session.run(None, {session.get_inputs()[0].name: images})[0]
        np.testing.assert_allclose(found, loaded.probabilities(images), atol=1e-5, rtol=0)


def test_an_artifact_that_differs_is_not_kept(trained_run):
    loaded = classifier.load(trained_run.workdir)
    other = loaded._replace(probabilities=lambda images: loaded.probabilities(images)[:, ::-1])
    with pytest.raises(RuntimeError, match=r"classifier.bin: its probabilities differ from the checkpoint's by"):
        export._serialized(other)


# --- the card -------------------------------------------------------------------------------------


def table(page: str, first: str) -> dict[str, list[str]]:
    """Returns the rows of the table whose header begins with the cell `first`, by their first cells."""
    lines = page[page.index(f"| {first} |") :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: rest for name, *rest in cells}


def test_the_card_has_the_numbers_of_the_checkpoint(trained_run, folder):
    page, best = (folder / "MODEL_CARD.md").read_text(), trained_run.results["best"]
    manifest = json.loads((trained_run.workdir / "manifest.json").read_text())
    assert manifest["hash"] in page
    counts, accuracy = manifest["splits"]["train"]["class_counts"], best["test"]["per_class_accuracy"]
    classes = table(page, "class")
    assert len(classes) == 10
    for k, (group, trained, images, percent) in classes.items():
        assert (int(trained), int(images), percent) == (counts[int(k)], 50, f"{100 * accuracy[int(k)]:.2f}")
        assert group == ("many" if counts[int(k)] > 100 else "medium" if counts[int(k)] >= 20 else "few")
    low = [str(k) for k in range(10) if accuracy[k] < 0.5]
    assert f"below 50 % on the test split: {', '.join(low)}." in page
    few = [str(k) for k in range(10) if counts[k] < 20]
    assert f"Classes with fewer than 20 training images: {', '.join(few)}." in page
    after = table(page, "split | as it is")["test"]
    assert after == [f"{100 * best['test']['ece']:.2f}", f"{100 * best['calibration']['ece']['test']:.2f}"]
    assert f"{best['calibration']['temperature']:.3f}" in page
    assert 'method.name: "mfm" -> "crt"' in page
    assert page.endswith("    the command\n")
    assert "{" not in page.replace("{{", "")


def test_strange_names_stay_in_their_cells():
    assert card.cell("a|b\n<b> *x*") == "a\\|b &lt;b&gt; \\*x\\*"


def test_a_card_without_validation_and_without_rare_classes(trained_run, tmp_path):
    """From the same run's files, with what such a run would not have taken out."""
    for name in ("config.json", "metrics.jsonl", "manifest.json"):
        (tmp_path / name).write_bytes((trained_run.workdir / name).read_bytes())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["splits"]["train"]["class_counts"] = [200] * 10
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    results = json.loads((trained_run.workdir / "results.json").read_text())
    results["best"] = None
    results["last"] |= {"val": None, "calibration": None}
    results["last"]["test"]["per_class_accuracy"] = [0.5] * 9 + [None]
    (tmp_path / "results.json").write_text(json.dumps(results))
    card.write_card(tmp_path, tmp_path / "card.md", "last", "it", {"file": 1000})
    page = (tmp_path / "card.md").read_text()
    for told in (
        "No temperature was fitted: the run had no validation split, or recorded none.",
        "Every class had 20 training images or more.",
        "No class has an accuracy below 50 % on the test split.",
        "Classes of which the test split has no image: 9.",
        "| `file` | 1,000 |",
    ):
        assert told in page
    assert "validation |" not in page
    with pytest.raises(UserError, match="no results of its best checkpoint"):
        card.write_card(tmp_path, tmp_path / "card.md", "best", "it", {})


def test_a_run_is_not_overwritten(trained_run):
    with pytest.raises(UserError, match=r"--out=.*: holds a run; choose another folder"):
        export.export(trained_run.workdir, trained_run.workdir)


def test_a_run_that_has_not_finished_is_not_exported(trained_run, tmp_path):
    for name in ("config.json", "classifier.json", "manifest.json"):
        (tmp_path / name).write_bytes((trained_run.workdir / name).read_bytes())
    (tmp_path / "checkpoints").symlink_to(trained_run.workdir / "checkpoints")
    with pytest.raises(UserError, match=r"results.json: no such file"):
        export.export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
