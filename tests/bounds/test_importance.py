"""log_evidence against exact evidence, enumeration, quadrature and NumPy; its errors' coverage; what it refuses.

Tolerances are z-tests with a declared false-failure rate of 1e-6 a test (Bonferroni over data), or float64 rounding.
"""

import math
import os
import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam

from inference.bounds import particles, support
from inference.bounds.annealing import Path
from inference.bounds.importance import EvidenceError, log_evidence
from inference.bounds.latent_density import LatentDensity
from inference.bounds.particles import make_plan
from inference.bounds.sites import NotANumberError, PairError
from ppl_models import LinearGaussian
from tests.cases import CASES
from tests.oracles import gaussian
from tests.oracles.expectations import expectation


def max_z(count: int, rate: float = 1e-6) -> float:
    """The |z| that ``count`` standard normals exceed together with probability at most ``rate``."""
    return float(scipy.stats.norm.isf(rate / (2 * count)))


def oracle(pair: LinearGaussian, x: torch.Tensor) -> np.ndarray:
    """The exact evidence, from the joint covariance in NumPy."""
    weight, bias = pair.weight.detach().numpy(), pair.bias.detach().numpy()
    return gaussian.log_evidence(weight, bias, pair.noise_scale.item(), x.numpy())


def normal_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def normal_guide(loc: float, scale: float):
    """q(z | x) = N(x/2 + loc, scale^2); the posterior is N(x/2, 1/2)."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + loc, scale))

    return guide


def exact_normal(x: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(scipy.stats.norm(0.0, math.sqrt(2.0)).logpdf(x.numpy()))


# ---- exact values


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.exact])
def test_with_the_posterior_as_guide_every_draw_is_the_evidence(name):
    pair = CASES[name].build()
    x = CASES[name].data(pair)
    e = log_evidence(pair.model, pair.guide, x, num_particles=40)
    exact = torch.as_tensor(oracle(pair, x)) if isinstance(pair, LinearGaussian) else pair.log_evidence(x).detach()
    assert torch.allclose(e.log_evidence, exact, rtol=1e-10, atol=0)
    assert torch.allclose(e.elbo, exact, rtol=1e-10, atol=0)
    assert e.std_error.max() < 1e-10
    assert torch.allclose(e.ess, torch.tensor(40.0), rtol=1e-10)
    assert (e.k_hat == -math.inf).all(), "equal weights have no tail"
    assert not e.warnings


@pytest.mark.parametrize("name", CASES)
def test_every_pair_has_its_evidence_by_datum(name):
    pair = CASES[name].build()
    x = CASES[name].data(pair)
    if CASES[name].point_guide:
        with pytest.raises(EvidenceError, match="point mass"):
            log_evidence(pair.model, pair.guide, x, num_particles=60)
        return
    e = log_evidence(pair.model, pair.guide, x, num_particles=60)
    shape = (len(x),)
    assert {t.shape for t in (e.log_evidence, e.std_error, e.ess, e.k_hat, e.elbo)} == {torch.Size(shape)}
    assert (e.log_evidence >= e.elbo - 1e-12 * e.elbo.abs()).all(), (
        "the logarithm of a mean is above the mean of logarithms"
    )
    assert ((e.ess >= 1 - 1e-9) & (e.ess <= 60 + 1e-9)).all()
    assert e.num_dims == x[0].numel()
    assert e.plates == ("data",)


def test_the_bound_meets_the_exact_evidence_within_its_error():
    pair = LinearGaussian.random(4, 2, guide="mean_field")
    x = pair.model(size=50).detach()
    e = log_evidence(pair.model, pair.guide, x, num_particles=20_000)
    z = (e.log_evidence.numpy() - oracle(pair, x)) / e.std_error.numpy()
    assert np.abs(z).max() < max_z(len(x))
    assert (e.std_error < 0.05).all()


def test_the_elbo_on_the_same_draws_is_the_evidence_less_the_divergence():
    pair = LinearGaussian.random(4, 2, guide="mean_field")
    x = pair.model(size=10).detach()
    weight, bias, noise = pair.weight.detach().numpy(), pair.bias.detach().numpy(), pair.noise_scale.item()
    exact = []
    for row, evidence in zip(x.numpy(), oracle(pair, x), strict=True):
        mean, cov = gaussian.posterior(weight, bias, noise, row)
        exact.append(evidence - gaussian.kl(mean, np.diag(1 / np.diag(np.linalg.inv(cov))), mean, cov))
    e = log_evidence(pair.model, pair.guide, x, num_particles=5000)
    assert (np.abs(e.elbo.numpy() - exact) < max_z(10) * e.elbo_std_error.numpy()).all()


def test_a_wrong_term_would_be_seen():
    """The twin: a model whose likelihood lost its constant lies 0.92 nats off, over 20 standard errors."""

    def wrong_model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("x", -0.5 * (x - z).square())

    x = torch.linspace(-2.0, 2.0, 9)
    for model, right in ((normal_model, True), (wrong_model, False)):
        e = log_evidence(model, normal_guide(0.3, 1.0), x, num_particles=5000)
        z = (e.log_evidence - exact_normal(x)) / e.std_error
        assert bool(z.abs().max() < max_z(len(x))) is right


def test_the_bound_for_two_particles_is_its_expectation_by_quadrature():
    """E[log (w_1 + w_2)/2] is no ELBO and no evidence: it tells IWAE-2 from both."""
    x, loc, scale = 0.7, 0.4, 0.9

    def log_weight(z: float) -> float:
        q = scipy.stats.norm(x / 2 + loc, scale).logpdf(z)
        return float(scipy.stats.norm.logpdf(z) + scipy.stats.norm(z, 1.0).logpdf(x) - q)

    nodes, masses = np.polynomial.hermite_e.hermegauss(60)
    masses = masses / masses.sum()
    values = np.array([log_weight(x / 2 + loc + scale * u) for u in nodes])
    pairs = np.logaddexp(values[:, None], values[None, :]) - math.log(2)
    exact = float(masses @ pairs @ masses)
    copies = torch.full((40_000,), x)
    e = log_evidence(normal_model, normal_guide(loc, scale), copies, num_particles=2)
    error = float(e.log_evidence.std()) / math.sqrt(len(copies))
    assert abs(float(e.log_evidence.mean()) - exact) < max_z(1) * error
    assert exact_normal(torch.tensor(x)) - exact > 3 * max_z(1) * error, "the evidence itself is far"
    assert exact - masses @ values > 3 * max_z(1) * error, "and so is the ELBO"


def test_a_discrete_latent_against_enumeration():
    prior, rates = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([1.0, 4.0, 9.0])
    x = torch.tensor([0.0, 3.0, 12.0])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(prior))
            pyro.sample("x", dist.Poisson(rates[z]), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.3, 0.3])))

    exact = np.log(
        sum(p * scipy.stats.poisson(r).pmf(x.numpy()) for p, r in zip(prior.numpy(), rates.numpy(), strict=True))
    )
    e = log_evidence(model, guide, x, num_particles=5000)
    assert (np.abs(e.log_evidence.numpy() - exact) < max_z(3) * e.std_error.numpy()).all()
    assert not (e.k_hat > 0.7).any()


def test_draws_outside_the_models_support_weigh_nothing():
    """A Normal guide for positive latents; the Exponential's own formula would return a number at a negative value."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5, 1.0))

    x = torch.tensor([0.2, 1.5])
    exact = [
        math.log(expectation(lambda z, v=v: scipy.stats.norm(z, 1.0).pdf(v), scipy.stats.expon())) for v in (0.2, 1.5)
    ]
    e = log_evidence(model, guide, x, num_particles=20_000)
    assert (np.abs(e.log_evidence.numpy() - exact) < max_z(2) * e.std_error.numpy()).all()
    assert (e.elbo == -math.inf).all(), "one draw without density is enough"


