r"""Scales, masks and factors: which programs have terms that add up to a bound of log p(x), and which only look so.

    log p(x) >= sum over sites of E_q[log p(site | parents) - log q(site | parents)]

needs each factor whole, and both factors of a latent:

- a *scale* s (``poutine.scale``, a subsampled plate) puts p^s in the place of p, which does not integrate to one;
- a *mask* may leave out observed numbers (they are not observed), and a latent in both programs (it is not there); in one of
  them alone it leaves log p or -log q of the latent without the other, and the sum can be above log p(x) by any amount;
- a *factor* in the guide gives weights to draws that were drawn without them.

Masks are compared by what they leave out, whether ``poutine.mask`` or ``Distribution.mask`` says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions import MaskedDistribution, Unit
from torch import Tensor
from torch.distributions import Independent

from inference.bounds.sites import PairError, Site, is_deterministic

__all__ = ["counted", "is_scaled", "refuse_parts", "unmasked", "why_no_bound"]


def unmasked(law: Any) -> Any:
    """A law without the masks put on it or on what it wraps.

    Example:
        >>> import pyro.distributions as dist
        >>> law = dist.Normal(torch.zeros(3), 1.0).mask(torch.tensor([True, False, True])).to_event(1)
        >>> round(float(law.log_prob(torch.zeros(3))), 4), round(float(unmasked(law).log_prob(torch.zeros(3))), 4)
        (-1.8379, -2.7568)
    """
    if isinstance(law, MaskedDistribution):
        return unmasked(law.base_dist)
    if isinstance(law, Independent):
        return unmasked(law.base_dist).to_event(law.reinterpreted_batch_ndims)
    return law


def counted(site: Site) -> Tensor:
    """Which numbers of a site count, bool, broadcastable to its batch shape and event shape together."""
    law, event_dims = site["fn"], site["fn"].event_dim
    found = _with_dims(site["mask"], event_dims)
    while isinstance(law, (MaskedDistribution, Independent)):
        if isinstance(law, MaskedDistribution):
            found = found & _with_dims(law._mask, law.event_dim)
        law = law.base_dist
    return found


def is_scaled(site: Site) -> bool:
    """Whether a site has a scale other than that of subsampled plates."""
    plates = math.prod((f.full_size or f.size) / f.size for f in site["cond_indep_stack"] if f.size)
    scale = torch.as_tensor(site["scale"], dtype=torch.float64)
    return bool(((scale / plates - 1).abs() > 1e-6).any())


def why_no_bound(model: dict[str, Site], guide: dict[str, Site], with_scales: bool = True) -> Iterator[tuple[str, str]]:
    """Why the sum of the terms is no bound of log p(x), each time with the remedy; without scales where these are wanted."""
    scaled = dict.fromkeys(name for name, site in _once(model, guide) if is_scaled(site))
    if scaled and with_scales:
        sites, are = ("sites", "are") if len(scaled) > 1 else ("site", "is")
        yield (
            f"{sites} {', '.join(map(repr, scaled))} {are} scaled, and powers of densities are no densities",
            "leave poutine.scale out (fit weighs rates by kl_warmup_epochs)",
        )
    for name, site in guide.items():
        if is_deterministic(site):
            continue
        if name not in model and isinstance(unmasked(site["fn"]), Unit):
            yield (
                f"the guide has a factor, {name!r}, by which its draws were not drawn",
                "put pyro.factor into the model, or the density into the guide's laws",
            )
        if name in model and not model[name]["is_observed"] and not is_deterministic(model[name]):
            ours, theirs = counted(site), counted(model[name])
            if not bool((ours == theirs).all()):
                side = "model" if bool((ours & ~theirs).any()) else "guide"
                yield (
                    f"latent {name!r} is masked in the {side} and not in the other program, so that one of log p and "
                    "-log q counts alone",
                    "put the same poutine.mask around it in both; where data are missing, mask the observed site alone",
                )


def refuse_parts(model: dict[str, Site], guide: dict[str, Site], purpose: str, with_scales: bool = True) -> None:
    """Refuses programs of which :func:`why_no_bound` says something, and subsampled plates.

    Args:
        model: the model's sites.
        guide: the guide's.
        purpose: what whole densities are needed for, as in "for a bound of log p(x)".
        with_scales: False lets scales pass, those of subsampled plates too: for objectives, which may be weighted.

    Raises:
        PairError: the message names the site or plate, and the remedy.
    """
    for _, site in _once(model, guide) if with_scales else ():
        for frame in site["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise PairError(
                    f"expected whole plates {purpose}, got {frame.size} of {frame.full_size} in plate {frame.name!r}, which "
                    'scales each term: use pyro.plate("data", len(x)), and pass batches'
                )
    for why, remedy in why_no_bound(model, guide, with_scales):
        raise PairError(f"expected whole densities {purpose}, but {why}: {remedy}")


def _once(model: dict[str, Site], guide: dict[str, Site]) -> Iterator[tuple[str, Site]]:
    """All random sites, those of both programs once if their scales are alike."""
    for name, site in model.items():
        if not is_deterministic(site):
            yield name, site
    for name, site in guide.items():
        alike = name in model and bool((torch.as_tensor(site["scale"]) == torch.as_tensor(model[name]["scale"])).all())
        if not is_deterministic(site) and not alike:
            yield name, site


def _with_dims(mask: Any, event_dims: int) -> Tensor:
    mask = torch.as_tensor(True if mask is None else mask)
    return mask.reshape(*mask.shape, *[1] * event_dims) if mask.dim() else mask
