"""ElboLoss against the exact bound, against Pyro's own, and against the decomposition: values and gradients.

Where the draws are the same, equality is to rounding. Where they are not, z-tests: ``Z`` bounds each of at most a hundred
statistics of a test, so that a correct loss fails a test with probability below 1e-6 (100 * 2 * Phi(-6) = 2e-7).
"""

from __future__ import annotations

import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from inference import ElboLoss, decompose_elbo
from inference.bounds import PairError
from inference.training.objectives import (
    NotReparameterizedError,
    PrecisionError,
    join_idle,
    rate_weight,
    training_objective,
)
from ppl_models import VAE, LinearGaussian, ModelGuidePair
from ppl_models.likelihoods import Bernoulli
from tests.oracles import gaussian
from tests.training.training_pairs import Scalar, linear_vae, noisy_vae, points

Z = 6.0


def arrays(pair: LinearGaussian) -> tuple[np.ndarray, np.ndarray, float]:
    return pair.weight.detach().numpy(), pair.bias.detach().numpy(), float(pair.noise_scale.detach())


def exact_elbo(pair: LinearGaussian, x: Tensor) -> np.ndarray:
    """log p(x) - KL(q || p(z | x)) for the mean-field guide N(m, 1 / diag(precision)), by dense linear algebra."""
    parts = arrays(pair)
    evidence = gaussian.log_evidence(*parts, x.numpy())
    gaps = []
    for row in x.numpy():
        mean, cov = gaussian.posterior(*parts, row)
        gaps.append(gaussian.kl(mean, np.diag(1 / np.diag(np.linalg.inv(cov))), mean, cov))
    return evidence - np.array(gaps)


def correlated_pair() -> LinearGaussian:
    """Columns far from orthogonal, so that the mean-field guide is far from the posterior."""
    weight = torch.tensor([[1.0, 0.9], [0.5, 1.0], [-0.3, 0.6]])
    return LinearGaussian(weight, torch.tensor([0.1, -0.2, 0.3]), noise_scale=0.5, guide="mean_field")


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_with_the_posterior_as_guide_every_draw_is_the_evidence(orthogonal: bool, num_particles: int) -> None:
    pair = LinearGaussian.random(data_dim=4, latent_dim=2, orthogonal=orthogonal)
    x = pair.model(size=6).detach()
    expected = torch.from_numpy(gaussian.log_evidence(*arrays(pair), x.numpy()))
    loss = ElboLoss(pair, num_particles, closed_form=False)
    for _ in range(5):
        torch.testing.assert_close(-loss(x).detach(), expected, rtol=1e-10, atol=1e-10)


def test_with_another_guide_the_draws_differ() -> None:
    pair = correlated_pair()
    x = pair.model(size=6).detach()
    loss = ElboLoss(pair, closed_form=False)
    assert float((loss(x) - loss(x)).detach().abs().min()) > 1e-3


@pytest.mark.parametrize("closed_form", [True, False])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_the_mean_is_the_exact_elbo(closed_form: bool, num_particles: int) -> None:
    pair = correlated_pair()
    x = pair.model(size=4).detach()
    draws = 4000
    with torch.no_grad():
        values = -ElboLoss(pair, num_particles, closed_form)(x.repeat(draws, 1)).reshape(draws, 4).numpy()
    z = (values.mean(0) - exact_elbo(pair, x)) / (values.std(0, ddof=1) / np.sqrt(draws))
    assert np.abs(z).max() < Z
    # The twin: the evidence is not the bound, and 4000 draws see it.
    wrong = (values.mean(0) - gaussian.log_evidence(*arrays(pair), x.numpy())) / (values.std(0) / np.sqrt(draws))
    assert np.abs(wrong).max() > 2 * Z


@pytest.mark.parametrize("closed_form", [True, False])
def test_the_mean_gradient_is_that_of_the_exact_elbo(closed_form: bool) -> None:
    pair = correlated_pair()
    x = pair.model(size=4).detach()
    parameters = list(pair.parameters())

    def flat(value: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])

    exact = flat(-pair.elbo(x).mean())
    loss, many = ElboLoss(pair, closed_form=closed_form), x.repeat(25, 1)
    draws = torch.stack([flat(loss(many).mean()) for _ in range(200)])
    error = draws.std(0) / len(draws) ** 0.5 + 1e-12  # some entries are the same in every draw
    assert float(((draws.mean(0) - exact) / error).abs().max()) < Z
    assert float(((draws.mean(0) + exact) / error).abs().max()) > 10 * Z  # the twin: the sign