def pareto_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(0.1, 2.0))
        pyro.sample("x", dist.Pareto(z, 3.0), obs=x)


def pareto_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Uniform(0.1, 2.0))


def shifted_model(x, event_dim=0):
    """x = z + Exponential(1), alone or as the two numbers of an event."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        z = z.unsqueeze(-1) if event_dim else z
        shift = dist.transforms.AffineTransform(z, 1.0)
        law = dist.TransformedDistribution(dist.Exponential(torch.ones_like(z)), shift)
        pyro.sample("x", law.expand((*law.batch_shape[:-1], 2)).to_event(1) if event_dim else law, obs=x)


def shifted_guide(x, event_dim=0):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


SHIFTED = scipy.stats.norm()
IMPOSSIBLE = {  # programs, arguments, and p(x_i, .) by quadrature, cut where x_i becomes impossible
    "pareto": (
        (pareto_model, pareto_guide, torch.tensor([0.5, 1.2, 3.0])),
        lambda v: expectation(lambda z: scipy.stats.pareto(3.0, scale=z).pdf(v), scipy.stats.uniform(0.1, 1.9), [v]),
    ),
    "shifted": (
        (shifted_model, shifted_guide, torch.tensor([-0.5, 0.4, 2.0])),
        lambda v: expectation(lambda z: math.exp(z - v) if z < v else 0.0, SHIFTED, [v]),
    ),
    "shifted event": (
        (shifted_model, shifted_guide, torch.tensor([[-0.5, 0.4], [2.0, 1.0]]), 1),
        lambda v: expectation(lambda z: math.exp(2 * z - sum(v)) if z < min(v) else 0.0, SHIFTED, [min(v)]),
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
@pytest.mark.parametrize("seed", [0, 1])
def test_latents_under_which_the_data_are_impossible_weigh_nothing(name, seed):
    """Whatever the first draw was: without the check the laws' formulas would give numbers there."""
    programs, density = IMPOSSIBLE[name]
    pyro.set_rng_seed(seed)
    e = log_evidence(*programs, num_particles=4000)
    exact = np.log([density(v) for v in programs[2].tolist()])
    assert (np.abs(e.log_evidence.numpy() - exact) < max_z(6) * e.std_error.numpy()).all()


