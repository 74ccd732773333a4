"""Which pictures a report shows: answers, right and wrong, for the rarest classes, and the worst mistakes of all.

A mean accuracy of the rare classes does not say whether a model confuses two species or reads the scale bar; a look at
some pictures does.
"""

import io
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mfm_jax.data import longtail
from mfm_jax.data.sources import Images
from mfm_jax.evaluation import mistakes
from mfm_jax.machine import disk

EACH = 16  # pictures of either kind, at most
_PER_CLASS = 2
_SIDE = 112  # pixels; larger pictures are thinned out


class Gallery(NamedTuple):
    """Pictures with what was answered."""

    images: np.ndarray  # uint8 [n, H, W, C]
    labels: np.ndarray  # int [n]
    answers: np.ndarray  # int [n]
    confidence: np.ndarray  # float [n], probability of the answer


def choose(probabilities: np.ndarray, labels: np.ndarray, train_counts: np.ndarray) -> np.ndarray:
    """Returns the examples to show, int [n].

    First come those of `rare` classes, right answers, then wrong ones, each from the most confident on, at most two of
    a class; then the most confident mistake in each of the worst classes and of each of the most confused pairs.

    `probabilities` are [N, K], `labels` int [N], `train_counts` int [K].
    """
    members = rare(train_counts)
    answers, order = probabilities.argmax(1), np.argsort(-probabilities.max(1), kind="stable")
    chosen: list[int] = []
    for right in (True, False):
        shown: dict[int, int] = {}
        for i in order[np.isin(labels[order], members) & ((answers == labels)[order] == right)].tolist():
            shown[labels[i]] = shown.get(labels[i], 0) + 1
            if shown[labels[i]] <= _PER_CLASS and sum(min(n, _PER_CLASS) for n in shown.values()) <= EACH:
                chosen.append(i)
    wrong = order[(answers != labels)[order]]
    images = np.bincount(labels)
    hits = np.bincount(labels[answers == labels], minlength=len(images))
    of_class = [wrong[labels[wrong] == k][:1] for k in mistakes.worst(hits, images)[: mistakes.SHOWN]]
    pairs = mistakes.confused(labels, answers)[: mistakes.SHOWN]
    of_pair = [wrong[(labels[wrong] == pair.label) & (answers[wrong] == pair.answer)][:1] for pair in pairs]
    return np.array(list(dict.fromkeys(np.concatenate([chosen, *of_class, *of_pair]).astype(int).tolist())), int)


def rare(train_counts: np.ndarray) -> np.ndarray:
    """Returns the few-shot classes, or the rarest third where there are none."""
    groups = longtail.shot_groups(train_counts)
    return groups["few"] if len(groups["few"]) else groups["rarest_third"]


def write(path: Path, images: Images, labels: np.ndarray, probabilities: np.ndarray, train_counts: np.ndarray) -> None:
    """Writes the examples that `choose` takes of `images` `[N, H, W, C]`, if it takes any, to `path`.

    Pictures are thinned out to at most 112 pixels a side.
    """
    chosen = choose(probabilities, labels, train_counts)
    if not len(chosen):
        return
    pictures, found = np.stack([thinned(images[i]) for i in chosen]), probabilities[chosen]
    shown = Gallery(pictures, labels[chosen], found.argmax(1), found.max(1))
    content = io.BytesIO()
    np.savez_compressed(content, **shown._asdict())
    disk.write(path, content.getvalue())


def thinned(image: np.ndarray) -> np.ndarray:
    """Returns a picture [H, W, C] with every n-th row and column, at most 112 a side."""
    step = -(-max(image.shape[:2]) // _SIDE)
    return image[::step, ::step]


def read(path: Path) -> Gallery | None:
    """Returns what `write` wrote; None where nothing sound is there."""
    try:
        with np.load(path) as arrays:
            return Gallery(**arrays)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
