"""DiffusionLoss: expectation and gradient against closed forms, the two ways to evaluate the decoder, and traced graphs.

z-tests hold at most 6.5 standard errors of a hundred means of forty draws or more: a false failure below 1e-8 for the family.
"""

import pytest
import torch
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from inference.bounds.diffusion import decompose_diffusion
from inference.training.diffusion_objective import DiffusionLoss, _Rows
from inference.training.objectives import training_objective
from ppl_models import LinearGaussian
from ppl_models.likelihoods import DiscretizedNormal
from tests.bounds import diffusion_pairs as pairs

Z_MAX = 6.5
SAMPLERS = ("uniform", "stratified", "loss_second_moment")
PAIRS = {
    "pixels": (pairs.tanh_ddpm, pairs.pixels),
    "learned": (lambda: pairs.tanh_ddpm(variance="learned"), pairs.pixels),
    "one-step": (lambda: pairs.tanh_ddpm(num_timesteps=1), pairs.pixels),
    "classes": (pairs.d3pm, pairs.classes),
}


def score(draws, exact):
    """Largest deviation of the mean over the first dim from ``exact``, in standard errors."""
    error = draws.std(0) / len(draws) ** 0.5
    return float(((draws.mean(0) - exact).abs() / (error + 1e-12)).max())


COPIES = 40


def repeated(loss, x, times):
    """``times`` independent evaluations, each the mean over copies of all data: ``[times, B]``."""
    many = x.repeat(COPIES, 1)
    with torch.no_grad():
        return torch.stack([loss(many).reshape(COPIES, len(x)).mean(0) for _ in range(times)])


@pytest.mark.parametrize("timesteps", SAMPLERS)
def test_the_expectation_is_minus_the_elbo(timesteps):
    pair, x = pairs.linear(), pairs.points(4)
    draws = repeated(DiffusionLoss(pair, timesteps=timesteps), x, 150)
    assert score(draws, -pair.elbo(x).detach()) < Z_MAX


def test_a_dropped_factor_and_a_dropped_term_would_be_seen():
    pair, x = pairs.linear((0.1, 0.2)), pairs.points(4)
    loss, exact = DiffusionLoss(pair), -pair.elbo(x).detach()
    draws = repeated(loss, x, 150)
    assert score(draws, exact) < Z_MAX
    last = loss.term(x, torch.full((4,), 2)).detach()
    assert score(draws - last, exact) > 3 * Z_MAX
    assert score(last + (draws - last) / 2, exact) > 3 * Z_MAX  # factor T = 2


@pytest.mark.parametrize("name", PAIRS)
def test_by_enumeration_of_t(name):
    """sum_t p_t (L_t / p_t) with the terms of ``term``: the bound that decompose_diffusion gives."""
    build, data = PAIRS[name]
    pair, x = build(), data()
    loss, last = DiffusionLoss(pair, timesteps="loss_second_moment"), pair.num_timesteps
    d = decompose_diffusion(pair, x, num_particles=1000, seed=0)
    with torch.no_grad():
        many = x.repeat(1000, 1)
        for t in range(last + 1):
            draws = loss.term(many, torch.full((len(many),), t)).reshape(1000, len(x))
            spread = (draws.var(0) / 1000 + d[f"x_{t}"].value_std_error ** 2).sqrt()
            assert ((draws.mean(0) + d[f"x_{t}"].value).abs() <= Z_MAX * spread + 1e-9).all()
    assert score(repeated(loss.train(), x, 150), -d.elbo) < 2 * Z_MAX


@pytest.mark.parametrize("timesteps", SAMPLERS)
def test_the_gradient_is_that_of_the_bound(timesteps):
    pair, x = pairs.linear(), pairs.points(4)
    parameters = list(pair.network.parameters())
    exact = torch.cat(torch.autograd.grad(-pair.elbo(x).mean(), parameters))
    loss = DiffusionLoss(pair, timesteps=timesteps)
    many = x.repeat(COPIES, 1)
    draws = torch.stack([torch.cat(torch.autograd.grad(loss(many).mean(), parameters)) for _ in range(200)])
    assert score(draws, exact) < Z_MAX
    assert score(draws, 0 * exact) > 3 * Z_MAX


def test_the_adaptive_sampler_learns_in_training_only():
    pair, x = pairs.linear(), pairs.points(40)
    loss = DiffusionLoss(pair, timesteps="loss_second_moment").eval()
    for _ in range(20):
        loss(x)
    assert loss.sampler.count.eq(0).all()
    loss.train()
    for _ in range(60):
        loss(x)
    p = loss.sampler.probabilities(x.device)
    assert p.argmax() == 0  # L_0 is by far the largest here
    narrow, wide = (
        float(repeated(each.eval(), x, 100).mean(1).var()) for each in (loss, DiffusionLoss(pair, timesteps="uniform"))
    )
    assert narrow < 0.8 * wide