def test_the_formula_outside_the_support_would_be_seen(monkeypatch):
    """The twin: laws left to themselves, without validation, are over a nat off."""
    monkeypatch.setattr(support, "on_support", lambda law: law)
    programs, density = IMPOSSIBLE["shifted"]
    with pyro.validation_enabled(False):
        e = log_evidence(*programs, num_particles=4000)
    exact = np.log([density(v) for v in programs[2].tolist()])
    assert np.abs(e.log_evidence.numpy() - exact).max() > 1.0


def test_annealing_sees_the_same_borders():
    programs, density = IMPOSSIBLE["shifted"]
    model, guide, x = programs
    x = x[1:] + 3.0  # where the first draw, which is not yet checked here, is possible
    plan = make_plan(model, guide, (x,), {})
    state = LatentDensity(plan, "guide")(torch.tensor([[[3.0], [9.0]]]))
    exact = scipy.stats.norm.logpdf(3.0) + 3.0 - float(x[0])
    assert math.isclose(float(state.log_joint[0, 0]), exact, rel_tol=1e-12)
    assert state.log_joint[0, 1] == -math.inf
    lower = Path.prepare(plan, num_chains=400, num_temperatures=10, num_leapfrog=4).lower_bound()
    exact = np.log([density(v) for v in x.tolist()])
    assert (np.abs(lower.log_lower.numpy() - exact) < max_z(2) * lower.std_error.numpy() + 1e-9).all()


def test_grey_values_under_a_law_that_is_not_to_check_them():
    """``validate_args=False`` keeps the formula; the same law with its checks has no density for them."""

    def model(x, checked):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z, validate_args=checked), obs=x)

    def guide(x, checked):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.tensor([0.3, 0.9])
    assert torch.isfinite(log_evidence(model, guide, x, False, num_particles=100).log_evidence).all()
    with pytest.raises(EvidenceError, match="site 'x'; look whether the data lie in their law's support"):
        log_evidence(model, guide, x, None, num_particles=100)


