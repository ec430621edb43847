"""The best guide of the same family for each datum alone: what the guide would say without amortisation.

A guide's law at a latent site has a location and a scale, mu and sigma, that a network works out for all data. For each
datum i they are corrected by free numbers of its own,

    mu_i = mu + sigma delta_i        sigma_i = sigma exp(tau_i)

(full Gaussians: mu + L delta_i and L T_i, T_i lower triangular with a positive diagonal), and ELBO(x_i) is maximised
over delta_i, tau_i from 0, which is the guide itself. With one layer this frees location and scale altogether: it is the
optimal q* of the family (Cremer, Li and Duvenaud 2018, arXiv:1801.03558, section 3). With several layers each conditional
is corrected on top of its dependence on the layers before, so the refined family always contains the guide.

Adam follows pathwise gradients in which log q is held at fixed parameters (Roeder, Wu and Duvenaud 2017,
arXiv:1703.09194): they have the same expectation, and no variance where q* is the posterior. The programs run as they are;
an effect handler puts the corrected law in place of the site's own. The pair's parameters are not touched.

The search goes in rounds, each with a new Adam whose rate falls from the first rate to zero by a cosine, and each as long
as all rounds before it together. A datum has settled when a whole round changed its bound by nothing that counts. (The end
of one round would not tell: its rate is near zero, so it gains nothing wherever it is.) Rounds follow until every datum
has settled, or until the next would go beyond a stated number of steps.

The one constraint: the law is known by parameters called ``loc`` and ``scale`` or ``scale_tril``, and is reparameterised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from inference.bounds.joint import data_plan, log_ratio, paired_bounds
from inference.bounds.particles import Plan, Program
from inference.bounds.sites import base_law
from inference.progress import Progress
from ppl_models.pair import ModelGuidePair

TOLERANCE = 0.01  # nats of a datum's bound: a gain below it is not worth more steps
ROUNDS_TO_MAXIMUM = 5  # by default: the first round and four doublings, 16 times its steps
DRAWS_FOR_GAIN = 64  # times the draws of a step, to tell what a round gained
NEGLIGIBLE_SLOPE = 1e-3  # nats per scale: Adam's epsilon, so that noise on a flat bound is not walked upon


class NotRefinableError(ValueError):
    """A guide law without a location and a scale; the message names site and law."""


@dataclass(frozen=True)
class Correction:
    """delta and tau of one site: ``shift`` ``[B, *event]`` in scales, ``stretch`` the logarithm of a factor of the scale.

    ``stretch`` is ``[B, *event]`` for laws with a ``scale``; ``[B, d, d]`` for full Gaussians, of which the lower triangle
    counts and the diagonal is a logarithm.
    """

    shift: Tensor
    stretch: Tensor

    @classmethod
    def none(cls, law: Any) -> Correction:
        """No correction, for a law of batch shape ``[B]``."""
        loc = base_law(law).loc.detach()
        size = (*loc.shape, loc.shape[-1]) if isinstance(base_law(law), dist.MultivariateNormal) else loc.shape
        return cls(torch.zeros_like(loc), loc.new_zeros(size))

    def detached(self) -> Correction:
        """The same numbers, without gradient."""
        return Correction(self.shift.detach(), self.stretch.detach())

    def copied(self) -> Correction:
        """The numbers as they are now, without gradient."""
        return Correction(self.shift.detach().clone(), self.stretch.detach().clone())

    def __call__(self, law: Any) -> Any:
        """The corrected law, of the same family as ``law``.

        Example:
            >>> one = torch.ones(1)
            >>> law = Correction(one, one.log() + 1)(dist.Normal(2 * one, 3 * one))
            >>> float(law.loc), round(float(law.scale), 4)  # 2 + 3, 3 e
            (5.0, 8.1548)
        """
        if isinstance(law, torch.distributions.Independent):
            return self(law.base_dist).to_event(law.reinterpreted_batch_ndims)
        if isinstance(law, dist.MultivariateNormal):
            loc = law.loc + (law.scale_tril @ self.shift.unsqueeze(-1)).squeeze(-1)
            diagonal = torch.diagonal(self.stretch, dim1=-2, dim2=-1).exp()
            return dist.MultivariateNormal(
                loc, scale_tril=law.scale_tril @ (torch.diag_embed(diagonal) + self.stretch.tril(-1))
            )
        others = {name: getattr(law, name) for name in law.arg_constraints if name not in ("loc", "scale")}
        return type(law)(loc=law.loc + law.scale * self.shift, scale=law.scale * self.stretch.exp(), **others)


@dataclass(frozen=True)
class Refinement:
    """A pair's guide with corrections for given data, and how the search for them went.

    ``guide(x)`` is a Pyro program for exactly these data in this order; ``steps`` are those of all rounds together.
    ``gain`` ``[B]`` is what the last round added to each datum's bound, nats, on common random numbers, with standard
    errors ``gain_std_error`` ``[B]``.
    """

    guide: Program
    corrections: dict[str, Correction]
    steps: int
    num_particles: int
    gain: Tensor
    gain_std_error: Tensor

    @property
    def settled(self) -> Tensor:
        """Which data the last round left where they were, ``[B]``: |gain| + 2 standard errors within 0.01 nats.

        A gain that is not known to 0.005 nats settles nothing, and neither does one that is not finite.
        """
        return self.gain.abs() + 2 * self.gain_std_error <= TOLERANCE

    @property
    def converged(self) -> bool:
        """Whether every datum has settled."""
        return bool(self.settled.all())

    def words(self) -> str:
        """The search as a sentence, with the datum whose gain is largest or least known."""
        bound = (self.gain.abs() + 2 * self.gain_std_error).nan_to_num(nan=float("inf"))
        worst = int(bound.argmax())
        open_ = ~self.settled
        unknown = int((open_ & ~(2 * self.gain_std_error <= TOLERANCE)).sum())
        verdict = "converged"
        if not self.converged:
            verdict = f"NOT converged for {int(open_.sum())} of {len(self.gain)} data: raise max_steps (--gap-steps)"
            if unknown:
                verdict += f" ({unknown} of them not known: the error of the gain is too large)"
        return (
            f"{self.steps} Adam steps of {self.num_particles} draws a datum; the last round, half of them, changed the "
            f"bound of datum {worst} the most, by {float(self.gain[worst]):+.4f} ± {float(self.gain_std_error[worst]):.4f} "
            f"nats: {verdict}"
        )


def refine_guide(
    pair: ModelGuidePair,
    x: Tensor,
    *,
    steps: int = 500,
    num_particles: int = 16,
    learning_rate: float = 0.05,
    max_steps: int | None = None,
) -> Refinement:
    """Maximises ELBO(x_i) over location and scale of every latent, for each datum on its own.

    Args:
        pair: the programs; their parameters stay as they are.
        x: data ``[B, *data_shape]``.
        steps: Adam steps of the first round, at least 8. A second round of as many always follows, to tell whether the
            first was enough, and then rounds that double the total, until every datum has settled.
        num_particles: draws of each datum a step.
        learning_rate: Adam's first rate in each round; corrections are in scales and logarithms of scales, so it is a
            step in these.
        max_steps: no round is begun that would go beyond these steps in all; at least 2 ``steps``, None for 16 ``steps``.

    Returns:
        :class:`Refinement`; look at ``converged``, and at ``settled`` for each datum.

    Raises:
        NotRefinableError: a latent's guide law has no location and scale, or is not reparameterised.
        ValueError: ``steps`` below 8, ``num_particles`` below 1, ``learning_rate`` not positive, or ``max_steps`` below
            2 ``steps``.
        PairError: sites do not match, or are not all inside the data plate.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)  # its guide is the posterior: nothing to gain
        >>> refinement = refine_guide(pair, pair.model(size=4).detach(), steps=20)
        >>> refinement.converged, bool(refinement.corrections["z"].shift.abs().max() < 0.05)
        (True, True)
    """
    if steps < 8 or num_particles < 1 or not learning_rate > 0:
        raise ValueError(
            f"expected steps >= 8, num_particles >= 1 and learning_rate > 0, got {steps}, {num_particles} and "
            f"{learning_rate}: a round that hardly moves tells nothing"
        )
    limit = 2 ** (ROUNDS_TO_MAXIMUM - 1) * steps if max_steps is None else max_steps
    if limit < 2 * steps:
        raise ValueError(
            f"expected max_steps >= 2 * steps = {2 * steps}, got {limit}: a second round tells whether the first was enough"
        )
    with torch.no_grad():
        plan = data_plan(pair, x)
    corrections = {site: _uncorrected(site, plan) for site in pair.latent_sites}
    with Progress("refining the guide", limit) as shown:
        corrections = _round(plan, corrections, steps, num_particles, learning_rate, shown)
        taken, settled = steps, False
        while not settled and 2 * taken <= limit:
            earlier, length = corrections, taken
            corrections = _round(plan, earlier, length, num_particles, learning_rate, shown)
            taken += length
            guide = _CorrectedGuide(pair, corrections)
            with torch.no_grad():
                before = data_plan(pair, x, _CorrectedGuide(pair, earlier))
                _, _, gain = paired_bounds(before, data_plan(pair, x, guide), DRAWS_FOR_GAIN * num_particles)
            found = Refinement(guide, corrections, taken, num_particles, gain.mean, gain.std_error)
            settled = found.converged
    return found


def _round(
    plan: Plan, start: dict[str, Correction], steps: int, num_particles: int, learning_rate: float, shown: Progress
) -> dict[str, Correction]:
    """Corrections after ``steps`` Adam steps from ``start``, which stays as it is."""
    corrections = {site: c.copied() for site, c in start.items()}
    leaves = [tensor.requires_grad_() for c in corrections.values() for tensor in (c.shift, c.stretch)]
    optimizer = torch.optim.Adam(leaves, lr=learning_rate, eps=NEGLIGIBLE_SLOPE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        gradients = torch.autograd.grad(-_bound(plan, corrections, num_particles).sum(), leaves)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.step()
        schedule.step()
        shown.advance()
    return {site: c.detached() for site, c in corrections.items()}


@dataclass(frozen=True)
class _CorrectedGuide:
    """The pair's guide under corrections, as a program of its own; no closure, so that results can be pickled."""

    pair: ModelGuidePair
    corrections: dict[str, Correction]

    def __call__(self, x: Tensor) -> Any:
        with _Corrected(self.corrections):
            return self.pair.guide(x)


