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

from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from inference.bounds.closed_forms import (
    NoClosedFormError,
    law_name,
    refuse_by_structure,
    site_divergence,
    site_entropy,
)
from inference.bounds.dependencies import Parents, parents
from inference.bounds.moments import Moments
from inference.bounds.particles import Particles, Plan, Program, Site, collect, forked_rng, make_plan
from inference.bounds.terms import Decomposition, Kind, SiteTerm
from inference.progress import Progress

Exact = Callable[[Particles], Tensor]  # a site's own expectation given its parents, of the site's batch shape

MAX_Z = 8.0  # a correct closed form fails this with probability below 1e-14 for Gaussian errors
MIN_PARTICLES_FOR_Z = 100
MAX_REDRAWN_SITES = 64
REDRAWS = 4


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
        reasons: dict[str, str] = {}
        closed = _closed_form_sites(plan, reasons)
        while True:
            sums = _Sums(plan, closed)
            with Progress("decomposing the ELBO", num_particles, unit="particles") as progress:
                for particles in plan.chunks(num_particles, chunk_size):
                    sums.add(particles)
                    progress.advance(particles.count)
            late = sums.refusals()
            if not late:
                return sums.result(reasons)
            closed = {name: exact for name, exact in closed.items() if name not in late}
            reasons.update(late)


def closed_form_sites(model: Program, guide: Program, *args: Any, **kwargs: Any) -> dict[str, str]:
    """The sites whose term has a valid closed form, each with the sentence that says which.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2, guide="mean_field")
        >>> closed_form_sites(pair.model, pair.guide, torch.zeros(4, 3))
        {'z': 'closed form: -KL(Normal || Normal)'}
    """
    reasons: dict[str, str] = {}
    with torch.no_grad(), forked_rng():
        plan = make_plan(model, guide, args, kwargs, vectorize=False)
        return {name: reasons[name] for name in _closed_form_sites(plan, reasons)}


