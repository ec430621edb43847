"""One bound, three derivations: the forward guide, the posterior guide and the single terms, on chains known exactly.

The expectations of affine Gaussian chains are taken by cubature (tests/oracles/cubature.py), so that equality of values and
of gradients is a matter of rounding and every negative control is caught with certainty.
"""

import contextlib
import copy
import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from inference import decompose_diffusion
from ppl_models.ddpm import DDPM
from ppl_models.likelihoods import DiscretizedNormal, Normal
from ppl_models.linear_diffusion import LinearDiffusion
from ppl_models.processes import NoiseSchedule
from tests.oracles import gaussian_diffusion as oracle
from tests.oracles import mixture_diffusion as mixture
from tests.oracles.cubature import Cubature

BETAS = (0.1, 0.25, 0.4, 0.7)
T, D = len(BETAS), 2
LOC, SCALE = (0.5, -1.0), (0.8, 0.3)
Z_MAX = 6.5  # two-sided tail 8e-11, so that all z-tests of a run together fail below 1e-6


class Affine(nn.Module):
    """weight_t x_t + bias_t: with it a DDPM is a chain of affine Gaussians."""

    def __init__(self, num_timesteps: int = T, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(0.5 * torch.randn(num_timesteps, D, generator=generator))
        self.bias = nn.Parameter(0.5 * torch.randn(num_timesteps, D, generator=generator))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.weight[t - 1] * x_t + self.bias[t - 1]


class Tanh(nn.Module):
    """A small network that is not affine; ``outputs`` numbers per dimension, on a last axis of their own if not one."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D + 1, 8), nn.Tanh(), nn.Linear(8, D * outputs))
        self.outputs = outputs
        self.calls = 0

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        y = self.body(torch.cat([x_t, t[..., None].to(x_t.dtype) / 4], -1))
        return y if self.outputs == 1 else y.reshape(*y.shape[:-1], D, self.outputs)


def affine(predict: str = "eps", variance: str = "beta", betas: tuple[float, ...] = BETAS) -> DDPM:
    return DDPM(Affine(len(betas)), NoiseSchedule(betas), (D,), predict, variance, Normal())


def linear(guide: str = "process", zero_snr: bool = False) -> LinearDiffusion:
    schedule = NoiseSchedule(BETAS)
    return LinearDiffusion(schedule.with_zero_terminal_snr() if zero_snr else schedule, LOC, SCALE, guide)


def data(n: int = 3) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(5))


def affine_kernels(pair: DDPM, dim: int) -> list[oracle.Kernel]:
    """The reverse kernels of an affine DDPM in one dimension, from the definitions in numpy."""
    beta = pair.process.schedule.beta.numpy()
    alpha_bar = np.cumprod(1 - beta)
    kernels = []
    for i, b in enumerate(beta):
        w, c = pair.network.weight[i, dim].item(), pair.network.bias[i, dim].item()
        before = alpha_bar[i - 1] if i else 1.0
        if pair.predict == "eps":
            factor = b / np.sqrt(1 - alpha_bar[i])
            gain, offset = (1 - factor * w) / np.sqrt(1 - b), -factor * c / np.sqrt(1 - b)
        elif pair.predict == "x_0":
            on_x_0 = np.sqrt(before) * b / (1 - alpha_bar[i])
            gain = on_x_0 * w + np.sqrt(1 - b) * (1 - before) / (1 - alpha_bar[i])
            offset = on_x_0 * c
        elif pair.predict == "v":  # x_0 = sqrt(alpha-bar) x_t - sqrt(1 - alpha-bar) v
            on_x_0, noise = np.sqrt(before) * b / (1 - alpha_bar[i]), np.sqrt(1 - alpha_bar[i])
            gain = on_x_0 * (np.sqrt(alpha_bar[i]) - noise * w) + np.sqrt(1 - b) * (1 - before) / (1 - alpha_bar[i])
            offset = -on_x_0 * noise * c
        else:
            gain, offset = w, c
        variance = b if pair.variance == "beta" or i == 0 else b * (1 - before) / (1 - alpha_bar[i])
        kernels.append((gain, offset, variance))
    return kernels


def exact_elbo(pair: DDPM, x: Tensor) -> float:
    """Sum over the data of the ELBO, by the dense oracle."""
    betas = pair.process.schedule.beta.tolist()
    return sum(
        oracle.elbo(betas, affine_kernels(pair, dim), float(row[dim])) for row in x for dim in range(pair.data_shape[0])
    )


class Uncounted(Messenger):
    """The density of one site does not count."""

    def __init__(self, site):
        super().__init__()
        self.site = site

    def _pyro_sample(self, msg):
        if msg["name"] == self.site:
            msg["mask"] = False


def log_terms(model, guide, x, *particles):
    """Each site's log p - log q at one draw, ``[*particles, B]``, for outer particle plates of these sizes."""
    with contextlib.ExitStack() as stack:
        for i, size in enumerate(particles[::-1]):
            stack.enter_context(pyro.plate(f"particles_{i}", size, dim=-2 - i))
        q = poutine.trace(guide).get_trace(x)
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(x)
    p.compute_log_prob()
    q.compute_log_prob()
    sites = [name for name in p.stochastic_nodes + p.observation_nodes if p.nodes[name]["type"] == "sample"]
    sites = [name for name in sites if name.startswith("x_")]
    return {s: p.nodes[s]["log_prob"] - (q.nodes[s]["log_prob"] if s in q.nodes else 0) for s in sites}


def by_cubature(elbo, model, guide, shapes, *args) -> Tensor:
    """Pyro's own differentiable loss, its particles being the points of the cubature."""
    cubature = Cubature(shapes)
    return elbo(
        num_particles=cubature.num_particles, vectorize_particles=True, max_plate_nesting=1
    ).differentiable_loss(model, cubature(guide), *args)


def chain_loss(elbo, pair, guide, x):
    return by_cubature(elbo, pair.model, guide, dict.fromkeys(pair.latent_sites, (D,)), x)


def term_loss(pair, x, t, elbo=Trace_ELBO, model=None):
    return by_cubature(elbo, model or pair.term_model, pair.term_guide, {"x_next": (D,), "x_t": (D,)}, x, t)


def each_term(pair, x):
    """All data under all t = 0..T, as one batch."""
    steps = torch.arange(pair.num_timesteps + 1)
    return x.repeat(len(steps), 1), steps.repeat_interleave(len(x))


DERIVATIONS = {
    "Trace_ELBO, guide": lambda pair, x: chain_loss(Trace_ELBO, pair, pair.guide, x),
    "Trace_ELBO, posterior_guide": lambda pair, x: chain_loss(Trace_ELBO, pair, pair.posterior_guide, x),
    "TraceMeanField_ELBO, posterior_guide": lambda pair, x: chain_loss(
        TraceMeanField_ELBO, pair, pair.posterior_guide, x
    ),
    "Trace_ELBO, single terms": lambda pair, x: term_loss(pair, *each_term(pair, x)),
    "TraceMeanField_ELBO, single terms": lambda pair, x: term_loss(pair, *each_term(pair, x), TraceMeanField_ELBO),
}


# One bound, three derivations


@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize("predict", ["eps", "x_0", "v", "mean"])
@pytest.mark.parametrize("name", DERIVATIONS)
def test_every_derivation_is_the_exact_bound(name, predict, variance):
    pair, x = affine(predict, variance), data()
    with torch.no_grad():
        loss = DERIVATIONS[name](pair, x)
    assert float(-loss) == pytest.approx(exact_elbo(pair, x), rel=1e-10)


@pytest.mark.parametrize("name", DERIVATIONS)
def test_every_derivation_has_the_exact_gradient(name):
    """Against central differences of the dense oracle, every parameter of the chain."""
    pair, x = affine(), data()
    DERIVATIONS[name](pair, x).backward()
    for parameter in pair.parameters():
        for index in itertools.product(*map(range, parameter.shape)):
            ends = []
            with torch.no_grad():
                value = parameter[index].item()
                for step in (1e-5, -1e-5):
                    parameter[index] = value + step
                    ends.append(-exact_elbo(pair, x))
                parameter[index] = value
            assert float(parameter.grad[index]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-6)


def test_a_chain_of_one_step():
    pair, x = affine("x_0", betas=(0.4,)), data()
    exact = exact_elbo(pair, x)
    for name, derivation in DERIVATIONS.items():
        assert float(-derivation(pair, x).detach()) == pytest.approx(exact, rel=1e-10), name


def test_each_term_is_its_closed_form():
    """L_t one by one, not only their sum, for every datum; value and gradient."""
    pair, x = linear(), data()
    exact = pair.terms(x)
    for t, row in enumerate(exact):
        for b, value in enumerate(row):
            loss = term_loss(pair, x[b : b + 1], torch.tensor([t]))
            assert float(loss.detach()) == pytest.approx(float(value.detach()), rel=1e-10), (t, b)
        got = torch.autograd.grad(
            term_loss(pair, x, torch.full((len(x),), t)), list(pair.parameters()), allow_unused=True
        )
        want = torch.autograd.grad(row.sum(), list(pair.parameters()), retain_graph=True)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(torch.zeros_like(w) if g is None else g, w, rtol=1e-9, atol=1e-9)


def _without_factor_t(pair, x):
    """The objective that draws one t in 0..T-1 and forgets to multiply by T, in expectation over t."""
    inner = sum(term_loss(pair, x, torch.full((len(x),), t)) for t in range(T)) / T
    return inner + term_loss(pair, x, torch.full((len(x),), T))


def _flipped(pair, x):
    """L_0 with its sign flipped."""
    rest = sum(term_loss(pair, x, torch.full((len(x),), t)) for t in range(1, T + 1))
    return rest - term_loss(pair, x, torch.zeros(len(x), dtype=torch.int64))


def _without_prior_term(pair, x):
    """L_VLB as notes 003 print it, without L_T."""
    return sum(term_loss(pair, x, torch.full((len(x),), t)) for t in range(T))


def _other_schedule(pair, x):
    other = affine(betas=(0.1, 0.25, 0.4, 0.6))
    return chain_loss(Trace_ELBO, pair, other.guide, x)


def _swapped(pair, x):
    """log q - log p at every latent."""
    cubature = Cubature(dict.fromkeys(pair.latent_sites, (D,)))
    terms = log_terms(pair.model, cubature(pair.guide), x, cubature.num_particles)
    return -(terms["x_0"] - sum(terms[s] for s in pair.latent_sites)).mean(0).sum()


def _missing_step(pair, x):
    """The reverse kernel of x_2 left out of p."""
    shapes = dict.fromkeys(pair.latent_sites, (D,))
    return by_cubature(Trace_ELBO, Uncounted("x_2")(pair.model), pair.guide, shapes, x)


FAULTS = {
    "dropped factor T": _without_factor_t,
    "flipped sign of the reconstruction": _flipped,
    "L_T left out": _without_prior_term,
    "wrong schedule in the guide": _other_schedule,
    "p and q swapped": _swapped,
    "missing reverse kernel": _missing_step,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught_by_the_same_comparison(fault):
    pair, x = affine(), data()
    with torch.no_grad():
        loss = float(FAULTS[fault](pair, x))
    assert abs(-loss - exact_elbo(pair, x)) > 1e-2


# Everything known: the linear diffusion


def kernels_of_data():
    return [oracle.reverse_kernels(BETAS, m, s) for m, s in zip(LOC, SCALE, strict=True)]


def test_exact_reverse_kernels_are_the_oracles():
    got = torch.stack(linear()._kernels()).detach()  # [3, T, D]
    want = torch.tensor(kernels_of_data())  # [D, T, 3]
    torch.testing.assert_close(got, want.permute(2, 1, 0), rtol=1e-10, atol=1e-12)


def test_evidence_and_elbo_are_the_dense_oracles():
    pair, x, kernels = linear(), data(), kernels_of_data()
    evidence = [sum(oracle.log_evidence(k, float(row[i])) for i, k in enumerate(kernels)) for row in x]
    bound = [sum(oracle.elbo(BETAS, k, float(row[i])) for i, k in enumerate(kernels)) for row in x]
    with torch.no_grad():
        torch.testing.assert_close(pair.log_evidence(x), torch.tensor(evidence), rtol=1e-10, atol=0)
        torch.testing.assert_close(pair.elbo(x), torch.tensor(bound), rtol=1e-10, atol=0)
    assert (pair.elbo(x) < pair.log_evidence(x)).all()


def test_at_zero_terminal_snr_the_evidence_is_the_data_s_own_density():
    x = data()
    want = torch.distributions.Normal(torch.tensor(LOC), torch.tensor(SCALE)).log_prob(x).sum(-1)
    torch.testing.assert_close(linear(zero_snr=True).log_evidence(x).detach(), want, rtol=1e-12, atol=0)


CERTIFIED = {
    "exact guide": lambda: (linear("exact"), "guide"),
    "guide, zero terminal SNR": lambda: (linear(zero_snr=True), "guide"),
    "posterior guide, zero terminal SNR": lambda: (linear(zero_snr=True), "posterior_guide"),
}


def draws(model, guide, x, n=50):
    with torch.no_grad():
        return log_terms(model, guide, x, n)


@pytest.mark.parametrize("name", CERTIFIED)
def test_zero_variance_certificate(name):
    """With the posterior as guide every draw gives log p(x_0): a wrong term has nowhere to hide."""
    pair, guide = CERTIFIED[name]()
    x = data()
    total = sum(draws(pair.model, getattr(pair, guide), x).values())
    evidence = pair.log_evidence(x).detach()
    assert float(((total - evidence) / evidence).abs().max()) < 1e-10


@pytest.mark.parametrize("name", CERTIFIED)
@pytest.mark.parametrize("fault", ["wrong schedule", "p and q swapped", "missing factor"])
def test_zero_variance_certificate_rejects_a_fault(name, fault):
    pair, guide = CERTIFIED[name]()
    x, model = data(), pair.model
    if fault == "wrong schedule":
        other = LinearDiffusion(NoiseSchedule((0.1, 0.25, 0.4, 0.6)), LOC, SCALE, pair.guide_kind)
        total = sum(draws(model, getattr(other, guide), x).values())
    elif fault == "missing factor":
        total = sum(draws(Uncounted("x_2")(model), getattr(pair, guide), x).values())
    else:
        terms = draws(model, getattr(pair, guide), x)
        total = terms["x_0"] - sum(terms[s] for s in pair.latent_sites)
    assert float(total.std(0).min()) > 1e-2


def test_generated_data_have_the_evidence_as_law():
    """z-tests of mean and variance of x_0 in each dimension."""
    pair, n = linear(), 20_000
    with torch.no_grad():
        x = pair.model(size=n)
    for dim, kernels in enumerate(kernels_of_data()):
        mean, cov = oracle.model(kernels)
        error = (x[:, dim] - mean[0]) / cov[0, 0] ** 0.5
        assert abs(float(error.mean())) * n**0.5 < Z_MAX
        assert abs(float(error.square().mean()) - 1) * (n / 2) ** 0.5 < Z_MAX
        assert abs(float((error + 0.1).mean())) * n**0.5 > Z_MAX  # a mean wrong by 0.1 sd is seen


# A model that is not affine: a mixture's own denoiser, by quadrature


class MixtureDenoiser(nn.Module):
    """E[x_0 | x_t] for x_0 ~ sum_k w_k N(m_k, s_k^2), by the posterior weights of its components."""

    weights, locs, scales = (torch.tensor(v) for v in ([0.3, 0.7], [-1.0, 0.8], [0.2, 0.4]))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = (1 - torch.tensor(BETAS)).cumprod(0)[t - 1][..., None, None]
        x = x_t[..., None]
        variance = alpha_bar * self.scales**2 + 1 - alpha_bar
        residual = x - alpha_bar.sqrt() * self.locs
        responsible = (self.weights.log() - 0.5 * (variance.log() + residual.square() / variance)).softmax(-1)
        return (responsible * (self.locs + alpha_bar.sqrt() * self.scales**2 * residual / variance)).sum(-1)


def test_terms_of_a_mixture_model_are_the_quadratures():
    """A reverse mean that is not affine: z-tests of each L_t, 1 <= t < T, against a double integral by Bayes' rule."""
    network, n, x_0 = MixtureDenoiser(), 100_000, 0.4
    pair = DDPM(network, NoiseSchedule(BETAS), (1,), "x_0", "beta", Normal())
    parts = [np.asarray(part) for part in (network.weights, network.locs, network.scales)]
    for t in range(1, T):
        got = network(torch.tensor([[0.3]]), torch.tensor([t]))
        assert got.item() == pytest.approx(mixture.denoise(*parts, BETAS, t, 0.3), rel=1e-6)

        def mean(x_next, t=t):
            step = torch.tensor([t + 1])
            x = torch.tensor([[x_next]])
            return pair.mean(network(x, step), x, step).item()

        want = mixture.term(BETAS, t, x_0, mean, BETAS[t])
        x, steps = torch.full((n, 1), x_0), torch.full((n,), t)
        terms = log_terms(lambda x, s=steps: pair.term_model(x, s), lambda x, s=steps: pair.term_guide(x, s), x)
        error = float(terms["x_t"].std()) / n**0.5
        assert abs(float(-terms["x_t"].mean()) - want) < Z_MAX * error
        assert 0.2 * want > 1.5 * Z_MAX * error, t  # power: an error of 20 % is seen


# A chain that is not Gaussian: values and gradients by z-tests


def tanh_ddpm():
    torch.manual_seed(3)
    return DDPM(Tanh(2), NoiseSchedule(BETAS), (D,), "x_0", "learned", DiscretizedNormal(levels=17))


def grid_data(n=2):
    return torch.tensor([[-1.0, 0.25], [0.5, 1.0], [0.0, -0.75]])[:n]


def moments(loss, pair, repeats=30):
    """Means and variances of the mean over repeats of a loss and of its gradient along each parameter's own direction."""
    rows = []
    for _ in range(repeats):
        value = loss()
        gradients = torch.autograd.grad(value, list(pair.parameters()), allow_unused=True)
        rows.append(torch.stack([value.detach(), *(g.sum() for g in gradients)]))
    rows = torch.stack(rows)
    return rows.mean(0), rows.var(0) / repeats


def statistical(pair, x, name, particles=100):
    elbo = (TraceMeanField_ELBO if "MeanField" in name else Trace_ELBO)(
        num_particles=particles, vectorize_particles=True, max_plate_nesting=1
    )
    if "single" in name:
        return lambda: elbo.differentiable_loss(pair.term_model, pair.term_guide, *each_term(pair, x))
    guide = pair.posterior_guide if "posterior" in name else pair.guide
    return lambda: elbo.differentiable_loss(pair.model, guide, x)


def test_derivations_agree_for_a_nonlinear_network_a_learned_variance_and_pixels():
    pair, x = tanh_ddpm(), grid_data()
    results = {name: moments(statistical(pair, x, name), pair) for name in DERIVATIONS}
    for (a, (mean, error)), (b, (other, other_error)) in itertools.combinations(results.items(), 2):
        z = (mean - other) / (error + other_error).sqrt()
        assert float(z.abs().max()) < Z_MAX, (a, b)
    mean, error = results["Trace_ELBO, guide"]
    assert float(error[0].sqrt()) * 2 * Z_MAX < 0.2 * float(mean[0].abs())  # power: an error of 20 % is seen


def test_a_wrong_schedule_is_caught_for_that_network_too():
    """The twin: the same p, the guide of the process with the steps in reverse order: 10 standard errors off."""
    pair, x = tanh_ddpm(), grid_data()
    other = DDPM(pair.network, NoiseSchedule(BETAS[::-1]), (D,), "x_0", "learned", DiscretizedNormal(levels=17))
    elbo = Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1)
    mean, error = moments(statistical(pair, x, "Trace_ELBO, guide", 200), pair, 30)
    wrong, wrong_error = moments(lambda: elbo.differentiable_loss(pair.model, other.guide, x), pair, 30)
    assert abs(float(mean[0] - wrong[0])) > Z_MAX * float((error + wrong_error)[0]) ** 0.5


# Programs


def test_sites_are_named_by_step_in_one_data_plate():
    pair, x = tanh_ddpm(), grid_data()
    assert pair.latent_sites == ("x_4", "x_3", "x_2", "x_1")
    for program in (pair.model, pair.guide, pair.posterior_guide):
        nodes = poutine.trace(program).get_trace(x).nodes
        assert {n for n in nodes if n in pair.latent_sites} == set(pair.latent_sites)
        for name in pair.latent_sites:
            assert [(f.name, f.dim, f.size) for f in nodes[name]["cond_indep_stack"]] == [("data", -1, len(x))]
    assert poutine.trace(pair.model).get_trace(x).nodes["x_0"]["is_observed"]
    assert poutine.trace(pair.model).get_trace(size=7).nodes["x_0"]["value"].shape == (7, D)


@pytest.mark.parametrize("particles", [(), (3,), (2, 3)])
@pytest.mark.parametrize("guide", ["guide", "posterior_guide"])
def test_programs_run_under_outer_particle_plates(guide, particles):
    pair, x = tanh_ddpm(), grid_data()
    terms = log_terms(pair.model, getattr(pair, guide), x, *particles)
    assert all(term.shape == (*particles, len(x)) for term in terms.values())
    x_0, t = each_term(pair, x)
    terms = log_terms(lambda x: pair.term_model(x, t), lambda x: pair.term_guide(x, t), x_0, *particles)
    assert list(terms) == ["x_next", "x_t", "x_0"]
    for name, counted in {"x_next": t < 0, "x_t": t >= 1, "x_0": t == 0}.items():
        value = terms[name].detach()
        assert value.shape == (*particles, len(x_0))
        assert (value[..., ~counted] == 0).all()
        assert (value[..., counted] != 0).all()


def test_predictive_and_the_graph():
    pair, x = tanh_ddpm(), grid_data()
    assert Predictive(pair.model, num_samples=5)(size=3)["x_0"].shape == (5, 3, D)
    drawn = Predictive(pair.model, guide=pair.guide, num_samples=5, parallel=True, return_sites=pair.latent_sites)(x)
    assert drawn["x_4"].shape[:2] == (5, len(x))
    source = pyro.render_model(pair.model, model_args=(x,), render_distributions=True).source
    assert all(site in source for site in (*pair.latent_sites, "x_0"))


def test_a_term_takes_one_network_call_whatever_t():
    network = Tanh()
    pair = DDPM(network, NoiseSchedule.cosine(1000), (D,), likelihood=Normal())
    x = data(4)
    network.calls = 0
    loss = Trace_ELBO().differentiable_loss(pair.term_model, pair.term_guide, x, torch.tensor([0, 1, 999, 1000]))
    assert network.calls == 1
    loss.backward()
    assert all(p.grad.isfinite().all() for p in pair.parameters())


def test_the_terms_trace_to_a_graph_without_data_dependence():
    """make_fx at one draw of t gives a graph that is right for another."""
    pair, x = tanh_ddpm(), grid_data(3)

    def loss(x, t):
        torch.manual_seed(0)
        q = poutine.trace(pair.term_guide).get_trace(x, t)
        p = poutine.trace(poutine.replay(pair.term_model, trace=q)).get_trace(x, t)
        return p.log_prob_sum() - q.log_prob_sum()

    with pyro.validation_enabled(False):
        graph = make_fx(loss)(x, torch.tensor([0, 1, 2]))
        other = torch.tensor([4, 0, 3])
        torch.manual_seed(0)
        got = graph(x, other)
        torch.testing.assert_close(got, loss(x, other))
        assert not torch.allclose(got, loss(x, torch.tensor([0, 1, 2])))


def float32_errors(schedule, predict, break_it=lambda process: None):
    """Largest error of a term in float32, in units of 1e-5 of the term + 1e-9 of the bound; same noises, closed-form KLs."""
    torch.manual_seed(0)
    pair, x = DDPM(Tanh(), schedule, (D,), predict, "posterior", Normal()), data(1)
    single = copy.deepcopy(pair).float()
    break_it(single.process)
    with torch.no_grad():
        bound = abs(float(term_loss(pair, *each_term(pair, x), TraceMeanField_ELBO)))
        errors = []
        for t in (0, 1, 2, 3, 10, 100, 500, 900, 998, 999, 1000):
            want, got = (
                float(term_loss(p, x.to(p.network.body[0].weight.dtype), torch.tensor([t]), TraceMeanField_ELBO))
                for p in (pair, single)
            )
            errors.append(abs(got - want) / (1e-5 * abs(want) + 1e-9 * bound))
    return max(errors)


@pytest.mark.parametrize("predict", ["eps", "x_0"])
@pytest.mark.parametrize("schedule", [NoiseSchedule.linear, NoiseSchedule.cosine], ids=["linear", "cosine"])
def test_float32_against_float64_at_a_thousand_steps(schedule, predict):
    assert float32_errors(schedule(1000), predict) < 1


def test_tables_made_in_float32_would_be_seen():
    """The twin: 1 - alpha-bar as a difference in float32."""

    def naive(process):
        beta = process.schedule.beta.float()
        noise = torch.cat([torch.zeros(1), 1 - (1 - beta).cumprod(0)]).double()
        process._buffers["_sqrt_marginal_variance"] = noise.sqrt()
        process._buffers["_sqrt_posterior_variance"][2:] = (noise[1:-1] / noise[2:] * beta[1:]).sqrt()

    assert float32_errors(NoiseSchedule.linear(1000), "eps", naive) > 1


@pytest.mark.parametrize(
    ("t", "error", "match"),
    [
        ([0, 5], ValueError, "expected t in 0..4 .* got values from 0 to 5"),
        ([-1, 2], ValueError, "expected t in 0..4 .* got values from -1 to 2"),
        ([0.0, 1.0], TypeError, "expected t as an int64 tensor, got torch.float64"),
    ],
)
@pytest.mark.parametrize("program", ["term_model", "term_guide"])
def test_a_step_that_is_none_is_refused(program, t, error, match):
    pair, x = tanh_ddpm(), grid_data()
    with pytest.raises(error, match=match):
        getattr(pair, program)(x, torch.tensor(t))


class OneBatchAxis(nn.Module):
    """A network as others write them: a convolution, which takes no more axes than it is made for."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 1, 3, padding=1)
        self.time = nn.Embedding(5, 1)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        if x_t.dim() != 4 or t.shape != x_t.shape[:1]:
            raise RuntimeError("expected one batch axis")
        return self.body(x_t + self.time(t)[:, :, None, None])


def test_networks_of_one_batch_axis_serve_particles_and_decompositions():
    """The bound with vectorised particles and by terms is that of one datum at a time, to 6 standard errors."""
    torch.manual_seed(0)
    pair = DDPM(OneBatchAxis(), NoiseSchedule.cosine(4), (1, 4, 4), "x_0", likelihood=Normal())
    x = torch.randn(2, 1, 4, 4)
    d = decompose_diffusion(pair, x, num_particles=500, seed=0)
    with torch.no_grad():
        draws = torch.tensor([-Trace_ELBO().loss(pair.model, pair.posterior_guide, x) for _ in range(300)])
        many = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
        vectorized = -many.loss(pair.model, pair.posterior_guide, x)
    error = float(draws.std()) / math.sqrt(len(draws))
    total = math.hypot(error, float(d.std_error.square().sum().sqrt()))
    assert abs(float(d.elbo.sum()) - float(draws.mean())) < 6 * total
    assert abs(vectorized - float(draws.mean())) < 6 * math.hypot(error, float(draws.std()) / math.sqrt(2000))
    assert abs(float(d.elbo[0]) - float(draws.mean())) > 6 * total  # control: one datum is not two
    with pytest.raises(RuntimeError, match="one batch axis"):
        pair.network(x[None], torch.ones(1, 2, dtype=torch.long))
