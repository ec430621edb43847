"""A one-dimensional Gaussian diffusion by dense linear algebra in numpy: joint covariances, conditioned by brute force.

A chain of affine kernels is one big Gaussian. Kernels are triples (gain, offset, variance); entry t - 1 belongs to step t:

    forward   x_t = gain_t x_{t-1} + offset_t + noise        reverse   x_{t-1} = gain_t x_t + offset_t + noise

Nothing here knows Bayes' rule for a single step, alpha-bar or the split of the bound into terms.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import multivariate_normal

Kernel = tuple[float, float, float]


def chain(mean: float, variance: float, kernels: Sequence[Kernel]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of u_0, u_1, .. with u_0 ~ N(mean, variance) and u_i = gain u_{i-1} + offset + noise."""
    means, cov = [mean], np.array([[variance]])
    for gain, offset, noise in kernels:
        means.append(gain * means[-1] + offset)
        row = gain * cov[-1]
        cov = np.block([[cov, row[:, None]], [row[None, :], np.array([[gain * row[-1] + noise]])]])
    return np.array(means), cov


def process(betas: Sequence[float]) -> list[Kernel]:
    """The kernels of q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t)."""
    return [(float(np.sqrt(1 - b)), 0.0, float(b)) for b in betas]


def reverse_kernels(betas: Sequence[float], loc: float, scale: float) -> list[Kernel]:
    """The kernels of q(x_{t-1} | x_t) for data N(loc, scale^2), by conditioning the joint of the two."""
    mean, cov = chain(loc, scale**2, process(betas))
    kernels = []
    for t in range(1, len(mean)):
        gain = cov[t - 1, t] / cov[t, t]
        kernels.append((gain, mean[t - 1] - gain * mean[t], cov[t - 1, t - 1] - gain * cov[t, t - 1]))
    return kernels


def model(kernels: Sequence[Kernel]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of (x_0, .., x_T) under p(x_T) = N(0, 1) and reverse kernels."""
    mean, cov = chain(0.0, 1.0, list(kernels)[::-1])
    return mean[::-1], cov[::-1, ::-1]


def log_evidence(kernels: Sequence[Kernel], x_0: float) -> float:
    """log p(x_0)."""
    mean, cov = model(kernels)
    return float(multivariate_normal(mean[0], cov[0, 0]).logpdf(x_0))


def elbo(betas: Sequence[float], kernels: Sequence[Kernel], x_0: float) -> float:
    """E_q[log p(x_0, .., x_T) - log q(x_1, .., x_T | x_0)], two dense Gaussians of T + 1 and T dimensions."""
    mean, cov = model(kernels)
    q_mean, q_cov = chain(x_0, 0.0, process(betas))
    cross = np.trace(np.linalg.solve(cov, q_cov))
    entropy = multivariate_normal(q_mean[1:], q_cov[1:, 1:]).entropy()
    return float(multivariate_normal(mean, cov).logpdf(q_mean) - 0.5 * cross + entropy)
