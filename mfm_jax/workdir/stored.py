"""The config of a run as a config file, for `--config`: `stored.py:WORKDIR`."""

from pathlib import Path

import ml_collections

from mfm_jax.workdir.files import Workdir


def get_config(workdir: str) -> ml_collections.ConfigDict:
    """Returns every field as the run in `workdir` has it."""
    return ml_collections.ConfigDict(Workdir(Path(workdir)).read_config().to_dict())
