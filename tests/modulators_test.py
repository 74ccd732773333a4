"""A modulator that comes with the package, or from a file: read, refused, and kept as it is."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import configured, tiny

from mfm_jax import data as data_lib
from mfm_jax.bilevel import modulation
from mfm_jax.errors import UserError
from mfm_jax.training import experiment, train
from mfm_jax.workdir import modulators
from mfm_jax.workdir.checkpoint import restore_phi

LIKE = {"logits": {name: jnp.zeros(()) for name in "abc"}}


def test_a_shipped_modulator_is_a_curve_that_lowers_rare_logits():
    """As logit adjustment does: the fewer the images, the lower; the classifier then raises them by itself."""
    assert "long_tail" in modulators.shipped()
    for name in modulators.shipped():
        phi = modulators.phi(name, LIKE, "modulator")
        chex.assert_trees_all_equal_shapes_and_dtypes(phi, LIKE)
        chex.assert_tree_all_finite(phi)
        counts = jnp.array([1000.0, 300.0, 100.0, 30.0, 10.0])
        curve = modulation.frequency({"logits": 5}, counts)
        _, beta = curve.parameters(phi, "logits", jnp.zeros((1, 5)), jnp.zeros(1, jnp.int32))
        assert np.all(np.diff(beta) < 0)
        assert beta[0] == 0


def test_a_file_holds_any_form(tmp_path):
    """On the device of the phi that it replaces."""
    given = {"pooled": {"gamma": [0.5, 0.25], "beta": [[1, 2], [3, 4]]}}
    (tmp_path / "mine.json").write_text(json.dumps({"phi": given, "learned": "by hand"}))
    like = {"pooled": {"gamma": jnp.zeros(2), "beta": jnp.zeros((2, 2))}}
    like = jax.device_put(like, jax.devices()[1])
    found = modulators.phi(str(tmp_path / "mine.json"), like, "modulator")
    chex.assert_trees_all_equal(found, {"pooled": {"gamma": np.array([0.5, 0.25]), "beta": np.array([[1, 2], [3, 4]])}})
    assert found["pooled"]["gamma"].devices() == {jax.devices()[1]}
    assert found["pooled"]["beta"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"mine.json: no such file"),
        ("{}", r"mine.json.*no field 'phi'"),
        ("[1]", r"mine.json.*not a JSON object"),
        ('{"phi": {"logits": {"a": 1, "b": 0}}}', r"init_from = '.*mine.json': its logits.c is absent, this run needs"),
        ('{"phi": {"logits": {"a": [1, 2], "b": 0, "c": 0}}}', r"init_from = .*: its logits.a is \(2,\)"),
        ('{"phi": {"logits": {"a": "one", "b": 0, "c": 0}}}', r"mine.json.: its phi has something else than numbers"),
        ('{"phi": {"logits": {"a": [1, [2]], "b": 0, "c": 0}}}', r"its phi has something else than numbers"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, content, message):
    if content:
        (tmp_path / "mine.json").write_text(content)
    with pytest.raises(UserError, match=message):
        modulators.phi(str(tmp_path / "mine.json"), LIKE, "modulator")


def test_the_method_that_learns_nothing_keeps_the_shipped_curve_and_reads_no_meta_set(tmp_path):
    config = tiny(method__name="mfm_frozen", train__max_steps=3)
    results = train.train_and_evaluate(config, tmp_path / "named")
    kept = restore_phi(tmp_path / "named", LIKE, "modulator")
    chex.assert_trees_all_equal(kept, modulators.phi("long_tail", LIKE, "modulator"))
    # The same as MFM that starts from it and is frozen.
    fields = tiny(meta__freeze=True, modulation__init_from="long_tail", train__max_steps=3)
    assert train.train_and_evaluate(fields, tmp_path / "fields")["last"] == results["last"]


def test_no_meta_step_is_built_and_the_meta_batch_is_of_no_matter():
    config = configured("mfm_frozen", meta__batch_size=100_000)
    assert experiment.build(config, data_lib.build(config)).meta_step is None
