"""Annealed importance sampling: log p(x) of each datum from a path of laws between the guide and the posterior.

    pi_b(z) proportional to q_0(z)^(1-b) p(x, z)^b,    0 = b_0 < b_1 < ... < b_N = 1

    z_0 ~ q_0,  z_i ~ T_i(. | z_(i-1)) with T_i leaving pi_(b_i) invariant,  i = 1..N-1

    log w = sum_{i=1..N} (b_i - b_(i-1)) [log p(x, z_(i-1)) - log q_0(z_(i-1))]

(Neal 2001, "Annealed importance sampling", arXiv:physics/9803008; for decoders Wu et al. 2017, arXiv:1611.04273). E[w] =
p(x), whatever the transitions mix, so the log of the mean of w over C chains is, in expectation, a *lower* bound on
log p(x), and tightens with C, N and L. N = 1 is plain importance weighting. T_i is Hamiltonian Monte Carlo on unconstrained
latents (:mod:`inference.bounds.hmc`). The one constraint: its step sizes come from a warm-up with chains of its own, by
datum and stretch of the path, and are fixed before the first chain that counts is drawn; so they do not bias the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from inference.bounds.hmc import FIRST_TRANSITIONS, NEXT_TRANSITIONS, HamiltonianKernel, State, adapt_step_sizes
from inference.bounds.importance import EvidenceError
from inference.bounds.latent_density import LatentDensity, Start
from inference.bounds.particles import Plan, Program, forked_rng, make_plan, seed_generators
from inference.bounds.sites import PairError
from inference.bounds.support import ZeroOutsideSupport
from inference.bounds.weights import WeightSums
from inference.printed import Printed
from inference.progress import Progress

Schedule = Literal["linear", "sigmoid"]

MAX_STRETCHES = 20  # parts of the path with step sizes of their own
WARM_UP_CHAINS = 16  # per datum, over which the acceptance is averaged
ROWS = 10  # of a table
ENOUGH_CHAINS = 0.5  # of all, that weights must be worth for their spread to be known
SIGMOID_REACH = 4.0  # delta of Wu et al. 2017, section 5


@dataclass(frozen=True, repr=False)
class AnnealedEvidence(Printed):
    """A stochastic lower bound on log p(x), by datum, in nats.

    ``log_lower`` ``[B]`` is the log of the mean over chains of w: E[log_lower] <= log p(x). ``std_error`` ``[B]`` is its
    standard error by the delta method over chains, sd(w) / (sqrt(C) mean(w)), infinite for one chain; it does not contain
    the bias of the logarithm, about -std_error^2 / 2. ``log_weights`` is ``[C, *[B]]`` and ``ess`` ``[B]`` the number of
    chains that the weights are worth. Of the transitions: ``acceptance`` ``[B]`` is the mean acceptance probability,
    ``step_size`` ``[K, *[B]]`` what was used in each of K equal stretches of the path, ``divergences`` ``[B]`` the share
    of trajectories that left the finite region and were rejected. ``num_evaluations`` counts runs of the programs'
    densities, each for all data and chains, warm-up included.
    """

    log_lower: Tensor
    std_error: Tensor
    ess: Tensor
    log_weights: Tensor
    temperatures: Tensor
    acceptance: Tensor
    step_size: Tensor
    divergences: Tensor
    num_evaluations: int
    start: Start
    plates: tuple[str, ...]
    note: str

    @property
    def log_evidence(self) -> Tensor:
        """The bound as an estimate of log p(x), under the name that :func:`inference.log_evidence` has for its own."""
        return self.log_lower

    @property
    def mean(self) -> float:
        """Mean of ``log_lower`` over data, nats."""
        return float(self.log_lower.mean())

    @property
    def mean_std_error(self) -> float:
        """Standard error of :attr:`mean` for these data; chains of different data are independent."""
        return float(self.std_error.square().sum().sqrt() / self.std_error.numel())

    @property
    def doubtful(self) -> Tensor:
        """Data whose standard error may be far too small: weights worth less than half of the chains, bool ``[B]``."""
        return self.ess < ENOUGH_CHAINS * len(self.log_weights)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against these numbers, one sentence each; empty where nothing does."""
        doubtful, size, chains = int(self.doubtful.sum()), self.ess.numel(), len(self.log_weights)
        if not doubtful:
            return ()
        return (
            f"{doubtful} of {size} data have weights worth less than {ENOUGH_CHAINS * chains:g} of {chains} chains: the bound "
            "may be loose by more than their standard error says; raise num_temperatures or num_leapfrog",
        )

    def table(self) -> str:
        """The mean over data, then the data whose chains agree least, as text."""
        from inference.views.tables import text_table

        columns = [t.flatten() for t in (self.log_lower, self.std_error, self.ess, self.acceptance, self.divergences)]
        count, chains = len(columns[0]), len(self.log_weights)
        rows = [
            [
                "mean",
                f"{self.mean:.4f}",
                f"{self.mean_std_error:.4f}",
                *(f"{float(t.mean()):.2f}" for t in columns[2:]),
                "",
            ]
        ]
        for i in columns[1].argsort(descending=True, stable=True)[:ROWS].sort().values.tolist():
            lower, error, *rest = (float(t[i]) for t in columns)
            remark = "few chains count" if rest[0] < ENOUGH_CHAINS * chains else ""
            rows.append([str(i), f"{lower:.4f}", f"{error:.4f}", *(f"{number:.2f}" for number in rest), remark])
        header = ["datum", "log p(x) >=", "+- SE", "ess", "acceptance", "divergences", ""]
        which = f"; the {ROWS} largest errors" if count > ROWS else ""
        steps = len(self.temperatures) - 1
        title = f"annealed importance sampling from the {self.start}, nats, {count} data{which}; {chains} chains, {steps} steps"
        warnings = (f"  warning: {text}" for text in self.warnings)
        return "\n".join([title, text_table(header, rows), f"  ({self.note})", *warnings])


