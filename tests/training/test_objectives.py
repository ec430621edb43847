"""ElboLoss against the exact bound, against Pyro's own, and against the decomposition: values and gradients.

Where the draws are the same, equality is to rounding. Where they are not, z-tests: ``Z`` bounds each of at most a hundred
statistics of a test, so that a correct loss fails a test with probability below 1e-6 (100 * 2 * Phi(-6) = 2e-7).
"""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from inference import ElboLoss, GumbelSoftmaxLoss, ImportanceWeightedLoss, PairError, ScoreFunctionLoss, decompose_elbo
from inference.training.objectives import (
    PrecisionError,
)
from ppl_models import VAE, LinearGaussian, ModelGuidePair
from ppl_models.likelihoods import Bernoulli
from tests.oracles import gaussian
from tests.training.training_pairs import Replicates, Scalar, correlated_pair, linear_vae, points

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


def test_float32_stays_float32() -> None:
    pair, x = linear_vae().float(), points(6).float()
    loss = ElboLoss(pair)
    assert loss(x).dtype == torch.float32
    loss(x).mean().backward()
    assert {p.grad.dtype for p in pair.parameters()} == {torch.float32}


class InHalf(torch.nn.Module):
    """An encoder that gives its law's parameters in half precision."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        zeros = torch.zeros(len(x), 2, dtype=torch.bfloat16)
        return zeros, zeros + 1


def test_under_bfloat16_the_terms_come_in_float32_or_not_at_all() -> None:
    pair = VAE.preset((4,), Bernoulli(), latent_dim=2, hidden=(8,)).float()
    x = torch.ones(6, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert pair.decoder(torch.zeros(1, 2, dtype=torch.float32)).dtype == torch.bfloat16
        for closed_form in (True, False):
            assert {t.dtype for t in ElboLoss(pair, closed_form=closed_form).terms(x).values()} == {torch.float32}
        pair.encoder = InHalf()
        with pytest.raises(PrecisionError, match=r"got torch.bfloat16 at site 'z': convert the law's parameters"):
            ElboLoss(pair, closed_form=False)(x)


class FirstOfAll(ModelGuidePair):
    """Takes one leading dim alone: with particles before it, ``z[:, :1]`` is the first datum's z, not the first column."""

    def __init__(self, any_dims: bool) -> None:
        super().__init__((2,), ("z",))
        self.any_dims, self.w = any_dims, nn.Parameter(torch.tensor([1.0, -0.5]))

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        with pyro.plate("data", self.batch_size(x, size)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            first = z[..., :1] if self.any_dims else z[:, :1]
            return pyro.sample("x", dist.Normal(first * self.w, 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", self.batch_size(x)):
            pyro.sample("z", dist.Normal(x * self.w, 0.5).to_event(1))


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        (ElboLoss, ", or take a loss of one draw$"),
        (ImportanceWeightedLoss, ", or take a loss of one draw$"),
        (ScoreFunctionLoss, " does not$"),  # which has no one draw
    ],
)
def test_several_draws_at_once_of_programs_that_take_one_are_refused(kind: type, remedy: str) -> None:
    x = torch.randn(6, 2)
    with pytest.raises(PairError, match=r"under an outer particle plate, for 5 draws are made .*" + remedy):
        kind(FirstOfAll(False), 5)(x)
    assert kind(FirstOfAll(True), 5)(x).shape == (6,)
    assert ElboLoss(FirstOfAll(False))(x).shape == (6,)


def test_a_loss_of_one_draw_whose_report_makes_two_looks_for_both() -> None:
    """`fit` reports the bound of a relaxed loss by two draws of the discrete guide."""

    class OneHot(ModelGuidePair):
        def __init__(self, any_dims: bool) -> None:
            super().__init__((2,), ("z",))
            self.any_dims, self.w = any_dims, nn.Parameter(torch.tensor([1.0, -0.5]))

        def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
            with pyro.plate("data", self.batch_size(x, size)):
                z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(3)))
                first = z[..., :1] if self.any_dims else z[:, :1]
                return pyro.sample("x", dist.Normal(first * self.w, 0.5).to_event(1), obs=x)

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", self.batch_size(x)):
                pyro.sample("z", dist.OneHotCategorical(logits=x @ self.w[:, None] * torch.ones(3)))

    x = torch.randn(6, 2)
    assert GumbelSoftmaxLoss(OneHot(True))(x).shape == (6,)
    with pytest.raises(PairError, match="for 2 draws are made at once"):
        GumbelSoftmaxLoss(OneHot(False))(x)
