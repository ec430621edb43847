"""Closed forms law by law: what `decompose_elbo` calls analytic, against quadrature, enumeration or beta marginals.

    term of z = -KL(q || p) = E_q[log p(z) - log q(z)]

Densities come from SciPy, so that PyTorch's formulas for densities, entropies and divergences are all on trial.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from inference.bounds import decompose_elbo
from inference.bounds.closed_forms import divergence
from tests.bounds.elbo_case import quantile
from tests.oracles.expectations import discrete_expectation, expectation

GUMBEL, PARETO = stats.gumbel_r, stats.pareto


def lognormal(loc, scale):
    return stats.lognorm(s=scale, scale=math.exp(loc))


def inverse_gamma(shape, rate):
    return stats.invgamma(shape, scale=rate)


def continuous_laws():
    """q, p, and SciPy's of each; made anew in each test, for the dtype of the day."""
    return {
        "Normal, Normal": (dist.Normal(0.3, 0.8), dist.Normal(-0.5, 1.5), stats.norm(0.3, 0.8), stats.norm(-0.5, 1.5)),
        "Normal, Laplace": (
            dist.Normal(0.3, 0.8),
            dist.Laplace(0.1, 1.2),
            stats.norm(0.3, 0.8),
            stats.laplace(0.1, 1.2),
        ),
        "Normal, Gumbel": (dist.Normal(0.3, 0.8), dist.Gumbel(0.1, 1.2), stats.norm(0.3, 0.8), GUMBEL(0.1, 1.2)),
        "Normal, Cauchy": (dist.Normal(0.3, 0.8), dist.Cauchy(0.1, 1.2), stats.norm(0.3, 0.8), stats.cauchy(0.1, 1.2)),
        "Normal, StudentT": (
            dist.Normal(0.3, 0.8),
            dist.StudentT(3.0, 0.1, 1.2),
            stats.norm(0.3, 0.8),
            stats.t(3, 0.1, 1.2),
        ),
        "Laplace, Normal": (
            dist.Laplace(0.3, 0.8),
            dist.Normal(-0.5, 1.5),
            stats.laplace(0.3, 0.8),
            stats.norm(-0.5, 1.5),
        ),
        "Laplace, Laplace": (
            dist.Laplace(0.3, 0.8),
            dist.Laplace(-0.5, 1.5),
            stats.laplace(0.3, 0.8),
            stats.laplace(-0.5, 1.5),
        ),
        "Gumbel, Normal": (dist.Gumbel(0.3, 0.8), dist.Normal(-0.5, 1.5), GUMBEL(0.3, 0.8), stats.norm(-0.5, 1.5)),
        "Gumbel, Gumbel": (dist.Gumbel(0.3, 0.8), dist.Gumbel(-0.5, 1.5), GUMBEL(0.3, 0.8), GUMBEL(-0.5, 1.5)),
        "Uniform, Normal": (
            dist.Uniform(-0.3, 0.8),
            dist.Normal(-0.5, 1.5),
            stats.uniform(-0.3, 1.1),
            stats.norm(-0.5, 1.5),
        ),
        "Uniform, Uniform": (
            dist.Uniform(-0.3, 0.8),
            dist.Uniform(-1.0, 1.0),
            stats.uniform(-0.3, 1.1),
            stats.uniform(-1, 2),
        ),
        "Uniform, Gumbel": (dist.Uniform(-0.3, 0.8), dist.Gumbel(0.1, 1.2), stats.uniform(-0.3, 1.1), GUMBEL(0.1, 1.2)),
        "Uniform, Gamma": (
            dist.Uniform(0.3, 0.8),
            dist.Gamma(2.0, 3.0),
            stats.uniform(0.3, 0.5),
            stats.gamma(2, scale=1 / 3),
        ),
        "Uniform, Exponential": (
            dist.Uniform(0.3, 0.8),
            dist.Exponential(2.0),
            stats.uniform(0.3, 0.5),
            stats.expon(scale=0.5),
        ),
        "Uniform, Beta": (dist.Uniform(0.3, 0.8), dist.Beta(2.0, 3.0), stats.uniform(0.3, 0.5), stats.beta(2, 3)),
        "Uniform, Pareto": (
            dist.Uniform(1.3, 1.8),
            dist.Pareto(1.0, 3.0),
            stats.uniform(1.3, 0.5),
            PARETO(3.0, scale=1.0),
        ),
        "Exponential, Exponential": (
            dist.Exponential(2.0),
            dist.Exponential(0.7),
            stats.expon(scale=0.5),
            stats.expon(scale=1 / 0.7),
        ),
        "Exponential, Gamma": (
            dist.Exponential(2.0),
            dist.Gamma(2.0, 3.0),
            stats.expon(scale=0.5),
            stats.gamma(2, scale=1 / 3),
        ),
        "Exponential, Normal": (
            dist.Exponential(2.0),
            dist.Normal(0.5, 1.5),
            stats.expon(scale=0.5),
            stats.norm(0.5, 1.5),
        ),
        "Exponential, Gumbel": (dist.Exponential(2.0), dist.Gumbel(0.1, 1.2), stats.expon(scale=0.5), GUMBEL(0.1, 1.2)),
        "Gamma, Gamma": (dist.Gamma(3.0, 2.0), dist.Gamma(2.0, 1.0), stats.gamma(3, scale=0.5), stats.gamma(2)),
        "Gamma, Exponential": (
            dist.Gamma(3.0, 2.0),
            dist.Exponential(0.7),
            stats.gamma(3, scale=0.5),
            stats.expon(scale=1 / 0.7),
        ),
        "Gamma, Normal": (dist.Gamma(3.0, 2.0), dist.Normal(0.5, 1.5), stats.gamma(3, scale=0.5), stats.norm(0.5, 1.5)),
        "Gamma, Gumbel": (dist.Gamma(3.0, 2.0), dist.Gumbel(0.1, 1.2), stats.gamma(3, scale=0.5), GUMBEL(0.1, 1.2)),
        "Gamma, LogNormal": (
            dist.Gamma(3.0, 2.0),
            dist.LogNormal(0.1, 1.2),
            stats.gamma(3, scale=0.5),
            lognormal(0.1, 1.2),
        ),
        "Chi2, Chi2": (dist.Chi2(5.0), dist.Chi2(3.0), stats.chi2(5), stats.chi2(3)),
        "Beta, Beta": (dist.Beta(3.0, 2.0), dist.Beta(1.5, 1.0), stats.beta(3, 2), stats.beta(1.5, 1)),
        "Beta, Normal": (dist.Beta(3.0, 2.0), dist.Normal(0.5, 1.5), stats.beta(3, 2), stats.norm(0.5, 1.5)),
        "Beta, Gamma": (dist.Beta(3.0, 2.0), dist.Gamma(2.0, 1.0), stats.beta(3, 2), stats.gamma(2)),
        "Beta, Exponential": (dist.Beta(3.0, 2.0), dist.Exponential(0.7), stats.beta(3, 2), stats.expon(scale=1 / 0.7)),
        "Beta, Uniform": (dist.Beta(3.0, 2.0), dist.Uniform(-1.0, 2.0), stats.beta(3, 2), stats.uniform(-1, 3)),
        "LogNormal, LogNormal": (
            dist.LogNormal(0.3, 0.4),
            dist.LogNormal(-0.2, 1.0),
            lognormal(0.3, 0.4),
            lognormal(-0.2, 1.0),
        ),
        "LogNormal, Gamma": (dist.LogNormal(0.3, 0.4), dist.Gamma(2.0, 1.0), lognormal(0.3, 0.4), stats.gamma(2)),
        "HalfNormal, HalfNormal": (
            dist.HalfNormal(0.7),
            dist.HalfNormal(1.3),
            stats.halfnorm(scale=0.7),
            stats.halfnorm(scale=1.3),
        ),
        "HalfNormal, HalfCauchy": (
            dist.HalfNormal(0.7),
            dist.HalfCauchy(1.3),
            stats.halfnorm(scale=0.7),
            stats.halfcauchy(scale=1.3),
        ),
        "Pareto, Pareto": (
            dist.Pareto(1.5, 4.0),
            dist.Pareto(1.0, 3.0),
            PARETO(4.0, scale=1.5),
            PARETO(3.0, scale=1.0),
        ),
        "Pareto, Gamma": (dist.Pareto(1.5, 4.0), dist.Gamma(2.0, 1.0), PARETO(4.0, scale=1.5), stats.gamma(2)),
        "Pareto, Exponential": (
            dist.Pareto(1.5, 4.0),
            dist.Exponential(0.7),
            PARETO(4.0, scale=1.5),
            stats.expon(scale=1 / 0.7),
        ),
        "Pareto, Normal": (dist.Pareto(1.5, 4.0), dist.Normal(0.5, 1.5), PARETO(4.0, scale=1.5), stats.norm(0.5, 1.5)),
        "InverseGamma, InverseGamma": (
            dist.InverseGamma(4.0, 2.0),
            dist.InverseGamma(3.0, 1.0),
            inverse_gamma(4, 2),
            inverse_gamma(3, 1),
        ),
        "Weibull, Weibull": (
            dist.Weibull(1.5, 2.0),
            dist.Weibull(1.0, 1.3),
            stats.weibull_min(2.0, scale=1.5),
            stats.weibull_min(1.3),
        ),
    }


