"""Calibration: exact guides pass, wrong ones are rejected with a power worked out here, and the band has its coverage.

Oracles: the law of ranks under a wrong Gaussian guide by quadrature over Binomial(L, Phi(.)), hence the noncentral
chi-square law of the statistic; SciPy's own chi-square test; plain simulation of uniform ranks for the band.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

from inference.bounds import PairError, calibration
from inference.bounds.calibration import JOINT, Calibration, simulation_based_calibration
from inference.bounds.uniformity import bin_counts, chi_square, ecdf, ecdf_band
from inference.views.calibration import draw_calibration, rank_plot
from ppl_models import LinearGaussian, ModelGuidePair

BOUND = 63.7  # chi-square(19) is above once in a million
DRAWS, BINS = 99, 20


class Off(LinearGaussian):
    """An exact linear-Gaussian pair whose guide is then shifted (in posterior sds) and stretched."""

    shift, stretch = 0.0, 1.0

    def guide(self, x):
        q = self.posterior(x)
        with pyro.plate("data", self.batch_size(x)):
            loc = q.loc + self.shift * q.stddev
            return pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=q.scale_tril * self.stretch))


class RightMarginals(LinearGaussian):
    """Each dimension has its own posterior, all of them independent: only the correlation is wrong."""

    def guide(self, x):
        q = self.posterior(x)
        with pyro.plate("data", self.batch_size(x)):
            return pyro.sample("z", dist.Normal(q.loc, q.stddev).to_event(1))


class Coins(ModelGuidePair):
    """z in 0..2, x | z ~ Bernoulli(rate of z), both enumerable; the guide is the posterior, sharpened by a power."""

    def __init__(self, power: float = 1.0) -> None:
        super().__init__((), ("z",))
        self.prior = torch.tensor([0.5, 0.3, 0.2])
        self.rates = torch.tensor([0.2, 0.5, 0.9])
        self.power = power

    def model(self, x=None, size=None):
        with pyro.plate("data", self.batch_size(x, size)):
            z = pyro.sample("z", dist.Categorical(self.prior))
            return pyro.sample("x", dist.Bernoulli(self.rates[z]), obs=x)

    def guide(self, x):
        with pyro.plate("data", self.batch_size(x)):
            likelihood = torch.where(x[..., None] > 0, self.rates, 1 - self.rates)
            return pyro.sample("z", dist.Categorical(probs=(self.prior * likelihood) ** self.power))


def off(shift: float = 0.0, stretch: float = 1.0) -> Off:
    base = LinearGaussian.random(4, 2)
    pair = Off(base.weight, base.bias, base.noise_scale)
    pair.shift, pair.stretch = shift, stretch
    return pair


def power(shift: float, stretch: float, num: int) -> float:
    """Probability that chi-square(19) of N ranks is above the bound, when the guide is N(m + shift s, (stretch s)^2).

    Given the truth m + s t, t ~ N(0, 1), a draw is below it with probability Phi((t - shift) / stretch). The statistic is
    noncentral chi-square with N sum (p_b - 1/20)^2 20, up to the change of the multinomial's variance.
    """
    truth = scipy.stats.norm.ppf((np.arange(2000) + 0.5) / 2000)
    below = scipy.stats.norm.cdf((truth - shift) / stretch)
    edges = np.arange(BINS + 1) * (DRAWS + 1) // BINS - 1
    masses = np.diff(scipy.stats.binom.cdf(edges, DRAWS, below[:, None]).mean(0))
    noncentrality = num * BINS * ((masses - 1 / BINS) ** 2).sum()
    return float(scipy.stats.ncx2.sf(BOUND, BINS - 1, noncentrality))


@pytest.mark.parametrize("pair", [LinearGaussian.random(4, 2), off()], ids=["linear", "off-by-nothing"])
def test_exact_guide_passes(pair):
    result = simulation_based_calibration(pair)
    assert result.ranks.shape == (1000, 3)
    assert result.names == ("z[0]", "z[1]", JOINT)
    assert bool((result.chi_square <= BOUND).all())


@pytest.mark.parametrize(
    ("shift", "stretch", "said"),
    [(0.0, 0.8, "too narrow"), (0.3, 1.0, "too high"), (-0.3, 1.0, "too low"), (0.0, 1.3, "too wide")],
)
def test_wrong_guide_is_rejected(shift, stretch, said):
    """At 3000 simulations each dimension misses a wrong guide less than once in a million; at 1000 once in 60."""
    assert power(shift, stretch, 3000) > 1 - 1e-6
    assert power(shift, stretch, 1000) > 0.95
    result = simulation_based_calibration(off(shift, stretch), num_simulations=3000)
    assert bool((result.chi_square[:2] > BOUND).all())
    assert set(result.rejected()) >= {"z[0]", "z[1]"}
    assert f"z[0]: the guide is {said}" in result.words()
    assert "REJECTED" in result.table()


def test_power_oracle_is_the_level_for_an_exact_guide():
    assert power(0.0, 1.0, 1000) == pytest.approx(scipy.stats.chi2.sf(BOUND, BINS - 1), rel=0.05)


def test_wrong_correlation_is_seen_by_the_joint_check_alone():
    pair = RightMarginals(torch.tensor([[1.0, 0.9]]), torch.zeros(1), noise_scale=0.3)
    result = simulation_based_calibration(pair)
    assert bool((result.chi_square[:2] <= BOUND).all())
    assert result.chi_square[2] > BOUND
    assert result.rejected() == (JOINT,)
    assert "wrongly correlated" in result.words()
    exact = LinearGaussian(pair.weight.detach(), torch.zeros(1), noise_scale=0.3)
    assert simulation_based_calibration(exact).chi_square[2] <= BOUND


def test_discrete_latents_with_random_ties():
    result = simulation_based_calibration(Coins())
    assert result.names == ("z", JOINT)
    assert bool((result.chi_square <= BOUND).all())
    assert "calibrated as far as 1000 simulations can tell" in result.words()
    assert simulation_based_calibration(Coins(power=3.0)).chi_square[0] > BOUND


def test_programs_that_only_run_alone_give_ranks_as_well():
    class Alone(LinearGaussian):
        def guide(self, x):
            q = self.posterior(x)
            with pyro.plate("data", self.batch_size(x)):
                value = pyro.sample("z", q)
            assert value.dim() == 2, "not under a plate"
            return value

    pair = LinearGaussian.random(3, 1)
    alone = Alone(pair.weight, pair.bias, pair.noise_scale)
    result = simulation_based_calibration(alone, num_simulations=200, num_draws=19, num_bins=10)
    assert result.ranks.shape == (200, 2)
    assert bool((result.chi_square <= scipy.stats.chi2.isf(1e-6, 9)).all())


def test_memory_is_bounded_by_chunks(monkeypatch):
    sizes = []
    simulate = calibration._simulate

    def spy(pair, size, num_draws):
        sizes.append(size)
        return simulate(pair, size, num_draws)

    monkeypatch.setattr(calibration, "_simulate", spy)
    monkeypatch.setattr(calibration, "ELEMENTS_AT_ONCE", 99 * (4 + 2) * 150)
    result = simulation_based_calibration(LinearGaussian.random(4, 2))
    assert len(result.ranks) == sum(sizes) == 1000
    assert max(sizes) == 150
    assert bool((result.chi_square <= BOUND).all())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_draws": 0}, "num_draws >= 1"),
        ({"num_simulations": 99}, "at least 5 simulations a bin, got 99 draws and 99 simulations"),
        ({"num_bins": 30}, "30 bins for 100 ranks"),
        ({"num_bins": 1}, "at least 2 bins"),
    ],
)
def test_bad_arguments_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        simulation_based_calibration(LinearGaussian.random(3, 2), **options)


def test_sites_that_do_not_match_are_named():
    class Missing(LinearGaussian):
        def guide(self, x):
            with pyro.plate("data", self.batch_size(x)):
                return pyro.sample("w", self.posterior(x))

    pair = LinearGaussian.random(3, 2)
    with pytest.raises(PairError, match="'z' has no guide site"):
        simulation_based_calibration(Missing(pair.weight, pair.bias, 1.0))


# ------------------------------------------------------------------------------------------- uniformity


def test_chi_square_is_scipys():
    ranks = np.random.default_rng(0).integers(100, size=(500, 3))
    statistic, p_value = chi_square(ranks, 100, 20)
    for q in range(3):
        counts = np.bincount(ranks[:, q] // 5, minlength=20)
        np.testing.assert_array_equal(bin_counts(ranks, 100, 20)[:, q], counts)
        expected = scipy.stats.chisquare(counts)
        assert (statistic[q], p_value[q]) == pytest.approx((expected.statistic, expected.pvalue))


@pytest.mark.parametrize(("num", "num_ranks", "probability"), [(200, 20, 0.95), (1000, 100, 0.95), (50, 10, 0.5)])
def test_band_holds_all_places_together_with_its_probability(num, num_ranks, probability):
    """20000 sets of uniform ranks; the coverage is at least the nominal one (counts are discrete), and near it.

    The bound is 5 standard errors. The twin: pointwise intervals of the same probability hold far too seldom.
    """
    replicates = 20_000
    rng = np.random.default_rng(0)
    counts = rng.multinomial(num, np.full(num_ranks, 1 / num_ranks), size=replicates)
    functions = np.cumsum(counts, 1)[:, :-1] / num
    low, high = ecdf_band(num, num_ranks, probability)
    inside = ((functions >= low - 1e-12) & (functions <= high + 1e-12)).all(1).mean()
    error = np.sqrt(probability * (1 - probability) / replicates)
    assert -5 * error < inside - probability < 0.06
    places = np.arange(1, num_ranks) / num_ranks
    pointwise = [scipy.stats.binom.ppf(t, num, places) / num for t in ((1 - probability) / 2, (1 + probability) / 2)]
    assert ((functions >= pointwise[0]) & (functions <= pointwise[1])).all(1).mean() < probability - 0.1


def test_probability_of_a_band_by_enumeration():
    """Three ranks in 0..2: all 27 outcomes, each place's count below within 0..2 and 1..3."""
    from inference.bounds.uniformity import _probability_inside

    outcomes = np.stack(np.meshgrid(*[np.arange(3)] * 3), -1).reshape(-1, 3)
    below = np.stack([(outcomes < i).sum(1) for i in (1, 2)], 1)
    inside = ((below >= [0, 1]) & (below <= [2, 3])).all(1).mean()
    assert _probability_inside(3, 3, np.array([0, 1]), np.array([2, 3])) == pytest.approx(inside, abs=1e-12)


