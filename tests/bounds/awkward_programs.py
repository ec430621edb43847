"""Programs that no analysis likes, each with its ELBO known term by term: discrete latents, control flow, mixed-up dims.

Exact terms come from enumeration, from quadrature (:mod:`tests.oracles.expectations`) or from affine forms, each written beside
its program. What they have in common: the right number must come out, at whatever speed.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from scipy import stats

from tests.bounds.elbo_case import Case
from tests.oracles.expectations import discrete_expectation, expectation
from tests.oracles.linear_forms import entropy_of_normal, expected_log_normal, normal

NORMAL = stats.norm.logpdf


def kl_by_sum(q: list[float], p: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True) if a > 0)


def bernoulli_latents() -> Case:
    """Two dependent coins: w's odds depend on z in model and guide."""

    def model(x):
        z = pyro.sample("z", dist.Bernoulli(0.4))
        w = pyro.sample("w", dist.Bernoulli(0.2 + 0.5 * z))
        pyro.sample("x", dist.Normal(z + 2 * w, 0.5), obs=x)

    def guide(x):
        z = pyro.sample("z", dist.Bernoulli(0.7))
        pyro.sample("w", dist.Bernoulli(0.6 - 0.3 * z))

    z_term = -kl_by_sum([0.3, 0.7], [0.6, 0.4])
    w_term = x_term = 0.0
    for z, mass in ((0, 0.3), (1, 0.7)):
        q, p = 0.6 - 0.3 * z, 0.2 + 0.5 * z
        w_term -= mass * kl_by_sum([1 - q, q], [1 - p, p])
        x_term += sum(mass * m * NORMAL(1.0, z + 2 * w, 0.5) for w, m in ((0, 1 - q), (1, q)))
    terms = {"z": z_term, "w": w_term, "x": x_term}
    return Case("Bernoulli latents", model, guide, terms, frozenset("zw"), (torch.tensor(1.0),))


def categorical_mixture() -> Case:
    """Mixture assignments by datum, with a table of locations looked up by a tensor index."""
    prior, data = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.0, 1.0, 2.5])
    locs = torch.tensor([-1.0, 0.5, 2.0])
    guide_probs = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.05, 0.25, 0.7]])

    def model(x):
        with pyro.plate("data", 3):
            k = pyro.sample("k", dist.Categorical(prior))
            pyro.sample("x", dist.Normal(locs[k], 0.7), obs=x)

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("k", dist.Categorical(guide_probs))

    k_terms, x_terms = [], []
    for x, q in zip(data.tolist(), guide_probs.tolist(), strict=True):
        k_terms.append(-kl_by_sum(q, prior.tolist()))
        x_terms.append(sum(m * NORMAL(x, loc, 0.7) for m, loc in zip(q, locs.tolist(), strict=True)))
    return Case("categorical mixture", model, guide, {"k": k_terms, "x": x_terms}, frozenset("k"), (data,))


def poisson_latent() -> Case:
    def model(x):
        n = pyro.sample("n", dist.Poisson(3.0))
        pyro.sample("x", dist.Normal(n, 1.5), obs=x)

    def guide(x):
        pyro.sample("n", dist.Poisson(1.5 * x))

    q, p = stats.poisson(3.0 * 1.5), stats.poisson(3.0)
    terms = {
        "n": discrete_expectation(lambda n: p.logpmf(n) - q.logpmf(n), q),
        "x": discrete_expectation(lambda n: NORMAL(3.0, n, 1.5), q),
    }
    return Case("Poisson latent", model, guide, terms, frozenset("n"), (torch.tensor(3.0),))


