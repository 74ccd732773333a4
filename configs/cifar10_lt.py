"""CIFAR-10-LT, imbalance factor 100, at full size: ResNet-32, 200 epochs, reflect-pad, crop and flip.

    python -m mfm_jax.main --config=configs/cifar10_lt.py --workdir=runs/cifar10

Meant for a GPU or TPU. On two CPU cores a step took 0.86 s (benchmarks/run.py), so 200 epochs of 123 steps would
take 6 hours there; no accuracy has been measured with this config yet. A trial: --config.train.max_steps=20.
"""

from mfm_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.checkpoint.every_epochs = 5
    return config