def annealed_evidence(
    model: Program,
    guide: Program,
    *args: Any,
    num_chains: int = 16,
    num_temperatures: int = 200,
    num_leapfrog: int = 10,
    schedule: Schedule = "sigmoid",
    start: Start = "guide",
    jitter: float = 0.2,
    seed: int | None = None,
    **kwargs: Any,
) -> AnnealedEvidence:
    """Annealed importance sampling of log p(x) on any pair of Pyro programs with continuous latents and a data plate.

    Memory is that of one run of the programs with max(C, 16) particles, and of some arrays of C x B x latents, whatever N
    and L are; hand large data over in batches.

    Args:
        model: Pyro program p(x, z).
        guide: Pyro program q(z | x) over the same latents.
        args: passed to both programs.
        num_chains: C >= 1 per datum.
        num_temperatures: N >= 1, steps from q_0 to the posterior.
        num_leapfrog: L >= 1, leapfrog steps a transition.
        schedule: "sigmoid" (fine at both ends) or "linear"; see :func:`temperatures`.
        start: q_0, the "guide" or the "prior".
        jitter: in [0, 1), how far each transition's step size is scattered about the adapted one.
        seed: of every draw made here, leaving the default generator alone; None draws from the default generator.
        kwargs: passed to both programs.

    Returns:
        :class:`AnnealedEvidence`, nats, of the shape [B] of the plates that all sites share.

    Raises:
        ValueError: fewer than one chain, temperature or leapfrog step, or an unknown schedule or start.
        PairError: programs that cannot be annealed (no data plate, a discrete latent, ...); the message names the site.
        EvidenceError: a datum of which every chain has weight zero, or one an infinite weight; the message names it.
        PairError: the guide, if chains start there, draws latents outside the model's support; the message names the site.
        NotANumberError: a log-density is NaN at the first draws; the message names site and datum.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2, guide="mean_field")
        >>> x = pair.model(size=4).detach()
        >>> ais = annealed_evidence(pair.model, pair.guide, x, num_temperatures=4, num_leapfrog=3, seed=0)
        >>> bool(((ais.log_lower - pair.log_evidence(x)).abs() < 6 * ais.std_error + 1e-3).all())
        True
    """
    with torch.no_grad(), seeded(seed):
        plan = make_plan(ZeroOutsideSupport()(model), guide, args, kwargs)
        path = Path.prepare(plan, num_chains, num_temperatures, num_leapfrog, schedule, start, jitter)
        return path.lower_bound()


