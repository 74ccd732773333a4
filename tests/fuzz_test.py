"""Fuzzed configs and command lines: each starts, or ends in one clear line; none in a traceback.

All run in this process, up to the first training step: that step is traced, for shapes and types, not compiled. Some
examples go on to their end, after one step.
"""

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import pytest
from absl import logging
from absl.testing import flagsaver
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from mfm_jax import command, main
from mfm_jax import config as config_lib
from mfm_jax.config import FIELDS
from mfm_jax.errors import UserError
from mfm_jax.training import loop as loop_lib
from mfm_jax.training import train

# ml_collections reads a config file in a way that Python 3.12 no longer has; a user's filters hide the warning.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
TINY = {
    "data.source": "digits",
    "data.name": "digits",
    "data.imbalance_factor": 10.0,
    "augment.pad": 1,
    "model.name": "resnet8",
    "model.width": 1,
    "meta.batch_size": 20,
    "train.epochs": 2,
    "train.batch_size": 64,
    "train.max_steps": 1,
}
BASE = f"""
from mfm_jax.config import default
def get_config():
    config = default()
    config.update_from_flattened_dict({TINY!r})
    return config
"""
# What costs memory and time without bound, and is no mistake: no value between the tiny and the absurd.
SIZES = ("model.width", "modulation.hidden", "method.hidden", "data.image_size", "eval.batch_size")


class Started(Exception):
    """The run has come to its first step."""


def shaped_call(make_call):
    """Returns a `make_call` of which the compiled call is only traced, and ends the run."""

    def make(*built):
        call = make_call(*built)

        def first(loop, data, count, kind):
            call.eval_shape(loop, data, count, kind)
            raise Started

        return first

    return make


@contextlib.contextmanager
def on_one_device_in(folder: Path, *, to_the_end: bool) -> Iterator[None]:
    """Makes `folder` the working directory and the user's home, and the first step the last."""
    with (
        mock.patch.object(jax, "device_count", return_value=1),
        contextlib.chdir(folder),
        contextlib.ExitStack() as stack,
    ):
        stack.enter_context(mock.patch.dict(os.environ, {"HOME": str(folder), "TFDS_DATA_DIR": str(folder)}))
        if not to_the_end:
            stack.enter_context(mock.patch.object(loop_lib, "make_call", shaped_call(loop_lib.make_call)))
        yield