def test_bad_bands_are_refused():
    with pytest.raises(ValueError, match="0 < probability < 1"):
        ecdf_band(100, 10, 1.0)


# ------------------------------------------------------------------------------------------- the picture


@pytest.fixture
def wrong() -> Calibration:
    return simulation_based_calibration(off(0.0, 0.5), num_simulations=400)


def test_plot_data_are_the_ranks(wrong):
    plot = rank_plot(wrong)
    assert plot.names[0] == JOINT
    assert set(plot.names[1:]) == {"z[0]", "z[1]"}
    column = wrong.names.index(plot.names[1])
    ranks = wrong.ranks[:, column]
    np.testing.assert_array_equal(plot.counts[1], np.histogram(ranks, np.arange(0, 101, 5))[0])
    np.testing.assert_allclose(plot.differences[1] + plot.places, [(ranks < i).mean() for i in range(1, 100)])
    np.testing.assert_allclose(ecdf(wrong.ranks, 100)[:, column], plot.differences[1] + plot.places)
    assert wrong.chi_square[column] == wrong.chi_square[:2].max()
    assert len(rank_plot(wrong, most=1).names) == 1
    with pytest.raises(ValueError, match="most >= 1"):
        rank_plot(wrong, most=0)


def test_picture_names_what_is_rejected(wrong):
    plot = rank_plot(wrong)
    figure = draw_calibration(plot)
    figure.draw_without_rendering()
    assert len(figure.axes) == 6
    for row in range(3):
        left, right = figure.axes[2 * row : 2 * row + 2]
        assert left.get_title("left").startswith(f"{plot.names[row]}: REJECTED")
        np.testing.assert_allclose([bar.get_height() for bar in left.containers[0]], plot.counts[row])
        np.testing.assert_allclose(right.lines[1].get_ydata(), plot.differences[row])
        assert right.get_ylabel() == "F(u) − u"
