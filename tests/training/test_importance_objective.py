"""ImportanceWeightedLoss: its value and both gradients against quadrature, hand-written torch, and exact evidence.

Gradients are averaged over R independent batches; z = (mean - exact) / standard error is a Student t with R - 1 degrees of
freedom for correct code, and is tested at a false-failure rate of 1e-6 a test (Bonferroni over parameters).
"""

import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from inference.bounds.gradient_variance import gradient_variance
from inference.bounds.sites import PairError
from inference.training import importance_objective
from inference.training.importance_objective import ImportanceWeightedLoss
from inference.training.objectives import ElboLoss, NotReparameterizedError
from ppl_models import VAE, LinearGaussian, ModelGuidePair
from ppl_models.likelihoods import Bernoulli, Normal
from ppl_models.networks import Decoder
from tests.cases import CASES

BOTH = ("iwae", "doubly_reparameterized")
K = 3


class Line(ModelGuidePair):
    """z ~ N(0, 1), x ~ N(w z, 0.7^2), q(z | x) = N(a x + c, exp(s)^2)."""

    def __init__(self) -> None:
        super().__init__(data_shape=(), latent_sites=("z",))
        self.w = nn.Parameter(torch.tensor(1.3))
        self.a, self.c, self.s = (nn.Parameter(torch.tensor(value)) for value in (0.3, 0.4, -0.4))

    def model(self, x=None, size=None):
        self.announce("w")
        with pyro.plate("data", self.batch_size(x, size)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            return pyro.sample("x", dist.Normal(self.w * z, 0.7), obs=x)

    def guide(self, x):
        self.announce("a", "c", "s")
        with pyro.plate("data", self.batch_size(x)):
            return pyro.sample("z", dist.Normal(self.a * x + self.c, self.s.exp()))

    def make_exact(self) -> None:
        """Puts the guide's parameters where the guide is the posterior."""
        precision = 1 + self.w**2 / 0.49
        with torch.no_grad():
            self.a.copy_(self.w / 0.49 / precision)
            self.c.zero_()
            self.s.copy_(-0.5 * precision.log())


def line_bound(w: float, a: float, c: float, s: float, x: float, nodes: int = 40) -> float:
    """E[log (1/K) sum w_k] for K = 3, by Gauss-Hermite quadrature over the three draws."""
    u, mass = np.polynomial.hermite_e.hermegauss(nodes)
    mass = mass / mass.sum()
    z = a * x + c + math.exp(s) * u
    norm = scipy.stats.norm
    lw = norm.logpdf(z) + norm.logpdf(x, w * z, 0.7) - norm.logpdf(z, a * x + c, math.exp(s))
    three = np.logaddexp(np.logaddexp(lw[:, None, None], lw[None, :, None]), lw[None, None, :]) - math.log(3)
    return float(np.einsum("i,j,k,ijk", mass, mass, mass, three))


def line_gradient(x: float) -> dict[str, float]:
    """The gradient of minus the bound, by central differences of the quadrature."""
    start, h, gradient = {"w": 1.3, "a": 0.3, "c": 0.4, "s": -0.4}, 1e-5, {}
    for name in start:
        up, down = ({**start, name: start[name] + sign * h} for sign in (1, -1))
        gradient[name] = -(line_bound(**up, x=x) - line_bound(**down, x=x)) / (2 * h)
    return gradient


def gradients(loss: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor, batches: int) -> Tensor:
    """``[R, P]``: the gradient of the batch mean, R times."""
    rows = []
    for _ in range(batches):
        found = torch.autograd.grad(loss(x).mean(), parameters)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def t_values(draws: Tensor, exact: Tensor) -> Tensor:
    return (draws.mean(0) - exact) / (draws.std(0) / math.sqrt(len(draws)))


def max_t(batches: int, count: int, rate: float = 1e-6) -> float:
    return float(scipy.stats.t(batches - 1).isf(rate / (2 * count)))


# ---- value


@pytest.mark.parametrize("name", CASES)
def test_both_gradients_have_the_same_value_for_every_pair(name):
    pair = CASES[name].build()
    x = CASES[name].data(pair)
    if not CASES[name].reparameterised:
        with pytest.raises(NotReparameterizedError, match="carry no gradient"):
            ImportanceWeightedLoss(pair, k=4)(x)
        return
    values = []
    for gradient in BOTH:
        loss = ImportanceWeightedLoss(pair, k=4, gradient=gradient)
        torch.manual_seed(3)
        values.append(loss(x))
        values[-1].sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in pair.parameters() if p.grad is not None)
    assert values[0].shape == (len(x),)
    assert torch.allclose(values[0], values[1], rtol=1e-10)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.exact and case.reparameterised])
