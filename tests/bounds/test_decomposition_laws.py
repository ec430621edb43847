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
from elbo_case import quantile
from oracles.expectations import discrete_expectation, expectation
from scipy import stats

from inference.bounds import decompose_elbo

GUMBEL, PARETO = stats.gumbel_r, stats.pareto


def lognormal(loc, scale):
    return stats.lognorm(s=scale, scale=math.exp(loc))


def inverse_gamma(shape, rate):
    return stats.invgamma(shape, scale=rate)


CONTINUOUS = {  # q, p, and SciPy's of each
    "Normal, Normal": (dist.Normal(0.3, 0.8), dist.Normal(-0.5, 1.5), stats.norm(0.3, 0.8), stats.norm(-0.5, 1.5)),
    "Normal, Laplace": (dist.Normal(0.3, 0.8), dist.Laplace(0.1, 1.2), stats.norm(0.3, 0.8), stats.laplace(0.1, 1.2)),
    "Normal, Gumbel": (dist.Normal(0.3, 0.8), dist.Gumbel(0.1, 1.2), stats.norm(0.3, 0.8), GUMBEL(0.1, 1.2)),
    "Normal, Cauchy": (dist.Normal(0.3, 0.8), dist.Cauchy(0.1, 1.2), stats.norm(0.3, 0.8), stats.cauchy(0.1, 1.2)),
    "Normal, StudentT": (
        dist.Normal(0.3, 0.8),
        dist.StudentT(3.0, 0.1, 1.2),
        stats.norm(0.3, 0.8),
        stats.t(3, 0.1, 1.2),
    ),
    "Laplace, Normal": (dist.Laplace(0.3, 0.8), dist.Normal(-0.5, 1.5), stats.laplace(0.3, 0.8), stats.norm(-0.5, 1.5)),
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
    "Uniform, Pareto": (dist.Uniform(1.3, 1.8), dist.Pareto(1.0, 3.0), stats.uniform(1.3, 0.5), PARETO(3.0, scale=1.0)),
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
    "Exponential, Normal": (dist.Exponential(2.0), dist.Normal(0.5, 1.5), stats.expon(scale=0.5), stats.norm(0.5, 1.5)),
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
    "Pareto, Pareto": (dist.Pareto(1.5, 4.0), dist.Pareto(1.0, 3.0), PARETO(4.0, scale=1.5), PARETO(3.0, scale=1.0)),
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
DISCRETE = {
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


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_laws_against_quadrature(name):
    q, p, q_oracle, p_oracle = CONTINUOUS[name]
    assert_right(decomposed(q, p), expectation(lambda u: p_oracle.logpdf(u) - q_oracle.logpdf(u), q_oracle))


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_laws_against_enumeration(name):
    q, p, q_oracle, p_oracle = DISCRETE[name]
    assert_right(decomposed(q, p), discrete_expectation(lambda k: p_oracle.logpmf(k) - q_oracle.logpmf(k), q_oracle))