def test_a_closed_form_is_the_kl_of_diagonal_normals_in_value_and_gradient() -> None:
    pair, x = linear_vae(), points(6)
    with torch.no_grad():
        pair.encoder.log_scale.uniform_(-1, 1)
    term = ElboLoss(pair).terms(x)["z"]
    loc, scale = pair.encoder(x)
    kl = 0.5 * (loc.square() + scale.square() - 1 - 2 * scale.log()).sum(-1)
    torch.testing.assert_close(term, -kl, rtol=1e-12, atol=1e-12)
    parameters = list(pair.encoder.parameters())
    for got, expected in zip(
        torch.autograd.grad(term.sum(), parameters), torch.autograd.grad(-kl.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("closed_form", "pyro_elbo"), [(False, Trace_ELBO), (True, TraceMeanField_ELBO)])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_on_the_same_draws_it_equals_pyro(closed_form: bool, pyro_elbo: type, num_particles: int) -> None:
    pair, x = linear_vae(), points(6)
    ours = ElboLoss(pair, num_particles, closed_form)
    ours(x)  # prepares
    if num_particles == 1:
        theirs = pyro_elbo()
    else:
        theirs = pyro_elbo(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
    parameters = list(pair.parameters())
    torch.manual_seed(3)
    value = ours(x).sum()
    gradient = torch.autograd.grad(value, parameters)
    torch.manual_seed(3)
    reference = theirs.differentiable_loss(pair.model, pair.guide, x)
    torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)
    for got, expected in zip(gradient, torch.autograd.grad(reference, parameters), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


class BottomUp(ModelGuidePair):
    """z_2 -> z_1 -> x, unit normals; q(z_1 | x) = N(x / 2, 1), q(z_2 | z_1) = N(z_1 / 2, 1)."""

    def __init__(self) -> None:
        super().__init__((), latent_sites=("z_2", "z_1"))
        self.slope = nn.Parameter(torch.tensor(0.5))

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        with pyro.plate("data", self.batch_size(x, size)):
            z_2 = pyro.sample("z_2", dist.Normal(torch.zeros(()), 1.0))
            z_1 = pyro.sample("z_1", dist.Normal(z_2, 1.0))
            return pyro.sample("x", dist.Normal(z_1, 1.0), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        with pyro.plate("data", self.batch_size(x)):
            z_1 = pyro.sample("z_1", dist.Normal(self.slope * x, 1.0))
            return pyro.sample("z_2", dist.Normal(self.slope * z_1, 1.0))


def test_the_kl_of_a_bottom_up_guide_is_used_only_where_it_is_the_term() -> None:
    """Minus log(2 pi)/2 minus 0.9375, by hand.

    At x = 1 the guide draws z_1 = 1/2 + e_1 and z_2 = 1/4 + e_1/2 + e_2, and twice the logarithms of 2 pi cancel:
    E log p(x | z_1) = -log(2 pi)/2 - (1/4 + 1)/2;  E[log p(z_1 | z_2) - log q] = -(1/16 + 1/4 + 1)/2 + 1/2;
    E[log p(z_2) - log q] = -(1/16 + 1/4 + 1)/2 + 1/2.
    """
    pair, draws = BottomUp(), 40_000
    loss, x = ElboLoss(pair), torch.ones(draws)
    with torch.no_grad():
        values = -loss(x)
    assert loss.closed_sites == frozenset({"z_2"})
    exact, error = -0.5 * np.log(2 * np.pi) - 0.9375, float(values.std()) / draws**0.5
    assert abs(float(values.mean()) - exact) < Z * error
    with torch.no_grad(), pytest.warns(UserWarning, match="mean field restriction"):
        wrong = -TraceMeanField_ELBO().differentiable_loss(pair.model, pair.guide, x) / draws
    assert abs(float(wrong) - exact) > 20 * error  # the twin: Pyro's mean-field bound is another number


class Replicates(ModelGuidePair):
    """Two plates: ``repeats`` measurements a datum, in an inner plate or as an event."""

    def __init__(self, plated: bool) -> None:
        super().__init__((3,), latent_sites=("z",))
        self.plated = plated
        self.a = nn.Parameter(torch.tensor(0.4))

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        with pyro.plate("data", self.batch_size(x, size), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            if not self.plated:
                return pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 3), 1.0).to_event(1), obs=x)
            with pyro.plate("repeats", 3, dim=-2):
                return pyro.sample("x", dist.Normal(z, 1.0), obs=None if x is None else x.transpose(-1, -2))

    def guide(self, x: Tensor) -> Tensor:
        with pyro.plate("data", self.batch_size(x), dim=-1):
            return pyro.sample("z", dist.Normal(self.a * x.sum(-1), 0.5))


@pytest.mark.parametrize("num_particles", [1, 4])
def test_a_plate_inside_a_datum_is_summed(num_particles: int) -> None:
    x, values = points(5, 3), []
    for plated in (True, False):
        loss = ElboLoss(Replicates(plated), num_particles)
        loss(x)
        torch.manual_seed(4)
        values.append(loss(x))
    assert values[0].shape == (5,)
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=1e-12)


