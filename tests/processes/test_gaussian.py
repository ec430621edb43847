"""Identities of notes 001 and 004 that tie transition, marginal and posterior together; precision; what is refused."""

import copy
import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_models.processes import GaussianProcess, NoiseSchedule

SCHEDULES = {
    "linear-1000": NoiseSchedule.linear(1000),
    "cosine-1000": NoiseSchedule.cosine(1000),
    "cosine-4": NoiseSchedule.cosine(4),
    "stds": NoiseSchedule.from_stds([0.1, 0.4, 0.2, 0.9]),
    "zero-terminal": NoiseSchedule.cosine(50).with_zero_terminal_snr(),
}
SHAPE = (2, 3)


@pytest.fixture(params=SCHEDULES)
def process(request):
    return GaussianProcess(SCHEDULES[request.param], SHAPE)


def steps(process, first=1):
    """At most 40 steps, both ends among them."""
    return torch.linspace(first, process.num_timesteps, min(40, process.num_timesteps)).long().unique()


def log_normal(x, loc, variance):
    """log N(x; loc, variance I) over the data dims, written out."""
    return (-0.5 * (x - loc) ** 2 / variance - 0.5 * math.log(2 * math.pi) - 0.5 * variance.log()).sum((-2, -1))


def test_composing_all_transitions_gives_the_marginal(process):
    """001: x_t = sqrt(alpha_t) x_{t-1} + ..., down to sqrt(A_t) x_0 + sqrt(1 - A_t) eps, means and variances step by step."""
    x_0 = torch.randn(SHAPE)
    mean, variance = x_0, torch.zeros(SHAPE)
    for t in range(1, process.num_timesteps + 1):
        t = torch.tensor(t)
        gain = process.transition(torch.ones(SHAPE), t).mean
        noise = process.transition(torch.zeros(SHAPE), t).variance
        mean, variance = gain * mean, gain**2 * variance + noise
        marginal = process.marginal(x_0, t)
        assert torch.allclose(marginal.mean, mean, rtol=1e-11, atol=0)
        assert torch.allclose(marginal.variance, variance, rtol=1e-11, atol=0)


def test_variances_telescope():
    """004: sum_k beta_k^2 prod_{j > k} lambda_j^2 = 1 - lambda-bar_i^2, with its standard deviations beta_k."""
    stds = torch.rand(30) * 0.3 + 0.01
    process = GaussianProcess(NoiseSchedule.from_stds(stds), ())
    for i in range(1, 31):
        total = sum(stds[k] ** 2 * (1 - stds[k + 1 : i] ** 2).prod() for k in range(i))
        assert process.marginal(torch.zeros(()), torch.tensor(i)).variance.item() == pytest.approx(
            float(total), rel=1e-13
        )
        without_square = sum(stds[k] ** 2 * (1 - stds[k + 1 : i] ** 2).sqrt().prod() for k in range(i))
        assert i == 1 or float(without_square) != pytest.approx(float(total), rel=1e-6)  # control


def bayes_error(process, weights=None, variance=None):
    """max |log q(x_t|x_{t-1}) + log q(x_{t-1}|x_0) - log q(x_t|x_0) - log q(x_{t-1}|x_t,x_0)|, and of its gradient."""
    t = steps(process, first=2)
    n = len(t)
    x_0, noise, more = torch.randn(3, n, *SHAPE)
    x_0.requires_grad_()
    previous = (
        (process.marginal(x_0, t - 1).mean + process.marginal(x_0, t - 1).stddev * noise).detach().requires_grad_()
    )
    x_t = (
        (process.transition(previous, t).mean + process.transition(previous, t).stddev * more).detach().requires_grad_()
    )
    posterior = process.posterior(x_t, x_0, t)
    if weights is not None:
        loc = weights(x_t, x_0, lambda name: process.coefficient(name, t, x_t))
        posterior = dist.Normal(loc, posterior.stddev).to_event(2)
    if variance is not None:
        posterior = dist.Normal(posterior.mean, process.coefficient(variance, t, x_t).sqrt()).to_event(2)
    joint = process.transition(previous, t).log_prob(x_t) + process.marginal(x_0, t - 1).log_prob(previous)
    error = joint - process.marginal(x_0, t).log_prob(x_t) - posterior.log_prob(previous)
    gradients = torch.autograd.grad(error.sum(), (x_0, previous, x_t))
    terms = torch.autograd.grad(posterior.log_prob(previous).sum(), previous)
    return float(error.detach().abs().max()), float(max((g / terms[0].abs().max()).abs().max() for g in gradients))


