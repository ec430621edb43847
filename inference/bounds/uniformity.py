"""Are ranks uniform? A chi-square statistic over bins, and a simultaneous band for their distribution function.

N ranks r_1..r_N in 0..M-1. Uniform ranks fall into ``bins`` equal bins with the statistic

    chi^2 = sum_b (n_b - N / bins)^2 / (N / bins),    about chi-square(bins - 1)

and F(i/M) = #{r < i} / N stays within pointwise binomial intervals at all i *together* with a stated probability, once
these are widened enough. How much is found exactly (Säilynoja, Bürkner and Vehtari 2022, arXiv:2103.10522, section 2):
the counts C_1, C_2, ... below i/M are a Markov chain, C_i - C_{i-1} ~ Binomial(N - C_{i-1}, 1 / (M - i + 1)), so the
probability of staying inside is a product of small matrices. Nothing is simulated here.

The one constraint: the number of ranks M is a multiple of the number of bins.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

Array = NDArray[np.float64]

BISECTIONS = 24


def bin_counts(ranks: NDArray[np.int64], num_ranks: int, bins: int) -> NDArray[np.int64]:
    """How many ranks ``[N, Q]`` in 0..num_ranks-1 fall into each of the bins: ``[bins, Q]``.

    Raises:
        ValueError: the number of ranks is no multiple of the number of bins.

    Example:
        >>> bin_counts(np.array([[0], [1], [3]]), num_ranks=4, bins=2).ravel().tolist()
        [2, 1]
    """
    if bins < 2 or num_ranks % bins:
        raise ValueError(
            f"expected at least 2 bins of equal size, got {bins} bins for {num_ranks} ranks: choose a divisor of "
            f"{num_ranks}, the number of draws plus one"
        )
    places = ranks * bins // num_ranks
    return np.stack([(places == b).sum(0) for b in range(bins)])


def chi_square(ranks: NDArray[np.int64], num_ranks: int, bins: int) -> tuple[Array, Array]:
    """The statistic of each column of ranks ``[N, Q]``, and the probability of a larger one: ``[Q]`` each.

    Example:
        >>> statistic, p_value = chi_square(np.arange(100).reshape(-1, 1) % 10, num_ranks=10, bins=5)
        >>> float(statistic[0]), float(p_value[0])
        (0.0, 1.0)
    """
    counts = bin_counts(ranks, num_ranks, bins)
    expected = len(ranks) / bins
    statistic = ((counts - expected) ** 2 / expected).sum(0)
    return statistic, stats.chi2.sf(statistic, bins - 1)


def ecdf(ranks: NDArray[np.int64], num_ranks: int) -> Array:
    """F(i / M) = #{r < i} / N at i = 1..M-1, ``[M-1, Q]``; i / M for uniform ranks.

    Example:
        >>> ecdf(np.array([[0], [2]]), num_ranks=4).ravel().tolist()
        [0.5, 0.5, 1.0]
    """
    return np.stack([(ranks < i).mean(0) for i in range(1, num_ranks)])


@lru_cache(maxsize=16)
def ecdf_band(num: int, num_ranks: int, probability: float = 0.95) -> tuple[Array, Array]:
    """The band in which :func:`ecdf` of N uniform ranks stays, at all places together, with at least ``probability``.

    Args:
        num: N.
        num_ranks: M.
        probability: of one column of ranks staying inside everywhere.

    Returns:
        Lowest and highest values inside, ``[M-1]`` each.

    Raises:
        ValueError: fewer than one rank or two places, or a probability outside (0, 1).

    Example:
        >>> low, high = ecdf_band(1000, 100)
        >>> float(low[49]), float(high[49])  # in the middle; one place alone would have 0.469 to 0.531
        (0.453, 0.547)
    """
    if num < 1 or num_ranks < 2 or not 0 < probability < 1:
        raise ValueError(
            f"expected num >= 1, num_ranks >= 2 and 0 < probability < 1, got {num}, {num_ranks} and {probability}"
        )
    places = np.arange(1, num_ranks) / num_ranks
    narrow, wide = 1 - probability, (1 - probability) / (2 * num_ranks)  # tail masses: one place alone, and Bonferroni
    for _ in range(BISECTIONS):
        middle = np.sqrt(narrow * wide)
        if _probability_inside(num, num_ranks, *_interval(num, places, middle)) >= probability:
            wide = middle
        else:
            narrow = middle
    low, high = _interval(num, places, wide)
    return low / num, high / num


def _interval(num: int, places: Array, tail: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counts inside a central binomial interval that leaves ``tail`` outside."""
    low, high = stats.binom.ppf(tail / 2, num, places), stats.binom.isf(tail / 2, num, places)
    return low.astype(np.int64), high.astype(np.int64)


def _probability_inside(num: int, num_ranks: int, low: NDArray[np.int64], high: NDArray[np.int64]) -> float:
    """P(low_i <= C_i <= high_i for all i), by one step of the chain after the other."""
    log_factorial = special.gammaln(np.arange(num + 1) + 1.0)
    counts, mass = np.zeros(1, dtype=np.int64), np.ones(1)
    for i in range(1, num_ranks):
        after = np.arange(low[i - 1], high[i - 1] + 1)
        jump = after - counts[:, None]
        left = num - counts[:, None]
        p = 1 / (num_ranks - i + 1)
        inside = np.clip(jump, 0, left)
        log_step = (
            log_factorial[left]
            - log_factorial[inside]
            - log_factorial[left - inside]
            + inside * np.log(p)
            + (left - inside) * np.log1p(-p)
        )
        mass = mass @ np.where(jump >= 0, np.exp(log_step), 0.0)
        counts = after
    return float(mass.sum())
