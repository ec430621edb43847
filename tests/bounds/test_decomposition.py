"""`decompose_elbo` before an independent jury: every term of programs whose ELBO is known exactly.

Each program's numbers are held against exact ones, its closed forms against where they are valid, its exact sum against
Pyro's own estimator. Negative controls break a program and show that these checks would see it, with the power worked out.
"""

import math
import warnings
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from inference.bounds import decompose_elbo
from tests.bounds import awkward_programs, gaussian_programs, handled_programs, hidden_programs
from tests.bounds.elbo_case import ROUNDING, discrepancies, quantile, smallest_visible_error
from tests.oracles.linear_forms import entropy_of_normal, expected_log_normal, normal

PROGRAMS = [p for m in (gaussian_programs, handled_programs, awkward_programs, hidden_programs) for p in m.PROGRAMS]


@pytest.mark.parametrize("make", PROGRAMS, ids=lambda make: make.__name__)
def test_every_term_is_exact_within_its_error(make):
    """Values, closed forms where they are valid and only there, and vectorised particles where the program allows it."""
    case = make()  # made here, under the test's default dtype
    d = case.run()
    assert discrepancies(d, case.terms) == []
    assert d.elbo.shape == case.elbo.shape
    for extra in set(d.sites) - set(case.terms):  # deterministic sites may be listed, and are nothing
        assert not d[extra].monte_carlo.any()
    closed = {site for site in d if d[site].analytic is not None and d[site].kind in ("latent", "auxiliary")}
    assert closed == case.closed, {site: d[site].reason for site in d}
    assert all("closed form" in d[site].reason for site in closed)
    assert all(term.reason for term in d.values())
    assert ("particles vectorised" in d.note) == case.fast, d.note


@pytest.mark.parametrize("make", PROGRAMS, ids=lambda make: make.__name__)
def test_exact_elbo_is_what_trace_elbo_estimates(make):
    """The oracle is on trial too: Pyro's estimator, which shares nothing with it, has its number as expectation."""
    case, replicates = make(), 60
    with warnings.catch_warnings(), pyro.validation_enabled(False):  # validated, it refuses a batch without a plate
        warnings.simplefilter("ignore", UserWarning)  # and it remarks on sites that only some draws have
        elbo = [-Trace_ELBO().loss(case.model, case.guide, *case.args) for _ in range(replicates)]
    error = np.std(elbo, ddof=1) / math.sqrt(replicates)
    assert (
        abs(np.mean(elbo) - case.elbo.sum()) <= quantile(1) * 1.15 * error + 1e-9
    )  # 1.15: t with 59 degrees of freedom


@pytest.mark.parametrize("make", [gaussian_programs.vae, gaussian_programs.markov_chain, handled_programs.scaled])
def test_particles_one_at_a_time_give_the_same_law(make):
    case = make()
    d = case.run(num_particles=300, vectorize=False)
    assert discrepancies(d, case.terms) == []
    assert d.note.startswith("particles drawn one at a time, as asked")
    assert ("sites 'mu', 'z', 'x' are scaled" in d.note) == (make is handled_programs.scaled)


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 10_000])
def test_no_law_depends_on_the_chunk_size(chunk_size):
    case = gaussian_programs.global_and_local()
    d = case.run(num_particles=700, chunk_size=chunk_size)
    assert d.num_particles == 700
    assert discrepancies(d, case.terms) == []


@pytest.mark.parametrize("make", [gaussian_programs.vae, handled_programs.full_covariance, awkward_programs.branch])
def test_single_precision(make):
    """float32 programs: numbers come back in float64, exact to float32's rounding."""
    torch.set_default_dtype(torch.float32)
    case = make()
    case = replace(case, args=tuple(a.float() for a in case.args))
    d = case.run()
    assert d.elbo.dtype == torch.float64
    assert discrepancies(d, case.terms, ROUNDING[torch.float32]) == []
    assert {site for site in d if d[site].analytic is not None} == case.closed


