"""A Flax module of the user's own as the trainer calls it: adapted, and looked at before anything is trained.

`model.name`, or `module=` from Python, gives the module, or a callable `num_classes -> module`; a class is one. An NNX
class is called with `(num_classes, rngs=...)`. A module takes the images; `train` (or `deterministic`), `modulate` and
`weight` where its `__call__` has such an argument.
"""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from mfm_jax.bilevel.passes import rngs, switch_of
from mfm_jax.config import Config
from mfm_jax.errors import UserError, in_a_line
from mfm_jax.types import Modulate, PyTree, no_modulation

if TYPE_CHECKING:  # a third of a second that models of this package do not pay
    from flax import nnx

_BATCH = 2  # images that a module is traced with


class Adapted(nn.Module):
    """A module of the user's own under the arguments that every classifier takes; its variables are the module's.

    inner: the module, or an NNX one in `flax.nnx.bridge.ToLinen`.
    axis_name: mesh axis over which batch norm averages; goes to a module with a field of that name.
    """

    inner: nn.Module
    axis_name: str | None = None

    def setup(self) -> None:
        self.called = self.inner.clone(axis_name=self.axis_name) if self.averages_over_devices else self.inner.clone()
        nn.share_scope(self, self.called)

    @property
    def averages_over_devices(self) -> bool:
        """Whether its batch norm can do so."""
        return "axis_name" in type(self.inner).__dataclass_fields__

    @property
    def is_nnx(self) -> bool:
        """Whether the module is an NNX one."""
        from flax.nnx import bridge

        return isinstance(self.inner, bridge.ToLinen)

    @property
    def kind(self) -> Any:
        """The user's class."""
        return self.inner.nnx_class if self.is_nnx else type(self.inner)

    @property
    def takes(self) -> Mapping[str, inspect.Parameter]:
        """The arguments of its `__call__`."""
        return inspect.signature(self.kind.__call__).parameters

    def __call__(
        self, image: PyTree, *, train: bool = False, modulate: Modulate = no_modulation, weight: jax.Array | None = None
    ) -> jax.Array:
        """Returns logits `[B, K]`, in float32 at least."""
        switch, takes = switch_of(self.kind), self.takes
        options: dict[str, Any] = {switch: train == (switch == "train")} if switch else {}
        if "modulate" in takes:
            options["modulate"] = modulate
        if weight is not None and "weight" not in takes:
            raise UserError(f"{self.kind.__name__}: takes no `weight`, as a padded batch needs; divide batches evenly")
        if weight is not None:
            options["weight"] = weight
        if self.is_nnx:
            options = {"nnx_method": _Switched(train), **options}
        logits = self.called(image, **options)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) if hasattr(logits, "astype") else logits


class _Switched(NamedTuple):
    """Calls an NNX module in training or in a test, whether or not its `__call__` has an argument for that.

    NNX's batch norm cuts the derivative of its averages. `Pass.statistics` reads their slope off it, `bilevel.steps`
    whether a modulation reaches them: both derivatives are given back, and no value changes.
    """

    train: bool

    def __call__(self, module: "nnx.Module", image: PyTree, **options: Any) -> jax.Array:
        from flax import nnx

        (module.train if self.train else module.eval)()
        norms = [node for _, node in nnx.iter_modules(module) if isinstance(node, nnx.BatchNorm)]
        before = [(norm.mean.get_value(), norm.var.get_value()) for norm in norms]
        touched: list[jax.Array] = []  # a number that moves with each modulation
        reached: set[int] = set()  # batch norms that had not run before one

        def noted(site: str, features: jax.Array) -> jax.Array:
            modulated = options["modulate"](site, features)
            reached.update(i for i, norm in enumerate(norms) if norm.mean.get_value() is before[i][0])
            touched.append(modulated.ravel()[0])
            return modulated

        passed = {**options, "modulate": noted} if "modulate" in options else options
        logits = module(image, **passed)
        for i, norm in enumerate(norms) if self.train else ():
            moves = sum((x - jax.lax.stop_gradient(x) for x in touched if i in reached), jnp.zeros(()))
            for average, old in zip((norm.mean, norm.var), before[i], strict=True):
                slope = norm.momentum * (old - jax.lax.stop_gradient(old))
                average.set_value(jax.lax.stop_gradient(average.get_value()) + slope + moves.astype(old.dtype))
        return logits


