"""CIFAR-100-LT, imbalance factor 100, at full size: the recipe of `cifar10_lt` on 100 classes.

    mfm-jax train cifar100_lt --workdir=runs/cifar100

Meant for a GPU or TPU; no accuracy has been measured with this config yet.
"""

from mfm_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "cifar100"
    config.checkpoint.every_epochs = 5
    return config
