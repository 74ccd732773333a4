"""Images and their splits: sources, the long-tail protocol, checks, batches."""

from mfm_jax.data.assembly import LongTailData as LongTailData
from mfm_jax.data.assembly import build as build
