"""What the commands share: the `--config` flag, its overrides, and one line for an error."""

import argparse
import difflib
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from mfm_jax import shipped
from mfm_jax.config import FIELDS, GROUPS, lookup
from mfm_jax.errors import UserError, in_a_line
from mfm_jax.machine import cache, cluster
from mfm_jax.machine.disk import expanded
from mfm_jax.machine.interruption import EXIT_INTERRUPTED, NOTICE, Interrupted, terminable
from mfm_jax.workdir import stored
from mfm_jax.workdir.files import Workdir

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A config file, or the name of one that is shipped.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run folder, for everything that is written.")
_NOTICE = flags.DEFINE_string(
    "preemption_notice",
    "",
    f"File that appears when the machine is to be taken away: the run saves and exits with status {EXIT_INTERRUPTED}.",
)
_NO_CONFIG = "--config: missing; give a config, e.g. --config=digits_lt, or the --workdir of a run"
_OUT_OF_MEMORY = (
    "the device has too little memory: lower train.batch_size or meta.batch_size, raise train.accumulate, or set"
    " model.remat; what was saved stays"
)
_BOOLEANS = ("true", "false", "t", "f", "1", "0")


def config() -> ml_collections.ConfigDict:
    """Returns the config file's content with the command line's overrides."""
    return _CONFIG.value


def workdir() -> Path:
    """Returns `--workdir`; a leading `~`, which a shell does not expand after `=`, is the home folder."""
    return expanded(_WORKDIR.value or "")


def to_train() -> str:
    """Returns the command that trains with the arguments that were given to this one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--mode", "-mode")
    return shlex.join(["mfm-jax", "train", *parser.parse_known_args(sys.argv[1:])[1]])


def run(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Runs `main(argv)` under absl and exits with its status; a `UserError` is printed as one line, status 2."""
    app.run(lambda argv: guarded(main, argv), flags_parser=parse)


class Parser(argparse.ArgumentParser):
    """The arguments of a command that needs no config; a mistake in them ends the program with one line, status 2."""

    def __init__(self, name: str, about: str | None):
        """Makes one for `python -m mfm_jax.NAME`; `--help` prints `about`."""
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(f"python -m mfm_jax.{name}", description=about, formatter_class=form, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def whole_number(text: str, least: int = 1) -> int:
    """Returns an argument that counts something: `least` or more."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed: whole numbers from {least}")
    return int(text)


def guarded(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Returns the status of `main(argv)`; an expected end (a mistake, a signal, a full device) prints one line."""
    try:
        return cluster.leave(_status(main, argv))
    except Exception:  # whatever it is, the other processes must not wait for this one
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        return cluster.leave(1)


def _status(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    logging.set_verbosity(logging.FATAL)  # Orbax logs every step of every save, and the tracebacks of a failed one
    # A program that was compiled once is not compiled again, by this run's continuation or by the next seed's.
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(cache.folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # the many small programs of a start too
    try:
        with terminable():
            return main(argv)
    except (UserError, OSError) as error:  # OSError: a full disk, a folder without permission
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more Ctrl-C finds an interpreter half taken down
        if cluster.is_primary():
            print(error if isinstance(error, Interrupted) else Interrupted(), file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            print(f"error: {_OUT_OF_MEMORY} ({in_a_line(error)})", file=sys.stderr)
            return 2
        if not cluster.reported_lost(error):
            raise
        return EXIT_INTERRUPTED


def parse(argv: Sequence[str]) -> Sequence[str]:
    """Parses the flags; a mistake in them ends the program with one line."""
    try:
        check_overrides(argv[1:])
        rest = _load(_completed(argv))
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r}: not understood; {_way_out(rest[1])}")
        if not flags.FLAGS["config"].present:
            raise UserError(_NO_CONFIG)
        if not isinstance(_CONFIG.value, ml_collections.ConfigDict):
            path = config_flags.get_config_filename(flags.FLAGS["config"])
            near = difflib.get_close_matches(path, shipped.shipped(), 1)
            meant = f"; did you mean --config={near[0]}?" if near else ""
            raise UserError(f"--config={path}: no such file, or its get_config() does not return a ConfigDict{meant}")
        if not _WORKDIR.value:
            raise UserError("--workdir: missing; give a folder for what is written, e.g. --workdir=runs/first")
    except (UserError, OSError, flags.Error) as error:  # OSError: a name that no file can have
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    if _NOTICE.value:
        os.environ[NOTICE] = _NOTICE.value  # for the processes that this one starts, too
    return rest


def _completed(argv: Sequence[str]) -> Sequence[str]:
    """Returns `argv` with `--config` first and as a path; where it is not given, that of the run in `--workdir`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "workdir"):
        parser.add_argument(f"--{name}", f"-{name}", nargs="?", const="")
    known, rest = parser.parse_known_args(argv[1:])
    config = None if known.config is None else shipped.path_of(known.config)
    workdir = expanded(known.workdir or "")
    if config is None and known.workdir and Workdir(workdir).config.exists():
        Workdir(workdir).read_config()
        config = f"{stored.__file__}:{workdir}"
    given = {"config": config, "workdir": known.workdir}
    return [argv[0], *(f"--{name}={value}" for name, value in given.items() if value is not None), *rest]


def _way_out(word: str) -> str:
    """Returns what to do about an argument that is no flag."""
    name, assigned, value = word.partition("=")
    if word.endswith(".py") or word in shipped.shipped():
        return f"did you mean --config={word}?"
    if assigned and (fields := lookup.meant(name)):
        return f"did you mean --config.{fields[0]}={value}?"
    return "every argument starts with --"


def _load(argv: Sequence[str]) -> Sequence[str]:
    """Parses the flags, which runs the config file: a program, which can raise anything."""
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        if error.flagname.startswith("config."):  # fields are flags only where there is a config
            raise UserError(_NO_CONFIG) from error
        if question := lookup.question(error.flagname):
            raise UserError(f"--{error.flagname}: no such flag; {question}") from error
        raise
    except flags.Error:
        raise
    except Exception as error:
        lines = [f"line {f.lineno}: " for f in traceback.extract_tb(error.__traceback__) if f.name == "get_config"]
        what = f"{''.join(lines[-1:])}{type(error).__name__}: {error}"
        raise UserError(f"--config: the config file or an override cannot be used: {what}") from error


def check_overrides(arguments: Sequence[str]) -> None:
    """Refuses a `--config.group.field=value` of an unknown field, or with a value of another type."""
    for argument in arguments:
        match = re.fullmatch(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if not match:
            continue
        path, text = match.groups()
        group = path.partition(".")[0]
        if path not in FIELDS and (question := lookup.question(path)):
            raise UserError(f"{path}: no such field; {question}")
        if group not in GROUPS:
            raise UserError(f"{path}: no such field; allowed groups: {', '.join(GROUPS)}")
        if path not in FIELDS:
            allowed = (known for known in FIELDS if known.startswith(f"{group}."))
            raise UserError(f"{path}: no such field; allowed: {', '.join(allowed)}")
        if text is not None and not _is_a(FIELDS[path].kind, text):
            raise UserError(f"{path} = {text!r}: expected {FIELDS[path].kind.__name__}")


def _is_a(kind: type, text: str) -> bool:
    if kind is bool:
        return text.lower() in _BOOLEANS
    try:
        kind(text)
    except ValueError:
        return False
    return True
