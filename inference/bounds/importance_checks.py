"""Which pairs have an evidence that importance weights estimate, and which are refused, by site and with the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from torch.distributions import biject_to

from inference.bounds.closed_forms import is_point_mass
from inference.bounds.particles import Particles, Plan, Program, forked_rng, make_plan
from inference.bounds.sites import Site, is_deterministic
from inference.bounds.support import excludes_numbers, in_support
from inference.bounds.whole_densities import why_no_bound

SUPPORT_DRAWS = 200


class EvidenceError(ValueError):
    """An evidence that is not defined or cannot be estimated; the message names the site or datum, and the remedy."""


def model_factors(particles: Particles) -> Iterator[tuple[str, Site]]:
    """The factors of p(x, z)."""
    for name, site in particles.model.items():
        if not is_deterministic(site):
            yield name, site


def guide_factors(particles: Particles, model: dict[str, Site]) -> Iterator[tuple[str, Site]]:
    """The factors of q(z | x), given the sites of the model."""
    for name, site in particles.guide.items():
        if not is_deterministic(site) and not (name in model and model[name]["is_observed"]):
            yield name, site


def weight_factors(particles: Particles) -> dict[str, Site]:
    """The factors of the weight under names that tell p from q."""
    guide = {f"{name} of the guide": site for name, site in guide_factors(particles, particles.model)}
    return {**dict(model_factors(particles)), **guide}


def plan_with_data(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], vectorize: bool | None
) -> Plan:
    """:func:`make_plan`, with a word for data of no rows."""
    try:
        return make_plan(model, guide, args, kwargs, vectorize)
    except ZeroDivisionError as error:
        if str(error) != "size cannot be zero":  # Pyro's words for a plate of no elements
            raise
        raise EvidenceError("expected data, got a plate of size zero: pass at least one datum") from error


def check_request(num_particles: int, target: float | None, max_particles: int, chunk_size: int | None) -> None:
    """Refuses counts that are no whole numbers above zero, and a target that is not positive."""
    for name, value in (("num_particles", num_particles), ("max_particles", max_particles), ("chunk_size", chunk_size)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise EvidenceError(f"expected {name} >= 1, got {value!r}: ask for a whole number of draws")
    if target is not None and not 0 < target < math.inf:
        raise EvidenceError(f"expected a positive target_std_error in nats, got {target}: 0.1 is usual")


def check_plan(plan: Plan) -> None:
    """Refuses programs whose weights would not estimate p(x), and data that are in no plate."""
    factors = weight_factors(plan.prototype)
    for name, site in factors.items():
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
    for why, remedy in why_no_bound(plan.prototype.model, plan.prototype.guide):
        raise EvidenceError(f"expected weights that estimate p(x), but {why}: {remedy}")
    if not any(site["cond_indep_stack"] for site in factors.values()):
        for name, site in plan.prototype.model.items():
            if holds_data(site) and site["fn"].event_shape.numel():
                raise EvidenceError(
                    f"expected the data in a plate, got site {name!r} and no plate anywhere, so that data cannot be told "
                    "apart: put the sites into pyro.plate('data', B), of size one for a single datum"
                )


def check_guide(plan: Plan) -> None:
    """Refuses guides whose density at the latents is not the product of their sites' densities.

    A point mass (Delta) has none. Auxiliary draws a integrate to q(z | x) = int q(a) q(z | a, x) da, unless they determine
    the latents and these them, as in autoguides: then the latents are Deltas that carry log |da/dz|. Taken for that: as
    many auxiliary numbers as unconstrained ones in Deltas, each of which moves some Delta, and each Delta moved by some.
    """
    model, guide = plan.prototype.model, plan.prototype.guide
    masses = [n for n, s in guide.items() if n in model and _is_delta(s) and not _is_delta(model[n])]
    auxiliary = [n for n, s in guide.items() if n not in model and not s["is_observed"] and not _is_delta(s)]
    if not masses and not auxiliary:
        return
    moved, moving, sizes = _moves(plan, masses, auxiliary) if auxiliary else (set[str](), set[str](), 0)
    for name in masses:
        if name not in moved:
            raise EvidenceError(
                f"expected a guide with a density at site {name!r}, got a point mass (Delta) where the model has none: its "
                "weights do not estimate p(x); draw the site from a law with a density (AutoNormal for AutoDelta)"
            )
    for name in auxiliary:
        if name not in moving or sizes != sum(guide[n]["value"].numel() for n in auxiliary):
            raise EvidenceError(
                f"expected auxiliary guide sites that determine the latents one to one, as in autoguides, got a random "
                f"one, {name!r}: it leaves q(z | x) an unknown integral; make it a latent of the model, or integrate it out"
            )


def _moves(plan: Plan, masses: list[str], auxiliary: list[str]) -> tuple[set[str], set[str], int]:
    """Deltas that some auxiliary number moves, auxiliary sites all of whose numbers move a Delta, and the Deltas' size."""
    trace, inputs = poutine.Trace(), {}
    for name, site in plan.prototype.guide.items():
        value = site["value"]
        if name in auxiliary and value.is_floating_point():
            value = inputs[name] = value.detach().requires_grad_()
        if name not in masses:
            trace.add_node(name, **{**site, "value": value})
    with torch.enable_grad(), forked_rng(), pyro.validation_enabled(False):
        sites = poutine.trace(poutine.replay(plan.guide, trace=trace)).get_trace(*plan.args, **plan.kwargs).nodes
        free = {n: biject_to(plan.prototype.model[n]["fn"].support).inv(sites[n]["value"]) for n in masses}
        reach = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in inputs.items()}
        moved = set()
        for name, value in free.items():
            if not inputs or not value.requires_grad:
                continue
            direction = torch.linspace(1.0, 2.0, value.numel(), dtype=value.dtype, device=value.device)
            total = (value * direction.reshape(value.shape)).sum()
            grads = torch.autograd.grad(total, list(inputs.values()), allow_unused=True, retain_graph=True)
            for source, grad in zip(inputs, grads, strict=True):
                if grad is not None and bool((grad != 0).any()):
                    moved.add(name)
                    reach[source] |= grad != 0
    return moved, {n for n, r in reach.items() if bool(r.all())}, sum(value.numel() for value in free.values())


