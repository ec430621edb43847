"""log p(x, z) and log q(z | x) of whole draws, datum by datum: what gaps, surgery and calibration are made of.

    log p(x, z) = sum over model sites of log p(site | parents)        log q(z | x) = sum over guide sites

Each is ``[K, B]`` for K draws and B data, in float64, and differentiable: E_q[log p(x, z) - log q(z | x)] over the first
dim is the ELBO of each datum.

The one constraint is the contract's: one plate over the data at dim -1, and no other, so that each site has one
log-density for each draw and datum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inference.bounds.closed_forms import is_point_mass
from inference.bounds.moments import Moments
from inference.bounds.particles import PairError, Particles, Plan, Program, Site, forked_rng, make_plan, seed_generators
from inference.bounds.whole_densities import refuse_parts
from ppl_models.pair import ModelGuidePair, refuse_other_than_pair


def data_plan(pair: ModelGuidePair, x: Tensor, guide: Program | None = None) -> Plan:
    """How draws of a pair are made for given data, the contract on plates checked.

    Args:
        pair: the programs.
        x: data ``[B, *data_shape]``.
        guide: another guide in place of the pair's own.

    Raises:
        TypeError: not a pair.
        ValueError: data that the pair cannot have made.
        PairError: sites do not match, are not all inside one data plate, or have a scale or a mask of one program alone.
        NotANumberError: a log-density is NaN.
    """
    refuse_other_than_pair(pair)
    pair.check_data(x)
    plan = make_plan(pair.model, guide or pair.guide, (x,), {})
    if plan.nesting != 1 or plan.shape != x.shape[:1]:
        raise PairError(
            f"expected one plate of size {len(x)} at dim -1 around every site, got shared plates of shape "
            f"{list(plan.shape)} with {plan.nesting} plate dims: put all sites in the data plate and declare other dims "
            "as event dims"
        )
    refuse_parts(plan.prototype.model, plan.prototype.guide, "for a bound of log p(x)")
    return plan


def refuse_point_masses(plan: Plan, purpose: str) -> None:
    """Refuses guides that put a latent at a point, where a density q(z | x) is asked for.

    Args:
        plan: from :func:`data_plan`.
        purpose: what the density is wanted for, as in "take the ELBO apart".

    Raises:
        PairError: the guide has a point mass where the model has none; the message names the site.
    """
    model, guide = plan.prototype.model, plan.prototype.guide
    for name, site in guide.items():
        if (
            name in model
            and is_point_mass(site["fn"])
            and not is_point_mass(model[name]["fn"])
            and set(guide) <= set(model)
        ):
            raise PairError(
                f"expected a guide with a density at site {name!r} to {purpose}, got a point mass (Delta), as of an "
                "autoencoder or a VQ-VAE: its bound is what decompose_elbo shows"
            )


def log_joint(particles: Particles) -> Tensor:
    """log p(x, z) of a chunk of draws, ``[K, B]`` nats, float64."""
    return _total(particles.model, particles)


def log_guide(particles: Particles) -> Tensor:
    """log q(z | x) of a chunk of draws, ``[K, B]`` nats, float64."""
    return _total(particles.guide, particles)


def log_ratio(particles: Particles) -> Tensor:
    """log p(x, z) - log q(z | x), ``[K, B]`` nats, float64: its mean over draws is the ELBO.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)  # the guide is the posterior: every draw is log p(x)
        >>> plan = data_plan(pair, torch.zeros(4, 3))
        >>> ratio = log_ratio(next(plan.chunks(5)))
        >>> ratio.shape, bool((ratio - pair.log_evidence(torch.zeros(4, 3))).abs().max() < 1e-4)
        (torch.Size([5, 4]), True)
    """
    return log_joint(particles) - log_guide(particles)


def paired_bounds(first: Plan, second: Plan, num_particles: int) -> tuple[Moments, Moments, Moments]:
    """Two guides' bounds and second minus first, on common random numbers; moments of shape ``[B]``.

    Laws of one family then draw the same standardised values, so the difference is far more precise than either bound.
    """
    bounds, others, difference = Moments(), Moments(), Moments()
    size = first.default_chunk()
    for start in range(0, num_particles, size):
        count = min(size, num_particles - start)
        seed = int(torch.randint(2**62, ()))
        pair = []
        for plan in (first, second):
            with forked_rng():
                seed_generators(seed)
                pair.append(torch.cat([log_ratio(particles) for particles in plan.chunks(count, count)]))
        bounds.add(pair[0])
        others.add(pair[1])
        difference.add(pair[1] - pair[0])
    return bounds, others, difference


def latent_values(particles: Particles, site: str) -> Tensor:
    """The draws of one latent site, ``[K, B, *event]``."""
    node = particles.guide[site]
    value = node["value"] if particles.dim is not None else node["value"].unsqueeze(0)
    batch = value.shape[: value.dim() - len(node["fn"].event_shape)]
    return value.expand(particles.count, batch[-1], *value.shape[len(batch) :])


def _total(sites: dict[str, Site], particles: Particles) -> Tensor:
    terms = [site["log_prob"].to(torch.float64) for site in sites.values()]
    total = torch.stack(torch.broadcast_tensors(*terms)).sum(0)
    return total.unsqueeze(0) if particles.dim is None else total.expand(particles.count, total.shape[-1])
