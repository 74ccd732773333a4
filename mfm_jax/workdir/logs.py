"""Metric rows: kept in memory, written to `metrics.jsonl`, to TensorBoard and to other loggers as they come.

Rows hold no wall-clock time, so two equal runs write equal files. They are saved with each checkpoint, and a resumed
run starts from the checkpoint's rows: the file never shows a step twice. A write that fails (a full disk) warns once,
and stops nothing: the rows are in memory and in the checkpoints, and the next write starts with what is missing.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfm_jax.workdir.files import Workdir
from mfm_jax.workdir.loggers import Guarded, Row, scalars

if TYPE_CHECKING:
    from tensorboardX.record_writer import RecordWriter


class MetricLog:
    """The rows of one run."""

    def __init__(
        self, workdir: Path | None, rows: list[Row], loggers: Sequence[Guarded] = (), *, tensorboard: bool = True
    ):
        """Starts from `rows`, replacing what an interrupted run wrote after its last checkpoint; None: in memory."""
        self.rows, self._loggers = list(rows), loggers
        purge = rows[-1]["step"] + 1 if rows else None
        self._sinks: tuple[_Lines | _Events, ...] = ()  # each appends rows, all or, where it raises OSError, none
        if workdir:
            events = (_Events(Workdir(workdir).tensorboard, purge),) if tensorboard else ()
            self._sinks = (_Lines(Workdir(workdir).metrics), *events)
        self._written = [0, len(rows)]  # rows that each sink holds; TensorBoard has kept those from before
        self._warned_of: set[str] = set()
        self._write()

    def write(self, kind: str, step: int, epoch: int, values: dict[str, Any]) -> None:
        """Appends a row `{"kind", "step", "epoch", **values}`; its scalars go to TensorBoard as `kind/name`."""
        self.rows.append({"kind": kind, "step": step, "epoch": epoch, **values})
        self._write()

    def _write(self) -> None:
        """Writes what each sink has not got yet."""
        for i, sink in enumerate(self._sinks):
            try:
                sink.write(self.rows[self._written[i] :])
                self._written[i] = len(self.rows)
            except OSError as error:
                if sink.name not in self._warned_of:
                    print(
                        f"warning: {sink.name} cannot be written: {error}; training goes on, and its rows are written"
                        " when that is possible again",
                        file=sys.stderr,
                    )
                self._warned_of.add(sink.name)
        for logger in self._loggers:
            logger.write(self.rows)

    def finish(self, summary: Mapping[str, float], files: Sequence[Path]) -> None:
        """Hands the final metrics and the files of a run that is complete to the loggers that take them."""
        for logger in self._loggers:
            logger.finish(self.rows, summary, files)

    def close(self) -> None:
        for each in (*self._sinks, *self._loggers):
            each.close()


class _Lines:
    """`metrics.jsonl`: a row a line."""

    def __init__(self, path: Path):
        self.name, self._path, self._size = path.name, path, 0

    def write(self, rows: Sequence[Row]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.truncate(file, self._size)  # the part of a line that a failed write has left
            os.lseek(file, self._size, os.SEEK_SET)
            while text:  # a disk that is nearly full takes a part, and refuses the rest
                text = text[os.write(file, text) :]
            self._size = os.lseek(file, 0, os.SEEK_CUR)
        finally:
            os.close(file)

    def close(self) -> None:
        pass


class _Events:
    """TensorBoard's files: one, and another after each failure."""

    def __init__(self, folder: Path, purge_step: int | None):
        self.name, self._folder, self._purge, self._files = folder.name, folder, purge_step, 0
        self._writer: RecordWriter | None = None

    def write(self, rows: Sequence[Row]) -> None:
        if not rows and self._purge is None:
            return  # before the import: it imports PyTorch where that is installed, and no first step waits for it
        from tensorboardX.summary import scalar

        try:
            writer = self._writer or self._open()
            for row in rows:
                for name, value in scalars(row).items():
                    _put(writer, step=row["step"], summary=scalar(name, value))
            writer.flush()
        except OSError:
            self.close()
            raise

    def _open(self) -> "RecordWriter":
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.record_writer import RecordWriter

        self._folder.mkdir(exist_ok=True)
        self._files += 1
        name = f"events.out.tfevents.{time.time():.0f}.{os.getpid()}.{self._files}"
        self._writer = RecordWriter(str(self._folder / name))
        _put(self._writer, file_version="brain.Event:2")
        if self._purge is not None:
            _put(self._writer, step=self._purge, session_log=SessionLog(status=SessionLog.START))
        return self._writer

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._writer:
                self._writer.close()
        self._writer = None


def _put(writer: "RecordWriter", **fields: Any) -> None:
    from tensorboardX.proto.event_pb2 import Event

    writer.write(Event(wall_time=time.time(), **fields).SerializeToString())
