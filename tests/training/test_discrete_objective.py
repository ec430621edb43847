"""Four estimators of one gradient, against enumeration by hand and quadrature: values, bias, variance; and what they refuse.

An encoder that is a table gives each row of a batch logits of its own, so that one backward pass yields as many independent
draws of the gradient as the batch has rows.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from inference import decompose_elbo
from inference.bounds.gradient_variance import gradient_variance
from inference.bounds.sites import PairError
from inference.training.discrete_objective import ScoreFunctionLoss
from inference.training.enumerated_objective import EnumeratedLoss
from inference.training.evaluation import evaluate
from inference.training.gradient_estimators import ESTIMATORS, training_loss
from inference.training.objectives import ElboLoss, sum_terms
from inference.training.relaxed_objective import Annealing, GumbelSoftmaxLoss, StraightThroughLoss
from ppl_models import LinearGaussian, ModelGuidePair
from ppl_models.discrete_vae import CategoricalVAE, TooManyStatesError
from ppl_models.likelihoods import Bernoulli, Categorical
from ppl_models.networks.arrays import ArrayMLP
from tests.oracles import discrete_vae as oracle

Z_MAX = 6.5  # two-sided tail 8e-11
X = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
DRAWING = {"score_function": 3, "gumbel_softmax": 1, "straight_through": 1}


def _tabled(rows: int, num_latents: int = 2, num_classes: int = 3) -> tuple[CategoricalVAE, Tensor, Tensor]:
    """A pair whose guide has the same logits in each of ``rows`` rows, those logits, and data."""
    logits = 0.7 * torch.randn(1, num_latents, num_classes)
    decoder = ArrayMLP((num_latents, num_classes), (3,), (8,), "relu")
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(3)  # a decoder that is far from linear, so that relaxing it is visibly biased
    pair = CategoricalVAE(oracle.Table(logits), decoder, num_latents, num_classes, Bernoulli())
    pair.encoder.logits = nn.Parameter(logits.expand(rows, -1, -1).clone())
    return pair, logits[0].clone(), X.expand(rows, 3)


def _exact(pair: CategoricalVAE, logits: Tensor) -> tuple[Tensor, Tensor]:
    """ELBO and its gradient in the logits, by hand."""
    leaf = logits.clone().requires_grad_()
    elbo = oracle.elbo(leaf, pair.decoder, X)
    return elbo.detach(), torch.autograd.grad(elbo, leaf)[0]


def _draws(loss: ElboLoss, x: Tensor) -> tuple[Tensor, Tensor]:
    """Independent draws of the ELBO ``[n]`` and of its gradient in the logits ``[n, M, K]``."""
    values = -loss(x)
    return values.detach(), torch.autograd.grad(values.sum(), loss.pair.encoder.logits)[0]


def _mean_is(draws: Tensor, exact: Tensor) -> bool:
    error = draws.std(0) / len(draws) ** 0.5
    return bool(((draws.mean(0) - exact).abs() <= Z_MAX * error + 1e-12).all())


def test_enumeration_equals_the_sum_by_hand_in_value_and_gradient():
    pair = CategoricalVAE.preset((4,), Bernoulli(), num_latents=2, num_classes=3, hidden=(6,))
    x = pair.model(size=5).detach()
    loss = EnumeratedLoss(pair)(x)
    by_hand = -torch.stack([oracle.elbo(pair.encoder(row), pair.decoder, row) for row in x])
    assert torch.allclose(loss, by_hand, rtol=1e-12)
    parameters = list(pair.parameters())
    for a, b in zip(
        torch.autograd.grad(loss.sum(), parameters), torch.autograd.grad(by_hand.sum(), parameters), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("estimator", DRAWING)
def test_the_value_is_the_discrete_bound(estimator):
    pair, logits, x = _tabled(20_000)
    values, _ = _draws(training_loss(pair, estimator, DRAWING[estimator], temperature=1.0), x)
    assert _mean_is(values, _exact(pair, logits)[0])


def test_the_relaxed_bound_would_be_another_number():
    """The twin: what Gumbel-softmax differentiates is no bound of this pair, and the test above tells."""
    pair, logits, x = _tabled(20_000)
    loss = GumbelSoftmaxLoss(pair, temperature=1.0)
    loss(x)
    relaxed = sum_terms(loss._relaxed_terms(x)).detach()
    assert not _mean_is(relaxed, _exact(pair, logits)[0])


@pytest.mark.parametrize("num_particles", [2, 5])
def test_the_score_function_has_no_bias(num_particles):
    pair, logits, x = _tabled(40_000)
    _, gradients = _draws(ScoreFunctionLoss(pair, num_particles), x)
    assert _mean_is(gradients, _exact(pair, logits)[1])


class _OwnDrawInBaseline(ScoreFunctionLoss):
    """The mistake to be caught: a baseline that a draw is itself part of shrinks the gradient by (S - 1)/S."""

    def _terms(self, x: Tensor) -> dict[str, Tensor]:
        terms = super()._terms(x)
        plain = {name: term.detach() for name, term in terms.items()}
        shrink = (self.num_particles - 1) / self.num_particles
        return {
            name: plain[name] + (term - plain[name]) * (shrink if name == "x" else 1) for name, term in terms.items()
        }


class _NoScore(ScoreFunctionLoss):
    """The mistake to be caught: only the pathwise part, as if z had a gradient."""

    def _terms(self, x: Tensor) -> dict[str, Tensor]:
        return {name: self._per_datum(term) for name, term in self._site_terms(*self._traces(x)).items()}


@pytest.mark.parametrize("wrong", [_OwnDrawInBaseline, _NoScore])
def test_a_wrong_score_function_is_caught(wrong):
    pair, logits, x = _tabled(40_000)
    _, gradients = _draws(wrong(pair, 2), x)
    assert not _mean_is(gradients, _exact(pair, logits)[1])


def test_the_score_functions_gradient_in_the_decoder_has_no_bias():
    pair, logits, x = _tabled(500)
    loss, weight = ScoreFunctionLoss(pair, 2), next(pair.decoder.parameters())
    draws = torch.stack([torch.autograd.grad(-loss(x).mean(), weight)[0] for _ in range(60)])
    (exact,) = torch.autograd.grad(oracle.elbo(logits, pair.decoder, X), weight)
    assert _mean_is(draws, exact)


def test_the_baseline_lowers_the_variance():
    """Against the plain score function at the same number of draws, by far more than chance (F at 20 000 draws: 1.10)."""
    pair, logits, x = _tabled(20_000)
    _, with_baseline = _draws(ScoreFunctionLoss(pair, 4), x)
    z = torch.distributions.OneHotCategorical(logits=logits).sample((20_000, 4))  # [n, S, M, K]
    log_p = torch.distributions.Bernoulli(logits=pair.decoder(z)).log_prob(X).sum(-1)
    score = z - logits.softmax(-1)  # d log q / d logits
    plain = (log_p[..., None, None] * score).mean(1)
    assert float(plain.detach().var(0).sum() / with_baseline.var(0).sum()) > 1.5


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("kind", [GumbelSoftmaxLoss, StraightThroughLoss])
def test_relaxed_gradients_have_the_expectation_that_quadrature_gives(kind, temperature):
    """One binary latent: the Gumbels' difference is logistic, and the relaxed gradient an integral over one variable."""
    pair, logits, x = _tabled(40_000, num_latents=1, num_classes=2)
    _, gradients = _draws(kind(pair, temperature=temperature), x)
    leaf = logits.clone().requires_grad_()
    kl = (leaf.softmax(-1) * leaf.log_softmax(-1)).sum()
    (d_kl,) = torch.autograd.grad(kl, leaf)
    hard = kind is StraightThroughLoss
    expected = oracle.relaxed_binary_gradient(logits, pair.decoder, X, temperature, hard) - d_kl
    assert _mean_is(gradients, expected)
    wrong = oracle.relaxed_binary_gradient(logits, pair.decoder, X, 10.0, hard) - d_kl
    assert not _mean_is(gradients, wrong)  # another temperature would be seen


