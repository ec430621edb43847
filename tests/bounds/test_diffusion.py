"""decompose_diffusion against closed forms, against the Pyro programs, and against itself at other chunk sizes and dtypes.

z-tests hold at most 7 standard errors with several hundred draws behind each: for the family of some hundred numbers a
false failure has probability below 1e-9 if errors are normal, and below 1e-6 with the tails that several hundred draws leave.
"""

import math

import numpy as np
import pyro
import pytest
import torch
from torch import nn

from inference.bounds import NotANumberError, decompose_elbo, diffusion
from inference.bounds.diffusion import decompose_diffusion
from inference.bounds.seeded_draws import Streams, row_seeds
from ppl_models import LinearGaussian
from ppl_models.ddpm import DDPM
from ppl_models.likelihoods import Normal
from ppl_models.processes import NoiseSchedule
from tests.bounds import diffusion_pairs as pairs
from tests.oracles import gaussian_diffusion as oracle

Z_MAX = 7.0
CASES = {
    "pixels": (pairs.tanh_ddpm, pairs.pixels),
    "learned-variance": (lambda: pairs.tanh_ddpm(variance="learned"), pairs.pixels),
    "continuous-eps": (lambda: pairs.continuous_ddpm(predict="eps"), pairs.points),
    "one-step": (lambda: pairs.continuous_ddpm(num_timesteps=1), pairs.points),
    "classes": (pairs.d3pm, pairs.classes),
}


def z(estimate, exact, error):
    return float(((estimate - exact).abs() / (error + 1e-12 * (1 + exact.abs()))).max())


@pytest.fixture(scope="module")
def known():
    torch.set_default_dtype(torch.float64)
    pair, x = pairs.linear(), pairs.points(4)
    return pair, x, decompose_diffusion(pair, x, num_particles=2000, seed=0)


def test_each_term_is_its_closed_form(known):
    pair, x, d = known
    exact = -pair.terms(x).detach()
    for t in range(5):
        term = d[f"x_{t}"]
        assert z(term.monte_carlo, exact[t], term.std_error) < Z_MAX
        assert z(term.value, exact[t], term.value_std_error) < Z_MAX
    assert torch.allclose(d["x_4"].analytic, exact[4], rtol=1e-12, atol=0)
    assert d["x_4"].analytic_std_error.eq(0).all()
    assert d.sites == ("x_4", "x_3", "x_2", "x_1", "x_0")


def test_the_sum_is_the_dense_oracle_s_bound(known):
    _, x, d = known
    betas = (0.1, 0.25, 0.4, 0.7)
    kernels = [oracle.reverse_kernels(betas, m, s) for m, s in zip(pairs.LOC, pairs.SCALE, strict=True)]
    exact = torch.tensor([sum(oracle.elbo(betas, k, float(v)) for k, v in zip(kernels, row, strict=True)) for row in x])
    assert z(d.elbo, exact, d.std_error) < Z_MAX
    assert z(d.monte_carlo, exact, d.monte_carlo_std_error) < Z_MAX
    assert abs(float(d.elbo.mean() - exact.mean())) < Z_MAX * d.mean_std_error


@pytest.mark.parametrize("fault", ["swapped", "schedule", "no prior term"])
def test_a_fault_would_be_seen(known, fault):
    """The twins: KL(p || q) for KL(q || p), another schedule, L_T left out. Each is off by far more than is allowed above."""
    pair, x, d = known
    if fault == "schedule":
        wrong = -pairs.linear((0.2, 0.25, 0.4, 0.7)).terms(x).detach()
        assert z(d["x_0"].value, wrong[0], d["x_0"].value_std_error) > 3 * Z_MAX
    elif fault == "no prior term":
        pair = pairs.linear((0.1, 0.2))
        d = decompose_diffusion(pair, x, num_particles=2000, seed=0)
        assert z(d.elbo - d["x_2"].value, -pair.terms(x).detach().sum(0), d.std_error) > 3 * Z_MAX
    else:
        t, process = torch.tensor(2), pair.process
        x_next = process.marginal(x.expand(2000, 4, 2), t).sample()
        q, p = process.posterior(x_next, x.expand_as(x_next), t), pair.reverse(x_next, t)
        swapped = -torch.distributions.kl_divergence(p, q).detach().mean(0)
        assert z(swapped, d["x_1"].value, d["x_1"].value_std_error) > 3 * Z_MAX


