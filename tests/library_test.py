"""The Python of docs/library.md runs as it stands there and shows what the page says."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mfm_jax as mfm

PAGE = Path(__file__).parents[1] / "docs" / "library.md"


@pytest.fixture(scope="module")
def namespace() -> dict[str, Any]:
    """What the page's blocks leave behind, run in order."""
    names: dict[str, Any] = {"__name__": "library"}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


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


def test_the_public_face_has_what_it_names():
    assert set(mfm.__all__) < set(dir(mfm))
    for name in mfm.__all__:
        assert getattr(mfm, name).__name__.rpartition(".")[2] == name
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = mfm.no_such_name
