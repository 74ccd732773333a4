"""What `mfm-jax --help` and `mfm-jax COMMAND --help` print: what is required first, then the flags most used."""

import textwrap
from collections.abc import Iterable

_ABOUT = """\
mfm-jax: image classifiers for long-tailed data, with the Meta Feature Modulator.

Training needs a config and a folder to write to, anything after it that folder alone:

    mfm-jax train digits_lt --workdir=runs/first
    mfm-jax evaluate runs/first

CONFIG  a file, or the name of one that is shipped:
{configs}
RUN     the folder of a run, its --workdir

{commands}

mfm-jax COMMAND --help says more. Any field of a config is set by --config.GROUP.FIELD=VALUE, on every command with a
CONFIG; mfm-jax fields lists them. `python -m mfm_jax` is the same command.

Exit status: 0 done; 1 done but for some pictures or methods, which are named; 2 a mistake, in one line; 75
interrupted and saved: the same command goes on.
"""

_FIELDS = """\
Any field of the config: --config.GROUP.FIELD=VALUE, e.g.
  --config.train.epochs=20 --config.optim.learning_rate=0.05 --config.method.name=ce
mfm-jax fields lists them with their defaults, values and meanings; mfm-jax fields train those of a group. Every flag:
--helpfull.
"""
_REQUIRED = """\
required:
  CONFIG, or --config=CONFIG   a config file, or the name of a shipped one, e.g. digits_lt (mfm-jax --help lists them)
  --workdir=FOLDER             everything is written there
"""

# command: (its arguments, what it does, more).
COMMANDS = {
    "train": (
        "CONFIG --workdir=FOLDER",
        "train and evaluate one run",
        f"""\
{_REQUIRED}
In a folder that holds a run, the CONFIG is that of the run: mfm-jax train RUN goes on with it.

common:
  --config.data.root=FOLDER    where your pictures, or the prepared data, lie
  --config.method.name=NAME    mfm, or another method, e.g. ce
  --config.train.epochs=N      passes over the training set
  --config.train.seed=N        another seed, another run
  --config.train.max_steps=N   stop after N steps, for a trial
  --init_modulator_from=RUN    start from the modulator of another run
  --preemption_notice=FILE     save and stop when this file appears

{_FIELDS}""",
    ),
    "compare": (
        "CONFIG --workdir=FOLDER",
        "train several methods and seeds, and compare them on a page",
        f"""\
{_REQUIRED}
common:
  --methods=A,B                methods, the baseline first (ce,mfm)
  --seeds=0,1                  training seeds (0,1,2)
  --jobs=N                     runs side by side (1)
  --together                   all seeds of a method in one program
  --tune=N                     tune every method on validation first, N runs each (0)

{_FIELDS}""",
    ),
    "tune": (
        "CONFIG --workdir=FOLDER",
        "tune methods on validation, then compare them as tuned",
        f"""\
{_REQUIRED}
common, those of compare:
  --tune=N                     runs for each method (10)
  --methods=A,B                methods, the baseline first (ce,mfm)
  --seeds=0,1                  training seeds after tuning (0,1,2)
  --jobs=N                     runs side by side (1)

Tuning needs validation images, e.g. --config.data.val_images_per_class=10.

{_FIELDS}""",
    ),
    "check": (
        "CONFIG --workdir=FOLDER",
        "check your pictures and report what is wrong; trains nothing",
        f"""\
{_REQUIRED}
For example:
  mfm-jax check folder_lt --workdir=runs/mine --config.data.root=PICTURES

{_FIELDS}""",
    ),
    "audit": (
        "RUN",
        "find likely wrong labels, outliers and near duplicates",
        """\
required:
  RUN                          the folder of a run, whose training images are looked at

common:
  --folds=N                    runs of its config, each of which holds out another part (3)
  --jobs=N                     runs side by side (1)

Needs the extra audit. The same command goes on where it was interrupted.
""",
    ),
    "evaluate": (
        "RUN",
        "evaluate a run again, or on other pictures",
        """\
required:
  RUN                          the folder of a run, from which its config and its data are known

common:
  --split=NAME                 test, val or train, of the run's own data
  --eval_folder=FOLDER         in the place of a split: a folder with a folder of pictures for each class
  --out=FOLDER                 where to write (RUN/eval/SPLIT)
  --config.data.root=FOLDER    where the data lies now; data.workers and eval.batch_size may be others, too

Pretrained weights without a run: --config=CONFIG --workdir=FOLDER --config.model.pretrained=FILE.
""",
    ),
    "predict": (
        "RUN PICTURES...",
        "name the classes of pictures, in a CSV table",
        """\
required:
  RUN                          the folder of a run
  PICTURES...                  files, and folders of them

common:
  --out=FILE                   the table (predictions.csv)
  --which=best                 the checkpoint that was best on validation (last)
  --top=N                      classes to name for each picture (5)
  --probabilities              the probability of every class, too
  --batch_size=N               pictures at a time (64)
  --workers=N                  processes that decode (2)
""",
    ),
    "export": (
        "RUN",
        "write the classifier to files that need JAX alone, with a model card",
        """\
required:
  RUN                          the folder of a finished run

common:
  --out=FOLDER                 where to write (RUN/exported)
  --which=best                 the checkpoint that was best on validation (last)
  --onnx                       an ONNX file, too (needs the extra onnx)
  --hub=FOLDER                 in their place: weights, config and card in a folder as model hubs take it
  --license=ID                 with --hub: the license of the weights, such as apache-2.0 (unknown)
""",
    ),
    "fields": (
        "[GROUP or FIELD]",
        "list the fields of a config",
        """\
Without an argument all of them, with their defaults, allowed values and meanings. Examples:
  mfm-jax fields optim
  mfm-jax fields meta.every
  mfm-jax fields learning_rate
""",
    ),
}


def text(command: str, configs: Iterable[str]) -> str:
    """Returns the help of a command, or that of all for ""; `configs` are the names of those that are shipped."""
    if command:
        arguments, what, more = COMMANDS[command]
        return f"mfm-jax {command} {arguments}: {what}\n\n{more}"
    lines = (f"  mfm-jax {name} {arguments}".ljust(44) + what for name, (arguments, what, _) in COMMANDS.items())
    names = textwrap.fill(", ".join(configs), 118, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return _ABOUT.format(configs=names, commands="\n".join(lines))
