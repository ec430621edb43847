"""Pictures of a calibration: a histogram of ranks and the difference of their distribution function from uniform.

A row for each quantity, the log joint first and then the least uniform latent dimensions. Left: counts by bin, with the
interval in which a bin of uniform ranks lies 99 % of the time. Right: F(u) - u, with the band in which all of it lies
95 % of the time (:func:`inference.bounds.uniformity.ecdf_band`). ∪ and a rising-then-falling S mean too narrow a guide,
∩ too wide a one, a slope a shifted one. :func:`rank_plot` computes, :func:`draw_calibration` draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from inference.bounds.calibration import Calibration
from inference.bounds.uniformity import bin_counts, ecdf, ecdf_band
from inference.views.drawing import BLUE, GREY, VERMILION, style
from inference.views.images import Array

BIN_PROBABILITY, BAND_PROBABILITY = 0.99, 0.95


@dataclass(frozen=True)
class RankPlot:
    """What the picture shows for R quantities: counts ``[R, bins]`` and ECDF differences ``[R, M-1]`` at ``places``.

    ``bin_low`` and ``bin_high`` are counts, ``band_low`` and ``band_high`` ``[M-1]`` differences of probabilities.
    """

    names: tuple[str, ...]
    rejected: tuple[bool, ...]
    p_values: Array
    counts: Array
    bin_low: float
    bin_high: float
    places: Array
    differences: Array
    band_low: Array
    band_high: Array
    num_simulations: int


def rank_plot(calibration: Calibration, most: int = 6) -> RankPlot:
    """Counts, differences and their bands.

    Args:
        calibration: from :func:`inference.bounds.calibration.simulation_based_calibration`.
        most: how many quantities to show at most: the log joint, and the least uniform of the others.

    Raises:
        ValueError: ``most`` below one.

    Example:
        >>> from inference.bounds.calibration import simulation_based_calibration
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)
        >>> plot = rank_plot(simulation_based_calibration(pair, num_simulations=200))
        >>> plot.names[0], plot.counts.shape, plot.differences.shape
        ('log p(x, z)', (3, 20), (3, 99))
    """
    if most < 1:
        raise ValueError(f"expected most >= 1, got {most}: show at least the log joint")
    last = len(calibration.names) - 1
    worst = [int(q) for q in np.argsort(-calibration.chi_square[:last], kind="stable")]
    shown = [last, *worst[: most - 1]]
    num, num_ranks, bins = calibration.num_simulations, calibration.num_draws + 1, calibration.num_bins
    ranks = calibration.ranks[:, shown]
    places = np.arange(1, num_ranks) / num_ranks
    low, high = ecdf_band(num, num_ranks, BAND_PROBABILITY)
    wrong = calibration.rejected()
    tail = (1 - BIN_PROBABILITY) / 2
    return RankPlot(
        tuple(calibration.names[q] for q in shown),
        tuple(calibration.names[q] in wrong for q in shown),
        calibration.p_value[shown],
        bin_counts(ranks, num_ranks, bins).T.astype(np.float64),
        float(stats.binom.ppf(tail, num, 1 / bins)),
        float(stats.binom.isf(tail, num, 1 / bins)),
        places,
        ecdf(ranks, num_ranks).T - places,
        low - places,
        high - places,
        num,
    )


def draw_calibration(data: RankPlot) -> Figure:
    """Two panels for each quantity, the rejected ones in vermilion and named so."""
    count = len(data.names)
    with style():
        figure = Figure(figsize=(7.4, 1.0 + 1.65 * count), layout="constrained")
        grid = figure.subplots(count, 2, squeeze=False)
        for row, (left, right) in enumerate(grid):
            colour = VERMILION if data.rejected[row] else BLUE
            _draw_histogram(left, data, row, colour)
            _draw_difference(right, data, row, colour)
            verdict = "REJECTED" if data.rejected[row] else "uniform"
            left.set_title(f"{data.names[row]}: {verdict} (p = {data.p_values[row]:.2g})", loc="left")
        grid[-1, 0].set_xlabel("rank of the truth among the guide's draws, as a fraction")
        grid[-1, 1].set_xlabel("u, fraction of the ranks")
        grid[0, 1].set_title("grey: 95 % band of each, for all its bins together", loc="right")
        figure.suptitle(f"Simulation-based calibration, {data.num_simulations} simulations", fontsize=10)
    return figure


def _draw_histogram(axes: Axes, data: RankPlot, row: int, colour: str) -> None:
    bins = data.counts.shape[1]
    axes.axhspan(data.bin_low, data.bin_high, color="#DDDDDD", zorder=0)
    axes.axhline(data.num_simulations / bins, color=GREY, linewidth=0.8)
    axes.bar((np.arange(bins) + 0.5) / bins, data.counts[row], width=0.86 / bins, color=colour)
    axes.set(xlim=(0, 1), ylabel="count", ylim=(0, 1.08 * max(data.counts[row].max(), data.bin_high)))


def _draw_difference(axes: Axes, data: RankPlot, row: int, colour: str) -> None:
    axes.fill_between(data.places, data.band_low, data.band_high, color="#DDDDDD", linewidth=0, zorder=0)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.step(data.places, data.differences[row], where="post", color=colour, linewidth=1.2)
    axes.set(xlim=(0, 1), ylabel="F(u) − u")
