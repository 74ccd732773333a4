"""CIFAR-10-LT as in cifar10_lt, with the modulation of features that the paper's abstract speaks of.

    mfm-jax train cifar10_lt_features --workdir=runs/cifar10_features

On top of the curve at the logits, a scale and a shift for each pooled feature are learned; they read no label. Of the
variants that modulate features it was the best on validation: level with the curve alone on a network that fits the
head classes, and below it on one that does not (docs/results/study.md, finding 16).
"""

from mfm_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.modulation.sites = "pooled:direct,logits:frequency"
    return config
