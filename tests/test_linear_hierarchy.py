"""The linear hierarchy against one dense joint Gaussian: evidence, bound, posterior guides both ways, and gradients.

With the posterior as guide every draw of log p(x, z) - log q(z | x) is log p(x). ``Z`` bounds each of at most a hundred
statistics of a test, so that a correct pair fails a test with probability below 1e-6 (100 * 2 * Phi(-6) = 2e-7).
"""

from __future__ import annotations

import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine.messenger import Messenger

from inference import ElboLoss, decompose_elbo, log_evidence
from ppl_models.linear_gaussian import LinearGaussian
from ppl_models.linear_hierarchy import LinearHierarchy
from tests.oracles import linear_hvae

Z = 6.0
DIMS = [(3, (2,)), (4, (2, 2)), (2, (3, 1)), (3, (2, 3, 2)), (1, (1, 1, 1, 1))]
GUIDES = ["bottom_up", "top_down"]


def numbers(pair: LinearHierarchy) -> tuple[list[np.ndarray], list[np.ndarray], list[float]]:
    return (
        [w.detach().numpy() for w in pair.weights],
        [b.detach().numpy() for b in pair.biases],
        pair.log_noise_scales.detach().exp().tolist(),
    )


def exact(pair: LinearHierarchy, x: torch.Tensor, shrink: float = 1.0) -> np.ndarray:
    parts = numbers(pair)
    return np.array([linear_hvae.elbo(*parts, row, pair.guide_kind, pair.exact, shrink) for row in x.numpy()])


def flat(value: torch.Tensor, pair: LinearHierarchy) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(pair.parameters()))])


