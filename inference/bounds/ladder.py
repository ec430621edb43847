"""The ladder of bounds on log p(x): how good is the bound, the guide, the model?

    ELBO  <=  IWAE-K  <=  IWAE-K'  <=  log p(x)  <=  reverse AIS        (in expectation, K < K')
                          AIS      <=  log p(x)

Every rung is averaged over data and has a standard error: the ELBO and IWAE-K from draws of the guide (Burda et al. 2016,
arXiv:1509.00519, Theorem 1), annealed importance sampling (:mod:`.annealing`), the exact
evidence where the pair has one, and, on data simulated from the model, annealing back from an exact posterior draw
(:mod:`.bidirectional`). The differences between rungs have names: log p(x) - ELBO = KL(q(z | x) || p(z | x)) is the
inference gap. The one constraint: each inequality above is a theorem about expectations, so the order is judged in
standard errors; that AIS stands above IWAE-K is usual and no theorem, and is reported apart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import scipy.stats
import torch
from torch import Tensor

from inference.bounds.annealing import AnnealedEvidence, annealed_evidence, seeded
from inference.bounds.bidirectional import bidirectional_evidence, standard_error
from inference.bounds.importance import log_evidence
from inference.printed import Printed
from ppl_models.arguments import whole_numbers
from ppl_models.pair import ModelGuidePair, refuse_other_than_pair

FALSE_ALARM = 1e-6  # probability that a ladder in order fails its check, over all comparisons
ROUNDING_STEPS = 64  # units in the last place of a log-density that rounding may move a rung


@dataclass(frozen=True)
class Rung:
    """One number of the ladder: ``values`` ``[B]`` nats, their ``mean``, and its standard error for these data.

    ``kind`` says whether it is a lower bound in expectation, exact, or an upper bound in expectation. The error of the
    upper bound is that of its mean distance, over data, from the exact value or else from AIS. ``std_errors`` ``[B]`` are those
    of each datum, ``doubtful`` where they may be far too small (None: nowhere), and ``doubt`` says why.
    """

    name: str
    kind: Literal["lower", "exact", "upper"]
    values: Tensor
    mean: float
    mean_std_error: float
    meaning: str
    std_errors: Tensor | None = None
    doubtful: Tensor | None = None
    doubt: str = ""

    def error_over(self, data: Tensor) -> float:
        """Standard error of the mean over some of the data, a bool mask ``[B]``."""
        assert self.std_errors is not None
        return float(self.std_errors[data].square().sum().sqrt()) / int(data.sum())


@dataclass(frozen=True)
class Gap:
    """The distance from one rung up to another, nats, mean over data, with its standard error and its name."""

    name: str
    below: str
    above: str
    value: float
    std_error: float


@dataclass(frozen=True)
class LadderCheck:
    """Whether the rungs stand in order, each pair judged at ``threshold`` standard errors.

    ``z_values`` maps (lower rung, higher rung) to (difference / its standard error): at least -threshold if in order.
    ``violations`` are sentences on broken theorems, ``remarks`` on AIS below another lower bound, which is none, and on rungs
    out of order whose standard errors are in doubt, which proves nothing.
    """

    holds: bool
    z_values: dict[tuple[str, str], float]
    threshold: float
    violations: tuple[str, ...]
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        least = f"least z {min(self.z_values.values()):+.2f}, allowed {-self.threshold:.2f}"
        text = f"order holds: {least}" if self.holds else f"order broken: {'; '.join(self.violations)} ({least})"
        return "; ".join([text, *self.remarks])


@dataclass(frozen=True, repr=False)
class Ladder(Printed):
    """Bounds on the mean log p(x) of the same data, in their order; nats unless the name ends in ``_bits_per_dim``.

    ``data`` is what they are of, ``[B, *data_shape]``, and ``simulated`` whether it came from the model. ``resolution``
    is the difference in nats that rounding can make. ``notes`` say what each estimate cost and what speaks against it.
    """

    rungs: tuple[Rung, ...]
    data: Tensor
    simulated: bool
    num_dims: int
    resolution: float
    notes: tuple[str, ...]

    def __getitem__(self, name: str) -> Rung:
        for rung in self.rungs:
            if rung.name == name:
                return rung
        raise KeyError(f"expected a rung among {', '.join(rung.name for rung in self.rungs)}, got {name!r}")

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """Named distances between rungs; those to log p(x) only where it is exact."""
        names = [rung.name for rung in self.rungs]
        widest = [name for name in names if name.startswith("IWAE")][-1]
        wanted = [
            (f"closed by {widest.removeprefix('IWAE-')} draws", "ELBO", widest),
            ("closed by annealing", widest, "AIS"),
            ("inference gap: KL(q || posterior)", "ELBO", "exact"),
            ("inference gap, at least", "ELBO", "AIS"),
            ("inference gap, at most", "ELBO", "reverse AIS"),
            ("left open by annealing", "AIS", "exact"),
            ("slack of the upper bound", "exact", "reverse AIS"),
            ("bidirectional gap: log p(x) is within", "AIS", "reverse AIS"),
        ]
        known = "exact" in names
        return tuple(
            self._gap(name, below, above)
            for name, below, above in wanted
            if {below, above} <= set(names) and not (known and name.startswith("inference gap, "))
        )

    def bits_per_dim(self, name: str) -> float:
        """-nats / (D log 2) of a rung's mean, D numbers a datum: lower is better, so the ladder is upside down."""
        return -self[name].mean / (self.num_dims * math.log(2))

    def check(self) -> LadderCheck:
        """Judges the order of every two rungs, at a false-alarm rate of :data:`FALSE_ALARM` for all together."""
        pairs = list(itertools.combinations(self.rungs, 2))
        threshold = float(scipy.stats.norm.isf(FALSE_ALARM / len(pairs)))
        z_values, violations, remarks = {}, [], []
        for below, above in pairs:
            gap = self._gap("", below.name, above.name)
            z = gap.value / math.hypot(gap.std_error, self.resolution)
            z_values[below.name, above.name] = z
            if z < -threshold:
                text = f"{above.name} is {-gap.value:.3g} nats below {below.name} (z {z:.1f})"
                if not self._is_broken_where_known(below, above, threshold):
                    remarks.append(f"{text}, but its error is in doubt: {above.doubt or below.doubt}")
                elif above.name == "AIS":
                    remarks.append(f"{text}, against no theorem: raise num_temperatures or num_leapfrog")
                else:
                    violations.append(text)
        return LadderCheck(not violations, z_values, threshold, tuple(violations), tuple(remarks))

    def _is_broken_where_known(self, below: Rung, above: Rung, threshold: float) -> bool:
        """Whether two rungs that are out of order are so on the data whose errors are known."""
        known = torch.ones_like(above.values, dtype=torch.bool)
        for rung in (below, above):
            known = known if rung.doubtful is None else known & ~rung.doubtful
        if bool(known.all()) or not bool(known.any()):
            return bool(known.all())
        error = math.hypot(below.error_over(known), above.error_over(known), self.resolution)
        return float((above.values - below.values)[known].mean()) < -threshold * error

    def table(self) -> str:
        """The rungs, their gaps and whether the order holds, as text."""
        from inference.views.ladder import ladder_table

        return ladder_table(self)

    def _gap(self, name: str, below: str, above: str) -> Gap:
        low, high = self[below], self[above]
        error = math.hypot(low.mean_std_error, high.mean_std_error)
        return Gap(name, below, above, high.mean - low.mean, error)


