"""Which sites of a pair have a closed form that is their term, in every draw.

Two tests before any averaging, each with a sentence for the user where it refuses:

1. structure: no model parent of the site descends from it in the guide, as tagged values show;
2. redrawing: when the site alone takes another value, and the guide runs on from there under the same random numbers,
   the site's own closed form does not move. This needs no tags, so it also sees dependence that went through Python or
   foreign code. Each site draws from a random stream of its own, so nothing else moves either.

A program that reads a latent into Python may have another structure in another draw: then the first test is repeated
for each (:meth:`ClosedForms.check_structure`). The closed forms of any program are computed anew in each draw, from the
laws, scales and masks that it then has.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
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
from inference.bounds.dependencies import Parents, parents, scalars_read
from inference.bounds.particles import Particles, Plan, Program, forked_rng, make_plan, seed_generators
from inference.bounds.sites import Site, is_deterministic, sample_sites
from inference.bounds.terms import Kind
from ppl_models.discrete_vae import TooManyStatesError

Exact = Callable[[Particles], Tensor]  # a site's own expectation given its parents, of the site's batch shape

MAX_ROUNDS = 16  # of redrawing one site; fewer for long programs, such that ...
REDRAWING_BUDGET = 2000  # ... rounds x sites redrawn x sites of the program stays below this, with one round at least
MAX_ENUMERATED = 16


def closed_form_sites(model: Program, guide: Program, *args: Any, **kwargs: Any) -> dict[str, str]:
    """The sites whose term has a valid closed form, each with the sentence that says which.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2, guide="mean_field")
        >>> closed_form_sites(pair.model, pair.guide, torch.zeros(4, 3))
        {'z': 'closed form: -KL(Normal || Normal)'}
    """
    with torch.no_grad(), forked_rng():
        found = find_closed_forms(make_plan(model, guide, args, kwargs, vectorize=False))
    return {name: found.reasons[name] for name in found.exact}


def site_kinds(particles: Particles) -> dict[str, Kind]:
    """Each site's kind: the model's order first, then the sites that only the guide has; deterministic ones left out."""
    kinds: dict[str, Kind] = {}
    for name, site in particles.model.items():
        if not is_deterministic(site):
            kinds[name] = _kind(site)
    for name, site in particles.guide.items():
        if name not in kinds and not is_deterministic(site) and name not in particles.model:
            kinds[name] = "factor" if site["is_observed"] else "auxiliary"
    return kinds


def _kind(site: Site) -> Kind:
    if not site["is_observed"]:
        return "latent"
    return "factor" if law_name(site["fn"]) == "Unit" else "observed"


@dataclass
class ClosedForms:
    """Closed forms by site, a sentence for every site, and what must be checked again in each draw.

    ``entropies`` are those of the guide's law at latent sites, -log q integrated given the parents. They are right whatever
    the structure, and matter where a site has no whole closed form.
    """

    exact: dict[str, Exact] = field(default_factory=dict)
    entropies: dict[str, Exact] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)  # observed sites with nothing latent above them
    reasons: dict[str, str] = field(default_factory=dict)
    structure_may_change: bool = False

    @property
    def certain(self) -> dict[str, Exact]:
        """Closed forms that hold in every draw: none where the structure depends on the draw."""
        return {} if self.structure_may_change else self.exact

    def refuse(self, name: str, reason: str) -> None:
        """Takes a site's closed form away, or its conditional entropy if it has no whole one."""
        if name in self.entropies and name not in self.exact:
            del self.entropies[name]
            self.reasons[name] = f"{self.reasons[name]}; its entropy: {reason}"
            return
        self.exact.pop(name, None)
        self.constants.discard(name)
        self.reasons[name] = reason

    def check_structure(self, plan: Plan, particles: Particles) -> None:
        """Repeats the test of structure at these particles, for programs whose structure may change.

        Raises:
            RefusedError: a closed form is not its site's term in these particles.
        """
        if not self.structure_may_change or not self.exact:
            return
        above_in_model, above_in_guide = _links(plan, particles)
        for name in self.exact:
            try:
                refuse_by_structure(name, above_in_model, above_in_guide)
            except NoClosedFormError as error:
                raise RefusedError(name, f"{error}; so it is in some draws") from None

    def value(self, name: str, particles: Particles) -> Tensor:
        """A site's closed form at these particles.

        Raises:
            RefusedError: the laws, scales or masks of these particles have none.
        """
        try:
            return self.exact[name](particles)
        except NoClosedFormError as error:
            raise RefusedError(name, f"{error}; so it is in some draws") from None

    def entropy(self, name: str, particles: Particles) -> Tensor:
        """A latent site's conditional entropy at these particles.

        Raises:
            RefusedError: the law of these particles has none in closed form.
        """
        try:
            return self.entropies[name](particles)
        except NoClosedFormError:
            raise RefusedError(name, "not known in closed form in some draws") from None


