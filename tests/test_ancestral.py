"""The reverse-chain sampler against the programs, draw for draw, and against closed forms of affine chains.

z-tests hold at most 6.5 standard errors of some ten thousand draws: a false failure below 1e-8 for the family.
"""

import math
from functools import partial

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from inference.ancestral import (
    ancestral_sample,
    ancestral_trajectory,
    interpolation,
)
from inference.bounds.diffusion import decompose_diffusion
from inference.bounds.sites import NotANumberError
from inference.respacing import respaced
from ppl_models import VAE, LinearGaussian
from ppl_models.ddpm import DDPM
from ppl_models.likelihoods import Bernoulli, DiscretizedNormal, Normal
from ppl_models.processes import GaussianProcess, NoiseSchedule
from tests.bounds import diffusion_pairs as pairs
from tests.oracles import gaussian_diffusion as oracle

Z_MAX = 6.5
T = 12
SCHEDULE = NoiseSchedule.cosine(T)
LOC, SCALE = 0.7, 0.4
N = 20_000


class Best(nn.Module):
    """The best denoiser of data N(LOC, SCALE^2), predicting what is asked for; every chain with it is affine."""

    def __init__(self, predict: str, learned: bool = False) -> None:
        super().__init__()
        self.predict, self.learned = predict, learned
        self.process = GaussianProcess(SCHEDULE, (1,))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        a, v = (self.process.coefficient(name, t, x_t) for name in ("sqrt_alpha_bar", "marginal_variance"))
        x_0 = LOC + a * SCALE**2 / (a.square() * SCALE**2 + v) * (x_t - a * LOC)
        if self.predict == "eps":
            out = (x_t - a * x_0) / v.sqrt()
        elif self.predict == "v":
            out = (a * x_t - x_0) / v.sqrt()
        elif self.predict == "mean":
            out = self.process.posterior_mean(x_t, x_0, t)
        else:
            out = x_0
        return torch.stack([out, 0.5 + 0 * out], -1) if self.learned else out


def best(predict: str = "x_0", variance: str = "beta") -> DDPM:
    return DDPM(Best(predict, variance == "learned"), SCHEDULE, (1,), predict, variance, Normal())


def coefficients(timesteps: list[int]) -> list[dict[str, float]]:
    """alpha-bar at t and at the step below, and the affine x_0-hat = c + k x_t, in plain numpy."""
    angle = np.arange(T + 1) / T
    f = np.cos(np.pi / 2 * (angle + 0.008) / 1.008) ** 2
    beta = np.minimum(1 - f[1:] / f[:-1], 0.999)
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - beta)])
    found = []
    for below, t in zip([0, *timesteps[:-1]], timesteps, strict=True):
        a = math.sqrt(alpha_bar[t])
        k = a * SCALE**2 / (alpha_bar[t] * SCALE**2 + 1 - alpha_bar[t])
        found.append({"here": alpha_bar[t], "below": alpha_bar[below], "k": k, "c": LOC - k * a * LOC})
    return found


def law_of_samples(timesteps: list[int], eta: float, variance: str) -> tuple[float, float]:
    """Mean and variance of x_0: Song et al. 2021, eq. 12, step by step; at eta = 1 the pair's own variance."""
    m, v = 0.0, 1.0
    for i, step in reversed(list(enumerate(coefficients(timesteps)))):
        here, below = step["here"], step["below"]
        beta = 1 - here / below
        tilde = beta * (1 - below) / (1 - here)
        if i == 0:
            noise = beta if eta == 1 else 0.0
            sigma = 0.0
        else:
            own = {"beta": beta, "posterior": tilde}[variance]
            noise = own if eta == 1 else eta**2 * tilde
            sigma = eta * math.sqrt(tilde)
        direction = math.sqrt(max(1 - below - sigma**2, 0.0)) / math.sqrt(1 - here)
        # x_below = sqrt(below) x_0-hat + direction (x_t - sqrt(here) x_0-hat) + noise, with x_0-hat = c + k x_t
        weight = math.sqrt(below) - direction * math.sqrt(here)
        gain, offset = weight * step["k"] + direction, weight * step["c"]
        m, v = gain * m + offset, gain**2 * v + noise
    return m, v