def evidence_ladder(
    pair: ModelGuidePair,
    x: Tensor | None = None,
    *,
    num_data: int | None = None,
    num_particles: Sequence[int] = (10, 100, 1000),
    seed: int | None = None,
    **annealing: Any,
) -> Ladder:
    """ELBO, IWAE-K, AIS, the exact evidence where known, and reverse AIS on simulated data, of the same data.

    Args:
        pair: the programs; their latents continuous. Networks with dropout belong in ``eval()`` mode.
        x: data ``[B, *data_shape]``; or give ``num_data``.
        num_data: how many data to simulate from the model: these have an upper bound too. By a pair that was given labels, at
            these in turn.
        num_particles: the K of IWAE-K, at least one; the ELBO is from the draws of the largest.
        seed: of every draw made here, leaving the default generator alone; None draws from the default generator.
        annealing: options of :func:`inference.bounds.annealing.annealed_evidence`.

    Returns:
        :class:`Ladder`.

    Raises:
        ValueError: neither or both of ``x`` and ``num_data``, data that the pair's likelihood cannot take, or an option
            out of range.
        PairError: programs that cannot be annealed; the message names the site.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2, guide="mean_field")
        >>> ladder = evidence_ladder(
        ...     pair, num_data=4, num_particles=[10, 100], num_temperatures=4, num_leapfrog=3, seed=0
        ... )
        >>> [rung.name for rung in ladder.rungs], ladder.check().holds
        (['ELBO', 'IWAE-10', 'IWAE-100', 'AIS', 'exact', 'reverse AIS'], True)
    """
    refuse_other_than_pair(pair)
    counts = sorted(set(whole_numbers("num_particles", num_particles)))
    if not counts or counts[0] < 1:
        raise ValueError(f"expected num_particles with at least one K >= 1, got {list(num_particles)}")
    with torch.no_grad(), seeded(seed):
        if x is None and num_data is not None:
            pair = pair.in_turn(num_data)
            both = bidirectional_evidence(pair, num_data, **annealing)
            return _build(pair, both.x, counts, both.lower, both.log_upper)
        if x is not None and num_data is None:
            pair.check_data(x)
            annealed = annealed_evidence(pair.model, pair.guide, x, **annealing)
            return _build(pair, x, counts, annealed, upper=None)
    got = "neither" if x is None else "both"
    raise ValueError(f"expected either data x or num_data to simulate, got {got}: pass one of them")


