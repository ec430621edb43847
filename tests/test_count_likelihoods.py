"""Poisson and negative binomial against mpmath's exact arithmetic, by value and gradient; and as likelihoods of pairs.

The bar: an error of a few units in the last place of l, of log r and of the result. A relative change eps of e^l moves log p by
eps |n - e^l| r/(r + e^l) (r infinite for Poisson), so the bar is 16 eps (1 + |log p| + (1 + |l|) |n - e^l| r/(r + e^l)).
"""

import math

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch

from inference import decompose_elbo, fit, load_run
from inference.cli import run
from inference.training.datasets import as_dataset
from inference.training.scaling import DataError
from ppl_models import VAE
from ppl_models import count_distributions as laws
from ppl_models.likelihoods import NegativeBinomial, Normal, Poisson
from ppl_models.networks import GaussianEncoder

COUNTS = (0, 1, 2, 15, 16, 17, 300, 10_000, 1_000_000)
LOG_MEANS = (-20.0, -1.0, 0.0, 2.5, 5.0, 9.2, 13.8)
SIZES = (1e-3, 0.3, 1.0, 15.9, 16.1, 1e3, 1e6)
DTYPES = (torch.float32, torch.float64)


def exact_log_p(n, log_mean, size=None):
    """The textbook's formula in 60 digits."""
    mean = mpmath.exp(log_mean)
    if size is None:
        return n * log_mean - mean - mpmath.loggamma(n + 1)
    normaliser = mpmath.loggamma(n + size) - mpmath.loggamma(size) - mpmath.loggamma(n + 1)
    return normaliser + size * mpmath.log(size / (size + mean)) + n * mpmath.log(mean / (size + mean))


def grid(dtype, sizes):
    mesh = torch.meshgrid(*(torch.tensor(each, dtype=dtype) for each in (COUNTS, LOG_MEANS, sizes)), indexing="ij")
    return [each.flatten() for each in mesh]


def law_of(name, log_mean, size):
    return laws.Poisson(log_mean) if name == "poisson" else laws.NegativeBinomial(log_mean, size)


def slack(n, log_mean, size, name, eps):
    mean = log_mean.exp()
    share = 1.0 if name == "poisson" else size / (size + mean)
    return 16 * eps * (1 + log_mean.abs()) * (n - mean).abs() * share


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["poisson", "negative binomial"])
def test_value_and_gradients_against_exact_arithmetic(name, dtype):
    n, log_mean, size = grid(dtype, SIZES if name != "poisson" else (1.0,))
    log_mean.requires_grad_(), size.requires_grad_()
    log_p = law_of(name, log_mean, size).log_prob(n)
    inputs = (log_mean,) if name == "poisson" else (log_mean, size)
    gradients = torch.autograd.grad(log_p.sum(), inputs)
    eps = torch.finfo(dtype).eps
    with mpmath.workdps(60):
        for i in range(len(n)):
            count, args = int(n[i]), [mpmath.mpf(float(a[i].detach())) for a in inputs]
            exact = float(exact_log_p(count, *args))
            bar = 16 * eps * (1 + abs(exact)) + float(slack(n, log_mean, size, name, eps)[i].detach())
            where = (count, *map(float, args))
            assert abs(float(log_p[i].detach()) - exact) <= bar, where
            mean, r = math.exp(float(args[0])), float(args[-1])
            share = 1.0 if name == "poisson" else r / (r + mean)
            slope = (count - mean) * share
            bar = 16 * eps * (1 + abs(float(args[0]))) * (count + mean) * share + eps
            assert abs(float(gradients[0][i]) - slope) <= bar, where
            if name != "poisson":
                by_size = float(
                    mpmath.psi(0, count + args[1])
                    - mpmath.psi(0, args[1])
                    + mpmath.log(args[1] / (args[1] + mpmath.exp(args[0])))
                    + (mpmath.exp(args[0]) - count) / (args[1] + mpmath.exp(args[0]))
                )
                terms = abs(math.log1p(count / r)) + abs(math.log1p(mean / r)) + 1 / r + (count + mean) / (r + mean) + 1
                assert abs(float(gradients[1][i]) - by_size) <= 64 * eps * terms, where


