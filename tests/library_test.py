"""The Python of docs/library.md runs as it stands there and shows what the page says."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mfm_jax as mfm
from mfm_jax import config as config_lib
from mfm_jax.methods.table import METHODS

OWN = ("own_module", "own_nnx", "own_source", "own_loss", "own_learner")
PAGE = Path(__file__).parents[1] / "docs" / "library.md"


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's blocks leave behind, run in order in an empty folder, runs on one device."""
    names: dict[str, Any] = {"__name__": "library"}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4 + len(OWN)
    assert max(len(block.splitlines()) for block in (blocks[0], *blocks[4:])) <= 40
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("library"))
        patch.setattr(jax, "device_count", lambda: 1)
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
        return names | {"folder": Path.cwd() / "runs", "files": {str(path) for path in Path().rglob("*")}}


def test_from_fit_to_an_exported_file_in_few_lines(namespace):
    assert namespace["predicted"].shape == (599,)
    assert {"exported/classifier.bin", "exported/how_to_use.py", "digits/images.npz"} <= namespace["files"]


def test_the_recipe_is_what_the_commands_use():
    counts = np.array([30, 5, 2])
    parts, config = mfm.recipe(counts), config_lib.Config()
    learner = METHODS["mfm"].learner(config, counts, {"logits": 3})
    phi = {"logits": {"a": 0.5, "b": -2.0, "c": 0.25}}
    phi = jax.tree.map(jnp.float32, phi)
    features, labels = jnp.ones((2, 3)), jnp.array([0, 2])
    for made in (parts.modulator, learner.modulator):
        gamma, beta = made.parameters(phi, "logits", features, labels)
        z = np.log(counts / 30)
        np.testing.assert_allclose(gamma, np.tanh(-0.2 * z), rtol=1e-6)
        np.testing.assert_allclose(beta, 0.5 * z + 0.025 * z**2, rtol=1e-6)
    np.testing.assert_allclose(parts.share, np.sqrt(counts) / np.sqrt(counts).sum(), rtol=1e-6)
    assert (parts.rule, parts.every) == (mfm.MetaRule(parts.rule.loss), 8)
    state = parts.phi_tx.init(phi)
    moved, _ = parts.phi_tx.update(jax.tree.map(lambda x: 7 * x, phi), state)
    np.testing.assert_allclose(moved["logits"]["a"], -0.01, rtol=1e-4)  # the first step of Adam: the rate
    with pytest.raises(mfm.UserError, match=r"counts = \[3, 0\]: allowed: the training images of two classes or more"):
        mfm.recipe([3, 0])


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
