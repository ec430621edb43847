"""The short forms that training uses: KLs of one step and of the prior, and draws of x_t, against laws written out.

The oracle is a table of matrices multiplied up, Bayes' rule and a sum over classes. Chi-square tests at 1e-6.
"""

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch.distributions import kl_divergence
from torch.fx.experimental.proxy_tensor import make_fx

from inference.training.diffusion_objective import DiffusionLoss
from ppl_models import DDPM
from ppl_models.likelihoods import Normal
from ppl_models.processes import (
    CategoricalProcess,
    GaussianProcess,
    NoiseSchedule,
    absorbing,
    discretized_gaussian,
    uniform,
)
from ppl_models.processes.transitions import Transitions
from tests.bounds import diffusion_pairs as pairs

K, T = 5, 6
BUILD = {"uniform": uniform, "absorbing": absorbing, "gaussian": discretized_gaussian}


def matrices(name):
    """Q_1..Q_T and Qbar_0..Qbar_T, ``[T + 1, K, K]`` each, entry t; Q_0 is not used."""
    steps = torch.stack([torch.eye(K), *(BUILD[name](K, T).dense(t) for t in range(1, T + 1))])
    products = [torch.eye(K)]
    for step in steps[1:]:
        products.append(products[-1] @ step)
    return steps, torch.stack(products)


