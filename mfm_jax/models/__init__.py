"""Classifiers. Each exposes its sites by calling `modulate(site, features)` on the way."""

from mfm_jax.models.catalog import create as create
from mfm_jax.models.catalog import virtual_groups as virtual_groups
from mfm_jax.models.normalization import BatchNorm as BatchNorm
from mfm_jax.models.tuning import frozen as frozen
from mfm_jax.models.tuning import is_added as is_added
from mfm_jax.models.tuning import merged as merged
from mfm_jax.models.tuning import trained as trained
