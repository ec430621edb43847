"""Theorem 2.2.1 of notes 004 against quadrature in one dimension, on laws obtained by Bayes' rule from joint densities.

z-tests hold at most 6.5 standard errors with 20000 draws behind each: below 1e-8 for the family.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from inference.bounds.denoising_theorem import GaussianMixture, OptimalDenoiser, denoising_theorem
from inference.bounds.diffusion import decompose_diffusion
from ppl_models.ddpm import DDPM
from ppl_models.likelihoods import Normal
from ppl_models.processes import GaussianProcess, NoiseSchedule

Z_MAX = 6.5
BETAS = (0.2, 0.3, 0.5)
LOCS, SCALES, WEIGHTS = (-1.0, 0.5, 1.5), (0.2, 0.4, 0.1), (0.5, 0.2, 0.3)
GRID = np.linspace(-6, 6, 1601)
STEP = GRID[1] - GRID[0]


def mixture():
    return GaussianMixture(torch.tensor(LOCS)[:, None], torch.tensor(SCALES), torch.tensor(WEIGHTS))


def process():
    return GaussianProcess(NoiseSchedule(BETAS), (1,))


class Shifted(nn.Module):
    """The best denoiser plus a constant."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.best = OptimalDenoiser(mixture(), process())
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, x_t, t):
        return self.best(x_t, t) + self.shift


def pair(shift=0.0, variance="beta"):
    return DDPM(Shifted(shift), NoiseSchedule(BETAS), (1,), "x_0", variance, Normal())


def density(x, alpha_bar):
    """p(x_t), a mixture of normals."""
    laws = zip(WEIGHTS, LOCS, SCALES, strict=True)
    return sum(w * norm(np.sqrt(alpha_bar) * m, np.sqrt(alpha_bar * s**2 + 1 - alpha_bar)).pdf(x) for w, m, s in laws)


def reverse_density(t):
    """p(x_{t-1} | x_t) on the grid, [x_{t-1}, x_t], by Bayes' rule from p(x_{t-1}) q(x_t | x_{t-1}); and p(x_t)."""
    alpha_bar = np.cumprod(1 - np.array(BETAS))
    joint = density(GRID, alpha_bar[t - 2])[:, None] * norm(
        np.sqrt(1 - BETAS[t - 1]) * GRID[:, None], np.sqrt(BETAS[t - 1])
    ).pdf(GRID[None, :])
    marginal = joint.sum(0) * STEP
    return joint / marginal, marginal


def exact(t, mean, scale):
    """Marginal KL, conditional KL and C for p_phi(x_{t-1} | x_t) = N(mean(x_t), scale^2), by quadrature alone.

    The conditional KL is E[-log p_phi] - H(x_{t-1} | x_t, x_0), where E is over the joint of x_{t-1} and x_t.
    """
    reverse, marginal = reverse_density(t)
    log_p = norm(mean[None, :], scale).logpdf(GRID[:, None])
    weight = reverse * marginal[None, :] * STEP**2
    cross = -(weight * log_p).sum()
    entropy = -(weight * np.log(reverse + 1e-300)).sum()
    alpha_bar = np.cumprod(1 - np.array(BETAS))
    own = BETAS[t - 1] * (1 - alpha_bar[t - 2]) / (1 - alpha_bar[t - 1])
    conditional_entropy = 0.5 * np.log(2 * np.pi * np.e * own)
    return cross - entropy, cross - conditional_entropy, conditional_entropy - entropy


@pytest.mark.parametrize("t", [2, 3])
def test_laws_of_the_mixture_are_bayes_rule(t):
    reverse, marginal = reverse_density(t)
    x = torch.as_tensor(GRID)
    step = torch.tensor(t)
    law = mixture().marginal(process(), step)
    assert np.allclose(law.log_prob(x[:, None]).exp(), marginal, atol=1e-9)
    for i in (500, 800, 950):
        law = mixture().reverse(process(), x[i, None], step)
        assert np.allclose(law.log_prob(x[:, None]).exp(), reverse[:, i], rtol=1e-6, atol=1e-9)


