"""Metric rows: kept in memory, written to `metrics.jsonl` and to TensorBoard as they come.

Rows hold no wall-clock time, so two equal runs write equal files. They are saved with each checkpoint, and a resumed
run starts from the checkpoint's rows: the file never shows a step twice.
"""

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

Row = dict[str, Any]


class MetricLog:
    """The rows of one run."""

    def __init__(self, workdir: Path, rows: list[Row]):
        """Starts from `rows`, replacing what an interrupted run wrote after its last checkpoint."""
        self.rows = list(rows)
        self._file = (workdir / "metrics.jsonl").open("w")
        self._file.writelines(json.dumps(row) + "\n" for row in rows)
        self._file.flush()
        purge = rows[-1]["step"] + 1 if rows else None
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=purge)

    def write(self, kind: str, step: int, epoch: int, values: dict[str, Any]) -> None:
        """Appends a row `{"kind", "step", "epoch", **values}`; its scalars go to TensorBoard as `kind/name`."""
        row = {"kind": kind, "step": step, "epoch": epoch, **values}
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, float):
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()


class RowList(MetricLog):
    """The rows in a process that writes none."""

    def __init__(self, rows: list[Row]):
        self.rows = list(rows)

    def write(self, kind: str, step: int, epoch: int, values: dict[str, Any]) -> None:
        self.rows.append({"kind": kind, "step": step, "epoch": epoch, **values})

    def close(self) -> None:
        pass