def assert_law(x: Tensor, mean: float, variance: float) -> None:
    n = len(x)
    assert abs(float(x.mean()) - mean) < Z_MAX * math.sqrt(variance / n)
    assert abs(float(x.var()) / variance - 1) < Z_MAX * math.sqrt(2 / (n - 1))


PAIRS = {
    "vae": lambda: VAE.preset((3,), Bernoulli(), latent_dim=2, hidden=(4,)),
    "linear-gaussian": lambda: LinearGaussian.random(3, 2),
    "pixels": pairs.tanh_ddpm,
    "learned": lambda: pairs.tanh_ddpm(variance="learned"),
    "continuous": lambda: pairs.continuous_ddpm(predict="eps"),
    "one-step": lambda: pairs.continuous_ddpm(num_timesteps=1),
    "linear-diffusion": pairs.linear,
    "classes": pairs.d3pm,
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_same_noise_gives_the_model_s_numbers(name):
    pair = PAIRS[name]()
    torch.manual_seed(5)
    expected = pair.model(size=50).detach()
    torch.manual_seed(5)
    x = ancestral_sample(pair, 50)
    assert x.dtype == expected.dtype
    assert torch.allclose(x.double(), expected.double(), rtol=1e-12, atol=1e-12)
    assert not x.requires_grad


class Wide(DDPM):
    """A reverse law of its own, which the short form of a step must not pass over."""

    def reverse_law(self, output, x_t, t):
        law = super().reverse_law(output, x_t, t).base_dist
        return dist.Normal(law.loc, 2 * law.scale).to_event(len(self.data_shape))


@pytest.mark.parametrize("variance", ["beta", "posterior", "learned"])
@pytest.mark.parametrize("predict", ["eps", "x_0", "v", "mean"])
def test_a_step_is_a_draw_from_the_reverse_law(predict, variance):
    pair = best(predict, variance)
    wide = Wide(pair.network, pair.process.schedule, pair.data_shape, predict, variance, pair.likelihood)
    x_t = torch.randn(30, *pair.data_shape)
    draws = []
    for each in (pair, wide):
        for t in (2, T):
            output = each.denoise(x_t, torch.tensor([t]))
            torch.manual_seed(3)
            draws.append(each.draw_previous(output, x_t, t))
            torch.manual_seed(3)
            expected = each.reverse_law(output, x_t, torch.tensor([t]))()
            assert torch.allclose(draws[-1], expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(draws[0], draws[2], rtol=1e-3)


def test_its_law_is_the_dense_oracle_s():
    kernels = [oracle.reverse_kernels((0.1, 0.25, 0.4, 0.7), m, s) for m, s in zip(pairs.LOC, pairs.SCALE, strict=True)]
    x = ancestral_sample(pairs.linear(), N, seed=0)
    for i, k in enumerate(kernels):
        mean, cov = oracle.model(k)
        assert_law(x[:, i], mean[0], cov[0, 0])


@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [None, 5, [3, 12]])
def test_eta_and_respacing_have_their_closed_form(steps, eta, variance):
    timesteps = {None: list(range(1, T + 1)), 5: [1, 4, 6, 9, 12]}.get(
        steps if not isinstance(steps, list) else 0, [3, 12]
    )
    x = ancestral_sample(best("eps", variance), N, steps, eta=eta, seed=0)
    assert_law(x[:, 0], *law_of_samples(timesteps, eta, variance))


def test_another_law_would_be_seen():
    x = ancestral_sample(best("eps"), N, 5, eta=0.5, seed=0)
    for wrong in (([3, 12], 0.5, "beta"), ([1, 4, 6, 9, 12], 1.0, "beta"), (list(range(1, 13)), 0.5, "beta")):
        with pytest.raises(AssertionError):
            assert_law(x[:, 0], *law_of_samples(*wrong))


@pytest.mark.parametrize("eta", [0.25, 0.5, 0.75])
def test_one_step_has_the_noise_and_the_direction_of_eta(eta):
    run = ancestral_trajectory(best("eps"), N, eta=eta, keep=[7, 6], seed=0)
    step = coefficients(list(range(1, T + 1)))[6]
    beta = 1 - step["here"] / step["below"]
    variance = eta**2 * beta * (1 - step["below"]) / (1 - step["here"])
    direction = math.sqrt(1 - step["below"] - variance) / math.sqrt(1 - step["here"])
    x_0 = step["c"] + step["k"] * run.states[7]
    mean = math.sqrt(step["below"]) * x_0 + direction * (run.states[7] - math.sqrt(step["here"]) * x_0)
    assert_law((run.states[6] - mean)[:, 0], 0.0, variance)
    with pytest.raises(AssertionError):
        assert_law((run.states[6] - mean)[:, 0], 0.0, 1.1 * variance)


def test_without_noise_it_is_a_function_of_x_T():
    run = ancestral_trajectory(best("eps"), 50, eta=0.0, keep=[T, 0], seed=0)
    x, slope, offset = run.states[T], 1.0, 0.0
    for i, step in reversed(list(enumerate(coefficients(list(range(1, T + 1)))))):
        direction = math.sqrt(1 - step["below"]) / math.sqrt(1 - step["here"]) if i else 0.0
        weight = math.sqrt(step["below"]) - direction * math.sqrt(step["here"])
        gain, shift = weight * step["k"] + direction, weight * step["c"]
        slope, offset = gain * slope, gain * offset + shift
    assert torch.allclose(run.x_0, offset + slope * x, rtol=1e-9, atol=1e-9)
    assert torch.equal(run.x_0, run.states[0])


@pytest.mark.parametrize("predict", ["eps", "v", "mean"])
@pytest.mark.parametrize("options", [{}, {"steps": 5}, {"steps": 5, "eta": 0.3}, {"eta": 0.0}, {"clip": (0.0, 1.0)}])
def test_every_parameterisation_gives_the_same_numbers(predict, options):
    for variance in ("beta", "posterior", "learned"):
        a, b = (ancestral_sample(best(p, variance), 20, seed=1, **options) for p in ("x_0", predict))
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance", ["beta", "posterior", "learned"])
def test_all_steps_respaced_are_the_chain_itself(variance):
    pair = pairs.tanh_ddpm(num_timesteps=6, variance=variance)
    a, b = (ancestral_sample(pair, 30, steps, seed=2) for steps in (None, 6))
    assert torch.allclose(a, b)


def test_a_respaced_pair_predicts_the_same_and_has_a_bound():
    pair, x = pairs.tanh_ddpm(num_timesteps=20, variance="learned", predict="eps"), pairs.pixels(5)
    coarse = respaced(pair, [1, 7, 20])
    assert coarse.num_timesteps == 3
    noisy = torch.randn(5, 2)
    for i, t in enumerate((1, 7, 20), 1):
        fine, step = torch.full((5,), t), torch.full((5,), i)
        assert torch.allclose(
            coarse.predict_x_0(coarse.denoise(noisy, step), noisy, step),
            pair.predict_x_0(pair.denoise(noisy, fine), noisy, fine),
        )
        assert torch.allclose(coarse.process.marginal(x, step).mean, pair.process.marginal(x, fine).mean)
    assert decompose_diffusion(coarse, x, num_particles=4).elbo.isfinite().all()
    assert [p is q for p, q in zip(coarse.parameters(), pair.parameters(), strict=True)]


def test_clipping_is_named_and_bounds_the_prediction():
    pair = best("eps")
    run = ancestral_trajectory(pair, 200, clip=(0.5, 0.6), eta=0.0, keep=[5, 1], seed=0)
    assert run.clip == (0.5, 0.6)
    assert set(run.clipped) == set(range(1, T + 1))
    assert 0 < run.clipped[5] <= 1
    exact = ((run.predictions[5] < 0.5) | (run.predictions[5] > 0.6)).double().mean()
    assert run.clipped[5] == pytest.approx(float(exact))
    assert run.x_0.min() >= 0.5
    assert run.x_0.max() <= 0.6
    assert run.law.startswith("not the model's own law: DDIM with eta = 0, x_0-hat clipped to [0.5, 0.6], ")
    free = ancestral_trajectory(pair, 200, clip=(-100.0, 100.0), seed=0)
    assert set(free.clipped.values()) == {0.0}
    assert torch.allclose(free.x_0, ancestral_sample(pair, 200, seed=0))


@pytest.mark.parametrize("steps", [None, 1])
@pytest.mark.parametrize(("eta", "spread"), [(1.0, 1.0), (0.0, 0.0)])
def test_the_last_step_is_clipped_too_and_counted(steps, eta, spread):
    class Five(nn.Module):
        def forward(self, x_t, t):
            return 5 + 0 * x_t

    pair = DDPM(Five(), NoiseSchedule([0.1, 0.2, 0.3]), (3,), "x_0", likelihood=Normal())
    run = ancestral_trajectory(pair, 4000, steps, eta=eta, clip=(-1, 1), seed=0)
    assert set(run.clipped.values()) == {1.0}
    assert run.law.endswith("x_0-hat clipped to [-1, 1], 100 % of it at most")
    beta = 0.1 if steps is None else 1 - 0.9 * 0.8 * 0.7  # of the first step, whose scale p(x_0 | x_1) has
    assert abs(run.x_0.mean() - 1) <= spread * 5 * (beta / run.x_0.numel()) ** 0.5
    assert run.x_0.std().item() == pytest.approx(spread * beta**0.5, rel=0.05)
    unclipped = ancestral_trajectory(pair, 4000, steps, eta=eta, seed=0)
    assert abs(unclipped.x_0.mean() - 5) <= spread * 5 * (beta / run.x_0.numel()) ** 0.5 + 1e-6


def test_what_is_kept():
    pair = pairs.continuous_ddpm(num_timesteps=9)
    run = ancestral_trajectory(pair, 6, keep=[9, 4, 0], seed=0)
    assert sorted(run.states) == [0, 4, 9]
    assert sorted(run.predictions) == [4, 9]
    t = torch.tensor(4)
    predicted = pair.predict_x_0(pair.denoise(run.states[4], t), run.states[4], t).detach()
    assert torch.allclose(run.predictions[4], predicted)
    assert run.timesteps == tuple(range(9, -1, -1))
    assert run.law == "the model's own law"
    assert ancestral_trajectory(pair, 6, 3, keep=[9, 1], seed=0).timesteps == (9, 5, 1, 0)
    assert ancestral_trajectory(pairs.d3pm(), 6, keep=[2], seed=0).states[2].shape == (6, 2)


def test_batches_and_seeds():
    pair = pairs.continuous_ddpm()
    state = torch.get_rng_state()
    whole = ancestral_trajectory(pair, 10, keep=[2], clip=(-1, 1), seed=4, batch_size=4)
    assert torch.equal(state, torch.get_rng_state())
    assert whole.x_0.shape == whole.states[2].shape == (10, 2)
    assert torch.equal(whole.x_0[:4], ancestral_sample(pair, 4, clip=(-1, 1), seed=4))
    assert torch.equal(whole.x_0, ancestral_sample(pair, 10, clip=(-1, 1), seed=4, batch_size=4))
    assert not torch.equal(whole.x_0, ancestral_sample(pair, 10, clip=(-1, 1), seed=5, batch_size=4))
    assert ancestral_sample(LinearGaussian.random(3, 2), 10, batch_size=3).shape == (10, 3)


def test_samples_are_data():
    pair = pairs.tanh_ddpm()
    pair.check_data(ancestral_sample(pair, 200))
    assert ancestral_sample(pairs.d3pm(), 20).dtype == torch.int64


def test_modes_are_put_back_and_dropout_is_off():
    pair = pairs.continuous_ddpm()
    pair.network.body.append(nn.Dropout(0.999))
    pair.train()
    ancestral_sample(pair, 5)
    assert pair.network.body[-1].training
    pair.eval()
    torch.manual_seed(0)
    expected = pair.model(size=5).detach()
    pair.train()
    torch.manual_seed(0)
    assert torch.allclose(ancestral_sample(pair, 5), expected)


def test_one_network_call_a_step():
    pair = pairs.continuous_ddpm(num_timesteps=30)
    start = pair.network.calls
    ancestral_sample(pair, 3)
    assert pair.network.calls - start == 30
    ancestral_trajectory(pair, 3, steps=7, keep=[30, 1], clip=(-1, 1))
    assert pair.network.calls - start == 30 + 7 + 1  # and one to look at the respaced pair's output


def test_a_compiled_network():
    """Through dynamo; one graph serves every step, as t is a tensor."""
    pair = pairs.continuous_ddpm(num_timesteps=20)
    expected = ancestral_sample(pair, 4, seed=0)
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    pair.network.forward = torch.compile(pair.network.body.forward, backend=backend)  # type: ignore[method-assign]
    body = pair.network.forward
    pair.network.forward = lambda x_t, t: body(torch.cat([x_t, (t[..., None] / 20).to(x_t.dtype)], -1))
    assert torch.allclose(ancestral_sample(pair, 4, seed=0), expected)
    assert len(compiled) == 1


def preset_ddpm(num_timesteps: int, variance: str = "learned") -> DDPM:
    """With one of the library's networks, which does not count its calls."""
    torch.manual_seed(0)
    return DDPM.preset((2,), Normal(), num_timesteps, network="mlp", hidden=8, blocks=1, variance=variance)  # type: ignore


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (preset_ddpm, {}),
        (partial(preset_ddpm, variance="beta"), {}),
        (preset_ddpm, {"steps": 9, "eta": 0.5}),
        (preset_ddpm, {"clip": (-0.5, 0.5)}),
        (pairs.d3pm, {}),
    ],
    ids=["learned variance", "variance beta", "DDIM", "clipped", "D3PM"],
)
def test_the_compiled_sampler(make, options):
    """The same numbers, and graphs of the network alone, which serve every t: compiled once, however long the chain."""
    pair = make(num_timesteps=20)
    ordinary = ancestral_sample(pair, 4, seed=0, **options)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(ancestral_sample, backend=backend)(pair, 4, seed=0, **options)
    assert torch.allclose(compiled, ordinary)
    assert 1 <= len(graphs) <= 3
    torch._dynamo.reset()