def _squared_bias(gradients: Tensor, exact: Tensor) -> tuple[float, float]:
    """|E g - exact|^2 without bias, from pairs of independent draws, and its standard error."""
    half = len(gradients) // 2
    products = ((gradients[:half] - exact) * (gradients[half:] - exact)).sum((-2, -1))
    return float(products.mean()), float(products.std()) / half**0.5


def test_a_lower_temperature_trades_bias_for_variance():
    pair, logits, x = _tabled(40_000)
    exact = _exact(pair, logits)[1]
    bias, variance = {}, {}
    for temperature in (2.0, 0.4):
        _, gradients = _draws(GumbelSoftmaxLoss(pair, temperature=temperature), x)
        bias[temperature] = _squared_bias(gradients, exact)
        variance[temperature] = float(gradients.var(0).sum())
    assert bias[2.0][0] > Z_MAX * bias[2.0][1]  # it is biased
    assert bias[2.0][0] - bias[0.4][0] > Z_MAX * (bias[2.0][1] ** 2 + bias[0.4][1] ** 2) ** 0.5
    assert variance[0.4] > 1.5 * variance[2.0]


@pytest.mark.parametrize("estimator", sorted(set(ESTIMATORS) - {"pathwise"}))
def test_every_estimator_trains_every_parameter(estimator):
    pair = CategoricalVAE.preset((6,), Bernoulli(), num_latents=2, num_classes=3, hidden=(8,))
    x = torch.eye(6)[[0, 0, 1, 1, 2, 2]]
    loss = training_loss(pair, estimator, DRAWING.get(estimator, 1), Annealing(1.0, 0.5, steps=60))
    first = float(loss(x).mean().detach())
    before = [p.detach().clone() for p in pair.parameters()]
    optimizer = torch.optim.Adam(pair.parameters(), lr=2e-2)
    for step in range(60):
        if isinstance(loss, GumbelSoftmaxLoss):
            loss.anneal(step)
        optimizer.zero_grad()
        loss(x).mean().backward()
        optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(pair.parameters(), before, strict=True))
    assert float(EnumeratedLoss(pair)(x).mean().detach()) < first - 0.3


