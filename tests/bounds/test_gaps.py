"""The gap and its parts, and the total error and its parts, against closed forms of Gaussian pairs.

Each z-test has a bound of 6 standard errors on at most a few dozen numbers: a false failure below 1e-6 for the family.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch

from inference.bounds import PairError
from inference.bounds.gaps import inference_gap
from inference.bounds.refinement import Correction, NotRefinableError, Refinement, refine_guide
from inference.bounds.total_error import total_error
from inference.training.densities import draw
from ppl_models import LinearGaussian, ModelGuidePair
from tests.bounds.gap_pairs import Amortised, Chain, OneSite
from tests.oracles import gaussian

Z_MAX = 6.0


def kls(pair: LinearGaussian, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """KL(q || p(z|x)) of the pair's guide, and of the best guide of its family, per datum, by the oracle."""
    weight, bias, scale = pair.weight.detach().numpy(), pair.bias.detach().numpy(), float(pair.noise_scale.detach())
    own, best = [], []
    for row in x.numpy():
        mean, cov = gaussian.posterior(weight, bias, scale, row)
        full = pair.full
        base = cov if full else np.diag(1 / np.diag(np.linalg.inv(cov)))
        shifted = mean + pair.shift * np.sqrt(np.diag(base))
        own.append(gaussian.kl(shifted, base * pair.stretch**2, mean, cov))
        best.append(gaussian.kl(mean, base, mean, cov))
    return np.array(own), np.array(best)


def off_by(estimate: torch.Tensor, exact: np.ndarray, error: torch.Tensor, slack: float = 0.0) -> float:
    """Largest deviation in standard errors, after ``slack`` nats that the search may leave."""
    return float(((estimate - torch.as_tensor(exact)).abs() - slack).clamp(min=0).div(error + 1e-9).max())


