"""scikit-learn's handwritten digits (1,797 images, 8x8, embedded), imbalance factor 50: the quickstart's config.

    mfm-jax compare digits_lt --methods=ce,mfm --seeds=0,1,2 --workdir=runs/digits_lt

Takes about 90 s on two CPU cores. Balanced test accuracy, mean and standard deviation of 3 seeds: CE 87.4 ± 0.5 %,
MFM 93.5 ± 2.1. `launch/quickstart.sh` also sets 5 images a class aside for validation.
"""

from mfm_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.source = "digits"
    config.data.name = "digits"
    config.data.imbalance_factor = 50.0
    config.augment.pad = 1
    config.augment.flip = False  # a mirrored digit is another character
    config.model.name = "resnet8"
    config.meta.every = 1  # a run of 540 steps has few to learn the modulation in
    config.train.epochs = 60
    config.train.batch_size = 32
    config.optim.learning_rate = 0.05
    config.checkpoint.every_epochs = 20
    return config
