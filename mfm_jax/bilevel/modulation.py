"""The modulation: features scaled and shifted while the classifier trains, and what generates gamma and beta.

At a site with features `h [B, ..., C]`,

    film(h, gamma, beta) = (1 + gamma) * h + beta,

the identity at `gamma = beta = 0`, where every form starts. Training passes are modulated; the meta pass and
every test pass are plain, so the modulation absorbs what sets the long-tailed set apart from a balanced one, and
costs nothing once training is over.

Three forms generate gamma and beta. They share class structure in different amounts, and that decides how well a
few balanced images can estimate them:

  direct     a free vector `[C]` a site, or `[K, C]` with one row a class, looked up by the training label.
  frequency  a curve in `z_k = log(n_k / n_max)`: `gamma_k = tanh(b z_k / 10)`, `beta_k = a z_k + c z_k^2 / 10`. At
             `logits`, where channels are classes, three numbers in all and no label is needed; at feature sites
             `a, b, c [C]` and the training label's `z_y`. `z` is not rescaled: a balanced set has z = 0, hence the
             identity, and the curve means the same on another data set.
  network    a two-layer MLP a site over the sample's own globally pooled, L2-normalised features, optionally
             joined with `z_y`. Its last layer starts at zero.

The generated forms bound gamma by tanh: a scale that falls below zero turns logits around, the classifier learns to
suppress the classes it belongs to, and the meta-gradient no longer finds the way back. The 10 under `c` makes a step of
Adam in `c` move beta about as far as one in `a` at the imbalance factors in use (z down to about -5). The one under `b`
keeps gamma from running to its bound before beta has found its place.

References:
  Wang et al., Meta feature modulator for long-tailed recognition, arXiv:2008.03428, 2020 (abstract: scale and
  shift, the direct form, the modulator network). The frequency form is this project's own.
  Perez et al., FiLM: visual reasoning with a general conditioning layer, AAAI 2018, eq. 2.
"""

from collections.abc import Callable, Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mfm_jax.errors import UserError
from mfm_jax.types import Modulate, Modulator, PyTree


def film(features: jax.Array, gamma: jax.Array, beta: jax.Array) -> jax.Array:
    """Returns `(1 + gamma) * features + beta` in the dtype of `features`.

    Args:
      features: `[B, ..., C]`.
      gamma: `[C]`, or `[B, C]` for a modulation of its own for each example.
      beta: like `gamma`.

    Raises:
      AssertionError: `gamma` and `beta` differ in shape.

    References:
      Perez et al. 2018, eq. 2, with gamma centred on the identity.
    """
    chex.assert_equal_shape((gamma, beta))
    shape = gamma.shape[:-1] + (1,) * (features.ndim - gamma.ndim) + gamma.shape[-1:]
    gamma, beta = (x.reshape(shape).astype(features.dtype) for x in (gamma, beta))
    # Written so that in bfloat16 a small gamma is not lost against the 1.
    return features + (gamma * features + beta)


def modulate(modulator: Modulator, phi: PyTree, labels: jax.Array) -> Modulate:
    """Returns the function that a classifier calls at its sites: `film` with the modulator's gamma and beta.

    Args:
      modulator: one of the forms below.
      phi: its parameters.
      labels: training labels of the batch, `[B]` int32.

    Raises:
      UserError: when called, gamma and beta are not as wide as the features.
    """

    def apply(site: str, features: jax.Array) -> jax.Array:
        if site not in modulator.sites:
            return features
        gamma, beta = modulator.parameters(phi, site, features, labels)
        if gamma.shape[-1:] != features.shape[-1:]:
            raise UserError(
                f"site {site!r}: its features are {features.shape}, the modulator's gamma is {gamma.shape};"
                " `site_channels` finds the widths of a module's sites"
            )
        return film(features, gamma, beta)

    return apply


