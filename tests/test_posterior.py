"""ArviZ trees against closed forms that are worked out here, file round trips, bad input, and the drawing of them.

Oracles: for p(z) = N(0, I), p(x | z) = N(W z + b, s^2 I), plain NumPy gives the posterior N(m, S) with
S = (I + W'W / s^2)^-1, m = S W'(x - b) / s^2, the evidence N(b, W W' + s^2 I), and the law of redrawn data
N(W m + b, W S W' + s^2 I). Each z-test is Bonferroni-corrected to a family-wise false-failure rate of 1e-6.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from scipy import stats

from inference.bounds import NotANumberError, PairError, decompose_elbo
from inference.posterior import (
    DRAW,
    GROUPS,
    PosteriorError,
    load_posterior,
    plot_posterior,
    save_posterior,
    summary,
    to_datatree,
)
from inference.training.storage import StorageError
from ppl_models import LinearGaussian

DRAWS = 4000
X = torch.tensor([[0.3, -1.0, 2.0], [1.5, 0.2, -0.7]], dtype=torch.float64)


def make_pair() -> LinearGaussian:
    return LinearGaussian.random(data_dim=3, latent_dim=2, noise_scale=0.8)


def var(tree: xarray.DataTree, group: str, name: str) -> xarray.DataArray:
    return tree[group].to_dataset()[name]


def gaussian_oracle(pair: LinearGaussian) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Moments of every Gaussian law in the tree, in NumPy; means ``[B, k]``, covariances ``[k, k]``."""
    w, b, s = pair.weight.detach().numpy(), pair.bias.detach().numpy(), float(pair.noise_scale.detach())
    covariance = np.linalg.inv(np.eye(w.shape[1]) + w.T @ w / s**2)
    mean = (X.numpy() - b) @ w @ covariance / s**2
    noise = s**2 * np.eye(w.shape[0])
    return {
        "posterior": (mean, covariance),
        "prior": (np.zeros_like(mean), np.eye(w.shape[1])),
        "posterior_predictive": (mean @ w.T + b, w @ covariance @ w.T + noise),
        "prior_predictive": (np.broadcast_to(b, X.shape), w @ w.T + noise),
    }


def largest_z(draws: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> tuple[float, float]:
    """Largest |z| of means and second moments of Gaussian draws ``[S, B, k]``, and its bound at rate 1e-6.

    The variance of a product of deviations is S_ii S_jj + S_ij^2. The skewness of an average of 4000 products, at most
    sqrt(8 / 4000), moves the normal quantile 5.4 by 0.2 (Cornish and Fisher), for which 0.3 is added.
    """
    n = len(draws)
    deviation = draws - mean
    z_mean = deviation.mean(0) / np.sqrt(np.diag(covariance) / n)
    products = np.einsum("sbi,sbj->bij", deviation, deviation) / n
    z_products = (products - covariance) / np.sqrt(
        (np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2) / n
    )
    z = np.concatenate([z_mean.ravel(), z_products.ravel()])
    return float(np.abs(z).max()), float(stats.norm.isf(1e-6 / 2 / z.size)) + 0.3


# ----------------------------------------------------------------------------------------------- values


@pytest.fixture(scope="module")
def exact_tree() -> xarray.DataTree:
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # conftest does so for each test, but this tree is made once, before them
    pyro.set_rng_seed(0)
    tree = to_datatree(make_pair(), X, num_samples=DRAWS)
    torch.set_default_dtype(default_dtype)
    return tree


@pytest.mark.parametrize("group", ["posterior", "prior", "posterior_predictive", "prior_predictive"])
def test_draws_follow_the_exact_law(exact_tree: xarray.DataTree, group: str) -> None:
    site = "x" if "predictive" in group else "z"
    z, bound = largest_z(var(exact_tree, group, site).values, *gaussian_oracle(make_pair())[group])
    assert z < bound


@pytest.mark.parametrize("group", ["posterior", "posterior_predictive"])
@pytest.mark.parametrize(("shift", "stretch"), [(0.3, 1.0), (0.0, 0.8)])
def test_a_guide_that_is_off_is_caught(exact_tree: xarray.DataTree, group: str, shift: float, stretch: float) -> None:
    """Mean + 0.3 sd: z = 0.3 sqrt(4000) = 19. Sd x 0.8: z = 0.36 sqrt(4000 / 2) = 16. The bound is near 5.7.

    In data space the errors are diluted by the noise, so there it is only required that the law is not met.
    """

    class Off(LinearGaussian):
        def guide(self, x: torch.Tensor) -> torch.Tensor:
            q = self.posterior(x)
            with pyro.plate("data", len(x)):
                loc = q.loc + shift * q.variance.sqrt()
                return pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=q.scale_tril * stretch))

    right = make_pair()
    wrong = Off(right.weight, right.bias, right.noise_scale)
    tree = to_datatree(wrong, X, num_samples=DRAWS)
    if group == "posterior":
        z, bound = largest_z(var(tree, group, "z").values, *gaussian_oracle(right)[group])
        assert z > bound
    error = (var(tree, "sample_stats", "log_p") - var(tree, "sample_stats", "log_q")).std(DRAW)
    assert float(error.min()) > 0.05  # no certificate: log p - log q varies over draws


