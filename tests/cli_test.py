"""`mfm-jax`: what each command becomes, its help, the fields, and mistakes in one line."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from PIL import Image

from mfm_jax import audit, cli, command, compare, export, main, manual, predict, shipped
from mfm_jax.config import FIELDS, GROUPS
from mfm_jax.machine import allocator

ROOT = Path(__file__).parents[1]
FLAG = r"--([a-z]\w*(?:\.\w+)*)"


@pytest.fixture
def mfm_jax(capsys, monkeypatch):
    """Returns a function that runs the command in this process: `(*arguments) -> (status, stdout, stderr)`."""
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: True)  # which is for good

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mfm-jax", *arguments])
        return cli.main(), *capsys.readouterr()

    return call


@pytest.fixture
def run(tmp_path):
    """A folder that looks like that of a run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    return str(tmp_path / "run")


# --- handing over ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "door", "told"),
    [
        ("train digits_lt --workdir=w", "main", "--config=digits_lt --workdir=w"),
        ("train --config=a.py --workdir=w --mode=check", "main", "--config=a.py --workdir=w --mode=check"),
        ("train RUN --config.train.epochs=9", "main", "--workdir=RUN --config.train.epochs=9"),
        ("check folder_lt --workdir=w", "main", "--mode=check --config=folder_lt --workdir=w"),
        ("evaluate RUN --split=val", "main", "--mode=eval --workdir=RUN --split=val"),
        ("evaluate --config=a.py --workdir=w", "main", "--mode=eval --config=a.py --workdir=w"),
        ("compare a.py --methods=ce,mfm --workdir=w", "compare", "--config=a.py --methods=ce,mfm --workdir=w"),
        ("tune digits_lt --workdir=w --tune=3", "compare", "--tune=10 --config=digits_lt --workdir=w --tune=3"),
        ("predict RUN a.png folder --top=3", "predict", "--checkpoint=RUN a.png folder --top=3"),
        ("predict a.png --checkpoint=RUN", None, "a.png: no run there; give the folder of one"),
        ("audit RUN --folds=2", "audit", "--checkpoint=RUN --folds=2"),
        ("export RUN --onnx", "export", "--checkpoint=RUN --onnx"),
        ("export --which=best --checkpoint=RUN", "export", "--which=best --checkpoint=RUN"),
        ("train RUN --workdir=w", None, "RUN: --workdir names a run, too; leave one of them out"),
        ("predict RUN a.png --checkpoint=w", None, "RUN: --checkpoint names a run, too; leave one of them out"),
    ],
)
def test_a_command_becomes_the_arguments_of_a_door(line, door, told, run, mfm_jax):
    name, *arguments = line.replace("RUN", run).split()
    if door:
        assert cli.handed_over(name, arguments) == (door, told.replace("RUN", run).split())
    else:
        assert mfm_jax(name, *arguments) == (2, "", f"error: {told.replace('RUN', run)}\n")


def test_a_folder_called_as_a_shipped_config_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plankton").mkdir()
    assert cli.handed_over("train", ["plankton", "--workdir=w"]) == ("main", ["--config=plankton", "--workdir=w"])


DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "configs").glob("*.py"),
]


def documented() -> list[str]:
    """Returns the lines of the README, the documents and the configs that call `mfm-jax` or a module of the package."""
    texts = (path.read_text(encoding="utf-8").replace("\\\n", " ") for path in DOCUMENTS)
    call = r"^ *((?:mfm-jax|python -m mfm_jax[.\w]*) .*)$"
    return sorted({line for text in texts for line in re.findall(call, text, re.MULTILINE)})


