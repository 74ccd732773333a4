"""From a config and its data to the pure functions of a run: initial states and training steps.

This is where a method's choices meet the bilevel step; nothing here loops, and no file is touched but by an
`init` that starts from stored weights.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mfm_jax import bilevel
from mfm_jax.bilevel import averaging, modulation, optim, passes
from mfm_jax.bilevel.objective import Objective
from mfm_jax.bilevel.outer import MetaLearner
from mfm_jax.bilevel.passes import Pass
from mfm_jax.bilevel.steps import PlainStep, Step
from mfm_jax.config import Config
from mfm_jax.data import LongTailData
from mfm_jax.errors import failing
from mfm_jax.evaluation import tested
from mfm_jax.evaluation.tested import Tested
from mfm_jax.machine import parallel
from mfm_jax.methods import heads, table
from mfm_jax.methods.table import METHODS
from mfm_jax.models import own, pretrained, stacked, zero_shot
from mfm_jax.models.own import Adapted
from mfm_jax.training import preflight, prior, recipe, weights
from mfm_jax.training import teacher as teacher_lib
from mfm_jax.training.recipe import Recipe
from mfm_jax.training.teacher import Teacher
from mfm_jax.types import (
    PROJECTION,
    START_PRIOR,
    ApplyFn,
    Batch,
    BilevelState,
    FeatureLoss,
    LossFn,
    Modulate,
    Modulator,
    PyTree,
    Taught,
)

_Chain: TypeAlias = optax.GradientTransformation
_Shape = tuple[int, ...]


@dataclass(frozen=True)
class Experiment:
    """The pure functions of one run; steps take and return states as `stacked.stack(state, blocks)` has them.

    init: `() -> BilevelState`, the state before the first step, all parameters drawn at random.
    init_pretrained: the same with the weights of `model.pretrained`, the head among them if `whole`, or of the run in
      `model.init_from`; None where there are none to load.
    plain_step: `(state, batch) -> (state, metrics)`; under a meta learner that does not learn, if there is one.
    meta_step: `(state, batch, meta_batch) -> (state, metrics)`; None where nothing learns from the meta set.
    retrain_step: `(state, batch) -> (state, metrics)` of a second stage on a frozen classifier; None without one.
    retrain_from: the step at which that stage begins.
    synthetic: what makes its features out of stored ones, `[B, C]` in the place of images; None where it reads images.
    order: `(key, epoch) -> int32 [steps_per_epoch, B]`, the examples of each batch of an epoch.
    tested: the classifier that is tested.
    features: `(state, image) -> [B, C]`, its `pooled` features.
    apply: the classifier outside `shard_map`; `(variables, image, modulate=, train=) -> logits`.
    modulator: what generates gamma and beta; None for a method without one.
    phi_kind: what phi is, in a word; "" where there is none.
    teacher: whose predictions are learned, too; None for nobody's.
    meta_loss: of an example in the meta pass.
    learning_rate: schedule, by step.
    steps_per_epoch: batches in an epoch.
    total_steps: steps in the run.
    mesh: the devices that the steps are spread over; None for one.
    blocks: the classifier's blocks that the steps scan over; none, and then states are not stacked.
    """

    init: Callable[[], BilevelState]
    init_pretrained: Callable[..., BilevelState] | None
    plain_step: PlainStep
    meta_step: Step | None
    retrain_step: PlainStep | None
    retrain_from: int
    synthetic: table.Synthesis | None
    order: Callable[[jax.Array, int], jax.Array]
    tested: Tested
    features: Callable[[BilevelState, jax.Array], jax.Array]
    apply: ApplyFn
    modulator: Modulator | None
    phi_kind: str
    teacher: Teacher | None
    meta_loss: LossFn
    learning_rate: optax.Schedule
    steps_per_epoch: int
    total_steps: int
    mesh: Mesh | None
    blocks: stacked.Runs


def build(config: Config, data: LongTailData, mesh: Mesh | None = None) -> Experiment:
    """Returns the experiment that `config` describes on `data`, its steps spread over `mesh` if given.

    Raises:
      UserError: a site that the model does not have, or what `preflight.check` refuses.
    """
    preflight.check(config, data, mesh)
    method, counts = METHODS[config.method.name], jnp.asarray(data.counts)
    plain, rules = tested.of(config, data.counts), recipe.of(config, data)
    image = jnp.zeros((1, *data.train_images.shape[1:]), jnp.float32)
    channels = _channels(config, plain.module, image, data.num_classes, mesh)
    if config.method.head == "simplex":
        heads.simplex(channels["pooled"], data.num_classes)  # refuses, before anything is compiled, what it cannot be
    learner = method.learner(config, counts, channels) if method.learner else None
    schedule = optim.meta_schedule(config.meta, config.optim, config.train.epochs, rules.steps_per_epoch)
    phi_tx = learner.optimizer(schedule) if learner else rules.second_tx
    scans = config.model.scan_blocks
    module = plain.module.clone(scan_blocks=True) if scans else plain.module
    forward = Pass(tested.applied(config, module) if scans else plain.apply, parts=config.train.accumulate)
    if mesh:
        forward = dataclasses.replace(forward, apply=_on_mesh(config, module, mesh), axis_name=parallel.AXIS)

    fresh, init, init_pretrained = _starts(config, data, plain, learner, rules, phi_tx)
    plain_step, meta_step, retrain_step = _steps(config, forward, rules, learner, phi_tx, image.shape[1:])
    if mesh:
        plain_step = parallel.shard_step(plain_step, mesh, 1)
        meta_step = meta_step and parallel.shard_step(meta_step, mesh, 2)
        retrain_step = retrain_step and parallel.shard_step(retrain_step, mesh, 1)
    extract = heads.features(plain.apply)
    blocks = stacked.runs(jax.eval_shape(fresh)["params"]) if scans else {}
    if learner and config.own("learner") is not None:
        _trace(config, data, lambda: stacked.stack(init(), blocks), meta_step or plain_step)
    return Experiment(
        init=init,
        init_pretrained=init_pretrained if config.model.pretrained or config.model.init_from else None,
        plain_step=plain_step,
        meta_step=meta_step,
        retrain_step=retrain_step,
        retrain_from=config.second_stage * rules.steps_per_epoch if method.retraining else rules.total_steps,
        synthetic=method.retraining.synthetic if method.retraining else None,
        order=rules.order,
        tested=plain,
        features=lambda state, image: extract(tested.variables(state), image),
        apply=plain.apply,
        modulator=learner.modulator if learner else None,
        phi_kind=learner.kind if learner else "second stage" if method.retraining else "",
        teacher=teacher_lib.of(config, data, typical=bool(learner and learner.share)),
        meta_loss=rules.meta.loss,
        learning_rate=rules.learning_rate,
        steps_per_epoch=rules.steps_per_epoch,
        total_steps=rules.total_steps,
        mesh=mesh,
        blocks=blocks,
    )


def _starts(
    config: Config, data: LongTailData, plain: Tested, learner: MetaLearner | None, rules: Recipe, phi_tx: _Chain
) -> tuple[Callable[[], PyTree], Callable[[], BilevelState], Callable[..., BilevelState]]:
    """Returns what makes the module's variables at random, the state of these, and that of stored weights."""
    method = METHODS[config.method.name]
    image = jnp.zeros((1, *data.train_images.shape[1:]), jnp.float32)
    none = jnp.zeros(data.num_classes, jnp.float32)  # in the place of a prior of weights that are not known
    key = jax.random.key(config.train.seed)  # an argument of what is compiled: seeds share their programs

    def fresh(key: jax.Array) -> PyTree:
        key = jax.random.split(key)[0]
        variables = plain.module.init({**passes.rngs(key), "params": key}, image)
        if method.prior_bias:
            counts = jnp.asarray(data.counts)
            variables = {**variables, "params": heads.with_prior_bias(variables["params"], counts)}
        return variables

    def start(variables: PyTree, key: jax.Array, log_prior: jax.Array) -> BilevelState:
        def init_phi(key: jax.Array) -> PyTree:
            if method.retraining:
                return method.retraining.init(key, variables["params"])
            return learner.init(key) if learner else {}

        moves = method.retraining or (learner and not config.frozen)
        params_key, state_key = jax.random.split(key)
        variables = {**variables, "params": _with_projection(params_key, variables["params"], rules.objective)}
        state = bilevel.init_state(state_key, variables, rules.tx, init_phi, phi_tx if moves else None)
        if rules.averaging:
            state = state.replace(average=averaging.begun(rules.averaging, state.params, state.batch_stats))
        memory = {START_PRIOR: log_prior} if config.method.pretraining_tau else {}
        return state.replace(memory=memory | {one.name: one.init() for one in rules.objective.beside})

    def init_pretrained(*, whole: bool = False) -> BilevelState:
        new, model, normalized = parallel.jit_once(fresh)(key), config.model, table.head(config) != "linear"
        new = (new["params"], new.get("batch_stats", {}))
        if model.init_from:
            found = weights.of_run(config, data, *new)
        else:
            whole = whole and not model.text_features
            found = pretrained.of_file(model.pretrained, *new, model.name, normalized_head=normalized, whole=whole)
        if model.text_features:
            found = zero_shot.with_text_head(found[0], model.text_features), found[1]
        preflight.check_start(config, new[0], found[0])
        log_prior = prior.of_start(config, data, plain, *found) if config.method.pretraining_tau else none
        return parallel.jit_once(start)(dict(zip(("params", "batch_stats"), found, strict=True)), key, log_prior)

    # One program: hundreds of small operations otherwise, each compiled alone.
    drawn = parallel.jit_once(lambda key: start(fresh(key), key, none))
    return functools.partial(fresh, key), functools.partial(drawn, key), init_pretrained


