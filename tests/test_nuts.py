"""NUTS against the exact posterior, and the comparison with the guide against draws of known laws."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray

from inference.chains import effective_sample_size, error_of_the_mean, r_hat
from inference.nuts import GoldStandardError, compare_guide, gold_standard
from inference.posterior import load_posterior, save_posterior, summary
from inference.views.gold_standard import QUANTILES, draw_intervals, interval_plot
from ppl_models import LinearGaussian, ModelGuidePair
from tests.oracles import gaussian

Z_MAX = 6.0


class Off(LinearGaussian):
    """Its guide is right in z[0]'s spread and too high there, too narrow in z[1]."""

    def guide(self, x):
        q = self.posterior(x)
        with pyro.plate("data", self.batch_size(x)):
            loc = q.loc + q.stddev * torch.tensor([0.8, 0.0])
            return pyro.sample("z", dist.Normal(loc, q.stddev * torch.tensor([1.0, 0.5])).to_event(1))


X = np.array([[0.3, -1.0, 0.5], [1.5, 0.2, -0.7]])


def make_pair() -> Off:
    weight = torch.tensor([[1.0, 0.2], [0.0, 0.8], [0.4, 0.0]], dtype=torch.float64)
    return Off(weight, torch.zeros(3, dtype=torch.float64), 0.8)


@pytest.fixture(scope="module")
def tree() -> xarray.DataTree:
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # made once, before conftest's fixture
    pyro.set_rng_seed(0)
    result = gold_standard(
        make_pair(),
        torch.as_tensor(X),
        num_samples=150,
        warmup=75,
        num_chains=2,
        num_guide_draws=1000,
        labels=[12, 40],
    )
    torch.set_default_dtype(default_dtype)
    return result


def exact(i: int) -> tuple[np.ndarray, np.ndarray]:
    pair = make_pair()
    return gaussian.posterior(pair.weight.detach().numpy(), pair.bias.detach().numpy(), 0.8, X[i])


def test_nuts_draws_are_the_posterior(tree):
    """Means and variances of each coordinate in standard errors that count effective draws only."""
    draws = tree["posterior"]["z"]
    ess = effective_sample_size(tree)["z"].values
    for i in range(2):
        mean, cov = exact(i)
        z = (draws.values[:, :, i].mean((0, 1)) - mean) / np.sqrt(np.diag(cov) / ess[i])
        assert np.abs(z).max() < Z_MAX
        sd_ratio = draws.values[:, :, i].std((0, 1)) / np.sqrt(np.diag(cov))
        assert np.abs(sd_ratio - 1).max() < Z_MAX / np.sqrt(2 * ess[i].min())
    wrong, _ = exact(1)
    z = (draws.values[:, :, 0].mean((0, 1)) - wrong) / np.sqrt(np.diag(exact(0)[1]) / ess[0])
    assert np.abs(z).max() > Z_MAX  # another datum's posterior is told apart


def test_layout_is_arvizs(tree, tmp_path):
    assert set(tree.children) == {"posterior", "guide", "sample_stats", "observed_data"}
    assert dict(tree["posterior"]["z"].sizes) == {"chain": 2, "draw": 150, "data": 2, "z_dim_0": 2}
    assert dict(tree["guide"]["z"].sizes) == {"sample": 1000, "data": 2, "z_dim_0": 2}
    assert tree["sample_stats"]["diverging"].dtype == bool
    assert tree["posterior"]["data"].values.tolist() == [12, 40]
    np.testing.assert_array_equal(tree["observed_data"]["x"], X)
    assert list(summary(tree, "guide").index) == ["z[12, 0]", "z[12, 1]", "z[40, 0]", "z[40, 1]"]
    save_posterior(tree, tmp_path / "gold.nc")
    assert load_posterior(tmp_path / "gold.nc").identical(tree)


