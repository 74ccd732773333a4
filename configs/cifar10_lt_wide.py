"""CIFAR-10-LT, imbalance factor 100, with a ResNet-32 of width 64 and the two mixtures of GLMC under MFM.

    mfm-jax train cifar10_lt_wide --workdir=runs/cifar10_wide

Batch, rate and weight decay are those of GLMC (Du et al., CVPR 2023), whose network has this width; papers call it
ResNet-32, too, and it has 16 times the parameters of that of cifar10_lt. --config.method.name=glmc trains it without
MFM. Meant for a GPU or TPU; no accuracy has been measured with this config yet.
"""

from mfm_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "cifar10"
    config.model.width = 64
    config.method.base = "glmc"
    config.optim.learning_rate = 0.01
    config.optim.weight_decay = 5e-3
    config.train.batch_size = 64
    config.checkpoint.every_epochs = 5
    return config
