"""A classifier's forward pass as a value: how it is called, over which devices a batch is split, in how many parts.

Every step of `bilevel` is made of passes of one `Pass`. Means over a batch are taken here too, because they are taken
over all devices, whatever part of the batch this one has.
"""

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mfm_jax.errors import UserError
from mfm_jax.types import ApplyFn, Batch, BilevelState, Modulate, PyTree, no_modulation

Switch = Literal["train", "deterministic"]  # says whether a module is trained
_OTHERS = ("training", "is_training", "use_running_average", "inference", "eval")  # names that are not understood

UNMODULATED = "unmodulated"  # among sites whose features are asked for: the logits as the site `logits` gets them

# Training labels of a batch, or of a part of it, [B] -> what its pass is modulated by.
ModulateBy = Callable[[jax.Array], Modulate]


def plain(labels: jax.Array) -> Modulate:
    """Returns `no_modulation`, whatever the labels: the `ModulateBy` of every plain pass."""
    del labels
    return no_modulation


def switch_of(module_class: type) -> Switch | None:
    """Returns the argument of a module's `__call__` that says whether it is trained; None where there is none.

    Raises:
      UserError: it has another name, and would never be set.
    """
    takes = inspect.signature(module_class.__call__).parameters
    switch = next((name for name in get_args(Switch) if name in takes), None)
    other = next((name for name in _OTHERS if name in takes), None)
    if other and not switch:
        raise UserError(f"{module_class.__name__}: its argument `{other}` would never be set; call it `train`")
    return switch


def _check_normalized(image: PyTree) -> None:
    """Refuses images as stored; a tree may have masks and numbers of tokens beside what is normalised."""
    kinds = [leaf.dtype for leaf in jax.tree.leaves(image)]
    if jnp.uint8 in kinds or not any(jnp.issubdtype(kind, jnp.floating) for kind in kinds):
        types = ", ".join(map(str, kinds))
        raise UserError(f"Batch.image: {types}; normalise the images, to floating point of about unit size")


def rngs(key: jax.Array) -> dict[str, jax.Array]:
    """Returns the random streams of a pass: `dropout`, and what any other stream falls back on.

    That is `params` for `make_rng` of linen, and `default` for the `rngs` of NNX.
    """
    others = jax.random.fold_in(key, 1)
    return {"dropout": key, "params": others, "default": others}


