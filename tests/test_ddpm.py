"""DDPM: four parameterisations of one mean, three variances, the decoder at t = 1, what is refused."""

import json
import math

import pyro
import pytest
import scipy.stats
import torch
from pyro import poutine
from torch import Tensor, nn

from ppl_models import registry
from ppl_models.ddpm import DDPM
from ppl_models.hvae import HVAE
from ppl_models.likelihoods import Bernoulli, Categorical, DiscretizedNormal, Normal
from ppl_models.processes import NoiseSchedule

BETAS = (0.1, 0.25, 0.4, 0.7)
T, D = len(BETAS), 3


class Network(nn.Module):
    """A network by hand; ``outputs`` numbers per dimension."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.body = nn.Linear(D + 1, D * outputs)
        self.outputs = outputs

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        y = self.body(torch.cat([x_t, t[..., None].to(x_t.dtype) / T], -1))
        return y if self.outputs == 1 else y.reshape(*y.shape[:-1], D, self.outputs)


class Equivalent(nn.Module):
    """What an eps-network says, said as x_0 or as the mean, from the definitions (notes 001 and 003)."""

    def __init__(self, network: nn.Module, predict: str) -> None:
        super().__init__()
        self.network, self.predict = network, predict

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        beta = torch.tensor(BETAS)
        alpha_bar = (1 - beta).cumprod(0)
        b, a, bar = (v[t - 1][..., None] for v in (beta, 1 - beta, alpha_bar))
        eps = self.network(x_t, t)
        if self.predict == "x_0":
            return (x_t - (1 - bar).sqrt() * eps) / bar.sqrt()
        if self.predict == "v":
            x_0 = (x_t - (1 - bar).sqrt() * eps) / bar.sqrt()
            return bar.sqrt() * eps - (1 - bar).sqrt() * x_0
        return (x_t - b / (1 - bar).sqrt() * eps) / a.sqrt()


def ddpm(predict="eps", variance="beta", likelihood=None, betas=BETAS, network=None):
    torch.manual_seed(0)
    network = network or Network(2 if variance == "learned" else 1)
    return DDPM(network, NoiseSchedule(betas), (D,), predict, variance, likelihood or Normal())


def data(n=4):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(1))


# One mean, four parameterisations


def site_log_probs(pair, x):
    """Every site's log-density in model and guide at one draw."""
    pyro.set_rng_seed(0)
    q = poutine.trace(pair.guide).get_trace(x)
    p = poutine.trace(poutine.replay(pair.model, trace=q)).get_trace(x)
    for trace in (p, q):
        trace.compute_log_prob()
    return {
        (side, name): trace.nodes[name]["log_prob"]
        for side, trace in (("p", p), ("q", q))
        for name in (*pair.latent_sites, "x_0")
        if name in trace.nodes
    }


@pytest.mark.parametrize(
    "likelihood", [lambda: Normal(), lambda: DiscretizedNormal(levels=256)], ids=["normal", "discretized"]
)
@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize("predict", ["x_0", "v", "mean"])
def test_equivalent_networks_give_identical_numbers(predict, variance, likelihood):
    x = ((data().clamp(-1, 1) + 1) / 2 * 255).round() / 255 * 2 - 1  # on the grid of 256 levels
    eps = ddpm("eps", variance, likelihood())
    other = ddpm(predict, variance, likelihood(), network=Equivalent(eps.network, predict))
    want, got = site_log_probs(eps, x), site_log_probs(other, x)
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-10, atol=1e-10, msg=str(key))
    x_t, t = data(), torch.arange(1, T + 1)
    for name in ("predict_x_0", "predict_eps", "mean"):
        first, second = (getattr(p, name)(p.denoise(x_t, t), x_t, t) for p in (eps, other))
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10, msg=name)
    losses = [p.auxiliary_loss(p.denoise(x_t, t), data(), x_t, t) for p in (eps, other)]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)


def test_the_same_network_read_as_another_prediction_gives_other_numbers():
    eps = ddpm("eps")
    other = ddpm("x_0", network=eps.network)
    want, got = site_log_probs(eps, data()), site_log_probs(other, data())
    assert all((got["p", s] - want["p", s]).abs().min() > 1e-6 for s in ("x_3", "x_2", "x_1", "x_0"))
    assert torch.equal(got["p", "x_4"], want["p", "x_4"])


