"""Annealed importance sampling: unbiased weights, both bounds, and each way of getting them wrong caught.

E[w] = p(x) and, on simulated data, E[1/w] = 1/p(x) are tested as they stand, on thousands of chains or data at once; the
known evidences come from scipy or from the linear-Gaussian oracle.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from inference.bounds import annealing, latent_density
from inference.bounds.annealing import Path, annealed_evidence, temperatures
from inference.bounds.bidirectional import bidirectional_evidence
from inference.bounds.hmc import HamiltonianKernel
from inference.bounds.importance import EvidenceError
from inference.bounds.latent_density import LatentDensity
from inference.bounds.particles import make_plan
from inference.bounds.sites import PairError
from ppl_models import VAE, LinearGaussian
from ppl_models.likelihoods import Normal
from tests.bounds.annealing_programs import (
    SUPPORTS,
    nested_plates,
    one_at_a_time,
    ordered_supports,
    positive,
    unit_interval,
)
from tests.bounds.elbo_case import quantile
from tests.oracles import gaussian

SHORT = {"num_temperatures": 6, "num_leapfrog": 3}
LONG = (unit_interval, ordered_supports)  # a minute each


@pytest.fixture(autouse=True)
def _one_thread():
    """Many small operations: threads only get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pair_and_data(size: int = 4) -> tuple[LinearGaussian, torch.Tensor, np.ndarray]:
    pair = LinearGaussian.random(3, 2, noise_scale=1.0, guide="mean_field")
    x = pair.model(size=size).detach()
    weight, bias = pair.weight.detach().numpy(), pair.bias.detach().numpy()
    return pair, x, gaussian.log_evidence(weight, bias, 1.0, x.numpy())


def bias_z(log_weights: torch.Tensor, log_evidence: np.ndarray) -> np.ndarray:
    """z-values of mean(w) / p(x) = 1 over the first dim."""
    ratio = np.exp(log_weights.detach().numpy() - log_evidence)
    return (ratio.mean(0) - 1) / (ratio.std(0, ddof=1) / len(ratio) ** 0.5)


def weights_z(start: str = "prior", num_chains: int = 3000, **options) -> np.ndarray:
    pair, x, exact = pair_and_data()
    options = {**SHORT, "schedule": "linear", **options}
    ais = annealed_evidence(pair.model, pair.guide, x, num_chains=num_chains, start=start, **options)
    return bias_z(ais.log_weights, exact)


