"""A run's metrics: one row an epoch, as CSV and, if asked for, in TensorBoard.

Floats are written as Python's ``repr``, so they read back bit for bit. Rows are only ever added at the end; a last line
that a crash cut off has no line end and is never read, and a resumed run writes the whole file again from its checkpoint.
"""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inference.training.config import ConfigError
from inference.training.storage import StorageError, write_atomic
from inference.training.texts import ContentError

Row = dict[str, float]


def read_metrics(path: Path) -> list[Row]:
    """Rows of a metrics file, in its order; none where there is no file.

    Raises:
        ContentError: a complete line that is not one number a column.
    """
    if not path.is_file():
        return []
    text = path.read_text()
    lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            rows.append({key: float(value) for key, value in zip(lines[0], line, strict=True)})
        except ValueError as error:
            raise ContentError(
                f"{path}, line {number}: expected one number a column, got {line}; restore it"
            ) from error
    return rows


def write_metrics(path: Path, rows: Sequence[Row]) -> None:
    """Writes all rows, atomically.

    Raises:
        StorageError: the file system refused.
    """
    write_atomic(path, _csv(rows, header=True).encode())


def append_metrics(path: Path, row: Row) -> None:
    """Adds one row at the end of a metrics file.

    Raises:
        StorageError: the file system refused; a part of the row may stand at the end, which no reader takes.
    """
    try:
        with path.open("a") as file:
            file.write(_csv([row], header=file.tell() == 0))
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"cannot write {path}: {reason}; make room and go on with --resume", error) from error


def check_tensorboard(out: Path | None) -> None:
    """Refuses the ``tensorboard`` option where it cannot be followed.

    Raises:
        ConfigError: no folder to write to, or the package is not installed.
    """
    if out is None:
        raise ConfigError("tensorboard: expected a RUN folder to write to, got none; pass out=FOLDER or leave it out")
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("tensorboard: expected the tensorboard package, found none; install ppl-models[tensorboard]")


class TensorBoard:
    """The same rows as scalars in ``FOLDER/tensorboard``, by epoch.

    Args:
        folder: the RUN folder.
        first_epoch: rows from this epoch on, left by a run that was cut off and is now resumed, are hidden.
    """

    def __init__(self, folder: Path, first_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(folder / "tensorboard", purge_step=first_epoch)

    def add(self, row: Row) -> None:
        """Writes one epoch."""
        for name, value in row.items():
            self._writer.add_scalar(name, value, int(row["epoch"]))
        self._writer.flush()

    def close(self) -> None:
        """Ends the writer's thread."""
        self._writer.close()


def _csv(rows: Sequence[Row], *, header: bool) -> str:
    if not rows:
        return ""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    if header:
        writer.writerow(rows[0])
    writer.writerows([repr(float(value)) for value in row.values()] for row in rows)
    return buffer.getvalue()
