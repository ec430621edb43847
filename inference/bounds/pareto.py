"""The Pareto tail index k-hat of importance weights: whether their mean and its error can be trusted.

The largest M = min(K/5, 3 sqrt(K)) of K weights are fitted by a generalised Pareto distribution, whose moments exist up
to order 1/k (Vehtari, Simpson, Gelman, Yao and Gabry 2024, arXiv:1507.02646; for guides: Yao et al. 2018,
arXiv:1802.02538). Weights have a finite variance for k < 0.5. Up to k-hat = 0.7 the mean still settles at a useful
rate; above, neither it nor its standard error can be trusted, for a weight that matters may not have been drawn yet.

The fit is ArviZ's (``psislw``, which takes *minus* log-weights). The one constraint: only the M + 1 largest log-weights
are needed, so K draws never have to be held; k-hat is from the tail of the K draws.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

BAD_K_HAT = 0.7
MIN_TAIL = 5  # below this a tail cannot be fitted


def tail_size(num_draws: int) -> int:
    """M, the number of largest weights that are fitted, out of K = ``num_draws``.

    Example:
        >>> tail_size(100), tail_size(10_000), tail_size(100_000)
        (20, 300, 948)
    """
    return math.floor(3 * math.sqrt(num_draws)) if num_draws > 225 else num_draws // 5


def pareto_k_hat(largest: Tensor, num_draws: int, resolution: float = 0.0) -> Tensor:
    """k-hat of each datum from its largest log-weights.

    Args:
        largest: ``[*shape, m]``, the m >= M + 1 largest log-weights in descending order.
        num_draws: K.
        resolution: log-weights that differ by no more than this are equal (rounding of the programs' dtype).

    Returns:
        ``[*shape]``, float64. Without a fit: minus infinity where the whole tail is equal (bounded weights, as with an
        exact guide); plus infinity where the draws barely touch the posterior, with fewer than M positive weights or a
        tail wider than float64 holds; NaN where nothing can be said, with K < 25 or tied weights (discrete latents).

    Raises:
        ValueError: fewer than M + 1 log-weights for K draws that can be fitted.

    Example:
        >>> u = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> log_weights = -0.9 * u.log()  # w = u^-0.9 is Pareto with k = 0.9
        >>> 0.7 < float(pareto_k_hat(log_weights.sort(descending=True).values, 4000)) < 1.1
        True
    """
    tail = tail_size(num_draws)
    if tail < MIN_TAIL:
        return torch.full(largest.shape[:-1], math.nan, dtype=torch.float64)
    if largest.shape[-1] <= tail:
        raise ValueError(f"expected the {tail + 1} largest of {num_draws} log-weights, got {largest.shape[-1]}")
    rows = largest[..., : tail + 1].detach().cpu().to(torch.float64).numpy()
    k_hat = [_k_hat(row, num_draws, resolution) for row in rows.reshape(-1, tail + 1)]
    return torch.tensor(k_hat, dtype=torch.float64).reshape(largest.shape[:-1])


def _k_hat(largest: np.ndarray, num_draws: int, resolution: float) -> float:
    """k-hat of one datum; ``largest`` are its M + 1 largest log-weights, the last being where the tail begins."""
    from arviz_stats.base import array_stats

    if largest[-2] == -np.inf:
        return math.inf
    relative = largest - largest[0]
    if -relative[-2] <= resolution:
        return -math.inf
    start = np.exp(relative[-1])
    tail = len(relative) - 1
    if np.exp(relative[tail - int(tail / 4 + 0.5)]) == start:  # the lower quartile, which scales the fit
        return math.nan if start > 0 else math.inf
    draws = np.full(num_draws, relative[-1])  # what lies below the tail plays no part
    draws[: len(relative)] = relative
    return float(array_stats.psislw(-draws)[1])