class RefusedError(Exception):
    """A closed form turned out, after the first draw, not to be its site's term."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name
        self.reason = reason


def find_closed_forms(plan: Plan) -> ClosedForms:
    """Decides for every site of a plan, from its first draw and from redrawing."""
    prototype, found = plan.prototype, ClosedForms()
    try:
        above_in_model, above_in_guide = _links(plan, prototype)
        found.structure_may_change = bool(scalars_read(plan.model, plan.guide, plan.args, plan.kwargs))
        failure = ""
    except Exception as error:  # foreign programs may fail under tagging in any way; said in the reason
        above_in_model, above_in_guide = {}, {}
        failure = f"no closed form: dependencies could not be traced ({type(error).__name__})"
    for name, kind in site_kinds(prototype).items():
        try:
            if kind == "latent":
                if failure:
                    raise NoClosedFormError(failure)
                refuse_by_structure(name, above_in_model, above_in_guide)
                found.exact[name] = _minus_divergence(name)
                found.exact[name](prototype)
                found.reasons[name] = _reason(name, prototype, above_in_model, above_in_guide)
            elif kind == "auxiliary":
                found.exact[name] = _entropy(name)
                found.exact[name](prototype)
                law = law_name(prototype.guide[name]["fn"])
                found.reasons[name] = f"only in the guide: the entropy of {law} in closed form"
            elif name not in prototype.guide and not failure and not above_in_model.get(name, {"?"}):
                found.exact[name] = _log_prob(name)
                found.constants.add(name)
                what = "observed" if kind == "observed" else "a factor"
                found.reasons[name] = f"{what} with nothing latent above it: a constant"
            elif kind == "observed":
                found.reasons[name] = "observed: its expected log-likelihood is estimated from the draws"
            else:
                found.reasons[name] = (
                    "a factor: a term without a law, averaged over the draws; in the sum, in neither rate nor distortion"
                )
        except NoClosedFormError as refusal:
            found.refuse(name, str(refusal))
    suspects = [name for name in found.exact if name in prototype.guide]
    sites = len(prototype.model) + len(prototype.guide)
    rounds = min(MAX_ROUNDS, max(1, REDRAWING_BUDGET // (sites * max(1, len(suspects)))))
    for name in _moving(plan, {name: found.exact[name] for name in suspects}, rounds):
        found.refuse(
            name, f"refused: redrawing {name} alone changed its own closed form, so what it rests on depends on it"
        )
    for name in [name for name, kind in site_kinds(prototype).items() if kind == "latent"]:
        with suppress(NoClosedFormError):
            _entropy(name)(prototype)
            found.entropies[name] = _entropy(name)
    return found


def _links(plan: Plan, particles: Particles) -> tuple[Parents, Parents]:
    """Parents by site in model and guide, at one particle's values."""
    trace = poutine.Trace()
    for name, site in particles.guide.items():
        trace.add_node(name, **site)
    return (
        parents(poutine.replay(plan.model, trace=trace), plan.args, plan.kwargs),
        parents(poutine.replay(plan.guide, trace=trace), plan.args, plan.kwargs),
    )


def _minus_divergence(name: str) -> Exact:
    return lambda particles: -site_divergence(particles.guide[name], particles.model[name])


def _entropy(name: str) -> Exact:
    return lambda particles: site_entropy(particles.guide[name])


def _log_prob(name: str) -> Exact:
    return lambda particles: particles.model[name]["log_prob"]


def _reason(name: str, prototype: Particles, model: Parents, guide: Parents) -> str:
    above = [site for site in prototype.guide if site in model.get(name, frozenset()) | guide.get(name, frozenset())]
    given = f" given draws of {', '.join(above)}" if above else ""
    laws = f"{law_name(prototype.guide[name]['fn'])} || {law_name(prototype.model[name]['fn'])}"
    return f"closed form: -KL({laws}){given}"


def _moving(plan: Plan, exact: dict[str, Exact], rounds: int) -> set[str]:
    """Sites whose own closed form changes when they alone take another value; the random state is restored."""
    moving: set[str] = set()
    values = {name: _support(plan.prototype.guide[name]["fn"]) for name in exact}
    with forked_rng():
        for r in range(rounds):
            seed = int(torch.randint(2**31, ()))
            base = _under_streams(plan, seed, Messenger())
            for name in exact.keys() - moving:
                value = values[name][r % len(values[name])] if values[name] else None
                other = _under_streams(plan, seed, _Substitute(name, value, seed + 1))
                if _evaluate(plan, name, exact[name], base) != _evaluate(plan, name, exact[name], other):
                    moving.add(name)
    return moving


def _under_streams(plan: Plan, seed: int, substitute: Messenger) -> Particles:
    """One particle's laws, without log-densities, each site drawing from a random stream of its own."""
    with _SiteStreams(seed):
        with substitute:
            guide = poutine.trace(plan.guide).get_trace(*plan.args, **plan.kwargs)
        model = poutine.trace(poutine.replay(plan.model, trace=guide)).get_trace(*plan.args, **plan.kwargs)
    return Particles(sample_sites(model), sample_sites(guide), 1, None)


def _evaluate(plan: Plan, name: str, exact: Exact, particles: Particles) -> list[float] | None:
    if name not in particles.guide or (name not in particles.model and name in plan.prototype.model):
        return None
    try:
        return exact(particles).flatten().tolist()
    except NoClosedFormError:
        return None


def _support(fn: Any) -> list[Tensor]:
    """All values of a small discrete law, each for the whole batch; none for any other law."""
    if not fn.has_enumerate_support:
        return []
    try:
        support = fn.enumerate_support(expand=False)
    except TooManyStatesError:
        return []
    return (
        list(support.expand(len(support), *fn.batch_shape, *fn.event_shape)) if len(support) <= MAX_ENUMERATED else []
    )


class _SiteStreams(Messenger):
    """Seeds each site's draw by its name, so that one site's use of random numbers does not shift another's."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not msg["done"] and not msg["is_observed"]:
            seed_generators(self.seed ^ zlib.crc32(msg["name"].encode()))


class _Substitute(Messenger):
    """Gives one site another value: the one given, or else another draw of its law."""

    def __init__(self, name: str, value: Tensor | None, seed: int) -> None:
        super().__init__()
        self.name = name
        self.value = value
        self.seed = seed

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] == self.name:
            if self.value is None:
                seed_generators(self.seed)
                msg["value"] = msg["fn"].sample()
            else:
                msg["value"] = self.value.to(msg["value"])
