"""Running mean and standard error of draws that arrive in chunks (Chan, Golub and LeVeque 1983).

Infinite draws are kept: a mean with one is infinite, and so is its error; it never turns into NaN silently.
"""

from __future__ import annotations

import torch
from torch import Tensor

BUFFER = 256


class Moments:
    """Mean and standard error over the first dim of all chunks seen.

    Example:
        >>> m = Moments()
        >>> m.add(torch.tensor([1.0, 2.0])); m.add(torch.tensor([6.0]))
        >>> float(m.mean), round(float(m.std_error), 4)
        (3.0, 1.5275)
    """

    def __init__(self) -> None:
        self.count = 0
        self._pending: list[Tensor] = []
        self._taken = 0  # of which the moments below are
        self._mean = torch.zeros(())
        self._squares = torch.zeros(())
        self._infinite = torch.zeros(())

    def add(self, chunk: Tensor) -> None:
        """Takes draws ``[n, ...]`` in; float64 inside. Single draws are kept until there are some hundred."""
        self.count += chunk.shape[0]
        self._pending.append(chunk.detach().to(torch.float64))
        if chunk.shape[0] > 1 or len(self._pending) >= BUFFER:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        chunk = self._pending[0] if len(self._pending) == 1 else torch.cat(self._pending)
        self._pending = []
        infinite = torch.where(chunk.isinf(), chunk, torch.zeros_like(chunk)).sum(0)
        finite = torch.where(chunk.isinf(), torch.zeros_like(chunk), chunk)
        n = chunk.shape[0]
        mean = finite.mean(0)
        squares = (finite - mean).square().sum(0)
        if self._taken == 0:
            self._mean, self._squares, self._infinite = mean, squares, infinite
        else:
            total = self._taken + n
            delta = mean - self._mean
            self._mean = self._mean + delta * (n / total)
            self._squares = self._squares + squares + delta.square() * (self._taken * n / total)
            self._infinite = self._infinite + infinite
        self._taken += n

    @property
    def mean(self) -> Tensor:
        """Mean of all draws; infinite where any draw was."""
        self._flush()
        return torch.where(self._infinite == 0, self._mean, self._infinite)

    @property
    def std_error(self) -> Tensor:
        """Standard error of the mean; infinite for a single draw or where a draw was infinite."""
        self._flush()
        if self.count < 2:
            return torch.full_like(self._mean, float("inf"))
        error = (self._squares / (self.count * (self.count - 1))).sqrt()
        return torch.where(self._infinite == 0, error, torch.full_like(error, float("inf")))