class TestWeights:
    @pytest.mark.parametrize(("start", "schedule"), [("prior", "linear"), ("guide", "sigmoid")])
    def test_are_unbiased(self, start, schedule):
        assert np.abs(weights_z(start, schedule=schedule)).max() < quantile(4)

    @pytest.mark.parametrize(
        "program",
        [pytest.param(p, marks=pytest.mark.slow) if p in LONG else p for p in SUPPORTS],
        ids=lambda p: p.__name__,
    )
    def test_are_unbiased_on_every_support(self, program):
        known = program()
        ais = annealed_evidence(known.model, known.guide, known.x, num_chains=2000, start="prior", **SHORT)
        assert ais.log_lower.shape == known.log_evidence.shape
        assert np.abs(bias_z(ais.log_weights, known.log_evidence)).max() < quantile(known.log_evidence.size)

    def test_forgetting_the_jacobian_is_caught(self, monkeypatch):
        """Transitions then leave the law tilted by 1/z invariant, whose mean of log z is lower by a variance."""
        monkeypatch.setattr(latent_density, "log_jacobian", lambda transform, u, z, event_dim: torch.zeros_like(u))
        known = positive()
        ais = annealed_evidence(known.model, known.guide, known.x, num_chains=2000, start="prior", **SHORT)
        assert np.abs(bias_z(ais.log_weights, known.log_evidence)).max() > 1.5 * quantile(3)

    def test_a_transition_without_acceptance_is_caught(self, monkeypatch):
        """Steps of acceptance 0.6 make the integrator's own error count; the same path is right with the rule."""
        monkeypatch.setattr("inference.bounds.hmc.TARGET_ACCEPTANCE", 0.6)
        pair, x, exact = pair_and_data()
        with torch.no_grad():
            path = Path.prepare(make_plan(pair.model, pair.guide, (x,), {}), 3000, 6, 3, "linear", "prior")
            assert np.abs(bias_z(path.lower_bound().log_weights, exact)).max() < quantile(4)
            monkeypatch.setattr("inference.bounds.hmc.accepted", lambda ratio: torch.ones_like(ratio, dtype=torch.bool))
            assert np.abs(bias_z(path.lower_bound().log_weights, exact)).max() > 1.5 * quantile(4)

    def test_a_missing_factor_in_the_increments_is_caught(self, monkeypatch):
        monkeypatch.setattr(annealing, "temperatures", lambda n, schedule: 0.95 * temperatures(n, schedule))
        assert np.abs(weights_z()).max() > 1.5 * quantile(4)

    def test_adapting_on_the_chains_that_count_is_what_the_warm_up_avoids(self, monkeypatch):
        """With step sizes chosen by looking at each chain's own state the weights are biased."""
        own = HamiltonianKernel.__call__

        def looking(self, state, temperature, step):
            return own(self, state, temperature, 2.5 / (1 + 4 * state.position.square().sum(-1)))

        monkeypatch.setattr(HamiltonianKernel, "__call__", looking)
        assert np.abs(weights_z(num_temperatures=12, num_chains=9000)).max() > 1.5 * quantile(4)

    def test_one_temperature_is_importance_weighting(self):
        pair, x, _ = pair_and_data()
        ais = annealed_evidence(pair.model, pair.guide, x, num_chains=7, num_temperatures=1, seed=3)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            density = LatentDensity(make_plan(pair.model, pair.guide, (x,), {}), "guide")
            density.draw(annealing.WARM_UP_CHAINS)
            z = density.draw(7)
        law = pair.guide_distribution(x)
        prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        expected = prior + dist.Normal(z @ pair.weight.T + pair.bias, 1.0).log_prob(x).sum(-1) - law.log_prob(z)
        assert torch.allclose(ais.log_weights, expected.detach(), rtol=1e-12)
        assert ais.step_size.shape == (0, 4)

    @pytest.mark.parametrize("num_temperatures", [1, 2, 5])
    def test_zero_variance_certificate(self, num_temperatures):
        """From the exact posterior every path has w = p(x), in both directions."""
        pair = LinearGaussian.random(4, 2)
        options = {"num_chains": 3, "num_temperatures": num_temperatures, "num_leapfrog": 2}
        both = bidirectional_evidence(pair, 5, **options)
        exact = pair.log_evidence(both.x).detach()
        assert torch.allclose(both.lower.log_weights, exact.expand(3, 5), rtol=1e-10)
        assert torch.allclose(both.log_upper, exact, rtol=1e-10)
        assert float(both.chain_std_error.max()) < 1e-8
        assert float(both.lower.std_error.max()) < 1e-8

    def test_coverage_of_the_standard_error(self):
        """2000 replicates of one datum, each with a warm-up of its own: 95 % intervals cover within RELIABILITY's range."""
        pair, x, exact = pair_and_data(1)
        x = x.expand(2000, -1)
        ais = annealed_evidence(pair.model, pair.guide, x, num_chains=80, num_temperatures=3, num_leapfrog=2)
        assert float(ais.std_error.mean()) < 0.05  # then the delta method's bias of se^2 / 2 is small beside se
        covered = ((ais.log_lower - exact[0]).abs() < 1.96 * ais.std_error).double().mean()
        assert 0.9245 < float(covered) < 0.972
        wrong = ((ais.log_lower - exact[0]).abs() < 1.96 * 0.8 * ais.std_error).double().mean()
        assert float(wrong) < 0.9245


