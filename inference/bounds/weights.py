"""Running sums of importance weights that arrive in chunks, as logarithms: mean, error, effective sample size, tail.

With w_1..w_K the importance weights of one datum, p_hat = (1/K) sum_k w_k and ESS = (sum_k w_k)^2 / sum_k w_k^2,

    log p_hat    = m + log((1/K) sum_k exp(log w_k - m)),    m = max_k log w_k
    se(log p_hat) = sd(w) / (sqrt(K) p_hat) = sqrt((K/ESS - 1) / (K - 1))

The error is the delta method's: d log p_hat = d p_hat / p_hat to first order, and the variance of p_hat is that of w over
K (Owen, *Monte Carlo theory, methods and examples*, 2013, sections 2.4 and 9.2); sd(w) has the divisor K - 1. Weights are
held relative to the largest so far, and their second moment about their mean (Chan, Golub and LeVeque 1983), so neither
overflow nor cancellation occurs: K equal weights have an error of rounding size.

The one constraint: what is returned depends on the weights and not on how they were cut into chunks, up to rounding of
float64 (the order of summation).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CANDIDATES_AT_ONCE = 2**17  # log-weights merged at a time: 1 MiB


class WeightSums:
    """Reduces log-weights ``[n, *shape]``, chunk after chunk, in memory that does not grow with their number.

    What remains beside a few numbers per datum is the buffer of the largest: 9/8 ``keep`` of them per datum in float64. For
    k-hat ``keep`` is 3 sqrt(K) + 1, hence 27 sqrt(K) bytes per datum: 27 MB for 10 000 data and K = 10 000.

    Args:
        keep: how many of the largest log-weights of each datum are kept for :attr:`largest`.

    Example:
        >>> sums = WeightSums(keep=2)
        >>> sums.add(torch.tensor([0.0, 2.0]).log()); sums.add(torch.tensor([4.0]).log())
        >>> round(float(sums.log_mean.exp()), 6), round(float(sums.ess), 6), sums.largest.exp().round().tolist()
        (2.0, 1.8, [4.0, 2.0])
        >>> round(float(sums.std_error), 6)  # sd(w) = 2, K = 3, p_hat = 2
        0.57735
    """

    def __init__(self, keep: int = 0) -> None:
        self.count = 0
        self.keep = keep
        self._top = torch.zeros(())
        self._mean = torch.zeros(())
        self._squares = torch.zeros(())
        self._shape = torch.Size()
        self._buffer = torch.zeros(0, 0)  # [data, keep and some room], of which the first ``_filled`` are in use
        self._filled = 0

    def add(self, log_weights: Tensor) -> None:
        """Takes log-weights ``[n, *shape]`` in; float64 inside. Minus infinity is a weight of zero."""
        chunk = log_weights.detach().to(torch.float64)
        n = chunk.shape[0]
        top = chunk.amax(0) if self.count == 0 else torch.maximum(self._top, chunk.amax(0))
        weights = (chunk - _reference(top)).exp()
        mean = weights.mean(0)
        squares = (weights - mean).square().sum(0)
        if self.count == 0:
            self._mean, self._squares = mean, squares
        else:
            shrink = (self._top - _reference(top)).exp()  # to the new largest weight's units; zero weights stay zero
            total = self.count + n
            delta = mean - self._mean * shrink
            self._mean = self._mean * shrink + delta * (n / total)
            self._squares = self._squares * shrink.square() + squares + delta.square() * (self.count * n / total)
        self._top = top
        self.count += n
        self._keep_largest(chunk)

    @property
    def log_mean(self) -> Tensor:
        """log p_hat, ``[*shape]``; minus infinity where every weight is zero."""
        return _reference(self._top) + self._mean.log()

    @property
    def std_error(self) -> Tensor:
        """se(log p_hat), ``[*shape]`` nats; infinite for a single draw, and where every weight is zero."""
        if self.count < 2:
            return torch.full_like(self._mean, math.inf)
        error = (self._squares / (self.count * (self.count - 1))).sqrt() / self._mean
        return torch.where(self._mean > 0, error, torch.full_like(error, math.inf))

    @property
    def ess(self) -> Tensor:
        """Effective sample size (sum w)^2 / sum w^2 in [1, K], ``[*shape]``; zero where every weight is zero.

        Kong, Liu and Wong 1994, section 4.1.
        """
        total = self._mean * self.count
        ess = total.square() / (self._squares + self.count * self._mean.square())
        return torch.where(self._mean > 0, ess, torch.zeros_like(ess))

    @property
    def largest(self) -> Tensor:
        """The ``min(keep, count)`` largest log-weights of each datum, in descending order, ``[*shape, M]``."""
        self._merge(self._buffer.new_empty(0, len(self._buffer)))
        return self._buffer[:, : self._filled].reshape(*self._shape, self._filled)

    def _keep_largest(self, chunk: Tensor) -> None:
        if not self.keep:
            return
        new = chunk.reshape(len(chunk), -1)
        if self._filled == 0:
            self._shape = chunk.shape[1:]
            self._buffer = new.new_empty(new.shape[1], self.keep + max(16, self.keep // 8))
        if self._filled + len(new) > self._buffer.shape[1]:  # not at every draw, for it sorts what is kept
            self._merge(new)
        else:
            self._buffer[:, self._filled : self._filled + len(new)] = new.T
            self._filled += len(new)

    def _merge(self, new: Tensor) -> None:
        """Sorts new log-weights ``[n, data]`` in, some data at a time."""
        size = self._filled + len(new)
        left = min(self.keep, size)
        rows = max(1, CANDIDATES_AT_ONCE // max(1, size))
        for buffer, chunk in zip(self._buffer.split(rows), new.split(rows, 1), strict=True):
            buffer[:, :left] = torch.cat([buffer[:, : self._filled], chunk.T], 1).topk(left).values
        self._filled = left


def _reference(top: Tensor) -> Tensor:
    """The largest log-weight, or zero where every weight is zero, so that no infinities are subtracted."""
    return torch.where(top == -math.inf, torch.zeros_like(top), top)