@pytest.mark.parametrize("gradient", BOTH)
def test_with_the_posterior_as_guide_every_draw_is_the_evidence(name, gradient):
    pair = CASES[name].build()
    x = CASES[name].data(pair)
    assert torch.allclose(-ImportanceWeightedLoss(pair, 5, gradient)(x), pair.log_evidence(x), rtol=1e-10)


@pytest.mark.parametrize("gradient", BOTH)
def test_the_mean_value_is_the_bound_by_quadrature(gradient):
    x = torch.full((20_000,), 0.9)
    drawn = -ImportanceWeightedLoss(Line(), K, gradient)(x).detach()
    error = float(drawn.std()) / math.sqrt(len(drawn))
    assert abs(float(drawn.mean()) - line_bound(1.3, 0.3, 0.4, -0.4, 0.9)) < 5 * error
    assert abs(float(drawn.mean()) + float(ElboLoss(Line())(x).detach().mean())) > 10 * error, "the ELBO is far"


@pytest.mark.parametrize("name", ["vae-bernoulli", "vae-normal-learned-scale", "linear-mean-field"])
def test_one_draw_is_the_drawn_elbo_in_value_and_gradient(name):
    pair = CASES[name].build()
    x = CASES[name].data(pair)
    found = []
    for loss in (ImportanceWeightedLoss(pair, k=1), ElboLoss(pair, closed_form=False)):
        torch.manual_seed(5)
        value = loss(x)
        found.append((value, torch.autograd.grad(value.sum(), list(pair.parameters()), allow_unused=True)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_terms_are_still_those_of_the_elbo():
    pair = LinearGaussian.random(3, 2)
    x = pair.model(size=4).detach()
    assert torch.allclose(sum(ImportanceWeightedLoss(pair, 5).terms(x).values()), pair.elbo(x), rtol=1e-10)


# ---- gradient


@pytest.mark.parametrize("gradient", BOTH)
def test_the_mean_gradient_is_that_of_the_bound_by_quadrature(gradient):
    assert np.abs(line_t_values(gradient)).max() < max_t(40, 4)


@pytest.mark.parametrize("fault", ["one factor v", "score kept"])
def test_a_doubly_reparameterised_gradient_with_a_fault_is_caught(fault, monkeypatch):
    """Leaving out the second factor v_k, or the detaching of log q, biases the guide's gradient by many standard errors."""
    if fault == "one factor v":
        monkeypatch.setattr(importance_objective._PathWeights, "scale", lambda self, gradient, event_dim: gradient)
    else:
        monkeypatch.setattr(importance_objective._GuideDetached, "forward", lambda self, x: self.program(x))
    t = line_t_values("doubly_reparameterized")
    assert abs(t[0]) < max_t(40, 4), "the model's parameter is not concerned"
    assert np.abs(t[1:]).max() > 2 * max_t(40, 4)


def line_t_values(gradient: str) -> np.ndarray:
    pair, x = Line(), 0.9
    loss = ImportanceWeightedLoss(pair, K, gradient)
    draws = gradients(loss, [pair.w, pair.a, pair.c, pair.s], torch.full((2000,), x), batches=40)
    return t_values(draws, torch.tensor(list(line_gradient(x).values()))).numpy()


class Chain(ModelGuidePair):
    """z_2 -> z_1 -> x with unit normals, and the bottom-up guide q(z_1 | x) q(z_2 | z_1): one latent drawn from the other.

    With ``width`` > 0, z_1 and x are in a plate of that size within each datum.
    """

    def __init__(self, width: int = 0) -> None:
        super().__init__(data_shape=(width,) if width else (), latent_sites=("z_2", "z_1"))
        self.width = width
        self.a = nn.Parameter(torch.tensor([0.6, 0.1, -0.2]))
        self.b = nn.Parameter(torch.tensor([0.8, -0.6, -0.1]))

    def inner(self):
        return pyro.plate("inner", self.width, dim=-2)

    def model(self, x=None, size=None):
        with pyro.plate("data", self.batch_size(x, size), dim=-1):
            z_2 = pyro.sample("z_2", dist.Normal(0.0, 1.0))
            if not self.width:
                z_1 = pyro.sample("z_1", dist.Normal(z_2, 1.0))
                return pyro.sample("x", dist.Normal(z_1, 1.0), obs=x)
            with self.inner():
                z_1 = pyro.sample("z_1", dist.Normal(z_2, 1.0))
                return pyro.sample("x", dist.Normal(z_1, 1.0), obs=None if x is None else x.T)

    def guide(self, x):
        self.announce("a", "b")
        with pyro.plate("data", self.batch_size(x), dim=-1):
            if not self.width:
                z_1 = pyro.sample("z_1", dist.Normal(self.a[0] * x + self.a[1], self.a[2].exp()))
            else:
                with self.inner():
                    z_1 = pyro.sample("z_1", dist.Normal(self.a[0] * x.T + self.a[1], self.a[2].exp()))
                z_1 = z_1.mean(-2, keepdim=True)
            return pyro.sample("z_2", dist.Normal(self.b[0] * z_1 + self.b[1], self.b[2].exp()))


def chain_loss_by_hand(pair: Chain, k: int) -> Callable[[Tensor], Tensor]:
    """The plain importance-weighted loss of the chain, in torch alone; x is ``[B]`` or ``[B, width]``."""

    def log_normal(value: Tensor, loc: Tensor | float, log_scale: Tensor | float) -> Tensor:
        log_scale = torch.as_tensor(log_scale)
        return -0.5 * ((value - loc) / log_scale.exp()).square() - log_scale - 0.5 * math.log(2 * math.pi)

    def loss(x: Tensor) -> Tensor:
        a, b, wide = pair.a, pair.b, x.reshape(len(x), -1)
        loc_1 = a[0] * wide + a[1]
        z_1 = loc_1 + a[2].exp() * torch.randn(k, *wide.shape)
        loc_2 = b[0] * z_1.mean(-1) + b[1]
        z_2 = loc_2 + b[2].exp() * torch.randn(k, len(x))
        log_w = log_normal(z_2, 0.0, 0.0) - log_normal(z_2, loc_2, b[2])
        inner = log_normal(z_1, z_2[..., None], 0.0) + log_normal(wide, z_1, 0.0) - log_normal(z_1, loc_1, a[2])
        return math.log(k) - torch.logsumexp(log_w + inner.sum(-1), 0)

    return loss


def chain_t_values(gradient: str, width: int) -> Tensor:
    pair = Chain(width)
    x = torch.full((2000, width) if width else (2000,), 1.2)
    parameters = [pair.a, pair.b]
    found = gradients(ImportanceWeightedLoss(pair, K, gradient), parameters, x, batches=40)
    by_hand = gradients(chain_loss_by_hand(pair, K), parameters, x, batches=40)
    errors = (found.var(0) / len(found) + by_hand.var(0) / len(by_hand)).sqrt()
    return (found.mean(0) - by_hand.mean(0)) / errors


@pytest.mark.parametrize("width", [0, 2])
@pytest.mark.parametrize("gradient", BOTH)
def test_a_chain_of_latents_has_the_gradient_written_by_hand(gradient, width):
    assert chain_t_values(gradient, width).abs().max() < max_t(40, 6)


def test_a_factor_applied_along_the_chain_is_caught(monkeypatch):
    """Hooks on the draws themselves would scale what z_2 sends down to z_1 a second time."""

    def attach(self, value, event_dim):
        value.register_hook(lambda gradient: self.scale(gradient, event_dim))
        return value

    monkeypatch.setattr(importance_objective._PathWeights, "attach", attach)
    assert chain_t_values("doubly_reparameterized", 0).abs().max() > 2 * max_t(40, 6)


@pytest.mark.parametrize("gradient", BOTH)
def test_parameters_shared_by_guide_and_model_get_both_parts(gradient):
    """With the posterior as guide, computed from the model's own parameters, the bound is log p(x), and so its gradient."""
    pair = LinearGaussian.random(3, 2)
    x = pair.model(size=1).detach().expand(500, -1)
    parameters = list(pair.parameters())
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(-pair.log_evidence(x).mean(), parameters)])
    draws = gradients(ImportanceWeightedLoss(pair, K, gradient), parameters, x, batches=30)
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() <= max_t(30, len(exact)) * error + 1e-9).all()