@dataclass(frozen=True)
class Pass:
    """The forward pass of one classifier.

    apply: a Flax module's `apply`, or a function of the same form (`types.ApplyFn`).
    axis_name: mesh axis over which batches are split; None for one device.
    parts: how many equal parts of a batch are computed one after another. Activations of a part are computed again in
      the backward pass: less memory and a third more time. Batch norm then sees a part at a time, and its running
      averages move by the mean of the parts' statistics.
    switch: the argument of `apply` that says whether the network is trained: `train`, or `deterministic`, its
      opposite; None where there is none, as for a network without batch norm and dropout.
    """

    apply: ApplyFn
    axis_name: str | None = None
    parts: int = 1
    switch: Switch | None = "train"

    @classmethod
    def of(cls, module: nn.Module, **fields: Any) -> "Pass":
        """Returns the pass of a Flax module; its `switch` is the argument of that name in the module's `__call__`.

        The module takes the images and `modulate`, and calls `modulate(site, features)` at its sites.

        Raises:
          UserError: its switch has another name, and would never be set.
        """
        return cls(module.apply, switch=switch_of(type(module)), **fields)

    def logits(
        self, state: BilevelState, params: PyTree, batch: Batch, modulate_by: ModulateBy = plain, *, train: bool
    ) -> tuple[jax.Array, PyTree]:
        """Returns logits `[B, K]` and the running averages afterwards; arguments and errors are those of `outputs`."""
        (logits, _), averages = self.outputs(state, params, batch, modulate_by, train=train)
        return logits, averages

    def outputs(
        self,
        state: BilevelState,
        params: PyTree,
        batch: Batch,
        modulate_by: ModulateBy = plain,
        *,
        train: bool,
        sites: Collection[str] = (),
    ) -> tuple[tuple[jax.Array, dict[str, jax.Array]], PyTree]:
        """Returns logits `[B, K]` with the features `[B, ..., C]` at `sites`, modulated, and the running averages.

        Args:
          state: its key and step seed the random streams, its `batch_stats` are the averages so far.
          params: of the classifier.
          batch: whose images are passed.
          modulate_by: the modulation, by the labels of the images that pass together.
          train: normalise by the batch's own statistics; otherwise by the averages, which do not change.
          sites: whose features are returned, of those that the module calls; `UNMODULATED` may be among them.

        Raises:
          UserError: images of integers (in a tree: of uint8, or none that is floating point), or batch statistics in a
            network without a `switch`.
        """

        def one(part: Batch) -> tuple[tuple[jax.Array, dict[str, jax.Array]], PyTree]:
            modulate = modulate_by(part.label)
            kept: dict[str, jax.Array] = {}

            def keep(site: str, features: jax.Array) -> jax.Array:
                if site == "logits" and UNMODULATED in sites:
                    kept[UNMODULATED] = features
                features = modulate(site, features)
                if site in sites:
                    kept[site] = features
                return features

            logits, averages = self._whole(state, params, part, keep, train=train)
            if UNMODULATED in sites:
                kept.setdefault(UNMODULATED, logits)  # of a module without that site
            return (logits, kept), averages

        if self.parts == 1:
            return one(batch)
        split = jax.tree.map(lambda leaf: leaf.reshape(self.parts, -1, *leaf.shape[1:]), batch)
        # Within a scan a checkpoint is kept by every backend: what lives at once is one part's activations.
        _, (outputs, averages) = jax.lax.scan(jax.checkpoint(lambda _, part: (None, one(part))), None, split)
        outputs = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)
        return outputs, jax.tree.map(lambda leaf: leaf.mean(0), averages)

    def _whole(
        self, state: BilevelState, params: PyTree, batch: Batch, modulate: Modulate, *, train: bool
    ) -> tuple[jax.Array, PyTree]:
        _check_normalized(batch.image)
        if state.batch_stats and not self.switch:
            raise UserError("the module has batch statistics and no argument `train` that says when they are taken")
        variables = {"params": params, "batch_stats": state.batch_stats}
        options = {"modulate": modulate, **self._mode(train)}
        if not train:
            return self.apply(variables, batch.image, **options), state.batch_stats
        if batch.weight is not None and state.batch_stats:
            options["weight"] = batch.weight
        key = jax.random.fold_in(state.key, state.step)
        key = jax.random.fold_in(key, jax.lax.axis_index(self.axis_name)) if self.axis_name else key
        logits, written = self.apply(variables, batch.image, mutable=["batch_stats"], rngs=rngs(key), **options)
        return logits, written.get("batch_stats", {})

    def averages(self, state: BilevelState, params: PyTree, batch: Batch) -> PyTree:
        """Returns the running averages after a plain training pass."""
        return self.logits(state, params, batch, train=True)[1]

    def statistics(self, state: BilevelState, params: PyTree, batch: Batch) -> PyTree:
        """Returns the batch statistics of a plain training pass alone, without the averages so far.

        Running averages are linear in what they were, after = m before + (1 - m) new, with a slope m that forward mode
        reads off, so that new = before + (after - before) / (1 - m), whatever momentum the module has. A frozen layer,
        of slope 1, keeps its averages, which it is tested with.
        """

        def averages(before: PyTree) -> PyTree:
            return self.averages(state.replace(batch_stats=before), params, batch)

        def fresh(before: jax.Array, after: jax.Array, m: jax.Array) -> jax.Array:
            return before + (after - before) / jnp.where(m < 1, 1 - m, jnp.inf)

        before = state.batch_stats
        after, slope = jax.jvp(averages, (before,), (jax.tree.map(jnp.ones_like, before),))
        return jax.tree.map(fresh, before, after, slope)

    def probabilities(self, params: PyTree, batch_stats: PyTree, image: jax.Array) -> jax.Array:
        """Returns the tested classifier's probabilities `[B, K]`: plain, by the running averages."""
        variables = {"params": params, "batch_stats": batch_stats}
        return jax.nn.softmax(self.apply(variables, image, modulate=no_modulation, **self._mode(train=False)))

    def _mode(self, train: bool) -> dict[str, Any]:
        return {self.switch: train == (self.switch == "train")} if self.switch else {}

    def of_each_device(self, tree: PyTree) -> PyTree:
        """Returns `tree` as each device's own, so that the gradient of several passes is summed over them once."""
        if self.axis_name is None:
            return tree
        return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, self.axis_name, to="varying"), tree)

    def mean(self, values: jax.Array, batch: Batch) -> jax.Array:
        """Returns the mean of `values [B, ...]` over the whole batch, on however many devices; by weights if any."""
        if batch.weight is not None:
            weight = batch.weight.astype(values.dtype)
            values = values * weight.reshape(-1, *[1] * (values.ndim - 1))
        return self._of_devices(values.mean(axis=0))

    def mean_product(self, left: jax.Array, right: jax.Array, batch: Batch) -> jax.Array:
        """Returns the mean of the outer products of `left [B, K]` and `right [B, C]` over the whole batch, `[K, C]`."""
        left = left if batch.weight is None else left * batch.weight.astype(left.dtype)[:, None]
        return self._of_devices(left.T @ right / len(left))

    def _of_devices(self, mean: jax.Array) -> jax.Array:
        return jax.lax.pmean(mean, self.axis_name) if self.axis_name else mean

    def gathered(self, tree: PyTree) -> tuple[PyTree, jax.Array]:
        """Returns `tree`, `[B, ...]`, of all devices one after the other, and where this one's rows begin in it."""
        if self.axis_name is None:
            return tree, jnp.zeros((), jnp.int32)
        whole = jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, self.axis_name, tiled=True), tree)
        return whole, jax.lax.axis_index(self.axis_name) * len(jax.tree.leaves(tree)[0])

    def log_mean_exp(self, values: jax.Array, batch: Batch) -> jax.Array:
        """Returns the log of the mean of `exp(values [B, ...])` over the whole batch, as `mean` takes it."""
        largest = jax.lax.stop_gradient(values).max(axis=0)
        largest = jax.lax.pmax(largest, self.axis_name) if self.axis_name else largest
        return largest + jnp.log(self.mean(jnp.exp(values - largest[None]), batch))

    def accuracy(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """Returns the share of the batch whose largest logit is the label's."""
        return self.mean((jnp.argmax(logits, axis=-1) == batch.label).astype(logits.dtype), batch)

    def norm(self, tree: PyTree, *, by_example: bool = False) -> jax.Array:
        """Returns the global norm of a tree; `by_example`, of one that is split over the devices as the batch is."""
        norm = optax.tree.norm(tree)
        return jnp.sqrt(jax.lax.psum(norm**2, self.axis_name)) if by_example and self.axis_name else norm
