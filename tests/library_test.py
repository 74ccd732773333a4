"""The Python of docs/library.md runs as it stands there and shows what the page says."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import mfm_jax as mfm

OWN = ("own_module", "own_nnx", "own_source", "own_loss", "own_learner")
PAGE = Path(__file__).parents[1] / "docs" / "library.md"


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's blocks leave behind, run in order in an empty folder, runs on one device."""
    names: dict[str, Any] = {"__name__": "library"}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3 + len(OWN)
    assert max(len(block.splitlines()) for block in blocks[3:]) <= 40
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("library"))
        patch.setattr(jax, "device_count", lambda: 1)
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
        return names | {"folder": Path.cwd() / "runs"}


def test_mfm_is_ahead_of_cross_entropy(namespace):
    results = namespace["results"]
    assert results["CE"] + 0.05 < results["MFM"]


def test_own_modulator_is_ahead_of_cross_entropy(namespace):
    results = namespace["results"]
    assert results["CE"] + 0.05 < results["shift"]


def test_sharded_step_updates_both_levels(namespace):
    state = namespace["state"]
    assert int(state.step) == 1
    assert np.isfinite(float(namespace["metrics"]["meta_loss"]))
    assert np.any(np.asarray(state.phi["logits"]["beta"]))


@pytest.mark.parametrize("name", OWN)
def test_a_part_of_ones_own_goes_from_training_to_an_exported_file(name, namespace):
    """`export` has compared the file with the checkpoint."""
    run = namespace["folder"] / name
    assert json.loads((run / "results.json").read_text())["last"]["test"]["balanced_accuracy"] > 0.3  # 0.1 by chance
    assert (run / "exported" / "classifier.bin").stat().st_size > 0
    assert json.loads((run / "config.json").read_text())["model"]["name"] == "given"


def test_the_public_face_has_what_it_names():
    assert set(mfm.__all__) < set(dir(mfm))
    for name in mfm.__all__:
        assert getattr(mfm, name).__name__.rpartition(".")[2] == name
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = mfm.no_such_name
