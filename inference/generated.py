"""Data of a model's own making, read at its data site: what a program returns may be something else, such as a mean."""

from __future__ import annotations

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_models.pair import ModelGuidePair


def data_site(pair: ModelGuidePair, trace: poutine.Trace) -> str:
    """Name of the one sample site of a model trace that is not latent: ``x``, or ``x_0`` for a diffusion.

    Raises:
        ValueError: no such site, or several.
    """
    names = [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and name not in pair.latent_sites
    ]
    if len(names) != 1:
        raise ValueError(
            f"expected one data site in the model beside the latent sites {', '.join(pair.latent_sites)}, "
            f"got {', '.join(names) or 'none'}: list all other sites in latent_sites"
        )
    return names[0]


def generate(pair: ModelGuidePair, size: int) -> tuple[poutine.Trace, Tensor]:
    """A trace of the model that generates ``size`` data, and the data ``[size, *data_shape]``; no gradients.

    Raises:
        ValueError: as from :func:`data_site`.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> trace, x = generate(LinearGaussian.random(data_dim=3, latent_dim=2), 5)
        >>> x.shape, trace.nodes["z"]["value"].shape
        (torch.Size([5, 3]), torch.Size([5, 2]))
    """
    with torch.no_grad():
        trace = poutine.trace(pair.model).get_trace(size=size)
    return trace, trace.nodes[data_site(pair, trace)]["value"]
