"""The denoiser of grid data against Bayes' rule written out pixel by pixel, and against the entropy of known data."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from inference import ancestral_sample, decompose_diffusion
from inference.respacing import respaced
from ppl_models import DDPM, NoiseSchedule
from ppl_models.likelihoods import DiscretizedNormal
from ppl_models.networks import ResidualMLP
from ppl_models.networks.grid_denoiser import GridDenoiser


class FixedPrior(nn.Module):
    """F = log prior of each pixel, whatever x_t and t: the optimum where pixels are independent."""

    inputs, outputs = 1, 3

    def __init__(self, log_prior):
        super().__init__()
        self.log_prior = nn.Parameter(log_prior)
        self.data_shape = [len(log_prior)]

    def batch_shape(self, x):
        return x.shape[:-1]

    def forward(self, x_t, t):
        return self.log_prior.expand(*x_t.shape, 3)


def log_snr_schedule(num_timesteps, first=7.0, last=-7.0):
    alpha_bar = torch.sigmoid(torch.linspace(first, last, num_timesteps))
    return NoiseSchedule.from_betas(1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]]))


def awake(network):
    for parameter in network.parameters():
        parameter.data += 0.3 / math.sqrt(parameter.shape[-1]) * torch.randn_like(parameter)
    return network


def by_bayes(x, t, log_prior, betas):
    """Mean and variance of x_0 given x_t, and that of x_{t-1} given x_t, from the betas alone: numpy, one number at a time."""
    alpha_bar = np.cumprod(1 - betas)
    levels = np.array([-1.0, 0.0, 1.0])
    log_joint = log_prior - (x - math.sqrt(alpha_bar[t - 1]) * levels) ** 2 / (2 * (1 - alpha_bar[t - 1]))
    p = np.exp(log_joint - logsumexp(log_joint))
    mean = float(p @ levels)
    variance = float(p @ (levels - mean) ** 2)
    previous = alpha_bar[t - 2] if t > 1 else 1.0
    weight = math.sqrt(previous) * betas[t - 1] / (1 - alpha_bar[t - 1])
    s = max(t, 2)
    posterior = betas[s - 1] * (1 - alpha_bar[s - 2]) / (1 - alpha_bar[s - 1])
    return mean, variance, posterior + weight**2 * variance


@pytest.mark.parametrize("shift", [0.0, pytest.param(0.2, marks=pytest.mark.xfail(strict=True, reason="control"))])
def test_mean_and_reverse_variance_are_those_of_bayes_rule(shift):
    schedule = NoiseSchedule([0.02, 0.05, 0.1, 0.3, 0.5])
    log_prior = torch.randn(4, 3)
    pair = DDPM(GridDenoiser(FixedPrior(log_prior), schedule), schedule, (4,), "eps", "learned", DiscretizedNormal(3))
    inside = 0
    for t in range(1, 6):
        x = torch.randn(7, 4)
        output = pair.denoise(x, torch.tensor(t)).detach()
        predicted = pair.predict_x_0(output, x, torch.full((7,), t))
        scale = pair.scale(output, x, torch.full((7,), t))
        for i in range(7):
            for j in range(4):
                mean, _, total = by_bayes(
                    float(x[i, j]) + shift, t, log_prior[j].detach().numpy(), schedule.beta.numpy()
                )
                assert math.isclose(float(predicted[i, j]), mean, rel_tol=1e-9, abs_tol=1e-11)
                ends = by_bayes(0.0, t, np.array([-50.0, 0.0, -50.0]), schedule.beta.numpy())
                low, high = math.log(ends[2]), math.log(float(schedule.beta[t - 1]))
                weight = (math.log(total) - low) / (high - low)
                expected = low + min(max(weight, 0.01), 0.99) * (high - low)
                inside += 0.01 < weight < 0.99
                assert math.isclose(2 * math.log(float(scale[i, j])), expected, rel_tol=1e-8, abs_tol=1e-9)
    assert inside > 40  # of 140, so that the law of total variance is what is tested


def test_the_gradient_reaches_the_prior_by_both_outputs():
    schedule = log_snr_schedule(10)
    network = GridDenoiser(FixedPrior(torch.randn(4, 3)), schedule)
    x, t = torch.randn(5, 4), torch.tensor([2, 4, 5, 6, 7])
    for k in range(2):
        direction, h = torch.randn(4, 3), 1e-6
        (gradient,) = torch.autograd.grad(network(x, t)[..., k].sum(), network.network.log_prior)

        def moved(step, k=k, direction=direction):
            with torch.no_grad():
                network.network.log_prior += step * direction
                value = network(x, t)[..., k].sum()
                network.network.log_prior -= step * direction
            return float(value)

        slope = (moved(h) - moved(-h)) / (2 * h)
        assert math.isclose(float((gradient * direction).sum()), slope, rel_tol=1e-5, abs_tol=1e-7)
        assert abs(slope) > 1e-3


@pytest.mark.parametrize(("prior_known", "holds"), [(True, True), (False, False)])
def test_with_the_true_prior_the_bound_comes_close_to_the_entropy_of_independent_pixels(prior_known, holds):
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.05, 0.05, 0.9], [0.3, 0.4, 0.3], [0.01, 0.98, 0.01]])
    entropy = float(-(probs * probs.log()).sum())
    log_prior = probs.log() if prior_known else torch.zeros(4, 3)
    schedule = log_snr_schedule(100)
    pair = DDPM(GridDenoiser(FixedPrior(log_prior), schedule), schedule, (4,), "eps", "learned", DiscretizedNormal(3))
    index = torch.distributions.Categorical(probs).sample((150,))
    d = decompose_diffusion(pair, index.to(torch.get_default_dtype()) - 1, num_particles=2, seed=0)
    loss = -d.elbo
    cross_entropy = -probs.log()[torch.arange(4), index].sum(-1)
    gap = loss - cross_entropy  # of each datum: what the chain of Gaussian steps loses; the draws of data cancel
    error = 5 * (float(gap.var()) / len(gap)) ** 0.5
    assert (float(gap.mean()) < 0.03 * entropy + error) == holds
    assert float(gap.mean()) > -error


def test_at_little_noise_it_rounds_and_at_much_noise_it_returns_the_priors_mean():
    schedule = log_snr_schedule(50, first=9.0, last=-14.0)
    network = GridDenoiser(ResidualMLP((6,), hidden=8, blocks=1, outputs=5), schedule)
    x_0 = torch.linspace(-1, 1, 5)[torch.randint(5, (20, 6))]
    assert torch.allclose(network.posterior(x_0 + 0.01 * torch.randn(20, 6), torch.tensor(1))[0], x_0, atol=1e-4)
    assert network.posterior(torch.randn(20, 6), torch.tensor(50))[0].abs().max() < 0.01  # untrained: a uniform prior


@pytest.mark.parametrize("batch", [(), (5,), (3, 5), (2, 1, 3)])
def test_leading_dims_are_batch_dims_and_t_broadcasts(batch):
    network = awake(GridDenoiser(ResidualMLP((4, 3), hidden=16, blocks=1, outputs=5), log_snr_schedule(20)))
    x = torch.randn(*batch, 4, 3)
    for shape in {(), batch[-1:], (1,) * len(batch), batch}:
        t = torch.randint(1, 21, shape)
        out = network(x, t)
        assert out.shape == (*batch, 4, 3, 2)
        alone = network(x.reshape(-1, 4, 3), t.expand(batch).reshape(-1))
        assert torch.allclose(out.reshape(alone.shape), alone, rtol=1e-9, atol=1e-11)


def test_it_is_traced_without_reading_values():
    network = awake(GridDenoiser(ResidualMLP((4,), hidden=16, blocks=1, outputs=5), log_snr_schedule(20)))
    graph = make_fx(network)(torch.randn(6, 4), torch.randint(1, 21, (6,)))
    x, t = torch.randn(6, 4), torch.randint(1, 21, (6,))
    assert torch.allclose(graph(x, t), network(x, t))


def test_tables_stay_exact_in_a_float32_module():
    schedule = NoiseSchedule.cosine(1000)
    network = GridDenoiser(ResidualMLP((4,), hidden=16, blocks=1, outputs=17), schedule)
    exact = network.tables.clone()
    assert network.float().tables.dtype == torch.float64
    assert torch.equal(network.double().tables, exact)
    x, t = torch.randn(30, 4), torch.arange(1, 991, 33)
    low = network.float()(x.float(), t)
    assert low.dtype == torch.float32
    high = network.double()(x, t)
    assert torch.allclose(low.double(), high, rtol=1e-3, atol=1e-3)


def test_its_description_makes_the_same_module():
    schedule = NoiseSchedule.cosine(30)
    network = GridDenoiser(ResidualMLP((4,), hidden=16, blocks=1, outputs=5), schedule)
    description = json.loads(json.dumps(network.config()))
    assert description["network"].pop("class") == "ResidualMLP"
    assert description["schedule"].pop("class") == "NoiseSchedule"
    again = GridDenoiser(ResidualMLP(**description["network"]), NoiseSchedule.from_config(**description["schedule"]))
    again.load_state_dict(network.state_dict())
    x, t = torch.randn(3, 4), torch.tensor([1, 15, 30])
    assert torch.equal(again(x, t), network(x, t))


def grid_ddpm(own=None, schedule=None, levels=5, **options):
    schedule = NoiseSchedule.cosine(9) if schedule is None else schedule
    network = GridDenoiser(ResidualMLP((4,), hidden=8, blocks=1, outputs=5), schedule if own is None else own)
    return DDPM(
        network, schedule, (4,), likelihood=DiscretizedNormal(levels), **({"variance": "learned"} | options)
    ).double()


def test_respaced_it_has_the_variance_of_the_coarse_chain():
    schedule, log_prior = log_snr_schedule(40), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    pair = DDPM(
        GridDenoiser(FixedPrior(log_prior[None]), schedule),
        schedule,
        (1,),
        variance="learned",
        likelihood=DiscretizedNormal(3),
    ).double()
    steps = [1, 8, 20, 40]
    coarse = respaced(pair, steps)
    alpha_bar = np.cumprod(1 - schedule.beta.numpy())[[t - 1 for t in steps]]
    betas = 1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])
    seen = 0
    for i in (2, 3, 4):
        x_t, t = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([i])
        _, _, variance = by_bayes(0.3, i, log_prior.numpy(), betas)
        law = coarse.reverse(x_t, t).base_dist
        low, high = betas[i - 1] * (1 - alpha_bar[i - 2]) / (1 - alpha_bar[i - 1]), betas[i - 1]
        weight = (math.log(variance) - math.log(low)) / math.log(high / low)
        if 0.01 <= weight <= 0.99:  # what the parameterisation reaches
            seen += 1
            assert law.variance.item() == pytest.approx(variance, rel=1e-6)
            fine = pair.scale(pair.denoise(x_t, torch.tensor([steps[i - 1]])), x_t, torch.tensor([steps[i - 1]]))
            assert law.variance.item() != pytest.approx(fine.item() ** 2, rel=1e-2)
    assert seen >= 2
    assert [p is q for p, q in zip(coarse.parameters(), pair.parameters(), strict=True)] == [True]
    assert respaced(pair, [40]).model(size=2).shape == (2, 1)  # one step: no reverse variance to know
    assert ancestral_sample(pair, 5, 4, seed=0).shape == (5, 1)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: grid_ddpm(NoiseSchedule.cosine(8)), r"own schedule, NoiseSchedule.cosine\(9\), got one with .*\(8\)"),
        (lambda: grid_ddpm(NoiseSchedule.geometric(9)), r"own schedule, NoiseSchedule.cosine\(9\)"),
        (lambda: grid_ddpm(predict="x_0"), "predict='eps' and variance='learned' with a GridDenoiser, .*'x_0'"),
        (lambda: grid_ddpm(variance="beta"), "predict='eps' and variance='learned' with a GridDenoiser, .*'beta'"),
        (lambda: grid_ddpm(levels=9), "of the likelihood's 9 levels, got 5"),
        (
            lambda: GridDenoiser(ResidualMLP((4,)), NoiseSchedule.cosine(9)),
            "one input and K >= 2 outputs per entry, got 1 and 1",
        ),
        (
            lambda: GridDenoiser(ResidualMLP((4,), num_classes=5), NoiseSchedule.cosine(9)),
            "one input and K >= 2 outputs per entry, got 5 and 5",
        ),
        (lambda: GridDenoiser(ResidualMLP((4,), outputs=5), NoiseSchedule([0.5])), "at least 2 steps, got 1"),
        (lambda: ResidualMLP((4,), outputs=0), "outputs >= 1, without num_classes"),
        (lambda: ResidualMLP((4,), outputs=5, with_variance=True), "outputs >= 1, without num_classes"),
    ],
)
def test_what_does_not_fit_is_refused(make, match):
    grid_ddpm(NoiseSchedule.cosine(9))
    with pytest.raises(ValueError, match=match):
        make()
