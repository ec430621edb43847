"""Scales, masks and factors: what is no bound is refused or said, and masks alike in both programs give the right numbers.

The oracle sums over both values of the one latent by hand.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from inference import (
    ElboLoss,
    EnumeratedLoss,
    ImportanceWeightedLoss,
    ScoreFunctionLoss,
    annealed_evidence,
    decompose_elbo,
    elbo_surgery,
    fit,
    inference_gap,
    log_evidence,
)
from inference.bounds.importance_checks import EvidenceError
from inference.bounds.sites import PairError
from inference.bounds.whole_densities import counted, unmasked
from ppl_models.pair import ModelGuidePair

X = torch.tensor([0.3, -0.8, 1.4], dtype=torch.float64)
SEEN = torch.tensor([True, False, True])


class Coin(ModelGuidePair):
    """c ~ Bernoulli(0.3), x ~ N(c, 1); q(c | x) = Bernoulli(logits = g x). Masks on latent and data, a scale on the latent."""

    def __init__(self, latent_mask=None, guide_mask=None, data_mask=None, scale=1.0, in_law=False):
        super().__init__((), ("c",))
        self.g = nn.Parameter(torch.tensor(0.5))
        self.latent_mask, self.guide_mask, self.data_mask = latent_mask, guide_mask, data_mask
        self.scale, self.in_law = scale, in_law

    def latent(self, law, mask):
        if mask is None:
            return pyro.sample("c", law)
        if self.in_law:
            return pyro.sample("c", law.mask(mask))
        with poutine.mask(mask=mask):
            return pyro.sample("c", law)

    def model(self, x=None, size=None):
        with pyro.plate("data", self.batch_size(x, size)):
            with poutine.scale(scale=self.scale):
                c = self.latent(dist.Bernoulli(torch.tensor(0.3)), self.latent_mask)
            if self.data_mask is None:
                return pyro.sample("x", dist.Normal(c, 1.0), obs=x)
            with poutine.mask(mask=self.data_mask):
                return pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)), poutine.scale(scale=self.scale):
            return self.latent(dist.Bernoulli(logits=self.g * x), self.guide_mask)


def elbo_by_hand(g, x, latent=None, data=None, scale=1.0):
    """sum_c q(c | x) [s m (log p(c) - log q(c | x)) + d log N(x; c, 1)], ``[B]``, with m and d the masks and s a scale."""
    m, d = (torch.ones_like(x) if mask is None else mask.to(x) for mask in (latent, data))
    q, total = torch.sigmoid(g * x), 0.0
    for c, weight, prior in ((1.0, q, 0.3), (0.0, 1 - q, 0.7)):
        log_p_x = -0.5 * (x - c).square() - 0.5 * math.log(2 * math.pi)
        total = total + weight * (scale * m * (math.log(prior) - weight.log()) + d * log_p_x)
    return total


def evidence_by_hand(x):
    """log p(x)."""
    return torch.logsumexp(
        torch.stack(
            [math.log(w) - 0.5 * (x - c).square() - 0.5 * math.log(2 * math.pi) for c, w in ((1, 0.3), (0, 0.7))]
        ),
        0,
    )


@pytest.mark.parametrize("in_law", [False, True])
@pytest.mark.parametrize(("latent", "scale"), [(None, 1.0), (SEEN, 1.0), (None, 0.1)])
@pytest.mark.parametrize("data", [None, SEEN])
def test_masks_alike_in_both_programs_give_the_sum_by_hand(latent, data, scale, in_law):
    """Value and gradient; masks leave log p and log q of a latent out together, and never the weight of its values.

    A scale weighs the terms of a loss, and likewise not the values.
    """
    pair = Coin(latent, latent, data, scale, in_law=in_law)
    exact = elbo_by_hand(pair.g, X, latent, data, scale)
    (want,) = torch.autograd.grad(exact.sum(), pair.g)
    loss = EnumeratedLoss(pair)(X)
    assert torch.allclose(-loss, exact, rtol=1e-12)
    (found,) = torch.autograd.grad(-loss.sum(), pair.g)
    assert torch.allclose(found, want, rtol=1e-10)
    score = ScoreFunctionLoss(pair, 2000)
    gradients = torch.stack([-torch.autograd.grad(score(X).sum(), pair.g)[0] for _ in range(60)])
    assert abs(float(gradients.mean() - want)) < 6 * float(gradients.std()) / 60**0.5
    d = decompose_elbo(pair.model, pair.guide, X, num_particles=4000)
    assert bool(((d.elbo - exact.detach()).abs() <= 6 * d.std_error + 1e-12).all())
    assert ("no bound" in d.note) == (scale != 1)
    if latent is not None or scale != 1:  # the twin: without the mask or scale the sum is another
        assert not torch.allclose(exact, elbo_by_hand(pair.g, X, None, data), rtol=1e-3)


def refusals(pair):
    """Every tool that asks for a bound of log p(x)."""
    return {
        "EnumeratedLoss": lambda: EnumeratedLoss(pair)(X),
        "ScoreFunctionLoss": lambda: ScoreFunctionLoss(pair)(X),
        "log_evidence": lambda: log_evidence(pair.model, pair.guide, X, num_particles=50),
        "surgery": lambda: elbo_surgery(pair, X),
        "gap": lambda: inference_gap(pair, X),
        "fit": lambda: fit(pair, X, epochs=1, progress=False, objective="enumeration"),
    }


@pytest.mark.parametrize("tool", list(refusals(None)))
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"latent_mask": SEEN}, "latent 'c' is masked in the model and not in the other program"),
        ({"guide_mask": SEEN}, "latent 'c' is masked in the guide and not in the other program"),
        ({"latent_mask": SEEN, "guide_mask": ~SEEN}, "latent 'c' is masked in the model"),
        ({"scale": 0.1}, "[Ss]ite 'c' is scaled|scale, got one at site 'c'"),
    ],
)
def test_parts_of_densities_are_refused(tool, options, match):
    if "scale" in options and tool in ("EnumeratedLoss", "ScoreFunctionLoss"):
        pytest.skip("losses may be weighted")
    with pytest.raises((PairError, EvidenceError), match=match):
        refusals(Coin(**options))[tool]()


def test_decompose_elbo_shows_them_and_says_that_they_are_no_bound():
    for options in ({"latent_mask": SEEN}, {"scale": 0.1}):
        pair = Coin(**options)
        d = decompose_elbo(pair.model, pair.guide, X, num_particles=10)
        assert "no bound of log p(x)" in d.note
    assert "no bound" not in decompose_elbo(Coin().model, Coin().guide, X, num_particles=10).note


def test_what_a_one_sided_mask_would_have_given_is_above_the_evidence():
    """Why it is refused: -log q counts alone, and the weights' mean is above p(x)."""
    pair = Coin(latent_mask=torch.zeros(3, dtype=torch.bool), data_mask=torch.zeros(3, dtype=torch.bool))
    guide = poutine.trace(pair.guide).get_trace(X)
    model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(X)
    assert float((model.log_prob_sum() - guide.log_prob_sum()).detach()) > 0  # nothing is observed: log p(x) = 0


