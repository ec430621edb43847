"""Surgery on the rate, and active units, against quadrature over mixtures and closed forms of Gaussian pairs.

Each z-test has a bound of 6 standard errors on at most a few dozen numbers: a false failure below 1e-6 for the family.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

from inference.bounds import PairError, surgery
from inference.bounds.active_units import NoMeanError, active_units
from inference.bounds.surgery import elbo_surgery
from ppl_models import LinearGaussian
from tests.bounds.gap_pairs import Chain, OneSite
from tests.oracles import gaussian
from tests.oracles.expectations import expectation

Z_MAX = 6.0


def one_dim(slope: float, scale: float) -> OneSite:
    prior = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    return OneSite(prior, lambda x: dist.Normal(slope * x, scale).to_event(1))


class TestSurgery:
    X = torch.tensor([[-2.0], [-0.5], [0.1], [0.4], [3.0]], dtype=torch.float64)

    def oracle(self, slope: float, scale: float) -> tuple[float, float]:
        """Mutual information and marginal KL by quadrature over each component."""
        laws = [scipy.stats.norm(slope * float(v), scale) for v in self.X]

        def log_aggregate(z):
            return scipy.special.logsumexp([law.logpdf(z) for law in laws]) - math.log(len(laws))

        information = np.mean([expectation(lambda z, q=q: q.logpdf(z) - log_aggregate(z), q) for q in laws])
        marginal = np.mean([expectation(lambda z: log_aggregate(z) - scipy.stats.norm.logpdf(z), q) for q in laws])
        return float(information), float(marginal)

    @pytest.mark.parametrize(
        ("slope", "scale"), [(0.5, 0.6), pytest.param(1.0, 0.3, marks=pytest.mark.slow), (0.1, 1.0)]
    )
    def test_parts_against_quadrature(self, slope, scale):
        parts = elbo_surgery(one_dim(slope, scale), self.X, num_particles=500)
        information, marginal = self.oracle(slope, scale)
        assert abs(parts.mutual_information - information) < Z_MAX * parts.mutual_information_std_error
        assert abs(parts.marginal_kl - marginal) < Z_MAX * parts.marginal_kl_std_error
        means = slope * self.X.numpy()[:, 0]
        rate = np.mean([gaussian.kl(m[None], np.eye(1) * scale**2, np.zeros(1), np.eye(1)) for m in means])
        assert abs(parts.rate - rate) < Z_MAX * parts.rate_std_error
        assert parts.rate == pytest.approx(parts.mutual_information + parts.marginal_kl, abs=1e-10)
        assert 0 < parts.mutual_information < parts.most_information
        assert "mutual information" in parts.table()

    def test_extremes(self):
        apart = elbo_surgery(one_dim(1.0, 1e-4), self.X)
        assert apart.mutual_information == pytest.approx(math.log(5), abs=1e-9)
        alike = elbo_surgery(one_dim(0.0, 1.0), self.X)  # the guide is the prior: nothing of anything
        assert (alike.rate, alike.mutual_information, alike.marginal_kl) == pytest.approx((0, 0, 0), abs=1e-12)

    def test_chunks_change_nothing(self, monkeypatch):
        pair, numbers = Chain(0.5, 0.5), []
        for elements in (2**21, 12):
            monkeypatch.setattr(surgery, "ELEMENTS_AT_ONCE", elements)
            pyro.set_rng_seed(0)
            numbers.append(elbo_surgery(pair, self.X))
        assert numbers[0].mutual_information == pytest.approx(numbers[1].mutual_information, abs=1e-12)

    def test_layers_are_one_latent(self):
        """z_1 | x ~ N(x, s), z_2 | z_1 ~ N(z_1, s): z_2 tells nothing beyond z_1, so the information is that of z_1."""
        chain = elbo_surgery(Chain(1.0, 1.0, scale=0.8), self.X, num_particles=500)
        information, _ = self.oracle(1.0, 0.8)
        assert abs(chain.mutual_information - information) < Z_MAX * chain.mutual_information_std_error

    def test_bad_arguments_are_refused(self):
        with pytest.raises(ValueError, match="num_particles >= 2"):
            elbo_surgery(one_dim(1.0, 1.0), self.X, num_particles=1)

    def test_programs_that_only_run_alone_are_refused(self):
        def law(x):
            if any(getattr(handler, "name", "") == "_particles" for handler in pyro.poutine.runtime._PYRO_STACK):
                raise RuntimeError("not under a plate")
            return dist.Normal(x, 1.0).to_event(1)

        pair = one_dim(1.0, 1.0)
        pair.law = law
        with pytest.raises(PairError, match="under an outer plate"):
            elbo_surgery(pair, self.X)


class TestActiveUnits:
    def test_variance_and_rate_of_each_unit(self):
        weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.02, 0.0]], dtype=torch.float64)
        pair = LinearGaussian(weight, torch.zeros(2), noise_scale=0.5, guide="mean_field")
        x = pair.model(size=400).detach()
        units = active_units(pair, x)["z"]
        precision = 1 + np.diag(weight.numpy().T @ weight.numpy()) / 0.25
        means = x.numpy() @ weight.numpy() / 0.25 / precision
        np.testing.assert_allclose(units.variance, means.var(0), rtol=1e-9, atol=1e-12)
        kl = 0.5 * (1 / precision + (means**2).mean(0) - 1 + np.log(precision))
        np.testing.assert_allclose(units.kl, kl, rtol=1e-9, atol=1e-12)
        assert units.active.tolist() == [True, False, False]
        assert units.words() == (f"site z: 1 of 3 units active; the others cost at most {kl[1]:.2g} nats each")

    def test_noise_of_the_draws_is_no_activity(self):
        """z_1 ~ N(0, 0.7^2) whatever x, z_2 ~ N(z_1, ...): 20 draws leave a variance of 0.0245 in E[z_2 | x]."""
        x = torch.randn(2000, 1)
        units = active_units(Chain(0.0, 1.0), x, num_particles=20)
        error = 0.0245 * math.sqrt(2 / 2000)
        assert abs(float(units["z_2"].variance)) < Z_MAX * math.sqrt(2) * error
        assert units.count == 0
        assert "COLLAPSED" in units["z_1"].words()
        assert "not known in closed form" in units.words()  # the bottom-up guide has no closed form at z_1
        assert active_units(Chain(1.0, 1.0), x).count == 2

    @pytest.mark.parametrize(
        ("x", "options", "match"),
        [
            (torch.zeros(1, 1), {}, "at least 2 data"),
            (torch.zeros(3, 1), {"threshold": 0.0}, "threshold > 0"),
            (torch.zeros(3, 1), {"num_particles": 1}, "num_particles >= 2"),
        ],
    )
    def test_bad_arguments_are_refused(self, x, options, match):
        with pytest.raises(ValueError, match=match):
            active_units(Chain(1.0, 1.0), x, **options)

    @pytest.mark.parametrize(
        ("prior", "law"),
        [
            (dist.Categorical(torch.ones(3)), lambda x: dist.Categorical(torch.ones(len(x), 3))),
            (dist.Normal(0.0, 1.0), lambda x: dist.Cauchy(x[:, 0], 1.0)),
        ],
        ids=["categorical", "cauchy"],
    )
    def test_laws_without_a_mean_are_refused(self, prior, law):
        with pytest.raises(NoMeanError, match="a mean at site 'z'"):
            active_units(OneSite(prior, law), torch.zeros(3, 1))
