"""Slips of the lecture notes that README lists: the printed form fails where the correct one holds.

Those of 000's Markov chains and last terms, of 001's mu-tilde, of 003's L_VLB and of 004's interpolation and blur are beside
the code that they are about; README names each test.
"""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import kl_divergence

from ppl_models import DDPM, LinearDiffusion, LinearGaussian, LinearHierarchy
from ppl_models.likelihoods import Categorical, Normal
from ppl_models.processes import NoiseSchedule
from tests.test_ddpm import BETAS, D, Network, T, ddpm


def log_ratio(pair, x, trace):
    """log p(x, z) - log q(z | x) of one draw."""
    replayed = poutine.trace(poutine.replay(pair.model, trace)).get_trace(x)
    return replayed.log_prob_sum() - trace.log_prob_sum()


def linear_gaussian():
    """A pair with a gap, and one datum."""
    weight = torch.tensor([[1.0, 0.8], [0.2, -0.5], [0.3, 1.0]])
    return LinearGaussian(weight, torch.zeros(3), 0.5, guide="mean_field"), torch.tensor([[2.0, -0.4, 1.7]])


def gap_of(pair, x):
    """KL(q(z | x) || p(z | x)), from the laws."""
    law = pair.guide_distribution(x)
    scale = law.base_dist.scale if isinstance(law, torch.distributions.Independent) else law.stddev
    normal = dist.MultivariateNormal(law.mean, scale_tril=torch.diag_embed(scale))
    return float(kl_divergence(normal, pair.posterior(x)).detach())


def test_the_bound_is_the_evidence_less_the_divergence():
    """000 and 001: log p(x) = ELBO + KL(q || p(z | x)); 001's first form prints a minus, 000 log E = E log."""
    pair, x = linear_gaussian()
    evidence, elbo, gap = float(pair.log_evidence(x).detach()), float(pair.elbo(x).detach()), gap_of(pair, x)
    assert gap > 0.1
    assert elbo + gap == pytest.approx(evidence, abs=1e-10)
    assert abs(elbo - gap - evidence) > 0.1
    assert abs(elbo - evidence) > 0.1


def test_a_better_bound_is_not_always_a_smaller_gap():
    """001 and 004: maximising the ELBO reduces the inference error while log p(x) stays, that is for a fixed decoder alone."""
    pair, x = linear_gaussian()
    # the guide alone moves: what the bound gains, the gap loses
    law = pair.guide_distribution(x)
    wrong = dist.MultivariateNormal(law.mean + 0.3, scale_tril=torch.diag_embed(law.stddev))
    right = dist.MultivariateNormal(law.mean, scale_tril=torch.diag_embed(law.stddev))
    posterior = pair.posterior(x)
    assert float((kl_divergence(wrong, posterior) - kl_divergence(right, posterior)).detach()) > 0.1
    # the decoder moves, too: bound and gap both grow
    before = LinearGaussian(0.7 * pair.weight.detach(), torch.zeros(3), 0.5, guide="mean_field")
    assert float((pair.elbo(x) - before.elbo(x)).detach()) > 0.1
    assert gap_of(pair, x) > gap_of(before, x) + 0.05


def test_the_bound_holds_in_expectation_and_not_for_every_draw():
    """003, (3): -log p(x_0) <= E_q log q/p; printed without E_q, as if each draw were a bound."""
    pair, x = LinearDiffusion(NoiseSchedule.cosine(4), torch.full((1,), 0.5), torch.ones(1)), torch.tensor([[0.3]])
    surprisal = -float(pair.log_evidence(x).detach())
    draws = [poutine.trace(pair.guide).get_trace(x) for _ in range(400)]
    losses = torch.stack([-log_ratio(pair, x, trace) for trace in draws]).detach()
    assert float((losses < surprisal).double().mean()) > 0.2
    assert abs(float(losses.mean() + pair.elbo(x).detach())) < 5 * float(losses.std()) / math.sqrt(len(losses))
    assert -float(pair.elbo(x).detach()) > surprisal


