"""The tested classifier of another run as the teacher of this one (`method.teacher`).

Its logits are computed within the compiled step, on the batch that the student sees: augmented, mixed, and normalised
as the teacher's own images were. It passes as at test time, by its running averages, and no gradient goes into it. Its
variables are an input of the step and in no checkpoint: a run that goes on reads them again, and the digest in its
record says whether they are the same.
"""

import hashlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from mfm_jax.bilevel.auxiliary import soft_labels
from mfm_jax.config import Config
from mfm_jax.data import LongTailData, augment, batches
from mfm_jax.errors import UserError
from mfm_jax.evaluation import facts as facts_lib
from mfm_jax.evaluation import tested
from mfm_jax.evaluation.facts import Facts
from mfm_jax.machine import cluster
from mfm_jax.machine.disk import expanded
from mfm_jax.types import ApplyFn, Batch, PyTree, Taught, no_modulation
from mfm_jax.workdir.checkpoint import hushed, reading
from mfm_jax.workdir.files import Workdir


class Teacher(NamedTuple):
    """A classifier whose predictions a student learns.

    apply: of the tested classifier.
    arrays: what the step reads: its `variables`, the `mean` and `std` of its images, and `typical` `[K, K]`, by class
      the mean of its probabilities over the training images; None where nothing reads it.
    digest: SHA-256 of its variables.
    """

    apply: ApplyFn
    arrays: PyTree
    digest: str

    def of_batch(self, batch: Batch, arrays: PyTree, mean: jax.Array, std: jax.Array) -> Batch:
        """Returns the batch and its second view with what the teacher says of them; `arrays` as in the step's input.

        `mean` and `std` `[C]` are those by which the images were normalised.
        """
        second = batch.second and self.of_batch(batch.second, arrays, mean, std)
        logits = _logits(self.apply, arrays, batch.image * _pixelwise(std) + _pixelwise(mean))
        typical = arrays["typical"]
        if typical is not None:
            typical = soft_labels(batch, len(typical)) @ typical
        return batch._replace(teacher=Taught(logits, typical), second=second)


def of(config: Config, data: LongTailData, *, typical: bool) -> Teacher | None:
    """Returns the teacher of a run, None where none has a share in its loss; `typical`: with its mean predictions.

    Raises:
      UserError: there is no such run, it has no sound checkpoint, or its classes or images are others.
    """
    if not (config.method.teacher and config.method.distill):
        return None
    field, run = f"method.teacher = {config.method.teacher!r}", Workdir(expanded(config.method.teacher))
    try:
        its_config, facts = run.read_config(), facts_lib.read(run)
        with hushed(), reading(run, its_config.checkpoint) as (checkpoints, step):
            state = checkpoints.restore_tested(step)[0]
    except (UserError, NotADirectoryError) as error:
        raise UserError(f"{field}: {error}") from error
    _check(field, facts, data)
    plain = tested.of(its_config, np.asarray(facts.train_class_counts))
    # On the host, so that they go to whatever devices the step is on.
    variables = jax.device_get({"params": plain.params(state), "batch_stats": state.batch_stats})
    mean, std = (np.asarray(values, np.float32) for values in (facts.mean, facts.std))
    arrays = {"variables": variables, "mean": mean, "std": std, "typical": None}
    if typical:
        arrays["typical"] = _typical(plain.apply, arrays, data, config.eval.batch_size)
    if cluster.is_primary():
        print(f"learns from the classifier of {run.path} ({its_config.method.name}), step {step}", file=sys.stderr)
    return Teacher(plain.apply, arrays, _digest(variables))


def _check(field: str, facts: Facts, data: LongTailData) -> None:
    names: Sequence[str] = data.class_names
    if len(facts.class_names) != len(names):
        raise UserError(f"{field}: it has {len(facts.class_names)} classes, this run {len(names)}; choose another")
    if other := [(a, b) for a, b in zip(facts.class_names, names, strict=True) if a != b]:
        raise UserError(f"{field}: its classes are others, such as {other[0][0]!r} there and {other[0][1]!r} here")
    if facts.image_shape != (here := data.train_images.shape[1:]):
        raise UserError(
            f"{field}: its images are {list(facts.image_shape)}, here they are {list(here)}; match data.image_size and"
            " data.channels"
        )


def _logits(apply: ApplyFn, arrays: PyTree, pixels: jax.Array) -> jax.Array:
    """Returns the logits `[B, K]` of images in units of 0..255."""
    images = augment.normalize(pixels, arrays["mean"], arrays["std"])
    found: jax.Array = apply(arrays["variables"], images, modulate=no_modulation, train=False)
    return jax.lax.stop_gradient(found)


def _pixelwise(values: jax.Array) -> jax.Array:
    return values.reshape(1, 1, 1, -1)


def _typical(apply: ApplyFn, arrays: PyTree, data: LongTailData, size: int) -> np.ndarray:
    """Returns float32 `[K, K]`, for each class the mean of the teacher's probabilities over its training images."""
    predict = jax.jit(lambda images, arrays: jax.nn.softmax(_logits(apply, arrays, images)))
    parts = batches.eval_batches(np.asarray(data.train_images), size)
    found = np.concatenate([np.asarray(predict(part, arrays))[mask] for part, mask in parts])
    total = np.zeros((data.num_classes, data.num_classes), np.float64)
    np.add.at(total, data.train_labels, found)
    return (total / data.counts[:, None]).astype(np.float32)


def _digest(variables: PyTree) -> str:
    found = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(variables):
        found.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return found.hexdigest()
