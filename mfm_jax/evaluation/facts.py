"""What only the training data could say of a classifier, kept in its run's folder: the data need not be at hand."""

import dataclasses
from typing import Any

from mfm_jax.config import Config
from mfm_jax.data import LongTailData
from mfm_jax.data.pictures import WHITE
from mfm_jax.workdir.files import Workdir, read_object


@dataclasses.dataclass(frozen=True)
class Facts:
    """The content of `Workdir.facts`.

    class_names: K names.
    image_shape: (H, W, C) of an image.
    fit: how a picture of another shape becomes one (`pictures.read`).
    mean, std: of each channel, in units of 0..255; images are normalised by them.
    train_class_counts: K, images of each class that were trained on.
    white: the value in pictures of 16 bits a channel that becomes 255 (`pictures.read`); of older runs, the largest.
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    fit: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_class_counts: tuple[int, ...]
    white: int = WHITE


def describe(config: Config, data: LongTailData) -> Facts:
    """Returns the facts of a run's data."""
    height, width, channels = data.train_images.shape[1:]
    return Facts(
        class_names=tuple(data.class_names),
        image_shape=(height, width, channels),
        # The other sources hold arrays, which `sources.resize` squeezes.
        fit=config.data.fit if config.data.source in ("folder", "list") else "squeeze",
        mean=tuple(data.mean.tolist()),
        std=tuple(data.std.tolist()),
        train_class_counts=tuple(data.counts.tolist()),
        white=data.manifest.get("white", config.data.white or WHITE),
    )


def read(workdir: Workdir) -> Facts:
    """Returns the facts of the run in `workdir`.

    Raises:
      UserError: the file is missing or damaged.
    """
    required = (field.name for field in dataclasses.fields(Facts) if field.default is dataclasses.MISSING)
    return of_object(read_object(workdir.facts, *required))


def of_object(found: dict[str, Any]) -> Facts:
    """Returns the facts among the values of a JSON object, of which those without a default must be there."""
    fields = dataclasses.fields(Facts)
    given = ((field.name, found[field.name]) for field in fields if field.name in found)
    values: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in given}
    return Facts(**values)
