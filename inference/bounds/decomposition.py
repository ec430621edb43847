"""The ELBO of any Pyro model/guide pair, term by term, closed form beside Monte Carlo.

    ELBO(x) = E_{q(z|x)}[log p(x, z) - log q(z | x)] = sum over sites of E_q[log p(site | parents) - log q(site | parents)]

(lecture notes 004, "HVAE's ELBO"). Every term is estimated from draws, with its standard error. Where a site's own
expectation is known in closed form *and* equals the term (:mod:`inference.bounds.closed_forms`), that is given beside it
and used in the sum. A closed form must pass three tests, and the reason for refusing one is part of the result:

1. structure: no model parent of the site descends from it in the guide (found by tagging values);
2. redrawing: when the site alone is redrawn, and the guide runs on from there, its own closed form does not move. This
   needs no tagging, so it also sees dependence that went through Python or foreign code;
3. draws: closed form and Monte Carlo agree within :data:`MAX_Z` standard errors.

Where a latent site has none, half of one may be left: E_q[-log q(z | pa)] = E_q[H(q(. | pa))] holds whatever descends from
z, as a draw has its law given its parents. So E_q[log p] comes from the draws and the other half from conditional entropies,
if draws of their own (:data:`PILOT` of them, so that the choice biases no number) show that this lowers the variance of the
term and of the bound. For a Gaussian that is so where the guide is much narrower than the posterior; elsewhere the noise of
log q cancels noise of log p, and is better kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from inference.bounds.closed_forms import law_name
from inference.bounds.moments import Moments
from inference.bounds.particles import Particles, Plan, Program, forked_rng, make_plan, seed_generators
from inference.bounds.terms import Decomposition, SiteTerm
from inference.bounds.validity import ClosedForms, RefusedError, find_closed_forms, site_kinds
from inference.progress import Progress

MAX_Z = 8.0  # a correct closed form fails this with probability below 1e-14 for Gaussian errors
MIN_PARTICLES_FOR_Z = 100
PILOT = 64  # particles, and data, by which it is decided whether a conditional entropy lowers the variance


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
        :class:`Decomposition`, in nats, with terms of the shape [B] of the plates that all sites share. Factors are in the sum:
            with those that a pair has in training mode it is the objective, and -(rate + distortion) the ELBO.

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
                return _Sums(plan, closed, _helpful_entropies(plan, closed)).over(num_particles, chunk_size)
            except RefusedError as late:  # one closed form fewer, and all draws anew
                closed.refuse(late.name, late.reason)


def _helpful_entropies(plan: Plan, closed: ClosedForms) -> frozenset[str]:
    """Sites without a closed form whose conditional entropy lowers the variance of their term and that of the bound.

    Taken one by one, in the model's order; variances are averaged over data, the first :data:`PILOT` of them. The draws come
    from a random stream of their own: chosen by the very draws that are then averaged, the smaller of two errors would not
    be the error of its estimate.

    Raises:
        RefusedError: an entropy is not known in some draws.
    """
    candidates = frozenset(closed.entropies) - closed.exact.keys()
    if not candidates:
        return frozenset()
    sums = _Sums(plan, closed, candidates)
    drawn: dict[str, list[Tensor]] = {name: [] for name in candidates}
    gains: dict[str, list[Tensor]] = {name: [] for name in candidates}
    totals = []
    with forked_rng():
        seed_generators(int(torch.randint(2**31, ())))
        for particles in plan.chunks(PILOT):
            if site_kinds(particles).keys() != sums.kinds.keys():
                return frozenset()
            total = torch.zeros((), dtype=torch.float64)
            for name in sums.kinds:
                term = _some(sums.term(name, particles))
                better = _some(sums.better(name, particles)) if name in sums.shortcuts else term
                if name in candidates:
                    drawn[name].append(term)
                    gains[name].append(better - term)
                total = total.to(term.device) + (term if name in candidates else better)
            totals.append(total)
    bound, chosen = torch.cat(totals), set()
    for name in (name for name in sums.kinds if name in candidates):
        term, gain = torch.cat(drawn[name]), torch.cat(gains[name])
        if _spread(term + gain) < _spread(term) and _spread(bound + gain) < _spread(bound):
            bound = bound + gain
            chosen.add(name)
    return frozenset(chosen)


def _some(terms: Tensor) -> Tensor:
    """Terms of the first data, ``[n, B]``, so that memory stays bounded."""
    return terms.reshape(len(terms), -1)[:, :PILOT]


def _spread(values: Tensor) -> float:
    """Variance over draws, averaged over data; NaN where a draw is infinite, so that nothing is below it."""
    return float(values.var(0).mean())


class _Sums:
    """Running moments of each term, of the sums, and of what decides whether closed forms agree with draws."""

    def __init__(self, plan: Plan, closed: ClosedForms, halved: frozenset[str]) -> None:
        self.plan = plan
        self.closed = closed
        self.halved = halved
        self.kinds = site_kinds(plan.prototype)
        self.drawn = {name: Moments() for name in self.kinds}
        self.shortcuts = {name: Moments() for name in (*closed.exact, *halved)}  # whole closed forms, and halves of one
        self.difference = {name: Moments() for name in self.shortcuts}
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
        for name in self.shortcuts:
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
            for name in self.shortcuts:
                raise RefusedError(name, "refused: the set of sites changes from draw to draw")
        zeros = torch.zeros(particles.count, *self.plan.shape, dtype=torch.float64)
        best = total = zeros
        for name in self.kinds:
            term = self.term(name, particles) if name in kinds else zeros
            self.drawn[name].add(term)
            total = total.to(term.device) + term
            if name in self.shortcuts:
                better = self.better(name, particles)
                self.shortcuts[name].add(better)
                self.difference[name].add(_over_data(term - better))
                term = better
            best = best.to(term.device) + term
        self.best.add(best)
        self.monte_carlo.add(total)
        self.best_mean.add(_over_data(best))
        self.monte_carlo_mean.add(_over_data(total))

    def term(self, name: str, particles: Particles) -> Tensor:
        """log p - log q of one site, each as far as its program has it."""
        model, guide = particles.model.get(name), particles.guide.get(name)
        term: Any = 0
        if model is not None:
            term = self.plan.reduce(model["log_prob"], particles)
        if guide is not None:
            term = term - self.plan.reduce(guide["log_prob"], particles)
        return term

    def better(self, name: str, particles: Particles) -> Tensor:
        """The site's closed form, or log p + H(q) where only the guide's half of the term has one."""
        if name not in self.halved:
            return self.plan.reduce(self.closed.value(name, particles), particles)
        log_p = self.plan.reduce(particles.model[name]["log_prob"], particles)
        return log_p + self.plan.reduce(self.closed.entropy(name, particles), particles)

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

        None without a closed form or half of one, where it is infinite, or where the draws have no spread to measure it by.
        """
        exact = float(self.shortcuts[name].mean.mean()) if name in self.shortcuts else math.inf
        if not math.isfinite(exact):
            return None
        mean, error = float(self.difference[name].mean), float(self.difference[name].std_error)
        rounding = 1e3 * self._rounding(name) * (1.0 + abs(exact))
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
            exact = None if name in self.halved else self.shortcuts.get(name)
            half = self.shortcuts[name] if name in self.halved else None
            terms[name] = SiteTerm(
                name,
                kind,
                self.drawn[name].mean,
                self.drawn[name].std_error,
                exact.mean if exact else None,
                exact.std_error if exact else None,
                self._reason(name),
                self.z_score(name),
                half.mean if half else None,
                half.std_error if half else None,
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

    def _reason(self, name: str) -> str:
        reason = self.closed.reasons.get(name, "appears in some draws only; zero in the others")
        if name in self.closed.exact or name not in self.closed.entropies:
            return reason
        law = law_name(self.plan.prototype.guide[name]["fn"])
        if name in self.halved:
            return f"{reason}; half of it, -log q, is taken as the conditional entropy of {law}, and log p drawn"
        return f"{reason}; the conditional entropy of {law} in place of -log q would not lower the variance"


def _over_data(terms: Tensor) -> Tensor:
    return terms.flatten(1).mean(1) if terms.dim() > 1 else terms