def test_masked_values_may_lie_outside():
    """-1 stands for a missing count; its term is masked, and the other's evidence stays."""

    def model(x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Exponential(z).mask(seen), obs=x)

    def guide(x, seen):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(2.0, 1.0))

    e = log_evidence(model, guide, torch.tensor([1.0, -1.0]), torch.tensor([True, False]), num_particles=2000)
    exact = math.log(expectation(lambda z: z * math.exp(-z), scipy.stats.gamma(2.0)))
    assert abs(float(e.log_evidence[0]) - exact) < max_z(1) * float(e.std_error[0])
    assert e.log_evidence[1] == 0


def test_the_result_does_not_depend_on_the_chunk_size(monkeypatch):
    """Two latents, blocks of 75 draws; chunks below, at and above the block, and a block's odd rest."""
    monkeypatch.setattr(particles, "ELEMENTS_AT_ONCE", 75 * 40)

    def model(x):
        with pyro.plate("data", len(x)):
            z_2 = pyro.sample("z_2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            z_1 = pyro.sample("z_1", dist.Normal(z_2.sum(-1), 1.0))
            pyro.sample("x", dist.Normal(z_1, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z_1 = pyro.sample("z_1", dist.Normal(x / 2, 1.0))
            pyro.sample("z_2", dist.Normal(z_1[..., None] / 3 * torch.ones(2), 1.0).to_event(1))

    found = []
    for chunk_size in (None, 1, 7, 74, 1000):
        pyro.set_rng_seed(4)
        found.append(log_evidence(model, guide, torch.linspace(-1.0, 1.0, 4), num_particles=500, chunk_size=chunk_size))
    for name in ("log_evidence", "std_error", "ess", "k_hat", "elbo"):
        for other in found[1:]:
            assert torch.allclose(getattr(other, name), getattr(found[0], name), rtol=1e-12, atol=1e-12), name
    assert "7 at a time" in found[2].note
    pyro.set_rng_seed(5)
    other = log_evidence(model, guide, torch.linspace(-1.0, 1.0, 4), num_particles=500)
    assert not torch.allclose(other.log_evidence, found[0].log_evidence, rtol=1e-6), "the twin: another seed"


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoMultivariateNormal])
def test_autoguides_auxiliary_sites_are_one_to_one_with_latents(autoguide):
    data = torch.tensor([1.0, -0.5, 0.3])

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Normal(z.log(), 1.0), obs=data)

    guide = autoguide(model, init_scale=0.9)
    guide()
    e = log_evidence(model, guide, num_particles=1000)  # one at a time, for AutoNormal
    exact = scipy.stats.norm(0.0, math.sqrt(2.0)).logpdf(data.numpy())
    total, error = e.log_evidence.sum(), e.std_error.square().sum().sqrt()
    assert abs(float(total) - exact.sum()) < max_z(1) * float(error)


def test_the_autoguide_without_a_density_is_refused():
    guide = AutoDelta(normal_model)
    guide(X)
    with pytest.raises(EvidenceError, match=r"density at site 'z', got a point mass .*AutoNormal for AutoDelta"):
        log_evidence(normal_model, guide, X)


def test_latents_between_the_site_and_the_data_plate_and_auxiliary_guide_sites():
    pyro.set_rng_seed(1)
    data = torch.tensor([1.0, -0.5, 0.3])

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=data)

    guide = AutoMultivariateNormal(model, init_scale=0.6)
    guide()
    e = log_evidence(model, guide, num_particles=4000)
    exact = scipy.stats.multivariate_normal(np.zeros(3), np.eye(3) + 1.0).logpdf(data.numpy())
    assert e.log_evidence.shape == (), "a global latent ties the data together: one evidence for all"
    assert e.plates == ()
    assert e.num_dims == 3
    assert abs(float(e.log_evidence) - exact) < max_z(1) * float(e.std_error)


