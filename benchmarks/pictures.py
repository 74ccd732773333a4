"""Draws the pictures of docs/results/study.md from finished runs of `study.py`.

  TFDS_DATA_DIR=... python benchmarks/pictures.py --runs=runs/study/factor100 --out=docs/results

classes.svg   accuracy of each class by its training images: CE, logit adjustment, MFM, means over seeds
boundary.svg  test images of a head and a tail class, by their place between the two: CE and MFM, seed 0
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mfm_jax import augment, figures, loop
from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax import experiment as experiment_lib
from mfm_jax.checkpoint import Checkpointer
from mfm_jax.comparison import compared

METHODS = ("ce", "logit_adjusted", "mfm")
HEAD, TAIL = 1, 9  # automobile and truck: alike, and 101 images of the one to each of the other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder with a folder of seeds for each method")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    options = parser.parse_args()
    save(options.out / "classes.svg", (8.0, 3.8), lambda figure: draw_classes(figure, options.runs))
    save(options.out / "boundary.svg", (8.0, 3.4), lambda figure: draw_boundaries(figure, options.runs))


def save(path: Path, inches: tuple[float, float], draw) -> None:
    with matplotlib.rc_context({**figures.STYLE, "svg.hashsalt": path.stem}):
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure)
        figure.savefig(path, facecolor="white", metadata={"Date": None})


def draw_classes(figure: Figure, runs: Path) -> None:
    manifest = json.loads((runs / "ce" / "seed0" / "manifest.json").read_text())
    classes = figures.Classes(manifest["class_names"], np.asarray(manifest["splits"]["train"]["class_counts"]))
    results = {
        name: [json.loads(path.read_text()) for path in sorted((runs / name).glob("seed*/results.json"))]
        for name in METHODS
    }
    figures.draw_class_accuracies(figure, classes, [compared(name, found, None) for name, found in results.items()])


def draw_boundaries(figure: Figure, runs: Path) -> None:
    """One panel a method: the boundary between the two classes is the vertical line, the tail class right of it."""
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, ("ce", "mfm"), strict=True):
        draw_boundary(axes, name, runs / name / "seed0")
    panels[0].set_ylabel("along the features' widest other direction")
    panels[0].legend(loc="upper left")


def draw_boundary(axes: Axes, name: str, workdir: Path) -> None:
    labels, features, head, names = tested(workdir)
    between = head["kernel"][:, TAIL] - head["kernel"][:, HEAD]
    length = np.linalg.norm(between)
    across = (features @ between + head["bias"][TAIL] - head["bias"][HEAD]) / length
    rest = features - np.outer(features @ between / length, between / length)
    rest -= rest.mean(axis=0)
    along = rest @ np.linalg.svd(rest, full_matrices=False)[2][0]
    for label, color in ((HEAD, figures.GROUP_COLORS["many"]), (TAIL, figures.GROUP_COLORS["few"])):
        here = labels == label
        right = np.mean((across[here] > 0) == (label == TAIL))
        text = f"{names[label]}: {100 * right:.0f} % on its side"
        axes.scatter(across[here], along[here], s=4, alpha=0.5, color=color, label=text, linewidths=0)
    axes.axvline(0, color=figures.INK, linewidth=1.2)
    axes.set_title(name)
    axes.set_xlabel(f"distance from the boundary, towards {names[TAIL]}")


def tested(workdir: Path):
    """Returns of the test images of the two classes the labels and `pooled` features, the head and the class names."""
    config = config_lib.resolve(json.loads((workdir / "config.json").read_text()))
    data = data_lib.build(config)
    experiment = experiment_lib.build(config, data)
    checkpoints = Checkpointer(workdir, config.checkpoint, has_validation=False, read_only=True)
    state = checkpoints.restore(checkpoints.latest_step(), loop.initial(experiment, config.train))[0].bilevel
    checkpoints.close()
    keep = np.isin(data.test_labels, (HEAD, TAIL))
    images = augment.normalize(jnp.asarray(data.test_images[keep]), jnp.asarray(data.mean), jnp.asarray(data.std))
    features = np.asarray(jax.jit(experiment.features)(state, images))
    head = jax.tree.map(np.asarray, state.params["head"])
    return data.test_labels[keep], features, head, data.class_names


if __name__ == "__main__":
    main()
