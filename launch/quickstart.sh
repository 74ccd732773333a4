#!/usr/bin/env bash
# Sets up .venv and compares cross-entropy with MFM on long-tailed digits (data embedded in scikit-learn), 3 seeds; 5
# images a class are kept for validation, every tenth epoch. Two runs are trained side by side.
# Arguments go to mfm_jax.compare, e.g. --config.train.epochs=2 for a short trial; they need a --workdir of their own.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install
exec .venv/bin/python -m mfm_jax.compare --config=configs/digits_lt.py --methods=ce,mfm --seeds=0,1,2 \
  --config.data.val_images_per_class=5 --config.eval.every_epochs=10 --jobs=2 --workdir=runs/quickstart "$@"
