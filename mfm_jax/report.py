"""One HTML page that shows a finished run, built from nothing but the files the run left in its workdir.

A long-tailed result is a trade between classes, so a page that prints one accuracy explains nothing. This one
puts side by side what a reader needs to judge a run: how many images each class had and how well it came out,
what the last epoch gave and what selection on validation would have given, where the confusions go, whether
the confidences can be trusted, how training went, and what the modulation learned.

The page is one file. It holds no script and no outside link, so it can be mailed, archived beside the
checkpoint and opened in ten years. Everything from a file is data and may be strange (a class may be called
`<b>`): the template escapes by default.

The files, all in the workdir:

- `config.json`: the run's configuration, a nested object.
- `manifest.json`: the split, of `manifest.make_manifest`; its training counts a class are required.
- `metrics.jsonl`: one object a line, with `kind` (`train`, `val`, `modulation`, `warning`) and `step`.
- `results.json`: `last` and `best`, each `{"step", "epoch", "test", "val"}`, the last two what
  `metrics.evaluate` returned; `split` names the one to show.
- `gallery.npz`: pictures of rare classes with the answers, of `gallery.write`; need not be there.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from mfm_jax import figures, gallery, style
from mfm_jax.errors import UserError
from mfm_jax.gallery import Gallery
from mfm_jax.manifest import factor_in_words
from mfm_jax.style import Classes, Picture

# The summary's rows: label, key of `metrics.evaluate`.
SUMMARY_ROWS = (
    ("Overall accuracy", "accuracy"),
    ("Balanced accuracy", "balanced_accuracy"),
    ("Many-shot classes (> 100 images)", "many"),
    ("Medium-shot classes (20–100)", "medium"),
    ("Few-shot classes (< 20)", "few"),
    ("Head third of the classes", "head_third"),
    ("Middle third", "middle_third"),
    ("Rarest third", "rarest_third"),
    ("Macro F1", "macro_f1"),
    ("ROC AUC (one-vs-rest, macro)", "roc_auc"),
    ("Expected calibration error", "ece"),
)
# As readers call them; "outside" are pictures from outside the run's data.
SPLITS = {"test": "test", "val": "validation", "train": "training", "outside": "outside"}
GALLERY = "gallery.npz"  # in the workdir; there need not be one
TABLE_CLASSES = 200  # above this many classes the per-class table is left out


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir's files, checked; `rows` holds those of `metrics.jsonl` by kind."""

    config: dict[str, Any]
    manifest: dict[str, Any]
    results: dict[str, Any]
    rows: dict[str, list[dict[str, Any]]]
    classes: Classes
    gallery: Gallery | None

    @property
    def split(self) -> str:
        return self.results["split"]

    @property
    def title(self) -> str:
        """What `last` is, in words: pretrained weights have had no epoch."""
        return "as read from the file" if self.results.get("pretrained") else "last epoch"

    @property
    def shown(self) -> dict[str, Any]:
        """The evaluation that the figures show."""
        return self.results["last"][self.split]


def write_report(workdir: Path, folder: Path | None = None) -> Path:
    """Writes `workdir/report.html` and returns its path; with `folder`, from the results there and to there.

    Reads `config.json`, `manifest.json`, `metrics.jsonl` and `results.json` (see the module's docstring) and
    nothing else: no device, no data set and no checkpoint is needed. Pieces a run need not have (validation
    rows, a best checkpoint, a modulation) are replaced by a sentence. Fractions are printed in percent.

    Raises:
      UserError: a file is missing, is not the JSON it should be, or lacks a field; the message names
        the file.
    """
    workdir = Path(workdir)
    folder = folder or workdir
    return _write(read_run(workdir, folder), folder)


def write_pretrained(config: dict[str, Any], manifest: dict[str, Any], folder: Path) -> Path:
    """Writes `folder/report.html` of weights that no run trained, and returns its path; `results.json` is there.

    Raises:
      UserError: as `write_report`.
    """
    return _write(_checked(config, manifest, "the manifest", folder, metrics=None), folder)


def _write(run: Run, folder: Path) -> Path:
    path = folder / "report.html"
    path.write_text(template("report.html.jinja").render(**_content(run)), encoding="utf-8")
    return path


