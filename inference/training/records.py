"""What a run keeps in its folder while it trains: checkpoints, metrics, and scalars for TensorBoard.

The first process writes, all read. Metrics of epochs after the checkpoint from which a run goes on are taken out again, so
that a file never holds an epoch twice. Without a folder nothing is written and nothing found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inference.training.checkpoints import (
    checkpoint_name,
    latest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from inference.training.metrics import Row, TensorBoard, append_metrics, read_metrics, write_metrics
from inference.training.states import flatten_state, restore_state


class Records:
    """The writing side of a RUN folder.

    Args:
        folder: the RUN folder, or None.
        writes: whether this process is the one that writes.
        tensorboard: write scalars for TensorBoard, too.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     records = Records(Path(folder))
        ...     records.save(3, {"epoch": 1})
        ...     records.latest()
        {'epoch': 1}
    """

    def __init__(self, folder: Path | None, writes: bool = True, tensorboard: bool = False) -> None:
        self.folder = folder
        self._place = folder if writes else None
        self._tensorboard = tensorboard
        self._board: TensorBoard | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes a checkpoint, keeping the one before.

        Raises:
            StorageError: the file system refused; the checkpoint before is intact.
        """
        if self._place is not None:
            tensors, values = flatten_state(state)
            save_checkpoint(self._place / "checkpoints", checkpoint_name(step), tensors, values)
            prune_checkpoints(self._place / "checkpoints")

    def latest(self) -> dict[str, Any] | None:
        """The state in the newest checkpoint, or None where there is none yet.

        Raises:
            CheckpointError: there are checkpoints, but none is intact.
        """
        found = None if self.folder is None else latest_checkpoint(self.folder / "checkpoints")
        return None if found is None else restore_state(found[1], found[2])

    def add(self, row: Row, timing: Row) -> None:
        """Adds an epoch's metrics; how long it took stands apart, because that differs from run to run.

        Raises:
            StorageError: the file system refused.
        """
        if self._place is None:
            return
        append_metrics(self._place / "metrics.csv", row)
        append_metrics(self._place / "timing.csv", {"epoch": row["epoch"], **timing})
        if self._tensorboard:
            if self._board is None:
                self._board = TensorBoard(self._place, first_epoch=int(row["epoch"]))
            self._board.add(row)

    def rewrite(self, rows: list[Row]) -> None:
        """Makes ``rows`` the metrics' only ones, and takes later epochs out of the timing.

        Raises:
            StorageError: the file system refused.
        """
        if self._place is not None:
            write_metrics(self._place / "metrics.csv", rows)
            timing = self._place / "timing.csv"
            write_metrics(timing, [row for row in read_metrics(timing) if row["epoch"] <= len(rows)])

    def close(self) -> None:
        """Ends what writes in the background."""
        if self._board is not None:
            self._board.close()