def test_with_the_exact_posterior_every_draw_gives_the_evidence(exact_tree: xarray.DataTree) -> None:
    mean, covariance = gaussian_oracle(make_pair())["prior_predictive"]
    evidence = [stats.multivariate_normal(m, covariance).logpdf(x) for m, x in zip(mean, X.numpy(), strict=True)]
    ratio = var(exact_tree, "sample_stats", "log_p") - var(exact_tree, "sample_stats", "log_q")
    np.testing.assert_allclose(ratio.values, np.broadcast_to(evidence, ratio.shape), rtol=1e-10)


def test_log_likelihood_is_that_of_the_same_draw(exact_tree: xarray.DataTree) -> None:
    pair = make_pair()
    w, b, s = pair.weight.detach().numpy(), pair.bias.detach().numpy(), float(pair.noise_scale.detach())
    z = var(exact_tree, "posterior", "z").values
    expected = stats.norm(z @ w.T + b, s).logpdf(X.numpy()).sum(-1)
    np.testing.assert_allclose(var(exact_tree, "log_likelihood", "x").values, expected, rtol=1e-10)
    log_prior = stats.norm.logpdf(z).sum(-1)
    np.testing.assert_allclose(var(exact_tree, "sample_stats", "log_p").values, expected + log_prior, rtol=1e-10)
    assert not np.allclose(
        var(exact_tree, "log_likelihood", "x").values[1:], expected[:-1]
    )  # draws are not interchangeable


def test_predictive_draws_belong_to_their_latent_draws(exact_tree: xarray.DataTree) -> None:
    """Residuals x - W z - b of the same draw are pure noise; of the next draw they carry the latent's spread as well."""
    pair = make_pair()
    w, b, s = pair.weight.detach().numpy(), pair.bias.detach().numpy(), float(pair.noise_scale.detach())
    for latents, data in (("prior", "prior_predictive"), ("posterior", "posterior_predictive")):
        x, mean = var(exact_tree, data, "x").values, var(exact_tree, latents, "z").values @ w.T + b
        z, bound = largest_z(x - mean, np.zeros(3), s**2 * np.eye(3))
        assert z < bound
        z, bound = largest_z(x[1:] - mean[:-1], np.zeros(3), s**2 * np.eye(3))
        assert z > bound


def test_observed_data_and_labels(exact_tree: xarray.DataTree) -> None:
    assert tuple(exact_tree.children) == GROUPS
    np.testing.assert_array_equal(var(exact_tree, "observed_data", "x").values, X.numpy())
    assert var(exact_tree, "posterior", "z").dims == (DRAW, "data", "z_dim_0")
    assert var(exact_tree, "posterior_predictive", "x").dims == (DRAW, "data", "x_dim_0")
    assert (
        var(exact_tree, "log_likelihood", "x").dims == var(exact_tree, "sample_stats", "log_q").dims == (DRAW, "data")
    )
    assert exact_tree.attrs["num_samples"] == DRAWS
    assert exact_tree.attrs["units"] == exact_tree["log_likelihood"].attrs["units"] == "nats"
    assert "vectorised" in exact_tree.attrs["note"]
    assert {"inference_library_version", "torch_version", "creation_library_version"} <= set(exact_tree.attrs)


