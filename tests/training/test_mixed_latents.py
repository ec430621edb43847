"""Pairs with a class and a number among their latents: what each estimator makes of them, against sums and quadrature by hand.

The guide's parameters have a row for each datum, so that one backward pass gives as many independent draws of the gradient
as there are rows.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from inference import ElboLoss, EnumeratedLoss, compile_objective, decompose_elbo, fit
from inference.bounds.sites import PairError
from inference.bounds.whole_densities import unmasked
from inference.training import enumerated_objective
from inference.training.discrete_objective import ScoreFunctionLoss
from inference.training.evaluation import evaluate
from inference.training.gradient_estimators import training_loss
from inference.training.objectives import NotReparameterizedError
from inference.training.relaxed_objective import GumbelSoftmaxLoss, StraightThroughLoss
from ppl_models import ModelGuidePair
from tests.oracles import mixture_vae as oracle

Z_MAX = 6.5  # two-sided tail 8e-11
X = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64)
ORACLES = {"class first": oracle.class_first, "number first": oracle.number_first}


def _values(num_classes: int = 3) -> dict[str, Tensor]:
    """Parameters under which no two classes, and no term, are alike."""
    by_class = {name: 0.6 * torch.randn(num_classes) for name in "amscdeft"}
    return by_class | {name: 0.8 * torch.randn(len(X)) for name in "wb"}


class _Mixture(ModelGuidePair):
    """p(y) p(z | y) p(x | z) with a guide in either order; parameters ``[rows, ...]`` or one row for all data."""

    def __init__(self, values: dict[str, Tensor], order: str, rows: int = 1) -> None:
        super().__init__((len(X),), ("y", "z"))
        self.order = order
        self.values = nn.ParameterDict({name: v.expand(rows, -1).clone() for name, v in values.items()})

    def _first(self) -> None:
        """What both programs draw before all else."""

    def _of(self, name: str, y: Tensor) -> Tensor:
        return (self.values[name] * y).sum(-1)

    def model(self, x=None, size=None):
        v = self.values
        with pyro.plate("data", self.batch_size(x, size)):
            self._first()
            y = pyro.sample("y", dist.OneHotCategorical(logits=v["a"]))
            z = pyro.sample("z", dist.Normal(self._of("m", y), self._of("s", y).exp()))
            return pyro.sample("x", dist.Normal(v["w"] * z[..., None] + v["b"], 1.0).to_event(1), obs=x)

    def guide(self, x):
        v, total = self.values, x.sum(-1)
        with pyro.plate("data", self.batch_size(x)):
            self._first()
            if self.order == "class first":
                y = pyro.sample("y", dist.OneHotCategorical(logits=v["c"] + v["d"] * total[..., None]))
                pyro.sample("z", dist.Normal(self._of("e", y) + self._of("f", y) * total, self._of("t", y).exp()))
            else:
                z = pyro.sample("z", dist.Normal(v["e"][:, 0] + v["f"][:, 0] * total, v["t"][:, 0].exp()))
                pyro.sample("y", dist.OneHotCategorical(logits=v["c"] + v["d"] * z[..., None]))


def _exact(values: dict[str, Tensor], order: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms and the ELBO's gradient by hand."""
    leaves = {name: v.clone().requires_grad_() for name, v in values.items()}
    terms = ORACLES[order](leaves, X)
    gradients = torch.autograd.grad(sum(terms.values()), list(leaves.values()), allow_unused=True)
    filled = (torch.zeros_like(v) if g is None else g for g, v in zip(gradients, values.values(), strict=True))
    return {name: term.detach() for name, term in terms.items()}, dict(zip(values, filled, strict=True))


def _z_scores(loss_of, order: str, rows: int, bound_alone: bool = False) -> float:
    """The largest z-score of a loss's terms and gradients against those by hand, over ``rows`` independent draws."""
    values = _values()
    terms, gradients = _exact(values, order)
    loss = loss_of(_Mixture(values, order, rows))
    got = loss.terms(X.expand(rows, -1))
    pairs = [(got[name].detach(), terms[name]) for name in terms]
    if not bound_alone:
        parameters = loss.pair.values
        total = sum(term.sum() for term in got.values())
        found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, materialize_grads=True)
        pairs += [(draws, gradients[name]) for name, draws in zip(parameters, found, strict=True)]
    scores = []
    for draws, exact in pairs:
        error = draws.std(0) / len(draws) ** 0.5
        scores.append(((draws.mean(0) - exact).abs() / (error + 1e-10 * (1 + exact.abs()))).max())
    return float(max(scores))


@pytest.mark.parametrize("order", ORACLES)
@pytest.mark.parametrize("num_particles", [1, 3])
def test_enumeration_has_the_terms_and_gradients_of_sums_by_hand(order, num_particles):
    assert _z_scores(lambda pair: EnumeratedLoss(pair, num_particles), order, 20_000) < Z_MAX


@pytest.mark.parametrize("order", ORACLES)
def test_the_score_function_has_them_too(order):
    assert _z_scores(lambda pair: ScoreFunctionLoss(pair, 3), order, 40_000) < Z_MAX


