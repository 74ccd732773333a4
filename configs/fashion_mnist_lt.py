"""Fashion-MNIST-LT (grey, 28x28), imbalance factor 100: ResNet-20, 60 epochs.

    mfm-jax train fashion_mnist_lt --workdir=runs/fashion

Meant for a GPU or TPU; no accuracy has been measured with this config yet.
"""

from mfm_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "fashion_mnist"
    config.augment.pad = 2
    config.model.name = "resnet20"
    config.train.epochs = 60
    config.checkpoint.every_epochs = 5
    return config
