"""iNaturalist 2018: 437,513 training images of 8,142 species (1000 to 2 each), 24,426 for testing.

    mfm-jax train inaturalist18 --workdir=runs/inaturalist18 --config.data.root=FOLDER

FOLDER holds `train_val2018/` and the lists of `path label` lines `iNaturalist18_train.txt` and `iNaturalist18_val.txt`,
as "Decoupling Representation and Classifier" (arXiv:1910.09217) publishes them; its validation set is what everyone
tests on, so that there is none to choose on. ResNet-50 from scratch, 90 epochs. The meta set is redrawn from the
training set every epoch, 2 images a class.

Wants a GPU. No accuracy has been measured with it.
"""

from mfm_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.source = "list"
    config.data.train_list = "iNaturalist18_train.txt"
    config.data.test_list = "iNaturalist18_val.txt"
    config.data.val_fraction = 0.0
    config.data.protocol = "natural"
    config.data.imbalance_factor = 1.0
    config.data.image_size = 224
    config.data.normalize = "imagenet"
    config.data.workers = 8
    config.augment.crop = "resized"
    config.augment.color_jitter = 0.4
    config.model.name = "resnet50"
    config.optim.weight_decay = 1e-4
    config.optim.reference_batch_size = 256
    config.train.epochs = 90
    config.train.batch_size = 256
    config.meta.batch_size = 256
    config.checkpoint.every_epochs = 5
    return config