def _build(
    pair: ModelGuidePair, x: Tensor, counts: list[int], annealed: AnnealedEvidence, upper: Tensor | None
) -> Ladder:
    rungs = []
    for k in counts:
        e = log_evidence(pair.model, pair.guide, x, num_particles=k)
        meaning = f"log of the mean of {k} importance weights"
        doubt = _doubt(e.doubtful, "k-hat above 0.7 or errors above 0.5 nats")
        mean = float(e.log_evidence.mean())
        name = f"IWAE-{k}"
        rungs.append(
            Rung(name, "lower", e.log_evidence, mean, e.mean_std_error, meaning, e.std_error, e.doubtful, doubt)
        )
    error = float(e.elbo_std_error.square().sum().sqrt()) / e.elbo.numel()
    nowhere = torch.zeros_like(e.doubtful)
    meaning = f"mean of the log of {counts[-1]} importance weights"
    elbo = Rung("ELBO", "lower", e.elbo, float(e.elbo.mean()), error, meaning, e.elbo_std_error, nowhere)
    rungs.insert(0, elbo)
    notes = [f"IWAE-{counts[-1]}: {warning}" for warning in e.warnings]
    meaning = f"annealed importance sampling, {_settings(annealed)}"
    doubt = _doubt(annealed.doubtful, "weights worth less than half of their chains")
    rungs.append(
        Rung(
            "AIS",
            "lower",
            annealed.log_lower,
            annealed.mean,
            annealed.mean_std_error,
            meaning,
            annealed.std_error,
            annealed.doubtful,
            doubt,
        )
    )
    notes += [f"AIS: {_transitions(annealed)}", *(f"AIS: {warning}" for warning in annealed.warnings)]
    reference = annealed.log_lower
    exact = getattr(pair, "log_evidence", None)
    if exact is not None:
        reference = exact(x).double()
        known, mean = torch.zeros_like(reference), float(reference.mean())
        rungs.append(Rung("exact", "exact", reference, mean, 0.0, "log p(x) in closed form", known, nowhere))
    if upper is not None:
        error = float(standard_error((upper - reference).flatten()))
        each = torch.full_like(upper, error * math.sqrt(upper.numel()))  # of one datum: the spread over data
        meaning = "the same path, back from an exact posterior draw"
        rungs.append(Rung("reverse AIS", "upper", upper, float(upper.mean()), error, meaning, each, nowhere))
    epsilon = torch.finfo(next(iter(pair.parameters()), torch.empty(0)).dtype).eps
    resolution = ROUNDING_STEPS * epsilon * max(1.0, *(abs(rung.mean) for rung in rungs))
    return Ladder(tuple(rungs), x, upper is not None, max(1, pair.data_shape.numel()), resolution, tuple(notes))


def _doubt(doubtful: Tensor, reason: str) -> str:
    count = int(doubtful.sum())
    return f"{count} of {doubtful.numel()} data have {reason}" if count else ""


def _settings(annealed: AnnealedEvidence) -> str:
    chains, steps = len(annealed.log_weights), len(annealed.temperatures) - 1
    return f"{chains} {'chain' if chains == 1 else 'chains'}, {steps} temperatures from the {annealed.start}"


def _transitions(annealed: AnnealedEvidence) -> str:
    text = f"{annealed.num_evaluations} evaluations of the programs"
    if len(annealed.step_size):
        low, high = float(annealed.acceptance.min()), float(annealed.acceptance.max())
        text += f"; acceptance by datum {low:.2f} to {high:.2f}"
    lost = float(annealed.divergences.max())
    return text + (f"; up to {lost:.1%} of a datum's trajectories diverged and were rejected" if lost > 0 else "")
