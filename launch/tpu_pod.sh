#!/usr/bin/env bash
# launch/tpu_pod.sh NAME ZONE [flags of mfm_jax.main]: one run on all workers of a Cloud TPU slice, one process a worker.
# Copies this clone to ~/mfm_jax of every worker, installs it there if it is not installed, and starts it. The workdir
# must lie on a share or a bucket that is mounted on all workers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if (($# < 3)) || [[ $1 == -* || $2 == -* ]]; then
  echo "usage: launch/tpu_pod.sh NAME ZONE [flags of mfm_jax.main]" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
flags=$(printf ' %q' "$@")
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="mkdir -p mfm_jax"
gcloud compute tpus tpu-vm scp --recurse pyproject.toml README.md LICENSE configs launch mfm_jax "$name:mfm_jax/" \
  --zone="$zone" --worker=all
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="cd mfm_jax &&
source launch/environment.sh && install tpu && exec .venv/bin/python -m mfm_jax.main --coordinator=auto$flags"