class TestBothDirections:
    def test_the_way_back_is_unbiased_for_the_reciprocal(self):
        """E[1/w] = 1/p(x) over 1000 simulated (x, z), one chain each; by Jensen, log w is above log p(x) on average."""
        excess = excess_of_the_way_back()
        ratio = (-excess).exp()
        assert abs(float((ratio.mean() - 1) / ratio.std())) * len(ratio) ** 0.5 < quantile(1)
        assert z_value(excess) > 2 * quantile(1)

    def test_the_way_back_from_another_start_is_caught(self, monkeypatch):
        """Begun at a draw of the prior, which is none of the posterior, the way back is no upper bound."""
        monkeypatch.setattr(LatentDensity, "encode", lambda self, values: self.draw(1)[:1])
        assert z_value(excess_of_the_way_back()) < -2 * quantile(1)

    def test_a_way_back_in_forward_order_is_caught(self, monkeypatch):
        sweep = Path.sweep
        monkeypatch.setattr(Path, "sweep", lambda self, state, upwards: sweep(self, state, True))
        assert z_value(excess_of_the_way_back()) < -2 * quantile(1)

    def test_bounds_are_in_order_and_close_with_temperatures(self):
        pair = LinearGaussian.random(8, 3, guide="mean_field")
        gaps, errors = [], []
        for n in (2, 6, 18):
            both = bidirectional_evidence(
                pair, 30, num_temperatures=n, num_chains=8, num_leapfrog=4, start="prior", seed=1
            )
            exact = pair.log_evidence(both.x).detach()
            below, above = both.lower.log_lower - exact, both.log_upper - exact
            for difference, sign in ((below, 1), (above, -1)):
                error = float(difference.std()) / 30**0.5
                assert sign * float(difference.mean()) < quantile(6) * error
            assert both.mean_gap == pytest.approx(float((above - below).mean()))
            gaps.append(both.mean_gap)
            errors.append(both.mean_gap_std_error)
        assert gaps[0] > 1.5 * gaps[1] > 2.25 * gaps[2] > 0
        assert all(gap > 2 * error for gap, error in zip(gaps[:2], errors[:2], strict=True))

    def test_simulated_data_and_shapes(self):
        vae = VAE.preset((2, 3), Normal(scale=0.5), latent_dim=2, hidden=(4,)).float()
        both = bidirectional_evidence(vae, 4, num_chains=3, **SHORT, seed=0)
        assert both.x.shape == (4, 2, 3)
        assert both.x.dtype == torch.float32
        assert both.log_upper.dtype == both.lower.log_lower.dtype == torch.float64
        assert both.gap.shape == both.chain_std_error.shape == (4,)
        assert both.lower.plates == ("data",)

    def test_one_chain_and_one_datum_have_no_known_error(self):
        pair, _, _ = pair_and_data()
        both = bidirectional_evidence(pair, 1, num_chains=1, **SHORT)
        assert both.mean_gap_std_error == float(both.chain_std_error) == float(both.lower.std_error) == float("inf")


def excess_of_the_way_back() -> torch.Tensor:
    """log w of the way back minus log p(x), for each of 1000 simulated data."""
    pair = LinearGaussian.random(3, 2, noise_scale=1.0, guide="mean_field")
    both = bidirectional_evidence(pair, 1000, num_chains=1, num_temperatures=8, num_leapfrog=3, start="prior")
    return both.log_upper - pair.log_evidence(both.x).detach()


def z_value(draws: torch.Tensor) -> float:
    return float(draws.mean() / draws.std()) * len(draws) ** 0.5


