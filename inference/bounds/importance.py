"""The evidence by importance weighting: a lower bound with an error, for any Pyro model/guide pair.

    log p_hat_K(x) = log (1/K) sum_k w_k,    w_k = p(x, z_k) / q(z_k | x),    z_k ~ q(z | x)

(Burda, Grosse and Salakhutdinov 2016, arXiv:1509.00519, eq. 8). E[p_hat_K] = p(x), hence E[log p_hat_K] <= log p(x).

One log p_hat for each element of the plates that *all* sites share: p(x, z) factorises over these, so each of their
elements has weights of its own. A latent outside the data plate (a global one) ties the data together; the result is then
one number, the evidence of the whole data set, and a single global draw weighs all data at once.

Particles are drawn chunk by chunk and reduced at once (:class:`~inference.bounds.weights.WeightSums`), so memory does not
grow with K. The draws follow torch's random stream, and another chunk size is another stream; what is computed from given
draws does not depend on the chunks. Weights are summed in float64 whatever the programs' dtype.

The one constraint: the programs must define p(x, z) and q(z | x) of *these* data, the same at every run. Subsampling
plates, scaled sites, and data that change from run to run are refused, for their weights do not estimate p(x).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from torch import Tensor

from inference.bounds.closed_forms import law_name
from inference.bounds.evidence import Evidence
from inference.bounds.moments import Moments
from inference.bounds.pareto import pareto_k_hat, tail_size
from inference.bounds.particles import Particles, Plan, Program, make_plan
from inference.bounds.sites import Site, is_deterministic
from inference.bounds.support import ZeroOutsideSupport
from inference.bounds.weights import WeightSums
from inference.progress import Progress


class EvidenceError(ValueError):
    """An evidence that is not defined or cannot be estimated; the message names the site or datum, and the remedy."""


def log_evidence(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 5000,
    target_std_error: float | None = None,
    max_particles: int = 100_000,
    chunk_size: int | None = None,
    vectorize: bool | None = None,
    **kwargs: Any,
) -> Evidence:
    """log p(x) per datum: the IWAE-K bound, its standard error, effective sample size and k-hat.

    Burda et al. 2016 (arXiv:1509.00519), eq. 8; the error by the delta method (:mod:`inference.bounds.weights`). Networks
    with dropout or batch normalisation belong in ``eval()`` mode.

    Args:
        model: Pyro program p(x, z), normalised or not (``pyro.factor`` counts).
        guide: Pyro program q(z | x) over the model's latent sites; auxiliary sites count in q.
        args: passed to both programs.
        num_particles: K, draws per datum; with ``target_std_error`` those of the first round.
        target_std_error: draw until every datum's standard error is at most this many nats, doubling K each round;
            what was not met is among the result's ``warnings``. Stopping by an estimated error makes it somewhat too
            small: start from a hundred draws at least.
        max_particles: where doubling stops.
        chunk_size: particles at a time when vectorised; None keeps memory bounded.
        vectorize: None draws many particles at once where replaying them singly shows that the programs allow it; True
            demands it; False forbids it.
        kwargs: passed to both programs.

    Returns:
        :class:`Evidence`, nats ``[B]``.

    Raises:
        EvidenceError: K < 1; a target that is not positive; data that are in no plate; subsampling, scaled sites or
            changing data; a datum whose weights are all zero, infinite or not a number.
        PairError: the programs' sites do not match; the message names the site.
        NotANumberError: a log-density is NaN; the message names site and index.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2, guide="mean_field")
        >>> x = pair.model(size=4).detach()
        >>> e = log_evidence(pair.model, pair.guide, x, num_particles=1000)
        >>> e.log_evidence.shape, bool((e.log_evidence >= e.elbo).all())
        (torch.Size([4]), True)
        >>> bool(((e.log_evidence - pair.log_evidence(x)).abs() < 6 * e.std_error).all())
        True
    """
    _check_request(num_particles, target_std_error, max_particles, chunk_size)
    with torch.no_grad():
        plan = make_plan(ZeroOutsideSupport()(model), guide, args, kwargs, vectorize)
        _check_plan(plan)
        size = chunk_size or plan.default_chunk()
        ceiling = num_particles if target_std_error is None else max(num_particles, max_particles)
        weights = _Weights(plan, keep=tail_size(ceiling) + 1)
        goal, rounds = num_particles, 1
        weights.draw(goal, size)
        while target_std_error is not None and goal < ceiling and weights.worst_error() > target_std_error:
            goal, rounds = min(2 * goal, ceiling), rounds + 1
            weights.draw(goal, size)
        return weights.result(_cost(plan, goal, rounds, size), target_std_error)


class _Weights:
    """The importance weights drawn so far, reduced; and which sites gave zero density."""

    def __init__(self, plan: Plan, keep: int) -> None:
        self.plan = plan
        self.sums = WeightSums(keep)
        self.log_weights = Moments()
        self.zero_at: dict[str, Tensor] = {}

    def draw(self, goal: int, chunk_size: int) -> None:
        """Draws until there are ``goal`` particles."""
        missing = goal - self.sums.count
        with Progress("weighing particles", missing, unit="particles") as progress, pyro.validation_enabled(False):
            # The first particle has been validated: what is left to see in the others shows in their log-densities.
            for particles in self.plan.chunks(missing, chunk_size):
                self.add(particles)
                progress.advance(particles.count)
                del particles  # or two chunks would be held while the next is drawn

    def add(self, particles: Particles) -> None:
        """Takes a chunk of particles in."""
        _check_same_data(self.plan.prototype, particles)
        log_weights = torch.zeros((particles.count, *self.plan.shape), dtype=torch.float64)
        zero: list[tuple[str, Tensor]] = []
        for name, sign, site in _factors(particles):
            term = self.plan.reduce(site["log_prob"], particles)
            log_weights = log_weights.to(term.device) + sign * term
            zero.append((name, term))
        top = log_weights.amax(0)
        if not bool((top < math.inf).all()):  # plus infinity or NaN
            index = (~(log_weights < math.inf)).nonzero()[0]
            raise EvidenceError(
                f"expected finite importance weights, got log w = {float(log_weights[tuple(index)])}{_of_datum(index[1:])}: "
                "a density is infinite or the guide's is zero at its own draw; look for scales near zero"
            )
        if bool(log_weights.amin() == -math.inf):
            for name, term in zero:
                seen = (term == -math.inf).any(0)
                self.zero_at[name] = self.zero_at[name] | seen if name in self.zero_at else seen
        self.sums.add(log_weights)
        self.log_weights.add(log_weights)

    def worst_error(self) -> float:
        """The largest standard error of any datum."""
        return float(self.sums.std_error.max())

    def result(self, note: str, target_std_error: float | None) -> Evidence:
        """The sums as :class:`Evidence`."""
        self._refuse_missed_posterior()
        sites = [site for _, _, site in _factors(self.plan.prototype)]
        rounding = max(torch.finfo(site["log_prob"].dtype).eps for site in sites)
        k_hat = pareto_k_hat(self.sums.largest, self.sums.count, resolution=rounding**0.5)
        return Evidence(
            self.sums.log_mean,
            self.sums.std_error,
            self.sums.ess,
            k_hat.to(self.sums.ess.device),
            self.log_weights.mean,
            self.log_weights.std_error,
            self.sums.count,
            _num_dims(self.plan),
            tuple(name for name, _, _ in self.plan.shared),
            note,
            target_std_error,
        )

    def _refuse_missed_posterior(self) -> None:
        missed = self.sums.log_mean == -math.inf
        if not bool(missed.any()):
            return
        index = missed.nonzero()[0]
        sites = [repr(name) for name, seen in self.zero_at.items() if bool(seen[tuple(index)])]
        raise EvidenceError(
            f"expected a guide that covers the posterior, but all {self.sums.count} importance weights{_of_datum(index)} "
            f"are zero ({int(missed.sum())} of {missed.numel()} data so): the model has no density at the guide's draws, "
            f"seen at site {' and '.join(sites)}; give the guide the model's support, or widen it"
        )


def _factors(particles: Particles) -> Iterator[tuple[str, int, Site]]:
    """The factors of the weight: name, +1 for p and -1 for q, site."""
    for name, site in particles.model.items():
        if not is_deterministic(site):
            yield name, 1, site
    for name, site in particles.guide.items():
        in_model = particles.model.get(name)
        if not is_deterministic(site) and (in_model is None or not in_model["is_observed"]):
            yield name, -1, site


def _check_request(num_particles: int, target: float | None, max_particles: int, chunk_size: int | None) -> None:
    for name, value in (("num_particles", num_particles), ("max_particles", max_particles), ("chunk_size", chunk_size)):
        if value is not None and value < 1:
            raise EvidenceError(f"expected {name} >= 1, got {value}: ask for at least one draw")
    if target is not None and not 0 < target < math.inf:
        raise EvidenceError(f"expected a positive target_std_error in nats, got {target}: 0.1 is usual")


def _check_plan(plan: Plan) -> None:
    """Refuses programs whose weights would not estimate p(x), and data that are in no plate."""
    for name, _, site in _factors(plan.prototype):
        frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
        for frame in site["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise EvidenceError(
                    f"expected plates without subsampling, got {frame.size} of {frame.full_size} elements in plate "
                    f"{frame.name!r}: a random part of the data has no evidence; pass all data, in batches"
                )
        if bool(torch.as_tensor(site["scale"] != 1).any()):
            raise EvidenceError(
                f"expected sites without a scale, got one at site {name!r}: powers of densities are no densities, so their "
                "weights do not estimate p(x); remove poutine.scale"
            )
        declared = {frame.dim for frame in frames}
        shape = site["log_prob"].shape
        for dim in range(-len(shape), 0):
            if shape[dim] > 1 and dim not in declared:
                raise EvidenceError(
                    f"expected every batch dimension in a plate, got dim {dim} of size {shape[dim]} at site {name!r} in "
                    "none: put the site into pyro.plate('data', B) if these are data, or declare it with .to_event()"
                )


def _check_same_data(prototype: Particles, particles: Particles) -> None:
    for name, site in prototype.model.items():
        if _holds_data(site) and name in particles.model:
            first, now = site["value"], particles.model[name]["value"]
            if first is not now and not bool(((first == now) | (first.isnan() & now.isnan())).all()):
                raise EvidenceError(
                    f"expected the same data at every run, but those at site {name!r} changed from one particle to the "
                    "next: fix their order and any random preprocessing before the programs see them"
                )


def _holds_data(site: Site) -> bool:
    """Whether a site of the model observes data; a point mass (deterministic or reparameterised sites) only names a value."""
    return site["is_observed"] and not is_deterministic(site) and law_name(site["fn"]) != "Delta"


def _of_datum(index: Tensor) -> str:
    return f" of datum {', '.join(str(int(i)) for i in index)}" if len(index) else ""


def _num_dims(plan: Plan) -> int:
    """Observed numbers per datum: the data sites' elements, over those of the shared plates (a factor has none)."""
    total = 0
    for site in plan.prototype.model.values():
        if _holds_data(site):
            plates = math.prod(frame.size for frame in site["cond_indep_stack"] if frame.vectorized)
            total += plates * site["fn"].event_shape.numel()
    return total // max(1, plan.shape.numel())


def _cost(plan: Plan, num_particles: int, rounds: int, chunk_size: int) -> str:
    data = plan.shape.numel() if plan.shared else 1
    how = f"vectorised, {min(chunk_size, num_particles)} at a time" if plan.vectorized else "one at a time"
    cost = f"{num_particles} particles for each of {data} data = {num_particles * data} evaluations of the model"
    return (
        f"{cost}, {how}"
        + (f", in {rounds} rounds" if rounds > 1 else "")
        + ("" if plan.vectorized else f": {plan.note}")
    )
