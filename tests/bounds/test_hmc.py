"""The transition: reversible integrator of order two, invariant law, detailed balance, adaptation that then stands still."""

import math

import pytest
import torch

from inference.bounds import hmc
from inference.bounds.hmc import HamiltonianKernel, State, adapt_step_sizes, leapfrog
from tests.bounds.elbo_case import quantile

CHAINS = 6000
B = 0.6


@pytest.fixture(autouse=True)
def _one_thread():
    """Many small operations: threads only get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gaussian(u: torch.Tensor) -> State:
    """q_0 = N(0, I), p = N(1, diag(0.3^2, 2^2)) up to constants, per datum the same; [C, B, 2]."""
    scale = torch.tensor([0.3, 2.0])
    return State(u, -0.5 * u.square().sum(-1), -0.5 * ((u - 1) / scale).square().sum(-1), -u, -(u - 1) / scale.square())


def tempered_moments() -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of pi_B by the addition of natural parameters."""
    precision = (1 - B) + B / torch.tensor([0.3, 2.0]).square()
    return B / torch.tensor([0.3, 2.0]).square() / precision, precision.rsqrt()


def curved(u: torch.Tensor) -> State:
    """A density with curvature of every order; both ends the same, so that the temperature does not matter."""
    log = -(u.square() / 2 + u.pow(4) / 4 + 0.5 * torch.sin(3 * u)).sum(-1)
    grad = -(u + u.pow(3) + 1.5 * torch.cos(3 * u))
    return State(u, log, log, grad, grad)


def energy_error(step: float, time: float = 1.0, integrate=leapfrog) -> float:
    """|H(end) - H(start)| of a trajectory of fixed length, mean over starting points."""
    generator = torch.Generator().manual_seed(0)
    u, r = (torch.randn(50, 1, 3, generator=generator) for _ in range(2))
    steps = round(time / step)
    end, momentum, finite = integrate(curved, curved(u), r, B, torch.tensor(step), steps)
    assert bool(finite.all())
    change = end.log_joint - curved(u).log_joint - 0.5 * (momentum.square() - r.square()).sum(-1)
    return float(change.abs().mean())


def euler(density, state, momentum, temperature, step, num_steps):
    """The same interface, order one: what the measurement of the order must tell apart."""
    for _ in range(num_steps):
        gradient = state.gradient(temperature)
        state = density(state.position + step * momentum)
        momentum = momentum + step * gradient
    return state, momentum, torch.ones_like(state.log_joint, dtype=torch.bool)


@pytest.mark.parametrize(("integrate", "order"), [(leapfrog, 2), (euler, 1)])
def test_order_of_the_energy_error(integrate, order):
    coarse, fine = energy_error(1 / 64, integrate=integrate), energy_error(1 / 256, integrate=integrate)
    assert math.log(coarse / fine) / math.log(4) == pytest.approx(order, abs=0.1)


def test_trajectories_run_backwards():
    u, r = torch.randn(20, 2, 3), torch.randn(20, 2, 3)
    step = 0.05 * torch.ones(20, 2, 1)
    end, momentum, _ = leapfrog(curved, curved(u), r, B, step, 20)
    assert not torch.allclose(end.position, u, atol=0.1)
    back, reversed_momentum, _ = leapfrog(curved, end, -momentum, B, step, 20)
    assert torch.allclose(back.position, u, atol=1e-10)
    assert torch.allclose(reversed_momentum, -r, atol=1e-10)


def after_a_transition(step: float = 0.5, jitter: float = 0.2) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Whitened draws before and after; a coarse step, so that the acceptance rule has something to do."""
    mean, deviation = tempered_moments()
    before = torch.randn(CHAINS, 1, 2)
    kernel = HamiltonianKernel(gaussian, num_leapfrog=3, jitter=jitter)
    moved = kernel(gaussian(mean + deviation * before), B, torch.tensor([step]))
    after = (moved.state.position - mean) / deviation
    return before.squeeze(1), after.squeeze(1), float(moved.acceptance.mean())


def invariance_z(draws: torch.Tensor) -> torch.Tensor:
    """z-values of the moments of draws that should be N(0, I): means, variances, correlation."""
    root = len(draws) ** 0.5
    means = draws.mean(0) * root
    variances = (draws.square().mean(0) - 1) * root / 2**0.5
    return torch.cat([means, variances, (draws[:, :1] * draws[:, 1:]).mean(0) * root])


def balance_z(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Detailed balance: E[f(u) g(u')] = E[g(u) f(u')]; paired differences of f = u and g = u^3, u^2 in each coordinate."""
    differences = torch.stack(
        [before * after.pow(k) - after * before.pow(k) for k in (2, 3)]
        + [before.flip(-1).square() * after - after.flip(-1).square() * before],
    )
    return (differences.mean(1) / differences.std(1) * CHAINS**0.5).flatten()