@pytest.mark.parametrize("name", CASES)
def test_it_agrees_with_the_programs(name):
    """Trace_ELBO's terms under the posterior guide, drawn by another road: whole chains of Pyro sites."""
    build, data = CASES[name]
    pair, x = build(), data()
    d = decompose_diffusion(pair, x, num_particles=1000)
    e = decompose_elbo(pair.model, pair.posterior_guide, x, num_particles=1000)
    assert d.sites == e.sites
    for site in d.sites:
        assert (
            z(d[site].value, e[site].monte_carlo, (d[site].value_std_error ** 2 + e[site].std_error ** 2).sqrt())
            < Z_MAX
        )
        assert z(d[site].value, d[site].monte_carlo, d[site].std_error + d[site].value_std_error) < Z_MAX
    assert z(d.elbo, e.elbo, (d.std_error**2 + e.std_error**2).sqrt()) < Z_MAX
    scores = [abs(term.z_score) for term in d.values() if term.z_score is not None]
    assert len(scores) == pair.num_timesteps
    assert max(scores) < Z_MAX


@pytest.mark.parametrize("name", CASES)
def test_no_number_depends_on_the_chunks(name):
    build, data = CASES[name]
    pair, x = build(), data(300)  # more than one block of data
    whole = decompose_diffusion(pair, x, num_particles=5, seed=3, chunk_size=10**6)
    for chunk_size in (1, 700, 2000):
        parts = decompose_diffusion(pair, x, num_particles=5, seed=3, chunk_size=chunk_size)
        for site in whole.sites:
            for field in ("monte_carlo", "std_error", "value", "value_std_error"):
                a, b = getattr(whole[site], field), getattr(parts[site], field)
                assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
        assert torch.allclose(whole.elbo, parts.elbo, rtol=1e-12, atol=1e-12)


def test_memory_is_bounded_by_the_chunk():
    pair = pairs.continuous_ddpm(num_timesteps=50)
    seen = []
    pair.network.register_forward_hook(lambda network, *_: seen.append(network.rows))
    decompose_diffusion(pair, pairs.points(10), num_particles=7, seed=0, chunk_size=40)
    assert max(seen) <= 40
    assert sum(seen) == 50 * 10 * 7  # one network row for each term but L_T, particle and datum


def test_a_part_of_the_terms_is_the_same_and_no_bound():
    pair, x = pairs.tanh_ddpm(), pairs.pixels()
    whole = decompose_diffusion(pair, x, num_particles=8, seed=5)
    part = decompose_diffusion(pair, x, num_particles=8, timesteps=[0, 2], seed=5)
    assert part.sites == ("x_2", "x_0")
    for site in part.sites:
        assert torch.allclose(part[site].value, whole[site].value, rtol=1e-12)
    assert part.elbo.isnan().all()
    assert part.std_error.isnan().all()
    assert part.rate.isnan().all()
    assert torch.allclose(part.distortion, whole.distortion)
    assert math.isnan(part.bits_per_dim()[0])
    assert part.note.startswith("partial: 2 of 5 terms")
    assert "-ELBO" not in part.table()
    assert decompose_diffusion(pair, x, timesteps=[4], seed=5).distortion.isnan().all()


def test_rate_distortion_curve_and_table_add_up(known):
    _, _, d = known
    assert torch.allclose(d.rate, -sum(d[f"x_{t}"].value for t in range(1, 5)))
    assert torch.allclose(d.distortion, -d["x_0"].value)
    assert torch.allclose(d.rate + d.distortion, -d.elbo)
    curve = d.curve()
    assert curve.t.tolist() == [4, 3, 2, 1, 0]
    assert float(curve.loss.sum()) == pytest.approx(-float(d.elbo.mean()))
    assert float(curve.std_error.square().sum().sqrt()) == pytest.approx(d.mean_std_error)
    value, error = d.bits_per_dim()
    assert value == pytest.approx(float(curve.loss_bits_per_dim.sum()))
    assert error == pytest.approx(float(curve.std_error_bits_per_dim.square().sum().sqrt()))
    rows = [line.split("  ") for line in d.table().splitlines()]
    nats = {row[0]: float(next(cell for cell in row[1:] if cell)) for row in rows if row[0][:2] in ("x_", "ra", "-E")}
    assert nats["-ELBO"] == pytest.approx(sum(v for k, v in nats.items() if k.startswith("x_")), abs=3e-4)
    assert d.to_dataset().sizes == {"site": 5, "data": 4}


def test_the_table_of_a_long_chain_is_short_and_adds_up():
    d = decompose_diffusion(pairs.continuous_ddpm(num_timesteps=60), pairs.points(), num_particles=2, seed=0)
    table = d.table()
    assert len(table.splitlines()) < 18
    assert "x_59 .. x_52" in table