def test_auxiliary_loss_is_the_squared_error_of_the_noise():
    pair, x_0 = ddpm("x_0"), data()
    eps, t = torch.randn(4, D), torch.tensor([1, 2, 3, 4])
    bar = (1 - torch.tensor(BETAS)).cumprod(0)[:, None]
    x_t = bar.sqrt() * x_0 + (1 - bar).sqrt() * eps
    output = pair.denoise(x_t, t)
    guess = (x_t - bar.sqrt() * output) / (1 - bar).sqrt()
    loss = pair.auxiliary_loss(output, x_0, x_t, t)
    torch.testing.assert_close(loss, (eps - guess).square().sum(-1))
    perfect = pair.auxiliary_loss(x_0, x_0, x_t, t)
    torch.testing.assert_close(perfect, torch.zeros(4), atol=1e-20, rtol=0)


# Variances, and the decoder at t = 1


def step_variances(pair):
    x_t, t = data(), torch.tensor([2, 3, 4, 4])
    return pair.reverse_law(pair.denoise(x_t, t), x_t, t).variance


def beta_tilde(t):
    bar = (1 - torch.tensor(BETAS)).cumprod(0)
    return BETAS[t - 1] * (1 - bar[t - 2]) / (1 - bar[t - 1])


def test_fixed_variances_are_the_schedules():
    want = torch.tensor([BETAS[1], BETAS[2], BETAS[3], BETAS[3]])[:, None].expand(4, D)
    torch.testing.assert_close(step_variances(ddpm(variance="beta")), want)
    want = torch.stack([beta_tilde(t) for t in (2, 3, 4, 4)])[:, None].expand(4, D)
    torch.testing.assert_close(step_variances(ddpm(variance="posterior")), want)


class ConstantV(nn.Module):
    def __init__(self, v: float) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.tensor(v))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return torch.stack([x_t, self.v.expand_as(x_t)], -1)


def test_learned_variance_is_between_the_two_on_a_log_scale():
    ends = torch.tensor([[beta_tilde(t), BETAS[t - 1]] for t in (2, 3, 4, 4)])
    low, high, middle = (step_variances(ddpm(variance="learned", network=ConstantV(v))) for v in (-40.0, 40.0, 0.0))
    torch.testing.assert_close(low[:, 0], ends[:, 0])
    torch.testing.assert_close(high[:, 0], ends[:, 1])
    torch.testing.assert_close(middle[:, 0], ends.prod(-1).sqrt())
    assert (step_variances(ddpm(variance="learned")) > ends.min(-1).values[:, None]).all()


def decoder_scale(pair):
    law = pair.reconstruction(data()).base_dist
    return law.scale.detach().expand(4, D)


@pytest.mark.parametrize(
    ("variance", "likelihood", "want"),
    [
        ("beta", lambda: Normal(), BETAS[0] ** 0.5),
        ("posterior", lambda: Normal(), BETAS[0] ** 0.5),
        ("beta", lambda: DiscretizedNormal(levels=9), BETAS[0] ** 0.5),
        ("posterior", lambda: DiscretizedNormal(levels=9), BETAS[0] ** 0.5),
        ("beta", lambda: Normal(scale=None), BETAS[0] ** 0.5),
        ("beta", lambda: Normal(scale=0.1), 0.1),  # the number that is Normal's default, but stated
        ("beta", lambda: DiscretizedNormal(levels=9, scale="learned"), 0.1),
        ("posterior", lambda: DiscretizedNormal(levels=9, init_scale=0.3), 0.3),
    ],
)
def test_decoder_at_step_one_has_variance_beta_1_unless_the_likelihood_states_its_own(variance, likelihood, want):
    pair = ddpm(variance=variance, likelihood=likelihood())
    torch.testing.assert_close(decoder_scale(pair), torch.full((4, D), want))
    x_1 = data()
    step = torch.ones(4, dtype=torch.int64)
    mean = pair.mean(pair.denoise(x_1, step), x_1, step)
    torch.testing.assert_close(pair.reconstruction(x_1).base_dist.loc, mean)


def test_learned_decoder_at_step_one_is_between_beta_tilde_2_and_beta_1():
    low, high = (decoder_scale(ddpm(variance="learned", network=ConstantV(v))).square() for v in (-40.0, 40.0))
    torch.testing.assert_close(low, beta_tilde(2).expand(4, D))
    torch.testing.assert_close(high, torch.full((4, D), BETAS[0]))
    single = ddpm("x_0", "learned", betas=(0.4,), network=ConstantV(-40.0))  # no second step to borrow from
    torch.testing.assert_close(decoder_scale(single).square(), torch.full((4, D), 0.4))


