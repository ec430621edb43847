"""Progressive generation: what is left to chance once the upper layers are held (lecture notes 004, Observation 2).

    z_L -> z_{L-1} -> .. -> z_1 -> x        hold the first k sites, redraw the others, look at E[x | z_1..L]

    V_k = E[ Var( E[x | z] | the first k sites ) ],    V_0 >= V_1 >= .. >= V_L = 0    (law of total variance)

so V_{k-1} - V_k is what the k-th site from the top settles. That it falls is no finding; *where* it falls is. So it is split
in two: the part along the leading principal components of E[x | z], as many as hold half of V_0 (coarse), and the rest
(fine). A model generates coarse to fine if its upper layers settle more of the coarse part than of the fine one.

Only the contract of :class:`ppl_models.pair.ModelGuidePair` is used. Values are in data units, variances in squared data
units, averaged over the entries of x; they are unbiased, with standard errors over independent tops of the chain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from pyro import poutine
from torch import Tensor

from inference.bounds.particles import forked_rng
from inference.generated import data_site
from inference.printed import Printed
from inference.views.drawing import draw_mosaic, mosaic_inches, style
from inference.views.images import Array, Range, is_image, to_rgb
from inference.views.plot_data import to_array
from inference.views.probing import at_first_label, data_mean
from inference.views.tables import text_table
from ppl_models.pair import ModelGuidePair

COARSE_SHARE = 0.5  # of the variance, which the components that are called coarse hold at least


@dataclass(frozen=True, repr=False)
class Progressive(Printed):
    """E[x | z] under redraws, by how many sites are held; R = L + 1 rows, the first with nothing held.

    Attributes:
        held: the sites held in each row, top of the chain first, ``[R]``.
        means: E[x | z] of one chain's redraws, ``[R, C, *data_shape]``.
        variance: V_k, ``[R]``.
        std_error: its standard error, ``[R]``.
        coarse: the part of V_k along the leading principal components, ``[R]``.
        coarse_std_error: its standard error, ``[R]``.
        num_components: how many components these are.
    """

    held: tuple[tuple[str, ...], ...]
    means: Array
    variance: Array
    std_error: Array
    coarse: Array
    coarse_std_error: Array
    num_components: int

    @property
    def fine(self) -> Array:
        """V_k less its coarse part, ``[R]``."""
        return self.variance - self.coarse

    @property
    def settled(self) -> Array:
        """Share of V_0 that the held sites settle, 1 - V_k / V_0, ``[R]``: from 0 to 1; NaN where nothing varies."""
        return _settled(self.variance)

    @property
    def coarse_settled(self) -> Array:
        """The same of the coarse part, ``[R]``."""
        return _settled(self.coarse)

    @property
    def fine_settled(self) -> Array:
        """The same of the fine part, ``[R]``."""
        return _settled(self.fine)

    def table(self) -> str:
        """One row for each number of sites held: the variance left, its error, and what is settled of coarse and fine."""
        shares = zip(self.settled, self.coarse_settled, self.fine_settled, strict=True)
        rows = [
            [_label(names), f"{v:.3g}", f"{error:.1g}", *(f"{share:.1%}" for share in settled)]
            for names, v, error, settled in zip(self.held, self.variance, self.std_error, shares, strict=True)
        ]
        return text_table(["held", "variance left", "+- SE", "settled", "of the coarse", "of the fine"], rows)


def progressive(pair: ModelGuidePair, num_redraws: int = 10, num_chains: int = 100, seed: int = 0) -> Progressive:
    """Holds the top of the chain, ever more of it, and redraws the rest; of a pair that was given labels, at the first.

    Args:
        pair: the programs; their latent sites are a chain, top first.
        num_redraws: C >= 2 redraws of each held top.
        num_chains: independent tops that the variances are averaged over, at least 2; the first is the one to look at.
        seed: of the draws; the caller's random state is left alone.

    Returns:
        :class:`Progressive`.

    Raises:
        ValueError: too few redraws or chains.
        NoMeanError: the data's law has no mean.

    Example:
        >>> from ppl_models.linear_hierarchy import LinearHierarchy
        >>> shown = progressive(LinearHierarchy.random(data_dim=3, latent_dims=(2, 1)))
        >>> shown.held
        ((), ('z_2',), ('z_2', 'z_1'))
        >>> bool(shown.variance[0] > shown.variance[1] > shown.variance[2] == 0)
        True
    """
    if num_redraws < 2 or num_chains < 2:
        raise ValueError(
            f"expected num_redraws >= 2 and num_chains >= 2, got {num_redraws} and {num_chains}: a variance needs two draws"
        )
    pair = at_first_label(pair)
    with torch.no_grad(), forked_rng():
        torch.manual_seed(seed)
        size = num_chains * num_redraws
        leading = _leading_components(_means(pair, {}, size))
        top = poutine.trace(pair.model).get_trace(size=num_chains)
        held, rows, parts = [], [], []
        for k in range(len(pair.latent_sites) + 1):
            names = pair.latent_sites[:k]
            values = {name: top.nodes[name]["value"].repeat_interleave(num_redraws, 0) for name in names}
            means = _means(pair, values, size).reshape(num_chains, num_redraws, *pair.data_shape)
            held.append(names)
            rows.append(means[0])
            flat = means.flatten(2).double()
            parts.append((_variance(flat), _variance(flat @ leading @ leading.T)))
    variance, std_error = _average([whole for whole, _ in parts])
    coarse, coarse_std_error = _average([coarse for _, coarse in parts])
    return Progressive(
        tuple(held), to_array(torch.stack(rows)), variance, std_error, coarse, coarse_std_error, leading.shape[1]
    )


def draw_progressive(data: Progressive, value_range: Range | None = None) -> Figure:
    """A row of redraws for each number of sites held, the share that they settle beside it; data must be images.

    Raises:
        ValueError: the data are no images, or no value range is stated.
    """
    if not is_image(data.means.shape[2:]):
        raise ValueError(f"expected images to draw, got data of shape {data.means.shape[2:]}: print the table instead")
    rows, columns = data.means.shape[:2]
    with style():
        tiles = to_rgb(data.means.reshape(-1, *data.means.shape[2:]), value_range)
        width, height = mosaic_inches(rows, columns, tiles.shape[1:3])
        figure = Figure(figsize=(width + 3.2, max(height + 1.0, 2.4)), layout="constrained")
        axes = figure.add_subplot()
        mosaic = draw_mosaic(axes, tiles, columns)
        axes.set_yticks(mosaic.y, [_label(names) for names in data.held])
        axes.set(ylabel="held", xlabel="redraws of all sites below")
        right = axes.secondary_yaxis("right")
        shares = zip(data.coarse_settled, data.fine_settled, strict=True)
        right.set_yticks(mosaic.y, [f"settled: {c:.0%} of the coarse,\n{f:.0%} of the fine" for c, f in shares])
        right.tick_params(length=0)
        right.spines[:].set_visible(False)
        axes.set_title("E[x | z] with the upper layers held and the lower ones redrawn")
    return figure


def _settled(variance: Array) -> Array:
    """1 - V_k / V_0; NaN where nothing varies in the first place."""
    return 1 - variance / variance[0] if variance[0] > 0 else np.full_like(variance, math.nan)


def _label(names: tuple[str, ...]) -> str:
    if len(names) <= 3:
        return ", ".join(names) or "nothing"
    return f"{names[0]} .. {names[-1]}"


def _means(pair: ModelGuidePair, held: dict[str, Tensor], size: int) -> Tensor:
    """E[x | z] of ``size`` draws of the model given the held sites, ``[size, *data_shape]``."""
    trace = poutine.trace(poutine.condition(pair.model, data=held)).get_trace(size=size)
    return data_mean(trace.nodes[data_site(pair, trace)]["fn"])


def _leading_components(means: Tensor) -> Tensor:
    """As many leading principal directions as hold half the variance, orthonormal columns ``[D, q]``."""
    centred = means.flatten(1).double()
    _, singular, directions = torch.linalg.svd(centred - centred.mean(0), full_matrices=False)
    held = singular.square().cumsum(0)
    return directions[: int((held < COARSE_SHARE * held[-1]).sum()) + 1].T


def _variance(means: Tensor) -> Tensor:
    """Variance over redraws, averaged over entries: ``[num_chains]`` from ``[num_chains, num_redraws, D]``."""
    return means.var(1).mean(1)


def _average(variances: list[Tensor]) -> tuple[Array, Array]:
    """Mean over chains and its standard error, ``[R]`` each."""
    values = torch.stack(variances)
    return to_array(values.mean(1)), to_array(values.std(1) / math.sqrt(values.shape[1]))
