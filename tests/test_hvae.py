"""The HVAE against the VAE, against the linear hierarchy and against hand-written sums; its constructor refuses misfits."""

from __future__ import annotations

import copy
import math

import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from inference import ElboLoss, active_units, decompose_elbo
from ppl_models import VAE
from ppl_models.hvae import HVAE, combine_gaussians
from ppl_models.likelihoods import Bernoulli, Categorical, DiscretizedNormal, Normal
from ppl_models.linear_hierarchy import LinearHierarchy
from ppl_models.networks import Decoder, GaussianEncoder
from ppl_models.networks.gaussian_layers import LadderEncoder

Z = 6.0
GUIDES = ["bottom_up", "top_down"]
LIKELIHOODS = {
    "bernoulli": Bernoulli,
    "normal": lambda: Normal(scale=0.3),
    "decoder's scale": lambda: Normal(scale=None),
    "categorical": lambda: Categorical(num_classes=4),
    "discretized": lambda: DiscretizedNormal(levels=17),
}


def preset(guide: str = "bottom_up", likelihood=Bernoulli, latent_dims=(3, 2, 2), shape=(4, 3), **options) -> HVAE:
    return HVAE.preset(shape, likelihood(), latent_dims, **{"hidden": (8,), **options}, guide=guide)


# One layer is the VAE.


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_one_layer_is_the_vae_to_the_last_bit(likelihood, guide):
    vae = VAE.preset((4, 3), likelihood(), latent_dim=2, hidden=(8,))
    hvae = HVAE([copy.deepcopy(vae.encoder)], [copy.deepcopy(vae.decoder)], [2], likelihood(), guide)
    assert hvae.latent_sites == ("z_1",)
    pyro.set_rng_seed(0)
    x = vae.model(size=5).detach()
    pyro.set_rng_seed(0)
    assert torch.equal(hvae.model(size=5), x)
    found = []
    for pair in (vae, hvae):
        pyro.set_rng_seed(1)
        d = decompose_elbo(pair.model, pair.guide, x, num_particles=20)
        pyro.set_rng_seed(2)
        loss = ElboLoss(pair)(x)
        gradients = torch.autograd.grad(loss.sum(), [*_encoders(pair), *_decoders(pair)])
        found.append(
            [d.elbo, d.monte_carlo, *(t.monte_carlo for t in d.values()), d[d.sites[0]].analytic, loss, *gradients]
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _encoders(pair):
    return (pair.encoder if isinstance(pair, VAE) else pair.encoders).parameters()


def _decoders(pair):
    return (pair.decoder if isinstance(pair, VAE) else pair.decoders).parameters()


@pytest.mark.parametrize("guide", GUIDES)
def test_presets_of_one_layer_have_the_same_weights(guide):
    torch.manual_seed(0)
    vae = VAE.preset((4, 3), Bernoulli(), latent_dim=2, hidden=(8, 6))
    torch.manual_seed(0)
    hvae = preset(guide, latent_dims=(2,), hidden=(8, 6))
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), hvae.parameters(), strict=True))


# Against the exact linear hierarchy, whose conditionals are diagonal where layers are one number wide.