class NotANumberAt3(nn.Module):
    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return torch.where((t == 3)[..., None], torch.nan, x_t)


def test_a_network_that_returns_nan_is_named_with_its_step():
    pair = DDPM(NotANumberAt3(), NoiseSchedule.cosine(8), (2,), "x_0", likelihood=Normal())
    with pytest.raises(NotANumberError, match="got NaN at step 3: look"):
        ancestral_sample(pair, 2)
    ancestral_sample(pair, 2, [1, 8])  # which passes by it


def test_interpolation_weights_are_those_of_004_and_the_printed_ones_are_not():
    """In the letters of 004: alpha = sqrt(1 - std^2), alpha-bar the running product; A and B as corrected."""
    std = np.array([0.2, 0.3, 0.5, 0.8])
    alpha = np.sqrt(1 - std**2)
    bar = np.cumprod(alpha)
    found = interpolation(GaussianProcess(NoiseSchedule.from_stds(std), (1,)))
    a = 1 / alpha - (1 - alpha**2) / (alpha * (1 - bar**2))
    b = (1 - alpha**2) * bar / (alpha * (1 - bar**2))
    assert np.allclose(found.x_t, a)
    assert np.allclose(found.x_0, b)
    assert found.t.tolist() == [1, 2, 3, 4]
    printed = 1 / bar - (1 - bar**2) / (bar * (1 - bar**2)), (1 - bar**2) * bar / (bar * (1 - bar**2))
    assert not np.allclose(found.x_t[1:], printed[0][1:])
    assert not np.allclose(found.x_0[1:], printed[1][1:])


