"""Meta Feature Modulator for long-tailed recognition (arXiv:2008.03428), in JAX and Flax.

The public face: the names of `__all__`, each imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mfm_jax.bilevel import MetaRule as MetaRule
    from mfm_jax.bilevel import Pass as Pass
    from mfm_jax.bilevel import init_state as init_state
    from mfm_jax.bilevel import losses as losses
    from mfm_jax.bilevel import make_plain_step as make_plain_step
    from mfm_jax.bilevel import make_step as make_step
    from mfm_jax.bilevel import modulation as modulation
    from mfm_jax.bilevel.outer import MetaLearner as MetaLearner
    from mfm_jax.data.own import source_of_arrays as source_of_arrays
    from mfm_jax.data.sources import Source as Source
    from mfm_jax.errors import UserError as UserError
    from mfm_jax.estimator import MFMClassifier as MFMClassifier
    from mfm_jax.evaluation.classifier import load as load
    from mfm_jax.models.own import from_nnx as from_nnx
    from mfm_jax.training.own_loop import recipe as recipe
    from mfm_jax.training.train import train_and_evaluate as train_and_evaluate
    from mfm_jax.types import Batch as Batch
    from mfm_jax.types import BilevelState as BilevelState
    from mfm_jax.types import Modulator as Modulator
    from mfm_jax.types import no_modulation as no_modulation

__version__ = "0.1.0"

_HOME = {
    "bilevel": ("MetaRule", "Pass", "init_state", "losses", "make_plain_step", "make_step", "modulation"),
    "bilevel.outer": ("MetaLearner",),
    "data.own": ("source_of_arrays",),
    "data.sources": ("Source",),
    "errors": ("UserError",),
    "estimator": ("MFMClassifier",),
    "evaluation.classifier": ("load",),
    "models.own": ("from_nnx",),
    "training.own_loop": ("recipe",),
    "training.train": ("train_and_evaluate",),
    "types": ("Batch", "BilevelState", "Modulator", "no_modulation"),
}
_MODULE = {name: f"mfm_jax.{module}" for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'mfm_jax' has no attribute {name!r}")
    home = importlib.import_module(_MODULE[name])
    return getattr(home, name) if hasattr(home, name) else importlib.import_module(f"{_MODULE[name]}.{name}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
