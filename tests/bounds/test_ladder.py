"""The ladder: its rungs against the exact evidence, its order and what breaks it, its table and its picture."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from inference.bounds.annealing import annealed_evidence
from inference.bounds.ladder import FALSE_ALARM, Ladder, Rung, evidence_ladder
from inference.views.ladder import draw_ladder, ladder_picture
from ppl_models import VAE, LinearGaussian
from ppl_models.likelihoods import Bernoulli, Normal
from tests.bounds.elbo_case import quantile
from tests.oracles import gaussian
from tests.views.test_figures import assert_nothing_overlaps_or_leaves, texts

SHORT = {"num_particles": (5, 50), "num_temperatures": 8, "num_leapfrog": 3, "num_chains": 8}
NAMES = ["ELBO", "IWAE-5", "IWAE-50", "AIS", "exact", "reverse AIS"]


@pytest.fixture(autouse=True)
def _one_thread():
    """Many small operations: threads only get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def linear(guide: str = "mean_field") -> LinearGaussian:
    return LinearGaussian.random(4, 3, noise_scale=0.7, guide=guide)


def ladder_of(means: list[float], errors: list[float], names: list[str] = NAMES) -> Ladder:
    """A ladder with the given rungs, of ten data."""
    kinds = {"exact": "exact", "reverse AIS": "upper"}
    rungs = tuple(
        Rung(name, kinds.get(name, "lower"), torch.full((10,), mean), mean, error, name)
        for name, mean, error in zip(names, means, errors, strict=True)
    )
    return Ladder(rungs, torch.zeros(10, 4), "reverse AIS" in names, 4, 1e-12, ("a note",))


IN_ORDER = [-12.0, -11.0, -10.5, -10.1, -10.0, -9.9]
ERRORS = [0.1, 0.1, 0.05, 0.02, 0.0, 0.02]


class TestRungs:
    def test_simulated_data(self):
        pair = linear()
        ladder = evidence_ladder(pair, num_data=40, **SHORT)
        assert [rung.name for rung in ladder.rungs] == NAMES
        assert ladder.simulated
        weight, bias = pair.weight.detach().numpy(), pair.bias.detach().numpy()
        exact = gaussian.log_evidence(weight, bias, 0.7, ladder.data.numpy())
        assert np.allclose(ladder["exact"].values, exact, rtol=1e-10)
        kinds = [rung.kind for rung in ladder.rungs]
        assert kinds == ["lower"] * 4 + ["exact", "upper"]
        for rung in ladder.rungs:
            assert rung.values.shape == (40,)
            assert rung.mean == pytest.approx(float(rung.values.mean()))
            sign = {"lower": 1, "exact": 0, "upper": -1}[rung.kind]
            excess = rung.mean - exact.mean()
            assert sign * excess <= quantile(6) * rung.mean_std_error + 1e-9
        check = ladder.check()
        assert check.holds, check
        kl = float((pair.log_evidence(ladder.data) - pair.elbo(ladder.data)).mean().detach())
        gap = next(gap for gap in ladder.gaps if gap.name == "inference gap: KL(q || posterior)")
        assert abs(gap.value - kl) < quantile(1) * gap.std_error
        assert kl > 0.05

    def test_given_data_have_no_upper_bound(self):
        pair = linear()
        x = pair.model(size=5).detach()
        ladder = evidence_ladder(pair, x, **SHORT)
        assert [rung.name for rung in ladder.rungs] == NAMES[:-1]
        assert not ladder.simulated
        assert torch.equal(ladder.data, x)

    def test_without_an_exact_evidence_the_inference_gap_is_bounded(self):
        vae = VAE.preset((2, 3), Normal(scale=0.5), latent_dim=2, hidden=(4,)).float()
        ladder = evidence_ladder(vae, num_data=6, **SHORT)
        assert [rung.name for rung in ladder.rungs] == [name for name in NAMES if name != "exact"]
        names = [gap.name for gap in ladder.gaps]
        assert "inference gap, at least" in names
        assert "inference gap, at most" in names
        assert ladder.bits_per_dim("AIS") == pytest.approx(-ladder["AIS"].mean / (6 * math.log(2)))

    def test_an_exact_guide_makes_all_rungs_equal(self):
        """Zero variance at every rung: differences are rounding, and no order is claimed to be broken by it."""
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
            ladder = evidence_ladder(linear("exact").to(dtype), num_data=5, **SHORT)
            assert all(abs(rung.mean - ladder["exact"].mean) < tolerance for rung in ladder.rungs)
            assert ladder.check().holds

    def test_seed_repeats_and_leaves_the_default_generator_alone(self):
        state = torch.get_rng_state()
        first, second = (evidence_ladder(linear(), num_data=3, seed=5, **SHORT) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), state)
        assert [rung.mean for rung in first.rungs] == [rung.mean for rung in second.rungs]


