"""What measures a pair says so where its answer would mean nothing, or less than it seems."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from inference import (
    ElboLoss,
    active_units,
    annealed_evidence,
    bidirectional_evidence,
    decompose_elbo,
    elbo_surgery,
    evidence_ladder,
    fit,
    gold_standard,
    gradient_variance,
    inference_gap,
    log_evidence,
    simulation_based_calibration,
    to_datatree,
    total_error,
)
from inference.bounds.sites import PairError
from ppl_models import VAE, AutoEncoder, LinearGaussian, LinearHierarchy
from ppl_models.likelihoods import Bernoulli, Normal


def linear():
    return LinearGaussian.random(data_dim=3, latent_dim=2, guide="mean_field")


def correlated():
    """Latents whose posterior no product of Normals is near: most weights vanish."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.ones(12, 8) + 0.25 * torch.randn(12, 8, generator=generator)
    return LinearGaussian(weight, torch.zeros(12), 0.3, "mean_field")


MEASURES = {
    "inference_gap": lambda pair, x: inference_gap(pair, x, num_particles=2, steps=8),
    "elbo_surgery": elbo_surgery,
    "active_units": active_units,
    "gold_standard": lambda pair, x: gold_standard(pair, x[:1], num_samples=4, warmup=1, num_chains=2),
    "total_error": lambda pair, x: total_error(pair, x, lambda x: x.sum(-1)),
    "evidence_ladder": evidence_ladder,
}
OTHERS = {
    "bidirectional_evidence": lambda pair, x: bidirectional_evidence(pair, 2),
    "calibration": lambda pair, x: simulation_based_calibration(pair, num_simulations=100),
    "ElboLoss": lambda pair, x: ElboLoss(pair)(x),
    "fit": lambda pair, x: fit(pair, x, epochs=1, progress=False),
}


@pytest.mark.parametrize("measure", (MEASURES | OTHERS).values(), ids=MEASURES | OTHERS)
def test_two_programs_are_no_pair(measure):
    pair = linear()
    with pytest.raises(TypeError, match=r"expected a ModelGuidePair such as VAE\.preset.*, got tuple"):
        measure((pair.model, pair.guide), torch.zeros(4, 3))


@pytest.mark.parametrize(
    "measure", [*MEASURES.values(), lambda pair, x: to_datatree(pair, x, num_samples=2)], ids=[*MEASURES, "to_datatree"]
)
@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.full((4, 6), 0.5), "exact 0 or 1 under a Bernoulli likelihood"),
        (torch.full((4, 6), math.nan), "finite values"),
    ],
    ids=["grey", "nan"],
)
def test_data_are_checked_before_they_are_measured(measure, x, match):
    vae = VAE.preset((6,), Bernoulli(), latent_dim=2, hidden=(8,))
    with pytest.raises(ValueError, match=match) as caught:
        measure(vae, x)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("measure", ["elbo_surgery", "gold_standard"])
def test_codes_that_are_points_have_no_posterior(measure):
    pair = AutoEncoder.preset((6,), Normal(scale=0.5), latent_dim=2, hidden=(8,)).eval()
    with pytest.raises(PairError, match=r"a density at site 'z' to .*, got a point mass \(Delta\)"):
        MEASURES[measure](pair, torch.randn(5, 6))
    with pytest.raises(PairError, match="rank true latents"):
        simulation_based_calibration(pair, num_simulations=100)
    decompose_elbo(pair.model, pair.guide, torch.randn(5, 6), num_particles=2)  # which says what kind of bound it is


def test_an_autoencoders_encoder_is_its_guides():
    pair = AutoEncoder.preset((6,), Normal(scale=0.5), latent_dim=2, hidden=(8,), kind="denoising")
    found = gradient_variance({"elbo": ElboLoss(pair)}, torch.randn(5, 6), num_pairs=4)
    assert any(name.startswith("q(z") for name in found.blocks)
    assert "(no site)" not in found.blocks


@pytest.mark.parametrize("make", [linear, lambda: LinearHierarchy.random(3, (2, 1))], ids=["linear", "hierarchy"])
def test_data_of_another_dtype_are_refused_in_one_line(make):
    pair = make()
    x = torch.zeros(4, 3, dtype=torch.float32)
    with pytest.raises(
        TypeError, match=r"x in torch\.float64, as the parameters are, got torch.float32: .*x\.to\(torch"
    ):
        pair.guide(x)
    pair.guide(x.double())


class BatchNormEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.loc = nn.Linear(8, 2)

    def forward(self, x):
        h = self.body(x.reshape(-1, 6)).reshape(*x.shape[:-1], 8)
        return self.loc(h), torch.ones_like(self.loc(h))


