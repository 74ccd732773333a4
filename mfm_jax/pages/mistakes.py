"""What a report shows of wrong answers: the confusion matrix, the worst classes and pairs, and pictures of them.

The matrix is an SVG of its own rather than a drawing of matplotlib's: each cell shows its numbers to the pointer, and
its labels stay text that can be read when it is enlarged, at 121 classes too.
"""

import base64
import io
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mfm_jax.evaluation import gallery, intervals, mistakes
from mfm_jax.pages.style import short
from mfm_jax.workdir.finished import Classes, Finished

_MOST_CELLS = 10_000  # a matrix of more shows those with the largest shares
_NUMBERED = 12  # up to this many classes its cells have their numbers written in


class Cell(NamedTuple):
    """A cell of the confusion matrix: its place, its share of the true class (0 to 1), and what the pointer shows."""

    column: int
    row: int
    share: float
    title: str


class Matrix(NamedTuple):
    """A confusion matrix to draw.

    side: of a cell, pixels. font: size of letters. margin: room for the labels, left and above.
    names: of the classes, short, from most to fewest training images.
    numbered: whether cells have their numbers written in. left_out: how many cells have no room.
    """

    side: float
    font: float
    margin: float
    names: list[str]
    cells: list[Cell]
    numbered: bool
    left_out: int


def matrix(classes: Classes, result: dict[str, Any]) -> Matrix | None:
    """Returns the matrix of an evaluation; None where it was not kept."""
    if not result["confusion"]:
        return None
    order = classes.order
    confusion = np.array(result["confusion"])[np.ix_(order, order)]
    images = np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    share = confusion / images
    rows, columns = np.nonzero(confusion)
    largest = np.argsort(-share[rows, columns], kind="stable")[:_MOST_CELLS]
    names = [classes.names[k] for k in order]
    cells = [
        Cell(
            column=int(j),
            row=int(i),
            share=float(share[i, j]),
            title=f"{names[i]}{' was right' if i == j else f' → {names[j]}'}\n{100 * share[i, j]:.1f} %:"
            f" {confusion[i, j]:,} of {images[i, 0]:,} images",
        )
        for i, j in zip(rows[largest], columns[largest], strict=True)
    ]
    side = 44.0 if len(names) <= _NUMBERED else max(8.0, 640 / len(names))
    font = min(12.0, 0.92 * side)
    labels = [short(name) for name in names]
    margin = 0.68 * font * max(map(len, labels)) + font
    return Matrix(side, font, margin, labels, cells, len(names) <= _NUMBERED, len(rows) - len(cells))


def worst(run: Finished) -> list[dict[str, Any]]:
    """Returns the classes to look at first (`mistakes.worst`), those with an error."""
    right, images = intervals.right_of(run.shown)
    found = [k for k in mistakes.worst(right, images)[: mistakes.SHOWN] if right[k] < images[k]]
    instead = named_instead(run)
    return [
        {
            "name": run.classes.names[k],
            "train": int(run.classes.counts[k]),
            "right": int(right[k]),
            "images": int(images[k]),
            "accuracy": right[k] / images[k],
            "interval": intervals.wilson(right[k] / images[k], images[k]),
            "instead": instead[k] if instead else "",
            "thumb": _example(run, k, None),
        }
        for k in found
    ]


def pairs(run: Finished) -> list[dict[str, Any]]:
    """Returns the pairs of classes that were confused most often; none without a confusion matrix."""
    if not run.shown["confusion"]:
        return []
    confusion = np.array(run.shown["confusion"])
    labels, answers = np.nonzero(confusion)
    return [
        {
            "label": run.classes.names[pair.label],
            "answer": run.classes.names[pair.answer],
            "images": pair.images,
            "share": pair.images / confusion[pair.label].sum(),
            "thumb": _example(run, pair.label, pair.answer),
        }
        for pair in mistakes.confused(labels, answers, confusion[labels, answers])[: mistakes.SHOWN]
    ]


def named_instead(run: Finished) -> list[str]:
    """Returns for each class which one its images were most often taken for; "" where none was."""
    if not run.shown["confusion"]:
        return []
    confusion = np.array(run.shown["confusion"])
    np.fill_diagonal(confusion, 0)
    return [run.classes.names[row.argmax()] if row.any() else "" for row in confusion]


def rare(run: Finished) -> list[dict[str, Any]]:
    """Returns a row for each of the rarest classes of which there are pictures: right and wrong answers."""
    found, members = run.gallery, gallery.rare(run.classes.counts)
    if found is None:
        return []
    rows = []
    for k in (k for k in run.classes.order if k in members and k in found.labels):
        mine = np.flatnonzero(found.labels == k)
        hit = found.answers[mine] == k
        pictures: list[list[dict[str, Any]]] = [
            [
                {
                    "image": png(found.images[i]),
                    "answer": run.classes.names[found.answers[i]],
                    "confidence": float(found.confidence[i]),
                }
                for i in mine[chosen]
            ]
            for chosen in (hit, ~hit)
        ]
        name, count = run.classes.names[k], int(run.classes.counts[k])
        rows.append({"name": name, "train": count, "right": pictures[0], "wrong": pictures[1]})
    return rows


def _example(run: Finished, label: int, answer: int | None) -> str | None:
    """Returns a picture of a class that was taken for `answer`, or for any other class; None without one."""
    found = run.gallery
    if found is None:
        return None
    wrong = (found.labels == label) & ((found.answers != label) if answer is None else (found.answers == answer))
    return png(found.images[wrong.argmax()]) if wrong.any() else None


def png(image: np.ndarray) -> str:
    """Returns a picture, uint8 [H, W, C], as a data URL."""
    content = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(content, "png")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