def test_the_seed_decides_everything() -> None:
    def tree(seed: int) -> xarray.DataTree:
        pyro.set_rng_seed(seed)
        return to_datatree(make_pair(), X, num_samples=20)

    assert tree(1).identical(tree(1))
    assert not tree(1).identical(tree(2))


def test_draws_come_in_bounded_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.bounds.particles.ELEMENTS_AT_ONCE", 200)
    pair = make_pair()
    elements = 2 * (2 + 1) * 2 + 2 * (3 + 1)  # values and log-densities of z, in model and guide, and of x
    seen = []

    def model(x: torch.Tensor) -> None:
        z = pair.model(x)
        seen.append(z.numel())
        pyro.sample("watch", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    drawn = [0]

    def guide(x: torch.Tensor) -> torch.Tensor:
        z = pair.guide(x)
        drawn.append(z.shape[0] if z.dim() == 3 else 1)
        return z

    tree = to_datatree(model, guide, X, num_samples=100)
    assert max(drawn) <= 200 // elements
    assert sum(drawn) >= 100
    assert len(np.unique(var(tree, "posterior", "z").values)) == 100 * 2 * 2


def test_float32_stays_float32() -> None:
    tree = to_datatree(make_pair().float(), X.float(), num_samples=5)
    for group in set(GROUPS) - {"sample_stats"}:
        for variable in tree[group].data_vars.values():
            assert variable.dtype == np.float32, group
    assert var(tree, "sample_stats", "log_p").dtype == np.float64


def test_half_precision_is_widened_without_loss() -> None:
    def model() -> None:
        pyro.sample("z", dist.Delta(torch.tensor([0.1, 0.2], dtype=torch.bfloat16), event_dim=1))

    z = var(to_datatree(model, model, num_samples=2), "posterior", "z")
    assert z.dtype == np.float32
    np.testing.assert_array_equal(z.values[1], torch.tensor([0.1, 0.2], dtype=torch.bfloat16).float().numpy())


# ----------------------------------------------------------------------------- programs of other shapes


def hierarchy(y: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", 3, dim=-2):
        a = pyro.sample("a", dist.Normal(mu, 0.5))
        with pyro.plate("data", y.shape[-1], dim=-1):
            pyro.sample("y", dist.Normal(a, 0.3), obs=y)


def hierarchy_guide(y: torch.Tensor) -> None:
    pyro.sample("mu", dist.Normal(0.2, 0.3))
    with pyro.plate("group", 3, dim=-2):
        pyro.sample("a", dist.Normal(y.mean(-1, keepdim=True), 0.2))


def test_global_and_local_sites() -> None:
    y = torch.randn(3, 4)
    tree = to_datatree(hierarchy, hierarchy_guide, y, num_samples=50, coords={"group": ["u", "v", "w"]})
    assert "vectorised" in tree.attrs["note"]
    assert var(tree, "posterior", "mu").dims == (DRAW,)
    assert var(tree, "posterior", "a").dims == var(tree, "prior", "a").dims == (DRAW, "group")
    assert (
        var(tree, "posterior_predictive", "y").dims == var(tree, "log_likelihood", "y").dims == (DRAW, "group", "data")
    )
    assert var(tree, "sample_stats", "log_p").dims == (DRAW,)  # no plate is shared by all sites
    assert list(var(tree, "posterior", "group").values) == ["u", "v", "w"]
    mu, a = var(tree, "posterior", "mu").values, var(tree, "posterior", "a").values
    log_lik = stats.norm.logpdf(y.numpy(), a[:, :, None], 0.3)
    np.testing.assert_allclose(var(tree, "log_likelihood", "y").values, log_lik)
    log_p = stats.norm.logpdf(mu) + stats.norm.logpdf(a, mu[:, None], 0.5).sum(1) + log_lik.sum((1, 2))
    log_q = stats.norm.logpdf(mu, 0.2, 0.3) + stats.norm.logpdf(a, y.numpy().mean(-1), 0.2).sum(1)
    np.testing.assert_allclose(var(tree, "sample_stats", "log_p").values, log_p)
    np.testing.assert_allclose(var(tree, "sample_stats", "log_q").values, log_q)


def test_one_at_a_time_has_the_same_shapes() -> None:
    def model(y: torch.Tensor) -> None:
        hierarchy(y)
        pyro.deterministic("total", torch.ones(2))

    tree = to_datatree(model, hierarchy_guide, torch.randn(3, 4), num_samples=7)
    other = to_datatree(hierarchy, hierarchy_guide, torch.randn(3, 4), num_samples=7)
    assert "one at a time" in tree.attrs["note"]
    for group in GROUPS:
        for name, variable in other[group].data_vars.items():
            assert variable.sizes == var(tree, group, str(name)).sizes


def test_deterministic_sites_stand_with_the_latents_even_where_they_mix_a_plate() -> None:
    def model(y: torch.Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)
            pyro.deterministic("twice", 2 * z, event_dim=0)
            pyro.deterministic("thrice", 3 * z)
            pyro.sample("after", dist.Normal(pyro.deterministic("four", 4 * z), 1.0), obs=y)
        pyro.deterministic("total", z.sum())  # vectorised, this would sum over draws

    def guide(y: torch.Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y / 2, 0.5**0.5))

    tree = to_datatree(model, guide, torch.randn(4), num_samples=10)
    assert var(tree, "posterior", "twice").dims == (DRAW, "data")
    assert var(tree, "posterior", "thrice").dims == (DRAW, "thrice_dim_0")
    for group in ("posterior", "prior"):
        z = var(tree, group, "z").values
        np.testing.assert_array_equal(var(tree, group, "twice").values, 2 * z)
        np.testing.assert_array_equal(var(tree, group, "thrice").values, 3 * z)
        np.testing.assert_allclose(var(tree, group, "total").values, z.sum(1))
    assert "total" not in tree["observed_data"]
    assert "deterministic" in tree.attrs["note"]


def test_a_model_that_mixes_draws_only_when_run_without_data_is_drawn_singly() -> None:
    """With y observed the sum is over data; with y drawn under a particle plate it would be over draws as well."""

    def model(y: torch.Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            seen = pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        pyro.sample("total", dist.Normal(seen.sum(), 0.1), obs=torch.tensor(0.0))

    def guide(y: torch.Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y / 2, 0.5**0.5))

    tree = to_datatree(model, guide, torch.randn(4), num_samples=200)
    assert "without its data" in tree.attrs["note"]
    for group in ("prior_predictive", "posterior_predictive"):
        residual = (var(tree, group, "total") - var(tree, group, "y").sum("data")).values
        assert np.abs(residual).max() < 0.1 * stats.norm.isf(1e-6 / 2 / residual.size)
    part = to_datatree(model, guide, torch.randn(4), num_samples=5, groups=["posterior", "sample_stats"])
    assert tuple(part.children) == ("posterior", "sample_stats")
    assert "one at a time" not in part.attrs["note"]


def test_autoguide() -> None:
    def model(y: torch.Tensor) -> None:
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, s))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = AutoNormal(model)
    y = torch.randn(4)
    guide(y)
    tree = to_datatree(model, guide, y, num_samples=2000)
    assert set(tree["posterior"].data_vars) == {"s", "z"}
    assert var(tree, "posterior", "z").dims == (DRAW, "data")
    s, z = var(tree, "posterior", "s").values, var(tree, "posterior", "z").values
    loc = {name: float(getattr(guide.locs, name).detach().mean()) for name in ("s", "z")}
    scale = float(guide.scales.s.detach())
    log_q = stats.norm.logpdf(np.log(s), loc["s"], scale) - np.log(s)  # change of variables u = log s
    log_q += stats.norm.logpdf(z, guide.locs.z.detach().numpy(), guide.scales.z.detach().numpy()).sum(1)
    np.testing.assert_allclose(var(tree, "sample_stats", "log_q").values, log_q)


