"""ImageNet-LT: 115,846 training images of 1,000 classes (1280 to 5 each), 20 a class for validation, 50 for testing.

    mfm-jax train imagenet_lt --workdir=runs/imagenet_lt --config.data.root=FOLDER

FOLDER holds ImageNet's `train/` and `val/` (ILSVRC 2012) and the three lists of Liu et al., "Large-Scale Long-Tailed
Recognition in an Open World" (arXiv:1904.05160), `ImageNet_LT_train.txt`, `_val.txt` and `_test.txt`. ResNet-50 from
scratch, 90 epochs, as "Decoupling Representation and Classifier" (arXiv:1910.09217) trains, and RandAugment, as later
recipes have it (docs/recipes.md). The meta set is redrawn
from the training set every epoch, 5 images a class, as many as the rarest has.

Wants a GPU. No accuracy has been measured with it.
"""

from mfm_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.source = "list"
    config.data.train_list = "ImageNet_LT_train.txt"
    config.data.val_list = "ImageNet_LT_val.txt"
    config.data.test_list = "ImageNet_LT_test.txt"
    config.data.protocol = "natural"
    config.data.imbalance_factor = 1.0
    config.data.image_size = 224
    config.data.normalize = "imagenet"
    config.data.workers = 8
    config.augment.crop = "resized"
    config.augment.color_jitter = 0.4
    config.augment.policy = "randaugment"
    config.model.name = "resnet50"
    config.optim.reference_batch_size = 256
    config.train.epochs = 90
    config.train.batch_size = 256
    config.meta.batch_size = 256
    config.checkpoint.every_epochs = 5
    return config
