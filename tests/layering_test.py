"""Imports go downward only, and the light modules stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from mfm_jax.workdir import Workdir

PACKAGE = Path(__file__).parents[1] / "mfm_jax"
ORDER = (
    ("errors",),
    ("allocator", "cache", "disk", "ownership"),
    ("integrity",),
    ("types",),
    ("fields",),
    ("methods.settings",),
    ("config",),
    ("longtail", "manifest"),
    ("workdir",),
    ("augment",),
    ("data",),
    ("decode",),
    ("modulation",),
    ("models",),
    ("pretrained",),
    ("losses",),
    ("optim",),
    ("hypergrad", "outer", "passes"),
    ("bilevel",),
    ("methods",),
    ("parallel", "cluster", "versions"),
    ("facts", "metrics", "gallery", "health"),
    ("checkpoint", "finished"),
    ("preflight", "recipe", "tested"),
    ("experiment", "inputs", "anomalies", "progress"),
    ("loop", "logs", "interruption", "classifier"),
    ("feed", "epoch_log", "results"),
    ("run",),
    ("style",),
    ("figures", "comparison_figures"),
    ("report",),
    ("comparison", "card"),
    ("train", "check"),
    ("command",),
    ("predict",),
    ("evaluation", "export"),
    ("runs",),
    ("tune",),
    ("compare", "main"),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
# What an import of `mfm_jax.NAME` may bring in, besides the standard library and the levels below.
ONLY = {
    "errors": set(),
    "fields": set(),
    "methods.settings": set(),
    "config": {"ml_collections"},
    "disk": set(),
    "health": set(),
    "longtail": {"numpy"},
    "manifest": {"numpy"},
    "metrics": {"numpy", "scipy", "sklearn"},
    "workdir": set(),
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def known(name: str) -> str:
    """Returns the module of `ORDER` that a name belongs to: a sub-package counts as one, but for what stands there."""
    parts = name.split(".")
    whole = ".".join(parts[:2])
    return whole if whole in LEVEL else parts[0]


def module_of(path: Path) -> str:
    """Returns the module of `ORDER` that a file belongs to."""
    return known(".".join(path.relative_to(PACKAGE).with_suffix("").parts))


def imports(source: str) -> set[str]:
    """Returns the full names that a source imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(names: set[str]) -> set[str]:
    """Returns the modules of this package among imported `names`."""
    return {known(name.removeprefix("mfm_jax.")) for name in names if name.startswith("mfm_jax.")}


def foreign(names: set[str]) -> set[str]:
    """Returns the packages of others among imported `names`."""
    return {name.split(".")[0] for name in names} - {"mfm_jax"} - sys.stdlib_module_names


def test_the_reader_finds_every_kind_of_import():
    source = (
        "import os\nimport mfm_jax.loop as x\nfrom mfm_jax import data, report\n"
        "def f():\n    from mfm_jax.models.resnet import A\n    import jax.numpy\n"
    )
    assert own(imports(source)) == {"loop", "data", "report", "models"}
    assert foreign(imports(source)) == {"jax"}


def test_every_module_has_a_place_in_the_order():
    assert {module_of(path) for path in FILES} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_downward(path):
    module = module_of(path)
    upward = {name for name in own(imports(path.read_text())) - {module} if LEVEL[name] >= LEVEL[module]}
    assert not upward, f"{module} may not import {upward}"


@pytest.mark.parametrize("module", ONLY)
def test_a_module_that_needs_little_imports_little(module):
    needed = [foreign(imports(path.read_text())) for path in FILES if module_of(path) == module]
    assert needed
    assert set().union(*needed) <= ONLY[module]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_other_module_has_the_name_of_a_file_of_a_run(path):
    names = {one.name for one in vars(Workdir).values() if hasattr(one, "name")} - {"tensorboard", "eval"}
    assert {"config.json", "manifest.json", "results.json", "metrics.jsonl", ".owner"} <= names
    tree = ast.parse(path.read_text())
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation
    ]
    assert path.name == "workdir.py" or not names & {Path(text).name for text in texts}


def python(code: str) -> str:
    """Runs `code` in a fresh interpreter; returns what it printed on both streams."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_importing_the_package_costs_and_prints_nothing():
    heavy = "[m for m in ('jax', 'numpy', 'flax', 'ml_collections', 'absl') if m in sys.modules]"
    assert python(f"import sys, mfm_jax; sys.exit(str({heavy})) if {heavy} else None") == ""


def test_the_report_and_the_check_need_no_jax():
    names = ("report", "comparison", "card", "health", "metrics", "longtail", "manifest", "decode", "check", "finished")
    modules = ", ".join(f"mfm_jax.{name}" for name in names)
    assert python(f"import sys, {modules}; print('jax' in sys.modules)") == "False\n"
