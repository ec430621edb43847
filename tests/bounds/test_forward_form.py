"""The forward form of notes 000: each term in closed form on affine chains, its sum, and the signs of its terms.

z-tests hold at most 7 standard errors with thousands of draws behind each: below 1e-9 for the family.
"""

import math

import pytest
import torch

from inference.bounds import decompose_elbo
from inference.bounds.diffusion import decompose_diffusion
from inference.bounds.forward_form import decompose_forward
from ppl_models import LinearGaussian
from ppl_models.linear_diffusion import LinearDiffusion
from ppl_models.processes import NoiseSchedule
from tests.bounds import diffusion_pairs as pairs
from tests.oracles import gaussian_diffusion as oracle
from tests.oracles.linear_forms import entropy_of_normal, expected_log_normal, normal

Z_MAX = 7.0
BETAS = (0.1, 0.25, 0.4, 0.7)


def z(estimate, exact, error):
    return float(((estimate - exact).abs() / (error + 1e-12 * (1 + exact.abs()))).max())


def exact_terms(betas, kernels, x_0):
    """E[log p(x_t | x_{t+1}) - log q(x_t | x_{t-1})] by t in one dimension, in affine forms of the noises."""
    chain = [x_0]
    for beta in betas:
        chain.append(normal(math.sqrt(1 - beta) * chain[-1], math.sqrt(beta)))
    last = len(betas)
    terms = []
    for t in range(last):
        gain, offset, variance = kernels[t]
        log_p = expected_log_normal(chain[t], gain * chain[t + 1] + offset, math.sqrt(variance))
        terms.append(log_p + (entropy_of_normal(math.sqrt(betas[t - 1])) if t else 0.0))
    return [*terms, expected_log_normal(chain[last], 0.0, 1.0) + entropy_of_normal(math.sqrt(betas[-1]))]


def exact_table(x):
    kernels = [oracle.reverse_kernels(BETAS, m, s) for m, s in zip(pairs.LOC, pairs.SCALE, strict=True)]
    rows = [[exact_terms(BETAS, k, float(v)) for k, v in zip(kernels, row, strict=True)] for row in x]
    return torch.tensor(rows).sum(1).T  # [T + 1, B]


@pytest.fixture(scope="module")
def known():
    torch.set_default_dtype(torch.float64)
    pair, x = pairs.linear(BETAS), pairs.points(4)
    return pair, x, decompose_forward(pair, x, num_particles=4000, seed=0)


def test_each_term_is_its_closed_form(known):
    _, x, d = known
    exact = exact_table(x)
    for t in range(5):
        term = d[f"x_{t}"]
        assert z(term.monte_carlo, exact[t], term.std_error) < Z_MAX
        assert z(term.value, exact[t], term.value_std_error) < Z_MAX
    assert z(d.reconstruction, exact[0], d["x_0"].std_error) < Z_MAX
    assert z(d.prior_matching, exact[4], d["x_4"].analytic_std_error) < Z_MAX
    assert d.consistency.shape == (3, 4)
    assert torch.equal(d.consistency[0], d["x_1"].value)


def test_the_sum_is_the_bound_and_single_terms_are_not_those_of_003(known):
    pair, x, d = known
    exact = -pair.terms(x).detach()
    assert z(d.elbo, exact.sum(0), d.std_error) < Z_MAX
    assert z(d.monte_carlo, exact.sum(0), d.monte_carlo_std_error) < Z_MAX
    difference = (exact_table(x) - exact).abs()
    assert difference[0].max() < 1e-9  # the reconstruction is the same in both
    assert difference[1:].min() > 0.1


def test_terms_are_those_of_the_programs():
    for build, data in ((pairs.tanh_ddpm, pairs.pixels), (pairs.d3pm, pairs.classes)):
        pair, x = build(), data()
        d = decompose_forward(pair, x, num_particles=2000, seed=0)
        e = decompose_elbo(pair.model, pair.guide, x, num_particles=2000)
        assert d.sites == e.sites
        for site in d.sites:
            error = (d[site].std_error ** 2 + e[site].std_error ** 2).sqrt()
            assert z(d[site].monte_carlo, e[site].monte_carlo, error) < Z_MAX
        b = decompose_diffusion(pair, x, num_particles=2000, seed=0)
        assert z(d.elbo, b.elbo, (d.std_error**2 + b.std_error**2).sqrt()) < Z_MAX