def data_dependent_length() -> Case:
    """A loop whose length is itself drawn: sites step_1..step_n appear in some draws only."""

    def model(x):
        n = pyro.sample("n", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        total = torch.tensor(0.0)
        for i in range(1, int(n) + 1):
            total = total + pyro.sample(f"step_{i}", dist.Normal(1.0, 1.0))
        pyro.sample("x", dist.Normal(total, 1.0), obs=x)

    def guide(x):
        n = pyro.sample("n", dist.Categorical(torch.tensor([0.3, 0.3, 0.4])))
        for i in range(1, int(n) + 1):
            pyro.sample(f"step_{i}", dist.Normal(0.8, 0.6))

    q, step = [0.3, 0.3, 0.4], normal(0.8, 0.6)
    step_term = expected_log_normal(step, 1.0, 1.0) + entropy_of_normal(0.6)
    sums = [0.0, normal(0.8, 0.6), normal(0.8, 0.6) + normal(0.8, 0.6)]
    terms = {
        "n": -kl_by_sum(q, [0.2, 0.5, 0.3]),
        "step_1": (q[1] + q[2]) * step_term,
        "step_2": q[2] * step_term,
        "x": sum(m * expected_log_normal(1.5, total, 1.0) for m, total in zip(q, sums, strict=True)),
    }
    return Case("length drawn by the program", model, guide, terms, args=(torch.tensor(1.5),), fast=False)


def branch() -> Case:
    """``if z > 0`` in Python: the likelihood jumps with the latent's sign."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = torch.tensor(2.0) if z > 0 else z - 1
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.4, 0.8))

    q, z = stats.norm(0.4, 0.8), normal(0.4, 0.8)
    terms = {
        "z": expected_log_normal(z, 0.0, 1.0) + entropy_of_normal(0.8),
        "x": expectation(lambda u: NORMAL(1.0, 2.0 if u > 0 else u - 1, 1.0), q, breaks=[0.0]),
    }
    return Case("if z > 0", model, guide, terms, frozenset("z"), (torch.tensor(1.0),), fast=False)


def lookup() -> Case:
    """``table[int(k)]`` with a Python list."""
    table = [-1.0, 0.0, 3.0]

    def model(x):
        k = pyro.sample("k", dist.Categorical(torch.ones(3) / 3))
        z = pyro.sample("z", dist.Normal(table[int(k)], 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.2, 0.3])))
        pyro.sample("z", dist.Normal(0.5 * table[int(k)] + 0.2, 0.6))

    z_term = x_term = 0.0
    for mass, loc in zip([0.5, 0.2, 0.3], table, strict=True):
        z = normal(0.5 * loc + 0.2, 0.6)
        z_term += mass * (expected_log_normal(z, loc, 1.0) + entropy_of_normal(0.6))
        x_term += mass * expected_log_normal(1.0, z, 1.0)
    terms = {"k": -kl_by_sum([0.5, 0.2, 0.3], [1 / 3] * 3), "z": z_term, "x": x_term}
    return Case("table[int(k)]", model, guide, terms, frozenset("kz"), (torch.tensor(1.0),), fast=False)


def _triple(name: str, combine) -> Case:
    """Three independent latents and x ~ N(their sum, 1), summed in a way that is wrong under an outer plate."""

    def model(x):
        with pyro.plate("three", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(combine(z), 1.0), obs=x)

    def guide(x):
        with pyro.plate("three", 3):
            pyro.sample("z", dist.Normal(torch.tensor([0.1, 0.5, -0.4]), 0.6))

    draws = [normal(loc, 0.6) for loc in (0.1, 0.5, -0.4)]
    terms = {
        "z": sum(expected_log_normal(z, 0.0, 1.0) + entropy_of_normal(0.6) for z in draws),
        "x": expected_log_normal(1.0, draws[0] + draws[1] + draws[2], 1.0),
    }
    return Case(name, model, guide, terms, frozenset("z"), (torch.tensor(1.0),), fast=False)


def sum_over_everything() -> Case:
    return _triple("z.sum() over everything", lambda z: z.sum())


def first_index() -> Case:
    return _triple("z[0] + z[1] + z[2]", lambda z: z[0] + z[1] + z[2])


def stacked_scalars() -> Case:
    """Three scalar sites stacked to a vector of three, which under three particles is a square matrix."""

    def model(x):
        z = torch.stack([pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0)) for i in (1, 2, 3)])
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        for i in (1, 2, 3):
            pyro.sample(f"z_{i}", dist.Normal(0.2 * i, 0.5))

    draws = [normal(0.2 * i, 0.5) for i in (1, 2, 3)]
    terms = {f"z_{i + 1}": expected_log_normal(z, 0.0, 1.0) + entropy_of_normal(0.5) for i, z in enumerate(draws)}
    terms["x"] = sum(expected_log_normal(1.0, z, 1.0) for z in draws)
    closed = frozenset({"z_1", "z_2", "z_3"})
    return Case("torch.stack of scalars", model, guide, terms, closed, (torch.ones(3),), fast=False)


def undeclared_batch() -> Case:
    """A batch dimension without a plate or to_event: Pyro allows it, one particle at a time."""

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(torch.tensor([0.3, -0.2]), 0.5))

    draws = [normal(0.3, 0.5), normal(-0.2, 0.5)]
    terms = {
        "z": sum(expected_log_normal(z, 0.0, 1.0) + entropy_of_normal(0.5) for z in draws),
        "x": sum(expected_log_normal(1.0, z, 1.0) for z in draws),
    }
    return Case("batch dim without plate", model, guide, terms, frozenset("z"), (torch.ones(2),), fast=False)


def rare_reduction() -> Case:
    """``if (z < 0).any()``: particles drawn together would decide together, though three of them seldom show it."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = torch.tensor(2.0) if bool((z < 0).any()) else torch.tensor(0.0)
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(2.0, 1.0))

    below = stats.norm.cdf(-2.0)
    z = normal(2.0, 1.0)
    terms = {
        "z": expected_log_normal(z, 0.0, 1.0) + entropy_of_normal(1.0),
        "x": below * NORMAL(0.0, 2.0, 1.0) + (1 - below) * NORMAL(0.0, 0.0, 1.0),
    }
    return Case("if (z < 0).any()", model, guide, terms, frozenset("z"), (torch.tensor(0.0),), fast=False)


PROGRAMS = (
    bernoulli_latents,
    categorical_mixture,
    poisson_latent,
    data_dependent_length,
    branch,
    lookup,
    sum_over_everything,
    first_index,
    stacked_scalars,
    undeclared_batch,
)
