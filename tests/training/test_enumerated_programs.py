"""Which programs `EnumeratedLoss` sums right, and which it refuses with the reason: found by a reader who tried to break it."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from inference import ElboLoss, EnumeratedLoss, ScoreFunctionLoss, StraightThroughLoss
from inference.bounds.sites import PairError
from inference.training.objectives import PrecisionError
from ppl_models import ModelGuidePair

X = torch.tensor([0.6, -1.0], dtype=torch.float64)


class Programs(ModelGuidePair):
    """A pair of two functions of the pair and x, inside the data plate, with three numbers t to learn."""

    def __init__(self, model, guide, latents):
        super().__init__((), latent_sites=latents)
        self.own_model, self.own_guide = model, guide
        self.t = nn.Parameter(torch.tensor([0.3, -0.5, 0.8]))

    def model(self, x=None, size=None):
        with pyro.plate("data", self.batch_size(x, size)):
            return self.own_model(self, x)

    def guide(self, x):
        with pyro.plate("data", self.batch_size(x)):
            self.own_guide(self, x)


def _normal(loc, x):
    return -0.5 * (x - loc) ** 2 - 0.5 * math.log(2 * math.pi)


def _class_model(pair, x):
    y = pyro.sample("y", dist.Categorical(logits=torch.zeros(3)))
    return pyro.sample("x", dist.Normal(y.to(X.dtype), 1.0), obs=x)


SETTINGS = [
    {},
    {"enumerate": "sequential"},
    {"enumerate": None},
    {"enumerate": "parallel", "num_samples": 5},
    {"enumerate": "parallel", "expand": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_all_values_are_summed_whatever_the_program_says_of_enumeration(settings):
    guide = lambda pair, x: pyro.sample("y", dist.Categorical(logits=pair.t), infer=settings)  # noqa: E731
    pair = Programs(_class_model, guide, ("y",))
    log_q = pair.t.log_softmax(-1)
    joint = _normal(torch.arange(3.0, dtype=X.dtype)[:, None], X[None]) - math.log(3)
    exact = -(log_q.exp()[:, None] * (joint - log_q[:, None])).sum(0)
    loss = EnumeratedLoss(pair)(X)
    assert torch.allclose(loss, exact, rtol=1e-12)
    assert torch.allclose(
        *(torch.autograd.grad(v.sum(), pair.t, retain_graph=True)[0] for v in (loss, exact)), rtol=1e-9
    )


def _markov_guide(steps):
    def guide(pair, x):
        y = 0.0
        for i in steps(range(3)):
            y = pyro.sample(f"y{i}", dist.Bernoulli(logits=pair.t[i] + y))

    return guide


def _markov_model(pair, x):
    y = [pyro.sample(f"y{i}", dist.Bernoulli(torch.tensor(0.5))) for i in range(3)]
    return pyro.sample("x", dist.Normal(y[0] - y[1] + 2 * y[2], 1.0), obs=x)


def test_a_chain_of_classes_is_summed_and_one_whose_dims_are_shared_is_refused():
    names = ("y0", "y1", "y2")
    pair, exact = Programs(_markov_model, _markov_guide(iter), names), 0.0
    for values in torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3):
        log_q, before = 0.0, 0.0
        for i, y in enumerate(values):
            log_q = log_q + dist.Bernoulli(logits=pair.t[i] + before).log_prob(y)
            before = y
        h = 3 * math.log(0.5) + _normal(values[0] - values[1] + 2 * values[2], X) - log_q
        exact = exact - log_q.exp() * h
    assert torch.allclose(EnumeratedLoss(pair)(X), exact, rtol=1e-12)
    with pytest.raises(PairError, match=r"range in place of pyro.markov"):
        EnumeratedLoss(Programs(_markov_model, _markov_guide(pyro.markov), names))(X)


def _drawn_after(pair, x):
    y = pyro.sample("y", dist.Categorical(logits=pair.t))
    pyro.sample("z", dist.Normal(x + pair.t[y], 0.1))


def _reading(read):
    def model(pair, x):
        y = pyro.sample("y", dist.Categorical(logits=torch.zeros(3)))
        z = pyro.sample("z", dist.Normal(0 * y.to(X.dtype), 1.0))
        return pyro.sample("x", dist.Normal(read(z[..., None] * torch.tensor([0.5, -1.0, 2.0]), y), 1.0), obs=x)

    return model


@pytest.mark.parametrize("num_particles", [1, 2])
def test_a_gather_that_reads_one_datum_for_all_is_refused(num_particles):
    """torch.gather takes an index smaller than what it reads from, and returns its shape."""

    def gather(h, y):
        return h.gather(-1, y[..., None])[..., 0]

    def broadcast(h, y):
        h, y = torch.broadcast_tensors(h, y[..., None])
        return h.gather(-1, y[..., :1])[..., 0]

    def product(h, y):
        return (h * torch.nn.functional.one_hot(y, 3)).sum(-1)

    latents, found = ("y", "z"), []
    with pytest.raises(PairError, match="broadcast"):
        EnumeratedLoss(Programs(_reading(gather), _drawn_after, latents), num_particles)(X)
    for read in (broadcast, product):
        pyro.set_rng_seed(3)
        found.append(EnumeratedLoss(Programs(_reading(read), _drawn_after, latents), num_particles)(X))
    assert torch.allclose(*found, rtol=1e-12)


def test_a_cat_of_unequal_shapes_is_refused_in_one_sentence():
    read = lambda h, y: torch.cat([h[..., :1], y[..., None].to(h)], -1).sum(-1)  # noqa: E731
    with pytest.raises(PairError, match=r"they fail .*broadcast them against each other"):
        EnumeratedLoss(Programs(_reading(read), _drawn_after, ("y", "z")))(X)


def test_classes_in_a_plate_of_their_own_are_refused():
    def guide(pair, x):
        with pyro.plate("parts", 3, dim=-2):
            pyro.sample("y", dist.Bernoulli(logits=pair.t[1]))

    def model(pair, x):
        with pyro.plate("parts", 3, dim=-2):
            y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.5)))
        return pyro.sample("x", dist.Normal(y.sum(-2, keepdim=True), 1.0), obs=x)

    with pytest.raises(PairError, match=r"'y' in .*parts.*a site of its own"):
        EnumeratedLoss(Programs(model, guide, ("y",)))(X)


@pytest.mark.parametrize("make", [EnumeratedLoss, lambda pair: ScoreFunctionLoss(pair, 2)], ids=["sum", "score"])
def test_probabilities_in_half_precision_are_refused(make):
    """They do not sum to one: of bfloat16 to 0.99 or 1.01."""
    guide = lambda pair, x: pyro.sample("y", dist.Categorical(logits=pair.t.bfloat16()))  # noqa: E731
    with pytest.raises(PrecisionError, match="bfloat16 at site 'y'"):
        make(Programs(_class_model, guide, ("y",)))(X)


@pytest.mark.parametrize("loss", ["sum", "score", "elbo"])
def test_named_values_are_no_obstacle(loss):
    laws = [dist.Normal(0.0, 1.0), dist.Normal(0.3, 1.0)] if loss == "elbo" else [dist.Categorical(torch.ones(3))] * 2
    make = {"sum": EnumeratedLoss, "score": lambda p: ScoreFunctionLoss(p, 2), "elbo": lambda p: ElboLoss(p, 3)}[loss]

    def guide(pair, x):
        pyro.deterministic("twice", 2 * pyro.sample("y", laws[0]) + pair.t[0])

    def model(pair, x):
        y = pyro.sample("y", laws[1])
        pyro.deterministic("thrice", 3 * y)
        return pyro.sample("x", dist.Normal(y.to(X.dtype), 1.0), obs=x)

    assert make(Programs(model, guide, ("y",)))(X).shape == X.shape


def test_impossible_values_cost_nothing_and_have_no_nan_in_their_gradient():
    logits = torch.tensor([0.0, -torch.inf, 1.0])
    for closed_form in (True, False):
        guide = lambda pair, x: pyro.sample("y", dist.Categorical(logits=pair.t + logits))  # noqa: E731
        pair = Programs(_class_model, guide, ("y",))
        loss = EnumeratedLoss(pair, closed_form=closed_form)(X)
        log_q = (pair.t + logits)[[0, 2]].log_softmax(-1)
        joint = _normal(torch.tensor([0.0, 2.0])[:, None], X[None]) - math.log(3)
        exact = -(log_q.exp()[:, None] * (joint - log_q[:, None])).sum(0)
        assert torch.allclose(loss, exact, rtol=1e-12)
        found, expected = (torch.autograd.grad(v.sum(), pair.t, retain_graph=True)[0] for v in (loss, exact))
        assert torch.allclose(found, expected, rtol=1e-9)


def test_events_of_several_numbers_are_refused_for_what_they_are():
    law = dist.Bernoulli(torch.full((2,), 0.5)).to_event(1)
    program = lambda pair, x: pyro.sample("y", law)  # noqa: E731
    model = lambda pair, x: pyro.sample("x", dist.Normal(program(pair, x).sum(-1), 1.0), obs=x)  # noqa: E731
    with pytest.raises(PairError, match=r"Bernoulli of event shape \[2\].*give each a site"):
        EnumeratedLoss(Programs(model, program, ("y",)))(X)


def test_a_one_hot_latent_of_the_guide_alone_is_not_relaxed():
    """Its -log q would be that of a relaxed draw, which has none."""

    def guide(pair, x):
        a = pyro.sample("a", dist.OneHotCategorical(logits=pair.t), infer={"is_auxiliary": True})
        pyro.sample("y", dist.OneHotCategorical(logits=pair.t + a))

    def model(pair, x):
        y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(3)))
        return pyro.sample("x", dist.Normal(y[..., 0], 1.0), obs=x)

    pair = Programs(model, guide, ("y",))
    with pytest.raises(PairError, match=r"'a' .only the guide has it"):
        StraightThroughLoss(pair)(X)
    assert EnumeratedLoss(pair)(X).shape == X.shape
