"""The categorical VAE against enumeration by hand: evidence, bound, gap and their gradients; and what it refuses."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.optim import Adam
from torch import nn

from inference import decompose_elbo, log_evidence
from ppl_models import registry
from ppl_models.discrete_vae import CategoricalVAE, IndependentOneHot, TooManyStatesError, all_one_hot
from ppl_models.likelihoods import Bernoulli, Categorical, DiscretizedNormal, Normal
from ppl_models.networks.arrays import ArrayMLP
from tests.oracles import discrete_vae as oracle

Z_MAX = 6.5  # two-sided tail 8e-11
PARTS = {
    "CategoricalVAE": "ppl_models.discrete_vae:CategoricalVAE",
    "ArrayMLP": "ppl_models.networks.arrays:ArrayMLP",
}


def _exact(power: float = 1.0, shift: float = 0.0) -> CategoricalVAE:
    decoder = oracle.BlockDecoder(torch.randn(2, 3, 4))
    return CategoricalVAE(oracle.PosteriorEncoder(decoder, power, shift), decoder, 2, 3, Bernoulli())


def _preset(num_latents: int = 2, num_classes: int = 3) -> CategoricalVAE:
    return CategoricalVAE.preset((4,), Bernoulli(), num_latents, num_classes, hidden=(6,))


def _data(pair: CategoricalVAE, size: int = 5) -> torch.Tensor:
    return pair.model(size=size).detach()


def _by_hand(pair: CategoricalVAE, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([oracle.elbo(pair.encoder(row), pair.decoder, row) for row in x])


def _gradients(total: torch.Tensor, pair: nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(total, list(pair.parameters())))


def test_zero_variance_certificate():
    """With the posterior as guide, log p(x, z) - log q(z | x) = log p(x) for every draw."""
    pair = _exact()
    x = _data(pair)
    by_hand = torch.stack([oracle.log_evidence(pair.decoder, row, 2, 3) for row in x])
    assert torch.allclose(pair.log_evidence(x), by_hand, rtol=1e-12, atol=0)
    d = decompose_elbo(pair.model, pair.guide, x, num_particles=50)
    assert torch.allclose(d.monte_carlo, by_hand, rtol=1e-10, atol=0)
    assert (d.monte_carlo_std_error <= 1e-10 * by_hand.abs()).all()
    assert (d["z"].std_error > 1e-4).any()  # the terms themselves do vary


@pytest.mark.parametrize(("power", "shift"), [(0.8, 0.0), (1.0, 0.3)], ids=["too wide", "shifted"])
def test_the_certificate_rejects_a_wrong_guide(power, shift):
    pair = _exact(power, shift)
    d = decompose_elbo(pair.model, pair.guide, _data(pair), num_particles=50)
    assert (d.monte_carlo_std_error > 1e-4).all()


def test_evidence_is_elbo_plus_gap_in_value_and_gradient():
    pair = _preset()
    x = _data(pair)
    gap = torch.stack([oracle.gap(pair.encoder(row), pair.decoder, row) for row in x])
    evidence = pair.log_evidence(x)
    assert torch.allclose(evidence, _by_hand(pair, x) + gap, rtol=1e-12)
    decoder = list(pair.decoder.parameters())
    by_hand = sum(oracle.log_evidence(pair.decoder, row, 2, 3) for row in x)
    for a, b in zip(torch.autograd.grad(evidence.sum(), decoder), torch.autograd.grad(by_hand, decoder), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


def test_terms_are_the_exact_kl_and_the_reconstruction():
    pair = _preset()
    x = _data(pair)
    d = decompose_elbo(pair.model, pair.guide, x, num_particles=4000)
    q = pair.encoder(x).detach().softmax(-1)
    kl = (2 * math.log(3) + (q * q.log()).sum((-2, -1))).detach()
    assert torch.allclose(-d["z"].analytic, kl, rtol=1e-10)
    assert (d["z"].analytic_std_error < 1e-12).all()
    assert abs(d["z"].z_score) < Z_MAX
    reconstruction = _by_hand(pair, x).detach() + kl
    assert ((d["x"].monte_carlo - reconstruction).abs() < Z_MAX * d["x"].std_error).all()
    assert ((d["x"].monte_carlo + reconstruction).abs() > Z_MAX * d["x"].std_error).all()  # the sign would be seen


def test_enumerating_elbo_is_exact_in_value_and_gradient():
    pair = _preset()
    x = _data(pair)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    loss = elbo.differentiable_loss(pair.model, config_enumerate(pair.guide), x)
    by_hand = -_by_hand(pair, x).sum()
    assert torch.allclose(loss, by_hand, rtol=1e-12)
    for a, b in zip(_gradients(loss, pair), _gradients(by_hand, pair), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-13)


def test_enumerating_the_model_gives_the_evidence():
    pair = _preset()
    x = _data(pair)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(config_enumerate(pair.model), lambda x: None, x)
    assert loss == pytest.approx(-float(pair.log_evidence(x).detach().sum()), rel=1e-12)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO])
def test_svi_moves_every_parameter_without_the_global_store(elbo):
    pair = _preset()
    x = _data(pair)
    before = [p.detach().clone() for p in pair.parameters()]
    guide = config_enumerate(pair.guide) if elbo is TraceEnum_ELBO else pair.guide
    options = {"max_plate_nesting": 1} if elbo is TraceEnum_ELBO else {}
    svi = SVI(pair.model, guide, Adam({"lr": 1e-2}), elbo(**options))
    assert all(math.isfinite(svi.step(x)) for _ in range(3))
    assert len(pyro.get_param_store()) == 0
    assert not any(torch.equal(p, old) for p, old in zip(pair.parameters(), before, strict=True))


def test_importance_weighting_finds_the_evidence_that_enumeration_gives():
    pair = _preset()
    x = _data(pair)
    e = log_evidence(pair.model, pair.guide, x, num_particles=4000)
    assert ((e.log_evidence - pair.log_evidence(x)).abs() < Z_MAX * e.std_error).all()


def test_draws_are_one_hot_and_predictive_runs():
    pair = _preset()
    x = _data(pair)
    drawn = Predictive(pair.model, guide=pair.guide, num_samples=7, parallel=True, return_sites=["z"])(x)["z"]
    assert drawn.shape == (7, 5, 2, 3)
    assert torch.equal(drawn.sum(-1), torch.ones(7, 5, 2))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}


def test_support_lists_every_state_once_with_probabilities_that_sum_to_one():
    law = IndependentOneHot(dist.OneHotCategorical(logits=torch.randn(5, 3, 4)), 1)
    assert law.has_enumerate_support
    assert not dist.OneHotCategorical(logits=torch.randn(5, 3, 4)).to_event(1).has_enumerate_support  # why the class
    states = law.enumerate_support(expand=False)
    assert states.shape == (64, 1, 3, 4)
    assert len(states.flatten(1).unique(dim=0)) == 64
    assert torch.allclose(law.log_prob(states).exp().sum(0), torch.ones(5))
    assert law.enumerate_support().shape == (64, 5, 3, 4)
    assert torch.equal(law.expand((7, 5)).enumerate_support(expand=False), states[:, None])
    assert torch.equal(all_one_hot(3, 4)[:, None].to(states), states)


def test_too_many_states_are_refused_with_their_number():
    pair = _preset(num_latents=30, num_classes=8)
    x = _data(pair, 2)
    message = r"at most 65536 values to sum over, got K\^M = 8\^30 = 1.24e\+27"
    with pytest.raises(TooManyStatesError, match=message):
        pair.log_evidence(x)
    law = pair.guide_distribution(x)
    with pytest.raises(TooManyStatesError, match=message):
        law.enumerate_support()
    for marked in (
        poutine.infer_config(pair.guide, lambda site: {"enumerate": "parallel"}),
        config_enumerate(pair.guide),
    ):
        with pytest.raises(TooManyStatesError, match=message):
            TraceEnum_ELBO(max_plate_nesting=1).loss(pair.model, marked, x)
    with pytest.raises(TooManyStatesError, match=r"K\^M = 10\^400 = 1.00e\+400"):  # which no float can hold
        all_one_hot(400, 10)
    assert decompose_elbo(pair.model, pair.guide, x, num_particles=10)["z"].analytic is not None


@pytest.mark.parametrize(
    ("likelihood", "shape"),
    [
        (Bernoulli, (4, 3)),
        (lambda: Categorical(num_classes=5), (4,)),
        (lambda: DiscretizedNormal(levels=17), (2, 2)),
        (lambda: Normal(scale=None), (3,)),
    ],
    ids=["bernoulli", "categorical", "discretized normal", "normal with the decoder's scale"],
)
def test_presets_of_any_likelihood_run_and_rebuild(monkeypatch, likelihood, shape):
    for name, home in PARTS.items():
        monkeypatch.setitem(registry.PARTS, name, home)
    pair = CategoricalVAE.preset(shape, likelihood(), num_latents=2, num_classes=3, hidden=(5,))
    x = _data(pair)
    pair.check_data(x)
    other = registry.build(registry.describe(pair))
    other.load_state_dict(pair.state_dict())
    assert torch.equal(other.to(pair.prior_logits.dtype).log_evidence(x), pair.log_evidence(x))


def test_float32_stays_float32():
    torch.set_default_dtype(torch.float32)
    pair = _preset()
    x = _data(pair)
    assert pair.guide(x).dtype == pair.log_evidence(x).dtype == torch.float32


def _encoder(*shape: int) -> nn.Module:
    return ArrayMLP((4,), shape, (5,))


class _Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (
            lambda d: CategoricalVAE(_encoder(2, 3), d, 0, 3, Bernoulli()),
            ValueError,
            "num_latents to be an int >= 1, got 0",
        ),
        (
            lambda d: CategoricalVAE(_encoder(2, 3), d, 2, 3.0, Bernoulli()),
            ValueError,
            r"num_classes .* >= 2, got 3\.0",
        ),
        (lambda d: _preset(num_latents=2.5), ValueError, r"num_latents to be an int >= 1, got 2\.5"),
        (lambda d: _preset(num_classes=True), ValueError, "num_classes to be an int >= 2, got True"),
        (
            lambda d: CategoricalVAE(_encoder(2, 3), d, 2, 1, Bernoulli()),
            ValueError,
            "num_classes to be an int >= 2, got 1",
        ),
        (lambda d: CategoricalVAE(_encoder(2, 4), d, 2, 3, Bernoulli()), ValueError, r"= \[1, 2, 3\].*got \[1, 2, 4\]"),
        (lambda d: CategoricalVAE(_Pair(), d, 2, 3, Bernoulli()), TypeError, "one tensor, got tuple"),
        (lambda d: CategoricalVAE(_encoder(5, 3), d, 5, 3, Bernoulli()), ValueError, r"decoder to take .*\[1, 5, 3\]"),
        (lambda d: CategoricalVAE(_encoder(2, 3), d, 2, 3, Normal(scale=None)), TypeError, "scale"),
    ],
)
def test_bad_parts_are_refused_at_construction(build, error, match):
    with pytest.raises(error, match=match):
        build(ArrayMLP((2, 3), (4,), (5,)))


def test_data_outside_the_likelihood_are_refused():
    with pytest.raises(ValueError, match="train"):
        _preset().check_data(torch.full((2, 4), 0.5), "train")
