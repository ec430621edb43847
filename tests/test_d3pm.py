"""D3PM against enumeration of all paths, in value and gradient, term by term, and with the exact posterior as guide."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

from inference import decompose_elbo, fit, load_run
from inference.bounds.diffusion import decompose_diffusion
from inference.training.diffusion_objective import DiffusionLoss
from ppl_models import registry
from ppl_models.d3pm import D3PM, logistic_logits
from ppl_models.diffusion import Diffusion
from ppl_models.likelihoods import Bernoulli, Categorical
from ppl_models.networks.residual_mlp import ResidualMLP
from ppl_models.processes.dense_transitions import DenseTransitions, discretized_gaussian
from ppl_models.processes.structured_transitions import absorbing, uniform
from tests.oracles.categorical_diffusion import Enumeration, absorbing_matrices, gaussian_matrices, uniform_matrices

K, D, T = 3, 2, 3
BETAS = {"uniform": [0.2, 0.5, 0.7], "absorbing": [0.3, 0.4, 1.0], "gaussian": [0.5, 1.0, 2.0]}
BUILD = {"uniform": uniform, "absorbing": absorbing, "gaussian": discretized_gaussian}
MATRICES = {"uniform": uniform_matrices, "absorbing": absorbing_matrices, "gaussian": gaussian_matrices}
Z_MAX = 6.0  # two-sided tail 2e-9


class Table(nn.Module):
    """Logits of x_0 from a table over (t, joint state): any network at all, at this size."""

    def __init__(self, last: int = T, classes: int = K, dims: int = D) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(last, classes**dims, dims, classes))
        self.register_buffer("place", classes ** torch.arange(dims - 1, -1, -1))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.logits[t - 1, (x_t * self.place).sum(-1)]


def _pair(kind: str, dims: int = D) -> D3PM:
    return D3PM(Table(dims=dims), BUILD[kind](K, T, BETAS[kind]), (dims,), K)


def _oracle(kind: str, pair: D3PM, betas: list[float] | None = None) -> Enumeration:
    """The same model by enumeration; the x_0 law written out for the mask: none on it, a point mass where x_t shows x_0."""
    dims = pair.data_shape[0]
    laws = pair.network.logits.softmax(-1)
    if kind == "absorbing":
        data = torch.cat([pair.network.logits[..., :-1].softmax(-1), torch.zeros_like(laws[..., :1])], -1)
        shown = torch.tensor(list(np.ndindex(*[K] * dims)))
        point = nn.functional.one_hot(shown, K).to(laws.dtype).expand_as(laws)
        laws = torch.where((shown == K - 1)[..., None], data, point)
    prior = np.eye(K)[K - 1] if kind == "absorbing" else np.full(K, 1 / K)
    return Enumeration(MATRICES[kind](K, betas or BETAS[kind]), prior, laws, dims)


@pytest.fixture(params=BUILD, ids=str)
def kind(request) -> str:
    return request.param


def _data(kind: str) -> list[tuple[int, int]]:
    """State numbers and states of all data: without the mask where there is one."""
    states = list(np.ndindex(*[K] * D))
    last = K - 1 if kind == "absorbing" else K
    return [(i, s) for i, s in enumerate(states) if max(s) < last]


def _log_prob(program, values: dict[str, torch.Tensor], *args: torch.Tensor) -> dict[str, torch.Tensor]:
    """Log-probability of each site of a program at given values."""
    trace = poutine.trace(poutine.condition(program, values)).get_trace(*args)
    trace.compute_log_prob()
    return {name: trace.nodes[name]["log_prob"] for name in (*values, "x_0") if name in trace.nodes}


def _along_paths(
    pair: D3PM, oracle: Enumeration, x_0: tuple[int, ...], possible: torch.Tensor, program
) -> torch.Tensor:
    states = torch.tensor(oracle.states)
    paths = oracle.paths()[possible]
    values = {f"x_{t}": states[paths[:, t - 1]] for t in range(1, T + 1)}
    return sum(_log_prob(program, values, torch.tensor(x_0).expand(len(paths), -1)).values())


def test_chain_and_both_guides_against_every_path(kind):
    """log p(x_0, path), log q(path) of guide and posterior guide, path by path; the bound and its gradient from them."""
    pair = _pair(kind)
    oracle = _oracle(kind, pair)
    for i, x_0 in _data(kind)[:3]:
        q, p = oracle.q(i), oracle.p(i)
        possible = q > 0
        log_p = _along_paths(pair, oracle, x_0, possible, pair.model)
        log_q = _along_paths(pair, oracle, x_0, possible, pair.guide)
        from_top = _along_paths(pair, oracle, x_0, possible, pair.posterior_guide)
        assert torch.allclose(log_q, q[possible].log(), rtol=1e-11)
        assert torch.allclose(from_top, log_q, rtol=1e-10)
        assert torch.allclose(log_p, p[possible].log(), rtol=1e-11)
        elbo = (log_q.exp() * (log_p - log_q)).sum()
        exact = oracle.elbo(i)
        assert torch.allclose(elbo, exact, rtol=1e-11)
        assert bool(elbo < oracle.log_evidence(i))
        (actual,) = torch.autograd.grad(elbo, pair.network.logits)
        (expected,) = torch.autograd.grad(exact, pair.network.logits, retain_graph=True)
        assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("fault", ["wrong schedule", "p(x_0 | x_1) weighted by q", "no prior"])
def test_the_enumeration_catches_a_broken_model(kind, fault):
    """Twins of the test above."""
    if kind == "absorbing" and fault != "wrong schedule":
        pytest.skip("no fault there: p(x_T) is one, and what a masked x_1 says of x_0 is the same for all x_0")
    pair = _pair(kind)
    oracle = _oracle(kind, pair, [0.4, 0.5, 1.0] if fault == "wrong schedule" else None)
    if fault.startswith("p(x_0"):
        pair.reconstruction_law = lambda output, x_1: pair.reverse_law(output, x_1, torch.tensor(1))
    i, x_0 = _data(kind)[1]
    possible = oracle.q(i) > 0
    log_p = _along_paths(pair, oracle, x_0, possible, pair.model)
    if fault == "no prior":
        log_p = log_p - oracle.prior[oracle.paths()[possible][:, -1]].log()
    assert not torch.allclose(log_p, oracle.p(i)[possible].log(), atol=1e-2)


def test_single_terms_against_enumeration(kind):
    """L_t of term_model and term_guide at every x_{t+1} and x_t, summed by the oracle's weights; value and gradient."""
    pair = _pair(kind)
    oracle = _oracle(kind, pair)
    states = torch.tensor(oracle.states)
    i, x_0 = _data(kind)[1]
    data = torch.tensor(x_0)
    total = 0.0
    for t, expected in enumerate(oracle.terms(i)):
        step = min(t + 1, T)
        after = oracle.marginal[step][i]
        before = oracle.marginal[t][i][:, None] * oracle.forward[t] if t < T else torch.outer(after, after)
        joint = (
            before.T if t >= 1 else torch.diag(after)
        )  # [x_next, x_t]; at t = 0, x_t is masked and any state will do
        here, there = (joint > 0).nonzero(as_tuple=True)
        values = {"x_next": states[here], "x_t": states[there]}
        arguments = (data.expand(len(here), -1), torch.full((len(here),), t))
        p, q = _log_prob(pair.term_model, values, *arguments), _log_prob(pair.term_guide, values, *arguments)
        loss = (joint[here, there] * (q["x_t"] - p["x_t"] - p["x_0"])).sum()
        assert bool((p["x_next"] == 0).all())
        assert torch.allclose(loss, expected, rtol=1e-10, atol=1e-13)
        total = total + loss
    exact = oracle.elbo(i)
    assert torch.allclose(total, -exact, rtol=1e-10)
    (actual,) = torch.autograd.grad(total, pair.network.logits)
    (gradient,) = torch.autograd.grad(-exact, pair.network.logits)
    assert torch.allclose(actual, gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("last", [1, 2])
def test_single_terms_have_finite_gradients_in_short_chains(kind, last):
    """Masked branches see stand-in steps there (T = 2: x_1 at the step where all is absorbed): no NaN may leak."""
    betas = {"uniform": [0.5, 1.0], "absorbing": [0.5, 1.0], "gaussian": [1.0, 2.0]}[kind][-last:]
    pair = D3PM(Table(last), BUILD[kind](K, last, betas), (D,), K)
    x, t = torch.randint(2, (200, D)), torch.randint(0, last + 1, (200,))
    loss = Trace_ELBO().differentiable_loss(pair.term_model, pair.term_guide, x, t)
    (gradient,) = torch.autograd.grad(loss, pair.network.logits)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_samples_have_the_enumerated_law(kind):
    """20,000 draws of the model by chi-square at 1e-6; the twin is the model with the most probable x_0 at t = 1."""
    pair, n = _pair(kind), 20_000
    with torch.no_grad():
        oracle = _oracle(kind, pair)
        p = torch.stack([oracle.log_evidence(i).exp() for i, _ in _data(kind)])
        assert float(p.sum()) == pytest.approx(1, abs=1e-12)
        numbers = [i for i, _ in _data(kind)]
        assert _chi_square(pair.model(size=n), numbers, p) < scipy.stats.chi2.isf(1e-6, len(p) - 1)
        law = pair.reconstruction_law
        pair.reconstruction_law = lambda output, x_1: dist.Delta(
            law(output, x_1).base_dist.logits.argmax(-1), event_dim=1
        )
        assert _chi_square(pair.model(size=n), numbers, p) > 2 * scipy.stats.chi2.isf(1e-6, len(p) - 1)


def _chi_square(draws: torch.Tensor, numbers: list[int], p: torch.Tensor) -> float:
    counts = torch.bincount(draws @ torch.tensor([K, 1]), minlength=K**D)
    assert int(counts.sum()) == int(counts[numbers].sum())
    expected = p * len(draws)
    return float(((counts[numbers] - expected).square() / expected).sum())


# --- the certificate: the exact posterior gives log p(x_0) at every draw ---


class WithPosterior(D3PM):
    """One dimension, with p(x_1..x_T | x_0) by enumeration as guide: kernels p(x_t | x_{t-1}) of the model's own chain."""

    def set_kernels(self, oracle: Enumeration, fault: float = 0.0) -> None:
        laws = [oracle.prior]
        for t in range(T, 0, -1):
            laws.insert(0, laws[0] @ oracle.reverse[t - 1])
        kernels = [(oracle.reverse[t - 1] * laws[t][:, None] / laws[t - 1]).T.detach() for t in range(1, T + 1)]
        self.log_kernels = [((1 - fault) * k + fault / K).log() for k in kernels]

    def guide(self, x: torch.Tensor) -> None:
        with pyro.plate("data", self.batch_size(x)):
            for t in range(1, T + 1):
                x = pyro.sample(f"x_{t}", dist.Categorical(logits=self.log_kernels[t - 1][x]).to_event(1))


@pytest.mark.parametrize("name", ["uniform", "gaussian"])
def test_zero_variance_certificate(name):
    pair = WithPosterior(Table(dims=1), BUILD[name](K, T, BETAS[name]), (1,), K)
    oracle = _oracle(name, pair)
    pair.set_kernels(oracle)
    x = torch.arange(K)[:, None]
    evidence = torch.stack([oracle.log_evidence(i) for i in range(K)])
    d = decompose_elbo(pair.model, pair.guide, x, num_particles=50)
    assert torch.allclose(d.monte_carlo, evidence, rtol=1e-10)
    assert (d.monte_carlo_std_error <= 1e-10 * evidence.abs()).all()
    pair.set_kernels(oracle, fault=0.2)
    d = decompose_elbo(pair.model, pair.guide, x, num_particles=50)
    assert (d.monte_carlo_std_error > 1e-3).all()


class Informed(nn.Module):
    """What makes the reverse chain exact for independent data of law pi: log pi for t >= 2 (eq. 4), Bayes' rule at t = 1.

    A tilt is added at t = 1 alone: not zero, it spoils this.
    """

    def __init__(self, law: torch.Tensor, first: torch.Tensor, tilt: float) -> None:
        super().__init__()
        self.law = nn.Parameter(law.log())
        self.register_buffer("first", first.log())
        self.register_buffer("tilt", tilt * torch.arange(K))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        at_one = self.law + self.first.T[x_t] + self.tilt
        return torch.where((t == 1)[..., None, None], at_one, self.law.expand_as(at_one))


@pytest.mark.parametrize("tilt", [0.0, 0.3])
@pytest.mark.parametrize("program", ["guide", "posterior_guide"])
@pytest.mark.parametrize(
    ("name", "betas", "law"),
    [
        ("uniform", [0.3, 0.5, 1.0], [0.5, 0.3, 0.2]),
        ("absorbing", [0.3, 0.4, 1.0], [0.7, 0.3, 0.0]),
        ("gaussian", [0.5, 1.0, 2.0], [1 / 3, 1 / 3, 1 / 3]),  # p(x_T) is q(x_T) for uniform data alone
    ],
)
def test_certificate_of_the_forward_process(name, betas, law, program, tilt):
    """Where the data's law is known and p(x_T) = q(x_T), q is the posterior: every draw gives log p(x_0)."""
    first = torch.as_tensor(MATRICES[name](K, betas))[0]
    pair = D3PM(Informed(torch.tensor(law), first, tilt), BUILD[name](K, T, betas), (D,), K)
    x = torch.tensor([s for _, s in _data(name)])
    d = decompose_elbo(pair.model, getattr(pair, program), x, num_particles=50)
    evidence = torch.tensor(law).log()[x].sum(-1)
    same = torch.allclose(d.monte_carlo, evidence, rtol=1e-10, atol=1e-12)
    certified = same and bool((d.monte_carlo_std_error <= 1e-10).all())
    assert certified == (tilt == 0)


# --- one bound from every tool ---


def test_every_tool_reports_the_enumerated_bound(kind):
    pair = _pair(kind)
    oracle = _oracle(kind, pair)
    data = _data(kind)
    x = torch.tensor([s for _, s in data])
    exact = torch.stack([oracle.elbo(i) for i, _ in data]).detach()
    terms = torch.stack([torch.stack(oracle.terms(i)) for i, _ in data]).detach()
    d = decompose_diffusion(pair, x, num_particles=400, seed=0)
    assert _within(d.elbo, exact, d.std_error)
    for t in range(T + 1):
        term = d[f"x_{t}"]
        assert _within(term.monte_carlo, -terms[:, t], term.std_error)
    whole = decompose_elbo(pair.model, pair.posterior_guide, x, num_particles=400)
    assert _within(whole.elbo, exact, whole.std_error)
    n = 200
    with torch.no_grad():
        loss = DiffusionLoss(pair)
        draws = torch.stack([-loss(x) for _ in range(n)])
        assert _within(draws.mean(0), exact, draws.std(0) / n**0.5)
        assert not _within(draws.mean(0) / T, exact, draws.std(0) / n**0.5)  # without the factor T
        assert not _within(-draws.mean(0), exact, draws.std(0) / n**0.5)
        for guide in (pair.guide, pair.posterior_guide):
            many = Trace_ELBO(num_particles=n, vectorize_particles=True, max_plate_nesting=1)
            values = torch.tensor([-many.loss(pair.model, guide, x) for _ in range(20)])
            assert _within(values.mean(), exact.sum(), values.std() / 20**0.5, z=15.0)  # t with 19 degrees: 5e-12


def _within(actual: torch.Tensor, expected: torch.Tensor, error: torch.Tensor, z: float = Z_MAX) -> bool:
    return bool(((actual - expected).abs() <= z * error + 1e-9).all())


# --- absorbing: a weighted masked language model ---


def test_absorbing_terms_in_their_masked_form():
    """w_t sum over masked dims of -log p(x_0 | x_t) is the KL, or at t = 1 -log p(x_0 | x_1), at every x_t."""
    pair = _pair("absorbing")
    a = [1.0, 0.7, 0.7 * 0.6, 0.0]
    for _, state in _data("absorbing"):
        x_0 = torch.tensor(state)
        masks = torch.tensor(list(np.ndindex(*[2] * D))).bool()
        x_t = torch.where(masks, K - 1, x_0)
        x = x_0.expand_as(x_t)
        for t in range(1, T + 1):
            step = torch.tensor(t)
            output = pair.denoise(x_t, step)
            rows = slice(-1, None) if t == T else slice(None)  # at T all is masked
            if t == 1:
                term = -pair.reconstruction_law(output, x_t).log_prob(x)
            else:
                q, p = pair.process.posterior(x_t, x, step), pair.reverse_law(output, x_t, step)
                term = _kl(q.base_dist.logits, p.base_dist.logits)
            masked = pair.masked_term(output, x, x_t, step)
            assert torch.allclose(masked[rows], term[rows], rtol=1e-10, atol=1e-14)
            weight = (a[t - 1] - a[t]) / (1 - a[t])
            log_p = pair.network.logits[t - 1][..., :-1].log_softmax(-1)
            number = (x_t * torch.tensor([K, 1])).sum(-1)
            by_hand = [
                -weight * sum(log_p[number[m], d, state[d]] for d in range(D) if masks[m, d]) for m in range(len(masks))
            ]
            assert torch.allclose(masked, torch.stack([torch.as_tensor(b) for b in by_hand]), rtol=1e-10)
            (left,) = torch.autograd.grad(masked[rows].sum(), pair.network.logits, retain_graph=True)
            (right,) = torch.autograd.grad(term[rows].sum(), pair.network.logits, retain_graph=True)
            assert torch.allclose(left, right, rtol=1e-9, atol=1e-13)
            if 1 < t < T:
                unweighted = pair.auxiliary_loss(output, x, x_t, step)
                assert not torch.allclose(unweighted, term, atol=1e-3)


def _kl(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    q = log_q.exp()
    return torch.where(q > 0, q * (log_q - log_p), 0.0).sum((-1, -2))


def test_reciprocal_schedule_weighs_by_one_over_t():
    """a_t = 1 - t/T gives w_t = 1/t."""
    t = torch.arange(1, 1001)
    assert torch.allclose(absorbing(4, 1000).log_unmasking(t).exp(), 1 / t, rtol=1e-10)


def test_nothing_is_put_on_what_x_t_excludes():
    pair = _pair("absorbing")
    x_t = torch.tensor([[0, 1], [2, 1], [2, 2]])
    p = pair.reconstruction(x_t).base_dist.probs
    assert torch.allclose(p[0], torch.eye(K)[[0, 1]])
    assert bool((p[2][:, 2] == 0).all())
    assert bool((p[2][:, :2] > 0).all())
    draws = pair.model(size=500)
    assert int(draws.max()) < K - 1
    full = _pair("uniform").reconstruction(x_t).base_dist.probs
    assert bool((full > 0).all())


def test_zeros_of_a_matrix_exclude_no_x_0_and_the_bound_stays_one():
    """Tridiagonal Q: q(x_1 = 0 | x_0 = 3) = 0, but p(x_0 = 3 | x_1 = 0) > 0. The model is normalised, the bound below it.

    Twin: with what q excludes at t = 1 taken from the oracle's p(x_0 | x_1), another model.
    """
    step = torch.tensor([[0.8, 0.2, 0, 0], [0.2, 0.6, 0.2, 0], [0, 0.2, 0.6, 0.2], [0, 0, 0.2, 0.8]])
    pair = D3PM(Table(classes=4, dims=1), DenseTransitions(step.expand(T, 4, 4)), (1,), 4)
    laws = pair.network.logits.softmax(-1)
    assert pair.process.transitions.cumulative(1)[3, 0] == 0
    assert pair.reconstruction(torch.tensor([[0]])).base_dist.probs[0, 0, 3] == laws[0, 0, 0, 3] > 0
    restricted = laws.clone()
    restricted[0, :, 0] = restricted[0, :, 0] * (step > 0)
    restricted = restricted / restricted.sum(-1, keepdim=True)
    oracle, twin = (Enumeration(step.expand(T, 4, 4).numpy(), np.full(4, 0.25), law, 1) for law in (laws, restricted))
    assert sum(oracle.log_evidence(i).exp() for i in range(4)).item() == pytest.approx(1, abs=1e-12)
    for i in range(4):
        possible = oracle.q(i) > 0
        log_p = _along_paths(pair, oracle, (i,), possible, pair.model)
        assert torch.allclose(log_p, oracle.p(i)[possible].log(), rtol=1e-11)
        assert not torch.allclose(log_p, twin.p(i)[possible].log(), atol=1e-2)
        elbo = (oracle.q(i)[possible] * (log_p - oracle.q(i)[possible].log())).sum()
        assert bool(elbo < oracle.log_evidence(i))
        assert bool(elbo < twin.elbo(i))  # what is lost, as the module says


# --- the truncated discretised logistic ---


def test_logistic_logits_against_differences_of_the_distribution_function():
    classes = 7
    parameters, x_t = torch.randn(50, 2), torch.randint(classes, (50,))
    actual = logistic_logits(parameters, x_t, classes).softmax(-1)
    v, h = np.linspace(-1, 1, classes), 1 / (classes - 1)
    for (location, log_scale), x, row in zip(parameters.numpy(), x_t.numpy(), actual.numpy(), strict=True):
        law = scipy.stats.logistic(np.tanh(location + v[x]), np.exp(log_scale - 2))
        mass = law.cdf(v + h) - law.cdf(v - h)
        assert np.allclose(row, mass / mass.sum(), rtol=1e-8, atol=1e-12)


def test_logistic_logits_hold_far_out_where_a_difference_is_zero():
    parameters = torch.tensor([[0.0, -6.0], [30.0, -4.0], [0.0, 10.0]], requires_grad=True)
    logits = logistic_logits(parameters, torch.tensor([0, 3, 6]), 7)
    (gradient,) = torch.autograd.grad(logits.sum(), parameters)
    assert logits.isfinite().all()
    assert gradient.isfinite().all()
    z = (torch.linspace(-1, 1, 7) - torch.tanh(torch.tensor(-1.0))) * math.exp(8)
    assert float(((z + math.exp(8) / 6).sigmoid() - (z - math.exp(8) / 6).sigmoid()).min()) == 0


@pytest.mark.parametrize("beta", [0.1, 1e-32, 1e-40, 1e-100])
def test_logistic_losses_hold_for_the_smallest_steps(beta):
    transitions = uniform(256, 3, [beta, 0.5, 0.9])
    pair = D3PM(ConstantLogistic(), transitions, (2,), 256, output="logistic").float()
    x_0, x_t, t = torch.tensor([[3, 200]]), torch.tensor([[3, 17]]), torch.tensor([2])
    output = pair.denoise(x_t, t)
    divergence, _ = pair.step_losses(output, x_0, x_t, t)
    expected = Diffusion.step_divergence(pair.double(), output.double(), x_0, x_t, t)
    assert divergence.item() == pytest.approx(expected.item(), rel=1e-4)


class ConstantLogistic(nn.Module):
    def __init__(self):
        super().__init__()
        self.parameters_of_all = nn.Parameter(torch.zeros(2))

    def forward(self, x_t, t):
        return self.parameters_of_all.expand(*x_t.shape, 2)


def test_logistic_output_is_one_of_the_models():
    """All programs run on it, and its law is the one of its logits."""
    pair = D3PM.preset((4,), Categorical(5), 6, "gaussian", "mlp", 16, 1, output="logistic")
    x = pair.model(size=8)
    assert x.shape == (8, 4)
    output = pair.denoise(x, torch.tensor(1))
    assert output.shape == (8, 4, 2)
    by_hand = logistic_logits(output, x, 5).log_softmax(-1)
    assert torch.allclose(pair.reconstruction(x).base_dist.logits, by_hand)
    assert DiffusionLoss(pair)(x).isfinite().all()


# --- numbers at the edge ---


@pytest.mark.parametrize("name", ["uniform", "absorbing", "gaussian"])
def test_confident_logits_stay_finite_in_float32(name):
    """Logits 1e4 apart, all on the wrong class: a finite loss with finite gradients at T = 1000, every t."""
    torch.set_default_dtype(torch.float32)

    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([0.0, 0.0, 1e4, 0.0]))

        def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.bias.expand(*x_t.shape, 4) + 0.0

    pair = D3PM(Wrong(), BUILD[name](4, 1000), (3,), 4)
    x, t = torch.zeros(1001, 3, dtype=torch.int64), torch.arange(1001)
    loss = Trace_ELBO().differentiable_loss(pair.term_model, pair.term_guide, x, t)
    (gradient,) = torch.autograd.grad(loss, pair.network.bias)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert float(loss.detach()) > 9e3


class Waves(nn.Module):
    """Smooth logits without a parameter, rounded to float32 in every run, so that the laws alone are compared."""

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.stack([(x_t + k * t[..., None]).double().sin().float() for k in range(5)], -1)


@pytest.mark.parametrize("laws", ["float64 laws", "float32 laws"])
@pytest.mark.parametrize("name", ["uniform", "absorbing", "gaussian"])
def test_float32_network_against_float64(name, laws):
    """KL of each step at T = 1000: to 1e-9 with the laws in float64, to 1e-6 nats a dimension with them in float32."""
    n = 1000
    exact = D3PM(Waves(), BUILD[name](5, n), (3,), 5).double()
    single = D3PM(Waves(), BUILD[name](5, n), (3,), 5).float()
    if laws == "float64 laws":
        single.process.double()
    t = torch.arange(2, n + 1)
    x = torch.randint(4, (n - 1, 3))
    x_t = exact.process.marginal(x, t).sample()
    kls = []
    for pair in (exact, single):
        q, p = pair.process.posterior(x_t, x, t), pair.reverse(x_t, t)
        assert p.base_dist.logits.dtype == q.base_dist.logits.dtype
        kls.append(_kl(q.base_dist.logits, p.base_dist.logits))
    assert kls[1].dtype == (torch.float64 if laws == "float64 laws" else torch.float32)
    tolerance = (1e-9, 1e-15) if laws == "float64 laws" else (1e-5, 3e-6)
    assert torch.allclose(kls[1].double(), kls[0], *tolerance)
    assert float(kls[0].sum()) > 1e-3


# --- construction, description, data ---


@pytest.mark.parametrize(
    ("transitions", "network", "shape", "output"),
    [
        ("uniform", "mlp", (4, 3), "logits"),
        ("absorbing", "mlp", (6,), "logits"),
        ("gaussian", "mlp", (6,), "logistic"),
        ("gaussian", "unet", (8, 8), "logits"),
        ("uniform", "unet", (8, 8), "logistic"),
        ("absorbing", "transformer", (6,), "logits"),
    ],
)
def test_presets_train_and_rebuild(monkeypatch, transitions, network, shape, output):
    for name, home in PARTS.items():
        monkeypatch.setitem(registry.PARTS, name, home)
    pair = D3PM.preset(shape, Categorical(5), 4, transitions, network, hidden=8, blocks=1, output=output)
    assert pair.num_classes == 5 + (transitions == "absorbing")
    assert pair.likelihood.num_classes == 5
    x = torch.randint(5, (3, *shape))
    pair.check_data(x)
    assert DiffusionLoss(pair)(x).isfinite().all()
    assert pair.predict_x_0(pair.denoise(x, torch.tensor(2)), x, torch.tensor(2)).shape == x.shape
    again = registry.build(registry.describe(pair)).to(torch.get_default_dtype())
    again.load_state_dict(pair.state_dict())
    values = []
    for model in (pair, again):
        pyro.set_rng_seed(0)
        values.append(DiffusionLoss(model)(x).detach())
    assert torch.equal(*values)


def test_dense_transitions_are_trained_saved_and_loaded(tmp_path):
    transitions = DenseTransitions([[[0.7, 0.3], [0.3, 0.7]]] * 3, [0.5, 0.5])
    pair = D3PM(ResidualMLP((2,), 4, 1, num_classes=2), transitions, (2,), 2)
    x = torch.randint(2, (8, 2))
    run = fit(pair, x, out=tmp_path / "run", epochs=1, progress=False)
    loaded = load_run(tmp_path / "run").pair
    assert torch.equal(loaded.process.transitions.cumulative(3), transitions.cumulative(3))
    fresh = registry.build(registry.describe(pair)).to(torch.float64)
    bounds = [
        decompose_diffusion(model, x, num_particles=2, seed=0).elbo
        for model in (run.pair.eval(), loaded.eval(), fresh.eval())
    ]
    assert torch.equal(bounds[0], bounds[1])
    assert not torch.allclose(bounds[0], bounds[2], atol=1e-3)


PARTS = {
    "D3PM": "ppl_models.d3pm:D3PM",
    "UniformTransitions": "ppl_models.processes.structured_transitions:UniformTransitions",
    "AbsorbingTransitions": "ppl_models.processes.structured_transitions:AbsorbingTransitions",
    "DiscretizedGaussianTransitions": "ppl_models.processes.dense_transitions:DiscretizedGaussianTransitions",
    "ResidualMLP": "ppl_models.networks.residual_mlp:ResidualMLP",
    "UNet": "ppl_models.networks.unet:UNet",
    "TransformerDenoiser": "ppl_models.networks.transformer:TransformerDenoiser",
    "OrdinalDenoiser": "ppl_models.networks.ordinal:OrdinalDenoiser",
}


def test_programs_run_under_particles(kind):
    pair = _pair(kind)
    x, t = torch.randint(2, (5, D)), torch.randint(0, T + 1, (5,))
    with pyro.plate("particles", 7, dim=-2):
        for guide, model, args in [
            (pair.guide, pair.model, (x,)),
            (pair.posterior_guide, pair.model, (x,)),
            (pair.term_guide, pair.term_model, (x, t)),
        ]:
            guided = poutine.trace(guide).get_trace(*args)
            scored = poutine.trace(poutine.replay(model, trace=guided)).get_trace(*args)
            for trace in (guided, scored):
                trace.compute_log_prob()
                shapes = {trace.nodes[n]["log_prob"].shape for n in trace.stochastic_nodes if n.startswith("x_")}
                assert shapes <= {(7, 5)}


def test_expected_class():
    pair = _pair("uniform")
    x_t, t = torch.tensor([[0, 1]]), torch.tensor(2)
    p = pair.network.logits[1, 1].softmax(-1)
    assert torch.allclose(pair.predict_x_0(pair.denoise(x_t, t), x_t, t)[0], p[:, 1] + 2 * p[:, 2])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: D3PM(Table(), uniform(4, T), (D,), K),
            ValueError,
            "num_classes=4, as many as the transitions .* got 3",
        ),
        (
            lambda: D3PM(Table(classes=2), absorbing(2, T), (D,), 2),
            ValueError,
            "num_classes >= 3 with absorbing transitions, two classes of data and the mask, got 2, the mask included",
        ),
        (lambda: D3PM(Table(), uniform(K, T), (D,), K, "probs"), ValueError, "'logits' or 'logistic', got 'probs'"),
        (lambda: D3PM(Table(), absorbing(K, T), (D,), K, "logistic"), ValueError, "without a mask"),
        (lambda: D3PM(Table(), torch.eye(3), (D,), K), TypeError, "expected transitions from uniform"),
        (lambda: D3PM(Table(dims=1), uniform(K, T), (D,), K), ValueError, "match its first layer|have shape"),
        (lambda: D3PM(Table(), absorbing(K, T, [0.5, 0.5, 0.5]), (D,), K), ValueError, "would be infinite"),
        (lambda: D3PM.preset((4,), Bernoulli()), TypeError, "Categorical likelihood, got Bernoulli"),
        (
            lambda: D3PM.preset((4,), Categorical(3), transitions="cubic"),
            ValueError,
            "among uniform, absorbing, gaussian",
        ),
        (
            lambda: D3PM.preset((4,), Categorical(3), network="cnn"),
            ValueError,
            "among mlp, unet, transformer, got 'cnn'",
        ),
        (
            lambda: D3PM.preset((4,), Categorical(3), network="transformer", output="logistic"),
            ValueError,
            "'logits' with a transformer",
        ),
        (
            lambda: _pair("uniform").masked_term(*[torch.zeros(1, D)] * 3, torch.tensor(1)),
            ValueError,
            "only ones with a masked",
        ),
        (lambda: _pair("uniform").check_data([1]), TypeError, "expected a tensor, got list"),
        (lambda: _pair("uniform").check_data(torch.zeros(2, D)), ValueError, r"int64 class indices, got torch.float64"),
        (lambda: _pair("uniform").check_data(torch.tensor([[0, 3]])), ValueError, r"0..2, but x\[0, 1\] is 3"),
        (lambda: _pair("absorbing").check_data(torch.tensor([[0, 2]])), ValueError, r"0..1 \(class 2 is the mask"),
        (lambda: _pair("absorbing").check_data(torch.tensor([[0, -1]])), ValueError, r"x\[0, 1\] is -1"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_float_data_are_refused_by_the_model_too(kind):
    pair = _pair(kind)
    for program in (pair.model, pair.guide, pair.posterior_guide):
        with pytest.raises(TypeError, match=r"expected .* as int64, got torch.float64"):
            poutine.trace(program).get_trace(torch.zeros(2, D)).compute_log_prob()
        poutine.trace(program).get_trace(torch.zeros(2, D).long()).compute_log_prob()