def from_nnx(nnx_class: "type[nnx.Module]", *args: Any, **kwargs: Any) -> Adapted:
    """Returns an NNX module as a linen one, which the trainer, `Pass.of` and the steps take.

    Parameters are in `params`, the averages of batch norm in `batch_stats`. Random streams are the pass's own; dropout
    draws from `dropout`. `train()` or `eval()` is called before each pass, so that `__call__` needs no argument for it.

    Args:
      nnx_class: the class, not an instance.
      *args: what it is made with.
      **kwargs: by name, but for `rngs`.
    """
    from flax.nnx import bridge

    takes_rngs = "rngs" in inspect.signature(nnx_class.__init__).parameters
    return Adapted(bridge.ToLinen(nnx_class, args, FrozenDict(kwargs), skip_rng=not takes_rngs, metadata_fn=None))


def create(own: Any, num_classes: int, config: Config) -> Adapted:
    """Returns the module that `model.name` or `module=` gave, for `num_classes` classes.

    Raises:
      UserError: it is no Flax module, making it fails, or it lacks the field that `train.dtype` or `model.remat` sets.
    """
    from flax import nnx

    field = f"model.name = {config.model.name!r}"
    if inspect.isclass(own) and issubclass(own, nnx.Module):
        own = from_nnx(own, num_classes)
    if callable(own) and not isinstance(own, nn.Module | nnx.Module):
        try:
            own = own(num_classes)
        except Exception as error:
            raise UserError(f"{field}: fails when called with num_classes: {in_a_line(error)}") from error
    if isinstance(own, nnx.Module):
        raise UserError(f"{field}: is an NNX instance; give its class, or mfm_jax.from_nnx(Class, arguments)")
    if not isinstance(own, nn.Module):
        raise UserError(
            f"{field}: gives a {type(own).__name__}; give a Flax module, or a callable num_classes -> module"
        )
    adapted = own if isinstance(own, Adapted) else Adapted(own)
    wanted: dict[str, Any] = {"dtype": jnp.dtype(config.train.dtype)} if config.train.dtype == "bfloat16" else {}
    wanted |= {"remat": True} if config.model.remat else {}
    for name, value in wanted.items():
        if name not in type(adapted.inner).__dataclass_fields__:
            asked = "model.remat = True" if name == "remat" else f"train.dtype = {config.train.dtype!r}"
            raise UserError(
                f"{asked}: {field} has no field `{name}`; give it one, or leave {asked.split()[0]} as it is"
            )
        adapted = adapted.clone(inner=adapted.inner.clone(**{name: value}))
    return adapted


class Seen(NamedTuple):
    """What a module was seen to have.

    sites: the width of each site that it calls.
    params: shapes of its parameters.
    has_averages: whether it has batch statistics.
    """

    sites: dict[str, int]
    params: PyTree
    has_averages: bool

    @property
    def has_head(self) -> bool:
        """Whether its last layer is an `nn.Dense` of the name `head`."""
        head = self.params.get("head", {})
        return isinstance(head, Mapping) and head.keys() == {"kernel", "bias"} and head["kernel"].ndim == 2


def seen(module: Adapted, image_shape: tuple[int, ...], num_classes: int, field: str) -> Seen:
    """Returns what a module has, found by tracing it abstractly on images `[2, H, W, C]`.

    Raises:
      UserError: it fails, does not return `[B, K]`, has averages and nothing that says when they are taken, or
        variables that nobody keeps.
    """
    sites: dict[str, int] = {}

    def note(site: str, features: jax.Array) -> jax.Array:
        sites[site] = features.shape[-1]
        return features

    def run(key: jax.Array, image: jax.Array) -> tuple[PyTree, PyTree]:
        variables = module.init(rngs(key), image)
        logits, _ = module.apply(variables, image, train=True, modulate=note, mutable=["batch_stats"], rngs=rngs(key))
        return variables, logits

    image = jax.ShapeDtypeStruct((_BATCH, *image_shape), jnp.float32)
    try:
        variables, logits = jax.eval_shape(run, jax.eval_shape(lambda: jax.random.key(0)), image)
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
    except Exception as error:
        raise UserError(f"{field}: fails on images float32 {list(image.shape)}: {in_a_line(error)}") from error
    if getattr(logits, "shape", None) != (_BATCH, num_classes) or not jnp.issubdtype(logits.dtype, jnp.floating):
        what = f"{logits.dtype} {list(logits.shape)}" if hasattr(logits, "shape") else type(logits).__name__
        raise UserError(f"{field}: returns {what} for {_BATCH} images; return logits [{_BATCH}, {num_classes}]")
    if unkept := sorted(variables.keys() - {"params", "batch_stats"}):
        raise UserError(f"{field}: has variables in {', '.join(unkept)}; only params and batch_stats are kept")
    averages = bool(variables.get("batch_stats"))
    if averages and not switch_of(module.kind) and not module.is_nnx:
        raise UserError(f"{field}: has batch statistics and no argument `train` that says when they are taken; add it")
    if not variables.get("params"):
        raise UserError(f"{field}: has no parameters; give a module with something to train")
    return Seen(sites, variables["params"], averages)
