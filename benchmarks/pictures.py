"""Draws the pictures of docs/results/study.md from finished runs of `study.py`.

  TFDS_DATA_DIR=... python benchmarks/pictures.py --runs=runs/study/factor100 --out=docs/results

classes.svg   accuracy of each class by its training images: CE, logit adjustment, MFM, means over seeds
boundary.svg  on which side of the boundary between a head and a tail class their test images lie: CE, MFM, seed 0
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study import MAIN

from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax import predict
from mfm_jax.pages import style
from mfm_jax.pages.comparison_figures import Compared, draw_class_accuracies
from mfm_jax.workdir.finished import Classes, shown

HEAD, TAIL = 1, 9  # of CIFAR-10: automobile and truck, which are alike


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder with a folder of seeds for each method")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    options = parser.parse_args()
    with matplotlib.rc_context({**style.STYLE, "svg.hashsalt": "study"}):
        for name, inches, draw in (("classes", (8.0, 3.8), draw_classes), ("boundary", (8.0, 3.2), draw_boundaries)):
            figure = Figure(figsize=inches, layout="constrained")
            draw(figure, options.runs)
            figure.savefig(options.out / f"{name}.svg", facecolor="white", metadata={"Date": None})


def draw_classes(figure: Figure, runs: Path) -> None:
    manifest = json.loads((runs / "ce" / "seed0" / "manifest.json").read_text())
    classes = Classes(manifest["class_names"], np.asarray(manifest["splits"]["train"]["class_counts"]))
    results = {
        name: [json.loads(path.read_text()) for path in sorted((runs / name).glob("seed*/results.json"))]
        for name in MAIN
    }
    draw_class_accuracies(figure, classes, [Compared(name, list(map(shown, found))) for name, found in results.items()])


def draw_boundaries(figure: Figure, runs: Path) -> None:
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, name in zip(panels, ("ce", "mfm"), strict=True):
        draw_boundary(axes, name, runs / name / "seed0")
    panels[0].set_ylabel("test images")
    panels[0].set_ylim(top=1.25 * panels[0].get_ylim()[1])  # room for the legends


def draw_boundary(axes: Axes, name: str, workdir: Path) -> None:
    """Histograms of the log odds of the tail class against the head class; the boundary is at 0."""
    data = data_lib.build(config_lib.resolve(json.loads((workdir / "config.json").read_text())))
    classifier = predict.load(workdir)
    for label, color in ((HEAD, style.GROUP_COLORS["many"]), (TAIL, style.GROUP_COLORS["few"])):
        probabilities = classifier.probabilities(data.test_images[data.test_labels == label]) + 1e-12
        odds = np.log(probabilities[:, TAIL] / probabilities[:, HEAD])
        right = 100 * np.mean((odds > 0) == (label == TAIL))
        text = f"{data.class_names[label]} ({data.counts[label]:,} in training): {right:.0f} % right"
        axes.hist(odds, bins=np.linspace(-14, 14, 57).tolist(), color=color, alpha=0.6, label=text)
    axes.axvline(0, color=style.INK, linewidth=1.2)
    axes.set_title(name)
    axes.set_xlabel(f"log odds of {data.class_names[TAIL]} against {data.class_names[HEAD]}")
    axes.legend(loc="upper left", fontsize=7)


if __name__ == "__main__":
    main()
