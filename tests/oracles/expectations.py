"""Expectations by adaptive quadrature and by enumeration: slow, obvious, good to ten digits.

    E_q[f] = int q(u) f(u) du    or    sum_k q(k) f(k)

with q one of SciPy's laws. Break points are passed where f has a kink or a jump, so that quadrature sees them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.integrate

TAIL = 1e-15


def expectation(f: Callable[[float], float], law: Any, breaks: Sequence[float] = ()) -> float:
    """E[f(u)], u from a continuous SciPy law, piecewise between its quantiles and the breaks.

    >>> import scipy.stats
    >>> round(expectation(lambda u: u * u, scipy.stats.norm(1.0, 2.0)), 8)
    5.0
    """
    masses = [10.0**-k for k in range(30, 1, -4)] + [0.05, 0.3, 0.5]
    knots = {float(tail(mass)) for mass in masses for tail in (law.ppf, law.isf)}
    low, high = min(knots), max(knots)
    ordered = sorted(knots | {b for b in breaks if low < b < high})
    return sum(
        scipy.integrate.quad(lambda u: float(law.pdf(u) * f(u)), a, b, epsabs=1e-13, epsrel=1e-11, limit=200)[0]
        for a, b in itertools.pairwise(ordered)
    )


def discrete_expectation(f: Callable[[int], float], law: Any, support: Sequence[int] | None = None) -> float:
    """E[f(k)], k from a discrete SciPy law, summed over its support up to a tail of mass 1e-15.

    >>> import scipy.stats
    >>> round(discrete_expectation(float, scipy.stats.poisson(3.0)), 8)
    3.0
    """
    if support is None:
        support = range(max(0, int(law.ppf(TAIL)) - 1), int(law.isf(TAIL)) + 2)
    masses = np.array([float(law.pmf(k)) for k in support])
    return float(sum(m * f(k) for m, k in zip(masses, support, strict=True) if m > 0))