@pytest.mark.filterwarnings("ignore:weights 'simple' leave a learned variance")
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("weights", ["vlb", "simple", "hybrid"])
def test_step_is_forward_and_terms_at_the_same_draws(name, weights):
    build, data = PAIRS[name]
    options = {"auxiliary_weight": 0.5} if weights == "hybrid" else {}
    loss, x = DiffusionLoss(build(), weights, **options).eval(), data(20)
    torch.manual_seed(3)
    whole = loss(x)
    torch.manual_seed(3)
    objective, terms = loss.step(x)
    assert torch.allclose(whole, objective)
    torch.manual_seed(3)
    again = loss.terms(x)
    assert terms.keys() == again.keys()
    assert all(torch.allclose(terms[key], again[key]) for key in terms)
    bound = -sum(terms.values())
    if weights == "vlb":
        assert torch.allclose(objective, bound)
    assert set(loss.latents) == terms.keys() - {"x_0"}
    assert len(objective) == 20


def test_terms_are_rate_and_distortion_in_expectation():
    pair, x = pairs.linear(), pairs.points(4)
    loss = DiffusionLoss(pair)
    exact = pair.terms(x).detach()
    drawn = {site: repeated(lambda many, site=site: loss.terms(many)[site], x, 150) for site in ("x_4", "x_t", "x_0")}
    assert score(drawn["x_0"], -exact[0]) < Z_MAX
    assert score(drawn["x_t"], -exact[1:4].sum(0)) < Z_MAX
    assert torch.allclose(drawn["x_4"], -exact[4])
    terms = loss.terms(x)
    assert torch.allclose(training_objective(terms, loss.latents), -sum(terms.values()).mean())


def test_simple_is_the_mean_of_the_squared_error_of_eps():
    """Notes 003's L_simple: E over t = 1..T of |eps - eps_theta|^2, with eps recovered from x_t and x_0."""
    pair, x = pairs.continuous_ddpm(predict="eps"), pairs.points(4)
    many = x.repeat(4000, 1)
    with torch.no_grad():
        by_t = []
        for t in range(1, 5):
            a, v = (getattr(pair.process.schedule, n)[t - 1] for n in ("alpha_bar", "marginal_variance"))
            eps = torch.randn_like(many)
            predicted = pair.network(a.sqrt() * many + v.sqrt() * eps, torch.full((len(many),), t))
            by_t.append((eps - predicted).square().sum(-1).reshape(4000, 4).mean(0))
        exact = torch.stack(by_t).mean(0)
    for timesteps in SAMPLERS:
        draws = repeated(DiffusionLoss(pair, "simple", timesteps), x, 100)
        assert ((draws.mean(0) - exact).abs() < 0.1 * exact).all()
        assert score(draws, exact) < 2 * Z_MAX  # ``exact`` has an error of its own, of the same size


def test_hybrid_is_their_weighted_sum():
    pair, x = pairs.tanh_ddpm(variance="learned"), pairs.pixels(30)
    values = []
    with pytest.warns(UserWarning, match="'simple' leave a learned variance as it starts"):
        simple = DiffusionLoss(pair, "simple")
    for loss in (DiffusionLoss(pair), simple, DiffusionLoss(pair, "hybrid", auxiliary_weight=10.0)):
        torch.manual_seed(0)
        values.append(loss(x))
    assert torch.allclose(values[2], values[0] + 10 * values[1])


@pytest.mark.parametrize("name", PAIRS)
def test_the_decoder_is_evaluated_only_where_t_is_zero(name):
    build, data = PAIRS[name]
    pair, x = build(), data(64)
    loss = DiffusionLoss(pair)
    t = loss.sampler(64, x.device)
    seen = []
    law = pair.reconstruction_law
    pair.reconstruction_law = lambda output, x_1: seen.append(len(x_1)) or law(output, x_1)
    values = []
    for rows in (
        loss._rows(t),
        None,
        _Rows(t.topk(loss.sampler.most_of_one(64), largest=False).indices, all_zero=False),
    ):
        torch.manual_seed(0)
        values.append(loss._at(x, t, rows, True, False)[0])
    assert torch.allclose(values[0], values[1])
    assert torch.allclose(values[0], values[2])
    assert seen == [int((t == 0).sum()), 64, loss.sampler.most_of_one(64)]


def test_a_batch_without_t_zero():
    pair, x = (
        pairs.tanh_ddpm(likelihood=DiscretizedNormal(levels=5, scale="learned"), num_timesteps=50),
        pairs.pixels(3),
    )
    loss = DiffusionLoss(pair, timesteps="uniform")
    t = torch.tensor([5, 9, 30])
    bound, _ = loss._at(x, t, loss._rows(t), True, False)
    bound.sum().backward()
    assert bound.isfinite().all()
    assert pair.likelihood.log_scale.grad == 0


@pytest.mark.parametrize("name", PAIRS)
def test_one_network_call_a_step(name):
    build, data = PAIRS[name]
    pair, x = build(), data(5)
    calls = []
    pair.network.register_forward_hook(lambda *_: calls.append(1))
    DiffusionLoss(pair).step(x)
    assert len(calls) == 1


