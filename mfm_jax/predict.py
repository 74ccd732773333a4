"""Classify pictures with a trained run; its data set is not needed.

    python -m mfm_jax.predict --checkpoint=runs/cifar10 pictures/ one.jpg --out=predictions.csv

Takes files and folders, with the folders below them; hidden files, and files that are no pictures by their names, are
passed over and counted on the standard error. Writes a CSV file with a row for each picture: path, class, probability,
and the next likely classes. Of a run with `eval.costs` or `eval.recall` the class that these name follows. Where the
run had validation images, the prediction set follows: the classes among which the true one is as often as
`eval.coverage` promises. A file that cannot be read has a row too, with the reason in the column `problem`. An
interrupted command leaves its rows in OUT.part; the same command starts anew. Exit status: 0 every picture was read; 1
some could not be, the others are in the file; 2 a mistake in the command or the run, in one line, and no file; 75
interrupted.
"""

if __name__ == "__main__":  # before the other imports start threads; being imported changes no process
    from mfm_jax.machine import allocator

    allocator.keep_freed_memory()

import csv
import functools
import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import progress

from mfm_jax import command
from mfm_jax.data import decode, walk
from mfm_jax.data.decode import Decoded
from mfm_jax.errors import UserError
from mfm_jax.evaluation.classifier import WHICH, Classifier
from mfm_jax.evaluation.classifier import load as load
from mfm_jax.evaluation.conformal import Sets
from mfm_jax.evaluation.decisions import Decisions
from mfm_jax.machine.interruption import EXIT_INTERRUPTED, Interrupted


class Counts(NamedTuple):
    """How many files were read, and how many could not be or were passed over."""

    read: int
    unread: int
    passed: Mapping[str, int]  # by kind