def test_the_prediction_is_the_posterior_mean():
    alpha_bar = np.prod(1 - np.array(BETAS))
    x_t = 0.7
    weight = density(GRID, 1.0) * norm(np.sqrt(alpha_bar) * GRID, np.sqrt(1 - alpha_bar)).pdf(x_t)
    exact_mean = (weight * GRID).sum() / weight.sum()
    found = mixture().posterior_mean(process(), torch.tensor([x_t]), torch.tensor(3))
    assert float(found) == pytest.approx(exact_mean, rel=1e-8)


@pytest.mark.parametrize(("shift", "variance"), [(0.0, "beta"), (0.4, "beta"), (-0.3, "posterior")])
def test_both_kls_and_their_gap_are_the_quadratures(shift, variance):
    model = pair(shift, variance)
    result = denoising_theorem(model, mixture(), [2, 3], num_particles=20_000)
    for i, t in enumerate((2, 3)):
        law = model.reverse(torch.as_tensor(GRID)[:, None], torch.tensor(t))
        mean, scale = law.mean[:, 0].detach().numpy(), float(law.base_dist.scale.max())
        marginal, conditional, gap = exact(t, mean, scale)
        for name, value in (("marginal", marginal), ("conditional", conditional), ("gap", gap)):
            estimate, error = getattr(result, name)[i], getattr(result, f"{name}_std_error")[i]
            assert abs(float(estimate) - value) < Z_MAX * float(error) + 1e-6
        assert marginal == pytest.approx(conditional + gap, abs=1e-9)
        assert gap < -0.01
        assert abs(float(result.residual[i])) < Z_MAX * float(result.residual_std_error[i])


def test_the_gap_is_the_same_for_every_pair():
    a, b = (denoising_theorem(pair(s), mixture(), [2, 3], num_particles=500) for s in (0.0, 1.0))
    assert torch.equal(a.gap, b.gap)
    assert not torch.equal(a.marginal, b.marginal)


def test_the_conditional_kl_is_the_term_of_the_bound():
    model = pair(0.2)
    result = denoising_theorem(model, mixture(), [2, 3], num_particles=20_000)
    torch.manual_seed(0)
    d = decompose_diffusion(model, mixture().law().sample((4000,)), num_particles=5, seed=0)
    for i, t in enumerate((2, 3)):
        term = -d[f"x_{t - 1}"].value
        error = (term.var() / len(term) + result.conditional_std_error[i] ** 2).sqrt()
        assert abs(float(term.mean() - result.conditional[i])) < Z_MAX * float(error)


def test_the_minimiser():
    """Without restriction the true reverse law, of marginal KL 0; among Gaussians of a given variance, its mean."""
    reverse, marginal = reverse_density(2)
    best = mixture().reverse(process(), torch.as_tensor(GRID)[:, None], torch.tensor(2)).mean[:, 0]
    own = pair().reverse(torch.as_tensor(GRID)[:, None], torch.tensor(2)).mean[:, 0]
    assert torch.allclose(own, best)
    at_best = exact(2, own.detach().numpy(), np.sqrt(BETAS[1]))
    for shift in (-0.2, 0.2):
        away = exact(2, own.detach().numpy() + shift, np.sqrt(BETAS[1]))
        for marginal_or_conditional in (0, 1):  # both rise, and by the same: the gap has no phi
            rise = away[marginal_or_conditional] - at_best[marginal_or_conditional]
            assert rise == pytest.approx(shift**2 / (2 * BETAS[1]), rel=1e-6)
    weight = reverse * marginal[None, :] * STEP**2
    law = mixture().reverse(process(), torch.as_tensor(GRID)[:, None], torch.tensor(2))
    log_p = law.log_prob(torch.as_tensor(GRID)[:, None, None]).numpy()
    assert (weight * (np.log(reverse + 1e-300) - np.maximum(log_p, -690))).sum() == pytest.approx(0, abs=1e-6)


def test_the_reverse_law_is_near_a_gaussian_for_small_steps_alone():
    """Remark 4 of 004 on sampling: E_{x_t} KL(p(x_{t-1} | x_t) || the Gaussian of its moments), by quadrature."""
    alpha_bar, found, grid = 0.95, [], torch.as_tensor(GRID)
    for beta in (0.003, 0.03, 0.3, 0.9):
        forward = GaussianProcess(NoiseSchedule([1 - alpha_bar, beta]), (1,))
        law = mixture().reverse(forward, grid[:, None], torch.tensor(2))  # one for each x_2 of the grid
        p = law.log_prob(grid[:, None, None]).exp().numpy()
        gaussian = norm(law.mean[:, 0].numpy(), law.stddev[:, 0].numpy()).pdf(GRID[:, None])
        kl = (p * (np.log(p + 1e-300) - np.log(gaussian + 1e-300))).sum(0) * STEP
        found.append((kl * density(GRID, alpha_bar * (1 - beta))).sum() * STEP)
    assert all(small < large for small, large in itertools.pairwise(found))
    assert 0 < found[0] < 0.01
    assert found[-1] > 0.1


