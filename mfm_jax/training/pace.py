"""How long the rest of a run takes, from the steps that are done and the ends of epochs; compilation is left out.

Times are seconds of one clock, which the caller reads.
"""

import statistics
from collections import Counter, deque
from collections.abc import Hashable, Sequence

import numpy as np

_LOOKS, _LOOK_SECONDS = 100, 0.25  # the last ones count, of at least so long: a machine may have other work by then
_ENDS = 5


class Pace:
    """An estimate that follows a run.

    Which kind each step is (a meta-step costs several plain ones), and each end of an epoch (some validate), is known
    before the first. What is left is what each kind has cost, times how many are to come.
    """

    def __init__(self, kinds: np.ndarray, ends: Sequence[Hashable], per_epoch: int, step: int = 0):
        """Takes the kind of each step, int `[total]` from 0, and of each epoch's end; `step` are done before."""
        ones = np.eye(kinds.max(initial=0) + 1, dtype=np.int32)[kinds]
        self._before = np.concatenate([np.zeros_like(ones[:1]), np.cumsum(ones, axis=0)])  # steps of a kind, by step
        self._ends, self._ended = ends, step // per_epoch
        self._looks: deque[tuple[np.ndarray, float]] = deque(maxlen=_LOOKS)  # steps of each kind, and their seconds
        self._end_seconds: dict[Hashable, list[float]] = {}
        self._each = np.zeros(ones.shape[1])  # seconds of a step, by kind
        self._done, self._at = step, 0.0  # and when that was seen
        self._from, self._since = step, 0.0  # where the next look begins
        self.under_way = 0.0  # seconds that the device should take for what it has been given
        self.measured = 0  # steps that the estimate rests on

    def start(self, now: float) -> None:
        """The device has nothing but steps to do from now on."""
        self._from, self._since, self._at, self.under_way = self._done, now, now, 0.0

    def sent(self, step: int) -> None:
        """The steps up to `step` are under way."""
        self.under_way = self._price(self._done, step)

    def done(self, step: int, now: float) -> None:
        """The steps up to `step` were seen to be done."""
        self.under_way = max(0.0, self.under_way - self._price(self._done, step))
        self._done, self._at = step, now
        if now - self._since >= _LOOK_SECONDS:
            self._look(now)

    def stop(self, now: float) -> None:
        """An epoch has ended, and what follows it begins."""
        self._look(self._at)
        self._since, self._at, self.under_way = now, now, self._end(self._ends[self._ended])

    def stopped(self, now: float, compiling: float = 0.0) -> None:
        """What follows an epoch is over; it was `compiling` for so many seconds."""
        seen = self._end_seconds.setdefault(self._ends[self._ended], [])
        seen.append(max(0.0, now - self._since - compiling))
        self._ended, self.under_way = self._ended + 1, 0.0

    def left(self, now: float) -> float | None:
        """Returns the seconds to the end of training; None before a step was measured.

        Between two looks it counts down, for as long as what is under way should take.
        """
        if not self._looks:
            return None
        ends = sum(count * self._end(kind) for kind, count in Counter(self._ends[self._ended :]).items())
        steps = self._price(self._done, len(self._before) - 1)
        return max(0.0, steps + ends - min(now - self._at, self.under_way))

    def _price(self, step: int, end: int) -> float:
        """Returns the seconds of the steps from `step` up to `end`."""
        return float((self._before[end] - self._before[step]) @ self._each)

    def _look(self, now: float) -> None:
        """Finds what a step of each kind takes, by least squares that keep the sum; one unseen is as the average."""
        from scipy.optimize import nnls  # here: the first step of a run does not wait for it

        if self._done == self._from:
            return
        self._looks.append((self._before[self._done] - self._before[self._from], now - self._since))
        self.measured += self._done - self._from
        self._from, self._since = self._done, now
        steps, seconds = np.array([s for s, _ in self._looks], float), np.array([s for _, s in self._looks])
        self._each, _ = nnls(steps, seconds)
        self._each *= seconds.sum() / max((steps @ self._each).sum(), 1e-9)
        self._each[steps.sum(axis=0) == 0] = seconds.sum() / steps.sum()

    def _end(self, kind: Hashable) -> float:
        """Returns what such an end of an epoch takes, the first left out; one unseen takes as long as the others."""
        every = self._end_seconds
        seen = every.get(kind) or [x for seen in every.values() for x in seen]
        return statistics.median(seen[1:][-_ENDS:] or seen) if seen else 0.0
