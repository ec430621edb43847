"""What a run needs of a pair's programs beside what its loss asks for: its own parameters, its latents named, no scales.

Nothing would train, save or move a parameter of Pyro's store; a scaled term is none of the plain ELBO that a run reports; and
a latent that ``latent_sites`` leaves out would count as distortion, beyond KL warm-up and free bits.

The one constraint: programs are run once on a few data, with the random state and the parameter store left as they were.
"""

from __future__ import annotations

import pyro
import torch
from pyro import poutine
from torch import Tensor

from inference.bounds.particles import forked_rng
from inference.bounds.sites import PairError, Site, is_deterministic, sample_sites
from inference.bounds.whole_densities import refuse_parts
from ppl_models.evaluation_mode import evaluating
from ppl_models.pair import ModelGuidePair

__all__ = ["check_programs"]


def check_programs(pair: ModelGuidePair, x: Tensor) -> None:
    """Refuses ``pyro.param`` sites whose tensors are none of the pair's own parameters, scales, and wrong ``latent_sites``.

    Args:
        pair: the programs.
        x: some data, ``[B, *data_shape]``.

    Raises:
        PairError: the message names the site and the remedy.
    """
    own = {id(parameter) for parameter in pair.parameters()}
    with pyro.get_param_store().scope(), torch.no_grad(), forked_rng(), evaluating(pair):
        guide = poutine.trace(pair.guide).get_trace(x)
        model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(x)
    refuse_parts(sample_sites(model), sample_sites(guide), "for a run that reports the plain ELBO")
    _check_latents(pair, sample_sites(model))
    for program, trace in (("guide", guide), ("model", model)):
        for name in trace.param_nodes:
            value = trace.nodes[name]["value"]
            free = value.unconstrained() if hasattr(value, "unconstrained") else value
            if free is not None and free.requires_grad and id(free) not in own:
                raise PairError(
                    f"expected parameters that the pair holds, got pyro.param({name!r}) in the {program}, which lives in "
                    "Pyro's store and would stay as it is: make it an nn.Parameter of the pair or a PyroParam of a PyroModule"
                )


def _check_latents(pair: ModelGuidePair, sites: dict[str, Site]) -> None:
    """Raises PairError unless ``latent_sites`` are the model's latent sites."""
    latent = {name for name, site in sites.items() if not site["is_observed"]}
    random = {name for name in latent if not is_deterministic(sites[name])}
    stated = set(pair.latent_sites)
    if not random <= stated <= latent:
        raise PairError(
            f"expected latent_sites to name the model's latent sites, {_listed(random)}, got {_listed(stated)}: name them all "
            "in the pair's constructor, the top of the chain first"
        )


def _listed(names: set[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"