def test_one_particle_at_a_time_where_programs_do_not_vectorise():
    def model(x):
        with pyro.plate("data", 1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0) if bool(z > 0) else dist.Normal(3.0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 1):
            pyro.sample("z", dist.Normal(0.2, 1.2))

    e = log_evidence(model, guide, torch.tensor([1.0]), num_particles=1500)
    exact = math.log(0.5 * scipy.stats.norm.pdf(1.0) + 0.5 * scipy.stats.norm.pdf(2.0))
    assert "one at a time" in e.note
    assert abs(float(e.log_evidence) - exact) < max_z(1) * float(e.std_error)


def test_deterministic_and_reparameterised_sites_are_no_data():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.linspace(-1.0, 1.0, 3)
    moved = pyro.poutine.reparam(model, {"z": LocScaleReparam(0.0)})

    def moved_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z_decentered", dist.Normal(x / 2 + 0.2, 1.0))

    for program, guide in ((model, normal_guide(0.2, 1.0)), (moved, moved_guide)):
        e = log_evidence(program, guide, x, num_particles=3000)
        assert ((e.log_evidence - exact_normal(x)).abs() < max_z(6) * e.std_error).all()
        assert e.num_dims == 1


def test_float32_programs_are_weighed_in_float64():
    torch.set_default_dtype(torch.float32)
    x = torch.linspace(-1.0, 1.0, 4)
    e = log_evidence(normal_model, normal_guide(0.0, 0.5**0.5), x, num_particles=100)
    assert e.log_evidence.dtype == e.std_error.dtype == torch.float64
    assert torch.allclose(e.log_evidence, exact_normal(x), atol=1e-5)
    assert (e.k_hat == -math.inf).all(), "rounding is not a tail"


# ---- the error


@pytest.mark.parametrize(("loc", "scale"), [(0.0, 1.0), (0.3, 0.8)])
def test_intervals_cover_as_they_say(loc, scale):
    """2000 replicates: the interval of 95 % covers in [0.9245, 0.972] but for one in a million (binomial)."""
    x = torch.full((2000,), 0.8)
    e = log_evidence(normal_model, normal_guide(loc, scale), x, num_particles=1000)
    covered = (e.log_evidence - exact_normal(x)).abs() < 1.96 * e.std_error
    assert 0.9245 <= float(covered.double().mean()) <= 0.972


def test_intervals_of_half_the_width_would_be_seen():
    x = torch.full((2000,), 0.8)
    e = log_evidence(normal_model, normal_guide(0.3, 0.8), x, num_particles=1000)
    covered = (e.log_evidence - exact_normal(x)).abs() < 1.96 * e.std_error / 2
    assert float(covered.double().mean()) < 0.8


def test_k_hat_tells_a_narrow_guide_from_a_wide_one():
    """The posterior's variance is 1/2. A guide of variance s^2 has k = 1 - 2 s^2: 0.82 for s = 0.3, negative for s = 1."""
    x = torch.linspace(-1.0, 1.0, 20)
    narrow = log_evidence(normal_model, normal_guide(0.0, 0.3), x, num_particles=5000)
    wide = log_evidence(normal_model, normal_guide(0.0, 1.0), x, num_particles=5000)
    assert narrow.num_bad_k_hat >= 10
    assert any("data have k-hat above 0.7" in text for text in narrow.warnings)
    assert wide.num_bad_k_hat == 0
    assert wide.warnings == ()


# ---- cost


def test_drawing_until_the_error_is_met():
    x = torch.linspace(-1.0, 1.0, 5)
    e = log_evidence(normal_model, normal_guide(0.3, 1.0), x, num_particles=100, target_std_error=0.01)
    assert (e.std_error <= 0.01).all()
    assert e.num_particles in {100 * 2**i for i in range(1, 11)}
    assert f"{e.num_particles} particles for each of 5 data = {5 * e.num_particles} evaluations" in e.note
    assert "rounds" in e.note
    assert not e.warnings


