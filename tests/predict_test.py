"""A trained run is used without its data: the probabilities of training, and a table of the reader's pictures."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from absl import logging
from helpers import REPOSITORY, changed
from PIL import Image

from mfm_jax import command, predict
from mfm_jax import data as data_lib
from mfm_jax.data import decode, digits, walk
from mfm_jax.errors import UserError
from mfm_jax.evaluation import facts as facts_lib
from mfm_jax.evaluation import metrics
from mfm_jax.methods.table import BUILT_IN
from mfm_jax.training import train

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def test_split(trained_run):
    data = data_lib.build(trained_run.config)
    return data.test_images, data.test_labels


# --- the classifier -------------------------------------------------------------------------------


def check_same(workdir: Path, which: str, recorded: dict, split) -> None:
    """Checks that the loaded classifier's probabilities give the evaluation that training recorded."""
    images, labels = split
    loaded = predict.load(workdir, which)
    counts = np.asarray(loaded.facts.train_class_counts)
    found = metrics.evaluate(loaded.probabilities(images), labels, counts)
    assert loaded.step == recorded["step"]
    assert found["confusion"] == recorded["test"]["confusion"]
    for name in ("nll", "ece", "roc_auc"):
        assert found[name] == pytest.approx(recorded["test"][name], abs=1e-5), name


@pytest.fixture
def without_data(monkeypatch):
    """No source of images is there any more."""

    def refuse(config):
        raise AssertionError("the data set was read")

    monkeypatch.setattr(digits, "load", refuse)


@pytest.mark.parametrize("which", ["last", "best"])
def test_predicts_as_training_tested_without_the_data(which, trained_run, test_split, without_data):
    check_same(trained_run.workdir, which, trained_run.results[which], test_split)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT_IN)
def test_predicts_as_every_method_is_tested(name, trained_run, test_split, tmp_path):
    """With a residual network; `methods_test` has every method with a smaller one."""
    config = changed(trained_run.config, method={"name": name}, meta={"lagged": name != "l2rw"})
    results = train.train_and_evaluate(config, tmp_path)
    check_same(tmp_path, "last", results["last"], test_split)


def test_calibration_is_by_the_temperature_that_validation_chose(trained_run, test_split):
    """Against the definition, from the loaded classifier's probabilities."""
    data = data_lib.build(trained_run.config)
    for which in ("last", "best"):
        loaded, told = predict.load(trained_run.workdir, which), trained_run.results[which]["calibration"]
        on_validation = loaded.probabilities(data.val_images)
        assert told["temperature"] == pytest.approx(metrics.fit_temperature(on_validation, data.val_labels), rel=1e-3)
        for split, images, labels in (("val", data.val_images, data.val_labels), ("test", *test_split)):
            powers = loaded.probabilities(images).astype(np.float64) ** (1 / told["temperature"])
            scaled = powers / powers.sum(1, keepdims=True)
            found = metrics.evaluate(scaled, labels, np.ones(10, int))
            assert told["ece"][split] == pytest.approx(found["ece"], abs=5e-3)


def test_facts_are_those_of_the_data(trained_run):
    data = data_lib.build(trained_run.config)
    facts = predict.load(trained_run.workdir).facts
    assert facts == facts_lib.describe(trained_run.config, data)
    assert (facts.image_shape, facts.fit, facts.class_names) == ((8, 8, 1), "squeeze", tuple("0123456789"))
    assert facts.train_class_counts == tuple(data.counts)
    np.testing.assert_array_equal(np.float32(facts.mean), data.mean)