def write_csv(
    classifier: Classifier,
    places: Sequence[Path],
    out: Path,
    *,
    top: int = 5,
    all_classes: bool = False,
    batch_size: int = 64,
    workers: int = 2,
) -> Counts:
    """Writes one row for each picture in `places`, in order: its class, and how sure the classifier is.

    Columns: `path`, `class`, `probability`, `problem`, then the next likely classes `class_2`, `probability_2` up to
    `top`, then, of a classifier with costs or wanted recalls, `decision`, the class that these name, and its
    `expected_cost`, then, of one with prediction sets, `set_size` and `set`, the names in the set with ` | ` between,
    the likeliest first, then, with `all_classes`, `probability of NAME` of every class. A file that cannot be read has
    the reason in `problem`, and the others empty. Rows go to `OUT.part` as they come, which becomes `out` at the end.

    Args:
      classifier: of `load`.
      places: files, and folders whose pictures are taken, those below included.
      out: the CSV file, UTF-8.
      top: classes a picture, K at most.
      all_classes: also the probability of every class.
      batch_size: pictures at a time; memory grows with it, and not with the number of pictures.
      workers: processes that decode; 0 decodes in this one.

    Raises:
      UserError: a place that does not exist, no pictures, a classifier of images that are not square, or a file that
        cannot be written.
    """
    if out.is_dir():
        raise UserError(f"--out={out}: a folder; name a file")
    passed: Counter[str] = Counter()
    total = sum(1 for _ in walk.given(places, passed))
    if not total:
        beside = f"; {walk.in_words(passed)}" if passed else ""
        raise UserError(f"{', '.join(map(str, places))}: no pictures there{beside}")
    names, unread = classifier.class_names, 0
    form = Form(names, min(top, len(names)), classifier.sets, all_classes, classifier.decisions)
    part = out.with_name(f"{out.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file, _progress_bar() as bar:
        writer, task = csv.writer(file), bar.add_task(out.name, total=total)
        writer.writerow(form.header())
        for batch, probabilities in predicted(classifier, walk.given(places, Counter()), batch_size, workers):
            for item, row in zip(batch, probabilities, strict=True):
                writer.writerow(form.row(item, row))
            unread += sum(item.image is None for item in batch)
            file.flush()
            bar.advance(task, len(batch))
    part.replace(out)
    return Counts(total - unread, unread, dict(passed))


def predicted(
    classifier: Classifier, paths: Iterable[Path], batch_size: int, workers: int
) -> Iterator[tuple[tuple[Decoded, ...], np.ndarray]]:
    """Yields (B decoded files, their probabilities float32 `[B, K]`), B at most `batch_size`; rows of unread ones mean
    nothing.

    Raises:
      UserError: the classifier takes images that are not square.
    """
    facts, (height, width, channels) = classifier.facts, classifier.image_shape
    if height != width:
        raise UserError(f"the classifier takes images of {width} x {height} pixels; train with data.image_size")
    stream = decode.decoded(paths, height, channels, facts.fit, facts.white, workers)
    while batch := tuple(itertools.islice(stream, batch_size)):
        images = np.zeros((batch_size, *classifier.image_shape), np.uint8)  # always as many: compiled once
        for image, item in zip(images, batch, strict=False):
            if item.image is not None:
                image[:] = item.image
        yield batch, classifier.probabilities(images)[: len(batch)]


class Form(NamedTuple):
    """What a row has: K class names, the `top` likeliest, a decision, a set, and the probability of every class."""

    names: Sequence[str]
    top: int
    sets: Sets | None
    all_classes: bool
    decisions: Decisions | None = None

    def header(self) -> list[str]:
        further = [f"{column}_{rank}" for rank in range(2, self.top + 1) for column in ("class", "probability")]
        of_set = ["set_size", "set"] if self.sets else []
        of_all = [f"probability of {name}" for name in self.names if self.all_classes]
        decided = ["decision", "expected_cost"] if self.decisions else []
        return ["path", "class", "probability", "problem", *further, *decided, *of_set, *of_all]

    def row(self, item: Decoded, probs: np.ndarray) -> list[Any]:
        if item.image is None:
            return [item.path, "", "", item.problem, *[""] * (len(self.header()) - 4)]
        order = np.argsort(-probs, kind="stable")
        first, *further = ((self.names[k], f"{probs[k]:.6g}") for k in order[: self.top])
        of_set: list[Any] = []
        decided: list[Any] = []
        if self.decisions:
            named = int(self.decisions.named(probs[None])[0])
            decided = [self.names[named], f"{self.decisions.expected(probs)[named]:.6g}"]
        if self.sets:
            members = [self.names[k] for k in order if self.sets.members(probs)[k]]
            of_set = [len(members), " | ".join(members)]
        of_all = [f"{p:.6g}" for p in probs if self.all_classes]
        return [item.path, *first, "", *itertools.chain(*further), *decided, *of_set, *of_all]


def _progress_bar() -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv[1:])
    trained = load(options.checkpoint, options.which)
    try:
        given = {name: getattr(options, name) for name in ("top", "all_classes", "batch_size", "workers")}
        counts = write_csv(trained, options.places, options.out, **given)
    except (Interrupted, KeyboardInterrupt):
        print(f"interrupted; the rows so far are in {options.out}.part", file=sys.stderr)
        return EXIT_INTERRUPTED
    if counts.passed:
        print(walk.in_words(counts.passed), file=sys.stderr)
    unread = f"; {counts.unread:,} could not be read (column `problem`)" if counts.unread else ""
    print(f"{options.out}: {counts.read:,} pictures{unread}")
    return 1 if counts.unread else 0


def _parser() -> command.Parser:
    parser, number = command.Parser("predict", __doc__), command.whole_number
    parser.add_argument("places", nargs="+", type=Path, metavar="PICTURES", help="files and folders")
    parser.add_argument("--checkpoint", type=Path, required=True, help="workdir of the run")
    parser.add_argument("--out", type=Path, default=Path("predictions.csv"), help="the CSV file (%(default)s)")
    parser.add_argument("--which", choices=WHICH, default="last", help="checkpoint (%(default)s)")
    parser.add_argument("--top", type=number, default=5, help="classes to name for each picture (%(default)s)")
    every = "also write the probability of every class"
    parser.add_argument("--probabilities", dest="all_classes", action="store_true", help=every)
    parser.add_argument("--batch_size", type=number, default=64, help="pictures at a time (%(default)s)")
    any_number = functools.partial(number, least=0)
    parser.add_argument("--workers", type=any_number, default=2, help="processes that decode; 0: none (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(command.guarded(main, sys.argv))