def test_default_decoder_is_the_notes_discretised_gaussian():
    """Notes 003, last display, by scipy: bins of half-width 1/255 around N(mu(x_1, 1), beta_1), open at the ends."""
    torch.manual_seed(0)
    pair = DDPM(Network(), NoiseSchedule(BETAS), (D,))
    x_1, x_0 = data(), torch.tensor([[-1.0, 1.0, 1 / 255]] * 4)
    step = torch.ones(4, dtype=torch.int64)
    mean, scale = pair.mean(pair.denoise(x_1, step), x_1, step).detach().numpy(), BETAS[0] ** 0.5
    cdf = lambda edge: scipy.stats.norm.cdf(edge, mean, scale)  # noqa: E731
    upper, lower = cdf(x_0.numpy() + 1 / 255), cdf(x_0.numpy() - 1 / 255)
    upper[:, 1], lower[:, 0] = 1.0, 0.0
    want = torch.tensor(upper - lower).log().sum(-1)
    torch.testing.assert_close(pair.reconstruction(x_1).log_prob(x_0).detach(), want, rtol=1e-8, atol=0)


def test_every_parameter_gets_a_finite_gradient():
    for likelihood in (Normal(), DiscretizedNormal(levels=9), DiscretizedNormal(levels=9, scale="learned")):
        for variance in ("beta", "learned"):
            pair = ddpm("x_0", variance, likelihood)
            x = pair.model(size=5).detach()
            trace = poutine.trace(pair.model).get_trace(x)
            assert {n for n, s in trace.nodes.items() if s["type"] == "param"} == {
                name.replace(".", "$$$", 1) for name, _ in pair.named_parameters()
            }
            trace.log_prob_sum().backward()
            assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in pair.parameters())


# DDPM is an HVAE whose encoders are fixed


class Encoder(nn.Module):
    """q(x_t | x_{t-1}) as an HVAE's encoder (notes 002: "encoding fixed")."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (1 - self.beta) ** 0.5 * x, torch.full_like(x, self.beta**0.5)


class Decoder(nn.Module):
    """p(x_{t-1} | x_t) as an HVAE's decoder: eps-prediction by the formulas of notes 003."""

    def __init__(self, network: nn.Module, t: int) -> None:
        super().__init__()
        self.network, self.t = network, t

    def forward(self, x_t: Tensor) -> tuple[Tensor, Tensor]:
        beta = BETAS[self.t - 1]
        alpha_bar = math.prod(1 - b for b in BETAS[: self.t])
        eps = self.network(x_t, torch.full(x_t.shape[:-1], self.t))
        mean = (x_t - beta / (1 - alpha_bar) ** 0.5 * eps) / (1 - beta) ** 0.5
        return mean, torch.full_like(x_t, beta**0.5)


def as_hvae(pair, betas=BETAS):
    encoders = [Encoder(b) for b in betas]
    decoders = [Decoder(pair.network, t) for t in range(1, T + 1)]
    return HVAE(encoders, decoders, [D] * T, Normal(scale=None))


def hvae_log_probs(pair, x):
    pyro.set_rng_seed(0)
    q = poutine.trace(pair.guide).get_trace(x)
    p = poutine.trace(poutine.replay(pair.model, trace=q)).get_trace(x)
    p.compute_log_prob()
    q.compute_log_prob()
    terms = {f"x_{t}": p.nodes[f"z_{t}"]["log_prob"] - q.nodes[f"z_{t}"]["log_prob"] for t in range(1, T + 1)}
    return terms | {"x_0": p.nodes["x"]["log_prob"]}


def test_ddpm_is_an_hvae_with_the_fixed_guide():
    """Identical terms, site by site, at the same noise (notes 002)."""
    pair, x = ddpm(), data()
    mine = site_log_probs(pair, x)
    other = hvae_log_probs(as_hvae(pair), x)
    for name, value in other.items():
        want = mine["p", name] - mine.get(("q", name), 0)
        torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-10, msg=name)
    wrong = hvae_log_probs(as_hvae(pair, betas=(0.1, 0.25, 0.4, 0.6)), x)
    assert (wrong["x_4"] - other["x_4"]).abs().min() > 1e-6  # the twin: another encoder is seen


