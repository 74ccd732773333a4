"""A trace of a few steps of a run."""

import pytest
from helpers import tiny

from mfm_jax.errors import UserError
from mfm_jax.machine.trace import Trace
from mfm_jax.training import train


@pytest.mark.parametrize(("batch_size", "written"), [(8, True), (64, False)])  # a shorter run ends before its steps
def test_a_run_leaves_the_trace_of_its_steps_after_compilation(tmp_path, batch_size, written):
    config = tiny(method__name="ce", model__width=2, train__epochs=1, train__batch_size=batch_size, eval__test=False)
    trace = Trace(tmp_path / "trace")
    train.train_and_evaluate(config, tmp_path / "run", pages=False, trace=trace)
    assert trace.written == written
    assert bool(list((tmp_path / "trace").rglob("*.xplane.pb"))) == written


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--profile=.*file: cannot be made; give another folder"):
        Trace(tmp_path / "file")