class Gaussian(ModelGuidePair):
    """z ~ N(0, 1), x ~ N(z, 1), with what a test adds."""

    def __init__(self, scale=1.0, factor=False, plate=None):
        super().__init__((), ("z",))
        self.b = nn.Parameter(torch.tensor(0.0))
        self.scale, self.factor, self.plate = scale, factor, plate

    def data(self, size):
        return pyro.plate("data", self.plate or size, subsample=torch.arange(size) if self.plate else None)

    def model(self, x=None, size=None):
        with self.data(self.batch_size(x, size)):
            z = pyro.sample("z", dist.Normal(self.b, 1.0))
            with poutine.scale(scale=self.scale):
                return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        with self.data(len(x)):
            z = pyro.sample("z", dist.Normal(x / 2, 0.7))
            if self.factor:
                pyro.factor("more", -0.1 * z.square(), has_rsample=True)
            return z


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: annealed_evidence(Gaussian(scale=0.5).model, Gaussian(scale=0.5).guide, X, num_temperatures=3),
            "a scale at site 'x'",
        ),
        (lambda: fit(Gaussian(scale=0.5), X, epochs=1, progress=False), "site 'x' is scaled"),
        (lambda: ImportanceWeightedLoss(Gaussian(scale=0.5), 5)(X), "site 'x' is scaled"),
        (lambda: ImportanceWeightedLoss(Gaussian(plate=1000), 5)(X), "got 3 of 1000 in plate 'data'"),
        (lambda: fit(Gaussian(plate=1000), X, epochs=1, progress=False), "got 3 of 1000 in plate 'data'"),
        (lambda: ElboLoss(Gaussian(factor=True))(X), "the guide has a factor, 'more'"),
        (
            lambda: log_evidence(Gaussian(factor=True).model, Gaussian(factor=True).guide, X, num_particles=50),
            "the guide has a factor, 'more'",
        ),
    ],
)
def test_scales_and_factors_are_refused(call, match):
    with pytest.raises((PairError, EvidenceError), match=match):
        call()


def test_the_same_pairs_without_them_are_taken():
    pair = Gaussian()
    exact = dist.Normal(0.0, 2**0.5).log_prob(X)
    e = log_evidence(pair.model, pair.guide, X, num_particles=2000)
    assert bool(((e.log_evidence - exact).abs() < 6 * e.std_error).all())
    assert ElboLoss(pair)(X).shape == (3,)
    coin = Coin()
    e = log_evidence(coin.model, coin.guide, X, num_particles=4000)
    assert bool(((e.log_evidence - evidence_by_hand(X)).abs() < 6 * e.std_error).all())


def test_bits_per_dim_count_what_is_observed():
    """Two of three data; of each of these one of two numbers."""
    x = torch.randn(3, 2)
    part = torch.tensor([True, False])

    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=SEEN):
                pyro.sample("x", dist.Normal(z[:, None], 1.0).expand([3, 2]).mask(part).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(torch.where(SEEN, x[:, 0] / 2, 0.0), torch.where(SEEN, 0.5, 1.0).sqrt()))

    e = log_evidence(model, guide, x, num_particles=50)  # the guide is the posterior
    exact = torch.where(SEEN, dist.Normal(0.0, 2**0.5).log_prob(x[:, 0]), 0.0)
    assert torch.allclose(e.log_evidence, exact, atol=1e-10)
    assert e.num_dims.tolist() == [1, 0, 1]
    assert torch.allclose(e.bits_per_dim[SEEN], -exact[SEEN] / math.log(2), atol=1e-10)
    assert bool(e.bits_per_dim[1].isnan())
    assert e.to_dataset()["num_dims"].values.tolist() == [1, 0, 1]


def test_masks_are_compared_by_what_they_leave_out():
    law = dist.Normal(torch.zeros(3, 2), 1.0)
    site = {"fn": law.to_event(1), "mask": SEEN, "cond_indep_stack": (), "scale": 1.0}
    other = {"fn": law.mask(SEEN[:, None]).to_event(1), "mask": None, "cond_indep_stack": (), "scale": 1.0}
    assert bool((counted(site) == counted(other)).all())
    assert not bool((counted(site) == counted({**site, "mask": ~SEEN})).all())
    value = torch.randn(3, 2)
    assert torch.allclose(unmasked(other["fn"]).log_prob(value), law.to_event(1).log_prob(value))