def test_the_sum_of_normals_adds_variances():
    """001: a eps_1 + b eps_2 ~ N(0, a^2 + b^2), its second argument a variance as in 001's other lines; printed with a root."""
    a, b = 0.6, 0.5
    value = a * torch.randn(200_000) + b * torch.randn(200_000)
    # the variance of n Normal draws has the standard error sqrt(2/n) of itself
    assert float(value.var()) == pytest.approx(a**2 + b**2, rel=5 * math.sqrt(2 / 200_000))
    assert abs(float(value.var()) - math.sqrt(a**2 + b**2)) > 0.1


def test_the_joint_of_a_hierarchy_counts_the_likelihood_once():
    """004: p(x | z_1) prod_{i=2..L} p(z_{i-1} | z_i) p(z_L); printed from i = 1, with z_0 = x a second likelihood."""
    pair = LinearHierarchy.random(3, (2, 2))
    x = pair.model(size=1).detach()
    evidence = float(pair.log_evidence(x).detach())
    for _ in range(5):  # the exact posterior as guide: the same number for every draw
        trace = poutine.trace(pair.guide).get_trace(x)
        likelihood = poutine.trace(poutine.replay(pair.model, trace)).get_trace(x)
        likelihood.compute_log_prob()
        ratio = float(log_ratio(pair, x, trace).detach())
        assert ratio == pytest.approx(evidence, abs=1e-9)
        assert abs(ratio + float(likelihood.nodes["x"]["log_prob"].sum().detach()) - evidence) > 0.1


def test_the_cross_entropy_sums_over_the_classes():
    """004: -sum_j x_j log x-hat_j; printed with the sum's index j on the sign and the last k on both factors."""
    logits, x = torch.randn(4, 5), torch.tensor([0, 2, 3, 4])
    one_hot, log_p = torch.nn.functional.one_hot(x, 5).double(), logits.log_softmax(-1)
    ours = Categorical(5)(logits, 0).log_prob(x)
    torch.testing.assert_close((one_hot * log_p).sum(-1), ours, rtol=1e-12, atol=0)
    printed = 5 * one_hot[:, -1] * log_p[:, -1]
    assert (printed - ours).abs().min() > 0.1


def step_case(variance="posterior", n=6):
    """x_0, eps, t and the x_t = sqrt(alpha-bar) x_0 + sqrt(1 - alpha-bar) eps of them, t = 2..4."""
    x_0, eps, t = torch.randn(n, D), torch.randn(n, D), torch.tensor([2, 3, 4] * 2)
    pair = ddpm(variance=variance)
    bar = pair.process.coefficient("alpha_bar", t, x_0)
    return pair, x_0, eps, t, bar.sqrt() * x_0 + (1 - bar).sqrt() * eps


def test_the_mean_is_mu_tilde_where_eps_is_the_noise_that_was_added():
    """003: mu = (x_t - beta_t / sqrt(1 - alpha-bar_t) eps) / sqrt(alpha_t); printed with sqrt(1 - alpha_t)."""
    pair, x_0, eps, t, x_t = step_case()
    want = pair.process.posterior(x_t, x_0, t).mean
    torch.testing.assert_close(pair.mean(eps, x_t, t), want, rtol=1e-10, atol=1e-10)
    beta, alpha = (pair.process.coefficient(name, t, x_t) for name in ("beta", "alpha"))
    printed = (x_t - beta / (1 - alpha).sqrt() * eps) / alpha.sqrt()
    assert (printed - want).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_the_weight_of_the_squared_error_in_each_kl(variance):
    """003: beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha-bar_t)); printed with 1 - alpha_t, and as if it were the whole KL.

    It is where sigma_t^2 = beta-tilde_t; with 003's own beta_t there is (D/2)(r - 1 - log r) besides, r = beta-tilde_t/beta_t.
    """
    pair, x_0, eps, t, x_t = step_case(variance)
    output = pair.denoise(x_t, t)
    kl = kl_divergence(pair.process.posterior(x_t, x_0, t), pair.reverse_law(output, x_t, t))
    beta, alpha, bar, rest = (
        pair.process.coefficient(name, t, x_t)[:, 0] for name in ("beta", "alpha", "alpha_bar", "posterior_variance")
    )
    variance, ratio = (beta, rest / beta) if variance == "beta" else (rest, rest / rest)
    excess = D / 2 * (ratio - 1 - ratio.log())
    assert bool((excess > 0.05).all()) if pair.variance == "beta" else not bool(excess.any())
    squared = (eps - output).square().sum(-1)
    torch.testing.assert_close(pair.auxiliary_loss(output, x_0, x_t, t), squared, rtol=1e-10, atol=0)
    weighted = beta**2 / (2 * variance * alpha * (1 - bar)) * squared
    torch.testing.assert_close(weighted + excess, kl, rtol=1e-10, atol=0)
    printed = beta**2 / (2 * variance * alpha * (1 - alpha)) * squared
    assert ((printed + excess - kl) / kl).abs().min() > 0.05


