"""Find likely wrong labels, outliers and near duplicates among the training images of a run.

    python -m mfm_jax.audit --checkpoint=runs/mine --folds=3

The training images are dealt to folds. For each a run of the same config is trained without it, and
answers it; confident learning (`evaluation.suspects`) finds from these answers which labels are likely wrong. Outliers
and near duplicates come from the features of the run's own last checkpoint. The test split is not looked at. Writes
`suspects.csv` and `suspects.html` to the folder `label_audit` of the run, below which the folds are; finished folds are
not trained again. Needs the extra `audit`. Exit status: 0 done; 2 a mistake, in one line; 75 interrupted, saved.
"""

import functools
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mfm_jax import command
from mfm_jax import data as data_lib
from mfm_jax.data import batches
from mfm_jax.data.manifest import read_manifest
from mfm_jax.data.sources import Images
from mfm_jax.errors import UserError
from mfm_jax.evaluation import classifier, suspects
from mfm_jax.evaluation.suspects import Suspect
from mfm_jax.machine import disk
from mfm_jax.machine.disk import expanded
from mfm_jax.pages import audit as page
from mfm_jax.study import folds as folds_lib
from mfm_jax.study.runs import Task
from mfm_jax.workdir.files import Workdir

HEADER = ("picture", "label", "likely_label", "probability", "score", "kind", "other", "other_label")
BATCH = 64  # images at a time


def audit(workdir: Path, folds: int = 3, jobs: int = 1) -> tuple[list[Suspect], Path]:
    """Returns the suspects among the training images of a run, and the page on them; trains what it takes.

    Columns of `suspects.csv`, a row for each suspect: the `picture`, by path or as the number of its record; its
    `label`; the `likely_label`, to which the network that had not seen it gives most, with its `probability`; `score`
    (of `Suspect`); `kind`; and `other`, the picture that a near duplicate repeats, with `other_label`.

    `folds` runs, 2 or more, each hold out another part; `jobs` of them are trained side by side.

    Raises:
      UserError: no run there, cleanlab is not installed, other data than the run's, or a fold that failed.
      Interrupted: everything is saved.
    """
    suspects.installed()
    run, trained = Workdir(workdir), classifier.load(workdir)
    config, extract = trained.config, trained.features
    assert extract is not None
    data = data_lib.build(config)
    run.check_split(data.manifest)
    if config.data.group:
        print(f"warning: data.group = {config.data.group!r}: folds divide groups, which hides errors", file=sys.stderr)
    where = folds_lib.dealt(data)
    images, labels = data.train_images[where], data.train_labels[where]
    features, copies = _answers(images, extract), _answers(images, _digests).tolist()
    fold = folds_lib.deal(labels, copies, folds, config.data.seed)
    answered = np.flatnonzero(fold >= 0)
    if not len(answered):
        raise UserError(f"--folds={folds}: no class of {data.name} has two training images, so none can be held out")
    probabilities = np.full((len(fold), data.num_classes), np.nan, np.float32)
    planned = folds_lib.plan(config, data, fold, run.audit / f"folds{folds}")
    _warn_of_leaks(planned)
    folds_lib.train(planned, jobs)
    for number, one in enumerate(planned):
        held = np.flatnonzero(fold == number)
        probabilities[held] = _answers(images[held], classifier.load(one.workdir).probabilities)
    wrong = suspects.wrong_labels(probabilities[answered], labels[answered])
    wrong = [one._replace(image=int(answered[one.image])) for one in wrong]
    if len(data.wrong_labels):
        changed = labels != data.true_labels[where]
        print(f"of {changed.sum():,} labels made wrong, {changed[[one.image for one in wrong]].sum():,} are found")
    found = wrong + suspects.by_features(features, labels)
    ids, files = data.manifest["splits"]["train"]["ids"], data.manifest.get("files")
    named = [files[ids[i]] if files else str(ids[i]) for i in where.tolist()]  # a path, or the number of a record
    rows = [_row(one, named, labels, probabilities, data.class_names) for one in found]
    disk.write_rows(run.audit / "suspects.csv", [HEADER, *(row.values() for row in rows)])
    out = run.audit / "suspects.html"
    right = float((probabilities[answered].argmax(1) == labels[answered]).mean())
    looked = page.Looked(len(answered), folds, right)
    page.write(out, data.name, list(zip(found, rows, strict=True)), images, looked)
    return found, out


def _warn_of_leaks(planned: Sequence[Task]) -> None:
    """Warns where a run that folds start or learn from knows the labels of images that they hold out."""
    config = planned[0].config
    for field, source in (("method.teacher", config.method.teacher), ("model.init_from", config.model.init_from)):
        known = source and any(
            Workdir(expanded(source)).leaks(read_manifest(one.config.data.manifest)) for one in planned
        )
        if known:
            why = "was trained on images that folds hold out, and may repeat their labels"
            print(f"warning: {field} = {source!r}: {why}; audit a run without it", file=sys.stderr)


def _answers(images: Images, of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Returns what `of` gives for each image `[N, ...]`, in batches of one size."""
    return np.concatenate([of(batch)[mask] for batch, mask in batches.eval_batches(images, BATCH)])


def _digests(images: np.ndarray) -> np.ndarray:
    return np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in images])


def _row(
    one: Suspect, named: Sequence[str], labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]
) -> dict[str, str]:
    answer = probabilities[one.image]
    unknown = bool(np.isnan(answer).any())  # of a class that was not held out
    values = (
        named[one.image],
        class_names[labels[one.image]],
        "" if unknown else class_names[answer.argmax()],
        "" if unknown else f"{answer.max():.4f}",
        f"{one.score:.4f}",
        one.kind,
        "" if one.other < 0 else named[one.other],
        "" if one.other < 0 else class_names[labels[one.other]],
    )
    return dict(zip(HEADER, values, strict=True))


def main(argv: Sequence[str]) -> int:
    parser, number = command.Parser("audit", __doc__), command.whole_number
    parser.add_argument("--checkpoint", type=Path, required=True, help="workdir of the run")
    at_least_two = functools.partial(number, least=2)
    parser.add_argument("--folds", type=at_least_two, default=3, help="runs, each without another part (%(default)s)")
    parser.add_argument("--jobs", type=number, default=1, help="runs side by side (%(default)s)")
    options = parser.parse_args(argv[1:])
    found, out = audit(options.checkpoint, options.folds, options.jobs)
    print(page.in_words(found))
    print(f"table: {out.with_suffix('.csv')}")
    print(f"open {out}")
    return 0


if __name__ == "__main__":
    sys.exit(command.guarded(main, sys.argv))