def test_elbo_of_the_tree_is_that_of_the_decomposition() -> None:
    """Auxiliary sites, a factor and a scaled plate count in log_p and log_q as they do in the bound."""

    def model(y: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("tilt", 0.3 * z)
        with pyro.plate("data", 6, subsample=torch.arange(len(y))):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: torch.Tensor) -> None:
        h = pyro.sample("h", dist.Normal(y.mean(), 0.3), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(h, 0.4))

    y = torch.tensor([0.4, -0.2, 1.0])
    tree = to_datatree(model, guide, y, num_samples=400, groups=["posterior", "log_likelihood", "sample_stats"])
    assert set(tree["posterior"].data_vars) == {"z"}
    z = var(tree, "posterior", "z").values
    pointwise = stats.norm.logpdf(y.numpy(), z[:, None])
    np.testing.assert_allclose(var(tree, "log_likelihood", "y").values, pointwise)  # without the plate's scale of 2
    log_p = stats.norm.logpdf(z) + 0.3 * z + 2 * pointwise.sum(1)
    np.testing.assert_allclose(var(tree, "sample_stats", "log_p").values, log_p)
    elbo = var(tree, "sample_stats", "log_p") - var(tree, "sample_stats", "log_q")
    d = decompose_elbo(model, guide, y, num_particles=400)
    error = np.hypot(float(elbo.std(DRAW)) / 400**0.5, float(d.monte_carlo_std_error))
    assert abs(float(elbo.mean()) - float(d.monte_carlo)) < stats.norm.isf(0.5e-6) * error


