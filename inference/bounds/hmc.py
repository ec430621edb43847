"""Hamiltonian Monte Carlo on tempered densities, for all data and chains at once, with its step size fixed beforehand.

The target at temperature b is pi_b(u) proportional to q_0(u)^(1-b) p(x, u)^b, with u unconstrained. One transition draws a
momentum r ~ N(0, I), follows the leapfrog integrator for L steps of size e,

    r <- r + e/2 grad log pi_b(u),    u <- u + e r,    r <- r + e/2 grad log pi_b(u),

and accepts the end point with probability min(1, exp(-dH)), H(u, r) = -log pi_b(u) + |r|^2 / 2 (Neal 2011, "MCMC using
Hamiltonian dynamics", section 5.3.2; arXiv:1206.1901). This leaves pi_b invariant, and is reversible, for any step size
that does not depend on the chain's state. That is the one constraint: :func:`adapt_step_sizes` looks at draws that are then
thrown away, and the kernel stays fixed afterwards. Jitter multiplies e by a factor drawn afresh, which keeps both properties.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

TARGET_ACCEPTANCE = 0.8  # above the 0.65 that is best in many dimensions (Neal 2011): latents often have few
FIRST_STEP_SIZE = 0.1
FIRST_GAIN = 3.5  # of log e a transition while the scale is sought: up to twice as long, or a sixteenth
FIRST_TRANSITIONS = 30  # at the first temperature, to find the scale by the first half
NEXT_TRANSITIONS = 10  # at each following one


@dataclass(frozen=True)
class State:
    """Positions u ``[C, B, D]`` with log q_0 and log p(x, u) there, ``[C, B]`` nats, and the gradients of both.

    Keeping the two apart makes every tempered density, and the log-ratio that annealing sums, a linear combination.
    """

    position: Tensor
    log_start: Tensor
    log_joint: Tensor
    grad_start: Tensor
    grad_joint: Tensor

    def log_density(self, temperature: float) -> Tensor:
        """log pi_b(u) = (1 - b) log q_0(u) + b log p(x, u), up to a constant, ``[C, B]`` nats; 0 < b < 1."""
        return (1 - temperature) * self.log_start + temperature * self.log_joint

    def gradient(self, temperature: float) -> Tensor:
        """grad log pi_b(u), ``[C, B, D]``."""
        return (1 - temperature) * self.grad_start + temperature * self.grad_joint

    def where(self, chosen: Tensor, other: State) -> State:
        """This state's rows where ``chosen`` ``[C, B]``, the other's elsewhere."""

        def pick(mine: Tensor, others: Tensor) -> Tensor:
            return torch.where(chosen.unsqueeze(-1) if mine.dim() > chosen.dim() else chosen, mine, others)

        return State(*(pick(getattr(self, f.name), getattr(other, f.name)) for f in fields(State)))


Density = Callable[[Tensor], State]


@dataclass(frozen=True)
class Transition:
    """Where a transition ended, the probability with which it was accepted, and whether it left the finite region."""

    state: State
    acceptance: Tensor
    diverged: Tensor


@dataclass(frozen=True)
class HamiltonianKernel:
    """One HMC transition of every chain: ``kernel(state, temperature, step_size)``.

    A trajectory that meets a density or gradient that is not finite is rejected, whichever way it runs, so that the
    target is left invariant where it is finite; ``diverged`` says so.

    Args:
        density: u ``[C, B, D]`` -> :class:`State`.
        num_leapfrog: L >= 1.
        jitter: j in [0, 1); each transition's step is multiplied by a factor uniform on [1 - j, 1 + j].

    Example:
        >>> def normal(u):  # q_0 = p = N(0, 1)
        ...     log = -0.5 * u.square().sum(-1)
        ...     return State(u, log, log, -u, -u)
        >>> kernel = HamiltonianKernel(normal, num_leapfrog=10)
        >>> moved = kernel(normal(torch.zeros(4, 3, 2)), 0.5, torch.full((3,), 0.1))
        >>> moved.state.position.shape, bool((moved.acceptance > 0.9).all())
        (torch.Size([4, 3, 2]), True)
    """

    density: Density
    num_leapfrog: int = 10
    jitter: float = 0.0

    def __call__(self, state: State, temperature: float, step_size: Tensor) -> Transition:
        """A transition at one temperature; ``step_size`` is ``[B]``."""
        shape = state.log_joint.shape
        factor = 1 + self.jitter * (2 * torch.rand_like(state.log_joint) - 1)
        step = (step_size * factor).to(state.position.dtype).unsqueeze(-1)
        momentum = torch.randn_like(state.position)
        end, end_momentum, finite = leapfrog(self.density, state, momentum, temperature, step, self.num_leapfrog)
        log_ratio = end.log_density(temperature) - state.log_density(temperature)
        log_ratio = log_ratio + 0.5 * (momentum.double().square().sum(-1) - end_momentum.double().square().sum(-1))
        log_ratio = torch.where(finite, log_ratio, torch.full(shape, -torch.inf).to(log_ratio))
        return Transition(end.where(accepted(log_ratio), state), log_ratio.clamp(max=0).exp(), ~finite)


def accepted(log_ratio: Tensor) -> Tensor:
    """The Metropolis rule: true with probability min(1, exp(log_ratio))."""
    return torch.rand_like(log_ratio).log() < log_ratio


def leapfrog(
    density: Density, state: State, momentum: Tensor, temperature: float, step: Tensor, num_steps: int
) -> tuple[State, Tensor, Tensor]:
    """Follows Hamilton's equations for ``num_steps`` steps; reversible and volume-preserving, of energy error O(step^2).

    Args:
        density: u -> :class:`State`.
        state: where it begins.
        momentum: r, ``[C, B, D]``.
        temperature: b.
        step: e, ``[C, B, 1]``.
        num_steps: L.

    Returns:
        The last state, its momentum, and which rows ``[C, B]`` met finite values only; the others are meaningless.
    """
    start = state
    finite = torch.ones_like(state.log_joint, dtype=torch.bool)
    for _ in range(num_steps):
        momentum = momentum + 0.5 * step * state.gradient(temperature)
        position = state.position + step * momentum
        finite = finite & position.isfinite().all(-1)
        # a row that is lost goes on from its start, so that programs are never asked about infinite latents
        state = density(torch.where(finite.unsqueeze(-1), position, start.position))
        gradient = state.gradient(temperature)
        finite = finite & state.log_density(temperature).isfinite() & gradient.isfinite().all(-1)
        momentum = momentum + 0.5 * step * gradient
    return state, momentum, finite


def adapt_step_sizes(
    kernel: HamiltonianKernel, state: State, temperatures: list[float], advance: Callable[[], None] = lambda: None
) -> Tensor:
    """Step sizes by temperature and datum for a mean acceptance of :data:`TARGET_ACCEPTANCE`; every draw is thrown away.

    A Robbins-Monro recursion, log e <- log e + (acceptance - target) / sqrt(n), with the acceptance averaged over the
    chains of a datum, and log e averaged over the second half of a temperature's transitions (Andrieu and Thoms 2008, "A
    tutorial on adaptive MCMC"). At the first temperature it begins with large constant gains, to find the scale.

    Args:
        kernel: the transition.
        state: chains to begin from, at the first temperature or near; not those of the run.
        temperatures: K of them, in the order in which the warm-up passes through.
        advance: called after each transition, for progress.

    Returns:
        ``[K, B]``, positive.
    """
    log_step = torch.full(state.log_joint.shape[1:], FIRST_STEP_SIZE).log().to(state.log_joint)
    found = []
    for k, temperature in enumerate(temperatures):
        path = []
        for n in range(FIRST_TRANSITIONS if k == 0 else NEXT_TRANSITIONS):
            moved = kernel(state, temperature, log_step.exp())
            state = moved.state
            seeking = k == 0 and n < FIRST_TRANSITIONS // 2
            gain = FIRST_GAIN if seeking else (n + 1) ** -0.5
            log_step = log_step + gain * (moved.acceptance.mean(0) - TARGET_ACCEPTANCE)
            path.append(log_step)
            advance()
        log_step = torch.stack(path[len(path) // 2 :]).mean(0)
        found.append(log_step.exp())
    return torch.stack(found)
