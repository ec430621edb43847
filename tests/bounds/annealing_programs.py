"""Programs with latents on supports of every kind, each with its evidence known in closed form (scipy's own densities)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.stats
import torch


@dataclass(frozen=True)
class Known:
    """A pair of programs, data, and log p(x) of each datum."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    x: torch.Tensor
    log_evidence: np.ndarray


def positive() -> Known:
    """z ~ LogNormal(0, 1), x ~ N(log z, 0.5): x ~ N(0, sqrt(1.25))."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.log(), 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(0.5 * x, 0.8))

    x = torch.tensor([-0.7, 0.2, 1.5])
    return Known(model, guide, x, scipy.stats.norm(0, 1.25**0.5).logpdf(x.numpy()))


def unit_interval() -> Known:
    """z ~ Beta(2, 3), x ~ Binomial(6, z): beta-binomial."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Beta(2.0, 3.0))
            pyro.sample("x", dist.Binomial(6, z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Beta(2.0 + 0.5 * x, 3.0 + 0.5 * (6 - x)))

    x = torch.tensor([0.0, 2.0, 5.0])
    return Known(model, guide, x, scipy.stats.betabinom(6, 2, 3).logpmf(x.numpy()))


def simplex() -> Known:
    """z ~ Dirichlet(2, 1.5, 3), x ~ Multinomial(5, z): Dirichlet-multinomial."""
    alpha = [2.0, 1.5, 3.0]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.tensor(alpha)))
            pyro.sample("x", dist.Multinomial(5, z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Dirichlet(torch.tensor(alpha) + 0.5 * x))

    x = torch.tensor([[1.0, 1.0, 3.0], [4.0, 0.0, 1.0]])
    return Known(model, guide, x, scipy.stats.dirichlet_multinomial(alpha, 5).logpmf(x.numpy()))


def ordered_supports() -> Known:
    """A support that depends on a latent above: a ~ Exp(1), z | a ~ U(0, a), x ~ N(z, 0.5); z ~ the exponential integral."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Gamma(2.0, 1.0))
            z = pyro.sample("z", dist.Uniform(0.0 * a, a))  # then z ~ Exp(1)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Gamma(torch.full_like(x, 2.0), 0.8))
            pyro.sample("z", dist.Uniform(0.0 * a, a))

    x = torch.tensor([0.1, 1.0, 2.0])
    return Known(model, guide, x, scipy.stats.exponnorm(2.0, 0.0, 0.5).logpdf(x.numpy()))


def nested_plates() -> Known:
    """Groups with members: a_i ~ N(0, 1), b_ij ~ N(a_i, 1), x_ij ~ N(b_ij, 0.5): one evidence a group."""
    x = torch.arange(6.0).reshape(2, 3) / 3 - 0.5  # [member, group]

    def model(x):
        with pyro.plate("group", 3, dim=-1):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("member", 2, dim=-2):
                b = pyro.sample("b", dist.Normal(a, 1.0))
                pyro.sample("x", dist.Normal(b, 0.5), obs=x)

    def guide(x):
        with pyro.plate("group", 3, dim=-1):
            a = pyro.sample("a", dist.Normal(0.6 * x.mean(0), 0.8))
            with pyro.plate("member", 2, dim=-2):
                pyro.sample("b", dist.Normal(0.2 * a + 0.8 * x, 0.5))

    covariance = np.ones((2, 2)) + 1.25 * np.eye(2)
    return Known(model, guide, x, scipy.stats.multivariate_normal(np.zeros(2), covariance).logpdf(x.numpy().T))


def two_plates() -> Known:
    """Every site in two plates: one evidence for each of their elements."""
    x = torch.arange(6.0).reshape(3, 2) / 2 - 1

    def model(x):
        with pyro.plate("row", 3, dim=-2), pyro.plate("column", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("row", 3, dim=-2), pyro.plate("column", 2, dim=-1):
            pyro.sample("z", dist.Normal(0.5 * x, 0.7))

    return Known(model, guide, x, scipy.stats.norm(0, 1.25**0.5).logpdf(x.numpy()))


def one_at_a_time() -> Known:
    """A program that reads a latent into Python, so that chains cannot share a run."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            assert bool((z.abs() < 1e6).all())
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.7 * x, 0.6))

    x = torch.tensor([-0.5, 1.0])
    return Known(model, guide, x, scipy.stats.norm(0, 1.25**0.5).logpdf(x.numpy()))


SUPPORTS = (positive, unit_interval, simplex, ordered_supports, nested_plates, two_plates)
