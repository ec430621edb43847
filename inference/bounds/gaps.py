"""The inference gap of each datum, split into what the family cannot do and what amortisation loses.

    log p(x) - ELBO(x)  =  [log p(x) - ELBO*(x)]  +  [ELBO*(x) - ELBO(x)]
    inference gap       =  approximation gap       +  amortisation gap

ELBO* is the bound of the best guide of the same family for that datum alone (:mod:`inference.bounds.refinement`). Cremer,
Li and Duvenaud 2018, arXiv:1801.03558, eqs. 5 and 6. The inference gap is KL(q(z | x) || p(z | x)); lecture notes 004.

Conventions. All in nats per datum. The bounds are estimated on common random numbers, so the amortisation gap is much
more precise than either. The one constraint: where the evidence is itself an importance-weighted *bound*, the
approximation gap is too small by what that bound lacks; and ELBO* is as good as its search. Where the search did not
converge, the approximation gap is an upper bound and the amortisation gap a lower one, and the table says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from inference.bounds.joint import data_plan, paired_bounds
from inference.bounds.refinement import Refinement, refine_guide
from inference.printed import Printed
from inference.views.tables import text_table
from ppl_models.pair import ModelGuidePair


@runtime_checkable
class EvidenceEstimate(Protocol):
    """What :func:`inference.log_evidence` returns, as far as a gap needs it: log p(x) ``[B]`` and its standard error."""

    @property
    def log_evidence(self) -> Tensor:
        """log p(x) or a lower bound of it, ``[B]`` nats."""

    @property
    def std_error(self) -> Tensor:
        """Its standard error, ``[B]`` nats."""


@dataclass(frozen=True, repr=False)
class InferenceGap(Printed):
    """log p(x) - ELBO(x) of each datum and its two parts; ``[B]`` nats each, with standard errors.

    Both gaps are at least zero up to their errors (an amortisation gap below zero means that the search did not converge).
    ``evidence_is_bound``: log p(x) was estimated, from below. ``warnings`` are those of that estimate.
    """

    elbo: Tensor
    elbo_std_error: Tensor
    refined_elbo: Tensor
    refined_elbo_std_error: Tensor
    log_evidence: Tensor
    log_evidence_std_error: Tensor
    amortisation_gap: Tensor
    amortisation_gap_std_error: Tensor
    refinement: Refinement
    evidence_is_bound: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def approximation_gap(self) -> Tensor:
        """log p(x) - ELBO*(x)."""
        return self.log_evidence - self.refined_elbo

    @property
    def approximation_gap_std_error(self) -> Tensor:
        """Standard error of :attr:`approximation_gap`: evidence and refined bound come from independent draws."""
        return (self.log_evidence_std_error.square() + self.refined_elbo_std_error.square()).sqrt()

    @property
    def gap(self) -> Tensor:
        """log p(x) - ELBO(x) = KL(q(z | x) || p(z | x))."""
        return self.log_evidence - self.elbo

    @property
    def gap_std_error(self) -> Tensor:
        """Standard error of :attr:`gap`."""
        return (self.log_evidence_std_error.square() + self.elbo_std_error.square()).sqrt()

    def table(self) -> str:
        """Means over the data as text, with the errors that the draws leave, and how the search went."""
        rows = [
            ("log p(x)", self.log_evidence, self.log_evidence_std_error),
            ("ELBO of the best guide of the family", self.refined_elbo, self.refined_elbo_std_error),
            ("ELBO", self.elbo, self.elbo_std_error),
            ("approximation gap", self.approximation_gap, self.approximation_gap_std_error),
            ("amortisation gap", self.amortisation_gap, self.amortisation_gap_std_error),
            ("inference gap", self.gap, self.gap_std_error),
        ]
        cells = [[name, f"{float(v.mean()):.4f}", f"{_error_of_mean(e):.4f}"] for name, v, e in rows]
        text = text_table(["nats, mean over data", "value", "+- SE"], cells)
        bound = "log p(x) is a lower bound"
        if not self.refinement.converged and not self.evidence_is_bound:
            text += "\n  the split is a bound only: approximation gap at most, amortisation gap at least as shown"
        elif not self.refinement.converged:
            text += (
                f"\n  {bound} and the search did not converge: inference and amortisation gap are at least as shown, the "
                "approximation gap may be either side of it"
            )
        elif self.evidence_is_bound:
            text += f"\n  {bound}: approximation and inference gap are at least as shown"
        return "\n".join([text, f"  ({self.refinement.words()})", *(f"  warning: {each}" for each in self.warnings)])


def inference_gap(
    pair: ModelGuidePair,
    x: Tensor,
    log_evidence: Tensor | EvidenceEstimate | None = None,
    *,
    num_particles: int = 1000,
    steps: int = 500,
    learning_rate: float = 0.05,
    max_steps: int | None = None,
) -> InferenceGap:
    """Splits log p(x) - ELBO(x) into approximation gap and amortisation gap, datum by datum.

    Args:
        pair: the programs; each guide law has a location and a scale.
        x: data ``[B, *data_shape]``.
        log_evidence: log p(x): a tensor ``[B]`` where it is exact, or an estimate with ``log_evidence`` and ``std_error``.
            None draws 5 ``num_particles`` importance weights under the *refined* guide, by
            :func:`inference.log_evidence`, which gives a lower bound.
        num_particles: draws for each bound.
        steps: Adam steps of the search's first round, see :func:`refine_guide`; rounds follow until it has converged.
        learning_rate: Adam's first rate in each round.
        max_steps: of the search in all; None for 16 ``steps``.

    Returns:
        :class:`InferenceGap`; its ``refinement.converged`` tells whether the split can be trusted.

    Raises:
        NotRefinableError: a guide law has no location and scale.
        ValueError: ``num_particles`` below 2, an evidence of another shape than ``[B]`` or not finite, or a search that
            :func:`refine_guide` refuses.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)  # the guide is the posterior: no gap at all
        >>> x = pair.model(size=4).detach()
        >>> gap = inference_gap(pair, x, pair.log_evidence(x).detach(), num_particles=10, steps=20)
        >>> bool(gap.gap.abs().max() < 1e-3), bool(gap.amortisation_gap.abs().max() < 0.05)
        (True, True)
    """
    if num_particles < 2:
        raise ValueError(f"expected num_particles >= 2, got {num_particles}: one draw has no standard error")
    if log_evidence is not None:
        _evidence(log_evidence, len(x))
    refinement = refine_guide(pair, x, steps=steps, learning_rate=learning_rate, max_steps=max_steps)
    with torch.no_grad():
        own, best = data_plan(pair, x), data_plan(pair, x, refinement.guide)
        elbo, refined, difference = paired_bounds(own, best, num_particles)
    if log_evidence is None:
        from inference.bounds.importance import log_evidence as importance_weighted

        log_evidence = importance_weighted(pair.model, refinement.guide, x, num_particles=5 * num_particles)
    evidence, evidence_error = _evidence(log_evidence, len(x))
    return InferenceGap(
        elbo.mean,
        elbo.std_error,
        refined.mean,
        refined.std_error,
        evidence,
        evidence_error,
        difference.mean,
        difference.std_error,
        refinement,
        not isinstance(log_evidence, Tensor),
        tuple(getattr(log_evidence, "warnings", ())),
    )


def _evidence(given: Tensor | EvidenceEstimate, count: int) -> tuple[Tensor, Tensor]:
    """log p(x) and its standard error, ``[B]`` in float64; the error of a tensor is zero."""
    value = given if isinstance(given, Tensor) else given.log_evidence
    if value.shape != (count,):
        raise ValueError(
            f"expected log_evidence of shape [B] = [{count}], got {list(value.shape)}: one number per datum"
        )
    value = value.detach().to(torch.float64)
    refuse_not_finite(value)
    error = torch.zeros_like(value) if isinstance(given, Tensor) else given.std_error.detach().to(torch.float64)
    return value, error


def refuse_not_finite(log_evidence: Tensor) -> None:
    """Raises ValueError at the first datum whose log p(x) is NaN or infinite."""
    bad = ~log_evidence.isfinite()
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(
            f"expected a finite log_evidence, got {float(log_evidence[i])} at datum {i}: leave that datum out"
        )


def _error_of_mean(errors: Tensor) -> float:
    return float(errors.square().sum().sqrt() / len(errors))