class Affine(nn.Module):
    """y -> (a y + b, s), with features handed on for the rungs of a ladder."""

    def __init__(self, a: Tensor, b: Tensor, scale: Tensor, features: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b, self.scale, self.features = nn.Parameter(a), nn.Parameter(b), nn.Parameter(scale), features

    def forward(self, y):
        loc = y @ self.a.T + self.b
        out = loc, self.scale.expand_as(loc)
        return out if self.features is None else (*out, self.features(y))


def linear_hvae(oracle: LinearHierarchy, guide: str) -> HVAE:
    """The HVAE whose networks say what the oracle's exact guide says; layers of width one, x of width two."""
    scales = oracle.log_noise_scales.detach().exp()
    decoders: list[nn.Module] = [nn.Linear(1, 2)]
    decoders[0].weight.data, decoders[0].bias.data = oracle.weights[0].data.clone(), oracle.biases[0].data.clone()
    for layer in range(1, oracle.depth):
        decoders.append(Affine(oracle.weights[layer].data, oracle.biases[layer].data, scales[layer : layer + 1]))
    encoders: list[nn.Module] = []
    if guide == "bottom_up":
        for _, gain, loc, precision in oracle._bottom_up():
            encoders.append(Affine(gain.detach(), loc.detach(), precision.detach()[0].rsqrt()))
    else:
        x = torch.zeros(1, 2)
        for layer, (weight, bias, noise) in enumerate(oracle._likelihoods()[1:], start=1):
            gain = torch.linalg.solve(noise, weight).T.detach()
            precision = (gain @ weight).detach()
            if layer == oracle.depth:  # the posterior itself: prior N(0, 1) times message
                precision = precision + 1
            a = gain / precision
            identity = nn.Identity() if layer < oracle.depth else None
            encoders.append(Affine(a, (-a @ bias).detach(), precision[0].rsqrt(), identity))
        assert encoders[0](x)[0].shape == (1, 1)
    return HVAE(encoders, decoders, [1] * oracle.depth, Normal(scale=float(scales[0])), guide)


@pytest.mark.parametrize("guide", GUIDES)
def test_a_linear_hvae_built_by_hand_gives_the_exact_evidence(guide):
    oracle = LinearHierarchy.random(2, (1, 1, 1), guide=guide)
    pair = linear_hvae(oracle, guide)
    x = oracle.model(size=6).detach()
    d = decompose_elbo(pair.model, pair.guide, x, num_particles=40)
    assert torch.allclose(d.monte_carlo, oracle.log_evidence(x), rtol=1e-10)
    assert bool((d.monte_carlo_std_error < 1e-10).all())


@pytest.mark.parametrize(
    "broken", ["encoders.0.scale", "encoders.1.a", "encoders.2.scale", "decoders.1.b", "decoders.2.scale"]
)
@pytest.mark.parametrize("guide", GUIDES)
def test_with_one_wrong_number_it_does_not(guide, broken):
    """Each network is on trial: a decoder's change moves the top-down guide too, but not its encoders' messages."""
    oracle = LinearHierarchy.random(2, (1, 1, 1), guide=guide)
    pair = linear_hvae(oracle, guide)
    pair.get_parameter(broken).data.mul_(0.7).add_(0.1)
    x = oracle.model(size=6).detach()
    d = decompose_elbo(pair.model, pair.guide, x, num_particles=40)
    assert bool((d.monte_carlo_std_error > 1e-4).all())


# Terms by hand.


@pytest.mark.parametrize("guide", GUIDES)
def test_terms_are_those_of_the_notes(guide):
    """004, "HVAE's ELBO", term by term, from the networks alone and with densities written out."""
    pair, n = preset(guide, likelihood=lambda: Normal(scale=0.5), latent_dims=(3, 2)), 20_000
    x = torch.randn(2, 4, 3)
    d = decompose_elbo(pair.model, pair.guide, x, num_particles=n)

    def log_normal(value, loc, scale):
        return (-0.5 * ((value - loc) / scale).square() - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def draw(loc, scale):
        return loc + scale * torch.randn(n, 2, loc.shape[-1])

    zero, one = torch.zeros(2), torch.ones(2)
    with torch.no_grad():
        if guide == "bottom_up":
            q_1 = pair.encoders[0](x)
            z_1 = draw(*q_1)
            q_2 = pair.encoders[1](z_1)
            z_2 = draw(*q_2)
        else:
            m, s, features = pair.encoders[0](x)
            q_2 = pair.encoders[1](features)
            z_2 = draw(*q_2)
            mu, sigma = pair.decoders[1](z_2)
            precision = sigma**-2 + s**-2
            q_1 = (mu * sigma**-2 + m * s**-2) / precision, precision**-0.5
            z_1 = draw(*q_1)
        log_x = log_normal(x.flatten(1), pair.decoders[0](z_1).flatten(-2), 0.5 * torch.ones(()))
        terms = {
            "z_2": log_normal(z_2, zero, one) - log_normal(z_2, *q_2),
            "z_1": log_normal(z_1, *pair.decoders[1](z_2)) - log_normal(z_1, *q_1),
            "x": log_x,
        }
    for site, term in terms.items():
        error = (term.var(0) / n + d[site].std_error.square()).sqrt()
        assert bool(((term.mean(0) - d[site].monte_carlo).abs() < Z * error).all()), site
    wrong = terms["z_1"] + 0.2  # the twin
    error = (wrong.var(0) / n + d["z_1"].std_error.square()).sqrt()
    assert bool(((wrong.mean(0) - d["z_1"].monte_carlo).abs() > 0.5 * Z * error).all())


@pytest.mark.parametrize("guide", GUIDES)
def test_closed_forms_are_used_at_every_site_of_a_top_down_guide_and_at_the_top_of_a_bottom_up_one(guide):
    pair = preset(guide)
    d = decompose_elbo(pair.model, pair.guide, pair.model(size=3).detach(), num_particles=500)
    assert d.sites == ("z_3", "z_2", "z_1", "x")
    for site in pair.latent_sites:
        refused = guide == "bottom_up" and site != "z_3"
        assert (d[site].analytic is None) == refused, d[site].reason
        assert d[site].reason.startswith("refused") == refused
        if not refused:
            assert abs(d[site].z_score) < Z


def test_the_product_of_gaussians_is_that_of_their_densities():
    """Ratios of the product to N(z; loc, scale) do not depend on z; with the wrong sum of precisions they do."""
    generator = torch.Generator().manual_seed(0)
    m_a, m_b = torch.randn(2, 7, generator=generator)
    s_a, s_b = torch.rand(2, 7, generator=generator) + 0.1
    loc, scale = combine_gaussians((m_a, s_a), (m_b, s_b))

    def log_ratio(z, scale):
        normal = torch.distributions.Normal
        return normal(m_a, s_a).log_prob(z) + normal(m_b, s_b).log_prob(z) - normal(loc, scale).log_prob(z)

    points = torch.randn(2, 7, generator=generator)
    assert torch.allclose(log_ratio(points[0], scale), log_ratio(points[1], scale), atol=1e-10)
    assert not torch.allclose(log_ratio(points[0], 1.1 * scale), log_ratio(points[1], 1.1 * scale), atol=1e-3)
    tiny = torch.full((1,), 1e-25, dtype=torch.float32), torch.full((1,), 1e-30, dtype=torch.float32)
    assert float(combine_gaussians((tiny[0], tiny[0]), (tiny[0], tiny[1]))[1]) > 0  # precisions would overflow


# Layers.


def test_rates_and_active_units_come_by_layer_and_a_collapsed_layer_is_named():
    """The top layer of this guide ignores x and equals the prior: no rate, no active unit."""
    pair = preset("top_down", latent_dims=(3, 2), hidden=(8,))
    with torch.no_grad():
        pair.encoders[0].head.weight.mul_(5)
        pair.encoders[1].body[-1].weight.zero_()
        pair.encoders[1].body[-1].bias.zero_()
    x = pair.model(size=60).detach()
    d = decompose_elbo(pair.model, pair.guide, x, num_particles=50)
    assert float(d["z_2"].analytic.abs().max()) < 1e-12
    assert float(d["z_1"].analytic.mean()) < -1e-3
    units = active_units(pair, x)
    assert units["z_2"].count == 0
    assert units["z_1"].count >= 1
    assert "site z_2: COLLAPSED, none of 2 units is active" in units.words()


@pytest.mark.parametrize("guide", GUIDES)
def test_every_parameter_moves_the_bound(guide):
    pair = preset(guide, likelihood=lambda: Normal(scale="learned"))
    ElboLoss(pair)(pair.model(size=5).detach()).mean().backward()
    for name, parameter in pair.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name


@pytest.mark.parametrize("guide", GUIDES)
def test_programs_run_under_particles_and_in_single_precision(guide):
    torch.set_default_dtype(torch.float32)
    pair = preset(guide)
    x = pair.model(size=4).detach()
    assert x.dtype == torch.float32
    with pyro.plate("particles", 6, dim=-2):
        trace = pyro.poutine.trace(pair.guide).get_trace(x)
        model = pyro.poutine.trace(pyro.poutine.replay(pair.model, trace=trace)).get_trace(x)
    trace.compute_log_prob()
    model.compute_log_prob()
    assert all(trace.nodes[site]["log_prob"].shape == (6, 4) for site in pair.latent_sites)
    assert model.nodes["x"]["log_prob"].dtype == torch.float32


# Presets and descriptions.


def test_burdas_net_has_the_published_sizes():
    """784-200-200-(100)-100-100-(50) and its mirror: every weight matrix counted."""
    pair = HVAE.burda()
    assert pair.data_shape == (28, 28)
    assert pair.latent_dims == (100, 50)
    assert isinstance(pair.likelihood, Bernoulli)
    shapes = [[tuple(w.shape) for w in net.parameters() if w.dim() == 2] for net in (*pair.encoders, *pair.decoders)]
    assert shapes == [
        [(200, 784), (200, 200), (200, 200)],  # the last gives loc and scale of 100 each
        [(100, 100), (100, 100), (100, 100)],
        [(200, 100), (200, 200), (784, 200)],
        [(100, 50), (100, 100), (200, 100)],
    ]
    assert all(net.activation == "tanh" for net in (*pair.encoders, *pair.decoders))
    for module in pair.modules():
        if isinstance(module, nn.Linear):
            limit = math.sqrt(6 / (module.in_features + module.out_features))
            assert 0.95 * limit < float(module.weight.detach().abs().max()) <= limit
            assert not module.bias.any()


@pytest.mark.parametrize("guide", GUIDES)
def test_hidden_widths_may_differ_by_layer(guide):
    pair = preset(guide, latent_dims=(3, 2), hidden=((8, 7), (6,)))
    assert [encoder.hidden for encoder in pair.encoders] == [[8, 7], [6]]
    assert [decoder.hidden for decoder in pair.decoders] == [[7, 8], [6]]
    assert [type(encoder) for encoder in pair.encoders] == [
        LadderEncoder if guide == "top_down" else GaussianEncoder,
        GaussianEncoder,
    ]
    with pytest.raises(ValueError, match="hidden widths for each of 3 layers"):
        preset(guide, hidden=((8,), (6,)))
    with pytest.raises(ValueError, match="hidden widths for each of 2 layers"):
        preset(guide, latent_dims=(3, 2), hidden=(8, (6,)))


def test_config_says_what_rebuilds_the_pair():
    pair = preset("bottom_up", likelihood=lambda: Normal(scale=0.3), latent_dims=(3, 2))
    config = pair.config()
    encoders = [GaussianEncoder(**{k: v for k, v in e.items() if k != "class"}) for e in config["encoders"]]
    decoders = [Decoder(**{k: v for k, v in d.items() if k != "class"}) for d in config["decoders"]]
    other = HVAE(encoders, decoders, config["latent_dims"], Normal(scale=0.3), config["guide"])
    other.load_state_dict(pair.state_dict())
    x, values = torch.randn(3, 4, 3), []
    for each in (pair, other):
        pyro.set_rng_seed(0)
        values.append(ElboLoss(each)(x))
    assert torch.equal(*values)


@pytest.mark.parametrize("guide", GUIDES)
def test_the_bound_traces_to_one_flat_graph(guide):
    """As a compiled objective needs it: no value is read into Python, and the graph gives the same number."""
    pair = preset(guide)
    x = pair.model(size=8).detach()
    loss = ElboLoss(pair)
    loss(x)  # prepares

    def bound(parameters, x):
        return torch.func.functional_call(loss, {f"pair.{k}": v for k, v in parameters.items()}, (x,))

    parameters = {name: p.detach() for name, p in pair.named_parameters()}
    with pyro.validation_enabled(False):
        graph = make_fx(bound)(parameters, x)
    assert not [node for node in graph.graph.nodes if "_local_scalar_dense" in str(node.target)]
    moved = {name: p + 0.1 for name, p in parameters.items()}
    values = []
    for program in (bound, graph):
        pyro.set_rng_seed(0)
        values.append(program(moved, x + 0 * x))
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)
    pyro.set_rng_seed(0)
    assert not torch.allclose(graph(parameters, x), values[0])  # the twin: the parameters are no constants of the graph


# Refusals.


class Returns(nn.Module):
    def __init__(self, *value):
        super().__init__()
        self.value = value if len(value) > 1 else value[0]

    def forward(self, x):
        return self.value


def _parts(guide="bottom_up"):
    pair = preset(guide, latent_dims=(3, 2))
    return {
        "encoders": list(pair.encoders),
        "decoders": list(pair.decoders),
        "latent_dims": (3, 2),
        "likelihood": Bernoulli(),
        "guide": guide,
    }


def _with(name, index, module):
    def change(parts):
        parts[name][index] = module

    return change


@pytest.mark.parametrize(
    ("guide", "change", "error", "match"),
    [
        ("bottom_up", lambda p: p["encoders"].pop(), ValueError, "got 1 encoders, 2 decoders, 2 latent_dims"),
        ("bottom_up", lambda p: p.update(encoders=[], decoders=[], latent_dims=()), ValueError, "L >= 1"),
        ("bottom_up", lambda p: p.update(latent_dims=(3, 0)), ValueError, r"whole numbers >= 1, got \[3, 0\]"),
        ("bottom_up", lambda p: p.update(latent_dims=(3, 2.0)), ValueError, "whole numbers"),
        ("bottom_up", lambda p: p.update(guide="sideways"), ValueError, "'bottom_up' or 'top_down', got 'sideways'"),
        ("bottom_up", _with("encoders", 0, lambda x: x), TypeError, r"encoders\[0\] to be a torch.nn.Module"),
        ("bottom_up", _with("encoders", 0, nn.Flatten()), TypeError, r"encoders\[0\], of z_1, to return a pair"),
        (
            "bottom_up",
            _with("encoders", 1, GaussianEncoder((5,), 2, (4,))),
            ValueError,
            r"encoders\[1\], of z_2, to take",
        ),
        (
            "bottom_up",
            _with("encoders", 1, GaussianEncoder((3,), 4, (4,))),
            ValueError,
            r"loc of shape \[B, 2\].*\[1, 4\]",
        ),
        ("bottom_up", _with("encoders", 1, Returns(torch.ones(1, 2), -torch.ones(1, 2))), ValueError, "scale > 0"),
        ("bottom_up", _with("decoders", 1, Decoder(2, (3,), (4,))), TypeError, r"decoders\[1\], of z_1 given z_2, to"),
        (
            "bottom_up",
            _with("decoders", 1, Decoder(2, (4,), (4,), with_scale=True)),
            ValueError,
            r"loc of shape \[B, 3\]",
        ),
        (
            "bottom_up",
            _with("decoders", 0, Decoder(5, (3,), (4,))),
            ValueError,
            r"decoders\[0\], of x given z_1, to take",
        ),
        ("bottom_up", lambda p: p.update(likelihood=Normal(scale=None)), TypeError, "scale"),
        ("top_down", _with("encoders", 0, GaussianEncoder((4, 3), 3, (4,))), TypeError, r"\(loc, scale, features\)"),
        (
            "top_down",
            _with("encoders", 0, LadderEncoder((4, 3), 3, (5,))),
            ValueError,
            r"encoders\[1\], of z_2, to take",
        ),
        ("top_down", _with("encoders", 1, LadderEncoder((8,), 2, (5,))), TypeError, "pair .*got a tuple of 3"),
    ],
)
def test_what_does_not_fit_is_refused_at_construction(guide, change, error, match):
    parts = _parts(guide)
    HVAE(**parts)
    change(parts)
    with pytest.raises(error, match=match):
        HVAE(**parts)


def test_a_rung_without_features_is_refused():
    with pytest.raises(ValueError, match="at least one hidden width"):
        LadderEncoder((4,), 2, ())


def test_data_outside_the_likelihood_are_refused():
    with pytest.raises(ValueError, match="train"):
        preset().check_data(torch.full((2, 4, 3), 0.5), "train")