class Masked(Scalar):
    """Scaled by 2.5, the second half of the data masked out; the guide draws an auxiliary variable, too."""

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        mask = torch.arange(self.batch_size(x, size)) < 3
        with poutine.scale(scale=2.5), poutine.mask(mask=mask):
            return super().model(x, size)

    def guide(self, x: Tensor) -> Tensor:
        mask = torch.arange(self.batch_size(x)) < 3
        with poutine.scale(scale=2.5), poutine.mask(mask=mask), pyro.plate("data", len(x)):
            pyro.sample("u", dist.Normal(self.a, 1.0), infer={"is_auxiliary": True})
            return pyro.sample("z", dist.Normal(self.a * x, self.log_s.exp()))


@pytest.mark.parametrize("closed_form", [True, False])
def test_scale_mask_and_auxiliary_sites_are_honoured_as_pyro_does(closed_form: bool) -> None:
    pair, x = Masked(), points(6, 1)[:, 0]
    loss = ElboLoss(pair, closed_form=closed_form)
    loss(x)
    torch.manual_seed(5)
    terms = loss.terms(x)
    assert list(terms) == ["z", "x", "u"]
    assert float(terms["x"][3:].detach().abs().max()) == 0
    torch.manual_seed(5)
    reference = (TraceMeanField_ELBO() if closed_form else Trace_ELBO()).differentiable_loss(pair.model, pair.guide, x)
    torch.testing.assert_close(-sum(term.sum() for term in terms.values()), reference)


def test_the_terms_are_those_of_the_decomposition() -> None:
    pair, x, draws = linear_vae(), points(3), 3000
    decomposed = decompose_elbo(pair.model, pair.guide, x, num_particles=draws)
    with torch.no_grad():
        terms = {site: t.reshape(draws, 3) for site, t in ElboLoss(pair).terms(x.repeat(draws, 1)).items()}
    assert tuple(terms) == decomposed.sites
    torch.testing.assert_close(terms["z"][0], decomposed["z"].analytic)
    error = (decomposed["x"].std_error.square() + terms["x"].var(0) / draws).sqrt()
    assert float(((terms["x"].mean(0) - decomposed["x"].monte_carlo) / error).abs().max()) < Z


class Discrete(Scalar):
    def guide(self, x: Tensor) -> Tensor:
        with pyro.plate("data", self.batch_size(x)):
            return pyro.sample("z", dist.Poisson(self.log_s.exp().expand(len(x))))


class Unguided(Scalar):
    def guide(self, x: Tensor) -> None:
        """Draws nothing."""


class Superfluous(Scalar):
    def guide(self, x: Tensor) -> Tensor:
        pyro.sample("other", dist.Normal(0.0, 1.0))
        return super().guide(x)


class Global(Scalar):
    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        pyro.sample("w_0", dist.Normal(0.0, 1.0))
        return super().model(x, size)

    def guide(self, x: Tensor) -> Tensor:
        pyro.sample("w_0", dist.Normal(self.a, 1.0))
        return super().guide(x)


@pytest.mark.parametrize(
    ("pair", "error", "reason"),
    [
        (Discrete, NotReparameterizedError, "got Poisson at site 'z', whose draws carry no gradient"),
        (Unguided, PairError, "latent site 'z' has no guide site"),
        (Superfluous, PairError, "'other'"),
        (Global, PairError, "inside the data plate, of size 4 at dim -1, got site 'w_0' outside it"),
    ],
)
@pytest.mark.parametrize("closed_form", [True, False])
def test_a_pair_that_cannot_be_trained_is_refused(
    pair: type[Scalar], error: type[Exception], reason: str, closed_form: bool
) -> None:
    with pytest.raises(error, match=reason):
        ElboLoss(pair(), closed_form=closed_form)(torch.zeros(4))


