"""Pairs whose numbers would be taken for more than they are: guides that miss, fix or observe what they should not."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal
from scipy import integrate, stats

from inference import annealed_evidence, decompose_elbo, log_evidence
from inference.bounds.sites import PairError
from ppl_models import LinearGaussian

X = torch.tensor([2.311, -0.44, -3.268])


def normal_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_of(law):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", law(x))

    return guide


NARROW = {
    "interval": lambda x: dist.Uniform(x / 2 - 0.5, x / 2 + 0.5),
    "half line": lambda x: dist.LogNormal(torch.zeros(len(x)), 0.7),
}
EXACT = dist.Normal(0.0, math.sqrt(2.0)).log_prob(X)


@pytest.mark.parametrize("name", NARROW)
def test_a_guide_of_narrower_support_is_no_good(name):
    e = log_evidence(normal_model, guide_of(NARROW[name]), X, num_particles=2000)
    assert any("the guide has no density at" in warning and "'z'" in warning for warning in e.warnings)
    assert "narrow guide" in e.table()
    assert "good" not in e.table()
    assert (e.log_evidence < EXACT - 5 * e.std_error).any()
    if name == "interval":  # what is left: the part of p(x) within the guide's support
        for i, x in enumerate(X.tolist()):
            part, _ = integrate.quad(
                lambda z, x=x: stats.norm(0, 1).pdf(z) * stats.norm(z, 1).pdf(x), x / 2 - 0.5, x / 2 + 0.5
            )
            assert abs(e.log_evidence[i] - math.log(part)) < 6.5 * e.std_error[i]


def test_a_guide_of_the_models_support_is_good():
    e = log_evidence(normal_model, guide_of(lambda x: dist.Normal(x / 2, 0.8)), X, num_particles=2000)
    assert e.warnings == ()
    assert e.table().count("good") == 3


@pytest.mark.parametrize("name", NARROW)
def test_annealing_from_a_guide_of_narrower_support_is_refused(name):
    with pytest.raises(PairError, match=r"expected a guide with the model's support, .* or start from the prior"):
        annealed_evidence(normal_model, guide_of(NARROW[name]), X, num_temperatures=4, seed=0)
    options = {"num_temperatures": 20, "num_leapfrog": 3, "seed": 0}
    annealed = annealed_evidence(normal_model, guide_of(NARROW[name]), X, start="prior", **options)
    assert ((annealed.log_lower - EXACT).abs() < 6.5 * annealed.std_error + 0.05).all()


def test_a_point_mass_gives_no_bound_and_says_so():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 0.001))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    sentence = "no bound of log p(x): the guide is a point mass at 'mu'"
    pyro.clear_param_store()
    assert sentence in decompose_elbo(model, AutoDelta(model), X, num_particles=4).table()
    assert sentence not in decompose_elbo(model, AutoNormal(model), X, num_particles=4).table()


def test_programs_the_wrong_way_round_are_refused():
    with pytest.raises(
        PairError, match=r"the guide observes site 'x', which is not in the model: .* decompose_elbo\(model,"
    ):
        decompose_elbo(guide_of(lambda x: dist.Normal(x / 2, 0.8)), normal_model, X)


def test_a_guide_that_observes_the_data_is_refused_by_every_tool():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8))
            pyro.sample("x", dist.Normal(0.0, 3.0), obs=x)

    for tool in (decompose_elbo, log_evidence):
        with pytest.raises(PairError, match="the guide observes site 'x', which the model observes too"):
            tool(normal_model, guide, X)


def test_a_subsampled_plate_is_told_with_its_scale():
    def subsampled(program):
        def run(x):
            with pyro.plate("data", len(x), subsample_size=2) as rows:
                program(x[rows])

        return run

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))

    d = decompose_elbo(subsampled(model), subsampled(guide), X, num_particles=400)
    assert "plate 'data' holds 2 of 3: each term is scaled by 3/2" in d.table()
    error = d.std_error.square().sum().sqrt()
    assert (d.elbo.sum() - EXACT.sum()).abs() < 6.5 * error


def test_a_pair_in_the_place_of_its_programs_is_told_what_they_are():
    pair = LinearGaussian.random(data_dim=2, latent_dim=1)
    for tool in (decompose_elbo, log_evidence, annealed_evidence):
        with pytest.raises(TypeError, match=r"got a Tensor as guide: of a pair they are pair\.model and pair\.guide"):
            tool(pair, pair.model(size=3).detach())
