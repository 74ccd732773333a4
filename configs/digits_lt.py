from mfm_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.source = "digits"
    config.data.name = "digits"
    config.data.imbalance_factor = 50.0
    config.augment.pad = 1
    config.augment.flip = False
    config.model.name = "resnet8"
    config.train.epochs = 60
    config.train.batch_size = 32
    config.optim.learning_rate = 0.05
    config.eval.every_epochs = 10
    config.checkpoint.every_epochs = 20
    return config