def test_the_tempered_law_is_left_invariant_and_in_detailed_balance():
    before, after, acceptance = after_a_transition()
    assert 0.3 < acceptance < 0.95
    assert float((after - before).abs().mean()) > 0.2
    z = torch.cat([invariance_z(after), balance_z(before, after)])
    assert float(z.abs().max()) < quantile(len(z))


def test_without_the_acceptance_rule_it_is_not(monkeypatch):
    """The step of 0.5 has e w = 1.3 at the narrow coordinate, where the integrator's own law is wider by over a tenth."""
    monkeypatch.setattr(hmc, "accepted", lambda log_ratio: torch.ones_like(log_ratio, dtype=torch.bool))
    _, after, _ = after_a_transition()
    assert float(invariance_z(after).abs().max()) > 2 * quantile(11)


def test_a_step_that_depends_on_the_state_is_caught(monkeypatch):
    """The one constraint: a shorter step where the chain is far out is not reversible."""
    monkeypatch.setattr(
        HamiltonianKernel,
        "__call__",
        lambda self, state, b, step: call(self, state, b, step / (1 + state.position.abs().amax(-1))),
    )
    _, after, _ = after_a_transition(step=0.9)
    assert float(invariance_z(after).abs().max()) > 2 * quantile(11)


call = HamiltonianKernel.__call__


def test_a_border_of_the_support_is_respected():
    """A half-normal on raw u > 0: trajectories that cross are rejected, and the law stays."""

    def half_normal(u):
        log = torch.where(u > 0, -0.5 * u.square(), -torch.inf).sum(-1)
        return State(u, log, log, -u, -u)

    before = torch.randn(CHAINS, 1, 1).abs()
    moved = HamiltonianKernel(half_normal, num_leapfrog=3)(half_normal(before), B, torch.tensor([0.3]))
    after = moved.state.position
    assert bool((after > 0).all())
    assert bool((after[moved.diverged] == before[moved.diverged]).all())
    assert 0.05 < float(moved.diverged.double().mean()) < 0.6
    mean, deviation = (2 / math.pi) ** 0.5, (1 - 2 / math.pi) ** 0.5
    assert abs(float(after.mean()) - mean) < quantile(2) * deviation / CHAINS**0.5
    assert abs(float(after.square().mean()) - 1) < quantile(2) * 2**0.5 / CHAINS**0.5


def test_a_lost_trajectory_never_asks_about_infinite_positions():
    asked = []

    def steep(u):
        asked.append(u)
        log = -u.pow(4).sum(-1) * 1e200
        return State(u, log, log, -4e200 * u.pow(3), -4e200 * u.pow(3))

    kernel = HamiltonianKernel(steep, num_leapfrog=5)
    moved = kernel(steep(torch.ones(4, 1, 1)), B, torch.tensor([1.0]))
    assert bool(moved.diverged.all())
    assert torch.equal(moved.acceptance, torch.zeros(4, 1))
    assert torch.equal(moved.state.position, torch.ones(4, 1, 1))
    assert all(bool(u.isfinite().all()) for u in asked)


def test_adaptation_meets_the_target_at_every_scale():
    """Forty data of each scale: their acceptances scatter by 0.07, so the mean by 0.011; the tolerance is 0.06."""
    scales = torch.tensor([0.01, 1.0, 30.0]).repeat(40).unsqueeze(-1)

    def normals(u):
        log = -0.5 * (u / scales).square().sum(-1)
        return State(u, log, log, -u / scales.square(), -u / scales.square())

    kernel = HamiltonianKernel(normals, num_leapfrog=5, jitter=0.2)
    found = adapt_step_sizes(kernel, normals(scales * torch.randn(64, 120, 4)), [0.3, 0.7])
    assert found.shape == (2, 120)

    def acceptance(step: torch.Tensor) -> torch.Tensor:
        moved = kernel(normals(scales * torch.randn(200, 120, 4)), B, step)
        return moved.acceptance.mean(0).reshape(40, 3).mean(0)

    for step in found:
        assert float((acceptance(step) - hmc.TARGET_ACCEPTANCE).abs().max()) < 0.06
    unadapted = acceptance(torch.full((120,), hmc.FIRST_STEP_SIZE))
    assert float((unadapted - hmc.TARGET_ACCEPTANCE).abs().min()) > 0.15
