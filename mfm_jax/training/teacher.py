"""The tested classifier of another run as the teacher of this one (`method.teacher`).

Its logits are computed within the compiled step, on the batch that the student sees, augmented and mixed, but
normalised as the teacher's own images were. It passes as at test time. Its variables are an input of the step and in
no checkpoint: a run that goes on reads them again, and the digest in its record says whether they are the same.
"""

import hashlib
import sys
from typing import NamedTuple

import jax
import numpy as np
from flax import serialization

from mfm_jax.bilevel.auxiliary import soft_labels
from mfm_jax.config import Config
from mfm_jax.data import LongTailData, augment, batches
from mfm_jax.errors import UserError, some_of
from mfm_jax.evaluation import facts as facts_lib
from mfm_jax.evaluation import tested
from mfm_jax.machine import cluster
from mfm_jax.machine.disk import expanded
from mfm_jax.types import ApplyFn, Batch, PyTree, Taught, no_modulation
from mfm_jax.workdir.checkpoint import hushed, reading
from mfm_jax.workdir.files import Workdir


class Teacher(NamedTuple):
    """A classifier whose predictions a student learns.

    apply: of the tested classifier.
    arrays: what the step reads, on the host: its `variables`, `mean` and `std` of its images, and `typical` `[K, K]`,
      by class the mean of its probabilities over the training images; None where nothing reads it.
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
        image = augment.normalize(batch.image, (arrays["mean"] - mean) / std, arrays["std"] / std)
        typical = arrays["typical"]
        if typical is not None:
            typical = soft_labels(batch, len(typical)) @ typical
        return batch._replace(teacher=Taught(_logits(self.apply, arrays, image), typical), second=second)


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
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
    if facts.class_names != tuple(data.class_names):
        odd = some_of(sorted({*facts.class_names} ^ {*data.class_names})) or "their order"
        raise UserError(f"{field}: its classes and those of this run differ in {odd}; choose another")
    if facts.image_shape != (here := data.train_images.shape[1:]):
        raise UserError(
            f"{field}: its images are {list(facts.image_shape)}, here they are {list(here)}; match data.image_size and"
            " data.channels"
        )
    plain = tested.of(its_config, np.asarray(facts.train_class_counts))
    variables = jax.device_get({"params": plain.params(state), "batch_stats": state.batch_stats})
    arrays = {"variables": variables, "typical": None}
    arrays |= {name: np.asarray(getattr(facts, name), np.float32) for name in ("mean", "std")}
    if typical:
        arrays["typical"] = _typical(plain.apply, arrays, data, config.eval.batch_size)
    if cluster.is_primary():
        print(f"learns from the classifier of {run.path} ({its_config.method.name}), step {step}", file=sys.stderr)
        if leaks := run.leaks(data.manifest):
            print(f"warning: {field}: {leaks}", file=sys.stderr)
    return Teacher(plain.apply, arrays, hashlib.sha256(serialization.to_bytes(variables)).hexdigest())


def _logits(apply: ApplyFn, arrays: PyTree, image: jax.Array) -> jax.Array:
    found: jax.Array = apply(arrays["variables"], image, modulate=no_modulation, train=False)
    return jax.lax.stop_gradient(found)


def _typical(apply: ApplyFn, arrays: PyTree, data: LongTailData, size: int) -> np.ndarray:
    """Returns float32 `[K, K]`, for each class the mean of the teacher's probabilities over its training images."""

    @jax.jit
    def predict(images: jax.Array, arrays: PyTree) -> jax.Array:
        return jax.nn.softmax(_logits(apply, arrays, augment.normalize(images, arrays["mean"], arrays["std"])))

    parts = batches.eval_batches(data.train_images, size)
    found = np.concatenate([np.asarray(predict(part, arrays))[mask] for part, mask in parts])
    return np.stack([found[data.train_labels == k].mean(0) for k in range(data.num_classes)])