def run(arguments: list[str]) -> tuple[int | None, str, str]:
    """Returns (status, stdout, stderr) of the command in this process; status None where it has come to its step."""
    out, err = io.StringIO(), io.StringIO()
    cache, verbosity = jax.config.values["jax_compilation_cache_dir"], logging.get_verbosity()
    sys.modules.pop("config_config", None)  # what config_flags calls the config file: none is left from before
    try:
        with (
            flagsaver.flagsaver(),
            mock.patch.object(sys, "argv", ["main", *arguments]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            status = command.guarded(main.main, command.parse(sys.argv))
    except SystemExit as stop:
        status = stop.code
    except Started:
        status = None
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
        logging.set_verbosity(verbosity)
    return status, out.getvalue(), err.getvalue()


def check(status: int | None, out: str, err: str) -> None:
    """A start, an end, or a refusal in one line; `--hypothesis-show-statistics` tells how many of each."""
    event({None: "starts", 0: "ends"}.get(status, "is refused"))
    if status in (None, 0):
        assert "error" not in err
        return
    assert status == 2, err
    assert err.startswith("error: "), err
    assert err.endswith("\n"), err
    assert err.count("\n") == 1, err
    assert len(err) > 20, err


# --- what is tried --------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
NUMBERS = st.one_of(
    st.integers(-3, 12),
    st.sampled_from([2**31 - 1, 2**31, 2**63, 10**30, -(2**40)]),
    st.floats(-2, 4),
    st.sampled_from([0.0, -0.0, 1e-30, 1e30, 1e308, float("inf"), float("-inf"), float("nan")]),
)
ANYTHING = st.one_of(NUMBERS, TEXT, st.booleans(), st.none(), st.lists(st.integers(), max_size=2))


def values(name: str) -> st.SearchStrategy:
    """Returns values of a field: mostly some that it allows, also its bounds and beyond, also anything."""
    field = FIELDS[name]
    kind, (low, high) = field.kind, (field.bounds.low, field.bounds.high) if field.bounds else (0, 8)
    if field.choices:
        allowed = st.sampled_from(field.choices)
    elif name == "modulation.sites":
        sites = st.sampled_from(["stem", "stage1", "stage2", "stage3", "pooled", "logits", "stage9", ""])
        allowed = st.lists(sites, min_size=1, max_size=3).map(",".join)
    elif kind is bool:
        allowed = st.booleans()
    elif kind is int:
        allowed = st.integers(int(low), int(min(high, low + 8)))
    elif kind is float:
        allowed = st.floats(low, min(high, low + 8)) | st.sampled_from([low, float(min(high, 1e6))])
    else:
        allowed = st.sampled_from(["", "elsewhere", "digits", "mnist"]) | TEXT
    beyond = st.sampled_from([low - 1, 2**31]) if kind in (int, float) and name not in SIZES else TEXT
    return st.one_of(*[allowed] * 10, beyond, ANYTHING if name not in SIZES else TEXT)


OVERRIDES = st.dictionaries(
    st.sampled_from(sorted(FIELDS.keys() - {"train.max_steps"})), st.none(), min_size=1, max_size=3
).flatmap(lambda names: st.fixed_dictionaries({name: values(name) for name in names}))
NAMES = st.sampled_from([*FIELDS, *config_lib.GROUPS, "optim.lr", "train", "", ".", "data.", "a.b.c", "method.name.x"])
STRAY = st.one_of(
    TEXT,
    st.builds("--{}={}".format, TEXT, TEXT),
    st.builds("--config.{}={}".format, NAMES | TEXT, ANYTHING),
    st.builds("--{}config.{}".format, st.sampled_from(["", "no"]), NAMES),
    st.sampled_from(
        ["--", "-", "--config", "--config=", "--workdir", "--workdir=", "--config.data", "--noconfig", "-h"]
    ),
    st.sampled_from(
        ["--workdir=config.py", "--workdir=/proc/run", "--workdir=a/b/ü", f"--workdir={'x' * 300}", "--w=a"]
    ),
    st.sampled_from(["--processes=2", "--process=x", "--coordinator=here", "--coordinator=auto", "--undefok=lr"]),
    st.sampled_from(["--init_modulator_from=.", "--init_modulator_from=nowhere", "--config=nowhere.py", "--config=."]),
    st.sampled_from(
        ["--preemption_notice=there", "--flagfile=nowhere", "--flagfile=config.py", "--config=config.py:x"]
    ),
)


def as_argument(name: str, value) -> str:
    return f"--config.{name}={value}"


@st.composite
def command_lines(draw) -> list[str]:
    """A command line that is right but for what is drawn: overrides, and up to two arguments of any kind."""
    arguments = ["--config=config.py", "--workdir=run"]
    if draw(st.integers(0, 19)) == 0:
        arguments.pop(draw(st.integers(0, 1)))
    arguments += [as_argument(name, value) for name, value in draw(OVERRIDES).items()]
    for argument in draw(st.lists(STRAY, max_size=2)) if draw(st.integers(0, 2)) == 0 else ():
        arguments.insert(draw(st.integers(0, len(arguments))), argument)
    return arguments


def try_command_line(arguments: list[str], to_the_end: bool = False) -> None:
    with tempfile.TemporaryDirectory() as folder, on_one_device_in(Path(folder), to_the_end=to_the_end):
        Path("config.py").write_text(BASE)
        check(*run(arguments))


def try_config(overrides: dict, to_the_end: bool = False) -> None:
    """As from Python: values need not have passed a command line."""
    given = config_lib.default()
    given.update_from_flattened_dict(TINY)
    nested = given.to_dict()
    for name, value in overrides.items():
        group, field = name.split(".")
        nested[group][field] = value
    with tempfile.TemporaryDirectory() as folder, on_one_device_in(Path(folder), to_the_end=to_the_end):
        check(*outcome(nested))


def outcome(nested: dict) -> tuple[int | None, str, str]:
    """As `run`, of a config given in Python."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train.train_and_evaluate(nested, Path("run"))
        return 0, "", ""
    except UserError as error:
        return 2, "", f"error: {error}\n"
    except Started:
        return None, "", ""


def fuzz(examples: int):
    """The same examples every time; one that fails is shown as it is, since making it smaller takes long."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@fuzz(12)
@given(command_lines())
def test_command_lines(arguments):
    try_command_line(arguments)


@fuzz(8)
@given(OVERRIDES)
def test_configs(overrides):
    try_config(overrides)


@pytest.mark.slow
@fuzz(300)
@given(command_lines(), st.integers(0, 9))
def test_many_command_lines(arguments, chance):
    try_command_line(arguments, to_the_end=chance == 0)


@pytest.mark.slow
@fuzz(200)
@given(OVERRIDES, st.integers(0, 9))
def test_many_configs(overrides, chance):
    try_config(overrides, to_the_end=chance == 0)
