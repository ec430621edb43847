"""Laws that a table of closed forms gets wrong: densities of their own, differing supports, rare events, rounding.

    term of z = -KL(q || p) = E_q[log p(z) - log q(z)]

What PyTorch's table does not know it must not be asked, and what draws cannot show must not be held against it.
"""

import math

import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from tests.bounds.test_decomposition_laws import assert_right, decomposed
from tests.oracles.expectations import discrete_expectation, expectation


def tilt(value):
    """A small even perturbation of a log-density; the density stays positive and nearly normalised."""
    return 0.05 * torch.tanh(value)


class Tilted(dist.Normal):
    """A law whose density is not its base class's: PyTorch's table would take it for a Normal."""

    def log_prob(self, value):
        return super().log_prob(value) + tilt(value)


class Tempered(dist.Independent):
    """A wrapper whose density is not its base law's."""

    def log_prob(self, value):
        return super().log_prob(value) + 0.05


def impostors():
    exp = dist.transforms.ExpTransform()
    unit = dist.Normal(torch.zeros(2), 1.0)
    return {
        "as prior": (dist.Normal(0.3, 1.0), Tilted(0.0, 1.0)),
        "as guide": (Tilted(0.3, 1.0), dist.Normal(0.0, 1.0)),
        "both": (Tilted(0.3, 1.0), Tilted(0.0, 1.0)),
        "in to_event": (dist.Normal(unit.loc + 0.1, 1.0).to_event(1), Tilted(torch.zeros(2), 1.0).to_event(1)),
        "under a transform": (dist.LogNormal(0.3, 1.0), dist.TransformedDistribution(Tilted(0.0, 1.0), [exp])),
        "as a wrapper": (dist.Normal(unit.loc + 0.1, 1.0).to_event(1), Tempered(unit, 1)),
    }


@pytest.mark.parametrize("name", impostors())
def test_a_law_with_a_density_of_its_own_has_no_closed_form(name):
    """The shift is below what 90 draws can show, so only a look at the law itself can refuse it."""
    q, p = impostors()[name]
    term = decomposed(q, p, num_particles=90)["z"]
    assert term.analytic is None, term.reason
    assert "closed form" in term.reason
    assert "own" in term.reason


def test_infinite_divergence_is_said_and_not_hidden():
    """A guide outside the prior's support: the ELBO is minus infinity, never NaN and never a large number."""
    d = decomposed(dist.Normal(0.0, 1.0), dist.Uniform(-1.0, 1.0, validate_args=False))
    assert float(d.elbo) == -math.inf
    assert float(d.monte_carlo) == -math.inf
    assert float(d.std_error) == math.inf
    assert not math.isnan(d["z"].z_score or 0.0)


def test_a_divergence_that_pytorch_gives_as_infinite_and_is_not():
    """The continuous Bernoulli against the uniform law: torch's entry compares open with closed ends and says infinity."""
    q, p = dist.ContinuousBernoulli(logits=torch.tensor(1.3)), dist.Uniform(0.0, 1.0)
    assert torch.distributions.kl_divergence(q, p).isinf()
    term = decomposed(q, p, num_particles=2000)["z"]
    assert term.analytic is None
    assert "PyTorch's KL(ContinuousBernoulli || Uniform) is infinite where the divergence is finite" in term.reason
    z = torch.linspace(0, 1, 10_001)
    exact = -float(torch.trapezoid(q.log_prob(z).exp() * q.log_prob(z), z))
    assert abs(float(term.monte_carlo) - exact) < 5 * float(term.std_error)


def test_categories_of_different_number():
    """A guide over fewer categories than the model's prior is legitimate; PyTorch's KL fails on its shapes."""
    q, p = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    exact = -sum(a * math.log(a / b) for a, b in zip(q.tolist(), p.tolist(), strict=False))
    assert_right(decomposed(dist.Categorical(q), dist.Categorical(p)), exact)


@pytest.mark.parametrize("others", [[], [0.4999]], ids=["alone", "beside a nearly constant datum"])
def test_a_rare_category_does_not_cost_the_closed_form(others):
    """q(1) = 1e-4 is not seen in 300 draws: that the draws then have next to no spread is no contradiction."""
    probs = [1e-4, *others]

    def law(values):
        return dist.Bernoulli(torch.tensor(values)).to_event(1)

    d = decomposed(law(probs), law([0.5] * len(probs)), num_particles=300)
    prior = stats.bernoulli(0.5)
    exact = sum(
        discrete_expectation(lambda k, q=q: prior.logpmf(k) - q.logpmf(k), q) for q in map(stats.bernoulli, probs)
    )
    assert d["z"].analytic is not None, d["z"].reason
    assert float(d.elbo) == pytest.approx(exact, rel=1e-9)


def test_near_equal_laws_in_single_precision_keep_their_closed_form():
    """Many dims, a guide at its prior, float32: rounding is no contradiction either."""
    unit = torch.zeros(3000, dtype=torch.float32)
    q = dist.Normal(unit + 1e-4, 1 + 1e-4 * torch.ones_like(unit)).to_event(1)
    d = decomposed(q, dist.Normal(unit, torch.ones_like(unit)).to_event(1), num_particles=1000)
    assert d["z"].analytic is not None, d["z"].reason
    exact = 3000 * expectation(
        lambda u: stats.norm.logpdf(u) - stats.norm.logpdf(u, 1e-4, 1 + 1e-4), stats.norm(1e-4, 1 + 1e-4)
    )
    assert float(d["z"].analytic) == pytest.approx(exact, abs=3000 * 2e-7)
