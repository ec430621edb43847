"""Pyro's automatic guides through `decompose_elbo`: the sum is Trace_ELBO's, and exact where the guide is."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer import autoguide as auto

from inference.bounds import decompose_elbo
from tests.bounds.elbo_case import discrepancies, quantile
from tests.bounds.gaussian_programs import X, global_and_local
from tests.oracles.linear_forms import entropy_of_normal, expected_log_normal, normal


def model(x):
    """A global mean, a positive global scale, and a latent for each datum."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.Gamma(4.0, 4.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, scale))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def iaf(program):
    return auto.AutoIAFNormal(program, hidden_dim=[8], num_transforms=1)


def listed(program):
    guides = auto.AutoGuideList(program)
    guides.append(auto.AutoNormal(poutine.block(program, expose=["mu", "scale"]), init_scale=0.1))
    guides.append(auto.AutoDiagonalNormal(poutine.block(program, expose=["z"]), init_scale=0.1))
    return guides


def structured(program):
    kinds = {"mu": "normal", "scale": "delta", "z": "normal"}
    return auto.AutoStructured(program, conditionals=kinds, dependencies={"z": {"mu": "linear"}}, init_scale=0.1)


GUIDES = [
    auto.AutoNormal,
    auto.AutoDiagonalNormal,
    auto.AutoMultivariateNormal,
    auto.AutoLowRankMultivariateNormal,
    iaf,
    listed,
    structured,
    auto.AutoNormalMessenger,
    auto.AutoHierarchicalNormalMessenger,
]


def trained(make_guide, steps=5):
    """A guide away from its start, so that no two of its terms are equal by accident."""
    guide = make_guide(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(steps):
        svi.step(X)
    return guide


@pytest.mark.parametrize("make_guide", GUIDES, ids=lambda g: g.__name__)
def test_sum_is_the_elbo_that_pyro_estimates(make_guide):
    """Two independent estimates of one number differ by no more than their errors together."""
    guide = trained(make_guide)
    slow = issubclass(make_guide, auto.effect.AutoMessenger) if isinstance(make_guide, type) else False
    d = decompose_elbo(model, guide, X, num_particles=200 if slow else 2000)
    replicates = 100
    elbo = [-Trace_ELBO().loss(model, guide, X) for _ in range(replicates)]
    error = math.hypot(np.std(elbo, ddof=1) / math.sqrt(replicates), float(d.std_error))
    assert abs(float(d.elbo) - np.mean(elbo)) <= 1.1 * quantile(1) * error  # 1.1: t with 99 degrees of freedom
    assert sum(float(term.value) for term in d.values()) == pytest.approx(float(d.elbo))
    assert d.sites[:4] == ("mu", "scale", "z", "x")
    assert all(d[site].kind == "auxiliary" for site in d.sites[4:])


def test_auxiliary_entropies_are_closed():
    """The Gaussians that the automatic guides draw have entropies, which spare the noisiest term of the sum."""
    d = decompose_elbo(model, trained(auto.AutoMultivariateNormal), X, num_particles=500)
    (auxiliary,) = d.sites[4:]
    assert d[auxiliary].analytic is not None
    assert "entropy of MultivariateNormal" in d[auxiliary].reason
    assert float(d.std_error) < float(d.monte_carlo_std_error)


def test_flow_has_no_closed_entropy():
    d = decompose_elbo(model, trained(iaf), X, num_particles=100)
    assert d[d.sites[4]].analytic is None


def test_point_mass_guide_is_exact():
    """AutoDelta: every term is log p at one point; nothing is random."""
    program = global_and_local()
    guide = auto.AutoDelta(program.model, init_loc_fn=auto.init_to_value(values={"mu": torch.tensor(0.4), "z": X / 2}))
    d = decompose_elbo(program.model, guide, X, num_particles=10)
    terms = {
        "mu": expected_log_normal(0.4, 0.0, 2.0),
        "z": sum(expected_log_normal(x / 2, 0.4, 1.0) for x in X.tolist()),
        "x": sum(expected_log_normal(x, x / 2, 0.5) for x in X.tolist()),
    }
    assert discrepancies(d, terms) == []
    assert not d.std_error.any()


def test_mean_field_guide_is_exact_site_by_site():
    """AutoNormal at known parameters, z drawn through its auxiliary: log p at z, entropy at the auxiliary."""
    program = global_and_local()
    values = {"mu": torch.tensor(0.4), "z": X / 2}
    guide = auto.AutoNormal(program.model, init_loc_fn=auto.init_to_value(values=values), init_scale=0.3)
    d = decompose_elbo(program.model, guide, X, num_particles=4000)
    mu, z_term, x_term = normal(0.4, 0.3), 0.0, 0.0
    for x in X.tolist():
        z = normal(x / 2, 0.3)
        z_term += expected_log_normal(z, mu, 1.0)
        x_term += expected_log_normal(x, z, 0.5)
    terms = {
        "mu": expected_log_normal(mu, 0.0, 2.0),
        "z": z_term,
        "x": x_term,
        "mu_unconstrained": entropy_of_normal(0.3),
        "z_unconstrained": 4 * entropy_of_normal(0.3),
    }
    assert discrepancies(d, terms) == []


def test_an_untrained_guide_can_be_trained_afterwards():
    """The decomposition may be a guide's first call, under no_grad; its parameters still want gradients."""
    guide = auto.AutoDiagonalNormal(model)
    decompose_elbo(model, guide, X, num_particles=10)
    parameters = list(guide.parameters())
    assert parameters
    assert all(p.requires_grad for p in parameters)
    before = [p.detach().clone() for p in parameters]
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(X)
    assert all(not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))
