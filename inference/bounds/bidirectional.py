"""Bidirectional Monte Carlo: log p(x) between two bounds, on data simulated from the model.

    (z*, x) ~ p(z, x)    =>    z* is one exact draw of p(z | x)

Up the path of :mod:`inference.bounds.annealing`, E[w] = p(x); down it from z*, with every transition reversed and w the
same function of the path, E[1/w] = 1/p(x). By Jensen's inequality (Grosse et al. 2015, arXiv:1511.02543)

    E[log mean_c w_c]  <=  log p(x)  <=  E[mean_c log w_c*]

The upper bound averages log w over C chains that all begin at the one z*. Each has the same expectation, so their mean is
an unbiased estimate of the same bound; but they share z*, so their spread does not show what another z* would have given.
The error that does is over data, which are independent: that of :attr:`BidirectionalEvidence.mean_gap`. The one
constraint: all of this holds for data from the model itself; for other data no exact draw is known, and no upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.bounds.annealing import ROWS, AnnealedEvidence, Path, seeded
from inference.bounds.particles import make_plan
from inference.bounds.support import ZeroOutsideSupport
from inference.generated import generate
from inference.printed import Printed
from ppl_models.pair import ModelGuidePair, refuse_other_than_pair


@dataclass(frozen=True, repr=False)
class BidirectionalEvidence(Printed):
    """Both bounds on the same simulated data, nats, ``[B]``.

    ``x`` are the data ``[B, *data_shape]`` and ``lower`` the bound from annealing upwards. ``log_upper`` is the mean over
    chains of log w of the way back: E[log_upper] >= log p(x). ``chain_std_error`` is its standard error over chains for
    the z* at hand: the error from the transitions' randomness, without that from z*.
    """

    x: Tensor
    lower: AnnealedEvidence
    log_upper: Tensor
    chain_std_error: Tensor

    @property
    def gap(self) -> Tensor:
        """log_upper - log_lower ``[B]`` nats: in expectation at least zero, and zero only if both bounds are tight."""
        return self.log_upper - self.lower.log_lower

    @property
    def mean_gap(self) -> float:
        """Mean gap over data, nats: an upper bound, in expectation, on how far either bound is from log p(x)."""
        return float(self.gap.mean())

    @property
    def mean_gap_std_error(self) -> float:
        """Standard error of :attr:`mean_gap` over data (x, z*), with both ends' noise in it; infinite for one datum."""
        return float(standard_error(self.gap.flatten()))

    def table(self) -> str:
        """Both bounds and the gap between them, mean and data with the widest gaps, as text."""
        from inference.views.tables import text_table

        lower, upper, gap = (t.flatten() for t in (self.lower.log_lower, self.log_upper, self.gap))
        means = [f"{float(t.mean()):.4f}" for t in (lower, upper)]
        rows = [["mean", *means, f"{self.mean_gap:.4f}", f"+- {self.mean_gap_std_error:.4f} over data"]]
        for i in gap.argsort(descending=True, stable=True)[:ROWS].sort().values.tolist():
            rows.append([str(i), *(f"{float(t[i]):.4f}" for t in (lower, upper, gap)), ""])
        which = f"; the {ROWS} widest gaps" if len(gap) > ROWS else ""
        title = f"log p(x) from both sides, nats, {len(gap)} data simulated from the model{which}"
        return "\n".join([title, text_table(["datum", "lower", "upper", "gap", ""], rows)])


def bidirectional_evidence(
    pair: ModelGuidePair, num_data: int, *, seed: int | None = None, **annealing: Any
) -> BidirectionalEvidence:
    """Simulates data from the model and bounds their log p(x) from both sides.

    Args:
        pair: the programs; their latents continuous.
        num_data: B >= 1, data to simulate; by a pair that was given labels, at these in turn.
        seed: of every draw made here, leaving the default generator alone; None draws from the default generator.
        annealing: ``num_chains``, ``num_temperatures``, ``num_leapfrog``, ``schedule``, ``start`` and ``jitter`` as for
            :func:`inference.bounds.annealing.annealed_evidence`; both directions use the same kernel.

    Returns:
        :class:`BidirectionalEvidence`.

    Raises:
        ValueError: ``num_data`` below one, or as from ``annealed_evidence``.
        PairError: programs that cannot be annealed.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2, guide="mean_field")
        >>> both = bidirectional_evidence(pair, 5, num_temperatures=4, num_leapfrog=3, seed=0)
        >>> both.gap.shape, abs(both.mean_gap) < 0.5
        (torch.Size([5]), True)
    """
    refuse_other_than_pair(pair)
    if num_data < 1:
        raise ValueError(f"expected num_data >= 1, got {num_data}")
    pair = pair.in_turn(num_data)
    with torch.no_grad(), seeded(seed):
        trace, x = generate(pair, num_data)
        plan = make_plan(ZeroOutsideSupport()(pair.model), pair.guide, (x,), {})
        path = Path.prepare(plan, **annealing)
        lower = path.lower_bound()
        exact = path.density.encode({name: trace.nodes[name]["value"] for name in path.density.layouts})
        log_weights, _ = path.sweep(path.density(exact.expand(path.num_chains, -1, -1)), upwards=False)
    log_weights = log_weights.reshape(-1, *path.shape)
    return BidirectionalEvidence(x, lower, log_weights.mean(0), standard_error(log_weights))


def standard_error(draws: Tensor) -> Tensor:
    """Standard error of the mean of independent draws over the first dim; infinite for a single one.

    >>> float(standard_error(torch.tensor([1.0, 2.0, 3.0]))), float(standard_error(torch.ones(1)))
    (0.5773502588272095, inf)
    """
    if len(draws) < 2:
        return torch.full_like(draws.mean(0), torch.inf)
    return draws.std(0) / len(draws) ** 0.5
