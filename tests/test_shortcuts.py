"""What a subclass of a diffusion overrides is what is trained, sampled and judged: no shortcut passes over it."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

from inference import DiffusionLoss, ancestral_sample
from ppl_models import D3PM, DDPM, NoiseSchedule
from ppl_models.likelihoods import DiscretizedNormal, Normal
from ppl_models.processes.structured_transitions import absorbing, uniform

T = 4


class Affine(torch.nn.Module):
    """Something that depends on x_t and t."""

    def forward(self, x_t, t):
        return 0.3 * x_t + 0.1 * t.reshape(-1, 1)


class Table(torch.nn.Module):
    """Logits of three classes (and a mask) that depend on x_t."""

    def __init__(self, num_classes):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(num_classes, num_classes)

    def forward(self, x_t, t):
        return self.table(x_t)


class ClippedMean(DDPM):
    def mean(self, output, x_t, t):
        return super().mean(output, x_t, t).clamp(-0.2, 0.2)


class LargeScale(DDPM):
    def scale(self, output, x_t, t):
        return 2 * super().scale(output, x_t, t)


class Wider:
    """A mixin, no diffusion."""

    def reverse_law(self, output, x_t, t):
        law = super().reverse_law(output, x_t, t).base_dist
        return dist.Normal(law.loc, 3 * law.scale).to_event(1)


class Mixed(Wider, DDPM):
    pass


class Inherited(ClippedMean):
    pass


class Tempered(D3PM):
    def x_0_logits(self, output, x_t):
        return 2 * super().x_0_logits(output, x_t)


def ddpm(kind):
    return kind(Affine(), NoiseSchedule.cosine(T), (2,), likelihood=Normal()), torch.linspace(-1, 1, 12).reshape(6, 2)


def d3pm(kind, transitions):
    states = {"uniform": 3, "absorbing": 4}[transitions]
    process = {"uniform": uniform, "absorbing": absorbing}[transitions](states, T)
    return kind(Table(states), process, (2,), states), torch.tensor([[0, 1], [2, 0], [1, 1], [2, 2], [0, 0], [1, 2]])


PAIRS = {
    **{kind.__name__: (kind, DDPM, ddpm) for kind in (ClippedMean, LargeScale, Mixed, Inherited)},
    "Tempered, uniform": (Tempered, D3PM, lambda kind: d3pm(kind, "uniform")),
    "Tempered, absorbing": (Tempered, D3PM, lambda kind: d3pm(kind, "absorbing")),
}


@pytest.mark.parametrize("weights", ["vlb", "hybrid"])
@pytest.mark.parametrize("name", PAIRS)
def test_the_terms_are_those_of_its_own_laws(name, weights):
    kind, base, build = PAIRS[name]
    pair, x = build(kind)
    plain, _ = build(base)
    for t in range(T):
        s = torch.full((6,), t + 1)
        values = []
        for each in (pair, plain):
            torch.manual_seed(0)
            loss = DiffusionLoss(each, weights, auxiliary_weight=0.1 if weights == "hybrid" else None)
            values.append(loss._at(x, s - 1, None, True, weights == "hybrid")[0])
        torch.manual_seed(0)
        x_t, _ = pair.draw_marginal(x, s)
        exact = (
            kl_divergence(pair.process.posterior(x_t, x, s), pair.reverse(x_t, s))
            if t
            else -pair.reconstruction(x_t).log_prob(x)
        )
        assert torch.allclose(values[0], exact, rtol=1e-5, atol=1e-6)
        if t:
            assert not torch.allclose(values[1], exact, rtol=1e-2)  # control: the plain one has others


@pytest.mark.parametrize("name", PAIRS)
def test_samples_are_its_programs_(name):
    kind, base, build = PAIRS[name]
    draws = []
    for each in (kind, base):
        pair, _ = build(each)
        torch.manual_seed(1)
        expected = pair.model(size=50)
        torch.manual_seed(1)
        draws.append(ancestral_sample(pair, 50))
        assert torch.allclose(draws[-1].double(), expected.double(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(draws[0].double(), draws[1].double(), rtol=1e-3)


def test_the_mean_is_the_last_steps_too():
    pair, x = ddpm(ClippedMean)
    assert float(pair.reconstruction(10 * x).mean.abs().max()) <= 0.2
    assert float(ddpm(DDPM)[0].reconstruction(10 * x).mean.abs().max()) > 0.2


def test_the_auxiliary_loss_has_the_logits_of_ones_own():
    pair, x = d3pm(Tempered, "uniform")
    x_t, t = torch.zeros_like(x), torch.full((6,), 2)
    output = pair.denoise(x_t, t)
    exact = -torch.log_softmax(2 * output, -1).gather(-1, x[..., None])[..., 0].sum(-1)
    assert torch.allclose(pair.auxiliary_loss(output, x, x_t, t), exact, rtol=1e-5)
    assert not torch.allclose(d3pm(D3PM, "uniform")[0].auxiliary_loss(output, x, x_t, t), exact, rtol=1e-2)


@pytest.mark.parametrize("base", [DDPM, D3PM])
def test_losses_of_ones_own_are_in_the_hybrid(base):
    class Hundred(base):
        def auxiliary_loss(self, output, x_0, x_t, t):
            return torch.full((len(x_0),), 100.0)

    class Seven(base):
        def step_divergence(self, output, x_0, x_t, t):
            return torch.full((len(x_0),), 7.0)

    build = ddpm if base is DDPM else lambda kind: d3pm(kind, "uniform")
    t = torch.full((6,), 2)
    for kind, index, value in ((Hundred, 1, 100.0), (Seven, 0, 7.0)):
        pair, x = build(kind)
        found = DiffusionLoss(pair, "hybrid", auxiliary_weight=0.1)._at(x, t, None, True, True)
        assert bool((found[index] == value).all())
        assert not bool((found[1 - index] == value).any())


@pytest.mark.parametrize("kind", [ClippedMean, LargeScale, Mixed])
def test_fewer_steps_of_another_law_are_refused(kind):
    pair, _ = ddpm(kind)
    with pytest.raises(TypeError, match=f"a DDPM's own reverse law.*got that of {kind.__name__}: use all steps"):
        ancestral_sample(pair, 5, steps=2)
    assert ancestral_sample(ddpm(DDPM)[0], 5, steps=2).shape == (5, 2)


def test_a_likelihood_of_ones_own_keeps_its_arguments():
    class Shifted(Normal):
        def __init__(self, shift=1.0):
            super().__init__()
            self.shift = shift

        def forward(self, parameters, data_dim):
            loc, scale = parameters
            return super().forward((loc + self.shift, scale), data_dim)

    pair = DDPM(Affine(), NoiseSchedule.cosine(T), (2,), likelihood=Shifted(shift=2.0))
    assert pair.likelihood.shift == 2.0
    assert pair.likelihood.needs_scale
    assert not list(pair.likelihood.parameters())


def test_a_scale_that_is_given_is_none_of_the_likelihoods():
    for likelihood in (Normal(), DiscretizedNormal(5), Normal(scale=0.3), Normal(scale="learned")):
        given = likelihood.with_given_scale()
        assert (
            given.config() == type(likelihood)(**(likelihood.config() | {"scale": None, "init_scale": None})).config()
        )
        law = given((torch.zeros(3, 2), torch.tensor(math.e)), 1)
        assert torch.allclose(law.base_dist.scale, torch.tensor(math.e))