def temperatures(num: int, schedule: Schedule = "sigmoid") -> Tensor:
    """b_0 = 0 .. b_N = 1, ``[N + 1]`` float64, increasing.

    linear: b_i = i / N. sigmoid: b_i = (s_i - s_0) / (s_N - s_0), s_i = 1 / (1 + exp(-delta (2 i / N - 1))), delta = 4 (Wu
    et al. 2017, section 5; Grosse et al. 2015, arXiv:1511.02543).

    Example:
        >>> temperatures(4, "linear").tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
        >>> [round(b, 3) for b in temperatures(4).tolist()]
        [0.0, 0.105, 0.5, 0.895, 1.0]
    """
    _at_least_one("num_temperatures", num)
    if schedule not in ("linear", "sigmoid"):
        raise ValueError(f"expected schedule 'linear' or 'sigmoid', got {schedule!r}")
    line = torch.linspace(0, 1, num + 1, dtype=torch.float64)
    if schedule == "linear":
        return line
    s = torch.sigmoid(SIGMOID_REACH * (2 * line - 1))
    return (s - s[0]) / (s[-1] - s[0])


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draws from torch's generators as seeded, and restores them; with None nothing is changed."""
    if seed is None:
        yield
    else:
        with forked_rng():
            seed_generators(seed)
            yield


