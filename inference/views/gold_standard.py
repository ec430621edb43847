"""The picture of a guide beside NUTS: intervals side by side, a panel for each datum, a row for each latent dimension.

Thin line: central 89 % interval; thick: central 50 %; mark: mean. The guide's lines lie below NUTS'. A row in which the
guide is off says so in words. :func:`interval_plot` computes, :func:`draw_intervals` draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from inference.nuts import compare_guide
from inference.views.drawing import BLUE, GREY, ORANGE, VERMILION, style
from inference.views.images import Array

if TYPE_CHECKING:
    import xarray

QUANTILES = (0.055, 0.25, 0.75, 0.945)
MAX_ROWS = 60


@dataclass(frozen=True)
class IntervalPlot:
    """Means ``[R]`` and quantiles ``[R, 4]`` (:data:`QUANTILES`) of NUTS and guide, and what is said of each row."""

    names: tuple[str, ...]
    data: tuple[str, ...]
    nuts_mean: Array
    nuts_quantiles: Array
    guide_mean: Array
    guide_quantiles: Array
    findings: tuple[str, ...]


def interval_plot(tree: xarray.DataTree) -> IntervalPlot:
    """Intervals of each scalar under NUTS and under the guide.

    Args:
        tree: from :func:`inference.nuts.gold_standard`.

    Raises:
        ValueError: more scalars than fit a page.
    """
    comparison = compare_guide(tree)
    if len(comparison.names) > MAX_ROWS:
        raise ValueError(
            f"expected at most {MAX_ROWS} scalars to draw, got {len(comparison.names)}: choose fewer data, "
            "or sites with tree.map_over_datasets"
        )
    quantiles = []
    for group, leading in (("posterior", 2), ("guide", 1)):
        rows = []
        for variable in tree[group].to_dataset().data_vars.values():
            draws = variable.values.reshape(-1, *variable.shape[leading:])
            rows.append(np.quantile(draws, QUANTILES, axis=0).reshape(len(QUANTILES), -1).T)
        quantiles.append(np.concatenate(rows))
    return IntervalPlot(
        comparison.names,
        tuple(str(label) for label in comparison.data),
        comparison.nuts_mean,
        quantiles[0],
        comparison.guide_mean,
        quantiles[1],
        tuple(comparison.findings(row) for row in range(len(comparison.names))),
    )


def draw_intervals(data: IntervalPlot) -> Figure:
    """A panel for each datum; rows in which the guide is off are labelled with what is wrong."""
    labels = list(dict.fromkeys(data.data))
    rows = {label: [r for r, own in enumerate(data.data) if own == label] for label in labels}
    with style():
        heights = [len(own) for own in rows.values()]
        size = (7.4, 1.1 + sum(0.36 * n + 0.42 for n in heights))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(labels), 1, squeeze=False, sharex=True, height_ratios=[n + 0.6 for n in heights])
        for axes, (label, own) in zip(panels[:, 0], rows.items(), strict=True):
            _draw_panel(axes, data, own)
            axes.set_title(f"datum {label}", loc="left")
        panels[-1, 0].set_xlabel("latent value")
        marks = [
            Line2D([], [], color=c, marker=m, label=t) for c, m, t in ((BLUE, "o", "NUTS"), (ORANGE, "s", "guide"))
        ]
        figure.legend(handles=marks, loc="outside lower center", ncols=2, title="mean, 50 % and 89 % intervals")
        figure.suptitle("The guide beside a gold standard", fontsize=10)
    return figure


def _draw_panel(axes: Axes, data: IntervalPlot, rows: list[int]) -> None:
    for place, row in enumerate(rows):
        series = (
            (BLUE, "o", -0.16, data.nuts_mean[row], data.nuts_quantiles[row]),
            (ORANGE, "s", 0.16, data.guide_mean[row], data.guide_quantiles[row]),
        )
        for colour, marker, offset, mean, quantiles in series:
            y = place + offset
            axes.plot(quantiles[[0, 3]], [y, y], color=colour, linewidth=1)
            axes.plot(quantiles[[1, 2]], [y, y], color=colour, linewidth=3.2, solid_capstyle="butt")
            axes.plot([mean], [y], color=colour, marker=marker, markersize=4, markeredgecolor="white")
        if data.findings[row] != "agrees":
            place_right = axes.get_yaxis_transform()
            colour = GREY if data.findings[row].startswith("agrees") else VERMILION
            said: dict[str, Any] = {"va": "center", "color": colour, "fontsize": 7}
            axes.text(1.01, place, data.findings[row], transform=place_right, **said)
    axes.set_yticks(range(len(rows)), [data.names[row] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(True, axis="x")
