"""What the pictures of a latent space show, as plain arrays: traversals and a map, drawn in :mod:`inference.views.figures`.

A traversal asks the model what one latent dimension does, x = E[x | z] as z_i runs over its prior; a map asks the guide
where the data lie, E_q[z | x]. Both name dimensions 0-based, as ``z[i]`` in code, and rank them by how much the data move
them, Var_x(E_q[z_i | x]).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from inference.bounds.sites import base_law
from inference.views.plot_data import Array, to_array
from inference.views.probing import activity, at_first_label, conditional_mean, guide_means, model_at_means
from inference.views.projection import coordinate_plane
from ppl_models.pair import ModelGuidePair


@dataclass(frozen=True)
class Traversal:
    """E[x | z] as one latent dimension at a time moves over the prior, the most active dimension first.

    Attributes:
        site: the latent site that is moved.
        dims: which of its dimensions, 0-based as in ``z[i]``, ``[R]``.
        activity: Var_x(E_q[z_i | x]) of each, ``[R]``.
        positions: where on the prior, in standard deviations of a normal with the same quantile, ``[S]``.
        means: E[x | z], ``[R, S, *data_shape]``.
        data: the data that the activity was read off, ``[N, *data_shape]``.
        centre: where the other dimensions are, in words.
        num_dims: how many the site has; 0: those shown.
    """

    site: str
    dims: tuple[int, ...]
    activity: Array
    positions: Array
    means: Array
    data: Array
    centre: str
    num_dims: int = 0


@dataclass(frozen=True)
class LatentMap:
    """E_q[z | x] of each datum on two axes, ``[N, 2]``, with its label if there is one, ``[N]``."""

    site: str
    coordinates: Array
    labels: NDArray[Any] | None
    axes: tuple[str, str]
    label_names: tuple[str, ...] | None = None


def traversal(
    pair: ModelGuidePair,
    x: Tensor,
    *,
    site: str | None = None,
    datum: Tensor | None = None,
    max_dims: int = 10,
    steps: int = 7,
) -> Traversal:
    """Moves each latent dimension over the prior's quantiles Phi(t), t = -3..3, all others held.

    The value at t is F^-1(Phi(t)), with F the prior's distribution function: mean + t sd for a Gaussian. Latents above
    the site are held too; those below follow at their conditional means. A pair that was given labels is shown at the first.

    Args:
        pair: the programs.
        x: data that tell how active each dimension is, ``[N, *data_shape]``.
        site: the latent site to move; the top of the chain by default.
        datum: one datum ``[*data_shape]`` at whose E_q[z | x] the others are held; the prior's mean by default.
        max_dims: how many dimensions to show, the most active ones.
        steps: S, how many values of t.

    Raises:
        ValueError: an unknown site, a datum beside labels of other data, fewer than two steps, or a prior whose quantiles
            are not known by dimension.
        NoMeanError: a law has no mean.

    Example:
        >>> from ppl_models.linear_gaussian import LinearGaussian
        >>> pair = LinearGaussian(torch.tensor([[0.0, 2.0]]), torch.zeros(1), noise_scale=1.0)
        >>> moved = traversal(pair, torch.tensor([[-1.0], [1.0]]), steps=3)
        >>> moved.dims, moved.means[..., 0].round(6).tolist()
        ((1, 0), [[-6.0, 0.0, 6.0], [0.0, 0.0, 0.0]])
    """
    site = _latent_site(pair, site)
    if steps < 2 or max_dims < 1:
        raise ValueError(f"expected steps >= 2 and max_dims >= 1, got {steps} and {max_dims}")
    if datum is not None and pair.labels is not None and pair.labels.dim() == 1:
        raise ValueError(
            "expected one label for all with a datum, got a label for each of the data: use traversal(pair.given(k), ...) with "
            "the datum's own"
        )
    one = at_first_label(pair)
    held = guide_means(one, datum.unsqueeze(0)) if datum is not None else _prior_means(one)
    above = {name: held[name] for name in pair.latent_sites[: pair.latent_sites.index(site)]}
    positions = torch.linspace(-3, 3, steps, dtype=torch.float64)
    moved = _quantiles(
        site, model_at_means(one, 1, above).nodes[site]["fn"], torch.special.ndtr(positions).to(x.device)
    )
    active = activity(guide_means(pair, x)[site])
    dims = active.argsort(descending=True, stable=True)[:max_dims]
    rows = held[site].flatten(1).repeat(len(dims), steps, 1)
    for row, dim in enumerate(dims.tolist()):
        rows[row, :, dim] = moved[:, dim]
    count = len(dims) * steps
    latents = {name: value.expand(count, *value.shape[1:]) for name, value in above.items()}
    means = conditional_mean(one, latents | {site: rows.reshape(count, *held[site].shape[1:])})
    return Traversal(
        site,
        tuple(dims.tolist()),
        to_array(active[dims]),
        to_array(positions),
        to_array(means).reshape(len(dims), steps, *pair.data_shape),
        to_array(x),
        "the prior's mean" if datum is None else "a datum's posterior mean",
        len(active),
    )


def latent_map(
    pair: ModelGuidePair,
    x: Tensor,
    labels: Tensor | None = None,
    *,
    site: str | None = None,
    label_names: Sequence[str] | None = None,
) -> LatentMap:
    """E_q[z | x] of each datum, on the two most active dimensions of z; on its one against the row number.

    Args:
        pair: the programs.
        x: data ``[N, *data_shape]``.
        labels: what colours each datum, ``[N]``.
        site: the latent site; the top of the chain by default.
        label_names: what each label stands for, by its number.

    Raises:
        ValueError: an unknown site, or not as many labels as data.
    """
    site = _latent_site(pair, site)
    if labels is not None and labels.shape != (len(x),):
        raise ValueError(f"expected one label per datum, shape [{len(x)}], got {list(labels.shape)}")
    means = guide_means(pair, x)[site].flatten(1)
    active = activity(means)
    order = active.argsort(descending=True, stable=True)[:2].sort().values.tolist()
    plane = coordinate_plane(means.shape[1], (order[0], order[-1]), site)
    names = [f"E[{label} | x]" for label in plane.labels[: len(order)]]
    if means.shape[1] > 2:
        names = [f"{n}, activity {active[i]:.2f}" for n, i in zip(names, order, strict=True)]
    first, second = names if len(names) == 2 else (names[0], "row of the data")
    numbers = None if labels is None else labels.cpu().numpy()
    return LatentMap(
        site, plane(to_array(means)), numbers, (first, second), None if label_names is None else tuple(label_names)
    )


def _latent_site(pair: ModelGuidePair, site: str | None) -> str:
    if site is None:
        return pair.latent_sites[0]
    if site not in pair.latent_sites:
        raise ValueError(f"expected a latent site among {', '.join(pair.latent_sites)}, got {site!r}")
    return site


def _prior_means(pair: ModelGuidePair) -> dict[str, Tensor]:
    trace = model_at_means(pair, 1, {})
    return {site: trace.nodes[site]["value"] for site in pair.latent_sites}


def _quantiles(site: str, fn: Any, probabilities: Tensor) -> Tensor:
    """F^-1 of each dimension of one latent, ``[S, d]``, under a law of batch shape [1] with independent dimensions."""
    law = base_law(fn)
    try:
        if law.event_shape:
            raise NotImplementedError
        values = law.icdf(probabilities.reshape(-1, *[1] * len(law.batch_shape)))
    except NotImplementedError:
        raise ValueError(
            f"expected a prior at {site!r} with independent dimensions and known quantiles, got {fn}: "
            "a traversal is not defined for it"
        ) from None
    return values.flatten(1)
