#!/usr/bin/env bash
# launch/local.sh N [flags of mfm_jax.main]: one run in N processes on this machine, with the python of PATH; each has
# one GPU where there are N, and otherwise runs on the CPU. SIGTERM and Ctrl-C reach all of them. If one fails, that is
# told, the others get forty seconds to end by themselves, and its exit status is this script's.
set -euo pipefail

count=${1:-}
if ! [[ $count =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh N [flags of mfm_jax.main]" >&2
  exit 2
fi
shift
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)

exec 3>&2 2>/dev/null # without what bash itself says of a process that was killed
pids=()
for ((i = 0; i < count; i++)); do
  (
    if ((gpus >= count)); then export CUDA_VISIBLE_DEVICES=$i; else export JAX_PLATFORMS=cpu; fi
    exec python -m mfm_jax.main "--coordinator=127.0.0.1:$port" "--processes=$count" "--process=$i" "$@" 2>&3
  ) &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" || true' TERM INT

# Waits for process $1 and returns its status; a signal to this script does not end the wait.
ended() {
  local status
  while true; do
    status=0
    wait "$1" || status=$?
    kill -0 "$1" || return "$status"
  done
}

result=0 left=$count deadline=0
while ((left > 0)); do
  for i in "${!pids[@]}"; do
    if ! kill -0 "${pids[i]}"; then
      status=0
      ended "${pids[i]}" || status=$?
      unset "pids[i]"
      left=$((left - 1))
      if ((status != 0 && result == 0)); then
        result=$status deadline=$((SECONDS + 40))
        echo "local.sh: process $i of $count ended with status $status; the others have forty seconds to end" >&3
      fi
    fi
  done
  if ((deadline > 0 && SECONDS > deadline && left > 0)); then
    kill -KILL "${pids[@]}" || true
  fi
  sleep 0.2
done
exit "$result"