def _with_projection(key: jax.Array, params: PyTree, objective: Objective) -> PyTree:
    """Returns the classifier's `params` with what losses of the batch train beside it, by their names."""
    made = {
        one.name: one.projection(jax.random.fold_in(key, i + 1), params)
        for i, one in enumerate(objective.beside)
        if one.projection
    }
    return {**params, PROJECTION: made} if made else params


def _channels(
    config: Config, module: nn.Module, image: jax.Array, num_classes: int, mesh: Mesh | None
) -> dict[str, int]:
    """Returns the widths of all sites, read off the model; checks that what the config asks of the model is there."""
    if isinstance(module, Adapted):
        found = own.seen(module, image.shape[1:], num_classes, f"model.name = {config.model.name!r}")
        preflight.check_own(config, module, found, mesh)
        return found.sites

    def run(modulate: Modulate) -> PyTree:
        return module.init(jax.random.key(0), image, modulate=modulate)

    channels = modulation.site_channels(run)
    modulation.chosen(channels, config.sites)  # checked for every method
    return channels


def _on_mesh(config: Config, module: nn.Module, mesh: Mesh) -> ApplyFn:
    """Returns the classifier inside `shard_map`."""
    if config.parallel.batch_norm == "sync":
        apply = tested.applied(config, module.clone(axis_name=parallel.AXIS))
    else:
        apply = parallel.averaged_statistics(tested.applied(config, module))
    return parallel.gathered(apply) if parallel.MODEL_AXIS in mesh.axis_names else apply


