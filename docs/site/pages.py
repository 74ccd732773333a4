"""The pages of the site that are made when it is built, and links that lead out of `docs/`: a hook of MkDocs.

Nothing is written down twice: commands come from their own help, config fields from their declarations, the
reference from the package's docstrings, tutorials from their notebooks, changelog and contributing from the files at
the root.
"""

import contextlib
import importlib
import io
import os
import re
from pathlib import Path
from typing import Any

import griffe
from absl import flags
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

import mfm_jax
from mfm_jax import cli, manual, shipped
from mfm_jax.config import FIELDS, GROUPS

ROOT = Path(__file__).parents[2]
AT_ROOT = {"CHANGELOG.md": "docs/changelog.md", "CONTRIBUTING.md": "docs/contributing.md"}

# page of the reference: (its title, the modules whose public names it has).
MODULES = {
    "bilevel": (
        "The training step",
        (
            "types",
            "bilevel.steps",
            "bilevel.passes",
            "bilevel.modulation",
            "bilevel.outer",
            "bilevel.hypergrad",
            "bilevel.losses",
            "bilevel.auxiliary",
            "bilevel.contrast",
            "bilevel.agreement",
            "bilevel.objective",
            "bilevel.averaging",
            "bilevel.balancing",
            "bilevel.sharpness",
            "bilevel.optim",
        ),
    ),
    "methods": (
        "The table of methods",
        (
            *("methods.table", "methods.learners", "methods.sampling", "methods.heads"),
            *("methods.smote", "methods.gaussians"),
        ),
    ),
    "data": (
        "Data",
        ("data.longtail", "data.noise", "data.manifest", "data.assembly", "data.sources", "data.own", "data.batches"),
    ),
    "evaluation": (
        "Evaluation",
        ("evaluation.metrics", "evaluation.intervals", "evaluation.conformal", "evaluation.classifier"),
    ),
    "running": (
        "Models, devices, runs",
        (
            "estimator",
            "models.catalog",
            "models.own",
            "models.normalization",
            "machine.parallel",
            "training.train",
            "training.own_loop",
            "config.schema",
            "errors",
        ),
    ),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made here."""
    for path, text in made().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leads links of a page to files outside `docs/` to where the site has them."""
    return relinked(markdown, f"docs/{page.file.src_uri}")


def made() -> dict[str, str | bytes]:
    """Returns what is made, by its path below `docs/`: the text of each page, and the pictures of the notebooks."""
    pages = {to.removeprefix("docs/"): relinked((ROOT / of).read_text(), of, to) for of, to in AT_ROOT.items()}
    pages |= {f"reference/{name}.md": _of_modules(*told) for name, told in MODULES.items()}
    pages |= {
        "reference/index.md": _public_names(),
        "reference/commands.md": _commands(),
        "reference/fields.md": _fields(),
    }
    return pages | _tutorials()


def relinked(markdown: str, source: str, page: str = "") -> str:
    """Returns `markdown` of the file `source` as the page `page` (`source`, if empty), both below the root.

    A link to a file that the site does not have becomes the name of the file, one to a notebook leads to its page.
    """

    def link(found: re.Match[str]) -> str:
        text, path, anchor = found.groups("")
        to = os.path.normpath(os.path.join(os.path.dirname(source), path))
        to = re.sub(r"^(docs/.*)\.ipynb$", r"\1.md", AT_ROOT.get(to, to))
        if not to.startswith("docs/"):
            return f"`{to}`" if text.strip("`") == to else f"{text} (`{to}`)"
        return f"[{text}]({os.path.relpath(to, os.path.dirname(page or source))}{anchor})"

    return re.sub(r"(?<!!)\[([^\]\[]*)\]\(((?!\w+:)[^)\s#]+)(#[^)\s]*)?\)", link, markdown)


def _tutorials() -> dict[str, str | bytes]:
    """Returns a page for each notebook, with the outputs that are stored in it, and its pictures."""
    found: dict[str, str | bytes] = {}
    for path in sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")):
        text, more = MarkdownExporter().from_filename(str(path), resources={"unique_key": path.stem})
        found |= {f"tutorials/{name}": picture for name, picture in more["outputs"].items()}
        found[f"tutorials/{path.stem}.md"] = f"{text}\n*This page is the notebook* `docs/tutorials/{path.name}`.\n"
    return found


def _of_modules(title: str, modules: tuple[str, ...]) -> str:
    parts = [
        f"## `mfm_jax.{name}` {{ #mfm_jax.{name} }}\n\n::: mfm_jax.{name}\n    options:\n      heading_level: 3\n"
        for name in modules
    ]
    return "\n".join([f"# {title}\n", *parts])


def _public_names() -> str:
    """Returns the page that lists the names of `mfm_jax.__all__`, each with the first sentence of its docstring."""
    package = griffe.load("mfm_jax", search_paths=[str(ROOT)])
    package_of = {f"mfm_jax.{name}": page for page, (_, names) in MODULES.items() for name in names}
    lines = []
    for name in mfm_jax.__all__:
        one = package[mfm_jax._MODULE[name].removeprefix("mfm_jax.")].members.get(name)
        one = one or package[f"{mfm_jax._MODULE[name]}.{name}".removeprefix("mfm_jax.")]
        one = one.final_target if one.is_alias else one
        first = one.docstring.value.split("\n\n")[0].replace("\n", " ") if one.docstring else ""
        home = one.path if one.is_module else one.parent.path
        lines.append(f"| [`{name}`]({package_of[home]}.md#{one.path}) | {_cell(first)} |")
    pages = "\n".join(f"- [{title}]({name}.md): {_in_code(modules)}" for name, (title, modules) in MODULES.items())
    return (
        "# Reference\n\n[Every command](commands.md) with its flags, [every field of a config](fields.md), and the"
        " Python names. `import mfm_jax as mfm` has these; each is imported when it is first used:\n\n"
        "| name | |\n|---|---|\n" + "\n".join(lines) + f"\n\nThe modules, with all their public names:\n\n{pages}\n"
    )


def _in_code(modules: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in modules)


def _fields() -> str:
    """Returns the page of all config fields, a table for each group."""
    parts = [
        "# Config fields\n\nA field is set in a config file (`config.optim.learning_rate = 0.05`) or on the command"
        " line (`--config.optim.learning_rate=0.05`). `mfm-jax fields` prints the same list. A run that has begun goes"
        " on with another value only of a field that is marked *may change*, or"
        " [for more epochs](../using.md#going-on).\n"
    ]
    for group, cls in GROUPS.items():
        rows = [
            f"| `{one.path}` | `{one.default!r}` | {_cell(one.allowed)} | {_cell(one.meaning)}"
            f"{'; *may change*' if one.may_change else ''} |"
            for one in FIELDS.values()
            if one.path.startswith(f"{group}.")
        ]
        about = (cls.__doc__ or "").split("\n\n")[0]
        parts.append(
            f"## {group}\n\n{about}\n\n| field | default | allowed | meaning |\n|---|---|---|---|\n" + "\n".join(rows)
        )
    return "\n\n".join(parts) + "\n"


def _commands() -> str:
    """Returns the page of all commands: the help of each, and every flag that it has."""
    parts = ["# Commands\n", _block(manual.text("", shipped.shipped()))]
    for name, (arguments, _, _) in manual.COMMANDS.items():
        parts.append(f"## {name}\n\n`mfm-jax {name} {arguments}`\n\n{_block(manual.text(name, ()))}")
        if name in cli._DOORS:
            parts.append(f"Every flag:\n\n{_flags(cli._DOORS[name][0])}")
    return "\n\n".join(parts) + "\n"


def _flags(door: str) -> str:
    """Returns a table of the flags of the module behind a command, or its own help where argparse reads them."""
    module = importlib.import_module(f"mfm_jax.{door}")
    if door in ("audit", "predict", "export"):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            module.main([door, "--help"])
        return _block(out.getvalue())
    defined = flags.FLAGS.flags_by_module_dict()
    rows = [
        f"| `--{one.name}` | {_default(one.default)} | {_cell(one.help)} |"
        for owner in ("mfm_jax.command", module.__name__)
        for one in defined[owner]
    ]
    return "| flag | default | meaning |\n|---|---|---|\n" + "\n".join(rows)


def _default(value: Any) -> str:
    value = ",".join(value) if isinstance(value, list) else value
    return "" if value in (None, "") else f"`{value}`"


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")
