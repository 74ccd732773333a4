"""Imports go downward only, and the light modules stay light."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from mfm_jax.methods.settings import Name
from mfm_jax.workdir.files import Workdir

PACKAGE = Path(__file__).parents[1] / "mfm_jax"
ORDER = (  # the files of a line import those of the lines above it alone
    "data.formats data.stamps data.workers errors evaluation inference machine machine.allocator machine.cache manual "
    "methods methods.gaussians methods.smote models.normalization pages shipped study training training.pace types "
    "workdir machine.disk",
    "bilevel.balancing bilevel.hypergrad bilevel.losses bilevel.modulation bilevel.passes config.wanted "
    "data.list_text data.longtail data.manifest data.noise data.pictures data.walk fields machine.cluster "
    "machine.parallel machine.trace models.hub_cache models.hugging_face models.lowering models.native models.stacked "
    "models.tuning workdir.integrity workdir.ownership",
    "bilevel.auxiliary bilevel.averaging config.own data.decode data.depth data.labels data.spelling data.streaming "
    "evaluation.conformal evaluation.intervals evaluation.metrics machine.interruption machine.versions methods.heads "
    "methods.settings models.convolution",
    "bilevel.agreement bilevel.contrast bilevel.distillation config.groups data.lists evaluation.decisions "
    "evaluation.mistakes evaluation.suspects models.layers",
    "bilevel.pairs models.densenet models.efficientnet models.imagenet models.resnet models.vit models.wide_resnet",
    "config.consistency config.continuation config.lookup models.catalog",
    "config.parameters config.schema models",
    "config",
    "data.policies data.sizes models.own",
    "bilevel.optim data.augment data.listing data.sources evaluation.health methods.sampling models.pretrained "
    "training.anomalies workdir.files",
    "bilevel.outer bilevel.sharpness data.batches data.checking data.digits data.given data.kept data.numbers "
    "data.own data.pretext evaluation.gallery models.zero_shot workdir.checkpoint workdir.loggers workdir.stored",
    "bilevel.objective command data.arrays data.files data.tfds methods.learners methods.own workdir.finished "
    "workdir.logs workdir.modulators",
    "bilevel.steps",
    "bilevel data.assembly methods.table pages.style",
    "check data evaluation.tested pages.comparison_figures pages.figures pages.mistakes",
    "evaluation.facts pages.comparison pages.report training.inputs training.preflight training.prior "
    "training.progress training.recipe",
    "evaluation.hub_folder pages.audit pages.card pages.front_matter training.own_loop training.teacher "
    "training.weights",
    "training.experiment",
    "evaluation.classifier training.loop",
    "evaluation.results hub inference.trained predict training.epoch_log training.feed",
    "export inference.evaluate training.run",
    "training.train",
    "estimator main study.runs",
    "study.folds study.tune",
    "audit compare",
    "cli",
    "__main__",
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names.split()}
# What an import of `mfm_jax.NAME` may bring in, besides the standard library and the levels below.
ONLY = {
    "errors": set(),
    "fields": set(),
    "methods.settings": set(),
    "config.schema": {"ml_collections"},
    "machine.disk": set(),
    "evaluation.health": set(),
    "data.longtail": {"numpy"},
    "data.manifest": {"numpy"},
    "evaluation.conformal": {"numpy"},
    "evaluation.decisions": {"numpy"},
    "evaluation.metrics": {"numpy", "scipy", "sklearn"},
    "workdir.files": set(),
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def module_of(path: Path) -> str:
    """Returns the dotted name of a file of the package; of an `__init__.py`, its folder's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_named(name: str) -> str:
    """Returns the module that an imported name of this package is, or lies in."""
    name = name.removeprefix("mfm_jax.")
    return name if name in LEVEL else name.rpartition(".")[0]


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
    return {module_named(name) for name in names if name.startswith("mfm_jax.")}


def foreign(names: set[str]) -> set[str]:
    """Returns the packages of others among imported `names`."""
    return {name.split(".")[0] for name in names} - {"mfm_jax"} - sys.stdlib_module_names


def test_the_reader_finds_every_kind_of_import():
    source = (
        "import os\nimport mfm_jax.training.loop as x\nfrom mfm_jax import data\nfrom mfm_jax.pages import report\n"
        "def f():\n    from mfm_jax.models.resnet import A\n    import jax.numpy\n"
    )
    assert own(imports(source)) == {"training.loop", "data", "pages.report", "models.resnet"}
    assert foreign(imports(source)) == {"jax"}


def test_every_module_has_a_place_in_the_order():
    assert sorted(" ".join(ORDER).split()) == sorted(map(module_of, FILES))


def test_every_folder_is_packaged():
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {".".join(path.relative_to(PACKAGE.parent).parts[:-1]) for path in PACKAGE.rglob("*.py")}
    assert sorted(settings["packages"]) == sorted(folders | settings["package-dir"].keys())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_downward(path):
    module = module_of(path)
    upward = {name for name in own(imports(path.read_text())) - {module} if LEVEL[name] >= LEVEL[module]}
    assert not upward, f"{module} may not import {upward}"


@pytest.mark.parametrize("module", ONLY)
def test_a_module_that_needs_little_imports_little(module):
    (path,) = [path for path in FILES if module_of(path) == module]
    assert foreign(imports(path.read_text())) <= ONLY[module]


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
    others = {"workdir.files", "models.hub_cache"}  # a hub's `config.json` is another file
    assert module_of(path) in others or not names & {Path(text).name for text in texts}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_other_folder_has_the_name_of_a_method(path):
    names = {f'"{name}"' for name in get_args(Name)} - {'"ce"'}  # a loss of the meta pass, too
    assert module_of(path).startswith("methods") or not names & set(re.findall(r'"\w+"', path.read_text()))


def python(code: str) -> str:
    """Runs `code` in a fresh interpreter; returns what it printed on both streams."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_importing_the_package_costs_and_prints_nothing():
    heavy = "[m for m in ('jax', 'numpy', 'flax', 'ml_collections', 'absl', 'sklearn') if m in sys.modules]"
    assert python(f"import sys, mfm_jax; sys.exit(str({heavy})) if {heavy} else None") == ""


def test_the_report_and_the_check_need_no_jax():
    names = (
        "check data.decode data.manifest evaluation.health evaluation.metrics pages.card pages.comparison pages.report"
    )
    modules = ", ".join(f"mfm_jax.{name}" for name in names.split())
    assert python(f"import sys, {modules}; print('jax' in sys.modules)") == "False\n"
