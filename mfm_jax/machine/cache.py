"""Where decoded images, compiled programs and what is known of pictures are kept from run to run."""

import os
from pathlib import Path

import platformdirs


def folder() -> Path:
    """Returns the user's cache folder: `$MFM_JAX_CACHE`, a leading `~` expanded, or else the platform's."""
    return Path(os.path.expanduser(os.environ.get("MFM_JAX_CACHE") or platformdirs.user_cache_dir("mfm_jax")))
