"""One's own pictures: a folder with a folder for each class, at 64x64 with a ResNet-20.

    mfm-jax check folder_lt --workdir=runs/mine --config.data.root=PICTURES
    mfm-jax train folder_lt --workdir=runs/mine --config.data.root=PICTURES

A fifth of each class is held out for testing and a tenth of the rest for validation, unless PICTURES has `train/`,
`val/` and `test/` (docs/data.md). With few pictures, batches are as large as these allow, which is said.

On a GPU, larger: --config.data.image_size=224 --config.augment.crop=resized --config.model.name=resnet50
--config.model.pretrained=resnet50.pth --config.data.normalize=imagenet
"""

from mfm_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.source = "folder"
    config.data.protocol = "natural"
    config.data.imbalance_factor = 1.0
    config.data.image_size = 64
    config.model.name = "resnet20"
    config.train.epochs = 60
    config.train.batch_size = 50
    config.meta.batch_size = 50
    config.checkpoint.every_epochs = 5
    return config
