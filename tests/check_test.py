"""`--mode=check`: what it says of a folder, what it writes, and the status it ends with."""

import csv
import os
from pathlib import Path

import pytest
from PIL import Image

from mfm_jax import check, config
from mfm_jax.errors import UserError


@pytest.fixture
def root(tmp_path) -> Path:
    """4 pictures of cats, grey and 20 x 10; in test one of them again; 1 of a dog, in colour and 30 x 40."""
    for i in range(4):
        save(tmp_path / f"set/train/cat/{i}.png", (i, i, i), (20, 10))
    save(tmp_path / "set/test/cat/again.png", (3, 3, 3), (20, 10))
    save(tmp_path / "set/train/dog/0.png", (200, 0, 0), (30, 40))
    return tmp_path / "set"


def save(path: Path, color: tuple[int, int, int], size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def run(root, capsys):
    """Returns a function that checks `root`: `(**fields of data, wanted=those of eval) -> (status, lines)`."""

    def call(wanted: dict[str, str] | None = None, **fields) -> tuple[int, list[str]]:
        settings = config.default()
        settings.eval.update(wanted or {})
        settings.data.update({"source": "folder", "root": str(root), "workers": 0, "image_size": 8})
        settings.data.update({"protocol": "natural", "imbalance_factor": 1.0, **fields})
        status = check.check(settings, root.parent / "workdir", "train it")
        return status, capsys.readouterr().out.splitlines()

    return call


def rows(root: Path, name: str) -> list[dict[str, str]]:
    with (root.parent / "workdir" / name).open(errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def test_a_sound_folder(run, root):
    status, lines = run()
    assert status == 0
    assert lines[:3] == [
        "6 pictures in 2 classes, 5 grey and 1 in colour",
        "width: 20 to 30 pixels, median 20",
        "height: 10 to 40 pixels, median 10",
    ]
    assert lines.pop(3) == "test has no picture of 'dog'"
    cells = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines[3:11]]
    assert ["class", "train", "test"] in cells
    assert ["cat", "4", "1"] in cells
    assert ["dog", "1", "0"] in cells
    assert ["all", "5", "1"] in cells
    end = lines.index("no problems") + 3
    assert lines[end - 6 : end] == [
        "many (more than 100 training pictures): 0 classes",
        "medium (20 to 100 training pictures): 0 classes",
        "few (fewer than 20 training pictures): 2 classes",
        "no problems",
        f"duplicates, all in {root.parent}/workdir/duplicates.csv:",
        "  copies in test of pictures in train: 1, 0 across classes, such as test/cat/again.png and train/cat/3.png",
    ]
    assert rows(root, "problems.csv") == []
    assert [list(row.values()) for row in rows(root, "duplicates.csv")] == [
        ["copy", "train/cat/3.png", "train", "0", "test/cat/again.png", "test", "0"]
    ]


def test_problems_are_listed_and_give_status_2(run, root):
    name = os.fsdecode(b"[red]\n\xff.png")
    (root / "train/dog" / name).write_bytes(b"no picture")
    for i in range(25):
        (root / f"train/cat/x{i:02}.txt").touch()
    status, lines = run()
    assert status == 2
    start = lines.index("26 problems:")
    assert lines[start + 1] == "  train/cat/x00.txt: not a picture by its name"
    assert lines[start + 21] == f"  and 6 more in {root.parent}/workdir/problems.csv"
    written = rows(root, "problems.csv")
    assert len(written) == 26
    assert written[-1]["path"] == f"train/dog/{name}"
    assert lines[0] == "6 pictures in 2 classes, 5 grey and 1 in colour"  # those that can be used
    for i in range(25):
        (root / f"train/cat/x{i:02}.txt").unlink()
    assert (
        r"  train/dog/[red]\n\udcff.png: not an image (jpeg, png, webp, bmp, gif, ppm, tiff, avif, jpeg2000)"
        in run()[1]
    )


def test_what_is_passed_over_is_counted(run, root):
    for name in ("train/@eaDir", "train/cat/.thumbs", "#recycle"):
        save(root / name / "0.png", (9, 9, 9), (9, 9))
    status, lines = run()
    assert (status, lines[0]) == (0, "6 pictures in 2 classes, 5 grey and 1 in colour")
    assert "passed over: 1 hidden, 1 recycled, 1 thumbnails" in lines


def test_equal_pictures_in_two_classes_are_a_problem(run, root):
    save(root / "train/dog/1.png", (3, 3, 3), (20, 10))
    status, lines = run()
    assert (status, lines[0]) == (2, "7 pictures in 2 classes, 6 grey and 1 in colour")
    told = "equal to train/cat/3.png in class 'cat'; one of the two labels is wrong"
    assert rows(root, "problems.csv") == [{"path": "train/dog/1.png", "reason": told}]


def test_of_many_classes_both_ends_are_shown(run, root):
    for i in range(18):
        save(root / f"train/bird{i:02}/0.png", (0, i, 0), (9, 9))
    shown = [line.strip("│ ").split()[0] for line in run()[1] if line.startswith("│")][:-4]
    assert shown == [
        "cat",
        *(f"bird{i:02}" for i in range(7)),
        "(4",
        *(f"bird{i}" for i in range(11, 18)),
        "dog",
        "all",
    ]


def test_no_picture_that_can_be_used(run, root):
    for file in root.rglob("*.png"):
        file.write_bytes(b"x")
    status, lines = run()
    assert status == 2
    assert lines[:2] == ["0 pictures in 2 classes, 0 grey and 0 in colour", "6 problems:"]


def test_other_sources_have_no_files_to_look_at(run):
    with pytest.raises(UserError, match=r"data\.source = 'digits': --mode=check looks at files"):
        run(source="digits")


def test_the_plan_of_training_comes_last(run, root):
    """Of 5 training images one is for validation, and one of each class for the meta set."""
    status, lines = run()
    table = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines[-8:-3]]
    assert status == 0
    assert table[:4] == [
        ["train", "4", "2"],
        ["val", "1", "1"],
        ["meta (of train, redrawn every epoch)", "2", "2"],
        ["test", "1", "1"],
    ]
    assert lines[-3:] == [
        "train.batch_size = 100: there are 4 training images; 4 is used;"
        " meta.batch_size = 100: there are 2 images in the meta set; 2 is used",
        "train.batch_size = 4, meta.batch_size = 2",
        "to train: train it",
    ]