@pytest.mark.parametrize("order", ORACLES)
@pytest.mark.parametrize("kind", [GumbelSoftmaxLoss, StraightThroughLoss])
def test_relaxed_losses_have_the_discrete_bounds_terms(order, kind):
    """The value alone: their gradient is biased."""
    assert _z_scores(lambda pair: kind(pair, temperature=0.5), order, 20_000, bound_alone=True) < Z_MAX


def _uniform(site):
    """The mistake to be caught: values of y that count alike."""
    return torch.full_like(unmasked(site["fn"]).log_prob(site["value"]), -math.log(3))


def _without_gradient(site):
    """The mistake to be caught: weights that the gradient does not see."""
    return unmasked(site["fn"]).log_prob(site["value"]).detach()


@pytest.mark.parametrize("order", ORACLES)
@pytest.mark.parametrize("wrong", [_uniform, _without_gradient])
def test_wrong_weights_of_the_classes_are_caught(order, wrong, monkeypatch):
    monkeypatch.setattr(enumerated_objective, "log_probability", wrong)
    assert _z_scores(EnumeratedLoss, order, 20_000) > Z_MAX


@pytest.mark.parametrize("order", ORACLES)
def test_summing_over_classes_scatters_less_than_drawing_them(order):
    values, rows = _values(), 4000
    variance = {}
    for name, num_particles in (("enumeration", 1), ("score_function", 3)):
        pair = _Mixture(values, order, rows)
        loss = training_loss(pair, name, num_particles)
        (gradient,) = torch.autograd.grad(loss(X.expand(rows, -1)).sum(), pair.values["c"])
        variance[name] = float(gradient.var(0).sum())
    assert variance["enumeration"] < variance["score_function"]


@pytest.mark.parametrize("order", ORACLES)
def test_terms_agree_with_the_decomposition(order):
    """Another path to the same terms: plain draws of both latents."""
    pair = _Mixture(_values(), order)
    d = decompose_elbo(pair.model, pair.guide, X[None], num_particles=20_000)
    terms, _ = _exact({name: v[0].detach() for name, v in pair.values.items()}, order)
    for name, term in terms.items():
        row = d.terms[name]
        assert abs(float(row.value) - float(term)) < Z_MAX * float(row.std_error) + 1e-9


def test_traced_steps_are_the_same():
    pair = _Mixture(_values(), "class first")
    x = pair.model(size=6).detach()
    loss = EnumeratedLoss(pair, num_particles=2)
    fast = compile_objective(loss, x, backend="eager")
    results = []
    for objective in (fast, loss):
        pyro.set_rng_seed(5)
        value = objective(x)
        results.append([value, *torch.autograd.grad(value.sum(), list(loss.parameters()))])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_fit_trains_a_mixture_and_reports_its_bound(tmp_path):
    torch.set_default_dtype(torch.float32)
    values = _values()
    truth = _Mixture(values | {"a": torch.zeros(3), "m": torch.tensor([-4.0, 0.0, 4.0])}, "class first")
    x = truth.model(size=400).detach()
    pair = _Mixture({name: 0.1 * torch.randn_like(v) for name, v in values.items()}, "class first")
    run = fit(
        pair,
        x,
        tmp_path / "run",
        objective="enumeration",
        num_particles=2,
        epochs=30,
        learning_rate=0.05,
        progress=False,
    )
    assert run.metrics[-1]["train_elbo"] > run.metrics[0]["train_elbo"]
    trained = {name: v[0].detach() for name, v in run.pair.values.items()}
    by_hand = sum(sum(oracle.class_first(trained, row).values()) for row in x) / len(x)
    found = evaluate(EnumeratedLoss(run.pair), x, batch_size=400)
    assert abs(found.elbo - float(by_hand)) < 1  # nats; the draws' own error is a tenth of it


class _Counted(_Mixture):
    """A count beside the class: it has no list of values and no pathwise gradient."""

    def _first(self):
        pyro.sample("n", dist.Poisson(2.0))


class _ByPosition(_Mixture):
    """Reads z by the position of its datum, which leading dims move."""

    def guide(self, x):
        v, total = self.values, x.sum(-1)
        with pyro.plate("data", self.batch_size(x)):
            y = pyro.sample("y", dist.OneHotCategorical(logits=v["c"] + v["d"] * total[..., None]))
            pyro.sample("z", dist.Normal(y[:, 0] + total, 1.0))


@pytest.mark.parametrize(
    ("kind", "make", "error", "match"),
    [
        (_Counted, EnumeratedLoss, PairError, "enumerated or are reparameterised, got Poisson at site 'n': use Score"),
        (_Counted, GumbelSoftmaxLoss, PairError, "one-hot latents to relax, got Poisson at site 'n'"),
        (
            _Mixture,
            ElboLoss,
            NotReparameterizedError,
            "got OneHotCategorical at site 'y'.*EnumeratedLoss or ScoreFunction",
        ),
        (_Counted, ElboLoss, NotReparameterizedError, "use ScoreFunctionLoss"),
        (_ByPosition, EnumeratedLoss, PairError, "all values of a latent are taken at once, but .*leading dims"),
    ],
)
def test_what_cannot_be_summed_or_drawn_is_refused_by_name(kind, make, error, match):
    pair = kind(_values(), "class first")
    with pytest.raises(error, match=match):
        make(pair)(X.expand(4, -1))