class TestTransitions:
    def test_the_kernel_is_fixed_before_the_run(self, monkeypatch):
        """Every transition of the run uses the step sizes that were known before it, and a second run the same ones."""
        pair, x, _ = pair_and_data()
        with torch.no_grad():
            path = Path.prepare(make_plan(pair.model, pair.guide, (x,), {}), 5, 30, 2, start="prior")
            before, used = path.step_size.clone(), []
            own = HamiltonianKernel.__call__
            monkeypatch.setattr(
                HamiltonianKernel,
                "__call__",
                lambda self, state, b, step: (used.append((b, step.clone())), own(self, state, b, step))[1],
            )
            first, second = path.lower_bound(), path.lower_bound()
        assert torch.equal(path.step_size, before)
        assert torch.equal(first.step_size, second.step_size)
        assert len(used) == 2 * 29
        for (b, step), (again, same) in zip(used[:29], used[29:], strict=True):
            assert b == again
            assert torch.equal(step, same)
        assert [b for b, _ in used[:29]] == temperatures(30).tolist()[1:-1]
        assert {tuple(step.tolist()) for _, step in used} == {tuple(row.tolist()) for row in before}

    def test_step_sizes_follow_the_datum_and_the_path(self):
        """From a wide prior to a narrow posterior steps get shorter; data of narrower posteriors have shorter ones."""

        def model(x, scale):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, scale), obs=x)

        def guide(x, scale):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x, scale))

        options = {"start": "prior", "num_temperatures": 40, "num_leapfrog": 4}
        ais = annealed_evidence(model, guide, torch.zeros(2), torch.tensor([0.02, 2.0]), **options)
        assert ais.step_size.shape == (20, 2)
        assert float(ais.step_size[-1, 0]) < 0.3 * float(ais.step_size[0, 0])
        assert float(ais.step_size[-1, 0]) < 0.2 * float(ais.step_size[-1, 1])
        assert bool(((ais.acceptance > 0.5) & (ais.acceptance < 1)).all())
        assert float(ais.divergences.max()) == 0

    def test_seed_repeats_and_leaves_the_default_generator_alone(self):
        pair, x, _ = pair_and_data()
        state = torch.get_rng_state()
        runs = [
            annealed_evidence(pair.model, pair.guide, x, num_temperatures=2, num_leapfrog=1, seed=s) for s in (0, 0, 1)
        ]
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(runs[0].log_weights, runs[1].log_weights)
        assert not torch.equal(runs[0].log_weights, runs[2].log_weights)

    def test_parameters_are_left_as_they_were(self):
        pair, x, _ = pair_and_data()
        ais = annealed_evidence(pair.model, pair.guide, x, **SHORT)
        assert all(p.grad is None and p.requires_grad for p in pair.parameters())
        assert not ais.log_lower.requires_grad


class TestDensity:
    @pytest.mark.parametrize("start", ["prior", "guide"])
    @pytest.mark.parametrize("program", SUPPORTS, ids=lambda p: p.__name__)
    def test_many_chains_at_once_equal_one_at_a_time(self, program, start):
        known = program()
        densities = [
            LatentDensity(make_plan(known.model, known.guide, (known.x,), {}, vectorize), start)
            for vectorize in (True, False)
        ]
        u = densities[0].draw(3)
        together, singly = (density(u) for density in densities)
        for name in ("log_start", "log_joint", "grad_start", "grad_joint"):
            assert torch.allclose(getattr(together, name), getattr(singly, name), rtol=1e-12, atol=1e-12), name
        assert densities[1].draw(2).shape == u[:2].shape

    @pytest.mark.parametrize("program", SUPPORTS, ids=lambda p: p.__name__)
    def test_gradients_against_finite_differences(self, program):
        known = program()
        density = LatentDensity(make_plan(known.model, known.guide, (known.x,), {}), "guide")
        u = density.draw(2)
        state = density(u)
        for log, grad in (("log_start", state.grad_start), ("log_joint", state.grad_joint)):
            for i in range(u.shape[-1]):
                step = torch.zeros_like(u)
                step[..., i] = 1e-5
                slope = (getattr(density(u + step), log) - getattr(density(u - step), log)) / 2e-5
                assert torch.allclose(grad[..., i], slope, rtol=1e-5, atol=1e-6)

    def test_the_start_integrates_to_one(self):
        """With the Jacobian, exp(log q_0(u)) is a density over u: here on a grid; without it, its integral is E[1/z]."""
        known = positive()
        density = LatentDensity(make_plan(known.model, known.guide, (known.x,), {}), "prior")
        grid = torch.linspace(-9, 9, 2001)
        values = density(grid[:, None, None].expand(-1, 3, 1)).log_start.exp()
        assert torch.allclose(torch.trapezoid(values, grid, dim=0), torch.ones(3), atol=1e-9)

    def test_encode_is_the_inverse(self):
        known = nested_plates()
        plan = make_plan(known.model, known.guide, (known.x,), {})
        density = LatentDensity(plan, "guide")
        values = {name: site["value"] for name, site in plan.prototype.guide.items()}
        u = density.encode(values)
        assert u.shape == (1, 3, 3)
        total = sum(site["log_prob"].sum() for site in plan.prototype.model.values())
        assert float(density(u).log_joint.sum()) == pytest.approx(float(total), rel=1e-12)
        for group in range(3):
            expected = [values["a"][group], values["b"][0, group], values["b"][1, group]]
            assert u[0, group].tolist() == pytest.approx([float(v) for v in expected])

    def test_programs_that_run_one_chain_at_a_time(self):
        known = one_at_a_time()
        ais = annealed_evidence(known.model, known.guide, known.x, num_chains=4, num_temperatures=3, num_leapfrog=1)
        assert "one at a time" in ais.note
        assert bool(((ais.log_lower - torch.as_tensor(known.log_evidence)).abs() < 8 * ais.std_error).all())


