"""CIFAR-10-LT as in cifar10_lt, with the modulation of features that the paper's abstract speaks of.

    mfm-jax train cifar10_lt_features --workdir=runs/cifar10_features

On top of the curve at the logits a modulator network scales and shifts the pooled features. It reads the features, not
the label, and learns at a quarter of the rate. On validation it is the best of the variants that modulate features and
below the curve alone (docs/results/study.md).
"""

from mfm_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.modulation.sites = "pooled:network,logits:frequency"
    config.meta.learning_rate = 0.0025
    return config