def test_discrete_latents_keep_their_integers() -> None:
    def model(y: torch.Tensor) -> None:
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
            pyro.sample("y", dist.Normal(k.to(y.dtype), 1.0), obs=y)

    def guide(y: torch.Tensor) -> None:
        law = torch.tensor([0.5, 0.3, 0.2]).log() - 0.5 * (y[:, None] - torch.arange(3.0)) ** 2
        with pyro.plate("data", len(y)):
            pyro.sample("k", dist.Categorical(logits=law))

    y = torch.tensor([0.1, 1.9])
    tree = to_datatree(model, guide, y, num_samples=300)
    assert var(tree, "posterior", "k").dtype == np.int64
    assert set(np.unique(var(tree, "posterior", "k").values)) == {0, 1, 2}
    evidence = np.log(stats.norm.pdf(y.numpy()[:, None], np.arange(3)) @ [0.5, 0.3, 0.2])
    ratio = var(tree, "sample_stats", "log_p") - var(tree, "sample_stats", "log_q")
    np.testing.assert_allclose(ratio.values, np.broadcast_to(evidence, ratio.shape), rtol=1e-10)
    assert list(summary(tree).index) == ["k[0]", "k[1]"]
    assert "cumulative" in plot_posterior(tree, kind="dist").get_suptitle()


def test_masked_data_do_not_count() -> None:
    def model(y: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: torch.Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    y = torch.tensor([0.1, 1.9])
    tree = to_datatree(model, guide, y, num_samples=5)
    expected = stats.norm.logpdf(0.1, var(tree, "posterior", "z").values)
    np.testing.assert_allclose(var(tree, "log_likelihood", "y").values, np.stack([expected, 0 * expected], 1))


def test_without_observed_sites_there_are_no_data_groups() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    tree = to_datatree(model, model, num_samples=3)
    assert tuple(tree.children) == ("posterior", "prior", "sample_stats")


def test_names_and_labels_of_own_dimensions() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample(
                "x", dist.Normal(z.sum(-1)[..., None, None], 1.0).expand([*z.shape[:-1], 2, 3]).to_event(2), obs=x
            )

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    names = {"x": ["row", "column"], "z": ["latent"]}
    labels = {"column": ["left", "middle", "right"], "data": [10, 20, 30, 40]}
    tree = to_datatree(model, guide, torch.randn(4, 2, 3), num_samples=6, dims=names, coords=labels)
    assert dict(var(tree, "posterior_predictive", "x").sizes) == {DRAW: 6, "data": 4, "row": 2, "column": 3}
    assert var(tree, "posterior", "z").dims == (DRAW, "data", "latent")
    assert list(var(tree, "observed_data", "column").values) == labels["column"]
    assert list(var(tree, "log_likelihood", "data").values) == labels["data"]


# ------------------------------------------------------------------------------------------ bad input


def coin_model(y: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def coin_guide(y: torch.Tensor) -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0))