def test_losses_of_one_pair_compare_by_gradient_variance():
    pair = CategoricalVAE.preset((4,), Bernoulli(), num_latents=2, num_classes=3, hidden=(6,))
    x = pair.model(size=4).detach()
    losses = {name: training_loss(pair, name, DRAWING.get(name, 1)) for name in ESTIMATORS[1:]}
    report = gradient_variance(losses, x, num_pairs=3, by=("block",))
    assert report["enumeration"]["encoder"].variance < 1e-20
    assert all(report[name]["encoder"].variance > 1e-12 for name in DRAWING)


def test_evaluation_takes_the_closed_forms_over_and_reports_the_discrete_bound():
    pair, logits, x = _tabled(4000)
    training = StraightThroughLoss(pair)
    training.terms(x)
    plain = ElboLoss(pair)
    plain.closed_sites, plain.nesting = training.closed_sites, training.nesting
    found = evaluate(plain, x, batch_size=4000)
    assert plain.closed_sites == {"z"}
    assert abs(found.elbo - float(_exact(pair, logits)[0])) < Z_MAX * found.std_error


def test_preparing_leaves_the_random_stream_and_modes_alone():
    pair = CategoricalVAE.preset((4,), Bernoulli(), num_latents=2, num_classes=3, hidden=(6,))
    pair.encoder.eval()
    loss = EnumeratedLoss(pair)
    state = torch.get_rng_state()
    loss(torch.ones(2, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert pair.training
    assert not pair.encoder.training


@pytest.mark.parametrize("estimator", sorted(set(ESTIMATORS) - {"pathwise"}))
def test_losses_trace_to_one_graph_with_the_same_values_and_gradients(estimator):
    from torch.fx.experimental.proxy_tensor import make_fx

    pair = CategoricalVAE.preset((4,), Bernoulli(), num_latents=2, num_classes=3, hidden=(6,))
    x = pair.model(size=5).detach()
    loss = training_loss(pair, estimator, DRAWING.get(estimator, 1), Annealing(1.0, 0.5, steps=10))
    with pyro.validation_enabled(False):
        loss(x)
        state = dict(loss.named_parameters()) | dict(loss.named_buffers())
        graph = make_fx(lambda state, x: functional_call(loss, state, (x,)))(state, x)
        if isinstance(loss, GumbelSoftmaxLoss):
            loss.anneal(10)  # the graph reads the temperature, it does not contain it
        results = []
        for call in (lambda: graph(state, x), lambda: loss(x)):
            pyro.set_rng_seed(3)
            value = call()
            results.append([value, *torch.autograd.grad(value.sum(), list(pair.parameters()))])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


class _Plain(ModelGuidePair):
    """One latent of a law that is given; ``[B]`` data."""

    def __init__(self, prior: dist.TorchDistribution, outside: bool = False) -> None:
        super().__init__((), ("z",))
        self.prior, self.outside = prior, outside
        self.weight = nn.Parameter(torch.ones(()))

    def model(self, x=None, size=None):
        if self.outside:
            pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", self.batch_size(x, size)):
            z = pyro.sample("z", self.prior)
            return pyro.sample("x", dist.Normal(self.weight * z.reshape(*z.shape[:1], -1).sum(-1), 1.0), obs=x)

    def guide(self, x):
        if self.outside:
            pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", self.batch_size(x)):
            pyro.sample("z", self.prior)


class _OwnOneHot(dist.OneHotCategorical):
    """A density of its own, so no KL that is known."""

    def log_prob(self, value):
        return super().log_prob(value)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: EnumeratedLoss(LinearGaussian.random(3, 2)),
            PairError,
            "can be enumerated, got none among z: use ElboLoss",
        ),
        (lambda: GumbelSoftmaxLoss(LinearGaussian.random(3, 2)), PairError, "one-hot latents to relax, got .*Normal"),
        (
            lambda: StraightThroughLoss(_Plain(dist.Categorical(torch.ones(3)))),
            PairError,
            "got Categorical at site 'z'",
        ),
        (lambda: GumbelSoftmaxLoss(_Plain(_OwnOneHot(torch.ones(3)))), PairError, "KL in closed form .* 'z' .*own"),
        (
            lambda: EnumeratedLoss(CategoricalVAE.preset((3,), Bernoulli(), 2, 3, (4,)), num_particles=3),
            PairError,
            "num_particles=1 where all latents are enumerated and nothing is drawn, got 3",
        ),
        (
            lambda: ScoreFunctionLoss(_Plain(dist.Normal(0.0, 1.0), outside=True)),
            PairError,
            "one data plate, of size 2",
        ),
        (
            lambda: EnumeratedLoss(CategoricalVAE.preset((3,), Bernoulli(), 30, 8, (4,))),
            TooManyStatesError,
            r"K\^M = 8\^30 = 1.24e\+27.*estimator that draws",
        ),
    ],
)
def test_pairs_that_an_estimator_cannot_take_are_refused_at_the_first_call(make, error, match):
    loss = make()
    with pytest.raises(error, match=match):
        loss(torch.ones(2, *loss.pair.data_shape))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda p: ScoreFunctionLoss(p, 1), "num_particles >= 2, got 1"),
        (
            lambda p: GumbelSoftmaxLoss(p, temperature=0.0),
            "the temperature's start to be a positive finite number, got 0.0",
        ),
        (lambda p: Annealing(1.0, float("inf")), "temperature's end to be a positive finite number, got inf"),
        (lambda p: Annealing(steps=0), "whole steps >= 1, got 0"),
        (lambda p: ScoreFunctionLoss(p, 2.5), "a whole num_particles >= 1, got 2.5"),
        (lambda p: GumbelSoftmaxLoss(p, num_particles=1.5), "a whole num_particles >= 1, got 1.5"),
        (lambda p: ElboLoss(p, num_particles=True), "a whole num_particles >= 1, got True"),
        (lambda p: training_loss(p, "reinforce"), "estimator among pathwise, enumeration, .*got 'reinforce'"),
        (lambda p: training_loss(p, "enumeration", 0), "num_particles >= 1, got 0"),
        (lambda p: training_loss(p, "gumbel_softmax", 0), "num_particles >= 1, got 0"),
    ],
)
def test_bad_options_are_refused_at_construction(call, match):
    with pytest.raises(ValueError, match=match):
        call(CategoricalVAE.preset((3,), Bernoulli(), 2, 3, (4,)))


