"""CIFAR-10-LT, imbalance factor 100, between small and full size: 32x32 images, ResNet-20, 20 epochs.

mfm-jax train cifar10_lt_medium --workdir=runs/cifar10_medium
"""

from mfm_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.model.name = "resnet20"
    config.train.epochs = 20
    config.train.batch_size = 50
    return config