def nothing_latent(y: torch.Tensor) -> None:
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))


def no_program(y: torch.Tensor) -> None:
    """A guide without sites."""


def nan_model(y: torch.Tensor) -> None:
    coin_model(y)
    pyro.deterministic("broken", torch.tensor(float("nan")))


def nan_guide(y: torch.Tensor) -> None:
    pyro.sample("z", dist.Delta(torch.tensor(float("nan"))))


def subsampled(y: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=2) as chosen:
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[chosen])


def improper(y: torch.Tensor) -> None:
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.5))


def plate_named_sample(y: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("sample", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def growing(y: torch.Tensor) -> None:
    growing.calls += 1  # type: ignore[attr-defined]
    pyro.deterministic("t", torch.ones(growing.calls))  # type: ignore[attr-defined]
    coin_model(y)


def branching(y: torch.Tensor) -> None:
    branching.calls += 1  # type: ignore[attr-defined]
    pyro.sample("z", dist.Normal(0.0, 1.0))
    if branching.calls < 2:  # type: ignore[attr-defined]
        pyro.sample("w", dist.Normal(0.0, 1.0))


def other_guide(y: torch.Tensor) -> None:
    pyro.sample("v", dist.Normal(0.0, 1.0))


Y = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
BAD: dict[str, tuple[Callable[..., Any], Any, dict[str, Any], type[Exception], str]] = {
    "no_draws": (coin_model, coin_guide, {"num_samples": 0}, PosteriorError, "expected num_samples >= 1, got 0"),
    "nothing_latent": (nothing_latent, no_program, {}, PosteriorError, r"all observed \(y\): there is no posterior"),
    "no_guide": (coin_model, Y, {}, PosteriorError, "expected the guide, a Pyro program, after the model, got Tensor"),
    "no_match": (coin_model, other_guide, {}, PairError, "latent site 'z' has no guide site"),
    "dims_site": (coin_model, coin_guide, {"dims": {"w": ["a"]}}, PosteriorError, "dims of the sites z, y, got 'w'"),
    "dims_length": (
        coin_model,
        coin_guide,
        {"dims": {"z": ["a"]}},
        PosteriorError,
        "expected 0 dimension names .* 'z'",
    ),
    "coords_name": (coin_model, coin_guide, {"coords": {"w": [1]}}, PosteriorError, "dimensions data, got 'w'"),
    "coords_length": (coin_model, coin_guide, {"coords": {"data": [1]}}, PosteriorError, r"expected 3 labels .* \[1\]"),
    "coords_scalar": (coin_model, coin_guide, {"coords": {"data": "abc"}}, PosteriorError, r"expected 3 labels"),
    "group": (coin_model, coin_guide, {"groups": ["warmup"]}, PosteriorError, "among posterior, .* got 'warmup'"),
    "no_data": (other_guide, other_guide, {"groups": ["log_likelihood"]}, PosteriorError, "a model that observes data"),
    "nan_deterministic": (
        nan_model,
        coin_guide,
        {},
        NotANumberError,
        "NaN at site 'broken' in group 'posterior', draw 0",
    ),
    "nan_guide": (coin_model, nan_guide, {}, NotANumberError, "NaN at site 'z'"),
    "subsample": (subsampled, coin_guide, {}, PosteriorError, "plate 'data' picks 2 of 3 at random"),
    "improper": (improper, coin_guide, {}, PosteriorError, r"can draw its own data.*leave prior .* groups out"),
    "plate_sample": (plate_named_sample, coin_guide, {}, PosteriorError, "dimension 'sample' of site 'y' clashes"),
    "growing": (growing, coin_guide, {}, PosteriorError, r"draws of one shape at site 't', got \[\d+\] after \[1\]"),
    "branching": (branching, branching, {}, PosteriorError, "'w' is missing in some"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str) -> None:
    model, guide, options, kind, message = BAD[case]
    branching.calls, growing.calls = -1, 0  # type: ignore[attr-defined]
    with pytest.raises(kind, match=message), pyro.validation_enabled("nan" not in case):
        to_datatree(model, guide, Y, **{"num_samples": 4, **options})


def test_clashing_dimension_names_are_refused() -> None:
    pair = make_pair()
    with pytest.raises(PosteriorError, match="dimension 'k' has 2 elements at site 'z' and 3 at 'x'"):
        to_datatree(pair, X, dims={"z": ["k"], "x": ["k"]})
    with pytest.raises(PosteriorError, match=r"different names for the dimensions of site 'z', got .*'data', 'data'"):
        to_datatree(pair, X, dims={"z": ["data"]})
    with pytest.raises(PosteriorError, match="dimension 'x' of site 'z' clashes"):
        to_datatree(pair, X, dims={"z": ["x"]})
    with pytest.raises(PosteriorError, match=r"expected 1 dimension names for site 'z'.* \[2\], got 'k'"):
        to_datatree(pair, X, dims={"z": "k"})


def test_an_improper_prior_leaves_the_posterior_and_its_predictive() -> None:
    groups = ["posterior", "posterior_predictive", "sample_stats"]
    tree = to_datatree(improper, coin_guide, Y, num_samples=3, groups=groups)
    assert tuple(tree.children) == tuple(groups)
    assert "without its data" in tree.attrs["note"]


# -------------------------------------------------------------------------------------------- files


def assert_bit_equal(one: xarray.DataTree, other: xarray.DataTree) -> None:
    assert list(one.children) == list(other.children)
    for a, b in zip(one.subtree, other.subtree, strict=True):
        assert a.attrs == b.attrs
        assert [type(v) for v in a.attrs.values()] == [type(v) for v in b.attrs.values()]
        assert list(a.variables) == list(b.variables)
        assert set(a.coords) == set(b.coords)
        for name in a.variables:
            left, right = a.variables[name], b.variables[name]
            assert (left.dims, left.dtype, left.attrs) == (right.dims, right.dtype, right.attrs)
            assert left.values.tobytes() == right.values.tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_file_reads_back_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    coords = {"data": ["first", "zweitens"], "latent": [0.5, 1.5]}
    tree = to_datatree(make_pair().to(dtype), X.to(dtype), num_samples=9, coords=coords, dims={"z": ["latent"]})
    var(tree, "posterior", "z").values[0, 0] = [-0.0, np.inf]
    save_posterior(tree, tmp_path / "posterior.nc")
    assert_bit_equal(load_posterior(str(tmp_path / "posterior.nc")), tree)
    assert os.listdir(tmp_path) == ["posterior.nc"]
    var(tree, "posterior", "z").values[0, 0, 0] = 0.0
    with pytest.raises(AssertionError):  # a single sign bit is seen
        assert_bit_equal(load_posterior(tmp_path / "posterior.nc"), tree)


def test_integers_scalars_and_missing_groups_read_back(tmp_path: Path) -> None:
    def model() -> None:
        pyro.sample("k", dist.Categorical(torch.ones(3)))

    tree = to_datatree(model, model, num_samples=5)
    save_posterior(tree, tmp_path / "k.nc")
    assert_bit_equal(load_posterior(tmp_path / "k.nc"), tree)


def test_a_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "posterior.nc"
    first, second = (to_datatree(make_pair(), X, num_samples=n) for n in (2, 3))
    save_posterior(first, path)
    with pytest.raises(FileExistsError, match="choose another name or pass overwrite=True"):
        save_posterior(second, path)
    assert_bit_equal(load_posterior(path), first)
    save_posterior(second, path, overwrite=True)
    assert_bit_equal(load_posterior(path), second)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "posterior.nc"
    first = to_datatree(make_pair(), X, num_samples=2)
    save_posterior(first, path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    second = to_datatree(make_pair(), X, num_samples=3)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="what was there before is intact"):
        save_posterior(second, path, overwrite=True)
    assert os.listdir(tmp_path) == ["posterior.nc"]
    assert_bit_equal(load_posterior(path), first)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*absent.nc: write one with save_posterior"):
        load_posterior(tmp_path / "absent.nc")
    (tmp_path / "text.nc").write_text("not a posterior")
    with pytest.raises(PosteriorError, match=r"expected a netCDF-4 file, but .*text.nc cannot be read"):
        load_posterior(tmp_path / "text.nc")
    save_posterior(to_datatree(make_pair(), X, num_samples=500), tmp_path / "whole.nc")
    content = (tmp_path / "whole.nc").read_bytes()
    for length in range(0, len(content), len(content) // 20):
        (tmp_path / "cut.nc").write_bytes(content[:length])
        with pytest.raises(PosteriorError, match=r"cut.nc cannot be read"):
            load_posterior(tmp_path / "cut.nc")


# -------------------------------------------------------------------------------- summaries and pictures


def test_summary_is_the_draws_summary(exact_tree: xarray.DataTree) -> None:
    table = summary(exact_tree, var_names=["z"], ci_prob=0.9, round_to="none")
    z = var(exact_tree, "posterior", "z").values.reshape(DRAWS, -1)
    np.testing.assert_allclose(table["mean"].to_numpy(), z.mean(0))
    np.testing.assert_allclose(table["eti90_lb"].to_numpy(), np.quantile(z, 0.05, axis=0), rtol=1e-3)
    assert not any("hat" in column or "ess" in column for column in table.columns)
    assert len(summary(exact_tree, group="prior_predictive")) == 6
    with pytest.raises(PosteriorError, match=r"group of draws among posterior, .* got 'observed_data'"):
        summary(exact_tree, group="observed_data")


@pytest.mark.parametrize("kind", ["forest", "dist"])
def test_plots_draw_the_chosen_scalars(exact_tree: xarray.DataTree, kind: Any, tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    figure = plot_posterior(exact_tree, kind=kind, coords={"data": 1})
    figure.savefig(tmp_path / "plot.png", dpi=40)
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert figure.get_suptitle().startswith("posterior: ")
    assert len(figure.axes) == 2  # forest: labels and intervals; dist: one panel per scalar
    assert plt.get_fignums() == []
    xs = np.concatenate([np.ravel(line.get_xdata()) for line in figure.axes[-1].lines])
    mean = var(exact_tree, "posterior", "z").sel(data=1, z_dim_0=1).values.mean()
    assert xs.min() < mean < xs.max()


def test_plots_refuse_what_they_cannot_show(exact_tree: xarray.DataTree) -> None:
    with pytest.raises(PosteriorError, match="expected kind 'forest' or 'dist', got 'trace'"):
        plot_posterior(exact_tree, kind="trace")  # type: ignore[arg-type]
    with pytest.raises(PosteriorError, match=r"group of draws among posterior, .* got 'warmup'"):
        plot_posterior(exact_tree, "warmup")
    for chosen in ({"var_names": ["w"]}, {"coords": {"data": [7]}}, {"coords": {"pixel": [0]}}):
        with pytest.raises(PosteriorError, match="sites among z and dimensions among sample, data, z_dim_0"):
            plot_posterior(exact_tree, **chosen)
    many = to_datatree(make_pair(), X.repeat(16, 1), num_samples=3, groups=["posterior"])
    with pytest.raises(PosteriorError, match="expected 1 to 60 scalars to draw, got 64: select some"):
        plot_posterior(many)


def test_a_file_is_read_summarised_and_drawn_without_torch(exact_tree: xarray.DataTree, tmp_path: Path) -> None:
    save_posterior(exact_tree, tmp_path / "posterior.nc")
    program = (
        "import sys; from inference.posterior import load_posterior, plot_posterior, summary; "
        "assert not {'arviz_base', 'xarray', 'torch'} & set(sys.modules), 'heavy imports'; "
        f"tree = load_posterior({str(tmp_path / 'posterior.nc')!r}); summary(tree); plot_posterior(tree); "
        "assert 'torch' not in sys.modules and 'pyro' not in sys.modules, 'torch'"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, cwd=Path(__file__).parent.parent)