class _Corrected(Messenger):
    """Puts corrected laws in place of the guide's own.

    For gradients it must be entered outside all plates. It then draws from the corrected law, and leaves a law without
    gradients in the corrections for log q.
    """

    def __init__(self, corrections: dict[str, Correction], path_gradients: bool = False) -> None:
        super().__init__()
        self.corrections = corrections
        self.path_gradients = path_gradients

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        correction = self.corrections.get(msg["name"])
        if correction is None or msg["value"] is not None:  # no latent; or the model, replayed on the guide's draw
            return
        law = msg["fn"]
        if self.path_gradients:
            msg["value"] = correction(law).rsample()
            msg["fn"] = correction.detached()(law)
        else:
            msg["fn"] = correction(law)


def _bound(plan: Plan, corrections: dict[str, Correction], num_particles: int) -> Tensor:
    """An estimate of ELBO(x) under the corrected guide, ``[B]`` nats, with pathwise gradients."""
    total = torch.zeros((), dtype=torch.float64)
    with _Corrected(corrections, path_gradients=True):
        for particles in plan.chunks(num_particles, num_particles):
            ratio = log_ratio(particles)
            total = total.to(ratio.device) + ratio.sum(0)
    return total / num_particles


def _uncorrected(site: str, plan: Plan) -> Correction:
    """A correction of nothing for a site, after it has been seen to change nothing."""
    node = plan.prototype.guide[site]
    law, name = node["fn"], type(base_law(node["fn"])).__name__
    if not all(hasattr(base_law(law), key) for key in ("loc", "has_rsample")) or not (
        "scale" in base_law(law).arg_constraints or isinstance(base_law(law), dist.MultivariateNormal)
    ):
        raise NotRefinableError(
            f"expected a guide law with a location and a scale at site {site!r}, got {name}: a refined guide exists for "
            "Normal, LogNormal, Laplace, StudentT, MultivariateNormal and the like"
        )
    if not law.has_rsample:
        raise NotRefinableError(
            f"expected a reparameterised guide law at site {site!r}, got {name}: give it an rsample"
        )
    correction = Correction.none(law)
    try:
        same = torch.allclose(
            correction(law).log_prob(node["value"]), law.log_prob(node["value"]), rtol=1e-4, atol=1e-4
        )
    except (TypeError, ValueError, RuntimeError) as error:  # a law of the user's own, made of other arguments
        raise NotRefinableError(
            f"expected a law at site {site!r} that its location and scale make again, but {name} fails ({error}): use "
            "one of Pyro's"
        ) from error
    if not same:
        raise NotRefinableError(
            f"expected a law at site {site!r} that its location and scale make again, but another {name} came out: use "
            "one of Pyro's"
        )
    return correction
