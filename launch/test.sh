#!/usr/bin/env bash
# Sets up .venv with the test extra and runs the quick tier of the tests. Arguments go to pytest; for everything:
# launch/test.sh -m "slow or not slow"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install test
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