def test_the_gradient_vanishes_at_the_minimiser_and_not_elsewhere():
    process_, t = process(), torch.tensor(2)
    torch.manual_seed(0)
    x_0 = mixture().law().sample((20_000,))
    x_t = process_.marginal(x_0, t).sample()
    for shift, at_minimum in ((0.0, True), (0.3, False)):
        model = pair(shift)
        # the KL is (mean difference)^2 / (2 variance), and its slope in the shift the weight of x_0-hat times that difference
        law, true = model.reverse(x_t, t), process_.posterior(x_t, x_0, t)
        slope = (process_.coefficient("posterior_weight_x_0", t, x_t) * (law.mean - true.mean) / law.variance).detach()
        kl = torch.distributions.kl_divergence(true, law).mean()
        (gradient,) = torch.autograd.grad(kl, model.network.shift)
        assert torch.allclose(gradient, slope.mean())
        score = abs(float(slope.mean())) / float(slope.std() / np.sqrt(len(slope)))
        assert score < Z_MAX if at_minimum else score > 3 * Z_MAX


def test_a_wrong_mixture_has_another_gap():
    """The twin: with another law of the data the estimate is far from this one's constant."""
    other = GaussianMixture(torch.tensor(LOCS)[:, None], torch.tensor(SCALES) * 4, torch.tensor(WEIGHTS))
    result = denoising_theorem(pair(), other, [2], num_particles=20_000)
    law = pair().reverse(torch.as_tensor(GRID)[:, None], torch.tensor(2))
    _, _, gap = exact(2, law.mean[:, 0].detach().numpy(), np.sqrt(BETAS[1]))
    assert abs(float(result.gap[0]) - gap) > 3 * Z_MAX * float(result.gap_std_error[0])


def test_dropout_is_off_and_modes_are_put_back():
    class Dropping(Shifted):
        def forward(self, x_t, t):
            return nn.functional.dropout(self.best(x_t, t), 0.5, self.training)

    dropping = DDPM(Dropping(), NoiseSchedule(BETAS), (1,), "x_0", "beta", Normal()).train()
    found = denoising_theorem(dropping, mixture(), [3], num_particles=100).conditional
    assert torch.equal(found, denoising_theorem(pair(), mixture(), [3], num_particles=100).conditional)
    assert dropping.network.training


def test_table():
    table = denoising_theorem(pair(), mixture(), [3, 2], num_particles=10).table()
    assert [line.split()[0] for line in table.splitlines()] == ["t", "-", "3", "2"]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: denoising_theorem(pair(), mixture(), [1]), r"timesteps in 2\.\.3"),
        (lambda: denoising_theorem(pair(), mixture(), [4]), r"timesteps in 2\.\.3"),
        (lambda: denoising_theorem(pair(), mixture(), [2], num_particles=0), "num_particles >= 1"),
        (lambda: denoising_theorem(pair(), mixture(), [2], num_particles=2.5), "num_particles >= 1, got 2.5"),
        (lambda: denoising_theorem(pair(), mixture(), [2], seed=-1), "a seed >= 0, got -1"),
        (lambda: GaussianMixture(torch.tensor([[math.nan]]), torch.ones(1)), "locs as finite floats"),
        (lambda: GaussianMixture(torch.zeros(1, 1), torch.ones(1, dtype=torch.long)), "scales as finite floats"),
        (
            lambda: denoising_theorem(pair(), GaussianMixture(torch.zeros(1, 2), torch.ones(1)), [2]),
            r"data of shape \[2\], that of the mixture, got \[1\]",
        ),
        (lambda: GaussianMixture(torch.zeros(2, 1), torch.ones(3)), r"locs \[J, D\], scales \[J\]"),
        (lambda: GaussianMixture(torch.zeros(2, 1), torch.zeros(2)), "positive scales"),
    ],
)
def test_bad_calls_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