def test_an_error_that_is_not_met_is_said():
    x = torch.linspace(-1.0, 1.0, 5)
    guide = normal_guide(0.3, 1.0)
    e = log_evidence(normal_model, guide, x, num_particles=50, target_std_error=1e-4, max_particles=180)
    assert e.num_particles == 180
    assert any(
        "5 of 5 data did not reach the standard error 0.0001 within 180 particles" in text for text in e.warnings
    )


@pytest.mark.slow
@pytest.mark.parametrize("num_data", [50, 2000])
def test_memory_does_not_grow_with_the_number_of_particles(num_data):
    """Peak resident memory of K = 1e2 and 1e4 within 10 %, each in a process of its own."""
    code = """
import resource, sys, torch
from inference import log_evidence
from ppl_models import VAE
from ppl_models.likelihoods import Bernoulli
side = 28 if int(sys.argv[2]) == 50 else 4
vae = VAE.preset((side, side), Bernoulli(), latent_dim=2 if side == 4 else 20, hidden=(8 if side == 4 else 64,))
x = vae.model(size=int(sys.argv[2])).detach()
log_evidence(vae.model, vae.guide, x, num_particles=int(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for count in ("100", "10000"):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code, count, str(num_data)],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        peaks.append(int(done.stdout))
    assert peaks[1] <= 1.1 * peaks[0]


# ---- results as text and data


def test_the_table_names_the_least_certain_data():
    x = torch.linspace(-1.0, 1.0, 30)
    e = log_evidence(normal_model, normal_guide(0.0, 0.3), x, num_particles=500)
    lines = e.table().splitlines()
    assert lines[0].startswith("log p(x), nats, 30 data; the 10 largest errors; mean ")
    assert lines[3].startswith("mean")
    assert lines[4].split()[0] == str(int(e.std_error.argmax()))
    assert "warning:" in lines[-1]


def test_bits_per_dim_and_dataset():
    pair = LinearGaussian.random(4, 2, guide="mean_field")
    x = pair.model(size=3).detach()
    e = log_evidence(pair.model, pair.guide, x, num_particles=100)
    assert torch.allclose(e.bits_per_dim, -e.log_evidence / (4 * math.log(2)))
    assert torch.allclose(e.std_error_bits_per_dim, e.std_error / (4 * math.log(2)))
    stored = e.to_dataset()
    assert dict(stored.sizes) == {"data": 3}
    assert np.array_equal(stored["log_evidence"], e.log_evidence.numpy())
    assert stored.attrs["num_particles"] == 100
    assert math.isclose(e.mean_std_error, float(e.std_error.square().sum().sqrt()) / 3)


# ---- bad input


def plate_free_model(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def plate_free_guide(x):
    pyro.sample("z", dist.Normal(x / 2, 1.0))


def subsampling(program):
    def run(x):
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if program == "model":
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    return run


def scaled(program):
    return pyro.poutine.scale(program, 0.5)


def shuffled_model(x):
    normal_model(x[torch.randperm(len(x))])


def missing_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(-300.0, 1.0))


def uniform_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def infinite_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("x", torch.where(torch.arange(len(x)) == 2, math.inf, 0.0) + 0.0 * z)


def plain_model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0).expand([len(x)]).to_event(1), obs=x)


def plain_guide(x):
    pyro.sample("z", dist.Normal(0.0, 1.0))


def point_mass(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(x / 2))


def hiding_guide(x):
    """q(z | x) is a mixture, of which only one component at a time would be weighed."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(a, 1.0))


def two_to_one(x):
    with pyro.plate("data", len(x)):
        a, b = (pyro.sample(n, dist.Normal(0.0, 1.0), infer={"is_auxiliary": True}) for n in "ab")
        pyro.sample("z", dist.Delta(a + b))