def test_fewer_than_one_particle_is_refused() -> None:
    with pytest.raises(ValueError, match="expected num_particles >= 1, got 0"):
        ElboLoss(Scalar(), num_particles=0)


def test_preparing_leaves_no_trace() -> None:
    """Neither the random state, nor running statistics, nor the modes of submodules."""
    pair, x = noisy_vae(), torch.ones(6, 4)
    pair.train()
    pair.encoder.body[3].eval()
    fresh, prepared = ElboLoss(pair), ElboLoss(copy.deepcopy(pair))
    prepared(x)
    prepared.pair.load_state_dict(pair.state_dict())
    outcomes = []
    for loss in (fresh, prepared):
        torch.manual_seed(6)
        outcomes.append((loss(x), torch.get_rng_state(), [b.clone() for b in loss.pair.buffers()]))
        assert [m.training for m in loss.pair.encoder.body] == [True, True, True, False]
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=0, atol=0)


def test_float32_stays_float32() -> None:
    pair, x = linear_vae().float(), points(6).float()
    loss = ElboLoss(pair)
    assert loss(x).dtype == torch.float32
    loss(x).mean().backward()
    assert {p.grad.dtype for p in pair.parameters()} == {torch.float32}


def test_under_bfloat16_the_terms_come_in_float32_or_not_at_all() -> None:
    pair = VAE.preset((4,), Bernoulli(), latent_dim=2, hidden=(8,)).float()
    x = torch.ones(6, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert pair.decoder(torch.zeros(1, 2, dtype=torch.float32)).dtype == torch.bfloat16
        assert {t.dtype for t in ElboLoss(pair).terms(x).values()} == {torch.float32}
        with pytest.raises(PrecisionError, match=r"got torch.bfloat16 at site 'z': convert the law's parameters"):
            ElboLoss(pair, closed_form=False)(x)


TERMS = {
    site: torch.tensor(values, dtype=torch.float64)
    for site, values in {"z_2": [-1.0, -3.0], "z_1": [-0.5, -0.1], "x": [-10.0, -12.0]}.items()
}
LATENTS = ("z_2", "z_1")


@pytest.mark.parametrize(
    ("weight", "free_bits", "expected"),
    [
        (1.0, 0.0, 11 + 2 + 0.3),
        (0.25, 0.0, 11 + 0.25 * 2.3),
        (0.0, 0.0, 11.0),
        (1.0, 0.5, 11 + 2 + 0.5),
        (1.0, 5.0, 11 + 5 + 5),
        (0.5, 0.5, 11 + 0.5 * 2.5),
    ],
)
def test_the_objective_by_hand(weight: float, free_bits: float, expected: float) -> None:
    assert float(training_objective(TERMS, LATENTS, weight, free_bits)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("free_bits", [0.0, 0.5, 1.2])
def test_shares_add_up_to_the_objective(free_bits: float) -> None:
    """Also where one process has less than another, and one has nothing."""
    parts = [slice(0, 1), slice(1, 2), slice(2, 2)]
    rates = {part.start: torch.tensor([-TERMS[s][part].sum() / 2 for s in LATENTS]) for part in parts}

    def all_sum(_: Tensor) -> Tensor:
        return sum(rates.values())

    shares = [
        training_objective({s: t[part] for s, t in TERMS.items()}, LATENTS, 1.0, free_bits, 2, all_sum)
        for part in parts[:2]
    ]
    assert float(sum(shares)) == pytest.approx(float(training_objective(TERMS, LATENTS, 1.0, free_bits)), rel=1e-12)
    asked: list[Tensor] = []
    join_idle(2, lambda values: asked.append(values) or values)
    assert asked[0].shape == (2,)


def test_a_site_below_its_free_bits_is_not_pressed() -> None:
    rates = torch.tensor([2.0, 0.3], requires_grad=True)
    terms = {"z_2": -rates[0].expand(2), "z_1": -rates[1].expand(2), "x": torch.zeros(2)}
    training_objective(terms, LATENTS, 1.0, free_bits=0.5).backward()
    assert rates.grad.tolist() == [1.0, 0.0]


def test_the_rates_weight_rises_to_one() -> None:
    assert [rate_weight(step, 4.0) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert rate_weight(0, 0.0) == 1.0