def test_the_plan_leaves_out_what_problems_name(run, root):
    (root / "train/cat/3.png").write_bytes(b"no picture")
    status, lines = run()
    assert status == 2
    assert lines[-3:] == [
        "train.batch_size = 3, meta.batch_size = 2",
        "training ends with these problems; this leaves out what they name:",
        "to train: train it --config.data.on_bad_image=skip",
    ]
    assert run(on_bad_image="skip")[1][-1] == "to train: train it"


def test_costs_and_recalls_are_checked_by_the_names_of_the_folders(run):
    status, lines = run({"costs": "wolf>*=2"})
    assert status == 2
    assert lines[-1] == "training would end with: eval.costs = 'wolf>*=2': no class 'wolf'; the classes are cat, dog"
    status, lines = run({"costs": "dog>*=2", "recall": "cat=0.9"})
    assert status == 0
    assert lines[-2] == (
        "warning: eval.recall = 'cat=0.9': 1 images of 'cat' in validation, which promises a recall of 0.5 at"
        " most; 0.9 needs 9"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 0}, "data.image_size = 0: pictures have sides of 10 to 40 pixels; choose a size, e.g. 64"),
        ({"protocol": "full"}, "data.protocol = 'full': draws from all images alike, and set has splits,"),
        ({"label_noise": 0.4, "noise_kind": "confusion"}, "data.label_noise = 0.4: the meta set is redrawn from the"),
        ({"group": "[0-9]"}, "data.group = '[0-9]': group '0' is in the splits"),
    ],
)
def test_what_training_would_refuse_is_said_before(run, root, fields, message):
    save(root / "test/cat/0.png", (9, 9, 9), (20, 10))
    status, lines = run(**fields)
    assert status == 2
    assert lines[-1].startswith(f"training would end with: {message}")