def _trace(config: Config, data: LongTailData, init: Callable[[], PyTree], step: Callable[..., PyTree]) -> None:
    """Traces a step of a meta learner of the user's own, whose functions can fail in any way."""

    def batch(size: int) -> Batch:
        return Batch(jnp.zeros((size, *data.train_images.shape[1:]), jnp.float32), jnp.zeros(size, jnp.int32))

    def run() -> PyTree:
        metas, one = () if config.frozen else (batch(config.meta.batch_size),), batch(config.train.batch_size)
        if config.method.teacher and config.method.distill:
            said = jnp.zeros((len(one.label), data.num_classes))
            one = one._replace(teacher=Taught(said, said))
        return step(init(), one._replace(second=one if config.method.second_view else None), *metas)

    with failing(f"method.learner = {config.method.learner!r}: a step with it fails"):
        jax.eval_shape(run)


def _steps(
    config: Config, forward: Pass, rules: Recipe, learner: MetaLearner | None, phi_tx: _Chain, image_shape: _Shape
) -> tuple[PlainStep, Step | None, PlainStep | None]:
    """Returns the plain step, the meta-step and a second stage's, None for what the run has not."""
    method, meta_step, retrain_step = METHODS[config.method.name], None, None
    plain_step = bilevel.make_plain_step(forward, rules.objective, rules.tx, learner)
    if learner and not config.frozen:
        meta_step = bilevel.make_step(forward, rules.objective, rules.tx, learner, phi_tx, rules.meta)
    if method.retraining:
        loss = rules.objective.loss
        assert not isinstance(loss, FeatureLoss)
        # No backward pass goes through the network, so its passes need not be in parts.
        forward = dataclasses.replace(forward, parts=1)
        if method.retraining.synthetic:
            forward = dataclasses.replace(forward, apply=heads.on_features(forward.apply, image_shape))
        retrain_step = bilevel.make_retrain_step(forward, loss, phi_tx, method.retraining.attach)
    if rules.averaging:
        plain_step = averaging.averaged(plain_step, rules.averaging)
        meta_step = meta_step and averaging.averaged(meta_step, rules.averaging)
        retrain_step = retrain_step and averaging.on_tested(retrain_step)
    return plain_step, meta_step, retrain_step