def template(name: str) -> jinja2.Template:
    """Returns the page template `name` of this package, with the filters `percent` and `number`."""
    # An undefined field prints as nothing and counts as false: which fields are required, `read_run` decides.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mfm_jax", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = style.percent
    environment.filters["number"] = _number
    return environment.get_template(name)


def _content(run: Run) -> dict[str, Any]:
    """What the template shows: plain values and finished figures, no decisions left but layout."""
    best = run.results.get("best")
    evaluations = [
        (f"{SPLITS[split].capitalize()}, {title}", source, split)
        for split in SPLITS
        for title, source in ((run.title, run.results["last"]), ("best on validation", best))
        if source and source.get(split)
    ]
    return {
        "manifest": run.manifest,
        "split": SPLITS[run.split],
        "which": run.title,
        "factor": factor_in_words(run.manifest) if "imbalance_factor" in run.manifest else "–",
        "results": run.results,
        "best": best,
        "columns": [(title, source.get("epoch"), source[split]) for title, source, split in evaluations],
        "summary_rows": SUMMARY_ROWS,
        "warnings": [str(row.get("sentence")) for row in run.rows["warning"]],
        "tiles": [(SUMMARY_ROWS[i][0], run.shown.get(SUMMARY_ROWS[i][1])) for i in (1, 0, 7, 10)],
        "pictures": _pictures(run),
        "class_rows": _class_rows(run) if len(run.classes.names) <= TABLE_CLASSES else [],
        "num_classes": len(run.classes.names),
        "num_train": int(run.classes.counts.sum()),
        "config": json.dumps(run.config, indent=2, ensure_ascii=False),
    }


def _pictures(run: Run) -> dict[str, Picture | None]:
    """Every figure by name; None where the run has nothing to draw it from."""
    render, classes, sites = style.render, run.classes, _modulation(run)
    train, val = run.rows["train"], run.rows["val"]
    best_step = (run.results.get("best") or {}).get("step")
    # The names of the classes, where they are written out, take room.
    side = 7.0 if figures.CELL_CLASSES < len(classes.names) <= style.LABELLED_CLASSES else 4.3
    tall = 0.6 + 2.4 * len(sites)
    learned = [row for row in train if row.get("hypergrad_norm")]
    return {
        "classes": render(figures.draw_classes, (9.0, 4.8), classes, run.shown),
        "curves": render(figures.draw_curves, (9.0, 3.4), train, val, best_step) if train or val else None,
        "confusion": run.shown["confusion"]
        and render(figures.draw_confusion, (side + 0.3, side - 0.1), classes, run.shown),
        "reliability": render(figures.draw_reliability, (4.6, 4.3), run.shown),
        "modulation": render(figures.draw_modulation, (9.0, tall), classes, sites) if sites else None,
        "gallery": _gallery(run),
        "meta_gradient": render(figures.draw_meta_gradient, (9.0, 3.0), learned) if learned else None,
    }


def _gallery(run: Run) -> Picture | None:
    if run.gallery is None or not len(run.gallery.labels):
        return None
    return style.render(figures.draw_gallery, figures.gallery_inches(run.gallery), run.classes, run.gallery)


# --- reading ------------------------------------------------------------------------------------------------


def read_run(workdir: Path, folder: Path | None = None) -> Run:
    """Returns the files of the finished run in `workdir`; with `folder`, the results from there.

    Raises:
      UserError: a file is missing, damaged, or lacks a field.
    """
    config = _read_object(workdir / "config.json")
    path = workdir / "manifest.json"
    manifest = _read_object(path, "dataset")
    return _checked(config, manifest, str(path), folder or workdir, workdir / "metrics.jsonl")


def _checked(config: dict[str, Any], manifest: dict[str, Any], where: str, folder: Path, metrics: Path | None) -> Run:
    """Returns them with the results in `folder` and the rows of `metrics`; `where` says where the manifest is from."""
    results = _read_object(folder / "results.json", "method", "split")
    counts = _counts(manifest, where)
    names = [str(name) for name in manifest.get("class_names") or range(len(counts))]
    if len(names) != len(counts):
        raise UserError(f"{where}: {len(counts)} class counts but {len(names)} class names")
    for title in ("last", "best"):
        if title == "last" or results.get("best") is not None:
            where = f"{folder / 'results.json'}: {title}.{results['split']}"
            _check_evaluation((results.get(title) or {}).get(results["split"]), len(counts), where)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "modulation": [], "warning": []}
    rows |= _read_rows(metrics) if metrics else {}
    return Run(config, manifest, results, rows, Classes(names, counts), gallery.read(folder / GALLERY))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: no run there has finished; run the training command again") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a JSON object, not {type(value).__name__}")
    return value


