"""The trained classifier of a run, restored from its checkpoint, for pictures of the reader's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mfm_jax import augment, loop
from mfm_jax import config as config_lib
from mfm_jax import data as data_lib
from mfm_jax import experiment as experiment_lib
from mfm_jax.checkpoint import Checkpointer
from mfm_jax.errors import UserError


class Classifier(NamedTuple):
    """A classifier as it is tested: plain, with the running averages.

    class_names: K names.
    image_shape: (H, W, C) of the images it was trained on.
    probabilities: uint8 [B, H, W, C] -> float32 [B, K].
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    probabilities: Callable[[np.ndarray], np.ndarray]


def load(workdir: str | Path) -> Classifier:
    """Returns the classifier in the last checkpoint of the run in `workdir`; its data set must be at hand.

    Raises:
      UserError: there is no run with a checkpoint.
    """
    workdir = Path(workdir)
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir}: no run there; give the workdir of one")
    config = config_lib.resolve(json.loads((workdir / "config.json").read_text()))
    data = data_lib.build(config)
    experiment = experiment_lib.build(config, data)
    checkpoints = Checkpointer(workdir, config.checkpoint, has_validation=len(data.val_labels) > 0, read_only=True)
    try:
        step = checkpoints.latest_step()
        if step is None:
            raise UserError(f"{workdir}: the run there has no checkpoint yet")
        state = checkpoints.restore(step, loop.initial(experiment, config.train))[0].bilevel
    finally:
        checkpoints.close()
    mean, std = jnp.asarray(data.mean), jnp.asarray(data.std)
    run = jax.jit(lambda state, image: experiment.eval_step(state, augment.normalize(image, mean, std)))
    return Classifier(data.class_names, data.train_images.shape[1:], lambda images: np.asarray(run(state, images)))


def fit(picture: Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    """Returns a picture of any size and colours as uint8 [H, W, C]: its middle square, averaged to H x W."""
    height, width, channels = shape
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.convert("L" if channels == 1 else "RGB").crop((left, top, left + side, top + side))
    return np.asarray(square.resize((width, height), Image.Resampling.BOX)).reshape(shape)
