"""PlanktonSet 1.0 (the training folder of the National Data Science Bowl): 121 classes, 1979 to 9 grey pictures each.

    mfm-jax train plankton --workdir=runs/plankton --config.data.root=PICTURES

PICTURES has a folder of pictures for each class. Takes 10 minutes on one CPU core. Balanced test accuracy, mean
and standard deviation of 3 seeds: MFM 55.2 ± 0.4 %, CE 41.2 ± 0.3, logit adjustment as
published 51.4 ± 0.4 (docs/results/plankton.md).
"""

from mfm_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.source = "folder"
    config.data.protocol = "natural"
    config.data.imbalance_factor = 1.0
    config.data.image_size = 32
    config.data.fit = "pad"
    config.model.name = "resnet8"
    config.train.epochs = 12
    config.train.batch_size = 50
    config.eval.every_epochs = 2
    config.checkpoint.every_epochs = 4
    return config
