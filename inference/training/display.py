"""What a training run shows: epoch, ELBO, rate and distortion, bits/dim, active units, speed, time left; on stderr.

On a terminal one line that is drawn over and over; elsewhere plain lines: the first epoch, the last, and every few seconds
either an epoch or, where epochs are long, how far the one under way is.
"""

from __future__ import annotations

import sys
import time
from typing import Any

LINE_SECONDS = 5.0
DRAW_SECONDS = 0.25
HEADER = "epoch      train ELBO  valid ELBO  +- SE    rate  distortion  bits/dim  active   it/s   left"
LOSS_HEADER = HEADER.replace(" train ELBO  valid ELBO", "train -loss valid -loss")


def metrics_line(
    row: dict[str, float], epochs: int, speed: float, left: float, units: bool = True, bound: bool = True
) -> str:
    """One epoch as text, nats per datum, under :data:`HEADER`, or :data:`LOSS_HEADER` of what bounds no log p(x).

    Args:
        row: of the run's metrics.
        epochs: how many there will be at most.
        speed: steps per second.
        left: seconds.
        units: whether there are active units to count: a diffusion's latents are not learned.
        bound: whether the figures are those of a bound; else they have no rate, and no bits that a code would take.

    Example:
        >>> row = dict(epoch=3, train_elbo=-10.5, validation_elbo=-11.0, validation_std_error=0.1, validation_rate=4.0,
        ...            validation_distortion=7.0, validation_bits_per_dim=0.25, active_units=5)
        >>> print(metrics_line(row, 10, 120.0, 61.0))
        3/10           -10.50      -11.00   0.10    4.00        7.00     0.250       5    120   1:01
    """
    return f"{int(row['epoch'])}/{epochs}".ljust(9) + (
        f"{_cell(row['train_elbo'], 12)}{_cell(row['validation_elbo'], 12)}{_cell(row['validation_std_error'], 7)}"
        f"{_cell(row['validation_rate'], 8) if bound else '-':>8}{_cell(row['validation_distortion'], 12)}"
        f"{_cell(row['validation_bits_per_dim'], 10, 3) if bound else '-':>10}"
        f"{int(row['active_units']) if units else '-':>8}{speed:>7.{0 if speed >= 10 else 1}f}{clock(left):>7}"
    )


def _cell(value: float, width: int, decimals: int = 2) -> str:
    """So many decimals where they leave a space to the left, else as many figures as do."""
    forms = [f"{value:.{places}f}" for places in range(decimals, -1, -1)]
    text = next((form for form in [*forms, f"{value:.3g}", f"{value:.1g}"] if len(form) < width), f"{value:.0e}")
    return text.rjust(width) if len(text) < width else f" {text}"


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds, with hours where there are any.

    Example:
        >>> clock(61), clock(3661)
        ('1:01', '1:01:01')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class TrainingDisplay:
    """Shows epochs as they end, and how far the one under way is.

    Args:
        epochs: how many there will be at most.
        batches: steps an epoch.
        enabled: False shows nothing.
        units: see :func:`metrics_line`.
        bound: likewise.
    """

    def __init__(self, epochs: int, batches: int, enabled: bool = True, units: bool = True, bound: bool = True) -> None:
        self.epochs = epochs
        self.batches = batches
        self.enabled, self.units, self.bound = enabled, units, bound
        self.header = HEADER if bound else LOSS_HEADER
        self._live: Any = None
        self._start = self._drawn_at = self._printed_at = self._epoch_began = time.monotonic()
        self._steps = 0
        self._shown: float | None = None  # the last epoch that has a line
        self._latest: dict[str, float] | None = None
        self.last_words = ""

    def message(self, text: str) -> None:
        """A line of its own, as at the start: what is trained on what, and how."""
        if self.enabled:
            print(text, file=sys.stderr, flush=True)

    def step(self, epoch: int, batch: int) -> None:
        """Notes that one more step is done.

        Args:
            epoch: the one under way, from 1.
            batch: how many of its batches are done.
        """
        self._steps += 1
        now = time.monotonic()
        if not self.enabled or now - self._drawn_at < DRAW_SECONDS:
            return
        self._drawn_at = now
        if sys.stderr.isatty():
            self._draw(epoch, batch)
        elif now - max(self._printed_at, self._epoch_began) >= LINE_SECONDS:
            self._printed_at = now
            self.message(self._place(epoch, batch))

    def epoch(self, row: dict[str, float]) -> None:
        """Shows the metrics of an epoch that has ended."""
        self._latest, self._epoch_began = row, time.monotonic()
        if not self.enabled:
            return
        if sys.stderr.isatty():
            self._draw(int(row["epoch"]), self.batches)
        elif self._shown is None or time.monotonic() - self._printed_at >= LINE_SECONDS:
            self._print()

    def close(self) -> None:
        """Shows the last epoch, if it has not been shown, and leaves the terminal clean."""
        if self._live is not None:
            self._live.stop()
        if self._latest is not None and self._shown != self._latest["epoch"]:
            self._print()
        if self.last_words:
            self.message(self.last_words)

    def _speed(self) -> float:
        return self._steps / max(1e-9, time.monotonic() - self._start)

    def _left(self, epoch: int, batch: int) -> float:
        steps = (self.epochs - epoch) * self.batches + self.batches - batch
        return steps / max(1e-9, self._speed())

    def _place(self, epoch: int, batch: int) -> str:
        return (
            f"epoch {epoch}/{self.epochs}, step {batch}/{self.batches}, {self._speed():.4g} it/s, "
            f"{clock(self._left(epoch, batch))} left"
        )

    def _line(self, row: dict[str, float]) -> str:
        left = self._left(int(row["epoch"]), self.batches)
        return metrics_line(row, self.epochs, self._speed(), left, self.units, self.bound)

    def _print(self) -> None:
        if self._latest is None:
            return
        if self._shown is None:
            self.message(self.header)
        self.message(self._line(self._latest))
        self._shown = self._latest["epoch"]
        self._printed_at = time.monotonic()

    def _draw(self, epoch: int, batch: int) -> None:
        if self._live is None:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True, highlight=False), transient=True, auto_refresh=False)
            self._live.start()
        lines = [] if self._latest is None else [self.header, self._line(self._latest)]
        self._live.update("\n".join([*lines, self._place(epoch, batch)]), refresh=True)
