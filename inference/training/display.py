"""What a training run shows: epoch, ELBO, rate and distortion, bits/dim, active units, speed, time left; on stderr.

A live line on a terminal; elsewhere plain lines, the first, the last, and one every few seconds between.
"""

from __future__ import annotations

import sys
import time
from typing import Any

LINE_SECONDS = 5.0
HEADER = "epoch      train ELBO  valid ELBO  +- SE   rate   distortion  bits/dim  active  it/s   left"


def metrics_line(row: dict[str, float], epochs: int, rate: float, left: float) -> str:
    """One epoch as text, nats per datum, under :data:`HEADER`.

    Example:
        >>> row = dict(epoch=3, train_elbo=-10.5, validation_elbo=-11.0, validation_std_error=0.1, validation_rate=4.0,
        ...            validation_distortion=7.0, validation_bits_per_dim=0.25, active_units=5)
        >>> print(metrics_line(row, 10, 120.0, 61.0))
        3/10           -10.50      -11.00   0.10    4.00        7.00     0.250       5   120   1:01
    """
    minutes, seconds = divmod(round(left), 60)
    return f"{int(row['epoch'])}/{epochs}".ljust(9) + (
        f"{row['train_elbo']:>12.2f}{row['validation_elbo']:>12.2f}{row['validation_std_error']:>7.2f}"
        f"{row['validation_rate']:>8.2f}{row['validation_distortion']:>12.2f}{row['validation_bits_per_dim']:>10.3f}"
        f"{int(row['active_units']):>8}{rate:>6.0f}{f'{minutes}:{seconds:02d}':>7}"
    )


class TrainingDisplay:
    """Shows epochs as they end.

    Args:
        epochs: how many there will be at most.
        batches: steps an epoch.
        enabled: False shows nothing.
    """

    def __init__(self, epochs: int, batches: int, enabled: bool = True) -> None:
        self.epochs = epochs
        self.batches = batches
        self.enabled = enabled
        self._live: Any = None
        self._start = time.monotonic()
        self._last_line = -LINE_SECONDS
        self._steps = 0
        self._shown: int | None = None
        self._latest: tuple[dict[str, float], float, float] | None = None

    def message(self, text: str) -> None:
        """A line of its own, as at the start: what is trained on what, and how."""
        if self.enabled:
            print(text, file=sys.stderr, flush=True)

    def step(self) -> None:
        """Notes that one more step is done."""
        self._steps += 1

    @property
    def steps_per_second(self) -> float:
        """Steps per second so far."""
        return self._steps / max(1e-9, time.monotonic() - self._start)

    def epoch(self, row: dict[str, float]) -> None:
        """Shows the metrics of an epoch that has ended."""
        if not self.enabled:
            return
        left = (self.epochs - row["epoch"]) * self.batches / max(1e-9, self.steps_per_second)
        self._latest = (row, self.steps_per_second, left)
        if sys.stderr.isatty():
            self._draw(metrics_line(row, self.epochs, self.steps_per_second, left))
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._print()

    def close(self) -> None:
        """Shows the last epoch, if it has not been shown, and leaves the terminal clean."""
        if self._live is not None:
            self._live.stop()
        if self._latest is not None and self._shown != self._latest[0]["epoch"]:
            self._print()

    def _print(self) -> None:
        if self._latest is None:
            return
        row, rate, left = self._latest
        if self._shown is None:
            self.message(HEADER)
        self.message(metrics_line(row, self.epochs, rate, left))
        self._shown = int(row["epoch"])
        self._last_line = time.monotonic()

    def _draw(self, line: str) -> None:
        if self._live is None:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), transient=True, refresh_per_second=4)
            self._live.start()
        self._live.update(f"{HEADER}\n{line}")
