"""The command line: what it accepts, and every mistake is one line that leaves nothing behind."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from absl import logging
from absl.testing import flagsaver
from helpers import REPOSITORY, slow
from PIL import Image

from mfm_jax import command, config, main
from mfm_jax.errors import UserError
from mfm_jax.machine import interruption
from mfm_jax.training import train
from mfm_jax.workdir.files import Workdir

# ml_collections reads a config file in a way that Python 3.12 no longer has; a user's filters hide the warning.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
DIGITS = f"--config={REPOSITORY}/configs/digits_lt.py"


@pytest.fixture
def run(capsys, monkeypatch):
    """Returns a function that runs the command in this process: `(*arguments) -> (status, stdout, stderr)`."""
    cache, verbosity = jax.config.values["jax_compilation_cache_dir"], logging.get_verbosity()

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["main", *arguments])  # config_flags looks there for overrides
        sys.modules.pop("config_config", None)  # what config_flags calls the config file: none is left from before
        try:
            with flagsaver.flagsaver():  # overrides are flags from here on
                status = command.guarded(main.main, command.parse(sys.argv))
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    yield call
    jax.config.update("jax_compilation_cache_dir", cache)
    logging.set_verbosity(verbosity)


def check_refusal(result: tuple[int, str, str], expected: str) -> None:
    status, out, err = result
    assert (status, out.removeprefix("reading digits\n")) == (2, "")  # said where only the data can tell the mistake
    assert err == f"error: {expected}\n"


def fields(group: str) -> str:
    return ", ".join(f"{group}.{name}" for name in config.GROUPS[group].__dataclass_fields__)


# Each mistake, and the line that it gives.
MISTAKES = {
    # on the command line
    "--config.optim.lr=0.1": f"optim.lr: no such field; allowed: {fields('optim')}",
    "--config.optimizer.lr=0.1": f"optimizer.lr: no such field; allowed groups: {', '.join(config.GROUPS)}",
    "--config.train.epochs=ten": "train.epochs = 'ten': expected int",
    "--config.optim.learning_rat=1": "optim.learning_rat: no such field; did you mean --config.optim.learning_rate?",
    "--config.optm.epochs=1": "optm.epochs: no such field; did you mean --config.train.epochs?",
    "--optim.learning_rate=1": "--optim.learning_rate: no such flag; did you mean --config.optim.learning_rate?",
    "--learning_rate=1": (
        "--learning_rate: no such flag; did you mean --config.meta.learning_rate or --config.optim.learning_rate?"
    ),
    "--epochs": "--epochs: no such flag; did you mean --config.train.epochs?",
    "train.epochs=3": "'train.epochs=3': not understood; did you mean --config.train.epochs=3?",
    "configs/a.py": "'configs/a.py': not understood; did you mean --config=configs/a.py?",
    # in the config
    "--config.data.imbalance_factor=0.5": "data.imbalance_factor = 0.5: allowed: 1 or more",
    "--config.model.name=resnet9": (
        "model.name = 'resnet9': allowed: clip_vit_b16, densenet_bc100, dinov2_reg_vit_b14, dinov2_vit_b14,"
        " efficientnet_b0, resnet10, resnet101, resnet152, resnet18, resnet20, resnet32, resnet34, resnet44, resnet50,"
        " resnet56, resnet8, resnext50, vit_b16, wrn28_10, an import path package.module:name"
    ),
    "--split=val": "--split=val: only with --mode=eval",
    "--config.meta.loss=cost": "meta.loss = 'cost': no costs are known; set eval.costs, or leave it out",
    "--config.data.group=a": "data.group = 'a': not read with data.source = 'digits'; only with 'folder' or 'list'",
    "--config.data.test_list=a": "data.test_list = 'a': not read with data.source = 'digits'; only with 'list'",
    # that only the data can tell
    "--config.meta.images_per_class=200": ("meta.images_per_class = 200: class 8 holds 124 images; choose at most 123"),
    "--config.eval.costs=cat>*=2": "eval.costs = 'cat>*=2': no class 'cat'; the classes are 0, 1, 2, 3, 4 and 5 more",
    # that only the model can tell
    "--config.modulation.sites=stage9": (
        "modulation.sites = 'stage9': the model has no such site; allowed: stem, stage1, stage2, stage3, pooled, logits"
    ),
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_at_most_an_empty_folder(argument, run, tmp_path):
    workdir = tmp_path / "run"
    check_refusal(run(DIGITS, f"--workdir={workdir}", argument), MISTAKES[argument])
    assert list(tmp_path.rglob("*")) in ([], [workdir])


@pytest.mark.parametrize("argument", ["--config.optim.lr=0.1", slow("--config.meta.images_per_class=200")])
def test_the_program_prints_that_line_and_nothing_else(argument, tmp_path):
    check_refusal(program(DIGITS, f"--workdir={tmp_path / 'run'}", argument), MISTAKES[argument])
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "run"])


def program(*arguments: str) -> tuple[int, str, str]:
    """Runs the command as a user does."""
    done = subprocess.run(
        [sys.executable, "-m", "mfm_jax.main", *arguments], capture_output=True, text=True, cwd=REPOSITORY
    )
    return done.returncode, done.stdout, done.stderr


def test_mode_check_looks_at_pictures_and_trains_nothing(run, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "0.png").touch()
    arguments = (DIGITS, f"--workdir={tmp_path / 'run'}", "--mode=check")
    status, out, err = run(*arguments, "--config.data.source=folder", f"--config.data.root={tmp_path / 'set'}")
    assert (status, err) == (2, "")
    assert "2 problems:\n  cat/0.png: empty\n  dog/0.png: empty\n" in out
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["duplicates.csv", "problems.csv"]
    assert run(*arguments)[2].startswith("error: data.source = 'digits': --mode=check looks at files")


def test_the_config_and_the_workdir_are_required(run, tmp_path):
    missing = "--config: missing; give a config, e.g. --config=digits_lt, or the --workdir of a run"
    check_refusal(run(f"--workdir={tmp_path / 'run'}"), missing)
    check_refusal(run(f"--workdir={tmp_path / 'run'}", "--config.train.epochs=3"), missing)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [[], ["--workdir="]])
def test_the_workdir_is_required(given, run):
    missing = "--workdir: missing; give a folder for what is written, e.g. --workdir=runs/first"
    check_refusal(run(DIGITS, *given), missing)


def test_a_config_file_that_does_not_exist(run, tmp_path):
    path = tmp_path / "nowhere.py"
    status, out, err = run(f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert (status, out.removeprefix("reading digits\n")) == (2, "")  # said where only the data can tell the mistake
    assert err.startswith(f"error: --config={path}: no such file")
    assert err.count("\n") == 1
    assert run("--config=digit_lt", f"--workdir={tmp_path}")[2].endswith("; did you mean --config=digits_lt?\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "get_config"),  # no such function
        (["def get_config():", "  pass"], "--config"),
        (["def get_config():", "  config = default()", "  config.optim.lr = 1.0", "  return config"], "lr"),
        (["def get_config():", "  config = default()", "  config.train.epochs = ten"], "line 4: NameError"),
        (["def get_config():", "  config = default()", "  config.train.epochs = 'ten'", "  return config"], "int"),
    ],
)
def test_a_config_file_with_a_mistake(lines, says, run, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("\n".join(["from mfm_jax.config import default", *lines]))
    status, out, err = run(f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert (status, out.removeprefix("reading digits\n")) == (2, "")  # said where only the data can tell the mistake
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["config", "workdir"])
def test_a_name_that_no_file_can_have(name, run, tmp_path):
    arguments = {"config": DIGITS, "workdir": f"--workdir={tmp_path}"} | {name: f"--{name}={'x' * 300}"}
    if name == "workdir":
        arguments.pop("config")
    status, out, err = run(*arguments.values())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "File name too long" in err


def test_an_unknown_flag_that_is_like_no_field(run, tmp_path):
    check_refusal(run(DIGITS, f"--workdir={tmp_path / 'run'}", "--nosuch=3"), "Unknown command line flag 'nosuch'")


def test_a_stray_word(run, tmp_path):
    expected = "'stray': not understood; every argument starts with --"
    check_refusal(run(DIGITS, f"--workdir={tmp_path / 'run'}", "stray"), expected)


def test_a_workdir_that_is_a_file(run, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    check_refusal(run(DIGITS, f"--workdir={file}"), f"--workdir={file}: cannot be made: File exists")
    assert file.read_text() == "mine"


# --- what reaches the run -------------------------------------------------------------------------


def test_a_modulator_is_taken_over_by_none_but_mfm(run, tmp_path):
    arguments = (f"--workdir={tmp_path / 'run'}", "--config.method.name=ce", "--init_modulator_from=runs/a")
    check_refusal(run(DIGITS, *arguments), "--init_modulator_from=runs/a: ce has no modulator; mfm or mfm_frozen has")


def test_overrides_reach_the_run_and_its_status_is_returned(run, tmp_path, monkeypatch):
    seen = []

    def pretend(given, workdir, trace=None):
        seen.append((config.resolve(given), Path(workdir)))
        split = {"test": dict.fromkeys(("balanced_accuracy", "accuracy", "many", "rarest_third", "macro_f1"), 0.5)}
        split["test"] |= {"medium": 0.25, "few": None}
        return {"split": "test", "last": split, "best": None}

    monkeypatch.setattr(train, "train_and_evaluate", pretend)
    overrides = ["--config.train.epochs=3", "--config.optim.learning_rate=1", "--noconfig.meta.lagged"]
    overrides += ["--config.data.train_on_meta", "--config.modulation.sites=pooled,logits"]
    status, out, err = run(DIGITS, f"--workdir={tmp_path}", *overrides, "--init_modulator_from=elsewhere")
    assert (status, err) == (0, "")
    (found, workdir) = seen[0]
    assert workdir == tmp_path
    assert (found.data.source, found.train.epochs, found.optim.learning_rate) == ("digits", 3, 1.0)
    assert (found.meta.lagged, found.data.train_on_meta) == (False, True)
    assert found.sites == ("pooled", "logits")
    assert found.modulation.init_from == "elsewhere"
    rows = [[cell.strip() for cell in line.split("│")] for line in out.splitlines() if "│" in line]
    table = {name: cells for _, name, *cells, _ in rows}
    assert table["accuracy"] == ["50.00", "–"]
    assert table["medium"] == ["25.00", "–"]
    assert table["few"] == ["–", "–"]
    assert out.splitlines()[-1] == f"report: {tmp_path}/report.html"


@pytest.fixture
def given(monkeypatch):
    """Returns what the command would have trained: a list of (config, workdir)."""
    seen = []

    def pretend(config_dict, workdir, trace=None):
        seen.append((config.resolve(config_dict), Path(workdir)))
        raise UserError("enough")

    monkeypatch.setattr(train, "train_and_evaluate", pretend)
    return seen


def test_a_run_folder_alone_says_how_the_run_goes_on(run, given, trained_run):
    check_refusal(run(f"--workdir={trained_run.workdir}"), "enough")
    check_refusal(run("--config.train.epochs=9", "--workdir", str(trained_run.workdir)), "enough")
    longer = dataclasses.replace(trained_run.config, train=dataclasses.replace(trained_run.config.train, epochs=9))
    assert given == [(trained_run.config, trained_run.workdir), (longer, trained_run.workdir)]


def test_a_run_folder_alone_whose_config_is_damaged(run, given, tmp_path):
    (tmp_path / "config.json").write_text("{")
    status, out, err = run(f"--workdir={tmp_path}")
    assert (status, out, given) == (2, "", [])
    assert err.startswith(f"error: {tmp_path}/config.json: damaged")
    assert err.count("\n") == 1


@pytest.mark.parametrize("named", ["digits_lt", "configs/digits_lt.py"])
def test_a_shipped_config_has_a_name_wherever_one_is(named, run, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_refusal(run(f"--config={named}", "--config.train.epochs=9", "--workdir=run"), "enough")
    ((found, workdir),) = given
    assert (found.data.source, found.train.epochs, workdir) == ("digits", 9, Path("run"))
    mine = tmp_path / named
    mine.parent.mkdir(exist_ok=True)
    mine.write_text((REPOSITORY / "configs" / "digits_lt.py").read_text().replace("epochs = 60", "epochs = 61"))
    if mine.suffix:  # a file that is there comes before one that is shipped
        check_refusal(run(f"--config={named}", "--workdir=run"), "enough")
        assert given[1][0].train.epochs == 61


@pytest.mark.usefixtures("one_device")
def test_an_evaluation_needs_the_run_folder_alone(run, trained_run, tmp_path):
    arguments = (f"--workdir={trained_run.workdir}", "--mode=eval", f"--out={tmp_path}")
    status, out, err = run(*arguments, "--split=val", "--config.eval.batch_size=7")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == f"report: {tmp_path}/report.html"
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["last"]["val"]["accuracy"] == trained_run.results["last"]["val"]["accuracy"]
    expected = "belongs to another config (train.seed: 0 -> 3); leave --config and these out"
    check_refusal(run(*arguments, "--config.train.seed=3"), f"--workdir={trained_run.workdir} {expected}")


def test_an_interrupted_run_says_so_and_has_its_own_status(run, tmp_path, monkeypatch):
    def interrupted(given, workdir, trace=None):
        raise interruption.Interrupted("saved at step 12")

    monkeypatch.setattr(train, "train_and_evaluate", interrupted)
    status, out, err = run(DIGITS, f"--workdir={tmp_path}")
    assert (status, out) == (75, "")
    assert err == "interrupted; saved at step 12; run the same command to go on\n"


def test_a_signal_before_or_after_training_is_an_interruption_too(capsys):
    def terminated(argv):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    def pressed(argv):  # Ctrl-C; what is started in the background ignores the signal itself
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    for body in (terminated, pressed):
        assert command.guarded(body, []) == 75
        assert capsys.readouterr().err == "interrupted; run the same command to go on\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_mistake_is_a_developers_and_keeps_its_traceback(run, tmp_path, monkeypatch):
    def broken(given, workdir, trace=None):
        raise ZeroDivisionError

    monkeypatch.setattr(train, "train_and_evaluate", broken)
    with pytest.raises(ZeroDivisionError):
        run(DIGITS, f"--workdir={tmp_path}")


# --- the check of overrides -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument",
    [
        "--config.train.epochs=3",
        "-config.train.epochs=3",
        "--config.optim.learning_rate=3",
        "--config.optim.learning_rate=1e-3",
        "--config.augment.flip=False",
        "--config.augment.flip",
        "--noconfig.augment.flip",
        "--config.modulation.sites=a=b",
        "--config.data.root=",
        "--workdir=config.nothing",
        "--config=file.py",
    ],
)
def test_these_overrides_pass(argument):
    command.check_overrides([argument])


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--config.train.epochs=1.5", "train.epochs = '1.5': expected int"),
        ("--config.train.epochs=", "train.epochs = '': expected int"),
        ("--config.optim.learning_rate=fast", "optim.learning_rate = 'fast': expected float"),
        ("--config.augment.flip=maybe", "augment.flip = 'maybe': expected bool"),
        ("-config.augment.flip=2", "augment.flip = '2': expected bool"),
        ("--config.parallel.fsdp.x=3", "parallel.fsdp.x: no such field; allowed: parallel.batch_norm, parallel.fsdp"),
        ("--config.parallel=3", "parallel: no such field; allowed: parallel.batch_norm, parallel.fsdp"),
        ("--noconfig.parallel.deep", "parallel.deep: no such field; allowed: parallel.batch_norm, parallel.fsdp"),
        ("--config.parallel.a\nb=1", "parallel.a\nb: no such field; allowed: parallel.batch_norm, parallel.fsdp"),
    ],
)
def test_these_do_not(argument, expected):
    with pytest.raises(UserError) as caught:
        command.check_overrides(["--workdir=here", argument])
    assert str(caught.value) == expected


@pytest.mark.usefixtures("quick_runs")
def test_a_folder_of_sixty_images_trains_without_an_edit(run, tmp_path):
    """The check says what training will do, and gives the command; that command trains, and again goes on."""
    for name, grey in (("bird", 0), ("cat", 80), ("dog", 160)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(20):
            Image.new("L", (12, 10), grey + i).save(tmp_path / "set" / name / f"{i}.png")
    folder = f"--config={REPOSITORY}/configs/folder_lt.py"
    fields = ("train.epochs=1", "model.name=own_parts:Tiny", "data.image_size=16", "data.workers=0")
    quick = [f"--config.{one}" for one in fields]
    arguments = (folder, f"--workdir={tmp_path / 'run'}", f"--config.data.root={tmp_path / 'set'}", *quick)
    status, out, err = run(*arguments, "--mode", "check")
    assert (status, err) == (0, "")
    assert "no problems" in out
    cut = (
        "train.batch_size = 50: there are 42 training images; 42 is used;"
        " meta.batch_size = 50: there are 30 images in the meta set; 30 is used\n"
    )
    assert cut in out
    to_train = out.splitlines()[-1].removeprefix("to train: ")
    assert shlex.split(to_train) == ["mfm-jax", "train", *arguments]
    for _ in range(2):
        status, out, err = run(*arguments)
        assert (status, err) == (0, "")
    workdir = Workdir(tmp_path / "run")
    assert (workdir.read_config().train.batch_size, workdir.read_config().meta.batch_size) == (42, 30)
    assert workdir.report.exists()
    workdir.results.unlink()
    assert cut in run(*arguments)[1]


def test_a_full_device_is_told_in_one_line_that_names_what_to_lower(capsys):
    def fail(argv):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore")

    assert command.guarded(fail, []) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("error: ")
    for field in ("train.batch_size", "meta.batch_size", "train.accumulate", "model.remat", "allocate 9 bytes"):
        assert field in told