@pytest.mark.parametrize("schedule", ["linear", "sigmoid"])
@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_schedules(schedule, n):
    betas = temperatures(n, schedule).numpy()
    t = np.arange(n + 1) / n
    s = 1 / (1 + np.exp(-4 * (2 * t - 1)))
    expected = t if schedule == "linear" else (s - s[0]) / (s[-1] - s[0])
    assert np.allclose(betas, expected, rtol=0, atol=1e-14)
    assert betas[0] == 0
    assert betas[-1] == 1
    assert np.all(np.diff(betas) > 0)


def test_chains_may_start_where_the_model_has_no_density():
    """x ~ Pareto(z, 3) gives x no density for z > x; such chains weigh nothing, and no first draw stops the run.

    Oracle: p(x) = int_0.1^min(x, 2) 3 z^3 / x^4 dz / 1.9 in closed form.
    """

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.1, 2.0))
            pyro.sample("x", dist.Pareto(z, 3.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(0.1, 2.0))

    x = torch.tensor([0.5, 1.0, 3.0])
    exact = (3 / 4 * (x.clamp_max(2.0) ** 4 - 0.1**4) / x**4 / 1.9).log()
    for seed in range(2):
        a = annealed_evidence(model, guide, x, num_chains=64, num_temperatures=10, num_leapfrog=3, seed=seed)
        assert ((a.log_lower - exact).abs() < 6 * a.std_error).all()


def _uniform_and_guide(low, high):
    """z ~ U(0, 1), x ~ N(z, 1/2); the guide draws z from U(low, high)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(torch.full((len(x),), low), high))

    return model, guide


@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (0.0, 2.0), (2.0, 3.0)])
def test_a_guide_that_draws_outside_the_models_interval_is_refused(low, high):
    """Not moved onto its border, where its density would count."""
    model, guide = _uniform_and_guide(low, high)
    with pytest.raises(PairError, match=r"the model's support.*'z'.*or start from the prior"):
        annealed_evidence(model, guide, torch.tensor([0.1, 0.5]), num_chains=16, num_temperatures=5)


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_an_interval_is_right_where_the_guide_keeps_to_it(start):
    model, guide = _uniform_and_guide(*((0.0, 1.0) if start == "guide" else (-1.0, 2.0)))
    x = torch.tensor([0.1, 0.5, 0.9])
    unit = torch.distributions.Normal(0.0, 1.0)
    exact = (unit.cdf((1 - x) / 0.5) - unit.cdf(-x / 0.5)).log()
    a = annealed_evidence(model, guide, x, num_chains=256, num_temperatures=5, start=start)
    assert ((a.log_lower - exact).abs() < 6 * a.std_error).all()


@pytest.mark.filterwarnings("ignore:Encountered .inf:UserWarning")  # Pyro's own, before the refusal
def test_an_infinite_factor_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("f", torch.where(x > 0.3, torch.inf, 0.0) + 0 * z)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    with pytest.raises(EvidenceError, match=r"an infinite or undefined one for datum \[1\]"):
        annealed_evidence(model, guide, torch.tensor([0.1, 0.5]), num_chains=16, num_temperatures=5)
