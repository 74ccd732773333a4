"""What surrounds the package: versions that it is installed with, CI, the image, the citation, how extras are named."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import mfm_jax
from mfm_jax import errors

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
TESTED = [*NEEDED, *map(Requirement, PROJECT["optional-dependencies"]["test"])]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def steps() -> list[dict]:
    """Returns the steps of all jobs of all workflows."""
    jobs = [job for path in WORKFLOWS for job in yaml.safe_load(path.read_text())["jobs"].values()]
    return [step for job in jobs for step in job["steps"]]


def test_every_dependency_has_a_lowest_version_and_no_highest():
    assert [str(needed) for needed in NEEDED if [one.operator for one in needed.specifier] != [">="]] == []


@pytest.mark.parametrize("python", ["3.11", "3.13"])
def test_the_tested_versions_are_of_all_dependencies_and_within_their_bounds(python):
    lines = (ROOT / f"constraints/python{python}.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    for needed in TESTED:
        version = pins[canonicalize_name(needed.name)]
        assert needed.specifier.contains(version), f"{needed} is tested with {version}"


def test_workflows_may_only_read_and_run_tiers_that_exist():
    for path in WORKFLOWS:
        assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
    commands = [step["run"] for step in steps() if "run" in step]
    usage = subprocess.run([ROOT / ".ci/run", "nonsense"], capture_output=True, text=True)
    assert usage.returncode == 2
    tiers = re.fullmatch(r"usage: \.ci/run \[(.*)\]\n", usage.stderr)[1].split("|")
    assert {command.removeprefix("./.ci/run ") for command in commands} == set(tiers)


def test_actions_are_pinned_to_a_major_version():
    used = [step["uses"] for step in steps() if "uses" in step]
    assert used
    assert [name for name in used if not re.fullmatch(r"actions/[a-z-]+@v\d+", name)] == []


def test_the_tests_of_other_versions_exist():
    usage = subprocess.run([ROOT / ".ci/versions", "oldest"], capture_output=True, text=True)
    assert (usage.returncode, usage.stderr) == (2, "usage: .ci/versions lowest|newest [tests]\n")
    (names,) = re.findall(r"tests/\{(.*)\}_test\.py", (ROOT / ".ci/versions").read_text())
    assert all((ROOT / f"tests/{name}_test.py").exists() for name in names.split(","))


def test_the_image_has_a_pinned_base_an_ordinary_user_and_no_caches():
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    given = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    bases, users = ([value for key, value in given if key == name] for name in ("FROM", "USER"))
    assert len(bases) == 1
    assert re.fullmatch(r"python:3\.\d+-slim-[a-z]+", bases[0])
    assert users == ["mfm"]
    assert given.index(["USER", "mfm"]) > max(i for i, (key, _) in enumerate(given) if key in ("RUN", "COPY"))
    runs = [value for key, value in given if key == "RUN"]
    assert all("rm -rf /var/lib/apt/lists/*" in run for run in runs if "apt-get install" in run)
    assert all("--no-cache-dir" in run for run in runs if "pip install" in run)


def test_the_image_copies_what_its_context_lets_in_and_all_that_is_built_from():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
    assert copied >= {"pyproject.toml", "mfm_jax", "configs", PROJECT["readme"], *PROJECT["license-files"]}


def test_the_jobset_takes_the_image_as_it_is_made():
    jobset, image = ((ROOT / name).read_text() for name in ("launch/gke_jobset.yaml", "Dockerfile"))
    assert "image: REGISTRY/mfm_jax:tpu\n" in jobset
    assert "--tag mfm_jax:tpu --build-arg EXTRA=tpu" in image
    folder = re.search(r"^WORKDIR (/opt/.*)$", image, re.MULTILINE)[1]
    (config,) = re.findall(rf"--config={folder}/(.*)", jobset)
    assert (ROOT / config).exists()
    user = yaml.safe_load(jobset)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert f"--uid {user['securityContext']['fsGroup']} " in image


def test_the_citation_is_of_this_version_and_of_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(cited["version"]) == mfm_jax.__version__
    names = [f"{person['family-names']}, {person['given-names']}" for person in cited["preferred-citation"]["authors"]]
    bibtex = (ROOT / "docs/citing.md").read_text()
    assert f"author  = {{{' and '.join(names)}}}" in bibtex
    assert f"version = {{{mfm_jax.__version__}}},\n  year    = {{{cited['date-released'].year}}}" in bibtex
    assert "arXiv:2008.03428" in bibtex


def test_the_changelog_has_an_entry_for_this_version_with_the_date_that_is_cited():
    entries = dict(re.findall(r"^## \[(.+?)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE))
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert entries[mfm_jax.__version__] == str(cited["date-released"])
    assert all(Version(number) >= Version(mfm_jax.__version__) for number in list(entries)[:1])


def test_an_extra_is_installed_from_the_clone_or_into_the_wheel(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert errors.install("onnx") == 'python -m pip install -e ".[onnx]"'
    monkeypatch.chdir(tmp_path)
    assert errors.install("onnx") == f'python -m pip install -e "{ROOT}[onnx]"'
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "site-packages/mfm_jax/errors.py"))
    assert errors.install("onnx") == 'python -m pip install "mfm-jax[onnx]"'


def test_every_extra_that_the_code_names_exists():
    texts = [path.read_text() for path in (ROOT / "mfm_jax").rglob("*.py")]
    named = {name for text in texts for name in re.findall(r"""\binstall\(['"](\w+)['"]\)""", text)}
    assert {"onnx", "prepare"} <= named <= set(PROJECT["optional-dependencies"])
