"""The page of an audit: the images to look at again, of each kind the most suspicious."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mfm_jax.data.sources import Images
from mfm_jax.evaluation import gallery
from mfm_jax.evaluation.suspects import KINDS, Suspect
from mfm_jax.machine import disk
from mfm_jax.pages import style
from mfm_jax.pages.mistakes import png

SHOWN = 60  # of a kind
_KINDS = dict(zip(KINDS, ("likely wrong labels", "outliers", "near duplicates"), strict=True))


class Looked(NamedTuple):
    """How many images were `answered` by networks that had not seen them, in how many `folds`, and the share of these
    images whose label was `named`."""

    answered: int
    folds: int
    named: float


def in_words(found: Sequence[Suspect]) -> str:
    """Returns how many there are of each kind."""
    counts = Counter(one.kind for one in found)
    return ", ".join(f"{counts[kind]:,} {plural}" for kind, plural in _KINDS.items())


def write(
    path: Path, name: str, found: Sequence[tuple[Suspect, Mapping[str, str]]], images: Images, looked: Looked
) -> None:
    """Writes the page to `path`, on the data `name`.

    `found` has the suspects, each with its row of `suspects.csv` by the names of the columns; they are positions in
    `images`, uint8 [N, H, W, C].
    """
    sections = []
    for kind, plural in _KINDS.items():
        members = [pair for pair in found if pair[0].kind == kind]
        entries = [
            {"row": row, "pictures": [png(gallery.thinned(images[i])) for i in (one.image, one.other) if i >= 0]}
            for one, row in members[:SHOWN]
        ]
        sections.append({"kind": kind, "title": plural, "count": len(members), "entries": entries})
    summary = in_words([one for one, _ in found])
    page = style.template("audit.html.jinja")
    disk.write(path, page.render(name=name, sections=sections, summary=summary, images=len(images), **looked._asdict()))
