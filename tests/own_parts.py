"""Parts of a user's own, as a package of theirs has them: named by import path, or given as objects."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import mfm_jax as mfm
from mfm_jax.models import BatchNorm

CLASSES, SIDE = 4, 6
NOT_A_PART = 3


class Linen(nn.Module):
    """Batch norm, dropout and noise of a stream of its own; no `weight`, `axis_name`, `dtype`, `pooled` or `head`."""

    num_classes: int

    @nn.compact
    def __call__(self, x, deterministic, modulate=mfm.no_modulation):
        x = modulate("hidden", nn.Dense(8)(x.reshape(x.shape[0], -1)))
        x = nn.relu(nn.BatchNorm(use_running_average=deterministic)(x))
        x = nn.Dropout(0.1, deterministic=deterministic)(x)
        if not deterministic:
            x = x + 0.1 * jax.random.normal(self.make_rng("noise"), x.shape)
        return modulate("logits", nn.Dense(self.num_classes)(x))


class NNX(nnx.Module):
    """The same in NNX, which `train()` and `eval()` switch."""

    def __init__(self, num_classes, *, rngs):
        self.first = nnx.Linear(SIDE * SIDE, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(8, num_classes, rngs=rngs)

    def __call__(self, x, modulate=mfm.no_modulation):
        x = modulate("hidden", self.first(x.reshape(x.shape[0], -1)))
        x = modulate("pooled", self.dropout(nnx.relu(self.norm(x))))
        return modulate("logits", self.head(x))


class Bare(nn.Module):
    """A linear classifier that has never heard of sites or switches."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


class Tiny(nn.Module):
    """A layer, batch norm and a head, with the sites that every method may ask for."""

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None
    units: int = 8

    @nn.compact
    def __call__(self, image, *, train: bool = False, modulate=mfm.no_modulation, weight=None):
        x = image.reshape(len(image), -1).astype(self.dtype)
        x = nn.Dense(self.units, dtype=self.dtype, name="stage3")(x)
        x = BatchNorm(not train, axis_name=self.axis_name, dtype=self.dtype)(x, weight)
        x = modulate("pooled", modulate("stage3", nn.relu(x)))
        logits = nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)
        return modulate("logits", logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))


def arrays(each: int, seed: int):
    """Returns `each` images of each class, of which class k has a bright row k, and their labels."""
    labels = np.repeat(np.arange(CLASSES), each)
    images = np.random.default_rng(seed).integers(0, 120, (len(labels), SIDE, SIDE))
    images[np.arange(len(labels)), labels] += 100
    return images.astype(np.uint8), labels


def source(data):
    """Returns 20 training and 5 test images of each class."""
    return mfm.source_of_arrays(arrays(20, data.seed), arrays(5, 1000), name="rows")


def loss(logits, labels, counts):
    """Cross-entropy of logits raised by the log counts."""
    return mfm.losses.cross_entropy(logits + jnp.log(counts.astype(logits.dtype))[None, :], labels)


def learner(config, counts, channels):
    """The shift alone, at `logits`."""

    def init(key):
        return {"beta": jnp.zeros(channels["logits"])}

    def parameters(phi, site, features, labels):
        return jnp.zeros_like(phi["beta"]), phi["beta"]

    return mfm.Modulator(init, parameters, ("logits",))