class GammaPoisson(ModelGuidePair):
    """z ~ Gamma(2, 1), x ~ Poisson(z), with a LogNormal guide: the posterior's own moments of log z, shifted and stretched."""

    def __init__(self, shift: float, stretch: float) -> None:
        super().__init__((), ("z",))
        self.shift, self.stretch = shift, stretch

    def model(self, x=None, size=None):
        with pyro.plate("data", self.batch_size(x, size)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            return pyro.sample("x", dist.Poisson(z), obs=x)

    def guide(self, x):
        with pyro.plate("data", self.batch_size(x)):
            loc, scale = torch.digamma(x + 2) - math.log(2), torch.polygamma(1, x + 2).sqrt()
            return pyro.sample("z", dist.LogNormal(loc + self.shift, scale * self.stretch))

    def log_evidence(self, x):
        """x is negative binomial, 2 successes of probability 1/2."""
        return torch.as_tensor(scipy.stats.nbinom(2, 0.5).logpmf(x.numpy()))

    def best_divergence(self, datum: float) -> float:
        """min over m, s of KL(LogNormal(m, s) || Gamma(a, 2)), a = datum + 2, in closed form."""
        a = datum + 2

        def divergence(law: np.ndarray) -> float:
            m, s = law[0], math.exp(law[1])
            entropy = m + 0.5 * math.log(2 * math.pi * math.e * s**2)
            expected = a * math.log(2) - scipy.special.gammaln(a) + (a - 1) * m - 2 * math.exp(m + s**2 / 2)
            return -entropy - expected

        return float(scipy.optimize.minimize(divergence, np.array([math.log(a / 2), -0.5])).fun)


SLACK = 2e-3  # nats: what 300 steps leave of a gap


class TestInferenceGap:
    @pytest.mark.parametrize(
        ("shift", "stretch", "full"), [(0.0, 1.0, False), (1.0, 0.6, False), (0.7, 1.5, True)], ids=str
    )
    def test_both_parts_are_the_known_divergences(self, shift, stretch, full):
        pair = Amortised(LinearGaussian.random(4, 2), shift, stretch, full)
        x = pair.model(size=3).detach()
        own, best = kls(pair, x)
        evidence = gaussian.log_evidence(
            pair.weight.detach().numpy(), pair.bias.detach().numpy(), float(pair.noise_scale.detach()), x.numpy()
        )
        gap = inference_gap(pair, x, torch.as_tensor(evidence), num_particles=4000, steps=300)
        assert gap.refinement.converged
        assert off_by(gap.approximation_gap, best, gap.approximation_gap_std_error, SLACK) < Z_MAX
        assert off_by(gap.amortisation_gap, own - best, gap.amortisation_gap_std_error, SLACK) < Z_MAX
        assert off_by(gap.gap, own, gap.gap_std_error) < Z_MAX
        if shift:  # the twin: an answer that called the whole gap an approximation gap would be caught
            assert off_by(gap.amortisation_gap, 0 * own, gap.amortisation_gap_std_error, SLACK) > 2 * Z_MAX

    def test_parts_add_up_and_are_shown(self):
        pair = Amortised(LinearGaussian.random(3, 2), 0.5, 1.0)
        x = pair.model(size=2).detach()
        gap = inference_gap(pair, x, pair.log_evidence(x).detach(), num_particles=50, steps=20)
        torch.testing.assert_close(gap.approximation_gap + gap.amortisation_gap, gap.gap)
        for name in ("log p(x)", "approximation gap", "amortisation gap", "Adam steps"):
            assert name in gap.table()

    def test_evidence_is_estimated_under_the_refined_guide(self):
        pair = Amortised(LinearGaussian.random(3, 2), 0.5, 0.8)
        x = pair.model(size=2).detach()
        gap = inference_gap(pair, x, num_particles=400, steps=100)
        assert bool((gap.log_evidence_std_error > 0).all())
        assert off_by(gap.log_evidence, pair.log_evidence(x).detach().numpy(), gap.log_evidence_std_error) < Z_MAX

    def test_an_estimate_brings_its_error_along(self):
        class Estimate:
            log_evidence = torch.zeros(2)
            std_error = torch.full((2,), 5.0)

        pair = Amortised(LinearGaussian.random(3, 2), 0.0, 1.0)
        gap = inference_gap(pair, torch.zeros(2, 3), Estimate(), num_particles=10, steps=8)
        assert bool((gap.approximation_gap_std_error >= 5.0).all())

    def test_layers_are_corrected_on_top_of_their_dependence(self):
        """z_1 -> z_2 as in the posterior, with wrong numbers: corrected, it is better, and never above the evidence.

        Corrections of the mean cannot mend the slope b, so an approximation gap stays.
        """
        pair = Chain(0.2, 0.1)
        x = torch.tensor([[-1.0], [2.0]])
        evidence = torch.as_tensor(scipy.stats.norm(0, math.sqrt(3)).logpdf(x.numpy()[:, 0]))
        gap = inference_gap(pair, x, evidence, num_particles=4000, steps=200)
        assert bool((gap.amortisation_gap > Z_MAX * gap.amortisation_gap_std_error).all())
        assert bool((gap.approximation_gap > Z_MAX * gap.approximation_gap_std_error).all())

    def test_the_pair_is_left_alone(self):
        pair = Amortised(LinearGaussian.random(3, 2), 0.5, 1.0)
        before = {name: p.detach().clone() for name, p in pair.named_parameters()}
        refine_guide(pair, torch.zeros(2, 3), steps=8)
        for name, p in pair.named_parameters():
            assert torch.equal(before[name], p)
            assert p.grad is None

    def test_a_search_cut_short_says_so(self):
        refinement = refine_guide(
            Amortised(LinearGaussian.random(3, 2), 8.0, 1.0),
            torch.zeros(2, 3),
            steps=20,
            learning_rate=0.02,
            max_steps=79,
        )
        assert refinement.steps == 40  # another doubling would go beyond the maximum
        assert not refinement.converged
        assert "NOT converged for 2 of 2 data: raise max_steps (--gap-steps)" in refinement.words()

    @pytest.mark.slow
    def test_where_the_guide_starts_does_not_matter(self):
        """A law of another family, so that a gap stays; the best LogNormal's is known in closed form."""
        x, gaps = torch.tensor([0.0, 1.0, 4.0, 9.0]), []
        for shift, stretch in ((0.0, 1.0), (1.5, 0.6)):
            pair = GammaPoisson(shift, stretch)
            gaps.append(inference_gap(pair, x, pair.log_evidence(x), num_particles=4000))
            assert gaps[-1].refinement.converged
            best = np.array([pair.best_divergence(float(datum)) for datum in x])
            assert off_by(gaps[-1].approximation_gap, best, gaps[-1].approximation_gap_std_error, SLACK) < Z_MAX
        one, other = (gap.approximation_gap for gap in gaps)
        assert off_by(one, other.numpy(), torch.hypot(*(g.approximation_gap_std_error for g in gaps)), SLACK) < Z_MAX
        assert bool((gaps[1].amortisation_gap > 0.5).all())  # the second start is a bad one

    def test_too_few_steps_from_a_bad_start_are_owned_up_to(self):
        pair, x = GammaPoisson(1.5, 0.6), torch.tensor([0.0, 1.0, 4.0, 9.0])
        gap = inference_gap(pair, x, pair.log_evidence(x), num_particles=4000, steps=8, max_steps=16)
        assert not gap.refinement.converged
        assert "NOT converged for " in gap.table()
        assert "the split is a bound only" in gap.table()
        assert off_by(gap.approximation_gap, 0 * x.numpy(), gap.approximation_gap_std_error, 0.1) > Z_MAX

    @pytest.mark.parametrize(
        ("gain", "error", "words"),
        [
            ([0.0, 0.009], [0.0, 0.0], ": converged"),
            ([0.0, 0.02], [0.0, 0.0], "datum 1 the most, by +0.0200 ± 0.0000 nats: NOT converged for 1 of 2 data"),
            ([0.0, 0.02] + 98 * [0.0], 100 * [0.001], "NOT converged for 1 of 100 data"),  # a small mean hides nothing
            ([480.7, 0.0], [477.5, 0.0], "for 1 of 2 data: raise max_steps (--gap-steps) (1 of them not known"),
            ([0.0, math.nan], [0.0, math.nan], "datum 1 the most, by +nan ± nan nats: NOT converged for 1 of 2 data"),
        ],
    )
    def test_every_datum_is_judged(self, gain, error, words):
        found = Refinement(lambda x: x, {}, 20, 4, torch.tensor(gain), torch.tensor(error))
        assert words in found.words()
        assert found.converged == words.endswith(": converged")

    @pytest.mark.parametrize(
        ("law", "match"),
        [
            (lambda x: dist.Categorical(torch.ones(len(x), 3)), "a location and a scale at site 'z', got Categorical"),
            (lambda x: dist.Uniform(x[:, 0] - 1, x[:, 0] + 1), "a location and a scale at site 'z', got Uniform"),
        ],
    )
    def test_laws_without_location_and_scale_are_refused(self, law, match):
        support = dist.Categorical(torch.ones(3)) if "Categorical" in match else dist.Normal(0.0, 1.0)
        with pytest.raises(NotRefinableError, match=match):
            refine_guide(OneSite(support, law), torch.zeros(2, 1))

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"steps": 7}, "steps >= 8"),
            ({"learning_rate": 0.0}, "learning_rate > 0"),
            ({"steps": 10, "max_steps": 19}, r"max_steps >= 2 \* steps = 20, got 19"),
            ({"num_particles": 1}, "num_particles >= 2"),
            ({"log_evidence": torch.zeros(3)}, r"log_evidence of shape \[B\] = \[2\], got \[3\]"),
        ],
    )
    def test_bad_arguments_are_refused(self, options, match):
        with pytest.raises(ValueError, match=match):
            inference_gap(LinearGaussian.random(3, 2), torch.zeros(2, 3), **options)

    def test_sites_outside_the_data_plate_are_refused(self):
        class Loose(LinearGaussian):
            def model(self, x=None, size=None):
                pyro.sample("noise", dist.Normal(0.0, 1.0), obs=torch.zeros(()))
                return super().model(x, size)

        base = LinearGaussian.random(3, 2)
        with pytest.raises(PairError, match="one plate of size 2 at dim -1 around every site"):
            refine_guide(Loose(base.weight, base.bias, 1.0), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("law", "oracle"),
    [
        (dist.Normal, lambda m, s: scipy.stats.norm(m, s)),
        (dist.Laplace, lambda m, s: scipy.stats.laplace(m, s)),
        (dist.LogNormal, lambda m, s: scipy.stats.lognorm(s, scale=np.exp(m))),
        (lambda m, s: dist.StudentT(5.0, m, s), lambda m, s: scipy.stats.t(5.0, m, s)),
    ],
    ids=["normal", "laplace", "lognormal", "student"],
)
def test_corrected_law_keeps_its_family(law, oracle):
    loc, scale, shift, stretch = (torch.randn(4, dtype=torch.float64) for _ in range(4))
    value = law(loc, scale.exp()).sample()
    got = Correction(shift, stretch)(law(loc, scale.exp())).log_prob(value)
    expected = oracle((loc + scale.exp() * shift).numpy(), (scale + stretch).exp().numpy()).logpdf(value.numpy())
    np.testing.assert_allclose(got, expected, rtol=1e-10)


