"""Time left, from steps that are done: numbers computed by hand on a clock of the test's own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfm_jax.training.pace import Pace


def test_plain_steps_count_down_between_looks():
    pace = Pace(np.zeros(100, int), ["save"], 100)
    pace.start(10.0)
    pace.sent(2)
    assert pace.left(11.0) is None  # nothing is done yet
    pace.done(1, 12.0)
    pace.sent(3)
    assert pace.left(12.0) == pytest.approx(99 * 2)
    assert pace.left(13.5) == pytest.approx(99 * 2 - 1.5)
    assert pace.left(99.0) == pytest.approx(99 * 2 - 4)  # no longer than the two steps under way should take
    pace.done(3, 18.0)
    assert pace.left(18.0) == pytest.approx(97 * 8 / 3)  # three steps in 8 s
    assert pace.measured == 3


def test_compilation_is_not_counted():
    pace = Pace(np.zeros(10, int), [""], 10)
    pace.start(0.0)
    pace.start(30.0)  # the first call has compiled for half a minute
    pace.done(1, 31.0)
    pace.start(60.0)  # as another has, while nothing was under way
    pace.done(2, 61.0)
    assert pace.left(61.0) == pytest.approx(8)


def test_kinds_of_steps_have_a_price_each():
    """A meta-step costs 3 s and comes every eighth, a plain one costs 1 s; three steps are enough to know."""
    pace = Pace((np.arange(32) % 8 == 0).astype(int), [""], 32)
    pace.start(0.0)
    for step, now in ((1, 3.0), (2, 4.0), (3, 5.0)):
        pace.done(step, now)
    assert pace.left(5.0) == pytest.approx(3 * 3 + 26 * 1)


def test_a_kind_that_was_not_seen_costs_the_average():
    pace = Pace(np.array([0, 0, 1, 1]), [""], 4)
    pace.start(0.0)
    pace.done(2, 3.0)
    assert pace.left(3.0) == pytest.approx(2 * 1.5)


def test_ends_of_epochs_are_counted_without_their_compilation():
    """Two steps of 1 s an epoch; every second epoch is validated, which takes 5 s, the others are logged in 1 s."""
    pace = Pace(np.zeros(12, int), ["log", "validate"] * 3, 2)
    pace.start(0.0)
    pace.done(2, 2.0)
    assert pace.left(2.0) == pytest.approx(10)  # what no end has shown cannot be known
    pace.stop(2.0)
    pace.stopped(13.0, compiling=10.0)
    pace.start(13.0)
    assert pace.left(13.0) == pytest.approx(10 + 5 * 1)
    pace.done(4, 15.0)
    pace.stop(15.0)
    pace.stopped(20.0)
    pace.start(20.0)
    assert pace.left(20.0) == pytest.approx(8 + 2 * 1 + 2 * 5)
    pace.done(6, 22.0)
    pace.stop(22.0)
    assert pace.left(22.75) == pytest.approx(6 + 2 * 1 + 2 * 5 - 0.75)  # counts down here, too


def test_the_first_end_of_its_kind_is_slow_and_left_out():
    pace = Pace(np.zeros(4, int), [""] * 4, 1)
    pace.start(0.0)
    for now, seconds, left in ((1.0, 9.0, 3 + 3 * 9), (11.0, 1.0, 2 + 2 * 1), (13.0, 3.0, 1 + 2)):
        pace.done(pace.measured + 1, now)
        pace.stop(now)
        pace.stopped(now + seconds)
        pace.start(now + seconds)
        assert pace.left(now + seconds) == pytest.approx(left)


def test_a_run_that_goes_on_counts_what_it_does_itself():
    pace = Pace(np.zeros(10, int), ["", ""], 5, step=5)
    pace.start(100.0)
    pace.done(6, 102.0)
    assert pace.left(102.0) == pytest.approx(8)


@given(st.floats(0.25, 10), st.floats(1, 6), st.integers(1, 9), st.lists(st.integers(1, 40), min_size=1, max_size=300))
def test_looks_of_any_size_find_what_is_left(plain, factor, every, looks):
    """However the steps are seen, one by one or forty at a time: what is left is within 20 %."""
    kinds = (np.arange(sum(looks) + 80) % every == 0).astype(int)
    costs = np.where(kinds == 1, plain * factor, plain)
    pace, step, now = Pace(kinds, [""], len(kinds)), 0, 0.0
    pace.start(now)
    for look in looks:
        now += costs[step : step + look].sum()
        step += look
        pace.done(step, now)
        assert pace.left(now) >= 0
    if step >= 10 * every:  # each kind was seen, about as often as it is to come
        assert pace.left(now) == pytest.approx(costs[step:].sum(), rel=0.2)
