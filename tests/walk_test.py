"""Training, evaluation on a folder and prediction find the same pictures in a folder."""

import os
from pathlib import Path

import pytest

from mfm_jax.data import listing, walk
from mfm_jax.errors import UserError


@pytest.fixture
def root(tmp_path) -> Path:
    """Two classes with everything that a folder may hold."""
    root = tmp_path / "set"
    names = [
        *("b.JPG", "a.png", "deep/c", ".hidden.jpg", ".git/x.jpg", "Thumbs.db", "notes.txt", "__MACOSX/y.jpg"),
        *("../dog/d.webp", "../../elsewhere/e.jpg", "../../elsewhere/more/f.jpg"),
    ]
    for name in names:
        path = Path(os.path.normpath(root / "cat" / name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (root / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "one.jpg").symlink_to(tmp_path / "elsewhere" / "e.jpg")
    (root / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (root / "cat" / "deep" / "up").symlink_to(root / "cat")
    return root


PICTURES = ["a.png", "b.JPG", "one.jpg", "deep/c", "linked/e.jpg", "linked/more/f.jpg"]


def test_the_walk_goes_a_folder_at_a_time_and_gives_reasons(root):
    found = list(walk.walk(root, "cat"))
    assert [path for path, wrong in found if not wrong] == [f"cat/{path}" for path in PICTURES]
    assert [pair for pair in found if pair[1]] == [
        ("cat/gone.jpg", "a link to nowhere"),
        ("cat/notes.txt", walk.NOT_A_PICTURE),
        ("cat/deep/up", "a link to a folder that it lies in"),
    ]
    assert [path for path, wrong in walk.walk(root / "cat") if not wrong] == PICTURES


def test_what_is_given_is_what_training_reads_and_what_cannot_be_read(root):
    trained = listing.folder(root)
    unusable = {problem.path for problem in trained.problems if problem.reason != walk.NOT_A_PICTURE}
    assert unusable == {"cat/gone.jpg", "cat/deep/up"}
    given = [path.relative_to(root).as_posix() for path in walk.given([root])]
    assert set(given) == {*trained.paths, *unusable}
    assert len(given) == len(trained.paths) + 2
    # A file that is given by its name is taken, whatever its name.
    assert list(walk.given([root / "cat/notes.txt", root / "dog"])) == [root / "cat/notes.txt", root / "dog/d.webp"]


def test_a_place_that_is_not_there_is_refused(root):
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        list(walk.given([root, root / "nowhere"]))