def discrete_laws():
    return {
        "Bernoulli, Bernoulli": (dist.Bernoulli(0.3), dist.Bernoulli(0.6), stats.bernoulli(0.3), stats.bernoulli(0.6)),
        "Bernoulli, Poisson": (dist.Bernoulli(0.3), dist.Poisson(0.6), stats.bernoulli(0.3), stats.poisson(0.6)),
        "Binomial, Binomial": (
            dist.Binomial(5, torch.tensor(0.3)),
            dist.Binomial(5, torch.tensor(0.6)),
            stats.binom(5, 0.3),
            stats.binom(5, 0.6),
        ),
        "Poisson, Poisson": (dist.Poisson(2.0), dist.Poisson(3.5), stats.poisson(2.0), stats.poisson(3.5)),
        "Geometric, Geometric": (
            dist.Geometric(0.4),
            dist.Geometric(0.2),
            stats.geom(0.4, loc=-1),
            stats.geom(0.2, loc=-1),
        ),
    }


def decomposed(q, p, num_particles=500):
    return decompose_elbo(lambda: pyro.sample("z", p), lambda: pyro.sample("z", q), num_particles=num_particles)


def assert_right(d, exact):
    term = d["z"]
    if term.analytic is not None:
        assert float(term.analytic) == pytest.approx(exact, rel=1e-8, abs=1e-9)
        assert float(term.analytic_std_error) < 1e-12
    assert abs(float(term.monte_carlo) - exact) <= quantile(1) * float(term.std_error) + 1e-9