@pytest.mark.parametrize("dims", DIMS)
def test_evidence_is_the_marginal_of_the_joint(dims):
    pair = LinearHierarchy.random(*dims)
    x = torch.randn(4, dims[0])
    expected = [linear_hvae.log_evidence(*numbers(pair), row) for row in x.numpy()]
    assert np.allclose(pair.log_evidence(x).detach(), expected, rtol=1e-10)
    weights, biases, scales = numbers(pair)
    wrong = [linear_hvae.log_evidence(weights, biases, [s**2 for s in scales], row) for row in x.numpy()]
    assert not np.allclose(pair.log_evidence(x).detach(), wrong, rtol=1e-3)


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("dims", DIMS)
def test_the_bound_is_evidence_less_the_kl_of_the_joints(dims, guide, is_exact):
    pair = LinearHierarchy.random(*dims, guide=guide, exact=is_exact)
    x = torch.randn(3, dims[0])
    assert np.allclose(pair.elbo(x).detach(), exact(pair, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("guide", GUIDES)
def test_the_mean_field_guides_have_a_gap(guide):
    pair = LinearHierarchy.random(4, (3, 2), guide=guide, exact=False)
    x = torch.randn(3, 4)
    assert float((pair.log_evidence(x) - pair.elbo(x)).min().detach()) > 0.05


def test_one_layer_is_the_linear_gaussian_pair():
    one = LinearHierarchy.random(4, (2,), exact=False)
    other = LinearGaussian(one.weights[0], one.biases[0], 0.5, guide="mean_field")
    x = torch.randn(5, 4)
    assert torch.allclose(one.log_evidence(x), other.log_evidence(x), rtol=1e-12)
    assert torch.allclose(one.elbo(x), other.elbo(x), rtol=1e-12)


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("dims", DIMS)
def test_zero_variance_certificate(dims, guide):
    pair = LinearHierarchy.random(*dims, guide=guide)
    x = pair.model(size=5).detach()
    d = decompose_elbo(pair.model, pair.guide, x, num_particles=50)
    evidence = torch.tensor([linear_hvae.log_evidence(*numbers(pair), row) for row in x.numpy()])
    assert torch.allclose(d.monte_carlo, evidence, rtol=1e-10, atol=0)
    assert bool((d.monte_carlo_std_error <= 1e-10 * evidence.abs()).all())
    assert d.sites == (*pair.latent_sites, "x")


class Altered(Messenger):
    """Changes the law of one site: its standard deviation times a factor, its mean moved by some of them."""

    def __init__(self, site: str, factor: float, shift: float) -> None:
        super().__init__()
        self.site, self.factor, self.shift = site, factor, shift

    def _pyro_sample(self, msg):
        if msg["name"] == self.site:
            law = msg["fn"]
            tril = self.factor * law.scale_tril
            msg["fn"] = dist.MultivariateNormal(law.loc + self.shift * law.stddev, scale_tril=tril)


@pytest.mark.parametrize(("factor", "shift"), [(0.8, 0.0), (1.0, 0.3)], ids=["sd x 0.8", "mean + 0.3 sd"])
@pytest.mark.parametrize("site", ["z_1", "z_2", "z_3"])
@pytest.mark.parametrize("guide", GUIDES)
def test_the_certificate_rejects_one_wrong_layer(guide, site, factor, shift):
    pair = LinearHierarchy.random(3, (2, 3, 2), guide=guide)
    x = pair.model(size=5).detach()

    def wrong(x):
        with Altered(site, factor, shift):
            return pair.guide(x)

    d = decompose_elbo(pair.model, wrong, x, num_particles=50)
    assert bool((d.monte_carlo_std_error > 1e-4).all())


@pytest.mark.parametrize("fault", ["the scales of two layers swapped", "the marginal prior taken for a unit normal"])
def test_the_certificate_rejects_a_wrong_model(fault):
    pair = LinearHierarchy.random(3, (2, 2))
    x = pair.model(size=5).detach()
    if fault.startswith("the scales"):
        with torch.no_grad():
            pair.log_noise_scales.copy_(torch.tensor([-0.7, -0.2]))
        guide = copy.deepcopy(pair)
        with torch.no_grad():
            guide.log_noise_scales.copy_(torch.tensor([-0.2, -0.7]))
    else:
        guide = copy.deepcopy(pair)
        unit = torch.zeros(2), torch.eye(2)
        guide._priors = lambda: [unit, unit, unit]
    d = decompose_elbo(pair.model, guide.guide, x, num_particles=50)
    assert bool((d.monte_carlo_std_error > 1e-4).all())


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("guide", GUIDES)
def test_every_estimate_of_the_bound_has_the_exact_mean(guide, is_exact):
    pair = LinearHierarchy.random(3, (2, 2, 1), guide=guide, exact=is_exact)
    x = pair.model(size=4).detach()
    d = decompose_elbo(pair.model, pair.guide, x, num_particles=4000)
    bound = torch.from_numpy(exact(pair, x))
    assert bool(((d.elbo - bound).abs() <= Z * d.std_error).all())
    assert bool(((d.monte_carlo - bound).abs() <= Z * d.monte_carlo_std_error + 1e-9).all())
    closed = {site for site in pair.latent_sites if d[site].analytic is not None}
    assert closed == ({"z_3"} if guide == "bottom_up" else {"z_1", "z_2", "z_3"})
    if not is_exact:  # the twin: the evidence is not the bound, and these draws see it
        evidence = pair.log_evidence(x).detach()
        assert bool(((d.monte_carlo - evidence).abs() > Z * d.monte_carlo_std_error).all())


@pytest.mark.parametrize("guide", GUIDES)
def test_conditional_entropies_leave_the_bound_exact(guide):
    """Under a guide too narrow by four, where the bottom-up one gains from them; against the dense Gaussians."""
    pair = LinearHierarchy.random(3, (2, 2, 2), guide=guide, exact=False)
    x = pair.model(size=4).detach()
    law = pair._law
    pair._law = lambda loc, precision: law(loc, 16 * precision)
    d = decompose_elbo(pair.model, pair.guide, x, num_particles=4000)
    bound = torch.from_numpy(exact(pair, x, shrink=0.25))
    assert bool(((d.elbo - bound).abs() <= Z * d.std_error).all())
    halved = {site for site in pair.latent_sites if d[site].with_entropy is not None}
    assert halved == ({"z_1", "z_2"} if guide == "bottom_up" else set())
    if halved:
        assert float((d.std_error / d.monte_carlo_std_error).max()) < 0.8
    off = bound + 0.1  # the twin, of known power
    assert bool(((d.elbo - off).abs() > Z * d.std_error).all())


@pytest.mark.parametrize("guide", GUIDES)
def test_gradient_of_the_exact_bound_against_finite_differences(guide):
    pair = LinearHierarchy.random(2, (2, 2), guide=guide, exact=False)
    x = torch.randn(2, 2)
    gradient = flat(pair.elbo(x).sum(), pair)
    step, found = 1e-6, []
    for parameter in pair.parameters():
        entries = parameter.data.view(-1)
        for i in range(len(entries)):
            kept = float(entries[i])
            entries[i] = kept + step
            up = exact(pair, x).sum()
            entries[i] = kept - step
            found.append((up - exact(pair, x).sum()) / (2 * step))
            entries[i] = kept
    assert np.allclose(gradient, found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("guide", GUIDES)
def test_the_mean_gradient_of_the_loss_is_that_of_the_exact_bound(guide):
    pair = LinearHierarchy.random(3, (2, 2), guide=guide, exact=False)
    x = pair.model(size=4).detach()
    expected = flat(-pair.elbo(x).mean(), pair)
    loss, many = ElboLoss(pair), x.repeat(25, 1)
    draws = torch.stack([flat(loss(many).mean(), pair) for _ in range(120)])
    error = draws.std(0) / len(draws) ** 0.5 + 1e-12
    assert float(((draws.mean(0) - expected) / error).abs().max()) < Z
    assert float(((draws.mean(0) + expected) / error).abs().max()) > 5 * Z  # the twin: the sign


@pytest.mark.parametrize("guide", GUIDES)
def test_importance_weighting_finds_the_evidence(guide):
    exactly, meanly = (LinearHierarchy.random(3, (2, 2), guide=guide, exact=e) for e in (True, False))
    x = exactly.model(size=3).detach()
    expected = exactly.log_evidence(x).detach()
    assert torch.allclose(log_evidence(exactly.model, exactly.guide, x, num_particles=20).log_evidence, expected)
    found = log_evidence(meanly.model, meanly.guide, x, num_particles=4000)
    assert bool(((found.log_evidence - expected).abs() < Z * found.std_error + 0.01).all())


def test_random_leaves_the_default_generator_alone_and_config_rebuilds_the_shapes():
    state = torch.get_rng_state()
    pair = LinearHierarchy.random(3, (2, 1), guide="top_down", exact=False)
    assert torch.equal(state, torch.get_rng_state())
    other = LinearHierarchy.random(**pair.config(), seed=9)
    other.load_state_dict(pair.state_dict())
    x = torch.randn(2, 3)
    assert torch.equal(pair.elbo(x), other.elbo(x))


def test_programs_have_their_sites_in_one_data_plate_and_particles_outside():
    for guide in GUIDES:
        pair = LinearHierarchy.random(3, (2, 1), guide=guide)
        with pyro.plate("particles", 6, dim=-2):
            trace = pyro.poutine.trace(pair.guide).get_trace(torch.randn(4, 3))
        assert trace.nodes["z_1"]["value"].shape == (6, 4, 2)
        assert trace.nodes["z_2"]["value"].shape == (6, 4, 1)


ONE, BIAS = torch.ones(3, 2), torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([ONE], [], [1.0]), "1 weights, 0 biases, 1 noise_scales"),
        (([], [], []), "L >= 1"),
        (([ONE], [torch.ones(2)], [1.0]), r"W_1 of shape \[d_0, d_1\] and b_1 \[d_0\]"),
        (([ONE, ONE], [BIAS, BIAS], [1.0, 1.0]), r"W_2 of shape .* got \[3, 2\] and \[3\]"),
        (([BIAS], [BIAS], [1.0]), "W_1"),
        (([ONE], [BIAS], [0.0]), "positive noise_scales"),
        (([ONE], [BIAS], [1.0], "sideways"), "'bottom_up' or 'top_down', got 'sideways'"),
    ],
)
def test_bad_arguments_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        LinearHierarchy(*arguments)


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("noise_scale", [0.5, 0.1, 0.01])
def test_every_float32_pair_runs_and_agrees_with_float64(noise_scale, guide):
    """Products of three matrices are not symmetric to the last bit, which factorisations insist on."""
    for seed in range(12):
        wide = LinearHierarchy.random(16, (8, 4), seed=seed, noise_scale=noise_scale, guide=guide)
        pair = copy.deepcopy(wide).float()
        x = pair.model(size=3).detach()
        pair.guide(x)
        same = copy.deepcopy(pair).double()  # the float32 numbers, widened
        for got, want in ((pair.log_evidence(x), same.log_evidence(x.double())), (pair.elbo(x), same.elbo(x.double()))):
            np.testing.assert_allclose(got.detach(), want.detach(), rtol=4 * torch.finfo(torch.float32).eps)


def test_a_product_of_three_is_not_symmetric_in_floating_point():
    """Negative control of the test above: what it guards against does occur."""
    many = [torch.randn(16, 8, dtype=torch.float32) @ torch.randn(8, 8, dtype=torch.float32) for _ in range(20)]
    assert any(bool((m @ m.T @ m @ m.T != (m @ m.T @ m @ m.T).T).any()) for m in many)