def test_diagnostics_of_chains_that_agree_and_of_chains_that_do_not(tree):
    assert float(r_hat(tree)["z"].max()) < 1.1
    assert float(effective_sample_size(tree)["z"].min()) > 30
    spread = tree["posterior"]["z"].std(("chain", "draw"))
    ratio = error_of_the_mean(tree)["z"] / spread * np.sqrt(effective_sample_size(tree)["z"])
    assert float(ratio.min()) > 0.6
    assert float(ratio.max()) < 1.6
    apart = tree["posterior"].to_dataset() + xarray.DataArray([0.0, 3.0], dims="chain")
    assert float(r_hat(xarray.DataTree.from_dict({"posterior": apart}))["z"].min()) > 1.5


def test_comparison_names_what_is_wrong(tree):
    comparison = compare_guide(tree)
    assert comparison.names == ("z[0]", "z[1]", "z[0]", "z[1]")
    assert comparison.data.tolist() == [12, 12, 40, 40]
    for row in (0, 2):
        assert "sd too high" in comparison.findings(row)
        assert "narrow" not in comparison.findings(row)
        assert "too narrow" in comparison.findings(row + 1)
        assert "too high" not in comparison.findings(row + 1)
        assert abs(comparison.shift[row] - 0.8) < 0.3
        assert abs(comparison.sd_ratio[row + 1] - 0.5) < Z_MAX * comparison.sd_ratio_std_error[row + 1]
    assert comparison.words().startswith("guide against NUTS: 0 of 4")
    assert "datum 12, z[0]:" in comparison.words()
    assert "R-hat" in comparison.table()


def known(shift: float, stretch: float, chain_shift: float = 0.0, draws: int = 2000) -> xarray.DataTree:
    """A tree of independent draws: chains of N(0, 1), guide N(shift, stretch^2)."""
    rng = np.random.default_rng(0)
    nuts = rng.normal(size=(4, draws, 1, 3)) + chain_shift * np.arange(4)[:, None, None, None]
    guide = shift + stretch * rng.normal(size=(4000, 1, 3))
    groups = {
        "posterior": xarray.Dataset({"z": (("chain", "draw", "data", "z_dim_0"), nuts)}, {"data": [0]}),
        "guide": xarray.Dataset({"z": (("sample", "data", "z_dim_0"), guide)}, {"data": [0]}),
        "sample_stats": xarray.Dataset({"diverging": (("chain", "draw", "data"), np.zeros((4, draws, 1), bool))}),
    }
    return xarray.DataTree.from_dict(groups)


def test_right_guide_agrees():
    comparison = compare_guide(known(0.0, 1.0))
    assert [comparison.findings(row) for row in range(3)] == ["agrees"] * 3
    assert comparison.words().startswith("guide against NUTS: 3 of 3 latent dimensions agree")
    assert np.abs(comparison.shift_z).max() < Z_MAX
    assert (np.abs(comparison.sd_ratio - 1) < Z_MAX * comparison.sd_ratio_std_error).all()
    np.testing.assert_allclose(comparison.sd_ratio_std_error, np.sqrt(1 / 16_000 + 1 / 8000), rtol=0.15)


@pytest.mark.parametrize(
    ("shift", "stretch", "said"),
    [
        (0.5, 1.0, "0.5 sd too high"),
        (-0.5, 1.0, "0.5 sd too low"),
        (0.0, 0.7, "too narrow (sd × 0."),
        (0.0, 1.4, "too wide"),
    ],
)
def test_wrong_guide_is_said_to_be(shift, stretch, said):
    comparison = compare_guide(known(shift, stretch))
    assert all(said in comparison.findings(row) for row in range(3))


def test_chains_that_disagree_are_not_trusted():
    comparison = compare_guide(known(0.0, 1.0, chain_shift=1.0))
    assert not comparison.trusted.any()
    assert "not to be trusted" in comparison.findings(0)
    assert "3 rows not to be trusted (R-hat above" in comparison.words()
    assert not compare_guide(known(0.0, 1.0, draws=50)).trusted.any()  # too few draws


