"""Draws figures of the documentation to docs/images: the step of MFM, the curve over class counts, the architecture.

    python docs/site/figures.py

They are SVG, equal byte by byte wherever they are drawn; tests/site_test.py holds the files to this script. They
have a background of their own, so that they can be read in a light and in a dark page.
"""

import math
from pathlib import Path

from mfm_jax.data.longtail import class_counts

IMAGES = Path(__file__).parents[1] / "images"
INK, GREY, LINE = "#1f2430", "#5b6475", "#9aa3b2"
BLUE, ORANGE, GREEN = "#2f6fb7", "#c8641b", "#2e8b57"
PALE = {BLUE: "#e6effa", ORANGE: "#fdeee2", GREEN: "#e5f4ea", GREY: "#f1f3f6"}


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """Returns a whole picture; `title` says what it shows to who cannot see it."""
    heads = "".join(
        f'<marker id="{colour[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
        for colour in (BLUE, ORANGE, GREEN, GREY)
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="Helvetica, Arial,'
        f' sans-serif" font-size="14" role="img"><title>{title}</title><defs>{heads}</defs>\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>\n'
    )
    return head + "\n".join(parts) + "\n</svg>\n"


def text(x: float, y: float, words: str, colour: str = INK, **more: str) -> str:
    """Returns a line of text whose middle is at x (`anchor` moves it)."""
    anchor, size, weight = more.get("anchor", "middle"), more.get("size", "14"), more.get("weight", "normal")
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{colour}" text-anchor="{anchor}" font-size="{size}"'
        f' font-weight="{weight}">{words}</text>'
    )


def box(x: float, y: float, width: float, lines: list[str], colour: str = GREY, height: float = 0) -> str:
    """Returns a box with its upper left corner at (x, y); the first line is bold."""
    height = height or 18 * len(lines) + 16
    top = y + height / 2 - 9 * len(lines) + 14
    rows = [
        text(
            x + width / 2,
            top + 18 * i,
            line,
            INK if i else colour,
            size="13" if i else "14",
            weight="normal" if i else "bold",
        )
        for i, line in enumerate(lines)
    ]
    frame = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"'
    return f'{frame} fill="{PALE[colour]}" stroke="{colour}" stroke-width="1.4"/>' + "".join(rows)


def arrow(points: list[tuple[float, float]], colour: str = GREY, dash: bool = False) -> str:
    """Returns a line through `points` with a head at its end."""
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
    dashed = ' stroke-dasharray="6 4"' if dash else ""
    return (
        f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dashed} marker-end="url(#{colour[1:]})"/>'
    )


def bars(x: float, y: float, heights: list[float], colour: str) -> str:
    """Returns a small bar chart of classes, whose lower left corner is (x, y)."""
    return "".join(
        f'<rect x="{x + 11 * i:g}" y="{y - height:.1f}" width="8" height="{height:.1f}" fill="{colour}"/>'
        for i, height in enumerate(heights)
    )


def method() -> str:
    """Returns what one training step of MFM does, and what is left at test time."""
    tail = [44 * 0.62**i + 3 for i in range(10)]
    left = {"anchor": "start"}
    parts = [
        text(20, 32, "One training step of MFM", size="17", weight="bold", **left),
        bars(24, 118, tail, BLUE),
        text(78, 138, "training batch", size="13"),
        text(78, 155, "long-tailed", GREY, size="12"),
        arrow([(142, 96), (176, 96)], BLUE),
        box(180, 56, 180, ["1. modulated pass", "features or logits h", "become (1 + γ) h + β"], BLUE, 80),
        arrow([(360, 96), (396, 96)], BLUE),
        box(400, 56, 180, ["training loss", "its gradient g by w", "depends on φ"], BLUE, 80),
        arrow([(580, 96), (616, 96)], BLUE),
        box(620, 56, 180, ["2. virtual step", "ŵ = U(w, g), with U", "the real optimizer"], BLUE, 80),
        arrow([(710, 136), (710, 208)], GREEN),
        text(722, 178, "ŵ", GREEN, weight="bold", **left),
        bars(838, 274, [24.0] * 10, GREEN),
        text(892, 294, "meta batch", size="13"),
        text(892, 311, "balanced", GREY, size="12"),
        arrow([(832, 252), (804, 252)], GREEN),
        box(620, 212, 180, ["3. plain pass at ŵ", "no modulation;", "batch norm fits ŵ"], GREEN, 80),
        arrow([(620, 252), (584, 252)], GREEN),
        box(400, 212, 180, ["meta loss", "is ŵ good for", "every class alike?"], GREEN, 80),
        arrow([(400, 252), (364, 252)], ORANGE),
        box(180, 212, 180, ["4. update of φ", "by the meta-gradient,", "back through step 2"], ORANGE, 80),
        arrow([(270, 212), (270, 140)], ORANGE),
        text(258, 180, "γ and β", ORANGE, weight="bold", anchor="end"),
        text(
            20,
            336,
            "Then w becomes ŵ. By default φ is updated at every eighth step; the others do 1 and 2 alone.",
            size="13",
            **left,
        ),
        text(
            20,
            357,
            "At test time there is no modulation: the classifier costs what a plain one costs.",
            size="13",
            **left,
        ),
    ]
    return svg(970, 374, "One training step of the Meta Feature Modulator", parts)


