"""The evidence by importance weighting: a lower bound with an error, for any Pyro model/guide pair.

    log p_hat_K(x) = log (1/K) sum_k w_k,    w_k = p(x, z_k) / q(z_k | x),    z_k ~ q(z | x)

(Burda, Grosse and Salakhutdinov 2016, arXiv:1509.00519, eq. 8). E[p_hat_K] = p(x), hence E[log p_hat_K] <= log p(x).

One log p_hat for each element of the plates that *all* sites share: p(x, z) factorises over these, so each of their
elements has weights of its own. A latent outside the data plate (a global one) ties the data together; the result is then
one number, the evidence of the whole data set, and a single global draw weighs all data at once.

The guide is drawn in blocks whose size the programs alone determine; the model is evaluated on a chunk of a block at a
time, and the weights are reduced at once (:class:`~inference.bounds.weights.WeightSums`), so memory does not grow with K and
the result does not depend on the chunk size. Weights are summed in float64 whatever the programs' dtype. A value outside
its law's support, latent or observed, has density zero (:mod:`inference.bounds.support`).

The one constraint: the programs must define p(x, z) and q(z | x) of *these* data, the same at every run. Subsampling
plates, scaled sites, data that change from run to run, point masses in the guide and auxiliary draws that hide q(z | x)
are refused, for their weights do not estimate p(x).
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from inference.bounds.evidence import Evidence
from inference.bounds.importance_checks import (
    EvidenceError,
    check_guide,
    check_plan,
    check_request,
    check_same_data,
    guide_factors,
    holds_data,
    missed_by_guide,
    model_factors,
    plan_with_data,
    weight_factors,
)
from inference.bounds.moments import Moments
from inference.bounds.pareto import pareto_k_hat, tail_size
from inference.bounds.particles import Particles, Plan, Program, collect, located_draw
from inference.bounds.sites import PARTICLES
from inference.bounds.support import ZeroOutsideSupport
from inference.bounds.weights import WeightSums
from inference.bounds.whole_densities import counted
from inference.progress import Progress

CHUNKS_PER_BLOCK = 2  # the guide is drawn for so many of the model's chunks at once: its own cost is in the calls
UNTOUCHED_BYTES = 31 * 2**20  # glibc takes no hint from blocks of 32 MiB and more
PUT_TOGETHER = 32  # particles, where few are drawn at a time, before they are reduced


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
        guide: Pyro program q(z | x) over the model's latent sites. Auxiliary sites are for autoguides, which map them one
            to one onto the latents; others leave q(z | x) unknown.
        args: passed to both programs.
        num_particles: K, draws per datum; with ``target_std_error`` those of the first round.
        target_std_error: draw until every datum's standard error is at most this many nats, doubling K each round;
            what was not met is among the result's ``warnings``. Stopping by an estimated error makes it somewhat too
            small: start from a hundred draws at least.
        max_particles: where doubling stops.
        chunk_size: particles at a time in the model when vectorised, to save memory; the result does not depend on it.
            None takes some 2 million site elements; more than twice that, for which the guide is drawn at once, is not
            taken.
        vectorize: None draws many particles at once where replaying them singly shows that the programs allow it; True
            demands it; False forbids it.
        kwargs: passed to both programs.

    Returns:
        :class:`Evidence`, nats ``[B]``.

    Raises:
        EvidenceError: K < 1 or no whole number; a target that is not positive; no data, or data that are in no plate;
            subsampling, scaled sites or changing data; a point mass or auxiliary draws in the guide; a datum whose
            weights are all zero, infinite or not a number.
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
    check_request(num_particles, target_std_error, max_particles, chunk_size)
    with torch.no_grad():
        plan = plan_with_data(ZeroOutsideSupport()(model), guide, args, kwargs, vectorize)
        check_plan(plan)
        check_guide(plan)
        block = CHUNKS_PER_BLOCK * plan.default_chunk()
        size = min(chunk_size or plan.default_chunk(), block)
        ceiling = num_particles if target_std_error is None else max(num_particles, max_particles)
        _keep_pages_between_chunks()
        weights = _Weights(plan, keep=tail_size(ceiling) + 1)
        goal, rounds = num_particles, 1
        weights.draw(goal, size)
        while target_std_error is not None and goal < ceiling and weights.worst_error() > target_std_error:
            goal, rounds = min(2 * goal, ceiling), rounds + 1
            weights.draw(goal, size)
        return weights.result(_cost(plan, goal, rounds, size), target_std_error)


__all__ = ["EvidenceError", "log_evidence"]


class _Weights:
    """The importance weights drawn so far, reduced; and which sites gave zero density."""

    def __init__(self, plan: Plan, keep: int) -> None:
        self.plan = plan
        self.sums = WeightSums(keep)
        self.log_weights = Moments()
        self.zero_at: dict[str, Tensor] = {}

    def draw(self, goal: int, chunk_size: int) -> None:
        """Draws until there are ``goal`` particles."""
        missing, plan = goal - self.sums.count, self.plan
        block = CHUNKS_PER_BLOCK * plan.default_chunk() if plan.vectorized else 1
        drawn: list[Tensor] = []
        with Progress("weighing particles", missing, unit="particles") as progress, pyro.validation_enabled(False):
            # The first particle has been validated: what is left to see in the others shows in their log-densities.
            for start in range(0, missing, block):
                count = min(block, missing - start)
                drawn.append(self.block(count, chunk_size) if plan.vectorized else self.single())
                if len(drawn) * block >= PUT_TOGETHER or start + count == missing:
                    self.add(torch.cat(drawn))
                    drawn.clear()
                progress.advance(count)

    def single(self) -> Tensor:
        """log w ``[1, *shape]`` of a fresh particle, drawn without a plate."""
        (particle,) = self.plan.chunks(1)
        return self.log_joint(particle) - self.log_guide(particle)

    def block(self, count: int, chunk_size: int) -> Tensor:
        """log w ``[count, *shape]`` of fresh particles: the guide drawn at once, the model in chunks."""
        plan, dim = self.plan, -self.plan.nesting - 1
        drawn = located_draw(_empty_program, plan.guide, plan.args, plan.kwargs, count, dim)
        log_joints = []
        for start in range(0, count, chunk_size):
            size = min(chunk_size, count - start)
            part = _part_of_draws(drawn, start, size, plan.nesting)
            with pyro.plate(PARTICLES, size, dim=dim):
                trace = poutine.trace(poutine.replay(plan.model, trace=part)).get_trace(*plan.args, **plan.kwargs)
            log_joints.append(self.log_joint(collect(trace, poutine.Trace(), size, dim)))
            del trace  # or two chunks would be held while the next is evaluated
        return torch.cat(log_joints) - self.log_guide(drawn)

    def log_joint(self, particles: Particles) -> Tensor:
        """log p(x, z_k), ``[count, *shape]``; notes the sites that give no density."""
        check_same_data(self.plan.prototype, particles)
        terms = {name: self.plan.reduce(site["log_prob"], particles) for name, site in model_factors(particles)}
        total = self.sum(terms, particles.count)
        if bool((total == -math.inf).any()):
            for name, term in terms.items():
                seen = (term == -math.inf).any(0)
                self.zero_at[name] = self.zero_at[name] | seen if name in self.zero_at else seen
        return total

    def log_guide(self, particles: Particles) -> Tensor:
        """log q(z_k | x), ``[count, *shape]``."""
        factors = guide_factors(particles, self.plan.prototype.model)
        terms = {name: self.plan.reduce(site["log_prob"], particles) for name, site in factors}
        return self.sum(terms, particles.count)

    def sum(self, terms: dict[str, Tensor], count: int) -> Tensor:
        """The sum of factors by site; of none, zero."""
        total = torch.zeros((count, *self.plan.shape), dtype=torch.float64)
        for term in terms.values():
            total = total.to(term.device) + term
        return total

    def add(self, log_weights: Tensor) -> None:
        """Takes log-weights ``[n, *shape]`` in."""
        if not bool((log_weights.amax(0) < math.inf).all()):  # plus infinity or NaN
            index = (~(log_weights < math.inf)).nonzero()[0]
            raise EvidenceError(
                f"expected finite importance weights, got log w = {float(log_weights[tuple(index)])}{_of_datum(index[1:])}: "
                "a density is infinite or the guide's is zero at its own draw; look for scales near zero"
            )
        self.sums.add(log_weights)
        self.log_weights.add(log_weights)

    def worst_error(self) -> float:
        """The largest standard error of any datum."""
        return float(self.sums.std_error.max())

    def result(self, note: str, target_std_error: float | None) -> Evidence:
        """The sums as :class:`Evidence`."""
        self._refuse_missed_posterior()
        sites = weight_factors(self.plan.prototype).values()
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
            missed_by_guide(self.plan),
        )

    def _refuse_missed_posterior(self) -> None:
        missed = self.sums.log_mean == -math.inf
        if not bool(missed.any()):
            return
        index = missed.nonzero()[0]
        names = [name for name, seen in self.zero_at.items() if bool(seen[tuple(index)])]
        sites = [repr(name) for name in names]
        observed = any(
            self.plan.prototype.model[name]["is_observed"] for name in names if name in self.plan.prototype.model
        )
        remedy = "look whether the data lie in their law's support, or " if observed else ""
        raise EvidenceError(
            f"expected a guide that covers the posterior, but all {self.sums.count} importance weights{_of_datum(index)} "
            f"are zero ({int(missed.sum())} of {missed.numel()} data so): the model has no density at the guide's draws, "
            f"seen at site {' and '.join(sites)}; {remedy}give the guide the model's support, or widen it"
        )


def _empty_program(*args: Any, **kwargs: Any) -> None:
    """A model without sites, to draw from a guide alone."""


def _part_of_draws(drawn: Particles, start: int, size: int, nesting: int) -> poutine.Trace:
    """Some particles' values of a guide's draws, as a trace to replay a model on."""
    trace = poutine.Trace()
    for name, site in drawn.guide.items():
        value = site["value"]
        position = value.dim() - site["fn"].event_dim - nesting - 1
        if position >= 0 and value.shape[position] == drawn.count:
            value = value.narrow(position, start, size)
        trace.add_node(name, **{**site, "value": value})
    return trace


def _of_datum(index: Tensor) -> str:
    return f" of datum {', '.join(str(int(i)) for i in index)}" if len(index) else ""


def _num_dims(plan: Plan) -> int | Tensor:
    """Observed numbers per datum: the data sites' elements, over those of the shared plates (a factor has none).

    Where masks leave some out, those of each datum, ``[B]``.
    """
    total, by_datum, masked = 0, torch.zeros(plan.shape), False
    for site in plan.prototype.model.values():
        if holds_data(site):
            sizes = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
            event = site["fn"].event_shape
            total += math.prod(sizes.values()) * event.numel()
            batch = [sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0)]
            seen = counted(site)
            masked = masked or not bool(seen.all())
            numbers = seen.expand([*batch, *event]).reshape([*batch, -1]).sum(-1)
            by_datum = by_datum + plan.reduce(numbers, plan.prototype)[0].cpu()
    return by_datum if masked else total // max(1, plan.shape.numel())


def _cost(plan: Plan, num_particles: int, rounds: int, chunk_size: int) -> str:
    data = plan.shape.numel() if plan.shared else 1
    how = f"vectorised, {min(chunk_size, num_particles)} at a time" if plan.vectorized else "one at a time"
    cost = f"{num_particles} particles for each of {data} data = {num_particles * data} evaluations of the model"
    return (
        f"{cost}, {how}"
        + (f", in {rounds} rounds" if rounds > 1 else "")
        + ("" if plan.vectorized else f": {plan.note}")
    )


def _keep_pages_between_chunks() -> None:
    """Lets the C library use a chunk's memory again for the next, where it would give it back and ask for fresh pages.

    Fresh pages are a quarter of the time of a network of three layers. glibc keeps twice the size of the largest block that
    was ever freed (mallopt's M_TRIM_THRESHOLD, which adjusts itself); this one is never touched, so it costs no memory.
    Other C libraries take no notice.
    """
    torch.empty(UNTOUCHED_BYTES, dtype=torch.uint8, device="cpu")
