"""What a pair says on average, read off its traces: means of x given latents, and of latents given x.

    E[x | z_s = v, s fixed]      each latent that is not fixed at E[z_l | the latents above it]
    E_q[z_1..L | x]              each guide site at its mean given the guide sites before it

Nothing is drawn, so the numbers are the same at every call. For one layer both are exact conditional means; for a chain
they are the mean at the means of the layers before, which is what a picture of a hierarchy shows. Only the contract of
:class:`ppl_models.pair.ModelGuidePair` is used: programs and site names, never networks. The pair runs as it stands, so
call ``eval()`` first where it has dropout or running statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from inference.bounds.sites import bare_law
from inference.generated import data_site
from ppl_models.pair import ModelGuidePair

ROWS_AT_ONCE = 1024


class NoMeanError(ValueError):
    """A law without a mean that can stand in for a draw; the message names the site."""


def conditional_mean(pair: ModelGuidePair, latents: Mapping[str, Tensor]) -> Tensor:
    """E[x | latents], the latents that are left out at their mean given those above them.

    Args:
        pair: the programs.
        latents: values by site, each ``[n, *event]`` with one n.

    Returns:
        ``[n, *data_shape]`` in data units (for classes the expected class index).

    Raises:
        ValueError: a name that is no latent site, or different numbers of rows.
        NoMeanError: a site's law has no mean.

    Example:
        >>> from ppl_models.linear_gaussian import LinearGaussian
        >>> pair = LinearGaussian(torch.tensor([[2.0], [0.0]]), torch.tensor([0.0, 1.0]), noise_scale=1.0)
        >>> conditional_mean(pair, {"z": torch.tensor([[0.0], [3.0]])}).tolist()
        [[0.0, 1.0], [6.0, 1.0]]
    """
    unknown = [name for name in latents if name not in pair.latent_sites]
    sizes = {len(value) for value in latents.values()}
    if unknown or len(sizes) != 1:
        raise ValueError(
            f"expected values of latent sites among {', '.join(pair.latent_sites)}, all with the same number of rows, "
            f"got { {name: list(value.shape) for name, value in latents.items()} }"
        )
    trace = model_at_means(pair, sizes.pop(), latents)
    return trace.nodes[data_site(pair, trace)]["value"]


def model_at_means(pair: ModelGuidePair, size: int, latents: Mapping[str, Tensor]) -> poutine.Trace:
    """A trace of the model that generates ``size`` data, given latents fixed and all else at its mean."""
    with torch.no_grad(), _AtMeans(pair):
        return poutine.trace(poutine.condition(pair.model, data=dict(latents))).get_trace(size=size)


def at_first_label(pair: ModelGuidePair) -> ModelGuidePair:
    """The pair at one label for all data, the first that it was given; itself where it has none, or one for all."""
    labels = pair.labels
    return pair if labels is None or labels.dim() == 0 else pair.given(labels[0])


def guide_means(pair: ModelGuidePair, x: Tensor) -> dict[str, Tensor]:
    """E_q[z | x] by latent site, ``[N, *event]`` each; deeper guide sites given the means of those before.

    Args:
        pair: the programs.
        x: data ``[N, *data_shape]``, taken :data:`ROWS_AT_ONCE` rows at a time.

    Raises:
        NoMeanError: a guide site's law has no mean.
    """
    pair.batch_size(x)
    chunks = []
    with torch.no_grad(), _AtMeans(pair):
        for i, rows in enumerate(x.split(ROWS_AT_ONCE)):
            own = pair.of_rows(slice(i * ROWS_AT_ONCE, i * ROWS_AT_ONCE + len(rows)))
            trace = poutine.trace(own.guide).get_trace(rows)
            chunks.append({site: trace.nodes[site]["value"] for site in pair.latent_sites})
    return {site: torch.cat([chunk[site] for chunk in chunks]) for site in pair.latent_sites}


def activity(means: Tensor) -> Tensor:
    """A_u = Var_x(E_q[u | x]) of each latent dimension u: how much of it the data move.

    Burda, Grosse and Salakhutdinov 2015 (arXiv:1509.00519), section 5.2; a unit counts as active above 0.01.

    Args:
        means: E_q[z | x], ``[N, *event]``.

    Returns:
        ``[d]``, the event's dimensions flattened; in squared units of the latent.

    Example:
        >>> activity(torch.tensor([[1.0, 5.0], [-1.0, 5.0]])).tolist()
        [1.0, 0.0]
    """
    return means.flatten(1).var(0, correction=0)


def data_mean(fn: Any) -> Tensor:
    """E[x] of the data site's law, in data units: for a categorical the expected class index, as PyTorch has no mean.

    Raises:
        NoMeanError: the law has no mean.

    Example:
        >>> import pyro.distributions as dist
        >>> float(data_mean(dist.Categorical(probs=torch.tensor([0.5, 0.0, 0.5]))))
        1.0
    """
    law = bare_law(fn)
    if isinstance(law, torch.distributions.Categorical):
        return law.probs @ torch.arange(law.probs.shape[-1], dtype=law.probs.dtype, device=law.probs.device)
    return _mean("the data site", fn)


def _mean(name: str, fn: Any) -> Tensor:
    try:
        mean = fn.mean
    except NotImplementedError:
        mean = torch.tensor(torch.nan)
    if bool(mean.isnan().any()):
        raise NoMeanError(
            f"expected a law with a mean at {name}, got {fn}: these pictures need latents (and data) with means"
        )
    return mean


class _AtMeans(Messenger):
    """Puts each sample site that nothing else has fixed at the mean of its law."""

    def __init__(self, pair: ModelGuidePair) -> None:
        super().__init__()
        self.latent_sites = pair.latent_sites

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["value"] is None and not site_is_subsample(msg):
            latent = msg["name"] in self.latent_sites
            msg["value"] = _mean(f"site {msg['name']!r}", msg["fn"]) if latent else data_mean(msg["fn"])