def test_bayes_rule_holds_for_every_draw_in_value_and_gradient(process):
    value, gradient = bayes_error(process)
    assert value < 1e-11
    assert gradient < 1e-11


BROKEN = {
    "mu-tilde as notes 001 print it": {"weights": lambda x_t, x_0, c: x_0 + (x_t - x_0) / c("marginal_variance")},
    "weights swapped": {
        "weights": lambda x_t, x_0, c: c("posterior_weight_x_t") * x_0 + c("posterior_weight_x_0") * x_t
    },
    "alpha-bar of t for t - 1": {
        "weights": lambda x_t, x_0, c: (
            (c("alpha_bar").sqrt() * c("beta") * x_0 + c("alpha").sqrt() * c("marginal_variance") * x_t)
            / c("marginal_variance")
        )
    },
    "beta for beta-tilde": {"variance": "beta"},
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("name", ["cosine-4", "linear-1000"])
def test_bayes_rule_catches_a_wrong_posterior(name, broken):
    value, gradient = bayes_error(GaussianProcess(SCHEDULES[name], SHAPE), **BROKEN[broken])
    assert value > 1e-3  # a hundred million times what the right one is allowed
    assert gradient > 1e-3


def test_bayes_rule_catches_a_wrong_schedule():
    process = GaussianProcess(SCHEDULES["linear-1000"], SHAPE)
    other = GaussianProcess(NoiseSchedule.cosine(1000), SHAPE)
    process.posterior = other.posterior
    assert bayes_error(process)[0] > 1e-2


def test_posterior_mean_and_variance_are_those_of_a_joint_gaussian():
    """Second derivation: condition the joint of (x_{t-1}, x_t) given x_0 by Schur complement."""
    process = GaussianProcess(SCHEDULES["stds"], ())
    bar = torch.tensor([1.0, *(1 - torch.tensor([0.1, 0.4, 0.2, 0.9]) ** 2).cumprod(0)])
    x_0, x_t = torch.tensor(0.7), torch.tensor(-1.3)
    for t in (2, 3, 4):
        gain = (bar[t] / bar[t - 1]).sqrt()
        before, cross, after = 1 - bar[t - 1], gain * (1 - bar[t - 1]), 1 - bar[t]
        mean = bar[t - 1].sqrt() * x_0 + cross / after * (x_t - bar[t].sqrt() * x_0)
        law = process.posterior(x_t, x_0, torch.tensor(t))
        assert law.mean.item() == pytest.approx(mean.item(), rel=1e-12)
        assert law.variance.item() == pytest.approx((before - cross**2 / after).item(), rel=1e-11)


def test_laws_are_the_normals_they_claim_to_be(process):
    t = steps(process)
    x, y = torch.randn(2, len(t), *SHAPE)
    beta = process.schedule.beta[t - 1][:, None, None]
    bar = process.schedule.alpha_bar[t - 1][:, None, None]
    assert torch.allclose(process.transition(x, t).log_prob(y), log_normal(y, (1 - beta).sqrt() * x, beta), rtol=1e-9)
    assert torch.allclose(process.marginal(x, t).log_prob(y), log_normal(y, bar.sqrt() * x, 1 - bar), rtol=1e-9)
    assert torch.allclose(process.prior().log_prob(y), log_normal(y, torch.zeros(()), torch.ones(())))


def test_at_step_one_the_posterior_is_a_point_mass():
    process = GaussianProcess(SCHEDULES["linear-1000"], SHAPE)
    x_0, x_1, t = torch.randn(5, *SHAPE), torch.randn(5, *SHAPE), torch.tensor([1, 1, 2, 3, 1])
    assert torch.allclose(process.posterior_mean(x_1, x_0, t)[[0, 1, 4]], x_0[[0, 1, 4]], rtol=1e-14)
    with pytest.raises(ValueError, match=r"expected t >= 2 .*point mass on x_0: mask"):
        process.posterior(x_1, x_0, t)
    with pyro.validation_enabled(False):
        assert (process.posterior(x_1, x_0, t).stddev[[0, 1, 4]] == 0).all()


def test_with_zero_terminal_snr_the_last_marginal_is_the_prior():
    process = GaussianProcess(SCHEDULES["zero-terminal"], SHAPE)
    x_0, last = torch.randn(4, *SHAPE), torch.tensor(process.num_timesteps)
    marginal, transition = process.marginal(x_0, last), process.transition(x_0, last)
    for law in (marginal, transition):
        assert (law.mean == 0).all()
        assert (law.variance == 1).all()
    before = process.marginal(x_0, last - 1)
    assert torch.allclose(process.posterior(torch.randn(4, *SHAPE), x_0, last).mean, before.mean)  # x_T says nothing
    assert not torch.allclose(process.posterior(x_0, x_0, last - 1).mean, process.marginal(x_0, last - 2).mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tables_stay_float64_and_laws_take_the_dtype_of_x(dtype):
    exact = GaussianProcess(SCHEDULES["linear-1000"], SHAPE)
    process = copy.deepcopy(exact).to(dtype)
    assert not process.state_dict()
    for name, buffer in process.named_buffers():
        assert buffer.dtype == (dtype if name.startswith("prior") else torch.float64)
    for back in (process.float(), process.half(), process.double()):
        for (name, a), (_, b) in zip(back.named_buffers(), exact.named_buffers(), strict=True):
            assert name.startswith("prior") or torch.equal(a.nan_to_num(-9.0), b.nan_to_num(-9.0))
    t = steps(process)
    x = torch.randn(len(t), *SHAPE).to(dtype)
    for law in (process.transition(x, t), process.marginal(x, t), process.to(dtype).prior()):
        assert law.mean.dtype == law.variance.dtype == dtype


@pytest.mark.parametrize("name", ["linear-1000", "cosine-1000"])
def test_float32_agrees_with_float64(name):
    """RELIABILITY 15: every coefficient and every law at T = 1000 to 1e-5 relative; tables made in float32 do not."""
    process = GaussianProcess(SCHEDULES[name], SHAPE)
    single = copy.deepcopy(process).float()
    t = torch.arange(2, 1001)
    x_0 = torch.randn(
        999, *SHAPE, dtype=torch.float32
    ).abs()  # one sign, so that the mean has no cancellation of its own
    x_t = torch.randn(999, *SHAPE, dtype=torch.float32).abs()
    for coefficient in process.names:
        got = single.coefficient(coefficient, t, x_0).double()
        want = process.coefficient(coefficient, t, x_0.double())
        assert torch.allclose(got, want, rtol=1e-6, atol=0), coefficient
    pairs = [
        (single.transition(x_t, t), process.transition(x_t.double(), t)),
        (single.marginal(x_0, t), process.marginal(x_0.double(), t)),
        (single.posterior(x_t, x_0, t), process.posterior(x_t.double(), x_0.double(), t)),
    ]
    for got, want in pairs:
        assert torch.allclose(got.mean.double(), want.mean, rtol=1e-5, atol=0)
        assert torch.allclose(got.stddev.double(), want.stddev, rtol=1e-5, atol=0)
    beta = process.schedule.beta.float()
    naive = 1 - (1 - beta).cumprod(0)
    assert not torch.allclose(naive.double(), process.schedule.marginal_variance, rtol=1e-5, atol=0)  # control


@pytest.mark.parametrize("data_shape", [(), (4,), (1, 8, 8)])
@pytest.mark.parametrize("batch", [(), (5,), (7, 5)])
def test_shapes_with_any_leading_dims(data_shape, batch):
    process = GaussianProcess(NoiseSchedule.cosine(10), data_shape)
    x = torch.randn((*batch, *data_shape))
    for t in {(), batch[-1:], (1,) * len(batch), batch}:
        t = torch.randint(2, 11, t)
        laws = process.transition(x, t), process.marginal(x, t), process.posterior(x, x, t)
        for law in laws:
            assert law.batch_shape == batch
            assert law.event_shape == data_shape
            assert law.log_prob(x).shape == batch
    assert process.prior().batch_shape == ()
    assert process.prior().event_shape == data_shape


def test_each_datum_gets_its_own_step():
    process = GaussianProcess(NoiseSchedule.cosine(10), SHAPE)
    x, t = torch.randn(3, 4, *SHAPE), torch.tensor([2, 10, 5, 7])
    whole = process.posterior(x, 2 * x, t)
    for i in range(4):
        alone = process.posterior(x[:, i], 2 * x[:, i], t[i])
        assert torch.equal(alone.mean, whole.mean[:, i])
        assert torch.equal(alone.stddev, whole.stddev[:, i])


def test_laws_trace_to_one_graph_for_all_steps():
    """Values decide no control flow: one graph, traced at some t, is right at any other."""
    process = GaussianProcess(NoiseSchedule.linear(100), SHAPE)

    def log_ratio(x_t, x_0, t):
        return process.marginal(x_0, t).log_prob(x_t) - process.posterior(x_t, x_0, t).log_prob(0.5 * x_0)

    x_t, x_0 = torch.randn(2, 4, *SHAPE)
    with pyro.validation_enabled(False):
        graph = make_fx(log_ratio)(x_t, x_0, torch.tensor([2, 3, 4, 5]))
        for t in (torch.tensor([100, 2, 50, 7]), torch.tensor([9, 9, 99, 2])):
            assert torch.equal(graph(x_t, x_0, t), log_ratio(x_t, x_0, t))


@pytest.mark.parametrize("t", [0, -1, 11, 100])
def test_steps_outside_are_refused(t):
    process = GaussianProcess(NoiseSchedule.cosine(10), SHAPE)
    x = torch.zeros(2, *SHAPE)
    for law in (process.transition, process.marginal, lambda x, t: process.posterior(x, x, t)):
        with pytest.raises(ValueError, match=rf"every t in 1..10, got {t}: steps are counted from 1"):
            law(x, torch.tensor([5, t]))


def test_without_validation_step_zero_is_never_taken_for_the_last():
    process = GaussianProcess(NoiseSchedule.cosine(10), SHAPE)
    with pyro.validation_enabled(False):
        assert process.marginal(torch.zeros(2, *SHAPE), torch.tensor([0, 10])).mean.isnan().tolist()[0][0][0]
        assert process.coefficient("beta", torch.tensor(0), torch.zeros(SHAPE)).isnan().all()


@pytest.mark.parametrize("t", [5, 5.0, torch.tensor(5.0), torch.tensor(5, dtype=torch.int32), None])
def test_t_is_a_long_tensor(t):
    process = GaussianProcess(NoiseSchedule.cosine(10), SHAPE)
    for law in (process.marginal, lambda x, t: process.posterior(x, x, t)):
        with pytest.raises(TypeError, match=r"expected t to be a LongTensor of steps 1..10, got"):
            law(torch.zeros(2, *SHAPE), t)


def test_other_bad_arguments_are_refused():
    process = GaussianProcess(NoiseSchedule.cosine(10), SHAPE)
    with pytest.raises(ValueError, match=r"expected data of shape \[\*batch, 2, 3\], got \[3, 2\]"):
        process.marginal(torch.zeros(3, 2), torch.tensor(1))
    with pytest.raises(TypeError, match=r"expected floating-point data, got torch.int64"):
        process.marginal(torch.zeros(3, *SHAPE, dtype=torch.long), torch.tensor(1))
    with pytest.raises(ValueError, match=r"against a batch of shape \[3\], got t of shape \[2\]"):
        process.marginal(torch.zeros(3, *SHAPE), torch.tensor([1, 2]))
    assert process.marginal(torch.zeros(4, 3, *SHAPE), torch.tensor([1, 2, 3])).batch_shape == (4, 3)
    with pytest.raises(ValueError, match=r"a coefficient among beta, .*got 'gamma'"):
        process.coefficient("gamma", torch.tensor(1), torch.zeros(SHAPE))


def test_a_process_prints_its_schedule_and_keeps_it():
    process = GaussianProcess(NoiseSchedule.cosine(10), SHAPE)
    assert "NoiseSchedule.cosine(10), data_shape=(2, 3)" in repr(process)
    assert json.dumps(process.schedule.config())
    assert process.num_timesteps == 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tables_move_to_the_gpu_in_float64():
    here = GaussianProcess(SCHEDULES["linear-1000"], SHAPE)
    there = copy.deepcopy(here).to("cuda", torch.float32)
    t, x_0 = steps(here), torch.randn(len(steps(here)), *SHAPE, dtype=torch.float32)
    assert there.get_buffer("_beta").dtype == torch.float64
    got, want = there.marginal(x_0.cuda(), t.cuda()), here.marginal(x_0, t)
    assert torch.allclose(got.mean.cpu(), want.mean)
    assert torch.allclose(got.stddev.cpu(), want.stddev)
    assert there.prior().mean.is_cuda


@pytest.mark.parametrize("hessian", [torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))])
def test_curvature_of_the_priors_divergence_is_alpha_bar_also_at_zero(hessian):
    process = GaussianProcess(NoiseSchedule.from_betas([0.3]), (4,))
    for x in (torch.zeros(4), torch.full((4,), 1e-25), torch.linspace(-1, 1, 4)):
        found = hessian(lambda q: process.prior_divergence(q[None]).sum())(x)
        assert torch.allclose(found, 0.7 * torch.eye(4, dtype=found.dtype))