def _is_delta(site: Site) -> bool:
    return is_point_mass(site["fn"])


def check_same_data(prototype: Particles, particles: Particles) -> None:
    """Refuses data that change from run to run: each particle would weigh other data."""
    for name, site in prototype.model.items():
        if holds_data(site) and name in particles.model:
            first, now = site["value"], particles.model[name]["value"]
            if first is not now and not bool(((first == now) | (first.isnan() & now.isnan())).all()):
                raise EvidenceError(
                    f"expected the same data at every run, but those at site {name!r} changed from one particle to the "
                    "next: fix their order and any random preprocessing before the programs see them"
                )


def holds_data(site: Site) -> bool:
    """Whether a site of the model observes data; a point mass (deterministic or reparameterised sites) only names a value."""
    return site["is_observed"] and not is_deterministic(site) and not _is_delta(site)


def missed_by_guide(plan: Plan) -> tuple[str, ...]:
    """Latents at which the model draws values that the guide gives no density to, a sentence each.

    What the posterior has there no weight stands for: the estimate is of p(x) without it, and no diagnostic of the weights
    shows it. Looked for with :data:`SUPPORT_DRAWS` draws of each latent's own law, which disturb no other draw.
    """
    found = []
    with torch.no_grad(), forked_rng(), pyro.validation_enabled(False):
        for name, site in plan.prototype.guide.items():
            law = plan.prototype.model.get(name)
            if law is None or law["is_observed"] or is_deterministic(site) or _is_delta(site) or _is_delta(law):
                continue
            if not excludes_numbers(site["fn"]):
                continue
            try:
                values = law["fn"].sample(torch.Size((SUPPORT_DRAWS,)))
            except NotImplementedError:  # an improper law, which is no less wide for it
                continue
            share = 1 - float(in_support(site["fn"], values).double().mean())
            if share > 0:
                found.append(
                    f"the guide has no density at {100 * share:.2g} % of the values of {name!r} that the model draws: what the "
                    "posterior has there is left out, and log p(x) is above the estimate by it; give the guide the model's "
                    "support"
                )
    return tuple(found)