def test_at_the_posterior_the_doubly_reparameterised_guide_gradient_is_zero_for_every_draw():
    pair = Line()
    pair.make_exact()
    x = torch.linspace(-2.0, 2.0, 7)
    found = {}
    for gradient in BOTH:
        loss = ImportanceWeightedLoss(pair, 5, gradient)
        found[gradient] = torch.stack(torch.autograd.grad(loss(x).mean(), [pair.a, pair.c, pair.s]))
    assert found["doubly_reparameterized"].abs().max() < 1e-12
    assert found["iwae"].abs().max() > 1e-3


def test_the_doubly_reparameterised_gradient_is_the_quieter_one_for_the_encoder():
    vae = VAE.preset((6,), Normal(scale=0.3), latent_dim=2, hidden=(8,))
    x = vae.model(size=10).detach()
    losses = {gradient: ImportanceWeightedLoss(vae, 50, gradient) for gradient in BOTH}
    report = gradient_variance(losses, x, num_pairs=100)
    plain, double = (report[gradient]["encoder"] for gradient in BOTH)
    errors = math.hypot(plain.variance_std_error, double.variance_std_error)
    assert plain.variance - double.variance > 5 * errors
    assert double.snr > plain.snr


def test_a_frozen_guide_leaves_the_models_gradient():
    pair = Line()
    for p in (pair.a, pair.c, pair.s):
        p.requires_grad_(False)
    x, found = torch.linspace(-1.0, 1.0, 5), []
    for gradient in BOTH:
        torch.manual_seed(2)
        found.append(torch.autograd.grad(ImportanceWeightedLoss(pair, 4, gradient)(x).sum(), pair.w)[0])
    assert torch.allclose(found[0], found[1], rtol=1e-10)