class TestTotalError:
    @staticmethod
    def numbers(pair: Amortised, mean: np.ndarray, cov: np.ndarray) -> tuple[float, float, float]:
        """Modelling, inference and total error in closed form; the last from the two joint Gaussians of (z, x)."""
        weight, bias, scale = pair.weight.detach().numpy(), pair.bias.detach().numpy(), float(pair.noise_scale.detach())
        joint_mean, joint_cov = gaussian.joint(weight, bias, scale)
        d = weight.shape[1]
        modelling = gaussian.kl(mean, cov, joint_mean[d:], joint_cov[d:, d:])
        _, post = gaussian.posterior(weight, bias, scale, mean)
        sd = 1 / np.sqrt(np.diag(np.linalg.inv(post)))
        gain = joint_cov[:d, d:] @ np.linalg.inv(joint_cov[d:, d:])
        q_cov = np.diag((sd * pair.stretch) ** 2)
        inference = gaussian.kl(pair.shift * sd, q_cov, np.zeros(d), post)
        q_mean = np.concatenate([gain @ (mean - bias) + pair.shift * sd, mean])
        cross = gain @ cov
        q_joint = np.block([[q_cov + cross @ gain.T, cross], [cross.T, cov]])
        return modelling, inference, gaussian.kl(q_mean, q_joint, joint_mean, joint_cov)

    def setup_method(self):
        self.pair = Amortised(LinearGaussian.random(3, 2), 0.4, 0.8)
        self.mean, root = np.array([0.5, -1.0, 0.3]), np.array([[1.0, 0, 0], [0.5, 0.8, 0], [0.2, -0.3, 1.2]])
        self.cov = root @ root.T
        x = np.random.default_rng(1).multivariate_normal(self.mean, self.cov, size=2000)
        self.x = torch.as_tensor(x)

    def density(self, x):
        return dist.MultivariateNormal(torch.as_tensor(self.mean), torch.as_tensor(self.cov)).log_prob(x)

    def test_three_numbers_and_their_identity(self):
        errors = total_error(self.pair, self.x, self.density, self.pair.log_evidence(self.x).detach())
        modelling, inference, total = self.numbers(self.pair, self.mean, self.cov)
        assert total == pytest.approx(modelling + inference, rel=1e-9)  # 004, on the oracle's own numbers
        assert abs(errors.modelling - modelling) < Z_MAX * errors.modelling_std_error
        assert abs(errors.inference - inference) < Z_MAX * errors.inference_std_error
        assert abs(errors.total - total) < Z_MAX * errors.total_std_error
        assert abs(errors.z_score) < Z_MAX
        assert inference > 10 * errors.inference_std_error  # the test would see its absence
        assert "total - (modelling + inference)" in errors.table()

    def test_a_wrong_density_is_seen(self):
        errors = total_error(
            self.pair, self.x, lambda x: self.density(x) - 1.5, self.pair.log_evidence(self.x).detach()
        )
        modelling, _, _ = self.numbers(self.pair, self.mean, self.cov)
        assert abs(errors.modelling - modelling) > Z_MAX * errors.modelling_std_error

    def test_toy_densities_by_name(self):
        x = torch.as_tensor(draw("two_moons", 200, np.random.default_rng(0))[0])
        pair = LinearGaussian.random(2, 1)
        errors = total_error(pair, x, "two_moons", num_particles=20)
        assert errors.modelling > 6 * errors.modelling_std_error  # a Gaussian is no pair of moons
        assert abs(errors.inference) < 0.05  # the guide is exact

    @pytest.mark.parametrize(
        ("x", "density", "evidence", "match"),
        [
            (torch.zeros(1, 2), "rings", None, "at least two data"),
            (torch.zeros(3, 2), "circles", None, "expected one of"),
            (torch.full((3, 2), 9.0), "checkerboard", None, "finite log density, got -inf at datum 0"),
            (torch.zeros(3, 2), lambda x: x, None, r"density of shape \[N\] = \[3\], got \[3, 2\]"),
            (torch.zeros(3, 2), lambda x: x[:, 0], torch.zeros(4), r"log_evidence of shape \[N\] = \[3\], got \[4\]"),
        ],
    )
    def test_bad_arguments_are_refused(self, x, density, evidence, match):
        with pytest.raises(ValueError, match=match):
            total_error(LinearGaussian.random(2, 1), x, density, evidence)
