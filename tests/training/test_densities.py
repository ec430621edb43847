"""Toy densities: each log density integrates to one, and its sampler, written apart from it, draws from it.

The samples are judged by a chi-square test over the cells of a grid, with a false-failure rate of 1e-7 a density.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from inference.training.densities import TOY_DENSITIES, draw, log_density

HALF_WIDTH, FINE, COARSE = 6.0, 1200, 30  # jumps of the densities lie on edges of the fine cells
NUM = 50_000


def cell_probabilities(name: str, scale: float = 1.0) -> np.ndarray:
    """Midpoint quadrature of the density on a fine grid, summed over coarse cells, for samples scaled by `scale`."""
    step = 2 * HALF_WIDTH / FINE
    axis = torch.arange(FINE) * step + step / 2 - HALF_WIDTH
    points = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1) / scale
    mass = log_density(name, points).exp().numpy() * (step / scale) ** 2
    block = FINE // COARSE
    return mass.reshape(COARSE, block, COARSE, block).sum((1, 3))


def chi_square_p_value(points: np.ndarray, probabilities: np.ndarray) -> float:
    edges = np.linspace(-HALF_WIDTH, HALF_WIDTH, COARSE + 1)
    observed = np.histogram2d(points[:, 0], points[:, 1], bins=[edges, edges])[0].ravel()
    expected = probabilities.ravel() * len(points)
    large = expected >= 10
    rest = len(points) - observed[large].sum(), len(points) - expected[large].sum()
    statistic = ((observed[large] - expected[large]) ** 2 / expected[large]).sum()
    statistic += (rest[0] - rest[1]) ** 2 / max(rest[1], 1.0)
    return float(stats.chi2.sf(statistic, large.sum()))


@pytest.mark.parametrize("name", TOY_DENSITIES)
def test_density_is_normalised_and_is_that_of_the_samples(name: str) -> None:
    probabilities = cell_probabilities(name)
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-6)
    points, component = draw(name, NUM, np.random.default_rng(7))
    assert points.shape == (NUM, 2)
    assert component.shape == (NUM,)
    assert chi_square_p_value(points, probabilities) > 1e-7


@pytest.mark.parametrize("name", TOY_DENSITIES)
def test_a_density_five_percent_too_wide_is_caught(name: str) -> None:
    points, _ = draw(name, NUM, np.random.default_rng(7))
    assert chi_square_p_value(points, cell_probabilities(name, scale=1.05)) < 1e-7


def test_eight_gaussians_by_scipy() -> None:
    x = np.random.default_rng(1).normal(size=(50, 2)) * 2
    centres = [(2 * math.cos(math.pi * k / 4), 2 * math.sin(math.pi * k / 4)) for k in range(8)]
    expected = np.log(np.mean([stats.multivariate_normal(c, 0.04 * np.eye(2)).pdf(x) for c in centres], axis=0))
    np.testing.assert_allclose(log_density("eight_gaussians", torch.from_numpy(x)).numpy(), expected, rtol=1e-10)


def test_outside_the_checkerboard_the_log_density_is_minus_infinity() -> None:
    x = torch.tensor([[0.5, 0.5], [0.5, 2.5], [-0.5, 0.5], [4.5, 0.5], [-4.0, -4.0]])
    inside = -math.log(32)
    assert log_density("checkerboard", x).tolist() == [inside, -math.inf, -math.inf, -math.inf, inside]


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one of two_moons.*got 'donut'"):
        log_density("donut", torch.zeros(2))
    with pytest.raises(ValueError, match=r"points of shape \[\.\.\., 2\], got \[3\]"):
        log_density("rings", torch.zeros(3))
