"""The battery: every pair in cases.py runs under all of Pyro's tools, and its programs mean what they say."""

import contextlib
import copy
import math
import warnings

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn

from inference import Decomposition, decompose_elbo
from ppl_models import ModelGuidePair
from ppl_models.registry import UnknownPartError, build, describe
from tests.cases import BATCH, CASES, Case

Z_MAX = 6.5  # two-sided tail 8e-11, of Student's t with 199 degrees 6e-10: with fewer than 1000 tests, below 1e-6


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def pair(case: Case) -> ModelGuidePair:
    return case.build()


@pytest.fixture
def x(case: Case, pair: ModelGuidePair) -> torch.Tensor:
    return case.data(pair)


def test_model_generates_what_it_observes(pair, x):
    trace = poutine.trace(pair.model).get_trace(x)
    assert trace.nodes[pair.data_site]["is_observed"]
    assert trace.nodes[pair.data_site]["value"] is x
    assert x.shape == (BATCH, *pair.data_shape)
    pair.check_data(x)


def test_guide_and_model_have_the_latent_sites_in_one_data_plate(pair, x):
    for program in (pair.model, pair.guide):
        trace = poutine.trace(program).get_trace(x)
        latents = [n for n in trace.stochastic_nodes if n != "data"]
        assert set(latents) == set(pair.latent_sites)
        for name in latents:
            frames = trace.nodes[name]["cond_indep_stack"]
            assert [(f.name, f.dim, f.size) for f in frames] == [("data", -1, BATCH)]


def test_log_probs_have_plate_shape_with_and_without_particles(pair, x):
    for particles, dims in ((None, (BATCH,)), (7, (7, BATCH))):
        with pyro.plate("particles", particles, dim=-2) if particles else contextlib.nullcontext():
            guide = poutine.trace(pair.guide).get_trace(x)
            model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(x)
        for trace in (guide, model):
            trace.compute_log_prob()
            for name in set(trace.nodes) & {*pair.latent_sites, pair.data_site}:
                assert trace.nodes[name]["log_prob"].shape == dims, name


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_svi_moves_every_parameter_without_the_global_store(case, pair, x, elbo, particles):
    if elbo is TraceMeanField_ELBO and not case.reparameterised:
        svi = SVI(pair.model, pair.guide, Adam({"lr": 1e-2}), elbo())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the order of sites, which comes first
            with pytest.raises(NotImplementedError, match="fully reparam"):
                svi.step(x)
        return
    before = {name: p.detach().clone() for name, p in pair.named_parameters()}
    svi = SVI(
        pair.model, pair.guide, Adam({"lr": 1e-2}), elbo(num_particles=particles, vectorize_particles=particles > 1)
    )
    refused = (
        elbo is TraceMeanField_ELBO and not case.mean_field
    )  # Pyro only warns; decompose_elbo refuses the closed form
    with pytest.warns(UserWarning, match="mean field") if refused else contextlib.nullcontext():
        losses = [svi.step(x) for _ in range(3)]
    assert all(math.isfinite(loss) for loss in losses)
    assert len(pyro.get_param_store()) == 0
    unmoved = [name for name, p in pair.named_parameters() if torch.equal(p, before[name])]
    assert not unmoved


def test_predictive_draws_latents_and_data(pair, x):
    prior = Predictive(pair.model, num_samples=4)(size=3)
    assert prior[pair.data_site].shape == (4, 3, *pair.data_shape)
    posterior = Predictive(pair.model, guide=pair.guide, num_samples=4, parallel=True, return_sites=pair.latent_sites)(
        x
    )
    for site in pair.latent_sites:
        assert posterior[site].shape[:2] == (4, BATCH)


def test_render_model_draws_the_graph(pair, x):
    graph = pyro.render_model(pair.model, model_args=(x,), render_distributions=True, render_params=True)
    source = graph.source
    assert all(site in source for site in (*pair.latent_sites, pair.data_site, "data"))


