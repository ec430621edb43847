"""A one-dimensional diffusion of Gaussian-mixture data by Bayes' rule and quadrature on a grid, in numpy and scipy.

Only q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t) is used: x_{t-1} and x_t given x_0 come from running it forward on
two variables, and reverse densities from dividing what that gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.integrate import quad
from scipy.stats import norm


def forward(betas: Sequence[float], t: int) -> tuple[float, float]:
    """Gain and variance of q(x_t | x_0), step by step."""
    gain, variance = 1.0, 0.0
    for beta in betas[:t]:
        gain, variance = gain * np.sqrt(1 - beta), variance * (1 - beta) + beta
    return gain, variance


def denoise(
    weights: np.ndarray, locs: np.ndarray, scales: np.ndarray, betas: Sequence[float], t: int, x_t: float
) -> float:
    """E[x_0 | x_t] for x_0 ~ sum_k weight_k N(loc_k, scale_k^2), by integrating over x_0."""
    gain, variance = forward(betas, t)

    def joint(x_0: float) -> float:
        return float(weights @ norm.pdf(x_0, locs, scales) * norm.pdf(x_t, gain * x_0, np.sqrt(variance)))

    options = {"epsabs": 1e-14, "epsrel": 1e-11, "limit": 400, "points": [*locs, x_t / gain]}
    low, high = float((locs - 12 * scales).min()), float((locs + 12 * scales).max())
    return quad(lambda u: u * joint(u), low, high, **options)[0] / quad(joint, low, high, **options)[0]


def term(
    betas: Sequence[float], t: int, x_0: float, mean: Callable[[float], float], variance: float, nodes: int = 80
) -> float:
    """L_t = E KL(q(x_t | x_{t+1}, x_0) || N(mean(x_{t+1}), variance)), 1 <= t < T, as a double integral on a grid.

    q(x_t | x_{t+1}, x_0) is q(x_{t+1} | x_t) q(x_t | x_0), normalised on the grid of x_t.
    """
    gain, spread = forward(betas, t + 1)
    u, w = np.polynomial.hermite_e.hermegauss(nodes)
    inner_gain, inner_variance = forward(betas, t)
    x_t = inner_gain * x_0 + np.sqrt(inner_variance) * np.linspace(-9, 9, 40_001)
    step = x_t[1] - x_t[0]
    beta = betas[t]
    total = 0.0
    for node, weight in zip(u, w / w.sum(), strict=True):
        x_next = gain * x_0 + np.sqrt(spread) * node
        density = norm.pdf(x_next, np.sqrt(1 - beta) * x_t, np.sqrt(beta))
        density *= norm.pdf(x_t, inner_gain * x_0, np.sqrt(inner_variance))
        density /= density.sum() * step
        inside = density > 0
        log_ratio = np.log(density[inside]) - norm.logpdf(x_t[inside], mean(x_next), np.sqrt(variance))
        total += weight * float((density[inside] * log_ratio).sum() * step)
    return total
