#!/usr/bin/env bash
# Measures docs/results/methods.csv: every method on cifar10_lt_small, 3 seeds, the main ones first. About 5 hours on one
# CPU core. Started again with the same folder it goes on. Arguments after the folder go to mfm_jax.compare:
#   benchmarks/methods.sh runs/methods --jobs=2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
workdir=${1:?give a folder for the runs, e.g. runs/methods}
shift
main=ce,logit_adjusted,mfm,ldam_drw,oversample,crt,meta_weight_net
rest=posthoc_la,l2ac,metasaug,class_balanced,ldam,lws,tau_norm,progressive,sqrt_sample,two_phase,focal,smote
rest+=,undersample,dice,sampling_free,l2rw
compare() {
  python -m mfm_jax.compare --config=configs/cifar10_lt_small.py --workdir="$workdir" "$@"
}
compare --methods="$main" --seeds=0,1,2 "$@"
for seeds in 0 0,1 0,1,2; do
  compare --methods="$main,$rest" --seeds="$seeds" "$@"
done
cp "$workdir/compare.csv" docs/results/methods.csv