def test_measuring_in_training_mode_is_warned_of():
    vae = VAE(BatchNormEncoder(), nn.Linear(2, 6), 2, Bernoulli())
    x = torch.ones(4, 6)
    with pytest.warns(UserWarning, match=r"BatchNorm1d is in training mode.*pair\.eval\(\)"):
        decompose_elbo(vae.model, vae.guide, x, num_particles=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decompose_elbo(vae.eval().model, vae.guide, x, num_particles=2)


class TestEvidenceThatIsABound:
    """A mean-field guide far from the posterior: k-hat says that the estimate of log p(x) is loose, and all pass it on."""

    def test_the_gap_does_not_claim_more_than_it_knows(self):
        pair = correlated()
        x = pair.model(size=3).detach()
        found = inference_gap(pair, x, num_particles=50, steps=8, max_steps=16)
        assert found.evidence_is_bound
        assert any("k-hat above" in text for text in found.warnings)
        assert "approximation gap at most" not in found.table()
        exact = inference_gap(pair, x, pair.log_evidence(x).detach(), num_particles=50, steps=8, max_steps=16)
        assert not exact.evidence_is_bound
        assert "lower bound" not in exact.table()

    def test_total_error_passes_warnings_on(self):
        pair = correlated()
        x = pair.model(size=20).detach()
        found = total_error(pair, x, lambda x: pair.log_evidence(x).detach(), num_particles=20)
        assert any("k-hat above" in text for text in found.warnings)
        assert "modelling error at most" in found.table()

    @pytest.mark.parametrize(
        ("shift", "match"), [(50.0, "log_evidence is too high"), (-50.0, "log_evidence is too low")]
    )
    def test_a_divergence_below_zero_is_not_passed_over(self, shift, match):
        pair = linear()
        x = pair.model(size=50).detach()
        exact = pair.log_evidence(x).detach()
        found = total_error(pair, x, lambda x: exact, exact + shift, num_particles=20)
        assert any(match in text for text in found.warnings)
        assert not total_error(pair, x, lambda x: exact, exact, num_particles=20).warnings

    def test_evidence_that_is_not_finite_is_refused(self):
        pair = linear()
        x = pair.model(size=4).detach()
        wrong = torch.tensor([0.0, math.nan, 0.0, 0.0])
        with pytest.raises(ValueError, match="finite log_evidence, got nan at datum 1"):
            total_error(pair, x, lambda x: x.sum(-1), wrong)
        with pytest.raises(ValueError, match="finite log_evidence, got nan at datum 1"):
            inference_gap(pair, x, wrong, num_particles=2, steps=8)


def test_errors_beyond_the_delta_method_are_said_to_be():
    pair = correlated()
    x = pair.model(size=4).detach()
    found = log_evidence(pair.model, pair.guide, x, num_particles=20)
    assert bool(found.doubtful.any())
    assert any("the error itself is not known" in text for text in found.warnings)
    good = linear()
    fine = log_evidence(good.model, good.guide, good.model(size=4).detach(), num_particles=1000)
    assert not bool(fine.doubtful.any())


def test_a_ladder_is_not_broken_by_errors_that_nobody_knows():
    """IWAE-K of weights of infinite variance jumps by many of its reported errors: such rungs are not judged by them."""
    pair = correlated()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = pair.model(size=30).detach()
    remarks = []
    for i in range(30):
        check = evidence_ladder(
            pair, x[i : i + 1], num_particles=[10, 100], num_temperatures=1, num_leapfrog=1, seed=i
        ).check()
        assert check.holds, check.violations
        remarks += check.remarks
    assert any("its error is in doubt" in text for text in remarks)


class OneBad(LinearGaussian):
    """A guide too wide at all data but the first, where it is far too narrow; and an evidence that may be wrong."""

    lowered = 0.0

    def log_evidence(self, x):
        return super().log_evidence(x) - self.lowered

    def guide_distribution(self, x):
        base = super().guide_distribution(x).base_dist
        first = torch.arange(len(x))[:, None] == 0
        return dist.Normal(base.loc, base.scale * torch.where(first, 0.1, 3.0)).to_event(1)


@pytest.mark.parametrize("lowered", [0.0, 1.5])
def test_one_doubtful_datum_does_not_excuse_the_rest(lowered):
    pair = OneBad.random(4, 2, guide="mean_field")
    pair.lowered = lowered
    x = pair.model(size=100).detach()
    ladder = evidence_ladder(pair, x, num_particles=[1000], num_temperatures=10, num_leapfrog=1, seed=0)
    assert ladder["IWAE-1000"].doubt
    check = ladder.check()
    assert check.holds == (lowered == 0)
    assert lowered == 0 or any("exact is" in text and "below IWAE-1000" in text for text in check.violations)


def test_few_chains_that_count_are_warned_of():
    pair = LinearGaussian.random(data_dim=10, latent_dim=6, guide="mean_field")
    x = pair.model(size=20).detach()
    short = annealed_evidence(pair.model, pair.guide, x, num_temperatures=5, num_leapfrog=2, start="prior", seed=0)
    assert "weights worth less than 8 of 16 chains" in short.warnings[0]
    assert "warning: " in short.table()
    long = annealed_evidence(pair.model, pair.guide, x[:4], num_temperatures=40, num_leapfrog=3, seed=0)
    assert not long.warnings


@pytest.mark.parametrize("law", [dist.Gamma(2.0, 1.0), dist.LogNormal(0.0, 1.0), dist.Uniform(0.0, 4.0)], ids=str)
def test_latents_of_bounded_support_are_drawn_many_at_a_time(law):
    """The check of the support reads no latent into Python that a program could branch on."""

    def model(x):
        with pyro.plate("data", 5):
            z = pyro.sample("z", law)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 5):
            pyro.sample("z", law)

    found = log_evidence(model, guide, torch.arange(5.0), num_particles=200)
    assert "vectorised" in found.note
    assert "one at a time" not in found.note
    assert "vectorised" in annealed_evidence(model, guide, torch.arange(5.0), num_temperatures=2, num_leapfrog=1).note


def test_a_program_that_does_branch_is_still_seen():
    """Negative control of the test above."""

    def model(x):
        with pyro.plate("data", 1):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z if bool((z > 1).all()) else -z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 1):
            pyro.sample("z", dist.Gamma(2.0, 1.0))

    assert "one at a time" in log_evidence(model, guide, torch.ones(1), num_particles=30).note
