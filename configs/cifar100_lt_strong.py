"""CIFAR-100-LT as in cifar100_lt, under AutoAugment and Cutout, as the strongest published recipes have them.

    mfm-jax train cifar100_lt_strong --workdir=runs/cifar100_strong

Published runs of 400 epochs gain one to two points more: --config.train.epochs=400. Meant for a GPU or TPU; no accuracy
has been measured with this config yet.
"""

from mfm_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "cifar100"
    config.augment.policy = "autoaugment"
    config.augment.cutout = 8
    config.checkpoint.every_epochs = 5
    return config
