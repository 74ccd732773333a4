# shellcheck shell=bash
# Sourced by the other scripts: makes .venv and installs mfm_jax there, with the extra named in $1 if there is one.
# Nothing is installed again unless pyproject.toml changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local name
  for name in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if [ -n "$name" ] && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed; set PYTHON to one" >&2
  exit 2
}

install() {
  local extra=${1:-} stamp python
  stamp=".venv/installed-${extra:-base}-$(cksum <pyproject.toml | cut -d' ' -f1)"
  if [ ! -x .venv/bin/python ]; then
    python=$(find_python) || exit 2
    "$python" -m venv .venv || { rm -rf .venv; echo "error: no virtual environment; is python3-venv installed?" >&2; exit 2; }
  fi
  if [ ! -e "$stamp" ]; then
    echo "installing mfm_jax${extra:+ with extra $extra} into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extra:+[$extra]}"
    touch "$stamp"
  fi
}