def test_a_run_from_before_gets_its_facts_when_it_goes_on(trained_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained_run.workdir, workdir)
    for name in ("classifier.json", "results.json"):
        (workdir / name).unlink()
    with pytest.raises(UserError, match=r"classifier.json: no such file; remove results.json beside it and run the"):
        predict.load(workdir)
    train.train_and_evaluate(trained_run.config, workdir)
    assert (workdir / "classifier.json").read_bytes() == (trained_run.workdir / "classifier.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", "{", "config.json: damaged, not a JSON object; choose a new --workdir"),
        ("config.json", '{"optim": {"lr": 1}}', "damaged, or of another version of mfm_jax: optim.lr: no such field"),
        ("classifier.json", "\0", "damaged, not a JSON object; remove it and results.json beside it and run"),
        ("classifier.json", '{"class_names": []}', "classifier.json: damaged, no field 'image_shape'; remove it"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(name, content, says, trained_run, tmp_path):
    for file in ("config.json", "classifier.json"):
        shutil.copy(trained_run.workdir / file, tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as refused:
        predict.load(tmp_path)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run there"):
        predict.load(tmp_path)


@pytest.mark.slow
def test_a_run_without_validation_has_no_best(trained_run, tmp_path):
    config = changed(trained_run.config, data={"val_images_per_class": 0}, train={"max_steps": 1})
    train.train_and_evaluate(config, tmp_path)
    with pytest.raises(UserError, match="the run had no validation split"):
        predict.load(tmp_path, "best")


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, test_split):
    """Forty digits in folders two deep, one of each kind of mistake, and files that are no pictures."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "b" / "deep").mkdir(parents=True)
    for i, pixels in enumerate(test_split[0][:40]):
        Image.fromarray(pixels.squeeze()).save(root / ("b/deep" if i % 2 else "b") / f"{i:02}.png")
    (root / "a.jpg").write_bytes(b"nothing")
    (root / "empty.PNG").touch()
    (root / "notes.txt").write_text("not listed")
    (root / "._a.jpg").write_text("not listed: what some systems leave beside a picture")
    return root


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_table_holds_every_file_in_order(workers, trained_run, folder, test_split, tmp_path):
    loaded, out = predict.load(trained_run.workdir), tmp_path / "out.csv"
    counts = predict.write_csv(
        loaded, [folder / "b" / "00.png", folder], out, top=3, all_classes=True, batch_size=16, workers=workers
    )
    assert counts == (41, 2, {"hidden": 1, walk.NOT_A_PICTURE: 1})
    table = rows(out)
    even, odd = [[folder / place / f"{i:02}.png" for i in range(k, 40, 2)] for k, place in ((0, "b"), (1, "b/deep"))]
    wanted = [even[0], folder / "a.jpg", folder / "empty.PNG", *even, *odd]
    assert [row["path"] for row in table] == [str(path) for path in wanted]
    problems = {Path(row["path"]).name: row for row in table if row["problem"]}
    assert problems.keys() == {"a.jpg", "empty.PNG"}
    assert problems["a.jpg"]["problem"].startswith("not an image")
    assert problems["empty.PNG"]["problem"] == "empty"
    assert set("".join(value for key, value in problems["a.jpg"].items() if key not in ("path", "problem"))) == set()
    probabilities = loaded.probabilities(test_split[0][:40])
    for row in table[3:]:
        known = probabilities[int(Path(row["path"]).stem)]
        ranked = np.argsort(-known)[:3]
        assert [row["class"], row["class_2"], row["class_3"]] == [str(k) for k in ranked]
        told = [row["probability"], row["probability_2"], row["probability_3"]]
        np.testing.assert_allclose(np.float64(told), known[ranked], rtol=1e-4)
        np.testing.assert_allclose([float(row[f"probability of {k}"]) for k in range(10)], known, rtol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_a_row_is_as_computed_by_hand():
    item = decode.Decoded(Path("x.png"), np.zeros((1, 1, 1), np.uint8))
    form = predict.Form(["a", "b", "c"], 2, None, False)
    assert form.row(item, np.float32([0.125, 0.625, 0.25])) == [Path("x.png"), "b", "0.625", "", "c", "0.25"]
    assert form.header() == [*("path", "class", "probability", "problem"), *("class_2", "probability_2")]


def test_what_is_decoded_waits_in_a_short_queue(folder):
    """However many files there are: the reader takes one and the processes stop a few batches later."""
    listed = []

    def paths():
        for _ in range(10_000):
            listed.append(None)
            yield folder / "b" / "00.png"

    stream = decode.decoded(paths(), 8, 1, "squeeze", 65535, workers=1)
    assert next(stream).image.shape == (8, 8, 1)
    time.sleep(0.2)
    assert len(listed) <= 4 * 16
    stream.close()


def test_mistakes_in_the_places(trained_run, folder, tmp_path):
    loaded = predict.load(trained_run.workdir)
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        predict.write_csv(loaded, [folder, tmp_path / "nowhere"], tmp_path / "out.csv")
    (tmp_path / "void" / ".hidden").mkdir(parents=True)
    with pytest.raises(UserError, match="void: no pictures there; passed over: 1 hidden"):
        predict.write_csv(loaded, [tmp_path / "void"], tmp_path / "out.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["void"]
    with pytest.raises(UserError, match=r"--out=.*: a folder; name a file"):
        predict.write_csv(loaded, [folder], tmp_path)


def test_a_folder_that_cannot_be_read_is_told(folder, monkeypatch):
    def scandir(place):
        if os.fspath(place).endswith("b"):
            raise PermissionError(13, "Permission denied", place)
        return scan(place)

    scan = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="b: cannot be read: Permission denied"):
        list(walk.given([folder], Counter()))


# --- the command ----------------------------------------------------------------------------------


def started(*arguments: object, options: tuple[str, ...] = ()) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *options, "-m", "mfm_jax.predict", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )


def imported(log: str, module: str) -> int:
    """Returns in how many processes a module was imported; they inherit the option that tells."""
    return sum(line.startswith("import time:") and line.split("|")[-1].strip() == module for line in log.splitlines())


def test_the_command_tells_what_it_could_not_read_and_its_workers_know_no_jax(trained_run, folder, tmp_path):
    out = tmp_path / "out.csv"
    process = started(
        f"--checkpoint={trained_run.workdir}",
        folder,
        f"--out={out}",
        "--which=best",
        "--top=1",
        options=("-X", "importtime"),
    )
    printed, log = process.communicate()
    assert process.returncode == 1
    assert printed.splitlines()[-1] == f"{out}: 40 pictures; 2 could not be read (column `problem`)"
    assert "passed over: 1 hidden, 1 not a picture by its name" in log.splitlines()
    assert rows(out)[2].keys() == {"path", "class", "probability", "problem"}
    assert (imported(log, "jax"), imported(log, "mfm_jax.data.pictures")) == (1, 3)


@pytest.mark.slow
def test_an_interrupted_command_leaves_its_rows(trained_run, folder, tmp_path):
    out = tmp_path / "out.csv"
    many = [folder / "b"] * 5_000
    process = started(f"--checkpoint={trained_run.workdir}", *many, f"--out={out}", "--batch_size=8")
    part = tmp_path / "out.csv.part"
    while not (part.exists() and part.stat().st_size > 2_000):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate()
    assert process.returncode == 75
    assert log.splitlines()[-1] == f"interrupted; the rows so far are in {part}"
    assert len(rows(part)) >= 8
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["x"], "the following arguments are required: --checkpoint"),
        (["--checkpoint=x"], "the following arguments are required: PICTURES"),
        (["--checkpoint=x", "y", "--workdir=x"], "unrecognized arguments: --workdir=x"),
        (["--checkpoint=x", "y", "--top=0"], "argument --top: '0': allowed: whole numbers from 1"),
        (["--checkpoint=x", "y", "--workers=-1"], "argument --workers: '-1': allowed: whole numbers from 0"),
        (["--checkpoint=nowhere", "y"], "nowhere: no run there; give the workdir of one"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(arguments, says, capsys):
    verbosity = logging.get_verbosity()
    try:
        status = command.guarded(predict.main, ["predict", *arguments])
    except SystemExit as stop:
        status = stop.code
    finally:
        logging.set_verbosity(verbosity)
    printed = capsys.readouterr()
    assert (status, printed.out, printed.err) == (2, "", f"error: {says}\n")