def _closed_form_sites(plan: Plan, reasons: dict[str, str]) -> dict[str, Exact]:
    """Sites whose closed form is valid, with it; ``reasons`` receives one sentence for every site."""
    prototype = plan.prototype
    try:
        above_in_guide = parents(plan.guide, plan.args, plan.kwargs)
        replayed = poutine.replay(plan.model, trace=_as_trace(prototype.guide))
        above_in_model = parents(replayed, plan.args, plan.kwargs)
        failure = ""
    except Exception as error:  # foreign programs may fail under tagging in any way; said in the reason
        above_in_guide, above_in_model = {}, {}
        failure = f"dependencies could not be traced ({type(error).__name__})"
    closed: dict[str, Exact] = {}
    for name, kind in _kinds(prototype).items():
        try:
            if kind == "latent":
                if failure:
                    raise NoClosedFormError(failure)
                refuse_by_structure(name, prototype.guide[name], prototype.model[name], above_in_model, above_in_guide)
                closed[name] = _minus_divergence(name)
                closed[name](prototype)
                reasons[name] = _reason_for(name, prototype, above_in_model, above_in_guide)
            elif kind == "auxiliary":
                closed[name] = _entropy(name)
                closed[name](prototype)
                reasons[name] = (
                    f"only in the guide: the entropy of {law_name(prototype.guide[name]['fn'])} in closed form"
                )
            elif not failure and name in above_in_model and not above_in_model[name]:
                closed[name] = _constant(name)
                reasons[name] = (
                    f"{'observed' if kind == 'observed' else 'a factor'} with nothing latent above it: a constant"
                )
            elif kind == "observed":
                reasons[name] = "observed: its expected log-likelihood is estimated from the draws"
            else:
                reasons[name] = "a factor: a term without a law, averaged over the draws"
        except NoClosedFormError as refusal:
            closed.pop(name, None)
            reasons[name] = str(refusal)
    suspects = [name for name in closed if name in prototype.guide]
    stride = -(-len(suspects) // MAX_REDRAWN_SITES) or 1
    for name in suspects[::stride]:
        if _moves_when_redrawn(plan, name, closed[name]):
            del closed[name]
            reasons[name] = (
                f"refused: redrawing {name} alone changed its own closed form, so what it rests on depends on it"
            )
    return closed


def _minus_divergence(name: str) -> Exact:
    return lambda particles: -site_divergence(particles.guide[name], particles.model[name])


def _entropy(name: str) -> Exact:
    return lambda particles: site_entropy(particles.guide[name])


def _constant(name: str) -> Exact:
    return lambda particles: particles.model[name]["log_prob"]


def _reason_for(name: str, prototype: Particles, model: Parents, guide: Parents) -> str:
    above = [site for site in prototype.guide if site in model.get(name, frozenset()) | guide.get(name, frozenset())]
    given = f" given draws of {', '.join(above)}" if above else ""
    laws = f"{law_name(prototype.guide[name]['fn'])} || {law_name(prototype.model[name]['fn'])}"
    return f"closed form: -KL({laws}){given}"


def _kinds(particles: Particles) -> dict[str, Kind]:
    """Each site's kind: the model's order first, then the sites that only the guide has."""
    kinds: dict[str, Kind] = {}
    for name, site in particles.model.items():
        kinds[name] = (
            "latent" if not site["is_observed"] else "factor" if law_name(site["fn"]) == "Unit" else "observed"
        )
    for name, site in particles.guide.items():
        if name not in kinds:
            kinds[name] = "factor" if site["is_observed"] else "auxiliary"
    return kinds


class _Sums:
    """Running moments of each term, of the sums, and of what decides whether closed forms agree with draws."""

    def __init__(self, plan: Plan, closed: dict[str, Exact]) -> None:
        self.plan = plan
        self.closed = closed
        self.kinds = _kinds(plan.prototype)
        self.drawn = {name: Moments() for name in self.kinds}
        self.analytic = {name: Moments() for name in closed}
        self.difference = {name: Moments() for name in closed}
        self.best, self.monte_carlo, self.best_mean, self.monte_carlo_mean = (Moments() for _ in range(4))
        self.changing: dict[str, str] = {}

    def add(self, particles: Particles) -> None:
        """Takes a chunk of particles in."""
        kinds = _kinds(particles)
        for name in kinds.keys() - self.kinds.keys():  # a site that earlier draws did not have contributed zero to them
            self.kinds[name] = kinds[name]
            self.drawn[name] = Moments()
            seen = self.monte_carlo.count
            if seen:
                self.drawn[name].add(torch.zeros(seen, *self.plan.shape))
        if kinds.keys() != self.kinds.keys():
            self.changing = dict.fromkeys(self.closed, "refused: the set of sites changes from draw to draw")
        shape = (particles.count, *self.plan.shape)
        best = total = torch.zeros(shape, dtype=torch.float64)
        for name in self.kinds:
            term = self._term(name, particles) if name in kinds else torch.zeros(shape, dtype=torch.float64)
            self.drawn[name].add(term)
            total = total.to(term.device) + term
            if name in self.closed and name in kinds:
                exact = self.plan.reduce(self.closed[name](particles), particles)
                self.analytic[name].add(exact)
                self.difference[name].add(_over_data(term - exact))
                term = exact
            best = best.to(term.device) + term
        self.best.add(best)
        self.monte_carlo.add(total)
        self.best_mean.add(_over_data(best))
        self.monte_carlo_mean.add(_over_data(total))

    def _term(self, name: str, particles: Particles) -> Tensor:
        model, guide = particles.model.get(name), particles.guide.get(name)
        term: Any = 0
        if model is not None:
            term = self.plan.reduce(model["log_prob"], particles)
        if guide is not None and (model is None or not model["is_observed"]):
            term = term - self.plan.reduce(guide["log_prob"], particles)
        return term

    def refusals(self) -> dict[str, str]:
        """Closed forms that the draws speak against, with the reason."""
        if self.changing:
            return self.changing
        refused = {}
        for name in self.closed:
            z = self.z_score(name)
            if z is not None and abs(z) > MAX_Z and self.best.count >= MIN_PARTICLES_FOR_Z:
                refused[name] = f"refused: the closed form contradicts the draws (z = {z:.1f})"
        return refused

    def z_score(self, name: str) -> float | None:
        """Paired difference of Monte Carlo and closed form, averaged over data, in standard errors."""
        if name not in self.closed:
            return None
        mean, error = float(self.difference[name].mean), float(self.difference[name].std_error)
        scale = 1e-5 * (1.0 + abs(float(self.analytic[name].mean.mean())))
        if abs(mean) <= scale and error <= scale:  # two constants that agree to rounding
            return 0.0
        return mean / error if error > 0 else float("inf")

    def result(self, reasons: dict[str, str]) -> Decomposition:
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
                reasons.get(name, "appears in some draws only; zero in the others"),
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


def _moves_when_redrawn(plan: Plan, name: str, exact: Exact) -> bool:
    """Whether redrawing one site, all else equal, changes its own closed form; the random state is restored."""
    with forked_rng():
        first, *others = _redrawn(plan, name, exact)
        return any(other != first for other in others)


def _redrawn(plan: Plan, name: str, exact: Exact) -> Iterator[Any]:
    """The closed form at ``name`` for the guide's own draw and for other draws there, under one random stream."""
    seed = int(torch.randint(2**31, ()))
    for k in range(REDRAWS + 1):
        torch.manual_seed(seed)
        with _Redraw(name, seed + k) if k else Messenger():
            guide = poutine.trace(plan.guide).get_trace(*plan.args, **plan.kwargs)
        torch.manual_seed(seed)
        model = poutine.trace(poutine.replay(plan.model, trace=guide)).get_trace(*plan.args, **plan.kwargs)
        particles = collect(model, guide)
        present = name in particles.guide and (name in particles.model or name not in plan.prototype.model)
        yield exact(particles).flatten().tolist() if present else None


class _Redraw(Messenger):
    """Replaces one site's value by another draw of its law, after the program's own draw has used the random stream."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__()
        self.name = name
        self.seed = seed

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] == self.name:
            state = torch.get_rng_state()
            torch.manual_seed(self.seed)
            msg["value"] = msg["fn"].sample()
            torch.set_rng_state(state)


def _as_trace(sites: dict[str, Site]) -> poutine.Trace:
    trace = poutine.Trace()
    for name, site in sites.items():
        trace.add_node(name, **site)
    return trace