def test_nuts_is_quiet(capfd):
    pair = LinearGaussian.random(2, 1)
    gold_standard(pair, torch.zeros(1, 2), num_samples=4, warmup=4, num_chains=2, num_guide_draws=2)
    assert capfd.readouterr() == ("", "")


def test_several_layers_and_scalar_sites():
    class Chain(ModelGuidePair):
        def __init__(self) -> None:
            super().__init__((), ("s", "z"))

        def model(self, x=None, size=None):
            with pyro.plate("data", self.batch_size(x, size)):
                s = pyro.sample("s", dist.LogNormal(0.0, 0.3))
                z = pyro.sample("z", dist.Normal(torch.zeros(2), s[..., None]).to_event(1))
                return pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

        def guide(self, x):
            with pyro.plate("data", self.batch_size(x)):
                pyro.sample("s", dist.LogNormal(0.0, 0.3))
                pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    tree = gold_standard(Chain(), torch.tensor([0.5]), num_samples=8, warmup=8, num_chains=2, num_guide_draws=5)
    assert dict(tree["posterior"]["s"].sizes) == {"chain": 2, "draw": 8, "data": 1}
    assert bool((tree["posterior"]["s"] > 0).all())  # in the site's own units, not unconstrained
    assert compare_guide(tree).names == ("s", "z[0]", "z[1]")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_chains": 1}, "num_chains >= 2"),
        ({"num_samples": 3}, "num_samples >= 4"),
        ({"labels": [1, 2, 3]}, "expected 2 labels, one per datum"),
    ],
)
def test_bad_arguments_are_refused(options, match):
    with pytest.raises(GoldStandardError, match=match):
        gold_standard(LinearGaussian.random(3, 2), torch.zeros(2, 3), **options)


def test_discrete_latents_are_refused():
    class Coin(ModelGuidePair):
        def __init__(self) -> None:
            super().__init__((), ("z",))

        def model(self, x=None, size=None):
            with pyro.plate("data", self.batch_size(x, size)):
                z = pyro.sample("z", dist.Bernoulli(0.5))
                return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(self, x):
            with pyro.plate("data", self.batch_size(x)):
                pyro.sample("z", dist.Bernoulli(0.5))

    with pytest.raises(GoldStandardError, match="continuous latents, got Bernoulli at site 'z'"):
        gold_standard(Coin(), torch.zeros(2))


class TestPicture:
    def test_intervals_are_the_draws_quantiles(self, tree):
        data = interval_plot(tree)
        chains = tree["posterior"]["z"].values[:, :, 1, 0].ravel()
        np.testing.assert_allclose(data.nuts_quantiles[2], np.quantile(chains, QUANTILES))
        np.testing.assert_allclose(data.guide_mean[2], tree["guide"]["z"].values[:, 1, 0].mean())
        assert data.data == ("12", "12", "40", "40")

    def test_a_panel_for_each_datum_with_findings_in_words(self, tree):
        data = interval_plot(tree)
        figure = draw_intervals(data)
        figure.draw_without_rendering()
        assert [axes.get_title("left") for axes in figure.axes] == ["datum 12", "datum 40"]
        for axes in figure.axes:
            assert [label.get_text() for label in axes.get_yticklabels()] == ["z[0]", "z[1]"]
            assert len(axes.texts) == 2
            frame = figure.bbox
            for text in axes.texts:
                assert text.get_window_extent().x1 <= frame.x1 + 1
        assert figure.axes[0].texts[0].get_text() == data.findings[0]

    def test_too_much_for_a_page_is_refused(self):
        tree = known(0.0, 1.0, draws=10)
        wide = tree.map_over_datasets(lambda ds: ds.isel(z_dim_0=np.zeros(61, int)) if "z_dim_0" in ds.dims else ds)
        with pytest.raises(ValueError, match="at most 60 scalars to draw, got 61"):
            interval_plot(wide)
