"""What the pages share: their template, and what all figures have of colours, inline SVG, and names of classes.

A page is one file. It has no outside link, and its one script (sorting, tips) is not needed to read it, so it can be
mailed, archived beside the checkpoint and opened in ten years. Everything from a file is data and may be strange (a
class may be called `<b>`): the templates escape by default, and a browser runs no other script than that one.

The figures' ink is `currentColor` and their background is transparent, so that the page's style sheet decides light or
dark. Their words are real text that the browser sets in its own font (class names in any script work) and the reader
can search. Names are drawn with mathematical markup switched off: a class may be called `$x$`.
"""

import base64
import functools
import hashlib
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

import markupsafe
import numpy as np

from mfm_jax.workdir.finished import Classes

if TYPE_CHECKING:
    import jinja2
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

LABELLED_CLASSES = 30  # up to this many classes a figure names each of them

# Blue is the head and orange is the tail, in every figure; both are legible on white and on near-black.
GROUP_COLORS = {"many": "#3b7dd8", "medium": "#9a6bc9", "few": "#e8743b"}
BLUE, PURPLE, ORANGE = GROUP_COLORS.values()
MUTED = "#8a94a3"
# Drawn in this colour and written out as `currentColor`; black would also match what matplotlib leaves unset.
INK = "#010203"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": MUTED,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


class Picture(NamedTuple):
    """A finished figure: an `<svg>` element, its caption, and the width in inches it was drawn for."""

    svg: markupsafe.Markup
    caption: str
    inches: float


def render(draw: Callable[..., str], inches: tuple[float, float], *what: Any) -> Picture:
    """Calls `draw(figure, *what)` on a new figure and returns it as inline SVG.

    `draw` returns the caption, which is also what a screen reader says in the figure's place. Pyplot and its global
    state are not touched.
    """
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    svg, caption = _drawn(draw, inches, what, format="svg", transparent=True, metadata=nothing, dpi=200)
    return Picture(_inline(svg.decode(), caption), caption, inches[0])


def png(draw: Callable[..., str], inches: tuple[float, float], *what: Any) -> tuple[bytes, str]:
    """Calls `draw(figure, *what)` as `render` does; returns a PNG file on white, 150 dots an inch, and the caption."""
    return _drawn(draw, inches, what, format="png", metadata={"Software": None}, dpi=150)


def _drawn(
    draw: Callable[..., str], inches: tuple[float, float], what: tuple[Any, ...], **saved: Any
) -> tuple[bytes, str]:
    import matplotlib  # here, because it takes longer to import than the rest of the package's command line
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    # The salt makes the ids inside the SVG the same on every run, and different from figure to figure.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": draw.__name__}), warnings.catch_warnings():
        # The browser brings the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=inches, layout="constrained")
        caption = draw(figure, *what)
        figure.savefig(buffer, **saved)
    return buffer.getvalue(), caption


def _inline(svg: str, alt: str) -> markupsafe.Markup:
    """Returns matplotlib's SVG file as an HTML element that takes its colour and width from the page."""
    head, body = svg[svg.index("<svg") :].split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    body = re.sub(r"""<g id=(["'])tip:(.*?)\1([^>]*)>""", r"<g\3><title>\2</title>", body, flags=re.DOTALL)
    # Group names (`axes_1`) repeat from figure to figure; only definitions, whose ids are hashes, are used.
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace(INK, "currentColor")
    start = markupsafe.Markup('<svg role="img" {} aria-label="{}">')
    return start.format(markupsafe.Markup(box.group()), alt) + markupsafe.Markup(body)


def tip(artist: "Artist", text: str) -> None:
    """Lets the page show `text` where the pointer is on `artist`."""
    artist.set_gid(f"tip:{text}")


def template(name: str, **filters: Callable[..., str]) -> "jinja2.Template":
    """Returns the template `name` of this package, with the filters `percent`, `number`, `breakable` and `filters`."""
    import jinja2  # here: a run that trains does not wait for it

    page = name.endswith(".html.jinja")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mfm_jax", "pages"),
        autoescape=page,
        # On a page an undefined field prints as nothing and counts as false: `finished` decides which are required.
        undefined=jinja2.Undefined if page else jinja2.StrictUndefined,
        keep_trailing_newline=not page,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "number": number, "breakable": breakable, **filters}
    environment.globals["script"] = _script()
    return environment.get_template(name)


@functools.cache
def _script() -> tuple[markupsafe.Markup, str]:
    """Returns the pages' script, and its digest, by which a page allows it and no other."""
    text = resources.files("mfm_jax.pages").joinpath("script.js").read_text()
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return markupsafe.Markup(text), f"sha256-{digest}"


def number(value: float | None, digits: int = 3) -> str:
    """Returns a number with separated thousands; a dash for None."""
    return "–" if value is None else f"{value:,.{digits}f}"


def breakable(name: str) -> markupsafe.Markup:
    """Returns a class's name as HTML that may be broken after an underscore."""
    return markupsafe.Markup("_<wbr>").join(name.split("_"))


def percent(value: float | None, digits: int = 2) -> str:
    """Returns a fraction as percent; a dash for None."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def as_percent(values: Iterable[float | None]) -> np.ndarray:
    """Returns fractions as percent, with NaN (which figures leave blank) for None."""
    return np.array([math.nan if value is None else 100 * value for value in values])


def plain_logs(axis: "Axis", form: str = "{x:g}") -> None:
    """Writes numbers on a log axis without TeX, at 1, 2 and 5 times the powers of ten where there is room."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(form)


def along_steps(axes: "Axes") -> None:
    """Labels the x axis as steps, which are whole."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"


def name_ticks(axes: "Axes", classes: Classes) -> None:
    """Names the classes along the x axis, turned where they would run into each other."""
    names = [short(classes.names[k]) for k in classes.order]
    axes.set_xticks(range(len(names)), names)
    if len(names) > 14 and max(map(len, names)) > 2:
        axes.tick_params(axis="x", labelrotation=90)
    elif len(names) * max(map(len, names)) > 40:
        axes.tick_params(axis="x", labelrotation=40)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
            label.set_rotation_mode("anchor")
