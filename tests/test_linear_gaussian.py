"""The linear-Gaussian oracle against dense conditioning of the joint covariance, in value and gradient."""

import numpy as np
import pytest
import torch
from pyro import distributions as dist

from ppl_models import LinearGaussian
from tests.oracles import gaussian

SHAPES = [(1, 1), (4, 2), (3, 3), (2, 5)]


def _numbers(pair: LinearGaussian) -> tuple[np.ndarray, np.ndarray, float]:
    return pair.weight.detach().numpy(), pair.bias.detach().numpy(), float(pair.noise_scale.detach())


@pytest.mark.parametrize("shape", SHAPES)
def test_evidence_is_the_marginal_density(shape):
    pair = LinearGaussian.random(*shape)
    x = torch.randn(6, shape[0])
    assert np.allclose(pair.log_evidence(x).detach(), gaussian.log_evidence(*_numbers(pair), x.numpy()), rtol=1e-10)


def test_the_evidence_check_catches_a_wrong_noise_scale():
    pair = LinearGaussian.random(4, 2)
    weight, bias, scale = _numbers(pair)
    x = torch.randn(6, 4)
    assert not np.allclose(
        pair.log_evidence(x).detach(), gaussian.log_evidence(weight, bias, scale**2, x.numpy()), rtol=1e-3
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_posterior_is_the_conditioned_joint(shape):
    pair = LinearGaussian.random(*shape)
    x = torch.randn(3, shape[0])
    posterior = pair.posterior(x)
    for i in range(3):
        mean, cov = gaussian.posterior(*_numbers(pair), x[i].numpy())
        assert np.allclose(posterior.loc[i].detach(), mean, rtol=1e-9, atol=1e-12)
        assert np.allclose(posterior.covariance_matrix[i].detach(), cov, rtol=1e-9, atol=1e-12)


def test_exact_guide_is_diagonal_only_where_the_columns_are_orthogonal():
    x = torch.randn(3, 4)
    assert isinstance(LinearGaussian.random(4, 2).guide_distribution(x), dist.MultivariateNormal)
    diagonal = LinearGaussian.random(4, 2, orthogonal=True)
    law = diagonal.guide_distribution(x)
    assert isinstance(law.base_dist, dist.Normal)
    assert torch.allclose(torch.diag_embed(law.variance), diagonal.posterior(x).covariance_matrix, atol=1e-12)


def test_mean_field_elbo_is_evidence_minus_kl():
    pair = LinearGaussian.random(4, 2, guide="mean_field")
    x = torch.randn(3, 4)
    law = pair.guide_distribution(x)
    for i in range(3):
        mean, cov = gaussian.posterior(*_numbers(pair), x[i].numpy())
        gap = gaussian.kl(law.mean[i].detach().numpy(), np.diag(law.variance[i].detach().numpy()), mean, cov)
        assert gap > 1e-5
        assert float((pair.log_evidence(x) - pair.elbo(x))[i].detach()) == pytest.approx(gap, rel=1e-9)


def test_mean_field_guide_is_the_best_diagonal_gaussian():
    """Any other diagonal scale or mean lowers the bound: the gradient of KL vanishes and moving away raises it."""
    pair = LinearGaussian.random(4, 2, guide="mean_field")
    x = torch.randn(1, 4)
    mean, cov = gaussian.posterior(*_numbers(pair), x[0].numpy())
    law = pair.guide_distribution(x)
    loc, var = law.mean[0].detach().numpy(), law.variance[0].detach().numpy()
    least = gaussian.kl(loc, np.diag(var), mean, cov)
    rng = np.random.default_rng(0)
    for _ in range(50):
        moved = gaussian.kl(loc + 0.1 * rng.normal(size=2), np.diag(var * np.exp(0.1 * rng.normal(size=2))), mean, cov)
        assert moved > least


def test_gradient_of_the_evidence_against_finite_differences():
    pair = LinearGaussian.random(3, 2)
    x = torch.randn(2, 3)
    pair.log_evidence(x).sum().backward()
    weight, bias, scale = _numbers(pair)
    step = 1e-6
    for i, j in np.ndindex(*weight.shape):
        moved = [weight.copy(), weight.copy()]
        moved[0][i, j] += step
        moved[1][i, j] -= step
        up, down = (gaussian.log_evidence(w, bias, scale, x.numpy()).sum() for w in moved)
        assert float(pair.weight.grad[i, j]) == pytest.approx((up - down) / (2 * step), rel=1e-6, abs=1e-7)


def test_random_leaves_the_default_generator_alone():
    state = torch.get_rng_state()
    LinearGaussian.random(3, 2)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((torch.ones(3), torch.ones(3), 1.0), r"expected weight \[D, d\]"),
        ((torch.ones(3, 2), torch.ones(2), 1.0), r"bias \[D\]"),
        ((torch.ones(3, 2), torch.ones(3), 0.0), "positive noise_scale"),
        ((torch.ones(3, 2), torch.ones(3), 1.0, "laplace"), "'exact' or 'mean_field'"),
    ],
)
def test_bad_arguments_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        LinearGaussian(*arguments)


@pytest.mark.parametrize("guide", ["exact", "mean_field"])
@pytest.mark.parametrize("noise_scale", [0.1, 0.01, 1e-3])
def test_float32_parameters_lose_nothing_but_their_own_rounding(noise_scale, guide):
    """Against the dense density of the same float32 numbers in float64: to 4 ulps of float32 of the result."""
    pair = LinearGaussian.random(96, 8, noise_scale=noise_scale, guide=guide).float()
    x = pair.model(size=6).detach()
    wide = [parameter.detach().double() for parameter in (pair.weight, pair.bias, pair.log_noise_scale)]
    numbers = wide[0].numpy(), wide[1].numpy(), float(wide[2].exp())
    want = gaussian.log_evidence(*numbers, x.double().numpy())
    got = pair.log_evidence(x).detach()
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.double(), want, rtol=4 * torch.finfo(torch.float32).eps)
    s = pair.noise_scale.detach()  # control: worked out in float32, as a difference of squares
    residual = (x - pair.bias.detach()) / s
    precision = torch.eye(8, dtype=torch.float32) + pair.weight.detach().T @ pair.weight.detach() / s**2
    projected = torch.linalg.solve_triangular(
        torch.linalg.cholesky(precision), (residual @ pair.weight.detach() / s)[..., None], upper=False
    )
    cancelled = residual.square().sum(-1) - projected[..., 0].square().sum(-1)
    wide_residual = (x.double() - wide[1]) / wide[2].exp()
    wide_precision = torch.eye(8) + wide[0].T @ wide[0] / wide[2].exp() ** 2
    projection = torch.linalg.solve(wide_precision, (wide_residual @ wide[0]).T / wide[2].exp()).T
    exact = wide_residual.square().sum(-1) - ((wide_residual @ wide[0] / wide[2].exp()) * projection).sum(-1)
    assert (cancelled - exact).abs().max() > 4 * torch.finfo(torch.float32).eps * abs(want).max()
