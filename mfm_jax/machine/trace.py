"""A trace of some steps of a run, as `jax.profiler` writes it: for XProf, TensorBoard or Perfetto."""

import os
from pathlib import Path
from typing import Any, Self

import jax

from mfm_jax.errors import UserError, in_a_line

_AFTER, _STEPS = 20, 10  # the programs are compiled in the steps before


class Trace:
    """Writes a trace of ten steps, once twenty steps are done; whole calls, so there may be more. Ends with a `with`.

    written: whether there is one.
    """

    def __init__(self, folder: Path | None):
        """Makes one for `folder`, which is made if absent; with None nothing is traced.

        Raises:
          UserError: nothing can be written there.
        """
        self._folder, self._first, self._from = folder, -1, -1
        self.written = False
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--profile={folder}: cannot be made; give another folder ({in_a_line(error)})") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"--profile={folder}: cannot be written; give another folder")

    def at(self, step: int, state: Any) -> None:
        """Begins or ends the trace where `step` steps are sent; only then waits for `state`, which they lead to."""
        if self._folder is None or self.written:
            return
        if self._first < 0:
            self._first = step
        begins = self._from < 0 and step >= self._first + _AFTER
        ends = 0 <= self._from <= step - _STEPS
        if begins or ends:
            jax.block_until_ready(state)
        if begins:
            jax.profiler.start_trace(self._folder)
            self._from = step
        elif ends:
            self._end()

    def _end(self) -> None:
        jax.profiler.stop_trace()
        self.written = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._from >= 0 and not self.written:
            self._end()
