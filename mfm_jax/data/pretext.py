"""Labels that images have of themselves: a first stage of training that reads no class (`data.pretext`).

Rotation: each image is turned by a quarter, a half or three quarters, or not at all, and the label says which. What is
stored is turned by its place in the source, so that the four are equally frequent in every split; a training batch is
turned anew, by a draw (`loop`). The split is drawn by the classes, as for the run that comes after.

References:
  Gidaris et al., Unsupervised representation learning by predicting image rotations, ICLR 2018.
  Yang and Xu, Rethinking the value of labels for improving class-imbalanced learning, NeurIPS 2020, section 3.
"""

from dataclasses import replace

import numpy as np

from mfm_jax.data.sources import Images, Labels, Pixels, Source
from mfm_jax.data.streaming import Streamed
from mfm_jax.errors import UserError

CLASSES = ("upright", "turned by 90 degrees", "turned by 180 degrees", "turned by 270 degrees")


def relabelled(source: Source) -> Source:
    """Returns the source with the quarters that `turned` turns each image by as its labels."""
    train, test = (_quarters(len(labels)) for labels in (source.train_labels, source.test_labels))
    return replace(source, class_names=CLASSES, train_labels=train, test_labels=test)


def turned(source: Source) -> Source:
    """Returns the source with its images turned anticlockwise, the i-th by i modulo 4 quarters, and these as labels.

    Raises:
      UserError: images that are streamed, or not square.
    """
    train, test = (_turned(images) for images in (source.train_images, source.test_images))
    return replace(relabelled(source), train_images=train, test_images=test)


def _quarters(size: int) -> Labels:
    return (np.arange(size) % len(CLASSES)).astype(np.int32)


def _turned(images: Images) -> Pixels:
    field = "data.pretext = 'rotation'"
    if isinstance(images, Streamed):
        raise UserError(f"{field}: needs all images at once; raise data.resident_mb, or train without a first stage")
    height, width = images.shape[1:3]
    if height != width:
        raise UserError(f"{field}: needs square images, not {height} x {width}; set data.image_size")
    found = np.empty_like(images)
    for quarters in range(len(CLASSES)):
        found[quarters :: len(CLASSES)] = np.rot90(images[quarters :: len(CLASSES)], quarters, axes=(1, 2))
    return found