@pytest.mark.parametrize("timesteps", SAMPLERS)
@pytest.mark.parametrize("name", ["pixels", "classes"])
def test_it_traces_to_a_graph(name, timesteps, validation_off):
    """The graph gives eager's numbers on the same random stream, also on other data than it was traced with."""
    build, data = PAIRS[name]
    loss = DiffusionLoss(build(), timesteps=timesteps).eval()
    state = dict(loss.named_parameters()) | dict(loss.named_buffers())
    x = data(40)

    def step(state, x):
        return functional_call(loss, state, (x,))

    graph = make_fx(step)(state, x)
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = loss(x)
        torch.manual_seed(seed)
        assert torch.allclose(graph(state, x), expected)
        x = x.flip(0)
    names = {str(node.target) for node in graph.graph.nodes}
    assert not {"aten.nonzero.default", "aten._local_scalar_dense.default"} & names


@pytest.fixture
def validation_off():
    import pyro

    with pyro.validation_enabled(False):
        yield


def test_the_traced_adaptive_sampler_keeps_learning(validation_off):
    loss, x = DiffusionLoss(pairs.tanh_ddpm(), timesteps="loss_second_moment"), pairs.pixels(40)
    state = {name: value.detach() for name, value in [*loss.named_parameters(), *loss.named_buffers()]}
    state["sampler.count"], state["sampler.second_moment"] = torch.zeros(4), torch.zeros(4)
    graph = make_fx(lambda state, x: functional_call(loss, state, (x,)))(state, x)
    before = state["sampler.count"].clone()
    graph(state, x)
    assert float((state["sampler.count"] - before).sum()) == 40


def test_float32_and_gradients_of_all_parameters():
    torch.set_default_dtype(torch.float32)
    for build, data in PAIRS.values():
        pair, x = build(), data(50)
        x = x.float() if x.is_floating_point() else x
        loss = DiffusionLoss(pair)(x)
        assert loss.dtype == torch.float32
        loss.mean().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in pair.parameters())


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda p: DiffusionLoss(LinearGaussian.random(2, 1)), TypeError, "use ElboLoss for other pairs"),
        (lambda p: DiffusionLoss(p, "elbo"), ValueError, "weights among vlb, simple, hybrid, got 'elbo'"),
        (lambda p: DiffusionLoss(p, timesteps="sobol"), ValueError, "timesteps among uniform, stratified, loss_second"),
        (lambda p: DiffusionLoss(p, "hybrid"), ValueError, "auxiliary_weight with weights='hybrid' and only there"),
        (lambda p: DiffusionLoss(p, "vlb", auxiliary_weight=1.0), ValueError, "and only there, got 1.0 with 'vlb'"),
        (
            lambda p: DiffusionLoss(p, "hybrid", auxiliary_weight=-1.0),
            ValueError,
            "auxiliary_weight to be a positive finite number, got -1",
        ),
    ],
)
def test_bad_calls_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call(pairs.tanh_ddpm())


@pytest.mark.parametrize("weights", ["vlb", "simple"])
@pytest.mark.parametrize("call", ["forward", "step", "terms"])
def test_data_without_probability_are_refused_whatever_t_is_drawn(weights, call):
    for bad in (2 * pairs.pixels(), pairs.pixels() + 0.03):
        loss = DiffusionLoss(pairs.tanh_ddpm(), weights=weights)
        with pytest.raises(ValueError, match=r"evenly spaced values in \[-1, 1\]"):
            getattr(loss, call)(bad)
        getattr(loss, call)(pairs.pixels())  # twin: data on the grid are taken


@pytest.mark.parametrize("call", ["forward", "step", "terms"])
def test_one_batch_axis_is_asked_for_in_every_call(call):
    """A datum alone would be taken for as many data as it has entries, each with a t of its own."""
    loss, x = DiffusionLoss(pairs.continuous_ddpm()), pairs.points(2)
    getattr(loss, call)(x)  # the first batch is fine
    for wrong, match in ((x[0], r"shape \[B, 2\], got \[2\]"), (x[None], r"\[1, 2, 2\]: one t"), (x[:0], "one datum")):
        with pytest.raises(ValueError, match=match):
            getattr(loss, call)(wrong)
    for name in ("term", "auxiliary"):
        with pytest.raises(ValueError, match=r"one t for each of the 2 data, got t of shape \[1\]"):
            getattr(loss, name)(x, torch.tensor([1]))


def test_terms_that_there_are_not_are_refused():
    pair, x = pairs.linear((0.1, 0.2)), pairs.points(4)
    for t in (3, -1):
        with pytest.raises(ValueError, match=rf"t in 0..2, got {t}: L_0 to L_2"):
            DiffusionLoss(pair).term(x, torch.full((4,), t))
    for t in (2, -5):  # the prior's term takes no step of the chain
        for call in (DiffusionLoss(pair).auxiliary, DiffusionLoss(pair).terms_at):
            with pytest.raises(ValueError, match=rf"t in 0..1, got {t}: L_0 to L_2"):
                call(x, torch.tensor([0, 0, 0, t]))
    with pytest.raises(TypeError, match=r"int64 tensor of steps 0..2, got int"):
        DiffusionLoss(pair).term(x, 2)
    with pytest.raises(ValueError, match=r"t in 1..2, got 0"):
        pair.process.number("alpha", 0)