def test_sites_keep_the_models_order():
    d = gaussian_programs.markov_chain().run(num_particles=10)
    assert d.sites == ("z_1", "x_1", "z_2", "x_2", "z_3", "x_3", "z_4", "x_4")


def test_the_prior_as_guide():
    """A guide made of the model itself with its data hidden: latent terms are zero, exactly, in every draw."""
    case = gaussian_programs.vae()
    d = decompose_elbo(case.model, poutine.block(case.model, hide=["x"]), *case.args, num_particles=50)
    assert not d["z"].monte_carlo.any()
    assert not d["z"].std_error.any()


def test_the_posterior_as_guide_is_a_certificate():
    """log p(x, z) - log q(z | x) = log p(x) for every draw, so the Monte Carlo sum has no error at all."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.8 * x, 0.2**0.5))

    d = decompose_elbo(model, guide, torch.tensor(1.0), num_particles=50)
    evidence = expected_log_normal(1.0, 0.0, 1.25**0.5)
    assert float(d.monte_carlo) == pytest.approx(evidence, rel=1e-12)
    assert float(d.monte_carlo_std_error) < 1e-14


# Negative controls: a program that is wrong in one respect, held against the right program's exact terms.


def swapped(case):
    """p and q swapped at z: the guide draws what the model should, and the other way round."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.3 * x, 0.7))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    return replace(case, model=model, guide=guide)


def overconfident(case):
    """The guide's standard deviation times 0.8."""
    return replace(case, guide=lambda x: pyro.sample("z", dist.Normal(0.3 * x, 0.8 * 0.7)))


def displaced(case):
    """The guide's mean plus 0.3 standard deviations."""
    return replace(case, guide=lambda x: pyro.sample("z", dist.Normal(0.3 * x + 0.3 * 0.7, 0.7)))


def flipped(case):
    """The likelihood's sign flipped by a factor."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("x", -dist.Normal(z, 0.5).log_prob(x))

    return replace(case, model=model)


@pytest.mark.parametrize("break_it", [swapped, overconfident, displaced, flipped], ids=lambda f: f.__name__)
def test_a_broken_program_is_caught(break_it):
    """Power: each effect is more than what a test with one miss in a million sees, so the twin fails as it must."""
    case = gaussian_programs.one_latent()
    broken = break_it(case).run()
    assert discrepancies(broken, case.terms) != []
    z = {swapped: normal(0.0, 1.0), overconfident: normal(0.3, 0.56), displaced: normal(0.51, 0.7)}.get(break_it)
    sign = -1.0 if break_it is flipped else 1.0
    effect = sign * expected_log_normal(1.0, z or normal(0.3, 0.7), 0.5) - case.terms["x"]
    assert abs(effect) > smallest_visible_error(broken, "x")


def test_a_term_off_by_a_tenth_of_the_elbo_is_caught():
    """The battery's resolution, site by site, on the hierarchy."""
    case = gaussian_programs.global_and_local()
    d = case.run(num_particles=15_000)
    off = 0.1 * abs(float(case.elbo))
    for site in ("mu", "z", "x"):
        assert off > smallest_visible_error(d, site)
        assert discrepancies(d, {**case.terms, site: case.terms[site] + off}) != []


def test_the_oracle_of_the_mean_field_number_is_caught():
    """-KL of the factors at z_1, which Pyro's TraceMeanField_ELBO uses, contradicts the draws by half a nat."""
    case = gaussian_programs.bottom_up_hvae()
    z_2 = normal(0.5 * normal(0.5, 1.0), 1.0)
    independent = normal(0.5, 1.0)  # the KL integrates z_1 as if z_2 did not rest on it
    wrong = {**case.terms, "z_1": expected_log_normal(independent, z_2, 1.0) + entropy_of_normal(1.0)}
    assert wrong["z_1"] == pytest.approx(case.terms["z_1"] - 0.5)
    d = case.run(num_particles=20_000)
    assert discrepancies(d, case.terms) == []
    assert discrepancies(d, wrong) != []
