"""The linear-Gaussian model by dense linear algebra in numpy and scipy, from the joint covariance alone."""

import numpy as np
from scipy.stats import multivariate_normal


def joint(weight: np.ndarray, bias: np.ndarray, noise_scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of (z, x) with z ~ N(0, I), x | z ~ N(W z + b, s^2 I)."""
    d, latent = weight.shape
    mean = np.concatenate([np.zeros(latent), bias])
    cov = np.block([[np.eye(latent), weight.T], [weight, weight @ weight.T + noise_scale**2 * np.eye(d)]])
    return mean, cov


def log_evidence(weight: np.ndarray, bias: np.ndarray, noise_scale: float, x: np.ndarray) -> np.ndarray:
    """log N(x; b, W W' + s^2 I), each row of x."""
    latent = weight.shape[1]
    mean, cov = joint(weight, bias, noise_scale)
    return np.atleast_1d(multivariate_normal(mean[latent:], cov[latent:, latent:]).logpdf(x))


def posterior(weight: np.ndarray, bias: np.ndarray, noise_scale: float, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of z given one x, by conditioning the joint Gaussian."""
    latent = weight.shape[1]
    mean, cov = joint(weight, bias, noise_scale)
    gain = cov[:latent, latent:] @ np.linalg.inv(cov[latent:, latent:])
    return gain @ (x - mean[latent:]), cov[:latent, :latent] - gain @ cov[latent:, :latent]


def kl(mean_q: np.ndarray, cov_q: np.ndarray, mean_p: np.ndarray, cov_p: np.ndarray) -> float:
    """KL(N(mean_q, cov_q) || N(mean_p, cov_p))."""
    inv = np.linalg.inv(cov_p)
    delta = mean_p - mean_q
    logs = np.linalg.slogdet(cov_p)[1] - np.linalg.slogdet(cov_q)[1]
    return float(0.5 * (np.trace(inv @ cov_q) + delta @ inv @ delta - len(mean_q) + logs))
