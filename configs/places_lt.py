"""Places-LT: 62,500 training images of 365 classes (4980 to 5 each), 20 a class for validation, 100 for testing.

    mfm-jax train places_lt --workdir=runs/places_lt --config.data.root=FOLDER \
      --config.model.pretrained=resnet152.pth

FOLDER holds the 256-pixel images of Places365-Standard (`data_256/`, `val_256/`, `test_256/`) and the three lists of
Liu et al., "Large-Scale Long-Tailed Recognition in an Open World" (arXiv:1904.05160). The protocol starts from a
ResNet-152 that was trained on ImageNet, here torchvision's weights, and trains 30 epochs. The meta set is redrawn from
the training set every epoch, 5 images a class.

Wants a GPU. No accuracy has been measured with it.
"""

from mfm_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.source = "list"
    config.data.train_list = "Places_LT_train.txt"
    config.data.val_list = "Places_LT_val.txt"
    config.data.test_list = "Places_LT_test.txt"
    config.data.protocol = "natural"
    config.data.imbalance_factor = 1.0
    config.data.image_size = 224
    config.data.normalize = "imagenet"
    config.data.workers = 8
    config.augment.crop = "resized"
    config.augment.color_jitter = 0.4
    config.augment.policy = "randaugment"
    config.model.name = "resnet152"
    config.model.remat = True
    config.optim.learning_rate = 0.02
    config.optim.reference_batch_size = 256
    config.train.epochs = 30
    config.train.batch_size = 256
    config.meta.batch_size = 256
    config.checkpoint.every_epochs = 5
    return config