@dataclass(frozen=True)
class Path:
    """The path from q_0 to the posterior with its transitions, adapted and fixed: what both directions share."""

    density: LatentDensity
    temperatures: Tensor
    kernel: HamiltonianKernel
    step_size: Tensor
    num_chains: int

    @classmethod
    def prepare(
        cls,
        plan: Plan,
        num_chains: int = 16,
        num_temperatures: int = 200,
        num_leapfrog: int = 10,
        schedule: Schedule = "sigmoid",
        start: Start = "guide",
        jitter: float = 0.2,
    ) -> Path:
        """Checks the options, and adapts step sizes with chains that are then thrown away; see the module."""
        _at_least_one("num_chains", num_chains)
        _at_least_one("num_leapfrog", num_leapfrog)
        if start not in ("guide", "prior"):
            raise ValueError(f"expected start 'guide' or 'prior', got {start!r}")
        if not 0 <= jitter < 1:
            raise ValueError(f"expected jitter in [0, 1), got {jitter}")
        betas = temperatures(num_temperatures, schedule)
        density = LatentDensity(plan, start)
        kernel = HamiltonianKernel(density, num_leapfrog, jitter)
        first = density(density.draw(WARM_UP_CHAINS))
        _check_deterministic(density, first)
        moves = num_temperatures - 1
        stretches = min(moves, MAX_STRETCHES)
        middles = [float(betas[1 + (2 * k + 1) * moves // (2 * stretches)]) for k in range(stretches)]
        if not middles:
            return cls(density, betas, kernel, first.log_joint.new_empty(0, first.log_joint.shape[1]), num_chains)
        with Progress(
            "warming up", FIRST_TRANSITIONS + NEXT_TRANSITIONS * (stretches - 1), unit="transitions"
        ) as progress:
            steps = adapt_step_sizes(kernel, first, middles, progress.advance)
        return cls(density, betas, kernel, steps, num_chains)

    def lower_bound(self) -> AnnealedEvidence:
        """Fresh chains from q_0 up the path."""
        log_weights, counts = self.sweep(self.density(self.density.draw(self.num_chains)), upwards=True)
        sums = WeightSums()
        sums.add(log_weights)
        lost = (sums.log_mean == -torch.inf).reshape(self.shape).nonzero()
        if len(lost):
            raise EvidenceError(
                f"expected a chain of weight above zero for each datum, got none for datum {lost[0].tolist()}: "
                f"the {self.density.start} draws only latents under which the model cannot give these data"
            )
        return AnnealedEvidence(
            log_lower=sums.log_mean.reshape(self.shape),
            std_error=sums.std_error.reshape(self.shape),
            ess=sums.ess.reshape(self.shape),
            log_weights=log_weights.reshape(-1, *self.shape),
            temperatures=self.temperatures,
            acceptance=counts.acceptance.reshape(self.shape),
            step_size=self.step_size.reshape(-1, *self.shape),
            divergences=counts.diverged.reshape(self.shape),
            num_evaluations=self.density.evaluations,
            start=self.density.start,
            plates=tuple(name for name, _, _ in self.density.plan.shared),
            note=self.density.plan.note.replace("particles", "chains"),
        )

    def sweep(self, state: State, upwards: bool) -> tuple[Tensor, TransitionMeans]:
        """log w ``[C, B]`` of chains that run the path from where they are, and means over their transitions.

        Upwards from z_0 ~ q_0 as in the module's formula; downwards from z_(N-1) ~ p(z | x), with the same transitions in
        reverse order, each of which is its own reverse. log w is the same function of z_0 .. z_(N-1) either way.
        """
        betas, last = self.temperatures.tolist(), len(self.temperatures) - 1
        increments = self.temperatures.diff().tolist()
        log_weights = torch.zeros_like(state.log_joint)
        acceptance = diverged = torch.zeros_like(log_weights[0])
        with Progress("annealing" if upwards else "annealing back", last, unit="temperatures") as progress:
            for i in range(1, last + 1) if upwards else range(last, 0, -1):
                log_weights = log_weights + increments[i - 1] * (state.log_joint - state.log_start)
                between = i if upwards else i - 1  # the law between this increment and the next
                if 0 < between < last:
                    moved = self.kernel(state, betas[between], self.step_size_at(between))
                    state = moved.state
                    acceptance = acceptance + moved.acceptance.mean(0) / (last - 1)
                    diverged = diverged + moved.diverged.double().mean(0) / (last - 1)
                progress.advance()
        bad = (log_weights.isnan() | (log_weights == torch.inf)).any(0).reshape(self.shape).nonzero()
        if len(bad):
            raise EvidenceError(
                f"expected weights that are numbers, got an infinite or undefined one for datum {bad[0].tolist()}: a site or "
                "factor of the model gives an infinite log-density there"
            )
        return log_weights, TransitionMeans(acceptance, diverged)

    def step_size_at(self, i: int) -> Tensor:
        """The step sizes ``[B]`` of transition T_i, i = 1..N-1."""
        return self.step_size[(i - 1) * len(self.step_size) // (len(self.temperatures) - 2)]

    @property
    def shape(self) -> torch.Size:
        """[B], the shape of the shared plates."""
        return self.density.plan.shape


@dataclass(frozen=True)
class TransitionMeans:
    """Acceptance probability and share of divergent trajectories, ``[B]``, over transitions and chains."""

    acceptance: Tensor
    diverged: Tensor


def _check_deterministic(density: LatentDensity, first: State) -> None:
    """Refuses programs whose density at given latents is random, as under dropout."""
    again = density(first.position)
    tolerance = torch.finfo(first.position.dtype).eps ** 0.5
    for before, after in ((first.log_joint, again.log_joint), (first.log_start, again.log_start)):
        if not torch.allclose(before, after, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise PairError(
                "expected the same log-density for the same latents, got two values: the programs draw something beside "
                "their latents (dropout?); put modules into evaluation mode with .eval()"
            )


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"expected {name} >= 1, got {value}")
