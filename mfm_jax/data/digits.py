"""The digits of scikit-learn: 1,797 images of 8x8 that need no download, for tests and first runs."""

import numpy as np

from mfm_jax.config import Data
from mfm_jax.data.sources import TEST_SEED, Source, resize

_TEST_PER_CLASS = 50


def load(config: Data) -> Source:
    """Loads scikit-learn's digits, values 0..16 scaled to 0..255.

    The set has no test split of its own. 50 images a class, drawn with a constant seed and so the same for
    every `data.seed`, are its test split; 124 to 133 a class are left to train on.
    """
    import sklearn.datasets  # here: a second that the processes that decode do not pay

    digits = sklearn.datasets.load_digits()
    images = resize(np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None], config.image_size)
    labels = digits.target.astype(np.int32)
    is_test = np.zeros(len(labels), bool)
    for c in range(10):
        members = np.random.default_rng([TEST_SEED, c]).permutation(np.flatnonzero(labels == c))
        is_test[members[:_TEST_PER_CLASS]] = True
    return Source(
        name="digits",
        version="1",  # scikit-learn has shipped one version only
        class_names=tuple(str(c) for c in range(10)),
        train_images=images[~is_test],
        train_labels=labels[~is_test],
        train_ids=np.flatnonzero(~is_test).astype(np.int64),
        train_pool="all",
        test_images=images[is_test],
        test_labels=labels[is_test],
        test_ids=np.flatnonzero(is_test).astype(np.int64),
        test_pool="all",
    )