@pytest.mark.parametrize("name", continuous_laws())
def test_continuous_laws_against_quadrature(name):
    q, p, q_oracle, p_oracle = continuous_laws()[name]
    assert_right(decomposed(q, p), expectation(lambda u: p_oracle.logpdf(u) - q_oracle.logpdf(u), q_oracle))


@pytest.mark.parametrize("name", discrete_laws())
def test_discrete_laws_against_enumeration(name):
    q, p, q_oracle, p_oracle = discrete_laws()[name]
    assert_right(decomposed(q, p), discrete_expectation(lambda k: p_oracle.logpmf(k) - q_oracle.logpmf(k), q_oracle))


@pytest.mark.parametrize("name", [*continuous_laws(), *discrete_laws()])
def test_laws_in_plates_and_events(name):
    """The same laws, two data of three dims each: under vectorised particles q and p then differ in batch shape."""
    q, p, q_oracle, p_oracle = {**continuous_laws(), **discrete_laws()}[name]
    if name in discrete_laws():
        exact = discrete_expectation(lambda k: p_oracle.logpmf(k) - q_oracle.logpmf(k), q_oracle)
    else:
        exact = expectation(lambda u: p_oracle.logpdf(u) - q_oracle.logpdf(u), q_oracle)

    def in_plate(law):
        with pyro.plate("data", 2):
            pyro.sample("z", law.expand([3]).to_event(1))

    d = decompose_elbo(lambda: in_plate(p), lambda: in_plate(q), num_particles=500)
    assert d.elbo.shape == (2,)
    limit = quantile(2) * d["z"].std_error + 1e-9
    assert bool(((d["z"].monte_carlo - 3 * exact).abs() <= limit).all())
    if decomposed(q, p, num_particles=10)["z"].analytic is not None:
        assert d["z"].analytic is not None, d["z"].reason
        assert d["z"].analytic.tolist() == pytest.approx([3 * exact] * 2, rel=1e-7, abs=1e-8)


@pytest.mark.parametrize("size", [2, 5])
def test_categorical_laws_against_a_sum(size):
    q, p = torch.arange(1.0, size + 1), torch.ones(size) + torch.arange(float(size)).flip(0)
    q, p = q / q.sum(), p / p.sum()
    exact = -sum(a * math.log(a / b) for a, b in zip(q.tolist(), p.tolist(), strict=True))
    assert_right(decomposed(dist.Categorical(q), dist.Categorical(p)), exact)
    assert_right(decomposed(dist.OneHotCategorical(q), dist.OneHotCategorical(p)), exact)


