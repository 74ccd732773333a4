"""What a meta set may govern in a training pass: the type of every meta learner, MFM among them.

Outer parameters phi are one pytree, apart from the classifier's, from `init` to the checkpoint. A meta learner says
what they are (`kind`), how they begin, where they act in the pass, and by which optax chain they move.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import optax

from mfm_jax.bilevel import modulation, optim
from mfm_jax.errors import UserError
from mfm_jax.types import Batch, Modulate, Modulator, PyTree, no_modulation


class Modulating(Protocol):
    """`(phi, params, labels [B]) -> Modulate`, what the training pass is modulated by."""

    def __call__(self, phi: PyTree, params: PyTree, labels: jax.Array, /) -> Modulate: ...


class Weighing(Protocol):
    """`(phi, losses [B], mean) -> losses [B]`: each example's loss times its weight.

    `mean` averages `[B]` over the whole batch, on however many devices it is.
    """

    def __call__(self, phi: PyTree, losses: jax.Array, mean: Callable[[jax.Array], jax.Array], /) -> jax.Array: ...


class Sharing(Protocol):
    """`(phi, logits [B, K], batch) -> [B]`, 0 to 1: what the teacher's predictions count in each example's loss.

    `logits` are the student's, before a modulation at `logits`; `batch.teacher` has the teacher's.
    """

    def __call__(self, phi: PyTree, logits: jax.Array, batch: Batch, /) -> jax.Array: ...


def _plain(phi: PyTree, params: PyTree, labels: jax.Array) -> Modulate:
    del phi, params, labels
    return no_modulation


def _alike(phi: PyTree, losses: jax.Array, mean: Callable[[jax.Array], jax.Array]) -> jax.Array:
    del phi, mean
    return losses


class MetaLearner(NamedTuple):
    """What a meta set governs. Every function is pure, and phi is all that is learned.

    With logits z computed under `modulate`, the training loss is the mean of `weigh(phi, loss(z, labels), mean)`, a
    scalar function of the classifier's parameters and phi; that is all the meta-gradient asks for. Where there is a
    teacher, that loss is the mixture with its predictions (`distillation`), by `share`. A method fills in what it
    governs; the defaults leave the pass unchanged.

    kind: what phi is, in a word; phi of one kind is never taken for another.
    init: `key -> phi`.
    modulate: see `Modulating`.
    weigh: see `Weighing`.
    share: see `Sharing`; None for the objective's own share.
    optimizer: `schedule -> optax chain` that phi moves by; the schedule counts meta-steps.
    per_batch: `labels [B] -> phi`, where phi belongs to one batch, starts from this value each time and is not kept
      (`init` then returns an empty tree); None where phi is learned from step to step.
    modulator: generates gamma and beta, where phi is a modulator's: such a phi can be shown by site, be frozen, and be
      taken to another run.
    """

    kind: str
    init: Callable[[jax.Array], PyTree]
    modulate: Modulating = _plain
    weigh: Weighing = _alike
    share: Sharing | None = None
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation] = lambda schedule: optim.outer(schedule)
    per_batch: Callable[[jax.Array], PyTree] | None = None
    modulator: Modulator | None = None


NOTHING = MetaLearner("nothing", lambda key: {})


def of(given: Modulator | MetaLearner | None) -> MetaLearner:
    """Returns the meta learner of what may be given in its place: of a modulator, MFM; of None, one without phi."""
    if given is None:
        return NOTHING
    if isinstance(given, MetaLearner):
        return given

    def film(phi: PyTree, params: PyTree, labels: jax.Array) -> Modulate:
        del params
        return modulation.modulate(given, phi, labels)

    return MetaLearner("modulator", given.init, film, modulator=given)


def noting(
    learner: MetaLearner, modulate_by: Callable[[jax.Array], Modulate]
) -> tuple[Callable[[jax.Array], Modulate], Callable[[], None]]:
    """Returns `modulate_by`, which notes the sites that a module calls, and a check that these are all it should call.

    A modulator that waits for another site would never move, in silence. The check raises a `UserError` then; both act
    while a step is traced, and cost nothing later.
    """
    called: set[str] = set()

    def noted(labels: jax.Array) -> Modulate:
        modulate = modulate_by(labels)

        def note(site: str, features: jax.Array) -> jax.Array:
            called.add(site)
            return modulate(site, features)

        return note

    def check() -> None:
        for site in learner.modulator.sites if learner.modulator else ():
            if site not in called:
                calls = ", ".join(sorted(called)) or "none"
                raise UserError(f"site {site!r}: the module never calls it; it calls {calls}")

    return noted, check