def curve() -> str:
    """Returns the shift of each class's logit over its training images: CIFAR-10-LT, factor 100, `meta_held_out`."""
    counts = [int(n) for n in class_counts(4990, 10, 100.0)]
    curves = [
        ("the start: no modulation", 0.0, 0.0, GREY),
        ("a = 1, c = 0: logit adjustment, tau 1", 1.0, 0.0, BLUE),
        ("a = 1, c = -1.5: stronger for the rarest", 1.0, -1.5, ORANGE),
    ]
    parts = [
        text(
            20,
            30,
            "The shift of a class’s logit while training, by its number of images",
            size="16",
            weight="bold",
            anchor="start",
        )
    ]
    x0, y0, step, unit = 70, 80, 62, 24  # of the first class, of a shift of 0, pixels a class and a unit of beta

    def place(k: int, shift: float) -> tuple[float, float]:
        return x0 + step * k + step / 2, y0 - unit * shift

    for mark in range(0, -9, -2):
        y = y0 - unit * mark
        parts.append(f'<line x1="{x0}" y1="{y}" x2="{x0 + 10 * step}" y2="{y}" stroke="{LINE}" stroke-width="0.6"/>')
        parts.append(text(x0 - 10, y + 5, f"{mark}".replace("-", "−"), GREY, size="12", anchor="end"))
    parts.append(f'<rect x="{x0 + 8}" y="{y0 + 108}" width="320" height="70" fill="#ffffff"/>')
    for row, (name, a, c, colour) in enumerate(curves):
        at = [place(k, a * z + c * z * z / 10) for k, z in enumerate(math.log(n / counts[0]) for n in counts)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.4"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in at]
        parts.append(f'<circle cx="{x0 + 20}" cy="{y0 + 120 + 22 * row}" r="5" fill="{colour}"/>')
        parts.append(text(x0 + 34, y0 + 125 + 22 * row, name, colour, size="13", anchor="start"))
    for k, n in enumerate(counts):
        parts.append(text(x0 + step * (k + 0.5), 306, str(n), size="12"))
    parts.append(text(x0 + 5 * step, 328, "training images of the class", GREY, size="13"))
    parts.append(text(20, 56, "β = a z + c z² / 10", GREY, size="13", anchor="start"))
    parts.append(
        text(
            20,
            356,
            "z = log(n / n of the largest class). Drawn from the formula; nothing here was measured.",
            size="13",
            anchor="start",
        )
    )
    return svg(720, 374, "Shift of a class's logit by its number of training images", parts)


def architecture() -> str:
    """Returns the folders of the package and what uses what; only the main arrows are drawn."""
    boxes = {  # name: (x, y, width, what is there)
        "doors": (300, 56, 560, "cli, main, compare, predict, export"),
        "study": (20, 146, 200, "many runs, tuning"),
        "inference": (660, 146, 200, "a stored run evaluated again"),
        "training": (20, 246, 600, "recipe, experiment, feed, loop, run"),
        "evaluation": (660, 246, 200, "tested classifier, metrics"),
        "pages": (900, 246, 200, "report, comparison, card"),
        "data": (20, 366, 190, "sources, splits, batches"),
        "methods": (246, 366, 180, "the table of methods"),
        "models": (480, 366, 190, "classifiers, CPU kernels"),
        "workdir": (900, 366, 200, "files, lock, checkpoints, log"),
        "config": (20, 486, 190, "fields, bounds, rules"),
        "bilevel": (246, 486, 200, "Pass, meta-gradient, steps"),
        "machine": (680, 486, 200, "devices, processes, signals"),
    }
    lines = [
        [(310, 108), (180, 142)],  # doors to study
        [(450, 108), (450, 242)],  # doors to training
        [(760, 108), (760, 142)],  # doors to inference
        [(120, 198), (120, 242)],  # study to training
        [(760, 198), (760, 242)],  # inference to evaluation
        [(620, 272), (656, 272)],  # training to evaluation
        [(900, 272), (864, 272)],  # pages to evaluation
        [(1000, 298), (1000, 362)],  # pages to workdir
        [(690, 298), (640, 362)],  # evaluation to models
        [(670, 298), (430, 368)],  # evaluation to methods
        [(115, 418), (115, 482)],  # data to config
        [(270, 418), (190, 482)],  # methods to config
        [(620, 290), (780, 482)],  # training to machine
    ]
    labelled = [
        ([(115, 298), (115, 362)], "batches", 110, 336),
        ([(336, 298), (336, 362)], "config, counts", 331, 336),
        ([(560, 298), (560, 362)], "weights", 552, 358),
        ([(600, 298), (600, 318), (880, 318), (880, 392), (896, 392)], "state, phi, rows", 868, 336),
        ([(336, 418), (336, 482)], "losses, learners", 442, 446),
        ([(456, 298), (456, 460), (430, 482)], "steps", 452, 346),
    ]
    parts = [text(20, 32, "An arrow goes from what uses to what is used", GREY, anchor="start")]
    parts += [arrow(points) for points in (*lines, *(points for points, *_ in labelled))]
    parts += [text(x, y, label, GREY, size="12", anchor="end") for _, label, x, y in labelled]
    parts += [box(x, y, width, [name, what], BLUE, 52) for name, (x, y, width, what) in boxes.items()]
    return svg(1120, 556, "The folders of mfm_jax, and what uses what", parts)


FIGURES = {"method.svg": method, "curve.svg": curve, "architecture.svg": architecture}


def main() -> None:
    """Writes the figures."""
    for name, draw in FIGURES.items():
        (IMAGES / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