def test_every_parameter_gets_a_finite_gradient(case, pair, x):
    case.objective(pair)(x).mean().backward()
    for name, parameter in pair.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_state_dict_round_trip_gives_the_same_numbers(case, pair, x):
    other = case.build()
    with torch.no_grad():
        for p in pair.parameters():
            p.add_(0.1 * torch.randn_like(p))
    other.load_state_dict(pair.state_dict())
    assert _elbo(pair, x) == _elbo(other, x) == _elbo(copy.deepcopy(pair), x)


def test_description_rebuilds_the_pair_or_says_why_not(case, pair, x):
    if not case.rebuilds:
        with pytest.raises(UnknownPartError, match="network of your own"):
            describe(pair)
        return
    other = build(describe(pair)).to(x.dtype if x.is_floating_point() else torch.get_default_dtype())
    other.load_state_dict(pair.state_dict())
    other = other if pair.labels is None else other.given(pair.labels)  # which are beside the pair, as data are
    assert _elbo(pair, x) == _elbo(other.train(pair.training), x)


def _draws(case: Case, pair: ModelGuidePair, x: torch.Tensor, n: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The loss, and n draws ``[n, B]`` of its terms: of one batch in which each datum is n times."""
    loss = case.objective(pair)
    with torch.no_grad():
        terms = loss.terms(x.repeat(n, *[1] * (x.dim() - 1)))
    return loss, {site: term.view(n, BATCH) for site, term in terms.items()}


def _agrees(draws: torch.Tensor, d: Decomposition) -> bool:
    """Whether independent draws ``[n, B]`` of the bound have the decomposition's ELBO as mean, within both errors."""
    error = (draws.var(0) / len(draws) + d.std_error.square()).sqrt()
    return bool(((draws.mean(0) - d.elbo).abs() <= Z_MAX * error + 1e-9).all())


def test_trace_elbo_equals_the_decomposition_and_the_objective(case, pair, x):
    d = decompose_elbo(pair.model, pair.guide, x, num_particles=400)
    assert d.sites == (*pair.latent_sites, pair.data_site)
    assert torch.allclose(sum(t.value for t in d.values()), d.elbo, atol=1e-9, rtol=1e-9)
    assert _agrees(sum(_draws(case, pair, x, 400)[1].values()), d)
    with torch.no_grad():
        pyro_draws = torch.tensor([-Trace_ELBO().loss(pair.model, pair.guide, x) for _ in range(200)])
    total_error = math.sqrt(float(pyro_draws.var()) / len(pyro_draws) + float(d.monte_carlo_std_error.square().sum()))
    assert abs(float(pyro_draws.mean() - d.monte_carlo.sum())) <= Z_MAX * total_error + 1e-9


def test_a_broken_objective_is_caught_by_the_same_comparison(case, pair, x):
    """The twin of the test above: an objective with one sign wrong does not have the decomposition's ELBO as mean.

    Once the likelihood's sign is flipped, once model and guide are swapped in the rate. Power is worked out in each case
    from the draws themselves: the fault shifts the bound by twice the term whose sign is wrong. Where that is below 1.5
    thresholds in every datum, for both faults, the case says so and is skipped.
    """
    for n in (400, 2000):  # more draws where a few lack the power for one of the faults
        d = decompose_elbo(pair.model, pair.guide, x, num_particles=20 * n)
        loss, terms = _draws(case, pair, x, n)
        judged, shifts = [], []
        for sites in ((pair.data_site,), loss.latents):
            draws = sum(-t if s in sites else t for s, t in terms.items())
            shift = sum(
                2 * d[s].value for s in ((pair.data_site,) if pair.data_site in sites else pair.latent_sites)
            ).abs()
            error = (draws.var(0) / n + d.std_error.square()).sqrt()
            judged += [draws] if bool((shift > 1.5 * Z_MAX * error).any()) else []
            shifts.append(float(shift.max()))
        if len(judged) == 2:
            break
    assert not any(_agrees(draws, d) for draws in judged)
    if not judged:
        pytest.skip(f"too little power: the faults shift the bound by {max(shifts):.2f} nats at most")


def test_closed_form_and_draws_agree_at_every_site_that_has_one(case, pair, x):
    d = decompose_elbo(pair.model, pair.guide, x, num_particles=2000)
    for site in pair.latent_sites:
        if d[site].analytic is None:
            assert not case.closed, d[site].reason
            assert d[site].reason
            continue
        assert abs(d[site].z_score) < Z_MAX


def test_samples_have_the_law_that_log_prob_scores(pair):
    """E[score of each free parameter] = 0 under the model's own draws: a wrong density or sampler shifts it."""
    size = 4000
    parameters = [p for n, p in pair.named_parameters() if not n.startswith("encoder")]
    trace = poutine.trace(pair.model).get_trace(size=size)
    conditioned = poutine.condition(pair.model, {n: trace.nodes[n]["value"].detach() for n in pair.latent_sites})
    scored = poutine.trace(conditioned).get_trace(trace.nodes[pair.data_site]["value"].detach())
    scored.compute_log_prob()
    log_prob = sum(scored.nodes[name]["log_prob"] for name in (*pair.latent_sites, pair.data_site))
    for p in parameters:
        probe = torch.randn_like(p)
        scores = _scores(log_prob, p, probe)
        z = scores.mean() / (scores.std() / size**0.5)
        assert abs(float(z)) < Z_MAX


def _scores(log_prob: torch.Tensor, parameter: torch.Tensor, probe: torch.Tensor) -> torch.Tensor:
    """Directional derivative of each datum's log-probability, by differentiating a weighted sum twice."""
    weights = torch.ones_like(log_prob, requires_grad=True)
    (gradient,) = torch.autograd.grad((weights * log_prob).sum(), parameter, create_graph=True)
    (scores,) = torch.autograd.grad((gradient * probe).sum(), weights, retain_graph=True)
    return scores.detach()


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.exact])
def test_zero_variance_certificate(name):
    """With the posterior as guide every draw gives log p(x): a wrong term has nowhere to hide."""
    case = CASES[name]
    pair = case.build()
    x = case.data(pair)
    d = decompose_elbo(pair.model, pair.guide, x, num_particles=50)
    evidence = pair.log_evidence(x)
    assert torch.allclose(d.monte_carlo, evidence, rtol=1e-10, atol=0)
    assert (d.monte_carlo_std_error <= 1e-10 * evidence.abs()).all()


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.exact and c.gaussian_guide])
@pytest.mark.parametrize("fault", ["sd x 0.8", "mean + 0.3 sd"])
def test_zero_variance_certificate_rejects_a_wrong_guide(name, fault):
    case = CASES[name]
    pair = case.build()
    x = case.data(pair)
    exact = pair.guide_distribution

    def wrong(data):
        law = exact(data)
        scale = law.variance.sqrt()
        loc = law.mean + (0.3 * scale if fault.startswith("mean") else 0)
        return pyro.distributions.Normal(loc, scale * (0.8 if fault.startswith("sd") else 1)).to_event(1)

    pair.guide_distribution = wrong
    d = decompose_elbo(pair.model, pair.guide, x, num_particles=50)
    assert (d.monte_carlo_std_error > 1e-4).all()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda p, x: p.model(), "got neither"),
        (lambda p, x: p.model(size=0), "size >= 1, got 0"),
        (lambda p, x: p.model(x, size=99), "size to be left out"),
        (lambda p, x: p.guide(x[..., :0]), "expected x of shape"),
        (lambda p, x: p.guide(x[0]), "expected x of shape"),
    ],
)
def test_bad_calls_are_refused_in_one_sentence(pair, x, call, match):
    with pytest.raises(ValueError, match=match):
        call(pair, x)


def test_float32_runs_and_stays_float32(case):
    torch.set_default_dtype(torch.float32)
    pair = case.build()
    x = case.data(pair)
    loss = case.objective(pair)(x)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss).all()


def _elbo(pair: ModelGuidePair, x: torch.Tensor) -> float:
    pyro.set_rng_seed(1)
    return -Trace_ELBO().loss(pair.model, pair.guide, x)
