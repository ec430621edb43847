"""The sites of a model and a guide: which there are, whether they match, and where a number first went wrong."""

from __future__ import annotations

import itertools
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

Site = dict[str, Any]

PARTICLES = "_particles"


class PairError(ValueError):
    """A model and a guide that do not form a pair; the message names the site and the remedy."""


class NotANumberError(ValueError):
    """A log-density that is not a number; the message names program, site and datum."""


def base_law(fn: Any) -> Any:
    """The law of which ``.to_event`` made some batch dims event dims."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn


def bare_law(fn: Any) -> Any:
    """The law without what only says which of its dims are events, or which of its numbers count."""
    while isinstance(fn, torch.distributions.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def sample_sites(trace: poutine.Trace) -> dict[str, Site]:
    """A trace's sample sites in order, without subsampling sites and the particle plate."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and name != PARTICLES
    }


def is_deterministic(site: Site) -> bool:
    """Whether a site is a ``pyro.deterministic`` one: a named value, no random variable, no term of any bound."""
    return bool(site["infer"].get("_deterministic"))


def check_sites(model: dict[str, Site], guide: dict[str, Site]) -> None:
    """Raises :class:`PairError` unless guide sites and latent model sites match, in name and batch shape."""
    for name, site in model.items():
        if site["is_observed"]:
            if name in guide and not guide[name]["is_observed"]:
                raise PairError(f"the guide draws site {name!r}, which the model observes: remove it from the guide")
        elif name not in guide:
            raise PairError(
                f"the model's latent site {name!r} has no guide site: add pyro.sample({name!r}, ...) to the guide, "
                "or pass the data that make it observed"
                + (" (sites enumerated in the model need one here)" if site["infer"].get("enumerate") else "")
                + (
                    " (obs_mask made it; .mask(...) on the law leaves entries out)"
                    if name.endswith("_unobserved")
                    else ""
                )
            )
        elif not _same_shape(site["fn"].batch_shape, guide[name]["fn"].batch_shape):
            raise PairError(
                f"the laws at site {name!r} differ in batch shape, {list(site['fn'].batch_shape)} in the model and "
                f"{list(guide[name]['fn'].batch_shape)} in the guide: put both into the same plates"
            )
    for name, site in guide.items():
        if site["is_observed"] and not is_deterministic(site) and not isinstance(site["fn"], (dist.Unit, dist.Delta)):
            whose = "the model observes too" if name in model else "is not in the model"
            raise PairError(
                f"the guide observes site {name!r}, which {whose}: data belong in the model alone, which comes first, as in "
                "decompose_elbo(model, guide, x); remove the site from the guide"
            )
        if name not in model and not site["infer"].get("is_auxiliary") and not site["is_observed"]:
            raise PairError(
                f"the guide's site {name!r} is not in the model: remove it, or mark it with "
                "infer={'is_auxiliary': True} if it only serves to draw other sites"
            )


def refuse_nan(model: dict[str, Site], guide: dict[str, Site]) -> None:
    """Raises :class:`NotANumberError` at the first site, the guide's first, with a NaN log-density."""
    for program, sites in (("guide", guide), ("model", model)):
        for name, site in sites.items():
            bad = torch.isnan(site["log_prob"])
            if bool(bad.any()):
                index = bad.nonzero()[0].tolist()
                parameters = [
                    key
                    for key in getattr(site["fn"], "arg_constraints", {})
                    if isinstance(getattr(site["fn"], key, None), Tensor)
                    and bool(getattr(site["fn"], key).isnan().any())
                ]
                cause = f"its {' and '.join(parameters)} is not a number" if parameters else "look at its value"
                if bool(torch.isnan(site["value"]).any()) and site["is_observed"]:
                    cause = "the observed data hold a NaN"
                raise NotANumberError(
                    f"expected finite log-densities, got NaN at site {name!r} of the {program}, batch index {index}: {cause}"
                )


def _same_shape(a: torch.Size, b: torch.Size) -> bool:
    """Whether two batch shapes agree but for leading ones, as Pyro's own check has it."""
    return all(m == n for m, n in itertools.zip_longest(reversed(a), reversed(b), fillvalue=1))
