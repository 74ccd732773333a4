"""The command `mfm-jax`: finds out which door is asked for, and hands over to it.

All is done by `main`, `compare`, `audit`, `predict` and `export`, with the arguments that these have anyway, but for
help and `fields`. What takes long to import, as JAX does, is imported where it is needed.
"""

import difflib
import importlib
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import mfm_jax
from mfm_jax import manual, shipped
from mfm_jax.errors import UserError
from mfm_jax.machine import allocator

# command: (the module that does it, arguments that come first, the flag of the RUN that it needs).
_DOORS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "train": ("main", (), ""),
    "compare": ("compare", (), ""),
    "tune": ("compare", ("--tune=10",), ""),
    "check": ("main", ("--mode=check",), ""),
    "evaluate": ("main", ("--mode=eval",), "--workdir"),
    "audit": ("audit", (), "--checkpoint"),
    "predict": ("predict", (), "--checkpoint"),
    "export": ("export", (), "--checkpoint"),
}
_HELP = {"--help", "-h", "-help"}


def main() -> int:
    """Does what the command line says; returns the exit status."""
    sys.path.insert(0, str(Path.cwd()))  # where `python -m mfm_jax` looks for the user's own modules, too
    try:
        return _do(sys.argv[1:])
    except (UserError, OSError) as error:  # OSError: a name that no file can have
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _do(arguments: Sequence[str]) -> int:
    name, *rest = arguments or ["--help"]
    if name == "--version":
        print(f"mfm-jax {mfm_jax.__version__}")
        return 0
    if name not in manual.COMMANDS and name not in _HELP:
        raise UserError(_no_command(name))
    if not _HELP.isdisjoint((name, *rest)):
        print(manual.text("" if name in _HELP else name, shipped.shipped()), end="")
        return 0 if arguments else 2
    if name == "fields":
        _print_fields(rest or [""])
        return 0
    door, sys.argv[1:] = handed_over(name, rest)  # where overrides are looked for, too
    if door in ("main", "predict"):
        allocator.keep_freed_memory()  # before an import starts threads
    from mfm_jax import command

    module = importlib.import_module(f"mfm_jax.{door}")
    if door in ("audit", "predict", "export"):
        return command.guarded(module.main, sys.argv)
    command.run(module.main)


def _no_command(name: str) -> str:
    if near := difflib.get_close_matches(name, manual.COMMANDS, 1):
        return f"{name}: no such command; did you mean mfm-jax {near[0]}?"
    if name.startswith("-") or shipped.path_of(name) in map(str, shipped.shipped().values()):
        return f"{name}: a command comes first, e.g. mfm-jax train {name}"
    return f"{name}: no such command; there are {', '.join(manual.COMMANDS)}"


def handed_over(command: str, arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the module that does a command, and the arguments that it gets.

    A first word without dashes is a run, or else a config.

    Raises:
      UserError: there has to be a run, and is none.
    """
    door, first, run = _DOORS[command]
    word, *rest = arguments or [""]
    if not word or word.startswith("-"):
        if run and not any(one.startswith(run) for one in arguments):
            raise UserError(f"a run comes first: mfm-jax {command} {manual.COMMANDS[command][0]}")
        return door, [*first, *arguments]
    from mfm_jax.workdir.files import Workdir

    is_run, flag = Workdir(Path(word)).config.exists(), run or "--workdir"
    if not run and (door != "main" or not Path(word).is_dir() or (word in shipped.shipped() and not is_run)):
        return door, [*first, f"--config={word}", *rest]
    if not is_run:
        pictures = f"mfm-jax {command} folder_lt --workdir=runs/mine --config.data.root={word}"
        raise UserError(f"{word}: no run there; {'give the folder of one' if run else f'of pictures: {pictures}'}")
    if any(one.partition("=")[0] == flag for one in rest):
        raise UserError(f"{word}: {flag} names a run, too; leave one of them out")
    return door, [*first, f"{flag}={word}", *rest]


def _print_fields(words: Sequence[str]) -> None:
    """Prints the fields that `words` name: a table for each group in a terminal, elsewhere a line for each field."""
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table

    from mfm_jax.config import GROUPS, lookup

    fields = [field for word in words for field in lookup.fields_of(word)]
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        for field in fields:
            print(f"{field.path} = {field.default!r} ({field.allowed}): {field.meaning}")
        return
    for group, members in itertools.groupby(fields, lambda field: field.path.partition(".")[0]):
        columns = (Column("field", no_wrap=True), "default", "allowed", "meaning")
        table = Table(*columns, title=GROUPS[group].__doc__, title_justify="left", box=box.SIMPLE_HEAD)
        for field in members:
            table.add_row(field.path, repr(field.default), field.allowed, field.meaning)
        console.print(table)
