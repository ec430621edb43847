"""Plot data against brute force: numpy formulas of linear pairs, which share nothing with the code that reads traces."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

from inference.bounds import decompose_elbo
from inference.views.latent_data import latent_map, traversal
from inference.views.plot_data import bound_terms, learning_curve, reconstructions, samples
from inference.views.probing import NoMeanError, activity, conditional_mean, data_mean, guide_means
from inference.views.projection import principal_plane
from ppl_models.likelihoods import Categorical
from ppl_models.linear_gaussian import LinearGaussian
from ppl_models.pair import ModelGuidePair
from ppl_models.vae import VAE

Z_1E6 = 4.9  # two-sided normal quantile for a false-failure rate of 1e-6


class Chain(ModelGuidePair):
    """z_2 -> z_1 -> x, each the one above times its matrix: a hierarchy whose means are products of matrices."""

    def __init__(self, above: torch.Tensor, below: torch.Tensor, prior=None) -> None:
        super().__init__((below.shape[0],), ("z_2", "z_1"))
        self.above, self.below = above, below
        self.prior = prior or dist.Normal(torch.zeros(above.shape[1]), 1.0).to_event(1)

    def model(self, x=None, size=None):
        with pyro.plate("data", self.batch_size(x, size)):
            z_2 = pyro.sample("z_2", self.prior)
            z_1 = pyro.sample("z_1", dist.Normal(z_2 @ self.above.T, 2.0).to_event(1))
            return pyro.sample("x", dist.Normal(z_1 @ self.below.T, 0.1).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", self.batch_size(x)):
            z_1 = pyro.sample("z_1", dist.Normal(x @ self.below, 0.5).to_event(1))
            return pyro.sample("z_2", dist.Normal(z_1 @ self.above, 0.5).to_event(1))


class OneSite(ModelGuidePair):
    """Whatever laws a test wants for z and x."""

    def __init__(self, prior, likelihood, extra=False) -> None:
        super().__init__((2,), ("z",))
        self.prior, self.likelihood, self.extra = prior, likelihood, extra

    def model(self, x=None, size=None):
        with pyro.plate("data", self.batch_size(x, size)):
            z = pyro.sample("z", self.prior)
            if self.extra:
                pyro.sample("y", dist.Normal(0.0, 1.0))
            return pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x):
        with pyro.plate("data", self.batch_size(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))


def normal_2d(z):
    return dist.Normal(z, 1.0).to_event(1)


@pytest.fixture
def chain() -> Chain:
    return Chain(torch.randn(3, 2), torch.randn(4, 3))


@pytest.fixture
def linear() -> LinearGaussian:
    return LinearGaussian.random(data_dim=5, latent_dim=3, seed=3)


def posterior_means(pair: LinearGaussian, x: torch.Tensor) -> np.ndarray:
    """(W'W + s^2 I)^-1 W'(x - b), by numpy (Tipping and Bishop 1999, eq. 7)."""
    w, b, s = (t.detach().numpy() for t in (pair.weight, pair.bias, pair.noise_scale))
    return np.linalg.inv(w.T @ w + s**2 * np.eye(w.shape[1])) @ w.T @ (x.numpy() - b).T


class TestTraversal:
    def test_of_a_linear_pair_is_w_times_t_plus_b(self, linear):
        data = traversal(linear, torch.randn(20, 5), steps=5)
        w, b = linear.weight.detach().numpy(), linear.bias.detach().numpy()
        expected = np.stack([np.outer([-3.0, -1.5, 0.0, 1.5, 3.0], w[:, d]) + b for d in data.dims])
        np.testing.assert_allclose(data.means, expected, atol=1e-12)
        with pytest.raises(AssertionError):  # the control: dimensions in another order
            np.testing.assert_allclose(data.means, expected[::-1], atol=1e-12)

    def test_dimensions_come_by_activity(self, linear):
        x = torch.randn(50, 5)
        variances = posterior_means(linear, x).var(axis=1)
        data = traversal(linear, x)
        assert list(data.dims) == list(np.argsort(-variances))
        np.testing.assert_allclose(data.activity, np.sort(variances)[::-1], rtol=1e-10)

    def test_only_the_most_active_dimensions_are_kept(self, linear):
        x = torch.randn(50, 5)
        everything, two = traversal(linear, x), traversal(linear, x, max_dims=2, steps=2)
        assert two.dims == everything.dims[:2]
        assert two.means.shape == (2, 2, 5)

    def test_others_stay_at_the_datum(self, linear):
        x = torch.randn(20, 5)
        data = traversal(linear, x, datum=x[4], steps=3)
        w, b = linear.weight.detach().numpy(), linear.bias.detach().numpy()
        for row, dim in enumerate(data.dims):
            for step, value in enumerate((-3.0, 0.0, 3.0)):
                z = posterior_means(linear, x)[:, 4].copy()
                z[dim] = value
                np.testing.assert_allclose(data.means[row, step], w @ z + b, atol=1e-11)
        assert data.centre == "a datum's posterior mean"

    def test_upper_layer_carries_the_lower_along(self, chain):
        data = traversal(chain, torch.randn(10, 4), steps=3)
        product = (chain.below @ chain.above).numpy()
        expected = np.stack([np.outer([-3.0, 0.0, 3.0], product[:, d]) for d in data.dims])
        np.testing.assert_allclose(data.means, expected, atol=1e-12)

    def test_lower_layer_moves_over_its_own_prior_around_the_upper(self, chain):
        x = torch.randn(10, 4)
        data = traversal(chain, x, site="z_1", datum=x[0], steps=3)
        below, above = chain.below.numpy(), chain.above.numpy()
        z_1 = below.T @ x[0].numpy()
        z_2 = above.T @ z_1
        for row, dim in enumerate(data.dims):
            moved = z_1.copy()
            moved[dim] = (above @ z_2)[dim] + 3.0 * 2.0  # three of the prior's sd above the prior's mean given z_2
            np.testing.assert_allclose(data.means[row, 2], below @ moved, atol=1e-10)

    def test_values_are_the_priors_quantiles(self):
        pair = OneSite(dist.Laplace(torch.ones(2), 3.0).to_event(1), normal_2d)
        data = traversal(pair, torch.randn(5, 2), steps=7)
        expected = scipy.stats.laplace(1.0, 3.0).ppf(scipy.stats.norm.cdf(np.linspace(-3, 3, 7)))
        for row, dim in enumerate(data.dims):
            np.testing.assert_allclose(data.means[row, :, dim], expected, rtol=1e-10)

    def test_draws_nothing(self, linear):
        x = torch.randn(5, 5)
        before = torch.get_rng_state()
        first, second = traversal(linear, x), traversal(linear, x)
        assert torch.equal(torch.get_rng_state(), before)
        np.testing.assert_array_equal(first.means, second.means)

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"site": "y"}, "expected a latent site among z_2, z_1, got 'y'"),
            ({"steps": 1}, "expected steps >= 2"),
            ({"max_dims": 0}, "max_dims >= 1"),
        ],
    )
    def test_bad_arguments(self, chain, arguments, match):
        with pytest.raises(ValueError, match=match):
            traversal(chain, torch.randn(3, 4), **arguments)

    def test_prior_without_quantiles_by_dimension(self):
        pair = OneSite(dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), normal_2d)
        with pytest.raises(ValueError, match="expected a prior at 'z' with independent dimensions and known quantiles"):
            traversal(pair, torch.randn(3, 2))


class TestProbing:
    def test_conditional_mean_of_classes_is_the_expected_index(self):
        vae = VAE.preset((3,), Categorical(num_classes=4), latent_dim=2, hidden=(5,))
        z = torch.randn(6, 2)
        probabilities = vae.decoder(z).detach().softmax(-1).numpy()
        np.testing.assert_allclose(conditional_mean(vae, {"z": z}).numpy(), probabilities @ np.arange(4), atol=1e-12)

    def test_guide_means_do_not_depend_on_the_chunk(self, chain, monkeypatch):
        x = torch.randn(7, 4)
        whole = guide_means(chain, x)
        monkeypatch.setattr("inference.views.probing.ROWS_AT_ONCE", 3)
        for site, means in guide_means(chain, x).items():
            torch.testing.assert_close(means, whole[site], rtol=1e-12, atol=1e-12)

    def test_activity_of_one_datum_is_zero(self):
        assert activity(torch.randn(1, 3)).tolist() == [0.0, 0.0, 0.0]

    def test_law_without_a_mean(self):
        pair = OneSite(dist.Cauchy(torch.zeros(2), 1.0).to_event(1), normal_2d)
        with pytest.raises(NoMeanError, match="expected a law with a mean at site 'z'"):
            traversal(pair, torch.randn(3, 2))
        with pytest.raises(NoMeanError, match="at the data site"):
            data_mean(dist.Cauchy(0.0, 1.0))

    def test_two_data_sites(self):
        pair = OneSite(dist.Normal(torch.zeros(2), 1.0).to_event(1), normal_2d, extra=True)
        with pytest.raises(ValueError, match="expected one data site in the model beside the latent sites z, got y, x"):
            samples(pair, 2)

    @pytest.mark.parametrize(
        "latents", [{"y": torch.zeros(2, 3)}, {}, {"z_1": torch.zeros(2, 3), "z_2": torch.zeros(1, 2)}]
    )
    def test_wrong_latents(self, chain, latents):
        with pytest.raises(
            ValueError, match="expected values of latent sites among z_2, z_1, all with the same number"
        ):
            conditional_mean(chain, latents)


class TestReconstructionsAndSamples:
    def test_reconstruction_and_elbo_of_a_linear_pair(self, linear):
        x = linear.model(size=6).detach()
        data = reconstructions(linear, x, num_particles=1000)
        w, b, s = (t.detach().numpy() for t in (linear.weight, linear.bias, linear.noise_scale))
        evidence = scipy.stats.multivariate_normal(b, w @ w.T + s**2 * np.eye(5)).logpdf(x.numpy())
        np.testing.assert_array_equal(data.originals, x.numpy())
        np.testing.assert_allclose(data.means, (w @ posterior_means(linear, x)).T + b, atol=1e-11)
        z = (data.elbo - evidence) / np.maximum(data.std_error, 1e-9)
        assert np.abs(z).max() < scipy.stats.norm.isf(1e-6 / 12)
        assert np.abs(z + 0.5 / data.std_error).min() > 6  # the control: half a nat off

    def test_samples_scatter_around_their_means_with_the_likelihoods_scale(self, linear):
        data = samples(linear, 2000, torch.zeros(3, 5))
        residual = (data.draws - data.means) / linear.noise_scale.item()
        count = residual.size
        assert abs(residual.mean()) * math.sqrt(count) < Z_1E6
        assert abs((residual**2).mean() - 1) * math.sqrt(count / 2) < Z_1E6
        assert data.data.shape == (3, 5)
        wider = residual * 1.25  # the control: scale off by a quarter
        assert abs((wider**2).mean() - 1) * math.sqrt(count / 2) > Z_1E6


class TestLearningCurve:
    def test_columns_and_gaps(self):
        rows = [
            {"epoch": 1, "train_elbo": -3.0, "train_rate": 1.0, "train_distortion": 2.0, "validation_elbo": None},
            {"epoch": "2", "train_elbo": "-2.5", "validation_elbo": "", "validation_rate": float("nan"), "lr": 0.1},
        ]
        data = learning_curve(rows)
        np.testing.assert_array_equal(data.epoch, [1, 2])
        np.testing.assert_array_equal(data.train_elbo, [-3, -2.5])
        np.testing.assert_array_equal(data.train_rate, [1, np.nan])
        np.testing.assert_array_equal(data.train_distortion, [2, np.nan])
        for empty in (data.validation_elbo, data.validation_rate, data.validation_distortion):
            assert np.isnan(empty).all()

    @pytest.mark.parametrize("rows", [[], [{"train_elbo": 1.0}]])
    def test_no_epochs(self, rows):
        with pytest.raises(ValueError, match="expected at least one row of metrics, each with an 'epoch'"):
            learning_curve(rows)


class TestLatentMap:
    def test_two_most_active_dimensions_in_order(self):
        pair = LinearGaussian.random(data_dim=5, latent_dim=4, seed=3)
        x = torch.randn(30, 5)
        means = posterior_means(pair, x)
        chosen = sorted(np.argsort(-means.var(axis=1))[:2])
        data = latent_map(pair, x, torch.arange(30))
        np.testing.assert_allclose(data.coordinates, means[chosen].T, atol=1e-11)
        assert [label.split(",")[0] for label in data.axes] == [f"E[z[{d}] | x]" for d in chosen]
        assert data.axes[0].endswith(f"activity {means[chosen[0]].var():.2f}")

    def test_two_dimensions_are_drawn_as_they_are(self):
        pair = LinearGaussian.random(data_dim=5, latent_dim=2)
        x = torch.randn(8, 5)
        data = latent_map(pair, x)
        np.testing.assert_allclose(data.coordinates, posterior_means(pair, x).T, atol=1e-11)
        assert data.axes == ("E[z[0] | x]", "E[z[1] | x]")
        assert data.labels is None

    def test_one_dimension_against_the_row(self):
        data = latent_map(LinearGaussian.random(data_dim=5, latent_dim=1), torch.randn(8, 5))
        np.testing.assert_array_equal(data.coordinates[:, 1], np.arange(8))
        assert data.axes == ("E[z[0] | x]", "row of the data")

    def test_labels_of_another_length(self, linear):
        with pytest.raises(ValueError, match=r"expected one label per datum, shape \[4\], got \[3\]"):
            latent_map(linear, torch.randn(4, 5), torch.arange(3))


class TestBoundTerms:
    def test_rows_are_means_over_data(self, linear):
        d = decompose_elbo(linear.model, linear.guide, torch.randn(6, 5), num_particles=50)
        data = bound_terms(d)
        assert data.names == ("z", "x", "ELBO")
        assert data.per == "nats, mean over 6 data"
        assert np.isnan(data.best[1])
        np.testing.assert_allclose(data.best[[0, 2]], [d["z"].analytic.mean(), d.elbo.mean()])
        np.testing.assert_allclose(data.monte_carlo[:2].sum(), data.monte_carlo[2])
        np.testing.assert_allclose(data.best[0] + data.monte_carlo[1], data.best[2])
        expected = math.sqrt(sum(float(e) ** 2 for e in d["x"].std_error)) / 6
        assert data.monte_carlo_error[1] == pytest.approx(expected)
        assert data.best_error[2] == d.mean_std_error

    def test_without_a_shared_plate(self):
        def model():
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(1.0))

        def guide():
            pyro.sample("z", dist.Normal(0.5, 0.5**0.5))

        assert bound_terms(decompose_elbo(model, guide, num_particles=10)).per == "nats"


def test_principal_plane_holds_the_leading_components():
    values = np.random.default_rng(0).normal(size=(200, 4)) * [5.0, 0.1, 3.0, 0.2]
    plane = principal_plane(values, "x")
    covariance = np.cov(values.T)
    eigenvalues, vectors = np.linalg.eigh(covariance)
    seen = plane(values)
    np.testing.assert_allclose(seen.var(axis=0, ddof=1), eigenvalues[::-1][:2], rtol=1e-10)
    np.testing.assert_allclose(np.abs(plane.basis.T @ vectors[:, ::-1][:, :2]), np.eye(2), atol=1e-8)
    assert f"({100 * eigenvalues[-1] / eigenvalues.sum():.0f} % of variance)" in plane.labels[0]


def test_principal_plane_of_one_point_is_defined():
    assert principal_plane(np.ones((1, 3)), "x")(np.ones((1, 3))).tolist() == [[0.0, 0.0]]