def log_frequency(counts: jax.Array) -> jax.Array:
    """Returns `z_k = log(n_k / n_max)`, `[K]` float32, natural log, not rescaled; 0 for the largest class.

    Raises:
      UserError: a class has no image; z would be infinite, and the loss NaN. Not noticed within a traced function.
    """
    counts = jnp.asarray(counts, jnp.float32)
    if not isinstance(counts, jax.core.Tracer) and (empty := np.flatnonzero(np.asarray(counts) < 1)).size:
        raise UserError(f"counts: class {empty[0]} has {counts[empty[0]]:g} images; leave out classes without any")
    return jnp.log(counts) - jnp.log(counts.max())


def direct(channels: Mapping[str, int], num_classes: int = 0) -> Modulator:
    """Free gamma and beta, `[C]` a site; with `num_classes`, `[K, C]`: the row of the training label.

    Args:
      channels: C of each site to modulate.
      num_classes: K for a row a class; 0 for one vector that all classes share.

    References:
      arXiv:2008.03428, abstract ("learnable hyper-parameters").
    """

    def init(key: jax.Array) -> PyTree:
        del key
        rows = (num_classes,) if num_classes else ()
        zeros = {site: jnp.zeros((*rows, size), jnp.float32) for site, size in channels.items()}
        return {site: {"gamma": zero, "beta": zero} for site, zero in zeros.items()}

    def parameters(phi: PyTree, site: str, features: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        del features
        gamma, beta = phi[site]["gamma"], phi[site]["beta"]
        return (gamma[labels], beta[labels]) if num_classes else (gamma, beta)

    return Modulator(init, parameters, tuple(channels))


def frequency(channels: Mapping[str, int], counts: jax.Array, *, shift_only: bool = False) -> Modulator:
    """A curve in the log class count: `gamma_k = tanh(b z_k / 10)`, `beta_k = a z_k + c z_k^2 / 10`.

    At `logits` a, b, c are scalars and channel k takes class k's values; at a feature site they are `[C]` and each
    example takes the values of its training label's class.

    Args:
      channels: C of each site to modulate.
      counts: training images of each class, `[K]`, all at least 1.
      shift_only: without b; gamma is zero.
    """
    z, names = log_frequency(counts), "ac" if shift_only else "abc"

    def init(key: jax.Array) -> PyTree:
        del key
        zeros = {s: jnp.zeros(() if s == "logits" else (c,), jnp.float32) for s, c in channels.items()}
        return {site: dict.fromkeys(names, zero) for site, zero in zeros.items()}

    def parameters(phi: PyTree, site: str, features: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        del features
        numbers = phi[site]
        here = z.astype(numbers["a"].dtype)
        if site != "logits":
            here, numbers = here[labels][:, None], {name: value[None, :] for name, value in numbers.items()}
        beta = numbers["a"] * here + numbers["c"] * here**2 / 10
        return jnp.zeros_like(beta) if shift_only else jnp.tanh(numbers["b"] * here / 10), beta

    return Modulator(init, parameters, tuple(channels))


def network(
    channels: Mapping[str, int],
    counts: jax.Array | None = None,
    *,
    hidden: int = 64,
    detach_inputs: bool = True,
    shift_only: bool = False,
) -> Modulator:
    """A two-layer MLP a site: `(r, beta) = W2 relu(W1 [u; z_y] + b1) + b2`, `gamma = tanh(r)`.

    `u [B, C]`, the sample's own features, is globally average-pooled and L2-normalised; W2 and b2 start at zero. No
    size depends on the number of classes (except at `logits`), so the modulator can be taken to another data set.

    Args:
      channels: C of each site to modulate.
      counts: training images of each class, `[K]`, to join `z_y` to the input; None leaves it out.
      hidden: units of the hidden layer.
      detach_inputs: stop the gradient into `u`. The classifier's gradient then does not go through the modulator's
        input, and the meta-gradient is that of this step; with several sites it also drops how later inputs depend on
        earlier sites' parameters.
      shift_only: generate beta alone; gamma is zero.

    References:
      arXiv:2008.03428, abstract ("modulator network").
    """
    z = None if counts is None else log_frequency(counts)

    def init(key: jax.Array) -> PyTree:
        layers, parts = {}, 1 if shift_only else 2
        for site_key, (site, size) in zip(jax.random.split(key, len(channels)), channels.items(), strict=True):
            inputs = size + (z is not None)
            layers[site] = mlp_init(site_key, inputs, hidden, parts * size)
        return layers

    def parameters(phi: PyTree, site: str, features: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        layer = phi[site]
        inputs = jax.lax.stop_gradient(features) if detach_inputs else features
        inputs = inputs.astype(layer["w1"].dtype).mean(axis=tuple(range(1, inputs.ndim - 1)))
        inputs = unit(inputs)
        if z is not None:
            inputs = jnp.concatenate([inputs, z.astype(inputs.dtype)[labels][:, None]], axis=-1)
        out = mlp(layer, inputs)
        if shift_only:
            return jnp.zeros_like(out), out
        gamma, beta = jnp.split(out, 2, axis=-1)
        return jnp.tanh(gamma), beta

    return Modulator(init, parameters, tuple(channels))


def unit(rows: jax.Array) -> jax.Array:
    """Returns each row `[..., C]` divided by its norm, with a finite gradient where it is zero."""
    return rows * jax.lax.rsqrt(jnp.sum(rows**2, axis=-1, keepdims=True) + 1e-12)


def mlp_init(key: jax.Array, inputs: int, hidden: int, outputs: int) -> PyTree:
    """Returns the parameters of `mlp`, the last layer zero."""
    return {
        "w1": jax.nn.initializers.he_normal()(key, (inputs, hidden), jnp.float32),
        "b1": jnp.zeros((hidden,), jnp.float32),
        "w2": jnp.zeros((hidden, outputs), jnp.float32),
        "b2": jnp.zeros((outputs,), jnp.float32),
    }


def mlp(layers: PyTree, inputs: jax.Array) -> jax.Array:
    """Returns `W2 relu(W1 x + b1) + b2` of each row."""
    hidden = jax.nn.relu(inputs @ layers["w1"] + layers["b1"][None, :])
    outputs: jax.Array = hidden @ layers["w2"] + layers["b2"][None, :]
    return outputs


def joined(parts: Sequence[Modulator]) -> Modulator:
    """Returns one modulator of several that have no site in common; phi is the union of theirs, by site."""
    if len(parts) == 1:
        return parts[0]
    of = {site: part for part in parts for site in part.sites}

    def init(key: jax.Array) -> PyTree:
        keys = jax.random.split(key, len(parts))
        return {site: phi for key, part in zip(keys, parts, strict=True) for site, phi in part.init(key).items()}

    def parameters(phi: PyTree, site: str, features: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        return of[site].parameters(phi, site, features, labels)

    return Modulator(init, parameters, tuple(of))


def site_channels(apply: Callable[[Modulate], PyTree], sites: Sequence[str] | None = None) -> dict[str, int]:
    """Returns the channels `{site: C}` of the chosen sites, found by tracing the classifier abstractly.

    Args:
      apply: runs the classifier with the `Modulate` it is given; nothing is computed.
      sites: names of the sites wanted; None for all.

    Raises:
      UserError: a name that the classifier never passes to `modulate`.
    """
    seen: dict[str, int] = {}

    def record(site: str, features: jax.Array) -> jax.Array:
        seen[site] = features.shape[-1]
        return features

    jax.eval_shape(lambda: apply(record))
    return seen if sites is None else chosen(seen, sites)


def chosen(channels: Mapping[str, int], sites: Sequence[str]) -> dict[str, int]:
    """Returns those of `channels` that belong to `sites`.

    Raises:
      UserError: a site that is not there.
    """
    for site in sites:
        if site not in channels:
            raise UserError(f"modulation.sites = {site!r}: the model has no such site; allowed: {', '.join(channels)}")
    return {site: channels[site] for site in sites}
