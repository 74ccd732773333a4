"""`python -m mfm_jax COMMAND` is `mfm-jax COMMAND`."""

import sys

from mfm_jax import cli

if __name__ == "__main__":
    sys.exit(cli.main())