# ---- conduct


class DropoutEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc = self.net(x)
        return loc, torch.ones_like(loc)


class Coin(Line):
    def guide(self, x):
        with pyro.plate("data", self.batch_size(x)):
            return pyro.sample("z", dist.Poisson(self.s.exp() + 0.0 * x))


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: ImportanceWeightedLoss(Line(), 0), ValueError, "expected a whole k >= 1, got 0"),
        (lambda: ImportanceWeightedLoss(Line(), 3, "dreg"), ValueError, "iwae, doubly_reparameterized, got 'dreg'"),
        (lambda: ImportanceWeightedLoss(Coin(), 3), NotReparameterizedError, "got Poisson at site 'z'"),
    ],
)
def test_bad_input_is_named(build, error, match):
    with pytest.raises(error, match=match), pyro.validation_enabled(False):
        build()(torch.zeros(3))


def test_a_guide_with_dropout_is_refused_while_it_drops():
    vae = VAE(DropoutEncoder(), Decoder(2, (4,), (8,)), 2, Bernoulli())
    x = vae.model(size=20).detach()
    loss = ImportanceWeightedLoss(vae, 3, "doubly_reparameterized")
    vae.eval()
    assert loss(x).shape == (20,)
    vae.train()
    with pytest.raises(PairError, match=r"same law twice, but that of site 'z' changed: take dropout out"):
        loss(x)
    assert ImportanceWeightedLoss(vae, 3)(x).shape == (20,), "the plain gradient runs the guide once"


def test_the_first_call_uses_no_more_of_the_random_stream_than_the_others():
    pair, x = Line(), torch.linspace(-1.0, 1.0, 5)
    loss, fresh = (ImportanceWeightedLoss(pair, 4, "doubly_reparameterized") for _ in range(2))
    loss(x)
    values = []
    for one in (loss, fresh):
        torch.manual_seed(11)
        values.append(one(x))
    assert torch.equal(values[0], values[1])


def test_parameters_are_the_pairs_own():
    pair = Line()
    loss = ImportanceWeightedLoss(pair, 4, "doubly_reparameterized")
    loss(torch.zeros(3))
    assert {id(p) for p in loss.parameters()} == {id(p) for p in pair.parameters()}
    assert all(p.grad is None and p.requires_grad for p in pair.parameters())


@pytest.mark.parametrize("gradient", BOTH)
def test_value_and_gradient_can_be_traced_to_one_flat_graph(gradient):
    """No value is read into Python and no parameter is frozen into the graph: it is right at other parameters too."""
    vae = VAE.preset((6,), Bernoulli(), latent_dim=2, hidden=(8,))
    x = vae.model(size=5).detach()
    loss = ImportanceWeightedLoss(vae, 4, gradient)
    loss(x)
    names = [name for name, _ in loss.named_parameters()]

    def step(values: list[Tensor], x: Tensor) -> list[Tensor]:
        value = functional_call(loss, dict(zip(names, values, strict=True)), (x,))
        return [value, *torch.autograd.grad(value.sum(), values)]

    start = [p.detach().clone().requires_grad_() for p in loss.parameters()]
    with pyro.validation_enabled(False):
        graph = make_fx(step)(start, x)
    moved = [(1.3 * p.detach() + 0.1).requires_grad_() for p in start]
    torch.manual_seed(0)
    traced = graph(moved, x)
    torch.manual_seed(0)
    assert all(torch.allclose(a, b) for a, b in zip(traced, step(moved, x), strict=True))


@pytest.mark.parametrize("k", [0, 1.5, "3"])
def test_a_k_that_is_no_whole_number_above_zero_is_refused(k):
    with pytest.raises(ValueError, match="k"):
        ImportanceWeightedLoss(LinearGaussian.random(3, 2), k)
