"""Normalising flows as guides, with and without an inverse: drawn many at a time, compiled, and right against bare torch.

Planar and radial flows have a density at their own draw alone. The oracle writes z = f(u) and log |df/du| out by autograd.
z-tests hold at most 6 standard errors of the difference of two means of 20,000 draws.
"""

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from torch import nn

from inference import ImportanceWeightedLoss, compile_objective, decompose_elbo
from inference.bounds.dependencies import parents
from ppl_models import ModelGuidePair
from tests.training.test_compilation import same

FLOWS = {
    "planar": lambda: [T.Planar(2)],
    "radial": lambda: [T.Radial(2)],
    "two planars": lambda: [T.Planar(2), T.Planar(2)],
    "autoregressive": lambda: [T.affine_autoregressive(2, hidden_dims=[8])],
    "coupling": lambda: [T.affine_coupling(2, hidden_dims=[8])],
}


class FlowGuide(ModelGuidePair):
    """z ~ N(0, I), x | z ~ N(z, I); q(z | x) a flow of N(loc(x), 0.7^2 I)."""

    def __init__(self, flows, fault=False):
        super().__init__((2,), ("z",))
        self.flows = nn.ModuleList(flows)
        self.loc = nn.Linear(2, 2)
        self.fault = fault

    def model(self, x=None, size=None):
        with pyro.plate("data", self.batch_size(x, size)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            z = z + z[:1].mean() if self.fault else z  # with particles ahead, another datum's or particle's
            return pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", self.batch_size(x)):
            base = dist.Normal(self.loc(x), 0.7).to_event(1)
            return pyro.sample("z", dist.TransformedDistribution(base, list(self.flows)))


def made(name, fault=False):
    torch.manual_seed(1)
    return FlowGuide(FLOWS[name](), fault), torch.randn(3, 2)


def elbo_draws(pair, x, count):
    """log p(x, z) - log q(z | x) at draws z = f(u), log |df/du| by autograd: ``[count]`` for one datum."""
    loc = pair.loc(x).detach()
    u = loc + 0.7 * torch.randn(count, 2)

    def flow(u):
        for each in pair.flows:
            u = each(u)
        return u

    z = torch.stack([flow(row) for row in u[:1]]) if count == 1 else flow(u)
    jacobian = torch.stack([torch.autograd.functional.jacobian(flow, row) for row in u])
    normal = torch.distributions.Normal
    log_q = normal(loc, 0.7).log_prob(u).sum(-1) - torch.linalg.slogdet(jacobian).logabsdet
    return (normal(0.0, 1.0).log_prob(z).sum(-1) + normal(z, 1.0).log_prob(x).sum(-1) - log_q).detach()


@pytest.mark.parametrize("name", FLOWS)
def test_the_bound_is_right_and_drawn_many_at_a_time(name):
    pair, x = made(name)
    d = decompose_elbo(pair.model, pair.guide, x, num_particles=20_000)
    assert d.note == "particles vectorised; replayed singly they agree"
    draws = elbo_draws(pair, x[0], 1000)
    error = float(torch.hypot(draws.std() / len(draws) ** 0.5, d.std_error[0]))
    assert abs(float(d.elbo[0] - draws.mean())) < 6 * error
    assert abs(float(d.elbo[0] - draws.mean()) + 0.5) > 6 * error  # half a nat would be seen


@pytest.mark.parametrize("name", ["planar", "autoregressive"])
def test_programs_that_mix_particles_are_still_found(name):
    pair, x = made(name, fault=True)
    d = decompose_elbo(pair.model, pair.guide, x, num_particles=20)
    assert "particles drawn one at a time: site 'x' has another log-density" in d.note


@pytest.mark.parametrize("name", FLOWS)
def test_losses_compile(name):
    pair, x = made(name)
    loss = ImportanceWeightedLoss(pair, 3)
    fast = compile_objective(loss, x, backend="eager")
    assert same(fast, loss, x)
    assert same(fast, loss, x + 1)


def test_parents_of_a_flow_are_those_of_its_base():
    flow = T.Planar(2)

    def program():
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("free", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [flow]))
        pyro.sample("z", dist.TransformedDistribution(dist.Normal(a, 1.0).to_event(1), [flow]))

    assert parents(program, (), {}) == {"a": frozenset(), "free": frozenset(), "z": frozenset({"a"})}
