"""CIFAR-100-LT, imbalance factor 100, from CLIP's ViT-B/16 with the settings of LIFT: adapters and a zero-shot head.

    mfm-jax train cifar100_lt_lift --workdir=runs/lift --config.model.pretrained=model.safetensors \
      --config.model.text_features=text.npy

`model.safetensors` is that of `openai/clip-vit-base-patch16`; `text.npy` has the text tower's features of "a photo of a
CLASS." for the 100 classes, [100, 512], in their order (docs/models.md). Of Shi et al., "Long-tail learning with
foundation model: heavy fine-tuning hurts" (arXiv:2309.10019): AdaptFormer of 2^floor(log2(K / 24)) units, a cosine head
that starts from the text features, the logit-adjusted loss, SGD at 0.01 with batches of 128, ten epochs.

Theirs has more: five crops at test time, random crops of any size, adapters with a layer norm and a learned factor; and
its head reads the 768 numbers before CLIP's projection. --config.method.name=mfm trains the same under MFM. Wants a
GPU. No accuracy has been measured with it.
"""

from mfm_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "cifar100"
    config.data.protocol = "full"
    config.data.image_size = 224
    config.data.normalize = "clip"
    config.augment.pad = 28
    config.model.name = "clip_vit_b16"
    config.model.tune = "adapters"
    config.model.adapter_size = 4
    config.method.name = "logit_adjusted"
    config.method.head = "cosine"
    config.method.ldam_scale = 25.0
    config.optim.learning_rate = 0.01
    config.train.epochs = 10
    config.train.batch_size = 128
    return config