def test_reported_errors_are_right():
    """Over 200 repetitions the variance of an estimate is the mean of its squared standard errors, within sampling error."""
    pair, x = pairs.continuous_ddpm(num_timesteps=3), pairs.points(1)
    runs = [decompose_diffusion(pair, x, num_particles=20, seed=s) for s in range(200)]
    for pick in (
        lambda d: (d.elbo, d.std_error),
        lambda d: (d.monte_carlo, d.monte_carlo_std_error),
        lambda d: (d["x_1"].value, d["x_1"].value_std_error),
    ):
        values, errors = (torch.cat(list(each)) for each in zip(*(pick(d) for d in runs), strict=True))
        ratio = float(values.var() / errors.square().mean())
        assert 0.5 < ratio < 1.7  # chi-square with 199 degrees of freedom: outside with probability below 1e-8


def test_float32_against_float64_at_a_thousand_steps():
    """RELIABILITY 15: the network's arithmetic is float32, that of the bound float64, so each term keeps its digits."""
    x = pairs.points(8).to(torch.float32)

    def terms(dtype):
        torch.set_default_dtype(dtype)
        pair = DDPM(Shrink(), NoiseSchedule.linear(1000), (2,), "x_0", "beta", Normal())
        d = decompose_diffusion(pair, x.to(dtype), num_particles=1, seed=0)
        return torch.stack([term.value for term in d.values()]), d.elbo

    (single, _), (double, elbo) = terms(torch.float32), terms(torch.float64)
    assert single.dtype == torch.float64
    assert ((single - double).abs() <= 1e-5 * double.abs() + 1e-9 * elbo.abs()).all()
    # the twin: the smallest of these KLs, of nearly equal variances, in float32 throughout
    process = DDPM(Shrink(), NoiseSchedule.linear(1000), (2,), likelihood=Normal()).process
    t, zero = torch.tensor(900), torch.zeros(2)
    exact = torch.distributions.kl_divergence(
        process.posterior(zero, zero, t), torch.distributions.Independent(_reverse(process, zero, t), 1)
    )
    zero = zero.to(torch.float32)
    naive = torch.distributions.kl_divergence(
        process.posterior(zero, zero, t), torch.distributions.Independent(_reverse(process, zero, t), 1)
    )
    assert abs(float(naive) / float(exact) - 1) > 1e-2


def _reverse(process, zero, t):
    return torch.distributions.Normal(zero, process.coefficient("sqrt_beta", t, zero).expand(2))


class Shrink(nn.Module):
    """A network without rounding of its own to speak of."""

    def forward(self, x_t, t):
        return 0.5 * x_t


