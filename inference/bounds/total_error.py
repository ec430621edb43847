"""Total error = modelling error + inference error, on data whose density is known (lecture notes 004).

    KL(q(x, z) || p(x, z))  =  KL(p_data || p)  +  E_{p_data(x)}[KL(q(z | x) || p(z | x))],    q(x, z) = p_data(x) q(z | x)
    total error             =  modelling error  +  inference error

The three are means over x ~ p_data of log p_data(x) - ELBO(x), log p_data(x) - log p(x) and log p(x) - ELBO(x).

Conventions. Nats per datum; standard errors are over the data and hold the draws' own noise. The total is estimated from
draws of the whole joint, the inference error from a second, independent set with closed-form KL terms where these are
valid: their difference, ``residual``, compares the two. It says nothing of log p(x), which cancels in it; that a divergence
comes out below zero does. The one constraint: x are independent draws of p_data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.bounds.decomposition import decompose_elbo
from inference.bounds.gaps import EvidenceEstimate, refuse_not_finite
from inference.bounds.joint import data_plan, log_ratio
from inference.bounds.moments import Moments
from inference.printed import Printed
from inference.training.densities import log_density
from inference.views.tables import text_table
from ppl_models.pair import ModelGuidePair, refuse_other_than_pair

IMPOSSIBLE = 5.0  # standard errors below zero at which a divergence is none
ROUNDING = 1e-4  # relative, of densities in float32


@dataclass(frozen=True, repr=False)
class TotalError(Printed):
    """The three errors in nats, means over data, with standard errors.

    ``residual`` = total - (modelling + inference), whose standard error is that of the draws of z alone (the same data
    are in all three). ``evidence_is_bound``: log p(x) was estimated, from below.
    """

    total: float
    total_std_error: float
    modelling: float
    modelling_std_error: float
    inference: float
    inference_std_error: float
    residual: float
    residual_std_error: float
    num_data: int
    evidence_is_bound: bool = False
    evidence_warnings: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against these numbers, one sentence each; empty where nothing does."""
        found = list(self.evidence_warnings)
        causes = {
            "modelling": "log_evidence is too high, or the data are not drawn from the density",
            "inference": "log_evidence is too low",
        }
        for name, cause in causes.items():
            value, error = getattr(self, name), getattr(self, f"{name}_std_error")
            if value < -(IMPOSSIBLE * error + ROUNDING * (1 + abs(self.total))):
                found.append(
                    f"the {name} error is a divergence, and {value:.3g} +- {error:.2g} is far below zero: {cause}"
                )
        return tuple(found)

    @property
    def z_score(self) -> float:
        """The residual in standard errors: of order one if the identity holds. Zero where rounding is all there is."""
        if abs(self.residual) <= 1e-9 * (1 + abs(self.total)):
            return 0.0
        return (
            self.residual / self.residual_std_error
            if self.residual_std_error > 0
            else math.copysign(math.inf, self.residual)
        )

    def table(self) -> str:
        """The three numbers and the identity as text."""
        rows = [
            ("modelling error  KL(p_data || p)", self.modelling, self.modelling_std_error),
            ("inference error  E KL(q(z|x) || p(z|x))", self.inference, self.inference_std_error),
            ("total error      KL(q(x,z) || p(x,z))", self.total, self.total_std_error),
            ("total - (modelling + inference)", self.residual, self.residual_std_error),
        ]
        cells = [[name, f"{value:.4f}", f"{error:.4f}"] for name, value, error in rows]
        text = text_table([f"nats, mean over {self.num_data} data", "value", "+- SE"], cells)
        lines = [text, f"  (z of the last row {self.z_score:+.2f}: total and inference error have draws of their own)"]
        if self.evidence_is_bound:
            lines.append("  log p(x) is a lower bound: modelling error at most, inference error at least as shown")
        return "\n".join([*lines, *(f"  warning: {each}" for each in self.warnings)])


def total_error(
    pair: ModelGuidePair,
    x: Tensor,
    density: str | Callable[[Tensor], Tensor],
    log_evidence: Tensor | EvidenceEstimate | None = None,
    *,
    num_particles: int = 100,
) -> TotalError:
    """KL(q(x, z) || p(x, z)) and its two parts, on data with a known density.

    Args:
        pair: the programs.
        x: data ``[N, *data_shape]``, drawn independently from the density.
        density: log p_data: a function ``[N, *data_shape]`` -> ``[N]`` nats, or the name of a toy density of
            :data:`inference.training.densities.TOY_DENSITIES`. Of a pair that was given labels, that of x given its label.
        log_evidence: log p(x): a tensor ``[N]`` where it is exact, or an estimate with ``log_evidence``. None calls
            :func:`inference.log_evidence`; as that is a lower bound, the modelling error is then an upper bound and the
            inference error a lower bound.
        num_particles: draws of z for each datum.

    Returns:
        :class:`TotalError`.

    Raises:
        ValueError: fewer than two data, an evidence or density of another shape, an evidence that is not finite, an unknown
            name, or data to which the density gives no probability.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)
        >>> x = pair.model(size=10).detach()  # data of the model itself, and an exact guide: no error of any kind
        >>> errors = total_error(pair, x, lambda x: pair.log_evidence(x), pair.log_evidence(x), num_particles=10)
        >>> abs(errors.total) < 1e-4, abs(errors.modelling) < 1e-4, abs(errors.z_score) < 6
        (True, True, True)
    """
    refuse_other_than_pair(pair)
    pair.check_data(x)
    if len(x) < 2:
        raise ValueError(f"expected at least two data, got {len(x)}: one has no standard error")
    if isinstance(density, str) and pair.labels is not None:
        raise ValueError(
            f"expected the density of x given its label, for the pair was given labels, got {density!r}, which is that of x "
            "alone: pass a function"
        )
    with torch.no_grad():
        log_data = log_density(density, x) if isinstance(density, str) else density(x)
        log_data = _per_datum("density", log_data, len(x))
        if not bool(log_data.isfinite().all()):
            index = int((~log_data.isfinite()).nonzero()[0])
            raise ValueError(
                f"expected data with a finite log density, got {float(log_data[index])} at datum {index}: pass data drawn "
                "from this density, scaled as it is"
            )
        if log_evidence is None:
            from inference.bounds.importance import log_evidence as importance_weighted

            log_evidence = importance_weighted(pair.model, pair.guide, x, num_particles=10 * num_particles)
        value = log_evidence if isinstance(log_evidence, Tensor) else log_evidence.log_evidence
        evidence = _per_datum("log_evidence", value, len(x))
        refuse_not_finite(evidence)
        drawn = Moments()
        for particles in data_plan(pair, x).chunks(num_particles):
            drawn.add(log_ratio(particles))
        bound = decompose_elbo(pair.model, pair.guide, x, num_particles=num_particles)
    total = log_data - drawn.mean
    modelling = log_data - evidence
    inference = evidence - bound.elbo.to(torch.float64)
    noise = (drawn.std_error.square() + bound.std_error.square()).sum().sqrt() / len(x)
    return TotalError(
        *_mean_and_error(total),
        *_mean_and_error(modelling),
        *_mean_and_error(inference),
        float((total - modelling - inference).mean()),
        float(noise),
        len(x),
        not isinstance(log_evidence, Tensor),
        tuple(getattr(log_evidence, "warnings", ())),
    )


def _per_datum(name: str, values: Tensor, count: int) -> Tensor:
    if values.shape != (count,):
        raise ValueError(f"expected {name} of shape [N] = [{count}], got {list(values.shape)}: one number per datum")
    return values.detach().to(torch.float64)


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))