def test_consistency_terms_have_no_sign():
    """Notes 000 print >= 0; minus an expected KL would be <= 0. Neither holds, and neither does a KL."""
    x = torch.tensor([[0.3, -0.2]])
    point = LinearDiffusion(
        NoiseSchedule([0.2] * 6), x[0], torch.full((2,), 1e-3)
    )  # data all but certain: p(x_t|x_{t+1}) = q
    d = decompose_forward(point, x, num_particles=4000, seed=0)
    first = d["x_1"]
    # I(x_1; x_2 | x_0) = 1/2 log(1 / (1 - rho^2)) in each of two dimensions, with rho^2 = alpha_2 beta_1 / (1 - alpha-bar_2)
    information = -math.log(1 - 0.8 * 0.2 / 0.36)
    assert float(first.value) > Z_MAX * float(first.std_error)
    assert abs(float(first.value) - information) < Z_MAX * float(first.std_error) + 1e-4
    assert float(d.prior_matching) < 0
    elsewhere = LinearDiffusion(NoiseSchedule([0.2] * 6), x[0] + 3, torch.full((2,), 0.3))  # a model of other data
    e = decompose_forward(elsewhere, x, num_particles=4000, seed=0)
    assert float(e["x_1"].value) < -Z_MAX * float(e["x_1"].std_error)


def test_the_kl_in_place_of_a_consistency_term_is_wrong(known):
    """The twin: x_t drawn from q(x_t | x_{t-1}) apart from x_{t+1}, as if x_{t+1} did not depend on it."""
    pair, x, d = known
    process, x = pair.process, x.expand(4000, 4, 2)
    x_1 = process.transition(x, torch.tensor(1)).sample()
    x_2 = process.transition(x_1, torch.tensor(2)).sample()
    kl = torch.distributions.kl_divergence(process.transition(x, torch.tensor(1)), pair.reverse(x_2, torch.tensor(2)))
    assert z(-kl.detach().mean(0), d["x_1"].value, d["x_1"].std_error) > 3 * Z_MAX


@pytest.mark.parametrize("name", ["pixels", "classes"])
def test_no_number_depends_on_the_chunks(name):
    pair, x = (pairs.tanh_ddpm(), pairs.pixels(7)) if name == "pixels" else (pairs.d3pm(), pairs.classes(7))
    whole = decompose_forward(pair, x, num_particles=30, seed=3)
    parts = decompose_forward(pair, x, num_particles=30, seed=3, chunk_size=20)
    assert torch.allclose(whole.elbo, parts.elbo, rtol=1e-12)
    assert torch.allclose(whole.std_error, parts.std_error, rtol=1e-9)
    assert torch.allclose(whole.consistency, parts.consistency, rtol=1e-12, atol=1e-12)
    assert whole.mean_std_error == pytest.approx(parts.mean_std_error, rel=1e-9)


def test_a_chain_of_one_step():
    pair, x = pairs.continuous_ddpm(num_timesteps=1), pairs.points()
    d = decompose_forward(pair, x, num_particles=500, seed=0)
    assert d.consistency.shape == (0, 3)
    b = decompose_diffusion(pair, x, num_particles=500, seed=1)
    assert z(d.elbo, b.elbo, (d.std_error**2 + b.std_error**2).sqrt()) < Z_MAX
    assert torch.allclose(d.prior_matching, b["x_1"].value)  # x_0 is given: exact in both


def test_why_no_closed_form_is_said(known):
    _, _, d = known
    assert d["x_2"].reason == "refused: x_3, above x_2 in the model, descends from it in q, so the term is no KL"
    assert "descends" in d.table()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda p, x: decompose_forward(LinearGaussian.random(2, 1), x), TypeError, "use decompose_elbo"),
        (lambda p, x: decompose_forward(p, x + 0.1), ValueError, "evenly spaced values"),
        (lambda p, x: decompose_forward(p, x[None]), ValueError, r"x_0 of shape \[B, 2\], got \[1, "),
        (lambda p, x: decompose_forward(p, x, seed=-1), ValueError, "a seed >= 0, got -1"),
        (lambda p, x: decompose_forward(p, x, num_particles=0), ValueError, "whole num_particles >= 1"),
        (lambda p, x: decompose_forward(p, x, chunk_size=-1), ValueError, "whole chunk_size >= 1"),
    ],
)
def test_bad_calls_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call(pairs.tanh_ddpm(), pairs.pixels())