def brute_force(name, x_t, x_0, law, t):
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) from matrices alone; ``law`` is p(x_0 | x_t), ``[N, K]``."""
    steps, products = matrices(name)
    column = steps[t, :, x_t]
    q = column * products[t - 1, x_0]
    p = column * torch.einsum("ni,nij->nj", law, products[t - 1])
    q, p = q / q.sum(-1, keepdim=True), p / p.sum(-1, keepdim=True)
    return torch.where(q > 0, q * (torch.where(q > 0, q, 1).log() - torch.where(q > 0, p, 1).log()), 0).sum(-1)


def case(name, n=300):
    """Every kind of (t, x_0, x_t) that can occur, and logits."""
    transitions = BUILD[name](K, T)
    t = torch.randint(2, T + 1, (n,))
    x_0 = torch.randint(transitions.num_data_classes, (n,))
    x_t = torch.multinomial(matrices(name)[1][t, x_0], 1)[:, 0]
    logits = transitions.restrict(2 * torch.randn(n, K), x_t).requires_grad_()
    return transitions, x_t, x_0, logits, t


@pytest.mark.parametrize("name", BUILD)
def test_the_divergence_of_a_step_in_value_and_gradient(name):
    transitions, x_t, x_0, logits, t = case(name)
    ours = transitions.step_divergence(x_t, x_0, logits, t)
    exact = brute_force(name, x_t, x_0, logits.softmax(-1), t)
    assert torch.allclose(ours, exact, rtol=1e-10, atol=1e-12)
    assert (ours > -1e-12).all()
    weight = torch.rand(len(t))
    gradients = [torch.autograd.grad((weight * kl).sum(), logits)[0] for kl in (ours, exact)]
    assert torch.allclose(*gradients, rtol=1e-8, atol=1e-12)
    late = brute_force(name, x_t, x_0, logits.softmax(-1), t - 1)  # the twin: the step before
    assert not torch.allclose(ours, late, rtol=1e-2)


@pytest.mark.parametrize("name", BUILD)
def test_a_law_that_knows_x_0_has_no_divergence(name):
    transitions, x_t, x_0, _, t = case(name)
    sure = torch.where(torch.nn.functional.one_hot(x_0, K) > 0, 0.0, -1e4)
    assert transitions.step_divergence(x_t, x_0, transitions.restrict(sure, x_t), t).abs().max() < 1e-12


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("name", ["uniform", "absorbing"])
def test_float32_against_float64_at_256_classes(name, scale):
    transitions = BUILD[name](256, 100)
    t, x_0 = torch.randint(2, 101, (500,)), torch.randint(255, (500,))
    x_t = transitions.sample_marginal(x_0, t)
    logits = transitions.restrict(scale * torch.randn(500, 256, dtype=torch.float32), x_t).requires_grad_()
    single = transitions.step_divergence(x_t, x_0, logits, t)
    double = transitions.step_divergence(x_t, x_0, logits.double(), t)
    assert single.dtype == torch.float32
    assert ((single - double).abs() <= 1e-5 * double.abs() + 5e-6).all()
    assert torch.autograd.grad(single.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("name", ["uniform", "absorbing"])
def test_particles_broadcast(name):
    transitions, x_t, x_0, _, t = case(name, 6)
    several = torch.randn(4, 6, K)
    kl = transitions.step_divergence(x_t.expand(4, 6), x_0, transitions.restrict(several, x_t), t)
    alone = [transitions.step_divergence(x_t, x_0, transitions.restrict(each, x_t), t) for each in several]
    assert torch.allclose(kl, torch.stack(alone))
    assert transitions.sample_marginal(x_0.expand(4, 6), t).shape == (4, 6)


@pytest.mark.parametrize("name", BUILD)
def test_draws_of_x_t_have_the_marginal(name):
    """20,000 draws; the twin is the law one step later."""
    process, n = CategoricalProcess(BUILD[name](K, T), (2,)), 20_000
    x_0 = torch.tensor([0, 3])
    draws = process.sample_marginal(x_0.expand(n, 2), torch.tensor(3))
    assert (draws.shape, draws.dtype) == ((n, 2), torch.int64)
    products = matrices(name)[1]
    for t, agrees in ((3, True), (4, False)):
        for d in range(2):
            p = products[t, x_0[d]]
            counts, possible = torch.bincount(draws[:, d], minlength=K), p > 1e-12
            assert counts[~possible].sum() == 0
            statistic = ((counts - n * p).square() / (n * p))[possible].sum()
            assert bool(statistic < scipy.stats.chi2.isf(1e-6, int(possible.sum()) - 1)) == agrees


@pytest.mark.parametrize("name", BUILD)
def test_the_prior_term(name):
    process = CategoricalProcess(BUILD[name](K, T), (2,))
    x_0 = torch.tensor([[0, 1], [3, 3], [2, 0]])
    rows, prior = matrices(name)[1][T, x_0], process.transitions.stationary.expand(3, 2, K)
    exact = torch.where(rows > 0, rows * (rows / prior).log(), 0).sum((-1, -2))
    assert torch.allclose(process.prior_divergence(x_0), exact, rtol=1e-9, atol=1e-15)
    if name == "gaussian":  # the twin: a term that forgets where x_0 is
        assert not torch.allclose(process.prior_divergence(x_0.flip(0)), exact, rtol=1e-3)


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.linear(1000),
        NoiseSchedule.cosine(10),
        NoiseSchedule.cosine(10).with_zero_terminal_snr(),
        NoiseSchedule.from_betas([1e-9]),
        NoiseSchedule.from_betas([0.3]),
    ],
)
def test_the_gaussian_prior_term(schedule):
    process, x_0 = GaussianProcess(schedule, (3,)).double(), torch.randn(4, 3)
    exact = kl_divergence(process.marginal(x_0, torch.tensor([schedule.num_timesteps])), process.prior())
    assert torch.allclose(process.prior_divergence(x_0), exact, rtol=1e-9, atol=1e-15)
    single = process.float().prior_divergence(x_0.float()).double()
    assert torch.allclose(single, exact, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("variance", ["beta", "posterior", "learned"])
@pytest.mark.parametrize("predict", ["eps", "x_0", "v", "mean"])
def test_the_divergence_of_a_gaussian_step(predict, variance):
    pair = pairs.tanh_ddpm(predict=predict, variance=variance)
    x_0, t = pairs.pixels(20), torch.randint(2, pair.num_timesteps + 1, (20,))
    x_t = pair.process.sample_marginal(x_0, t)
    output = pair.denoise(x_t, t).detach().requires_grad_()
    ours = pair.step_divergence(output, x_0, x_t, t)
    exact = kl_divergence(pair.process.posterior(x_t, x_0, t), pair.reverse_law(output, x_t, t))
    assert torch.allclose(ours, exact, rtol=1e-10)
    gradients = [torch.autograd.grad(kl.sum(), output)[0] for kl in (ours, exact)]
    assert torch.allclose(*gradients, rtol=1e-8, atol=1e-14)
    swapped = kl_divergence(pair.reverse_law(output, x_t, t), pair.process.posterior(x_t, x_0, t))
    assert variance == "posterior" or not torch.allclose(ours, swapped, rtol=1e-3)


@pytest.mark.parametrize("variance", ["beta", "learned"])
@pytest.mark.parametrize("predict", ["eps", "x_0", "v", "mean"])
def test_losses_are_the_same_with_the_noise_and_with_what_it_made(predict, variance):
    pair = pairs.tanh_ddpm(predict=predict, variance=variance)
    x_0, t = pairs.pixels(20), torch.randint(2, pair.num_timesteps + 1, (20,))
    torch.manual_seed(0)
    x_t, made_of = pair.draw_marginal(x_0, t)
    torch.manual_seed(0)
    assert torch.equal(x_t, pair.process.sample_marginal(x_0, t))
    assert list(made_of) == (["noise"] if predict in ("eps", "v") else [])
    output = pair.denoise(x_t, t).detach().requires_grad_()
    for loss in (pair.step_divergence, pair.auxiliary_loss):
        given, found = loss(output, x_0, x_t, t, **made_of), loss(output, x_0, x_t, t)
        assert torch.allclose(given, found, rtol=1e-10)
        gradients = [torch.autograd.grad(each.sum(), output)[0] for each in (given, found)]
        assert torch.allclose(*gradients, rtol=1e-8, atol=1e-14)
        if predict in ("eps", "v"):
            assert not torch.allclose(loss(output, x_0, x_t, t, noise=-made_of["noise"]), found, rtol=1e-3)


class Doubled(DDPM):
    """A loss of its own, without the noise."""

    def auxiliary_loss(self, output, x_0, x_t, t):
        return 2 * super().auxiliary_loss(output, x_0, x_t, t)


def test_a_loss_of_ones_own_needs_not_take_the_noise():
    network, x, values = torch.nn.Module(), torch.randn(5, 2), []
    network.forward = lambda x_t, t: 0 * x_t
    for kind in (Doubled, DDPM):
        torch.manual_seed(0)
        loss = DiffusionLoss(kind(network, NoiseSchedule.cosine(4), (2,), likelihood=Normal()), weights="simple")
        values.append(loss(x))
    assert torch.allclose(values[0], 2 * values[1])


class Wide(DDPM):
    """A reverse law of its own."""

    def reverse_law(self, output, x_t, t):
        law = super().reverse_law(output, x_t, t).base_dist
        return dist.Normal(law.loc, 2 * law.scale).to_event(len(self.data_shape))


class WideToo(Wide):
    """Inherits both."""


@pytest.mark.parametrize("kind", [Wide, WideToo])
def test_a_reverse_law_of_ones_own_is_the_one_that_is_trained(kind):
    network, x = torch.nn.Module(), torch.randn(5, 2)
    network.forward = lambda x_t, t: 0 * x_t
    wide, plain = (c(network, NoiseSchedule.cosine(4), (2,), likelihood=Normal()) for c in (kind, DDPM))
    t, values = torch.full((5,), 2), []
    for pair in (wide, plain):
        torch.manual_seed(0)
        values.append(DiffusionLoss(pair).term(x, t))
    torch.manual_seed(0)
    x_t = wide.process.sample_marginal(x, t + 1)
    exact = kl_divergence(wide.process.posterior(x_t, x, t + 1), wide.reverse(x_t, t + 1))
    assert torch.allclose(values[0], exact)
    assert not torch.allclose(values[1], exact, rtol=1e-2)


@pytest.mark.parametrize("kind", ["uniform", "absorbing"])
def test_both_losses_of_a_step_from_raw_logits(kind):
    """As from restricted ones, and in a graph of fixed shapes as outside of one; value and gradient."""
    transitions = {"uniform": uniform, "absorbing": absorbing}[kind](6, 5)
    x_0, t = torch.randint(5, (40, 3)), torch.randint(2, 6, (40, 1))
    x_t = transitions.sample_marginal(x_0, t)
    raw = torch.randn(40, 3, 6).requires_grad_()

    def losses(logits):
        return torch.stack(transitions.step_losses(x_t, x_0, logits, t))

    restricted = transitions.restrict(raw, x_t)
    exact = torch.stack(
        [
            Transitions.step_losses(transitions, x_t, x_0, restricted, t)[0],
            -restricted.log_softmax(-1).gather(-1, x_0[..., None])[..., 0],
        ]
    )
    (gradient,) = torch.autograd.grad(exact.sum(), raw, retain_graph=True)
    with torch.no_grad(), pyro.validation_enabled(False):
        traced = make_fx(losses)(raw)
    for ours in (losses(raw), losses(restricted), traced(raw)):
        assert torch.allclose(ours, exact, rtol=1e-9, atol=1e-12)
        found = torch.autograd.grad(ours.sum(), raw, retain_graph=True)[0]
        assert torch.allclose(found, gradient, rtol=1e-8, atol=1e-12)
    assert torch.equal(transitions.surprisal(x_t, x_0, raw), losses(raw)[1])
    assert not torch.allclose(losses(raw + torch.arange(6.0)), exact, rtol=1e-3)
