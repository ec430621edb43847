"""The standard errors themselves: how often their intervals hold the truth, and how close they come to each other.

Data of one value in one plate are independent replicates of one experiment: their terms, from one call, are 2000 draws of
each estimate with its standard error. A 95 % interval must then hold the exact number in [0.9245, 0.972] of them; at the true
0.95 the count of 2000 leaves that range with probability below 1e-5 on either side.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from inference.bounds import decompose_elbo
from tests.bounds.gaussian_programs import global_and_local
from tests.oracles.linear_forms import entropy_of_normal, expected_log_normal, normal

REPLICATES, PARTICLES = 2000, 400
LOW, HIGH = 0.9245, 0.972


def model(x):
    with pyro.plate("replicate", len(x)):
        z_2 = pyro.sample("z_2", dist.Normal(0.0, 1.0))
        z_1 = pyro.sample("z_1", dist.Normal(z_2, 1.0))
        pyro.sample("x", dist.Normal(z_1, 0.5), obs=x)


def guide(x):
    with pyro.plate("replicate", len(x)):
        z_2 = pyro.sample("z_2", dist.Normal(0.4 * x, 0.6))
        pyro.sample("z_1", dist.Normal(0.5 * z_2 + 0.4 * x, 0.5))


def exact_terms():
    z_2 = normal(0.4, 0.6)
    z_1 = normal(0.5 * z_2 + 0.4, 0.5)
    return {
        "z_2": expected_log_normal(z_2, 0.0, 1.0) + entropy_of_normal(0.6),
        "z_1": expected_log_normal(z_1, z_2, 1.0) + entropy_of_normal(0.5),
        "x": expected_log_normal(1.0, z_1, 0.5),
    }


def coverage(value, error, exact):
    return float(((value - exact).abs() <= 1.959964 * error).double().mean())


@pytest.fixture
def replicates():
    return decompose_elbo(model, guide, torch.ones(REPLICATES), num_particles=PARTICLES)


def test_intervals_hold_the_truth_as_often_as_they_say(replicates):
    exact = exact_terms()
    for site, term in replicates.terms.items():
        assert LOW < coverage(term.monte_carlo, term.std_error, exact[site]) < HIGH, site
    # z_2's closed form is exact; z_1's rests on the draws of z_2, and has an error of its own
    assert float((replicates["z_2"].analytic - exact["z_2"]).abs().max()) < 1e-12
    z_1 = replicates["z_1"]
    assert LOW < coverage(z_1.analytic, z_1.analytic_std_error, exact["z_1"]) < HIGH
    elbo = sum(exact.values())
    assert LOW < coverage(replicates.elbo, replicates.std_error, elbo) < HIGH
    assert LOW < coverage(replicates.monte_carlo, replicates.monte_carlo_std_error, elbo) < HIGH


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_a_wrong_standard_error_is_caught(replicates, factor):
    """Errors off by a fifth cover 0.883 or 0.986 of the time: over eight deviations of the count outside the range."""
    elbo = sum(exact_terms().values())
    covered = coverage(replicates.elbo, factor * replicates.std_error, elbo)
    assert not LOW < covered < HIGH


def test_error_of_the_mean_over_data(replicates):
    """``mean_std_error`` is that of the mean over data: independent data make it the root of the summed squares."""
    independent = float(replicates.std_error.square().sum().sqrt()) / REPLICATES
    assert replicates.mean_std_error == pytest.approx(independent, rel=0.2)  # 400 draws fix it to 3.5 %
    assert abs(float(replicates.elbo.mean()) - sum(exact_terms().values())) < 5.5 * replicates.mean_std_error


def test_the_error_counts_what_terms_share():
    """Near the posterior the terms of a particle cancel: adding their errors in squares would claim far more."""
    d = decompose_elbo(model, guide, torch.ones(1), num_particles=20_000)
    separate = math.sqrt(sum(float(t.std_error) ** 2 for t in d.values()))
    assert float(d.monte_carlo_std_error) < 0.8 * separate


@pytest.mark.slow
def test_coverage_over_whole_calls():
    """The same over 2000 calls of a program with a global latent, whose data are no replicates."""
    case = global_and_local()
    inside = [0, 0]
    for _ in range(REPLICATES):
        d = case.run(num_particles=150)
        inside[0] += coverage(d.elbo, d.std_error, float(case.elbo)) > 0
        inside[1] += coverage(d.monte_carlo, d.monte_carlo_std_error, float(case.elbo)) > 0
    assert all(LOW < count / REPLICATES < HIGH for count in inside), np.array(inside) / REPLICATES
