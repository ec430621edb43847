"""The streaming reduction and the tail index against NumPy, SciPy, ArviZ on all weights, and Pyro."""

import math

import numpy as np
import pytest
import scipy.special
import torch
from arviz_stats.base import array_stats
from pyro.ops.stats import fit_generalized_pareto

from inference.bounds.pareto import pareto_k_hat, tail_size
from inference.bounds.weights import WeightSums


def reduced(log_weights: torch.Tensor, chunk_size: int, keep: int = 0) -> WeightSums:
    sums = WeightSums(keep)
    for chunk in log_weights.split(chunk_size):
        sums.add(chunk)
    return sums


def draws(count: int, *shape: int, spread: float = 2.0) -> torch.Tensor:
    return spread * torch.randn(count, *shape) - 500.0


@pytest.mark.parametrize("chunk_size", [1, 7, 100, 5000])
def test_the_sums_are_those_of_numpy_whatever_the_chunks(chunk_size):
    log_weights = draws(1000, 3, 2)
    sums = reduced(log_weights, chunk_size)
    lw = log_weights.numpy()
    assert np.allclose(sums.log_mean, scipy.special.logsumexp(lw, 0) - math.log(1000), rtol=1e-12, atol=0)
    w = np.exp(lw - lw.max(0))
    assert np.allclose(sums.std_error, w.std(0, ddof=1) / math.sqrt(1000) / w.mean(0), rtol=1e-12, atol=0)
    assert np.allclose(sums.ess, w.sum(0) ** 2 / (w**2).sum(0), rtol=1e-12, atol=0)
    assert torch.allclose(sums.std_error, ((1000 / sums.ess - 1) / 999).sqrt(), rtol=1e-10), "the formula in words"


def test_the_second_moment_is_needed():
    """The twin: the sample standard deviation with divisor K, or ESS read as K, is caught at the same tolerance."""
    lw = draws(50, 3)
    sums = reduced(lw, 50)
    w = (lw - lw.amax(0)).exp().numpy()
    assert not np.allclose(sums.std_error, w.std(0) / math.sqrt(50) / w.mean(0), rtol=1e-3)
    assert not torch.allclose(sums.std_error, sums.ess.rsqrt(), rtol=1e-3)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_a_hundred_thousand_weights_do_not_depend_on_the_chunks(size):
    log_weights = draws(100_000, 2, spread=5.0)
    whole, parts = reduced(log_weights, 100_000, keep=949), reduced(log_weights, 1000 * size, keep=949)
    for name in ("log_mean", "std_error", "ess", "largest"):
        assert torch.allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=0), name


def test_increasing_and_decreasing_weights():
    """The reference is the largest weight so far, so a rise by hundreds of nats must not overflow or vanish."""
    rising = torch.arange(0.0, 2000.0, 10.0)
    for log_weights in (rising, rising.flip(0)):
        sums = reduced(log_weights, 1)
        assert math.isclose(float(sums.log_mean), float(torch.logsumexp(rising, 0)) - math.log(200), rel_tol=1e-14)
        assert math.isclose(float(sums.ess), 1.0, rel_tol=1e-4)


def test_equal_weights_have_no_error():
    sums = reduced(torch.full((1000, 2), -1234.5), 10)
    assert (sums.log_mean == -1234.5).all()
    assert (sums.std_error == 0).all()
    assert (sums.ess == 1000).all()


def test_zero_weights_count_and_a_datum_without_weight_is_minus_infinity():
    log_weights = torch.tensor([[-math.inf, -math.inf], [0.0, -math.inf], [-math.inf, -math.inf], [0.0, -math.inf]])
    for chunk_size in (1, 2, 4):
        sums = reduced(log_weights, chunk_size)
        assert sums.log_mean.tolist() == [math.log(0.5), -math.inf]
        assert math.isclose(float(sums.std_error[0]), math.sqrt(1 / 3), rel_tol=1e-12)
        assert sums.std_error[1] == math.inf
        assert sums.ess.tolist() == [2.0, 0.0]


def test_one_draw_has_no_error():
    assert reduced(torch.zeros(1, 2), 1).std_error.tolist() == [math.inf, math.inf]


def test_the_largest_are_kept_in_order():
    log_weights = draws(500, 4)
    expected = log_weights.sort(0, descending=True).values[:30].T
    for chunk_size in (1, 13, 500):
        assert torch.equal(reduced(log_weights, chunk_size, keep=30).largest, expected)


@pytest.mark.parametrize("count", [60, 225, 226, 1000, 5000])
def test_k_hat_from_the_tail_is_that_of_all_draws(count):
    log_weights = draws(count, 4)
    sums = reduced(log_weights, 97, keep=tail_size(count) + 1)
    k_hat = pareto_k_hat(sums.largest, count)
    whole = array_stats.psislw(-log_weights.numpy(), axis=0)[1]
    assert np.allclose(k_hat, whole, rtol=1e-12)
    assert not np.allclose(k_hat, array_stats.psislw(log_weights.numpy(), axis=0)[1], rtol=0.1), "the sign matters"


def test_k_hat_agrees_with_pyros_fit():
    """Pyro's version of the fit differs in its prior grid's quartile alone: 0.05 apart at most on the same tail."""
    count = 4000
    for k in (0.2, 0.5, 0.9):
        log_weights = (-k * torch.rand(count).log()).sort(descending=True).values
        size = tail_size(count)
        weights = (log_weights - log_weights[0]).exp()
        pyros, _ = fit_generalized_pareto(weights[:size] - weights[size])
        ours = float(pareto_k_hat(log_weights, count))
        assert abs(ours - pyros) < 0.05
        # sd of the estimate: (1 + k) / sqrt(M), shrunk towards 0.5 by M / (M + 10) (Zhang and Stephens 2009)
        assert abs(ours - k) < 5 * (1 + k) / math.sqrt(size) + 10 / (size + 10)


def test_k_hat_where_there_is_nothing_to_fit():
    equal = torch.zeros(61)
    assert float(pareto_k_hat(equal, 400)) == -math.inf
    rounding = equal + 1e-9 * torch.rand(61)
    assert float(pareto_k_hat(rounding.sort(descending=True).values, 400, resolution=1e-8)) == -math.inf
    assert float(pareto_k_hat(rounding.sort(descending=True).values, 400)) > -math.inf
    few = torch.cat([torch.zeros(20), torch.full((41,), -math.inf)])
    assert float(pareto_k_hat(few, 400)) == math.inf
    steep = -100.0 * torch.arange(61.0)
    assert float(pareto_k_hat(steep, 400)) == math.inf
    tied = torch.cat([torch.zeros(20), torch.full((41,), -1.0)])
    assert math.isnan(float(pareto_k_hat(tied, 400)))
    assert math.isnan(float(pareto_k_hat(torch.zeros(24), 24)))
    positive_tail = torch.cat([-torch.rand(60).sort().values, torch.tensor([-math.inf])])
    assert math.isfinite(float(pareto_k_hat(positive_tail, 400)))


def test_k_hat_needs_the_whole_tail():
    with pytest.raises(ValueError, match="expected the 61 largest of 400 log-weights, got 60"):
        pareto_k_hat(torch.zeros(60), 400)
