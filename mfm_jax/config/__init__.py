"""Configuration: ml_collections config files in, validated frozen dataclasses out."""

from mfm_jax.config.continuation import Change as Change
from mfm_jax.config.continuation import changes as changes
from mfm_jax.config.continuation import differences as differences
from mfm_jax.config.continuation import problem as problem
from mfm_jax.config.continuation import refused as refused
from mfm_jax.config.groups import FIELDS as FIELDS
from mfm_jax.config.groups import GROUPS as GROUPS
from mfm_jax.config.groups import SMALL_RESNETS as SMALL_RESNETS
from mfm_jax.config.groups import TOWERS as TOWERS
from mfm_jax.config.groups import VITS as VITS
from mfm_jax.config.groups import Augment as Augment
from mfm_jax.config.groups import Checkpoint as Checkpoint
from mfm_jax.config.groups import Config as Config
from mfm_jax.config.groups import Data as Data
from mfm_jax.config.groups import Eval as Eval
from mfm_jax.config.groups import Meta as Meta
from mfm_jax.config.groups import Model as Model
from mfm_jax.config.groups import Modulation as Modulation
from mfm_jax.config.groups import Optim as Optim
from mfm_jax.config.groups import Parallel as Parallel
from mfm_jax.config.groups import Train as Train
from mfm_jax.config.own import Own as Own
from mfm_jax.config.schema import default as default
from mfm_jax.config.schema import find_own as find_own
from mfm_jax.config.schema import resolve as resolve
from mfm_jax.methods.settings import Method as Method