def _read_object(path: Path, *required: str) -> dict[str, Any]:
    value = _object(_read_text(path), str(path))
    for key in required:
        if key not in value:
            raise UserError(f"{path}: no field '{key}'")
    return value


def _read_rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each kind, in the order of their steps; of two of one step, and code, the later counts."""
    kinds: dict[str, dict[tuple[float, str], dict[str, Any]]] = {}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        row = _object(line, f"{path}: line {number}")
        if not isinstance(row.get("step"), int | float):
            raise UserError(f"{path}: line {number}: no number in field 'step'")
        kinds.setdefault(str(row.get("kind")), {})[row["step"], str(row.get("code", ""))] = row
    return {kind: [rows[key] for key in sorted(rows)] for kind, rows in kinds.items()}


def warnings(workdir: Path) -> list[str]:
    """Returns what the run in `workdir` was warned of, a sentence each (`health.notices`)."""
    return [str(row.get("sentence")) for row in _read_rows(workdir / "metrics.jsonl").get("warning", [])]


def _counts(manifest: dict[str, Any], where: str) -> np.ndarray:
    """The training images a class: of the split `train`, or at the top of a manifest without splits."""
    train = (manifest.get("splits") or {}).get("train") or manifest
    counts: Any = train.get("class_counts")
    valid = isinstance(counts, list) and all(isinstance(n, int) and n >= 0 for n in counts)
    if not valid or len(counts) < 2 or not any(counts):
        raise UserError(f"{where}: 'class_counts' of the training split must list the images of each class")
    return np.array(counts, np.int64)


def _check_evaluation(found: Any, classes: int, where: str) -> None:
    """Refuses an evaluation without the lists the figures are drawn from, or of another number of classes."""
    if not isinstance(found, dict):
        raise UserError(f"{where}: missing; write it with mfm_jax.metrics.evaluate")
    for key in ("per_class_accuracy", "confusion", "reliability", "ece"):
        if key not in found:
            raise UserError(f"{where}: no field '{key}'")
    confusion = found["confusion"] or []  # not kept for very many classes
    lengths = {len(row) for row in (found["per_class_accuracy"], *([confusion, *confusion] if confusion else []))}
    if lengths != {classes}:
        raise UserError(f"{where}: is not of the {classes} classes of manifest.json")


def _modulation(run: Run) -> dict[str, dict[str, np.ndarray]]:
    """By site, `step` [T] and `gamma`, `beta` [T, C or K]; what no row has is left out."""
    sites: dict[str, dict[str, np.ndarray]] = {}
    rows = run.rows["modulation"]
    for site in dict.fromkeys(site for row in rows for site in row.get("sites", {})):
        having = [row for row in rows if site in row.get("sites", {})]
        sites[site] = {"step": np.array([row["step"] for row in having])}
        for parameter in ("gamma", "beta"):
            history = [np.ravel(row["sites"][site].get(parameter) or []) for row in having]
            lengths = {len(entry) for entry in history}
            # A row of another length belongs to another architecture: an old run's file was continued.
            if len(lengths) != 1:
                raise UserError(f"metrics.jsonl: the length of {parameter} at site '{site}' changes between rows")
            if site == "logits" and not lengths <= {0, len(run.classes.names)}:
                raise UserError(f"metrics.jsonl: {parameter} at site 'logits' is not of the classes of manifest.json")
            if lengths != {0}:
                sites[site][parameter] = np.array(history, np.float64)
    return sites


# --- tables -------------------------------------------------------------------------------------------------


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _class_rows(run: Run) -> list[dict[str, Any]]:
    """One row a class, from most to fewest training images."""
    classes = run.classes
    tested = np.sum(run.shown["confusion"], axis=1)
    best = run.results.get("best")
    return [
        {
            "index": int(k),
            "name": classes.names[k],
            "group": classes.groups[k],
            "train": int(classes.counts[k]),
            "images": int(tested[k]),
            "last": run.shown["per_class_accuracy"][k],
            "best": best[run.split]["per_class_accuracy"][k] if best else None,
        }
        for k in classes.order
    ]