def log_mass(log_density, n):
    """Log of the integral of exp(log_density) over R^n, for a log_density that is quadratic."""
    origin = torch.zeros(n, requires_grad=True)
    gradient = torch.autograd.functional.jacobian(log_density, origin)
    precision = -torch.autograd.functional.hessian(log_density, origin)
    return (
        log_density(origin).detach()
        + 0.5 * gradient @ torch.linalg.solve(precision, gradient)
        + 0.5 * n * math.log(2 * math.pi)
        - 0.5 * torch.linalg.slogdet(precision)[1]
    ).item()


def test_the_model_is_a_density_and_the_printed_product_is_not():
    """002: p(x_T) prod p(x_{t-1} | x_t); printed with p(x_t | x_{t-1}), each kernel read with its arguments swapped."""
    pair = ddpm()

    def model(path):  # path: x_0, .., x_T
        x = path.reshape(T + 1, 1, D)
        values = {f"x_{t}": x[t] for t in range(1, T + 1)}
        return poutine.trace(poutine.condition(pair.model, values)).get_trace(x[0]).log_prob_sum()

    def printed(path):
        x = path.reshape(T + 1, 1, D)
        total = pair.process.prior().log_prob(x[T])
        for t in range(2, T + 1):
            total = total + pair.reverse(x[t - 1], torch.full((1,), t)).log_prob(x[t])
        return (total + pair.reconstruction(x[0]).log_prob(x[1])).sum()

    n = (T + 1) * D
    assert log_mass(model, n) == pytest.approx(0, abs=1e-9)
    assert abs(log_mass(printed, n)) > 0.1


def test_the_sampling_update_in_the_letters_of_004():
    """004: 1/alpha_i (x_i - (1 - alpha_i^2)/sqrt(1 - alpha-bar_i^2) eps) + sigma(i) eps_i; printed with bars on all alphas.

    Their beta_i is a standard deviation, alpha_i = sqrt(1 - beta_i^2), alpha-bar_i = prod alpha.
    """
    stds = torch.tensor(BETAS).sqrt()
    torch.manual_seed(0)
    pair = DDPM(Network(), NoiseSchedule.from_stds(stds), (D,), likelihood=Normal())
    alpha = (1 - stds.square()).sqrt()
    alpha_bar = alpha.cumprod(0)
    x, noise = torch.randn(1, D), torch.randn(1, D)
    for i in range(2, T + 1):
        a, bar = alpha[i - 1], alpha_bar[i - 1]
        step = torch.tensor([i])
        eps = pair.denoise(x, step)
        law = pair.reverse(x, step)
        drawn = law.mean + law.stddev * noise
        update = (x - (1 - a**2) / (1 - bar**2).sqrt() * eps) / a + stds[i - 1] * noise
        torch.testing.assert_close(drawn, update, rtol=1e-10, atol=1e-10)
        printed = (x - (1 - bar**2) / (1 - bar**2).sqrt() * eps) / bar + stds[i - 1] * noise
        assert (printed - drawn).abs().max() > 1e-3