# What is refused, and what is kept


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: ddpm(predict="score"), ValueError, "expected predict 'eps', 'x_0', 'v' or 'mean', got 'score'"),
        (lambda: ddpm(variance="free"), ValueError, "expected variance 'beta', 'posterior' or 'learned', got 'free'"),
        (lambda: ddpm(betas=(0.5, 1.0)), ValueError, "expected alpha_bar_T > 0 with predict='eps', got 0"),
        (lambda: DDPM(Network(), list(BETAS), (3,)), TypeError, "a NoiseSchedule, got list: NoiseSchedule.from_betas"),
        (lambda: DDPM(Network(), NoiseSchedule(BETAS), 3), TypeError, r"sequence of sizes such as \(3,\), got 3"),
        (lambda: DDPM(lambda x, t: x, NoiseSchedule(BETAS), (3,)), TypeError, "as a torch module, got function"),
        (lambda: ddpm(likelihood=Bernoulli()), TypeError, "a location and a scale, got Bernoulli"),
        (lambda: ddpm(likelihood=Categorical(4)), TypeError, "a location and a scale, got Categorical"),
        (lambda: ddpm(network=Network(2)), ValueError, r"2 data to have shape \[2, 3\], got \[2, 3, 2\]"),
        (lambda: ddpm(variance="learned", network=Network()), ValueError, r"to have shape \[2, 3, 2\], got \[2, 3\]"),
        (
            lambda: DDPM(Network(), NoiseSchedule(BETAS), (4,)),
            ValueError,
            r"to take x_t of shape \[2, 4\] and t of shape \[2\], but it fails \(mat1 and mat2",
        ),
        (lambda: ddpm(network=FirstDatumOnly()), ValueError, r"2 data to have shape \[2, 3\], got \[1, 3\]"),
        (lambda: ddpm(network=Pair()), TypeError, "one tensor of shape .*, got tuple: return the tensor itself"),
        (
            lambda: preset(schedule="quadratic"),
            ValueError,
            "a schedule among linear, cosine, geometric, got 'quadratic'",
        ),
        (
            lambda: preset(network="grid", predict="x_0"),
            ValueError,
            "with network='grid', got 'x_0', 'learned' and Disc",
        ),
        (lambda: preset(Normal, network="grid"), ValueError, "'eps', 'learned' and Normal"),
        (lambda: preset(network="cnn"), ValueError, "a network among auto, mlp, unet, grid, got 'cnn'"),
    ],
)
def test_bad_arguments_are_refused_at_construction(build, error, match):
    with pytest.raises(error, match=match):
        build()


class FirstDatumOnly(nn.Module):
    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t[:1]