@pytest.mark.parametrize("loss", [EnumeratedLoss, ScoreFunctionLoss, GumbelSoftmaxLoss])
@pytest.mark.parametrize(
    ("likelihood", "x", "match"),
    [
        (Categorical(5), torch.tensor([[0, 1, 5]]), r"x: .*0\.\.4"),
        (Categorical(5), torch.tensor([[0, 1, 4.0]]), "int64"),
        (Bernoulli(), torch.tensor([[0.5, 0, 1]]), "0 or 1"),
        (Bernoulli(), torch.tensor([[math.nan, 0, 1]]), r"x\[0, 0\] is nan"),
    ],
)
def test_data_that_the_pair_cannot_have_made_are_refused_at_the_first_call(loss, likelihood, x, match):
    pair = CategoricalVAE.preset((3,), likelihood, 2, 3, (4,))
    with pytest.raises(ValueError, match=match):
        loss(pair)(x)
    loss(pair)(pair.model(size=2).detach())


def test_classes_outside_the_networks_range_are_named_under_any_tool():
    pair = CategoricalVAE.preset((3,), Categorical(5), 2, 3, (4,))
    with pytest.raises(ValueError, match=r"class indices in 0\.\.4, got 5"):
        decompose_elbo(pair.model, pair.guide, torch.tensor([[0, 1, 5]]), num_particles=10)