def test_interpolation_weights_are_the_update():
    """x_{t-1} - noise = A_t x_t + B_t x_0-hat for every parameterisation, by the pair's own reverse law."""
    weights = interpolation(GaussianProcess(SCHEDULE, (1,)))
    x_t = torch.randn(T, 1)
    for predict in ("eps", "x_0", "v", "mean"):
        pair = best(predict)
        output = pair.denoise(x_t, weights.t)
        mean = weights.x_t[:, None] * x_t + weights.x_0[:, None] * pair.predict_x_0(output, x_t, weights.t)
        assert torch.allclose(pair.mean(output, x_t, weights.t), mean)


def test_options_may_be_numpy_s():
    plain = ancestral_trajectory(best("eps"), 5, eta=0.5, clip=(-1.0, 1.0), seed=0)
    other = ancestral_trajectory(best("eps"), 5, eta=np.float32(0.5), clip=np.array([-1, 1]), seed=0)
    assert torch.equal(plain.x_0, other.x_0)
    assert other.clip == (-1.0, 1.0)


def test_float32_and_discretised_data():
    torch.set_default_dtype(torch.float32)
    pair = DDPM(pairs.Tanh(), NoiseSchedule.cosine(4), (2,), "eps", likelihood=DiscretizedNormal(levels=5))
    for options in ({}, {"steps": 2}, {"eta": 0.5}, {"clip": (-1.0, 1.0)}):
        assert ancestral_sample(pair, 3, **options).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ancestral_sample(best(), 0), ValueError, "whole num_samples >= 1, got 0"),
        (lambda: ancestral_sample(best(), 2, batch_size=0), ValueError, "whole batch_size >= 1"),
        (lambda: ancestral_sample(best(), 2, 13), ValueError, "between 1 and T = 12 steps, got 13"),
        (lambda: ancestral_sample(best(), 2, [1, 5]), ValueError, "with 12 among them"),
        (lambda: ancestral_sample(best(), 2, [1.5, 12]), TypeError, "whole numbers as steps, got 1.5"),
        (lambda: ancestral_sample(best(), 2, True), TypeError, "whole numbers as steps, got True"),
        (lambda: ancestral_sample(best(), 2, 2.5), TypeError, "whole numbers as steps, got 2.5"),
        (lambda: ancestral_sample(best(), True), ValueError, "whole num_samples >= 1, got True"),
        (lambda: ancestral_sample(best(), 2, seed=1.5), TypeError, "whole numbers as seed, got 1.5"),
        (lambda: ancestral_sample(best(), 2, eta="a"), ValueError, r"eta in \[0, 1\].*got 'a'"),
        (lambda: ancestral_sample(best(), 2, clip=1.0), ValueError, "low < high, got 1.0"),
        (lambda: ancestral_sample(best(), 2, clip="ab"), ValueError, "low < high, got 'ab'"),
        (lambda: ancestral_sample(best(), 2, clip=(-1, 1, 2)), ValueError, "low < high, got"),
        (lambda: ancestral_sample(best(), 2, [0, 12]), ValueError, "with 12 among them"),
        (lambda: ancestral_sample(best(), 2, [3, 3, 12]), ValueError, "distinct timesteps"),
        (lambda: ancestral_sample(best(), 2, eta=1.5), ValueError, r"eta in \[0, 1\]"),
        (lambda: ancestral_sample(best(), 2, clip=(1, -1)), ValueError, "low < high"),
        (lambda: ancestral_trajectory(best(), 2, keep=[13]), ValueError, r"keep among the steps that are visited"),
        (lambda: ancestral_trajectory(best(), 2, 2, keep=[5]), ValueError, r"0 and 1, 12, got \[5\]"),
        (lambda: ancestral_sample(pairs.d3pm(), 2, 2), ValueError, "with a DDPM only, got a D3PM"),
        (lambda: ancestral_sample(pairs.d3pm(), 2, eta=0.0), ValueError, "with a DDPM only, got a D3PM"),
        (lambda: ancestral_sample(LinearGaussian.random(2, 1), 2, 2), ValueError, "with a diffusion only"),
        (lambda: ancestral_trajectory(LinearGaussian.random(2, 1), 2, keep=[1]), ValueError, "with a diffusion only"),
        (lambda: respaced(pairs.d3pm(), [1, 3]), TypeError, "expected a DDPM, whose steps compose"),
        (lambda: respaced(best(), [3, 2]), ValueError, r"increasing timesteps in 1\.\.12"),
        (lambda: respaced(best(), [1.5, 12]), TypeError, r"a sequence of whole numbers, got \[1.5, 12\]"),
        (lambda: respaced(best(), [True, 12]), TypeError, r"a sequence of whole numbers, got \[True, 12\]"),
        (lambda: respaced(best(), 5), TypeError, "a sequence of whole numbers, got 5: give a list"),
        (lambda: ancestral_sample(best(), 2, seed=-1), ValueError, "a seed >= 0, got -1"),
        (lambda: interpolation(best()), TypeError, "a GaussianProcess, got DDPM: pass ddpm.process"),
    ],
)
def test_bad_calls_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