class Table(nn.Module):
    """An embedding of 0..T-1, as in libraries that count from 0; ``shift`` is what is taken from t."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.table, self.shift = nn.Embedding(T, D), shift

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t + self.table(t - self.shift)


def test_a_network_that_counts_from_zero_is_found_at_construction():
    with pytest.raises(ValueError, match=r"every t in 1..4, but it fails at t = 1 and 4 .*give it t - 1"):
        ddpm(network=Table(0))
    assert ddpm(network=Table(1)).model(size=2).shape == (2, D)


class Pair(nn.Module):
    def forward(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x_t, x_t


@pytest.mark.parametrize("predict", ["x_0", "v", "mean"])
def test_zero_terminal_snr_is_fine_for_the_other_predictions(predict):
    pair = ddpm(predict, betas=(0.5, 1.0))
    x_t, t = data(2), torch.tensor([1, 2])
    output = pair.denoise(x_t, t)
    for name in ("predict_x_0", "predict_eps", "mean"):
        assert getattr(pair, name)(output, x_t, t).isfinite().all()
    assert all(v.isfinite().all() for v in site_log_probs(pair, data()).values())


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.full((2, D), 1.5), "evenly spaced values in \\[-1, 1\\], but x\\[0, 0\\] is 1.5"),
        (torch.full((2, D), 0.3), "evenly spaced values in \\[-1, 1\\], but x\\[0, 0\\] is 0.3"),
        (torch.full((2, D), 7.0), "integer grey levels"),
    ],
)
def test_data_outside_the_decoders_grid_are_refused(x, match):
    with pytest.raises(ValueError, match=match):
        ddpm(likelihood=DiscretizedNormal(levels=17)).check_data(x)


PARTS_OF_A_DDPM = {
    "DDPM": "ppl_models.ddpm:DDPM",
    "NoiseSchedule": "ppl_models.processes.schedules:NoiseSchedule.from_config",
    "ResidualMLP": "ppl_models.networks.residual_mlp:ResidualMLP",
    "UNet": "ppl_models.networks.unet:UNet",
    "GridDenoiser": "ppl_models.networks.grid_denoiser:GridDenoiser",
}


def preset(likelihood=None, **options):
    likelihood = likelihood() if likelihood else DiscretizedNormal(levels=17)
    return DDPM.preset((8, 8), likelihood, 21, hidden=8, blocks=1, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": "linear", "variance": "learned", "predict": "x_0"},
        {"network": "unet", "variance": "learned"},
        {"likelihood": lambda: Normal(), "predict": "mean", "variance": "posterior"},
        {"likelihood": lambda: DiscretizedNormal(levels=9, scale="learned")},
    ],
    ids=["default", "mlp-learned", "unet-learned", "normal", "learned-scale"],
)
def test_a_preset_is_rebuilt_from_its_description(options, monkeypatch):
    """The description is JSON; its parts make the same numbers again."""
    for name, home in PARTS_OF_A_DDPM.items():
        monkeypatch.setitem(registry.PARTS, name, home)
    pair = preset(**options)
    again = registry.build(json.loads(json.dumps(registry.describe(pair)))).to(torch.float64)
    again.load_state_dict(pair.state_dict())
    assert registry.describe(again) == registry.describe(pair)
    x = pair.model(size=2).detach()
    want, got = site_log_probs(pair, x), site_log_probs(again, x)
    assert all(torch.equal(got[key], value) for key, value in want.items())


def test_float32_runs_and_stays_float32():
    pair = ddpm(variance="learned").float()
    x = pair.model(size=3)
    assert x.dtype == torch.float32
    t = torch.tensor([0, 2, T])
    for program in (pair.guide, pair.posterior_guide, lambda x: pair.term_guide(x, t)):
        nodes = poutine.trace(program).get_trace(x).nodes
        assert all(s["value"].dtype == torch.float32 for n, s in nodes.items() if n.startswith("x_"))
    terms = poutine.trace(pair.term_model).get_trace(x, t)
    terms.compute_log_prob()
    assert all(terms.nodes[s]["log_prob"].dtype == torch.float32 for s in ("x_t", "x_0"))


def test_construction_leaves_the_networks_mode_and_the_random_state_alone():
    network = nn.Sequential()
    network.inner = Network()
    network.inner.eval()
    network.forward = lambda x_t, t: network.inner(x_t, t)
    state = torch.get_rng_state()
    ddpm_ = DDPM(network, NoiseSchedule(BETAS), (D,), likelihood=Normal())
    assert torch.equal(torch.get_rng_state(), state)
    assert ddpm_.network.training
    assert not ddpm_.network.inner.training


def test_a_preset_chooses_schedule_and_network_by_the_data():
    """The noise of x_1 is the same share of the step between two levels, whatever their number."""
    for levels in (2, 17, 256):
        schedule = DDPM.preset((4,), DiscretizedNormal(levels=levels), 21).process.schedule
        noise = float((schedule.beta[0] / (1 - schedule.beta[0])).sqrt())
        assert noise / (2 / (levels - 1)) == pytest.approx(math.exp(-7.8 / 2) / (2 / 16), rel=1e-9)
    chosen = [DDPM.preset(shape, DiscretizedNormal(levels=levels), 21).network for shape, levels in SHAPES_AND_LEVELS]
    assert [type(network).__name__ for network in chosen] == ["GridDenoiser", "ResidualMLP", "UNet", "ResidualMLP"]
    stated = DDPM.preset((28, 28), DiscretizedNormal(levels=256), 21, network="mlp", hidden=24, blocks=2).network
    assert (stated.config()["hidden"], stated.config()["blocks"]) == (24, 2)
    with pytest.raises(ValueError, match="hidden"):
        DDPM.preset((4,), DiscretizedNormal(levels=256), 21, hidden=0)


SHAPES_AND_LEVELS = [((28, 28), 17), ((8, 8), 256), ((3, 28, 28), 256), ((200,), 256)]