def test_the_textbook_formula_would_fail_the_bar():
    """The twin: in float32 the displayed formula is off by whole nats where counts are large."""
    n, log_mean = torch.tensor(1_000_000.0, dtype=torch.float32), torch.tensor(13.8, dtype=torch.float32)
    naive = n * log_mean - log_mean.exp() - torch.lgamma(n + 1)
    exact = float(exact_log_p(10**6, mpmath.mpf(float(log_mean))))
    ours = float(laws.Poisson(log_mean).log_prob(n))
    bar = 16 * 1.2e-7 * (1 + abs(exact)) + float(slack(n, log_mean, None, "poisson", 1.2e-7))
    assert abs(ours - exact) <= bar < abs(float(naive) - exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_probabilities_sum_to_one_and_have_the_stated_moments(dtype):
    n = torch.arange(4000, dtype=dtype)
    for log_mean, size in ((-1.0, 0.3), (1.0, 2.0), (4.0, 50.0)):
        parameters = torch.tensor(log_mean, dtype=dtype), torch.tensor(size, dtype=dtype)
        for name in ("poisson", "negative binomial"):
            law = law_of(name, *parameters)
            p = law.log_prob(n).double().exp()
            mean = float(p @ n.double())
            tolerance = 1e3 * torch.finfo(dtype).eps
            assert float(p.sum()) == pytest.approx(1, abs=tolerance)
            assert mean == pytest.approx(float(law.mean), rel=tolerance)
            assert float(p @ (n.double() - mean) ** 2) == pytest.approx(float(law.variance), rel=tolerance)


def test_far_out_everything_is_finite_but_what_is_beyond_the_dtype():
    log_mean = torch.tensor([-1e4, -80.0, 80.0, 1e4], dtype=torch.float32, requires_grad=True)
    for count in (0.0, 3.0, 1e6):
        log_p = laws.NegativeBinomial(log_mean, torch.tensor(2.0)).log_prob(torch.tensor(count))
        (gradient,) = torch.autograd.grad(log_p.sum(), log_mean)
        assert log_p.isfinite().all()
        assert gradient.isfinite().all()
    log_p = laws.Poisson(log_mean[:3]).log_prob(torch.tensor(3.0))
    assert log_p.isfinite().all()
    assert torch.autograd.grad(log_p.sum(), log_mean)[0].isfinite().all()
    assert laws.Poisson(log_mean[3]).log_prob(torch.tensor(3.0)) == -math.inf


@pytest.mark.parametrize(("name", "wrong"), [("poisson", 1.05), ("negative binomial", 1.2)])
def test_draws_have_the_law_and_another_law_is_told_apart(name, wrong):
    """A chi-square of 40,000 draws at level 1e-6, and of the same draws beside a law of another mean or size."""
    torch.manual_seed(3)
    log_mean, size = torch.tensor(1.2), torch.tensor(1.5)
    draws = law_of(name, log_mean, size).sample((40_000,)).long()
    edge = 30
    observed = draws.clamp(max=edge).bincount(minlength=edge + 1).double()
    used = (log_mean + (math.log(wrong) if name == "poisson" else 0), size * (1 if name == "poisson" else wrong))
    for parameters, fits in (((log_mean, size), True), (used, False)):
        p = law_of(name, *parameters).log_prob(torch.arange(float(edge))).double().exp()
        expected = 40_000 * torch.cat([p, (1 - p.sum())[None]])
        kept = expected > 5
        statistic = float(((observed - expected).square() / expected)[kept].sum())
        limit = scipy.stats.chi2.isf(1e-6, int(kept.sum()) - 1)
        assert (statistic < limit) == fits


def test_a_large_size_is_a_poisson():
    n, log_mean = torch.arange(60.0), torch.tensor(3.0)
    near = laws.NegativeBinomial(log_mean, torch.tensor(1e9)).log_prob(n)
    # log p differs by (n - (n - mu)^2)/(2 r) and smaller
    torch.testing.assert_close(near, laws.Poisson(log_mean).log_prob(n), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Poisson().check(torch.tensor([[1.0, 0.5]])), r"whole numbers >= 0 under Poisson, but x\[0, 1\] is 0.5"),
        (lambda: NegativeBinomial().check(torch.tensor([-1.0])), r"under NegativeBinomial, but x\[0\] is -1"),
        (lambda: Poisson().check(torch.tensor([1])), "expected floating-point values"),
        (lambda: NegativeBinomial(size=-1.0), "expected size to be a positive finite number"),
        (lambda: NegativeBinomial(size=1.0, init_size=2.0), "expected init_size only with size"),
        (lambda: NegativeBinomial(size=None)(torch.zeros(2, 3), 1), r"to return a pair \(log mean, size\)"),
        (lambda: Poisson()((torch.zeros(2), torch.zeros(2)), 1), "expected the decoder to return one tensor, the log means"),
        (lambda: as_dataset(torch.tensor([[0.5]]), scaling="counts"), "scaling 'counts' states whole numbers"),
        (lambda: as_dataset(torch.tensor([[-1.0]]), scaling="counts"), r"states values in \[0, inf\]"),
        (lambda: as_dataset(torch.tensor([[300]]), scaling="counts", levels=400), "'counts' is for numbers of things counted"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(call, match):
    with pytest.raises((ValueError, TypeError, DataError), match=match):
        call()


def test_the_preset_s_encoder_reads_the_logarithm():
    torch.manual_seed(0)
    plain = GaussianEncoder((3,), 2, (4,))
    counts = GaussianEncoder((3,), 2, (4,), counts=True)
    counts.load_state_dict(plain.state_dict())
    x = torch.tensor([[0.0, 3.0, 1e6]])
    torch.testing.assert_close(counts(x), plain(torch.log1p(x)))
    assert VAE.preset((3,), Poisson(), 2, (4,)).encoder.counts
    assert not VAE.preset((3,), Normal(), 2, (4,)).encoder.counts


def test_it_trains_on_integers_as_they_come_and_loads_again(tmp_path):
    """Counts above 255 of one factor; the bound beats the best law without a latent, and the run comes back."""
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(400, 1))
    x = rng.poisson(np.exp(np.array([1.0, 3.0, 5.5]) + factor * np.array([0.5, -0.7, 0.6])))
    assert x.max() > 255
    torch.manual_seed(0)
    pair = VAE.preset((3,), NegativeBinomial(), latent_dim=1, hidden=(32,))
    trained = fit(pair, x, tmp_path / "run", epochs=30, batch_size=50, learning_rate=3e-2, progress=False)
    assert trained.config["data"]["scaling"] == "counts"
    loaded = load_run(tmp_path / "run")
    data = torch.from_numpy(x).to(torch.get_default_dtype())
    d = decompose_elbo(loaded.pair.model, loaded.pair.guide, data, num_particles=20)
    best = sum(_best_independent(column) for column in x.T) / len(x)
    assert float(d.elbo.mean()) > best + 0.3  # three columns share a factor: mutual information of about a nat


def _best_independent(column):
    """Log-likelihood of one column under its best negative binomial, by a grid over r at the column's mean."""
    sizes = np.geomspace(0.1, 1000, 400)
    return max(scipy.stats.nbinom(r, r / (r + column.mean())).logpmf(column).sum() for r in sizes)


@pytest.mark.parametrize(("file", "law"), [("n.csv", "negative_binomial"), ("n.npz", "poisson")])
def test_counts_from_a_file_on_the_command_line(tmp_path, capsys, file, law):
    """Counts above 255 need no number of levels, and the decoder begins at their means."""
    x = np.random.default_rng(0).poisson([2.0, 40.0, 700.0], size=(60, 3))
    place = tmp_path / file
    if file.endswith("csv"):
        np.savetxt(place, x, fmt="%d", delimiter=",", header="a,b,c", comments="")
    else:
        np.savez(place, train=x)
    data = f"{place.suffix[1:]}:{place}"
    call = [
        "train",
        "vae",
        "--data",
        data,
        "--likelihood",
        law,
        "--epochs",
        "1",
        "--hidden",
        "4",
        "--out",
        str(tmp_path / "run"),
    ]
    assert run([*call, "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "scaling: counts" in out
    saved = load_run(tmp_path / "run")
    assert float(saved.metrics[-1]["validation_elbo"]) > -300  # a start at means of one is below -5000
    assert run(["train", "ddpm", *call[2:-1], str(tmp_path / "other")]) == 2
    assert "a likelihood with a location and a scale" in capsys.readouterr().err