@pytest.mark.parametrize("kind", [dist.Categorical, dist.OneHotCategorical])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classes_that_the_model_all_but_excludes(kind, dtype):
    """log p = -2000 is a number, and p none that a float can hold: PyTorch's table has infinity there."""
    q, logits = torch.tensor([0.5, 0.25, 0.25], dtype=dtype), torch.tensor([0.0, -2000.0, 1.0], dtype=dtype)
    log_p = logits.double() - math.log(1 + math.e)
    exact = float((q.double() * (q.double().log() - log_p)).sum())
    rounding = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    assert float(decomposed(kind(q), kind(logits=logits))["z"].analytic) == pytest.approx(-exact, rel=rounding)
    assert math.isinf(float(torch.distributions.kl_divergence(kind(q), kind(logits=logits))))
    # A class that q has not costs nothing; one that only q has is infinitely far.
    without = torch.tensor([0.0, -torch.inf, 1.0], dtype=dtype)
    assert float(divergence(kind(logits=without), kind(logits=without.clone()))) == 0
    assert float(divergence(kind(logits=without), kind(logits=torch.zeros_like(q)))) == pytest.approx(
        math.log(3) - (math.log(1 + math.e) - math.e / (1 + math.e)), rel=1e-6
    )
    for p in (kind(logits=without), kind(torch.tensor([0.5, 0.0, 0.5], dtype=dtype))):
        assert math.isinf(float(divergence(kind(q), p)))
        assert all(len(each) == 3 for each in (p.logits, p.probs))  # both are there now, and the next law has both
        assert math.isinf(float(divergence(kind(q), p.expand([2]))[0]))


def test_the_gradient_of_a_divergence_of_classes_is_that_of_its_sum():
    a, b = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    log_q, log_p = a - a.logsumexp(-1, True), b - b.logsumexp(-1, True)
    by_hand = torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), (a, b))
    kl = divergence(dist.OneHotCategorical(logits=a).to_event(1), dist.OneHotCategorical(logits=b).to_event(1))
    assert kl.shape == ()
    for found, expected in zip(torch.autograd.grad(kl, (a, b)), by_hand, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_dirichlet_against_its_beta_marginals():
    """log p - log q = log B(b) - log B(a) + sum_k (a_k - b_k) ... each E[log theta_k] from a Beta(a_k, a_0 - a_k)."""
    a, b = [2.0, 3.5, 1.2], [1.0, 2.0, 4.0]
    exact = (
        math.lgamma(sum(b))
        - math.lgamma(sum(a))
        + sum(math.lgamma(u) - math.lgamma(v) for u, v in zip(a, b, strict=True))
    )
    for u, v in zip(a, b, strict=True):
        exact += (v - u) * expectation(math.log, stats.beta(u, sum(a) - u))
    assert_right(decomposed(dist.Dirichlet(torch.tensor(a)), dist.Dirichlet(torch.tensor(b))), exact)


GAUSSIANS = {  # each names a way of writing the same Gaussian
    "diagonal": lambda m, s: dist.Normal(m, s.diagonal().sqrt()).to_event(1),
    "full": lambda m, s: dist.MultivariateNormal(m, covariance_matrix=s),
    "low rank": lambda m, s: dist.LowRankMultivariateNormal(m, torch.zeros(len(m), 1), s.diagonal()),
}


@pytest.mark.parametrize("p_kind", GAUSSIANS)
@pytest.mark.parametrize("q_kind", GAUSSIANS)
def test_gaussians_however_written(q_kind, p_kind):
    """KL(N(m, S) || N(n, T)) = 1/2 [tr T^-1 S + (n - m)' T^-1 (n - m) - d + log |T| / |S|], in NumPy."""
    m, n = np.array([0.3, -0.5, 0.2]), np.array([0.0, 0.4, -0.1])
    factor = np.array([[0.8, 0.0, 0.0], [0.3, 0.6, 0.0], [-0.2, 0.1, 0.9]])
    s = factor @ factor.T if q_kind == "full" else np.diag([0.4, 0.9, 1.3])
    t = (factor.T @ factor + np.eye(3)) if p_kind == "full" else np.diag([1.4, 0.7, 2.0])
    gap, inverse = n - m, np.linalg.inv(t)
    exact = -0.5 * (np.trace(inverse @ s) + gap @ inverse @ gap - 3 + np.linalg.slogdet(t)[1] - np.linalg.slogdet(s)[1])
    q = GAUSSIANS[q_kind](torch.tensor(m), torch.tensor(s))
    p = GAUSSIANS[p_kind](torch.tensor(n), torch.tensor(t))
    assert_right(decomposed(q, p), exact)


def test_transformed_laws_that_share_their_transform():
    """A full Gaussian through one affine map and exp: the divergence is that of the Gaussians."""

    def law(loc, scale):
        chain = [dist.transforms.AffineTransform(1.0, 2.0), dist.transforms.ExpTransform()]
        return dist.TransformedDistribution(dist.Normal(loc, scale), chain)

    gap = expectation(lambda u: stats.norm.logpdf(u, -0.2, 1.1) - stats.norm.logpdf(u, 0.3, 0.5), stats.norm(0.3, 0.5))
    d = decomposed(law(0.3, 0.5), law(-0.2, 1.1))
    assert d["z"].analytic is not None
    assert_right(d, gap)
