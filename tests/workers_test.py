"""Work that is handed to processes comes back in order, whole, and leaves nothing behind, however it ends."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from mfm_jax.data.workers import WorkerEnded, mapped

REPOSITORY = Path(__file__).parents[1]


def made(number: int) -> tuple[int, dict[str, np.ndarray]]:
    """Returns arrays of several types and layouts, one of them empty, another larger than any pipe."""
    rng = np.random.default_rng(number)
    arrays = {"bytes": rng.integers(0, 256, (5, 7, 3), np.uint8), "floats": rng.normal(size=(3, 2))}
    arrays |= {"empty": np.zeros((0, 4)), "turned": arrays["floats"].T[::-1], "large": np.full(3_000_000, number)}
    return number, arrays


def refused(number: int) -> int:
    if number == 3:
        raise KeyError("three")
    return number


def ended(number: int) -> int:
    if number == 3:
        os._exit(1)
    if number == 4:
        time.sleep(600)  # in another process, which ends with the one that was lost
    return number


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_results_come_in_order_and_whole_and_nothing_stays_open():
    before = open_files()
    for workers, chunk in ((0, 1), (1, 1), (3, 2)):
        number = 0
        for number, (told, arrays) in enumerate(mapped(made, range(7), workers, chunk), 1):
            assert told == number - 1
            for name, array in made(told)[1].items():
                assert array.dtype == arrays[name].dtype
                np.testing.assert_array_equal(arrays[name], array)
        assert number == 7
        del arrays
        assert not multiprocessing.active_children()
    assert list(mapped(made, [], 2)) == []
    assert open_files() <= before + 1  # the resource tracker of `multiprocessing`


def test_items_are_taken_as_they_are_needed_and_closing_ends_the_processes():
    taken = []
    results = mapped(abs, (taken.append(i) or -i for i in range(10_000)), 2, 3)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    assert len(multiprocessing.active_children()) == 2
    assert len(taken) <= 3 * (2 * 2 + 2)
    results.close()
    assert not multiprocessing.active_children()


def test_there_are_no_more_processes_than_messages():
    results = mapped(abs, range(5), 8, 3)
    assert next(results) == 0
    assert len(multiprocessing.active_children()) == 2
    assert list(results) == [1, 2, 3, 4]


def test_an_error_is_raised_here_with_where_it_was():
    results, found = mapped(refused, range(9), 2), []
    with pytest.raises(KeyError, match="three") as caught:
        for result in results:
            found.append(result)
    assert found == [0, 1, 2]
    assert "in refused" in str(caught.value.__cause__)
    assert not multiprocessing.active_children()


def test_a_process_that_ends_is_told():
    results, found = mapped(ended, range(9), 2), []
    with pytest.raises(WorkerEnded):
        for result in results:
            found.append(result)
    assert found == [0, 1, 2]
    assert not multiprocessing.active_children()


def test_signals_are_left_to_the_program():
    results = mapped(abs, range(20), 1)
    assert next(results) == 0
    (process,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process.pid, number)
    assert list(results) == list(range(1, 20))


SCRIPT = """
import jax, sys, time
from mfm_jax.data.workers import mapped
found = mapped(eval, ["'jax' in __import__('sys').modules", "__import__('os').getpid()", "0"], 1)
print("started", next(found), next(found), flush=True)
{then}
"""


@pytest.mark.parametrize("then", ["time.sleep(600)", "sys.exit(0)"])
def test_processes_do_not_import_the_program_and_end_with_it(then, tmp_path):
    script = tmp_path / "script.py"
    # Without `if __name__ == "__main__"`: imported again, it would start processes again.
    script.write_text(textwrap.dedent(SCRIPT.format(then=then)))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        started, has_jax, child = program.stdout.readline().split()
        if "sleep" in then:
            program.kill()
        assert program.stdout.read() == ""  # ends when the child, which has it too, has ended
    assert (started, has_jax) == ("started", "False")
    assert not Path(f"/proc/{child}/exe").exists()