X = torch.tensor([0.1, 0.2, 0.3, 0.4])
NAN = torch.tensor([0.1, 0.2, math.nan, 0.4])
GOOD = normal_guide(0.0, 1.0)


@pytest.mark.parametrize(
    ("model", "guide", "x", "options", "error", "match"),
    [
        (normal_model, GOOD, X, {"num_particles": 0}, EvidenceError, r"expected num_particles >= 1, got 0"),
        (
            normal_model,
            GOOD,
            X,
            {"num_particles": 1.5},
            EvidenceError,
            r"num_particles >= 1, got 1\.5: .* whole number",
        ),
        (normal_model, GOOD, X, {"num_particles": "5"}, EvidenceError, r"num_particles >= 1, got '5': .* whole number"),
        (normal_model, GOOD, X, {"chunk_size": 1.5}, EvidenceError, r"chunk_size >= 1, got 1\.5: .* whole number"),
        (normal_model, GOOD, X[:0], {}, EvidenceError, r"expected data, got a plate of size zero"),
        (plain_model, plain_guide, X, {}, EvidenceError, r"data in a plate, got site 'x' .* pyro\.plate\('data', B\)"),
        (normal_model, point_mass, X, {}, EvidenceError, r"density at site 'z', got a point mass \(Delta\)"),
        (normal_model, hiding_guide, X, {}, EvidenceError, r"one to one, as in autoguides, got a random one, 'a'"),
        (normal_model, two_to_one, X, {}, EvidenceError, r"one to one, as in autoguides, got a random one, '[ab]'"),
        (pareto_model, pareto_guide, X - 9.0, {}, EvidenceError, r"all 200 .* site 'x'; look whether the data lie in"),
        (normal_model, GOOD, X, {"chunk_size": 0}, EvidenceError, r"expected chunk_size >= 1, got 0"),
        (normal_model, GOOD, X, {"max_particles": -1}, EvidenceError, r"expected max_particles >= 1, got -1"),
        (
            normal_model,
            GOOD,
            X,
            {"target_std_error": 0.0},
            EvidenceError,
            r"positive target_std_error in nats, got 0\.0",
        ),
        (
            plate_free_model,
            plate_free_guide,
            X,
            {},
            EvidenceError,
            r"every batch dimension in a plate, got dim -1 of size 4",
        ),
        (
            subsampling("model"),
            subsampling("guide"),
            X,
            {},
            EvidenceError,
            r"without subsampling, got 2 of 4 .* 'data'",
        ),
        (scaled(normal_model), scaled(GOOD), X, {}, EvidenceError, r"sites without a scale, got one at site '[zx]'"),
        (shuffled_model, GOOD, X, {}, EvidenceError, r"same data at every run, but those at site 'x' changed"),
        (
            uniform_model,
            missing_guide,
            X,
            {},
            EvidenceError,
            r"all 200 importance weights of datum 0 are zero .* site 'z'",
        ),
        (infinite_model, GOOD, X, {}, EvidenceError, r"expected finite importance weights, got log w = inf of datum 2"),
        (normal_model, GOOD, NAN, {}, NotANumberError, r"NaN at site 'z' of the guide, batch index \[2\]"),
        (normal_model, lambda x: None, X, {}, PairError, r"latent site 'z' has no guide site"),
    ],
)
def test_bad_input_is_named(model, guide, x, options, error, match):
    with pyro.validation_enabled(False), pytest.raises(error, match=match):
        log_evidence(model, guide, x, **{"num_particles": 200, **options})


def test_the_same_programs_without_the_fault_pass():
    for model, guide in ((normal_model, GOOD), (uniform_model, normal_guide(0.0, 1.0))):
        assert torch.isfinite(log_evidence(model, guide, X, num_particles=200).log_evidence).all()


def test_the_callers_settings_stay():
    pyro.enable_validation(True)
    log_evidence(normal_model, GOOD, X, num_particles=10)
    assert pyro.settings.get("validate_distributions_pyro")
    assert torch.is_grad_enabled()
