"""A zero-shot classifier: a head whose weights are the features of the classes' names, as a text tower gave them."""

import numpy as np

from mfm_jax.errors import UserError, in_a_line
from mfm_jax.machine.disk import expanded
from mfm_jax.models.pretrained import ARRAYS, UNREADABLE, arrays_in
from mfm_jax.types import PyTree


def with_text_head(params: PyTree, text_features: str) -> PyTree:
    """Returns `params` with the array of a file, `[K, C]`, as the head's weights, `[C, K]`, and no bias.

    Under `methods.heads.cosine` the logits are then `scale * cos(image features, text features of class k)`. CLIP's
    scale is 100 (the `exp` of its `logit_scale`).

    Args:
      params: of the classifier, whose head says K and C.
      text_features: `.npy`; or `.npz` or `.safetensors` with this one array. Row k is of class k.

    Raises:
      UserError: no such file, one that cannot be read, or an array of another shape.

    References:
      Radford et al., Learning transferable visual models from natural language supervision, ICML 2021, section 3.1.2.
    """
    head, field = params["head"], f"model.text_features = {text_features!r}"
    features = _read(text_features, field)
    wanted = head["kernel"].shape[::-1]
    if features.shape != wanted:
        raise UserError(
            f"{field}: has the shape {list(features.shape)}, not {list(wanted)}; give a row of each class, in their"
            " order, of as many numbers as the model has features"
        )
    if not np.isfinite(features).all():
        raise UserError(f"{field}: has values that are not finite; make it again")
    kernel = features.T.astype(head["kernel"].dtype)
    return {**params, "head": {"kernel": kernel, "bias": np.zeros(wanted[0], head["bias"].dtype)}}


def _read(path: str, field: str) -> np.ndarray:
    file = expanded(path)
    if not file.is_file():
        raise UserError(f"{field}: no such file")
    try:
        (array,) = arrays_in(file).values() if file.suffix in ARRAYS else (np.load(file, allow_pickle=False),)
        return np.asarray(array, np.float32)
    except UNREADABLE as error:
        raise UserError(
            f"{field}: cannot be read ({in_a_line(error)}); expected .npy, or .npz or .safetensors with one array"
        ) from error
