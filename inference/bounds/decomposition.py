"""The ELBO of any Pyro model/guide pair, term by term, closed form beside Monte Carlo.

    ELBO(x) = E_{q(z|x)}[log p(x, z) - log q(z | x)] = sum over sites of E_q[log p(site | parents) - log q(site | parents)]

(lecture notes 004, "HVAE's ELBO"). Every term is estimated from draws, with its standard error. Where a site's own
expectation is known in closed form *and* equals the term (:mod:`inference.bounds.closed_forms`), that is given beside it
and used in the sum. A closed form must pass three tests, and the reason for refusing one is part of the result:

1. structure: no model parent of the site descends from it in the guide (found by tagging values);
2. redrawing: when the site alone is redrawn, and the guide runs on from there, its own closed form does not move. This
   needs no tagging, so it also sees dependence that went through Python or foreign code;
3. draws: closed form and Monte Carlo agree within :data:`MAX_Z` standard errors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inference.bounds.moments import Moments
from inference.bounds.particles import Particles, Plan, Program, make_plan
from inference.bounds.terms import Decomposition, SiteTerm
from inference.bounds.validity import ClosedForms, RefusedError, find_closed_forms, site_kinds
from inference.progress import Progress

MAX_Z = 8.0  # a correct closed form fails this with probability below 1e-14 for Gaussian errors
MIN_PARTICLES_FOR_Z = 100


def decompose_elbo(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 1000,
    vectorize: bool | None = None,
    chunk_size: int | None = None,
    **kwargs: Any,
) -> Decomposition:
    """The ELBO of a Pyro pair by site, with closed forms where they are right and a standard error for each number.

    ELBO = sum over sites of E_q[log p - log q]; lecture notes 004 and 000. Plates, scale, mask, subsampling and
    non-reparameterised sites are honoured as ``pyro.infer.Trace_ELBO`` honours them.

    Args:
        model: Pyro program p(x, z), any.
        guide: Pyro program q(z | x) over the model's latent sites; sites marked auxiliary are terms of their own.
        args: passed to both programs.
        num_particles: draws from the guide.
        vectorize: None draws many particles at once if replaying them singly shows that the programs allow it; True
            demands it; False forbids it.
        chunk_size: particles at a time when vectorised; None keeps memory bounded. No number depends on it except
            through the random stream.
        kwargs: passed to both programs.

    Returns:
        :class:`Decomposition`, in nats, with terms of the shape [B] of the plates that all sites share.

    Raises:
        PairError: the programs' sites do not match; the message names the site.
        NotANumberError: a log-density is NaN; the message names the site.

    Example:
        >>> import pyro.distributions as dist, pyro
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> d = decompose_elbo(model, guide, torch.tensor(1.0), num_particles=100)
        >>> d.sites, round(float(d["z"].analytic), 4)
        (('z', 'x'), -0.2216)
        >>> round(float(d.monte_carlo), 4), float(d.monte_carlo_std_error) < 1e-6  # the guide is the posterior
        (-1.5155, True)
    """
    with torch.no_grad():
        plan = make_plan(model, guide, args, kwargs, vectorize)
        closed = find_closed_forms(plan)
        while True:
            try:
                return _Sums(plan, closed).over(num_particles, chunk_size)
            except RefusedError as late:  # one closed form fewer, and all draws anew
                closed.refuse(late.name, late.reason)


class _Sums:
    """Running moments of each term, of the sums, and of what decides whether closed forms agree with draws."""

    def __init__(self, plan: Plan, closed: ClosedForms) -> None:
        self.plan = plan
        self.closed = closed
        self.kinds = site_kinds(plan.prototype)
        self.drawn = {name: Moments() for name in self.kinds}
        self.analytic = {name: Moments() for name in closed.exact}
        self.difference = {name: Moments() for name in closed.exact}
        self.best, self.monte_carlo, self.best_mean, self.monte_carlo_mean = (Moments() for _ in range(4))

    def over(self, num_particles: int, chunk_size: int | None) -> Decomposition:
        """Draws the particles and returns the terms.

        Raises:
            RefusedError: the draws speak against a closed form.
        """
        with Progress("decomposing the ELBO", num_particles, unit="particles") as progress:
            for particles in self.plan.chunks(num_particles, chunk_size):
                self.closed.check_structure(self.plan, particles)
                self.add(particles)
                progress.advance(particles.count)
        for name in self.analytic:
            self._compare(name)
        return self.result()

    def add(self, particles: Particles) -> None:
        """Takes a chunk of particles in."""
        kinds = site_kinds(particles)
        for name in kinds.keys() - self.kinds.keys():  # a site that earlier draws did not have contributed zero to them
            self.kinds[name] = kinds[name]
            self.drawn[name] = Moments()
            if self.monte_carlo.count:
                self.drawn[name].add(torch.zeros(self.monte_carlo.count, *self.plan.shape))
        if kinds.keys() != self.kinds.keys():
            for name in self.analytic:
                raise RefusedError(name, "refused: the set of sites changes from draw to draw")
        zeros = torch.zeros(particles.count, *self.plan.shape, dtype=torch.float64)
        best = total = zeros
        for name in self.kinds:
            term = self._term(name, particles) if name in kinds else zeros
            self.drawn[name].add(term)
            total = total.to(term.device) + term
            if name in self.analytic:
                exact = self.plan.reduce(self.closed.value(name, particles), particles)
                self.analytic[name].add(exact)
                self.difference[name].add(_over_data(term - exact))
                term = exact
            best = best.to(term.device) + term
        self.best.add(best)
        self.monte_carlo.add(total)
        self.best_mean.add(_over_data(best))
        self.monte_carlo_mean.add(_over_data(total))

    def _term(self, name: str, particles: Particles) -> Tensor:
        """log p - log q of one site, each as far as its program has it."""
        model, guide = particles.model.get(name), particles.guide.get(name)
        term: Any = 0
        if model is not None:
            term = self.plan.reduce(model["log_prob"], particles)
        if guide is not None:
            term = term - self.plan.reduce(guide["log_prob"], particles)
        return term

    def _compare(self, name: str) -> None:
        """Raises :class:`RefusedError` where the draws contradict a closed form.

        Discrete laws are left out: an event too rare to be drawn would count as a contradiction.
        """
        if name in self.closed.constants:
            spread, size = float(self.drawn[name].std_error.max()), float(self.drawn[name].mean.abs().max())
            if self.drawn[name].count > 1 and spread > 100 * self._rounding(name) * (1 + size):
                raise RefusedError(name, "observed: it varies with the draws, so something latent stands above it")
            return
        z = self.z_score(name)
        fn = self.plan.prototype.guide[name]["fn"]
        if z is None or self.best.count < MIN_PARTICLES_FOR_Z or fn.support.is_discrete:
            return
        if abs(z) > MAX_Z:
            raise RefusedError(name, f"refused: the closed form contradicts the draws (z = {z:.1f})")

    def z_score(self, name: str) -> float | None:
        """Paired difference of Monte Carlo and closed form, averaged over data, in standard errors.

        None without a closed form, or where the draws have no spread to measure it by.
        """
        if name not in self.analytic:
            return None
        mean, error = float(self.difference[name].mean), float(self.difference[name].std_error)
        rounding = 1e3 * self._rounding(name) * (1.0 + abs(float(self.analytic[name].mean.mean())))
        if abs(mean) <= rounding and error <= rounding:  # two constants that agree
            return 0.0
        return mean / error if 0 < error < float("inf") else None

    def _rounding(self, name: str) -> float:
        sites = (self.plan.prototype.model.get(name), self.plan.prototype.guide.get(name))
        return max(torch.finfo(site["log_prob"].dtype).eps for site in sites if site is not None)

    def result(self) -> Decomposition:
        """The moments as a :class:`Decomposition`."""
        terms = {}
        for name, kind in self.kinds.items():
            exact = self.analytic.get(name)
            terms[name] = SiteTerm(
                name,
                kind,
                self.drawn[name].mean,
                self.drawn[name].std_error,
                exact.mean if exact else None,
                exact.std_error if exact else None,
                self.closed.reasons.get(name, "appears in some draws only; zero in the others"),
                self.z_score(name),
            )
        return Decomposition(
            terms,
            self.best.mean,
            self.best.std_error,
            self.monte_carlo.mean,
            self.monte_carlo.std_error,
            float(self.best_mean.std_error),
            float(self.monte_carlo_mean.std_error),
            tuple(name for name, _, _ in self.plan.shared),
            self.best.count,
            self.plan.note,
        )


def _over_data(terms: Tensor) -> Tensor:
    return terms.flatten(1).mean(1) if terms.dim() > 1 else terms
