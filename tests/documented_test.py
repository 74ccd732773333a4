"""What the documents refer to is there: files and headings of links, scripts of commands with their flags, extras.

`cli_test` has the commands of the package and `site_test` the links of the built site; `using_test`, `library_test` and
`tutorials_test` run what their documents show.
"""

import re
import tomllib
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
NOTEBOOKS = [*sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")), ROOT / "launch" / "colab_tpu.ipynb"]
FOLDERS = r"(?:\.ci|benchmarks|configs|constraints|docs|launch|tests)"
MADE = {"docs/reference", "build/docs"}  # when the site is built


def text_of(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def anchors(path: Path) -> set[str]:
    """Returns the anchors that GitHub and MkDocs both give to the headings of a page."""
    prose = re.sub(r"^```.*?^```$", "", text_of(path), flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r" ", "-", re.sub(r"[^\w\- ]", "", head.lower()).strip()) for head in heads}


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_to_a_heading(path):
    dead = []
    for to, anchor in re.findall(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]*))?\)", text_of(path)):
        target = (path.parent / unquote(to)).resolve() if to else path
        relative = str(target.relative_to(ROOT))
        if not any(relative.startswith(folder) for folder in MADE):
            page = target.suffix in (".md", ".ipynb")
            if not target.exists() or (anchor and not (page and anchor in anchors(target))):
                dead.append(f"{to}#{anchor}")
    assert not dead


def commands() -> list[str]:
    """Returns the lines of the documents that call a script of the repository."""
    texts = (path.read_text(encoding="utf-8").replace("\\\n", " ") for path in PAGES)
    call = rf"^ {{4,}}((?:\S+=\S+ )?(?:[\w. -]+ )?(?:\./)?{FOLDERS}/.*)$"
    return sorted({line for text in texts for line in re.findall(call, text, re.MULTILINE)})


@pytest.mark.parametrize("line", commands())
def test_the_script_of_a_command_exists_and_has_its_flags(line):
    for path in re.findall(rf"(?:^| |--config=)(?:\./)?({FOLDERS}/[\w./-]+)", line):
        assert (ROOT / path).exists(), path
    script = re.search(r"benchmarks/\w+\.py", line)
    if script:
        shared = (ROOT / "mfm_jax" / f"{name}.py" for name in ("command", "compare"))  # whose flags it has, too
        source = "".join(path.read_text() for path in (ROOT / script[0], *shared))
        flags = re.findall(r" --([a-z]\w*)(?=[ =]|$)", line.partition(script[0])[2])
        assert not [flag for flag in flags if not re.search(rf'"(--)?{flag}"', source)]


def test_every_extra_in_a_command_exists():
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    named = {
        name for path in PAGES for name in re.findall(r'"(?:mfm-jax|\.)\[(\w+)\]"', path.read_text(encoding="utf-8"))
    }
    assert {"docs", "dev", "cuda13"} <= named <= {*extras}