class TestOrder:
    def test_a_ladder_in_order(self):
        check = ladder_of(IN_ORDER, ERRORS).check()
        assert check.holds
        assert not check.violations
        assert not check.remarks
        assert len(check.z_values) == 15
        assert check.z_values["AIS", "exact"] == pytest.approx(0.1 / 0.02)
        assert check.threshold == pytest.approx(5.27, abs=0.02)  # one-sided, 1e-6 over 15 comparisons
        assert FALSE_ALARM == 1e-6

    @pytest.mark.parametrize(
        ("rung", "mean", "broken"),
        [
            (3, -9.8, "exact is 0.2 nats below AIS"),
            (0, -10.2, "IWAE-5 is"),
            (5, -10.3, "reverse AIS is 0.3 nats below"),
        ],
    )
    def test_a_rung_out_of_order_is_named(self, rung, mean, broken):
        means = [*IN_ORDER]
        means[rung] = mean
        check = ladder_of(means, [e / 10 for e in ERRORS]).check()
        assert not check.holds
        assert any(broken in text for text in check.violations)
        assert str(check).startswith("order broken: ")

    def test_out_of_order_within_the_errors_is_in_order(self):
        means = [*IN_ORDER]
        means[3] = -9.95
        assert ladder_of(means, ERRORS).check().holds

    def test_annealing_below_importance_weighting_breaks_no_theorem(self):
        means = [*IN_ORDER]
        means[3] = -11.5
        check = ladder_of(means, ERRORS).check()
        assert check.holds
        assert "AIS is 1 nats below IWAE-50" in " ".join(check.remarks)
        assert "raise num_temperatures" in str(check)

    def test_a_wrong_model_density_breaks_the_order(self):
        """A reported evidence that is too low by a nat is below its own lower bounds."""
        ladder = evidence_ladder(linear(), num_data=20, **SHORT)
        rungs = [replace(r, mean=r.mean - 1) if r.name == "exact" else r for r in ladder.rungs]
        check = replace(ladder, rungs=tuple(rungs)).check()
        assert not check.holds
        assert any("exact is" in text for text in check.violations)


class TestViews:
    def test_table(self):
        ladder = ladder_of(IN_ORDER, ERRORS)
        text = ladder.table()
        lines = text.splitlines()
        assert lines[0].startswith("log p(x), nats, mean over 10 data simulated from the model")
        assert lines[1].split() == ["rung", "nats", "+-", "SE", "bits/dim", "rise", "what", "it", "is"]
        assert [line.split("  ")[0].strip() for line in lines[3:9]] == NAMES
        elbo = lines[3].split()
        assert float(elbo[1]) == -12.0
        assert float(elbo[3]) == pytest.approx(12 / (4 * math.log(2)), abs=1e-4)
        assert "inference gap: KL(q || posterior)" in text
        assert "2.0000" in next(line for line in lines if line.startswith("inference gap"))
        assert "  a note" in lines
        assert lines[-1].startswith("  order holds")

    @pytest.mark.parametrize(
        "names", [NAMES, NAMES[:-1], [n for n in NAMES if n != "exact"], ["ELBO", "IWAE-1", "AIS"]]
    )
    def test_picture(self, names):
        places = [IN_ORDER[i] for i in range(len(names))]
        ladder = ladder_of(places, ERRORS[: len(names)], names)
        data = ladder_picture(ladder)
        assert data.names == tuple(names)
        np.testing.assert_array_equal(data.means, places)
        assert data.top[0] < min(places[-2:])
        assert data.top[1] > max(places)
        figure = draw_ladder(data)
        assert_nothing_overlaps_or_leaves(figure)
        rungs, top, gaps, enlarged = figure.axes
        assert [text.split("\n")[0] for text in texts(rungs.get_yticklabels())] == names
        assert [text.split("\n")[0] for text in texts(gaps.get_yticklabels())] == [gap.name for gap in ladder.gaps]
        assert top.get_xlim() == enlarged.get_xlim() == pytest.approx(data.top)
        assert gaps.get_xlabel() == enlarged.get_xlabel() == "nats per datum"
        drawn = [container.lines[0].get_xdata()[0] for container in rungs.containers]
        assert drawn == pytest.approx(places)

    def test_picture_of_equal_rungs_and_unknown_errors(self):
        for error in (0.0, math.inf):
            figure = draw_ladder(ladder_picture(ladder_of([-10.0] * 6, [error] * 6)))
            assert_nothing_overlaps_or_leaves(figure)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({}, "expected either data x or num_data to simulate, got neither"),
            ({"x": torch.zeros(2, 4), "num_data": 3}, "got both"),
            ({"num_data": 0}, "expected num_data >= 1, got 0"),
            ({"num_data": 2, "num_particles": ()}, "at least one K >= 1"),
            ({"num_data": 2, "num_particles": (0, 5)}, "at least one K >= 1"),
            ({"num_data": 2, "num_temperatures": 0}, "expected num_temperatures >= 1"),
        ],
    )
    def test_options(self, options, match):
        with pytest.raises(ValueError, match=match):
            evidence_ladder(linear(), **options)

    def test_data_outside_the_support(self):
        vae = VAE.preset((3,), Bernoulli(), latent_dim=1, hidden=(2,))
        with pytest.raises(ValueError, match="expected"):
            evidence_ladder(vae, torch.full((2, 3), 0.5))

    def test_an_unknown_rung(self):
        with pytest.raises(KeyError, match="expected a rung among ELBO"):
            ladder_of(IN_ORDER, ERRORS)["IWAE-7"]

    def test_an_unknown_option_of_annealing(self):
        with pytest.raises(TypeError, match="num_chain"):
            evidence_ladder(linear(), num_data=2, num_chain=3)


def test_annealed_evidence_reads_as_an_evidence():
    """Gaps take either estimate under the names log_evidence and std_error."""
    pair = linear()
    x = pair.model(size=2).detach()
    ais = annealed_evidence(pair.model, pair.guide, x, num_temperatures=2, num_leapfrog=1)
    assert torch.equal(ais.log_evidence, ais.log_lower)
