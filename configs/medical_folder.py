"""Medical pictures, or others of which a miss is dear: EfficientNet-B0, heavy augmentation, costs, a wanted recall.

    mfm-jax check medical_folder --workdir=runs/lesions --config.data.root=PICTURES
    mfm-jax train medical_folder --workdir=runs/lesions --config.data.root=PICTURES \\
        '--config.eval.costs=melanoma>*=10' --config.eval.recall=melanoma=0.95

PICTURES has a folder of pictures for each class, with names that tell patients apart if several are of one: give
--config.data.group then. A melanoma that is taken for something else costs ten times what another mistake does, and 95
of 100 are to be found: put your own classes and costs in the place of these. The threshold for a recall of 0.95 needs
19 validation images of the class; a fifth of each class is held out for testing, and a fifth of the rest for that.

Needs a GPU. With weights of ImageNet: --config.model.pretrained=efficientnet_b0.pth --config.data.normalize=imagenet
--config.optim.learning_rate=0.01. To train by the costs, too: --config.meta.loss=cost, or
--config.method.cost_share=0.5.
"""

from mfm_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.source = "folder"
    config.data.protocol = "natural"
    config.data.imbalance_factor = 1.0
    config.data.val_fraction = 0.2
    config.data.image_size = 224
    config.model.name = "efficientnet_b0"
    config.augment.crop = "resized"
    config.augment.min_area = 0.4  # what is to be seen may lie at the border
    config.augment.color_jitter = 0.4
    config.augment.policy = "trivialaugment"
    config.augment.cutout = 56
    config.train.epochs = 60
    config.train.batch_size = 50
    config.meta.batch_size = 50
    config.optim.warmup_epochs = 3
    config.eval.costs = "melanoma>*=10"
    config.eval.recall = "melanoma=0.95"
    config.checkpoint.every_epochs = 5
    return config