def test_seeds_modes_and_streams_are_left_alone():
    pair, x = pairs.tanh_ddpm(), pairs.pixels()
    pair.network.add_module("dropout", nn.Dropout())
    pair.train()
    state = torch.get_rng_state()
    a = decompose_diffusion(pair, x, num_particles=3, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert pair.training
    assert pair.network.dropout.training
    assert torch.equal(a.elbo, decompose_diffusion(pair, x, num_particles=3, seed=1).elbo)
    assert not torch.equal(a.elbo, decompose_diffusion(pair, x, num_particles=3, seed=2).elbo)
    torch.manual_seed(4)
    b = decompose_diffusion(pair, x, num_particles=3)
    torch.manual_seed(4)
    assert torch.equal(b.elbo, decompose_diffusion(pair, x, num_particles=3).elbo)


def test_one_particle_leaves_no_error():
    d = decompose_diffusion(pairs.tanh_ddpm(), pairs.pixels(), num_particles=1, seed=0)
    assert d.std_error.isinf().all()
    assert d["x_4"].value_std_error.eq(0).all()
    assert d.elbo.isfinite().all()


def test_rows_of_many_numbers_come_few_at_a_time(monkeypatch):
    """As with a D3PM of thousands of classes; 2 numbers a row here, so 20 are 10 rows."""
    pair, x = pairs.tanh_ddpm(), pairs.pixels(25)
    seen = []
    pair.network.register_forward_hook(lambda network, *_: seen.append(network.rows))
    decompose_diffusion(pair, x, num_particles=3, seed=0)
    assert max(seen) > 20  # the twin: a full block at once
    seen.clear()
    monkeypatch.setattr(diffusion, "NUMBERS_AT_ONCE", 20)
    few = decompose_diffusion(pair, x, num_particles=3, seed=0)
    assert max(seen) <= 10
    assert few.elbo.shape == (25,)
    chunks = decompose_diffusion(pair, x, num_particles=3, seed=0, chunk_size=1)
    assert torch.allclose(few.elbo, chunks.elbo, rtol=1e-12)


class Broken(nn.Module):
    def forward(self, x_t, t):
        return torch.where((t == 3)[..., None], torch.nan, x_t)


def test_a_nan_is_named():
    pair = DDPM(Broken(), NoiseSchedule.cosine(4), (2,), "x_0", likelihood=Normal())
    found = r"NaN at site 'x_2' for datum 0: look at the network's output at step 3"
    for validation in (True, False):
        with pyro.validation_enabled(validation), pytest.raises(NotANumberError, match=found):
            decompose_diffusion(pair, pairs.points(), num_particles=2)
    decompose_diffusion(pair, pairs.points(), num_particles=2, timesteps=[3, 1, 0])  # where step 3 is not asked


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda p, x: decompose_diffusion(LinearGaussian.random(2, 1), x), TypeError, "use decompose_elbo"),
        (lambda p, x: decompose_diffusion(p, x.tolist()), TypeError, "x_0: expected a tensor, got list"),
        (lambda p, x: decompose_diffusion(p, x[0]), ValueError, r"x_0 of shape \[B, 2\]"),
        (lambda p, x: decompose_diffusion(p, x[:, :1]), ValueError, "reshape the data"),
        (lambda p, x: decompose_diffusion(p, x + 0.1), ValueError, "evenly spaced values"),
        (lambda p, x: decompose_diffusion(p, x, num_particles=0), ValueError, "whole num_particles >= 1"),
        (lambda p, x: decompose_diffusion(p, x, num_particles=2.0), ValueError, "whole num_particles >= 1"),
        (lambda p, x: decompose_diffusion(p, x, chunk_size=0), ValueError, "whole chunk_size >= 1"),
        (lambda p, x: decompose_diffusion(p, x, seed=-1), ValueError, "a seed >= 0, got -1"),
        (lambda p, x: decompose_diffusion(p, x, seed=1.5), TypeError, "whole numbers as seed, got 1.5"),
        (lambda p, x: decompose_diffusion(p, x, timesteps=[5]), ValueError, r"distinct timesteps in 0\.\.4"),
        (lambda p, x: decompose_diffusion(p, x, timesteps=[-1]), ValueError, r"distinct timesteps in 0\.\.4"),
        (lambda p, x: decompose_diffusion(p, x, timesteps=[1, 1]), ValueError, r"distinct timesteps in 0\.\.4"),
        (lambda p, x: decompose_diffusion(p, x, timesteps=[1.5]), TypeError, "whole numbers as timesteps, got 1.5"),
        (lambda p, x: decompose_diffusion(p, x, timesteps=[True]), TypeError, "whole numbers as timesteps, got True"),
        (lambda p, x: decompose_diffusion(p, x, timesteps=3), TypeError, "a sequence of whole numbers as timesteps"),
        (lambda p, x: decompose_diffusion(p, x[:0]), ValueError, "expected at least one datum"),
        (
            lambda p, x: decompose_diffusion(p, x.float()),
            TypeError,
            "float64, as the parameters are, got torch.float32",
        ),
        (lambda p, x: decompose_diffusion(p, x, timesteps=[]), ValueError, r"distinct timesteps in 0\.\.4"),
    ],
)
def test_bad_calls_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call(pairs.tanh_ddpm(), pairs.pixels())


def test_streams_draw_from_the_law():
    """First two moments of a Normal and the frequencies of a categorical, a million draws, at 6 standard errors."""
    n = 1_000_000
    law = torch.distributions.Independent(torch.distributions.Normal(torch.full((1, 1, n), 2.0), 0.5), 1)
    x = Streams([row_seeds(0, (1,), 1)], "cpu").draw(law)
    assert abs(float(x.mean()) - 2) < 6 * 0.5 / math.sqrt(n)
    assert abs(float(x.var()) / 0.25 - 1) < 6 * math.sqrt(2 / n)
    probs = torch.tensor([0.7, 0.0, 0.3])
    law = torch.distributions.Independent(torch.distributions.Categorical(probs.expand(1, 1, n, 3)), 1)
    share = Streams([row_seeds(0, (2,), 1)], "cpu").draw(law).flatten().bincount(minlength=3) / n
    assert np.abs((share - probs).numpy()).max() < 6 * math.sqrt(0.21 / n)
    assert share[1] == 0


def test_streams_refuse_other_laws():
    law = torch.distributions.Exponential(torch.ones(1, 1, 2))
    with pytest.raises(TypeError, match="expected an independent Normal or Categorical, got Exponential"):
        Streams([[0]], "cpu").draw(law)
