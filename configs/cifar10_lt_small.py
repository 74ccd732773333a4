from mfm_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.image_size = 16
    config.augment.pad = 2
    config.model.name = "resnet8"
    config.train.epochs = 30
    config.eval.every_epochs = 5
    config.checkpoint.every_epochs = 5
    return config
