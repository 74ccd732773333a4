from mfm_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.eval.every_epochs = 5
    config.checkpoint.every_epochs = 5
    return config
