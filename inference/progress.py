"""Progress on anything that takes over two seconds: a live bar on a terminal, plain lines elsewhere, on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from inference.uncompiled import left_alone

QUIET_SECONDS = 2.0
LINE_SECONDS = 10.0


class Progress:
    """Counts towards a total; silent for the first two seconds.

    Args:
        description: what is being done, as in "drawing samples".
        total: how many units there are.
        unit: what is counted, in the plural.

    Example:
        >>> with Progress("counting", 3, unit="sheep") as progress:
        ...     for _ in range(3):
        ...         progress.advance()
        >>> progress.done
        3
    """

    def __init__(self, description: str, total: int, unit: str = "steps") -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.done = 0
        self._bar: Any = None
        self._start = self._last_line = 0.0

    @left_alone
    def __enter__(self) -> Progress:
        self._start = self._last_line = time.monotonic()
        return self

    @left_alone
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int = 1) -> None:
        """Notes that ``count`` more units are done."""
        self.done += count
        now = time.monotonic()
        if now - self._start < QUIET_SECONDS:
            return
        if sys.stderr.isatty():
            self._draw_bar()
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            left = (now - self._start) / self.done * (self.total - self.done)
            print(
                f"{self.description}: {self.done}/{self.total} {self.unit}, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def _draw_bar(self) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn(self.description), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self.description, total=self.total)
            self._bar.start()
        self._bar.update(self._task, completed=self.done)