def test_the_documented_commands_exist(run):
    seen = set()
    for line in documented():
        words = shlex.split(re.sub(r"runs/(digits|mine|cifar10|first|planted/run)\b(?! *=)", run, line))
        name, *arguments = words[2:] if words[0] == "python" else ["mfm_jax", *words[1:]]
        if name == "mfm_jax":
            seen.add(arguments[0])
            door, told = cli.handed_over(arguments[0], arguments[1:])
        else:
            door, told = name.removeprefix("mfm_jax."), arguments
        given = re.findall(FLAG, " ".join(told))
        assert not {flag for flag in given if flag.removeprefix("config.") not in FIELDS} - known(door), line
        config = [one.partition("=")[2] for one in told if one.startswith("--config=")]
        assert all(one == "FILE" or Path(shipped.path_of(one)).is_file() for one in config), line
    assert seen >= set(cli._DOORS) - {"tune"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_fields_named_in_a_sentence_exist(path):
    text = path.read_text(encoding="utf-8")
    assert set(re.findall(r"`mfm-jax ([a-z]\w*)", text)) <= {*manual.COMMANDS}
    groups = "|".join(GROUPS)
    assert set(re.findall(rf"`(?:--config\.)?((?:{groups})\.\w+) ?=", text)) <= {*FIELDS}


def known(door: str) -> set[str]:
    """Returns the flags of a door."""
    module = {"main": main, "compare": compare, "audit": audit, "predict": predict, "export": export}[door]
    if door in ("main", "compare"):
        defined = flags.FLAGS.flags_by_module_dict()
        return {flag.name for name in (command.__name__, module.__name__) for flag in defined[name]}
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        module.main([door, "--help"])
    return set(re.findall(FLAG, out.getvalue()))


def test_pictures_are_predicted_with_the_run_folder_alone(mfm_jax, trained_run, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    table = tmp_path / "table.csv"
    status, out, err = mfm_jax("predict", str(trained_run.workdir), str(tmp_path), f"--out={table}", "--workers=0")
    assert (status, err) == (0, "")
    assert out.endswith(f"{table}: 1 pictures\n")


def test_the_program_hands_over_and_returns_the_status(tmp_path):
    words = [sys.executable, "-m", "mfm_jax", "train", "digits_lt", "--workdir=run", "--epochs=3"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    told = "error: --epochs: no such flag; did you mean --config.train.epochs?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)


# --- help -----------------------------------------------------------------------------------------


def test_help_is_quick():
    """Nothing that takes long to import is imported, which a clock shows less surely."""
    code = (
        "import sys; from mfm_jax import cli\n"
        "for words in (['--help'], ['train', '--help'], ['predict', '-h'], ['trian']):\n"
        "    sys.argv[1:] = words; cli.main()\n"
        "print([m for m in ('jax', 'numpy', 'ml_collections', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == "error: trian: no such command; did you mean mfm-jax train?\n"


def test_help_says_first_what_is_required(mfm_jax):
    status, out, err = mfm_jax("--help")
    assert (status, err) == (0, "")
    assert out.index("--workdir=") < out.index("\n  mfm-jax compare")
    assert all(name in out for name in (*manual.COMMANDS, *shipped.shipped()))
    assert mfm_jax() == (2, out, "")
    status, out, err = mfm_jax("train", "digits_lt", "--help")
    assert (status, err) == (0, "")
    assert out.index("--config=CONFIG") < out.index("--workdir=FOLDER  ") < out.index("--config.train.epochs=N")
    assert "mfm-jax fields" in out
    assert mfm_jax("--version")[:2] == (0, "mfm-jax 0.1.0\n")


@pytest.mark.parametrize("name", cli._DOORS)
def test_help_names_flags_that_exist(name):
    text = manual.text(name, [])
    assert max(map(len, text.splitlines())) <= 120
    allowed = known(cli._DOORS[name][0]) | {"help", "helpfull", "config.GROUP.FIELD"}
    assert not {flag for flag in re.findall(FLAG, text) if flag.removeprefix("config.") not in FIELDS} - allowed


# --- fields ---------------------------------------------------------------------------------------


def test_fields_are_a_line_each_where_there_is_no_terminal(mfm_jax):
    status, out, err = mfm_jax("fields")
    assert (status, err) == (0, "")
    assert [line.partition(" = ")[0] for line in out.splitlines()] == list(FIELDS)
    line = "optim.learning_rate = 0.1 (0 or more): the largest of the schedule\n"
    assert line in out
    assert mfm_jax("fields", "optim.learning_rate") == (0, line, "")
    both = mfm_jax("fields", "learning_rate")[1].splitlines()
    assert [one.partition(" ")[0] for one in both] == ["meta.learning_rate", "optim.learning_rate"]
    group = mfm_jax("fields", "meta")[1].splitlines()
    assert [one.partition(" ")[0] for one in group] == [path for path in FIELDS if path.startswith("meta.")]
    assert "meta.loss = 'ce' (ce, cost, gce): " in mfm_jax("fields", "meta.loss")[1]


def test_fields_are_tables_in_a_terminal(mfm_jax, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    status, out, err = mfm_jax("fields", "optim", "meta.loss")
    assert (status, err) == (0, "")
    rows = [line.split() for line in re.sub(r"\x1b\[[\d;]*m", "", out).splitlines()]
    assert ["field", "default", "allowed", "meaning"] in rows
    assert ["optim.learning_rate", "0.1", "0", "or", "more", "the", "largest", "of", "the", "schedule"] in rows
    assert sum(row[:1] == ["field"] for row in rows) == 2


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("trian digits_lt", "trian: no such command; did you mean mfm-jax train?"),
        ("eval x", "eval: no such command; did you mean mfm-jax evaluate?"),
        ("resume x", f"resume: no such command; there are {', '.join(manual.COMMANDS)}"),
        ("digits_lt --workdir=w", "digits_lt: a command comes first, e.g. mfm-jax train digits_lt"),
        ("--config=a.py", "--config=a.py: a command comes first, e.g. mfm-jax train --config=a.py"),
        ("predict", "a run comes first: mfm-jax predict RUN PICTURES..."),
        ("evaluate --split=val", "a run comes first: mfm-jax evaluate RUN"),
        ("export nowhere", "nowhere: no run there; give the folder of one"),
        ("fields optm", "optm: no such group or field; did you mean optim?"),
        ("fields meta.evry", "meta.evry: no such group or field; did you mean meta.every?"),
        (
            "fields learning_rat",
            "learning_rat: no such group or field; did you mean meta.learning_rate or optim.learning_rate?",
        ),
    ],
)
def test_a_mistake_is_one_line(line, says, mfm_jax):
    assert mfm_jax(*line.split()) == (2, "", f"error: {says}\n")


def test_a_folder_of_pictures_is_no_run(mfm_jax, tmp_path):
    status, out, err = mfm_jax("train", str(tmp_path))
    assert (status, out) == (2, "")
    way_out = f"mfm-jax train folder_lt --workdir=runs/mine --config.data.root={tmp_path}"
    assert err == f"error: {tmp_path}: no run there; of pictures: {way_out}\n"


def test_a_name_that_no_file_can_have(mfm_jax):
    status, out, err = mfm_jax("evaluate", "x" * 300)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "File name too long" in err
