"""The modulator that a run starts with: that of another run, of a file, or one that is shipped.

A file is a JSON object whose `phi` has the parameters by site, such as `{"phi": {"logits": {"a": 1, "b": 0, "c": 0}}}`.
"""

from pathlib import Path

import jax
import numpy as np

from mfm_jax.errors import UserError
from mfm_jax.machine.disk import expanded
from mfm_jax.types import PyTree
from mfm_jax.workdir.checkpoint import check_shapes, restore_phi
from mfm_jax.workdir.files import read_object

_FOLDER = Path(__file__).parents[1] / "modulators"


def shipped() -> dict[str, Path]:
    """Returns the files of the modulators that come with the package, by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.json"))}


def phi(source: str, like: PyTree, kind: str) -> PyTree:
    """Returns the phi that `modulation.init_from` asks for.

    Args:
      source: the name of a shipped modulator, the path of a JSON file, or a run's folder.
      like: freshly initialised phi of the form wanted here.
      kind: what phi is here (`outer.MetaLearner.kind`).

    Raises:
      UserError: there is no such phi, or its sites or widths differ from those of `like`.
    """
    field = f"modulation.init_from = {source!r}"
    path = shipped().get(source, expanded(source))
    if path.suffix != ".json":
        if not path.is_dir():
            raise UserError(f"{field}: no such folder; give a run's workdir, a JSON file, or {', '.join(shipped())}")
        return restore_phi(path, like, kind)
    numbers = read_object(path, "phi")["phi"]
    try:
        given = jax.tree.map(np.float32, numbers, is_leaf=_no_object)
    except (TypeError, ValueError):
        raise UserError(f"{field}: its phi has something else than numbers") from None
    check_shapes(field, given, like)
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), given, like)


def _no_object(node: object) -> bool:
    return not isinstance(node, dict)
