"""The ladder of bounds as a text table and as a picture; what is drawn apart from how.

Upper row: each rung's mean over data at its place in nats, with error bars of two standard errors; a triangle points
towards where log p(x) is in expectation. Lower row: the gaps between rungs, by name. The right column enlarges the top,
where the tight bounds are, because the ELBO is often far below them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from inference.views.drawing import BLUE, GREEN, GREY, VERMILION, style, typeset
from inference.views.images import Array
from inference.views.tables import text_table

if TYPE_CHECKING:
    from inference.bounds.ladder import Ladder

MARKS = {"lower": (">", BLUE), "exact": ("D", GREEN), "upper": ("<", VERMILION)}
BAR = 2.0  # standard errors each way


@dataclass(frozen=True)
class LadderPicture:
    """What the picture shows: rungs from the lowest up, and gaps as (name, from, to, its standard error), nats.

    ``top`` is the range of nats that is enlarged.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    means: Array
    errors: Array
    gaps: tuple[tuple[str, float, float, float], ...]
    top: tuple[float, float]
    title: str


def ladder_table(ladder: Ladder) -> str:
    """The rungs as text, then the gaps by name, the notes, and whether the order holds."""
    rows = []
    for i, rung in enumerate(ladder.rungs):
        rise = f"{rung.mean - ladder.rungs[i - 1].mean:+.4f}" if i else ""
        bits = f"{ladder.bits_per_dim(rung.name):.4f}"
        rows.append([rung.name, f"{rung.mean:.4f}", f"{rung.mean_std_error:.4f}", bits, rise, rung.meaning])
    gaps = [
        [gap.name, f"{gap.value:.4f}", f"{gap.std_error:.4f}", f"{gap.below} to {gap.above}"] for gap in ladder.gaps
    ]
    origin = "simulated from the model" if ladder.simulated else "given"
    return "\n".join(
        [
            f"log p(x), nats, mean over {len(ladder.data)} data {origin}; lower bounds in expectation up to AIS",
            text_table(["rung", "nats", "+- SE", "bits/dim", "rise", "what it is"], rows),
            "",
            text_table(["gap", "nats", "+- SE", "between"], gaps),
            "",
            *(f"  {note}" for note in ladder.notes),
            f"  {ladder.check()}",
        ]
    )


def ladder_picture(ladder: Ladder) -> LadderPicture:
    """A ladder as arrays; the enlarged range is that of AIS and what is above it, two rungs at least, with their bars."""
    means = np.array([rung.mean for rung in ladder.rungs])
    errors = np.array([rung.mean_std_error for rung in ladder.rungs])
    tight = slice(min([rung.name for rung in ladder.rungs].index("AIS"), len(means) - 2), None)
    bars = np.where(np.isfinite(errors), BAR * errors, 0.0)
    low, high = float((means - bars)[tight].min()), float((means + bars)[tight].max())
    margin = 0.08 * (high - low) or max(1e-6, 1e-6 * abs(high))
    gaps = tuple((gap.name, ladder[gap.below].mean, ladder[gap.above].mean, gap.std_error) for gap in ladder.gaps)
    origin = "data simulated from the model" if ladder.simulated else "given data"
    return LadderPicture(
        tuple(rung.name for rung in ladder.rungs),
        tuple(rung.kind for rung in ladder.rungs),
        means,
        errors,
        gaps,
        (low - margin, high + margin),
        f"Bounds on log p(x), mean over {len(ladder.data)} {origin}",
    )


def draw_ladder(data: LadderPicture) -> Figure:
    """Rungs above, gaps below; all of it on the left, the top enlarged on the right."""
    with style():
        height = 1.9 + 0.42 * len(data.names) + 0.4 * len(data.gaps)
        figure = Figure(figsize=(9.6, height), layout="constrained")
        grid = figure.subplots(
            2, 2, sharex="col", sharey="row", height_ratios=(len(data.names) + 0.4, 0.9 * len(data.gaps) + 0.4)
        )
        for column, title in enumerate(("all rungs", "the top, enlarged")):
            rungs, gaps = grid[0, column], grid[1, column]
            _draw_rungs(rungs, data)
            _draw_gaps(gaps, data)
            rungs.set_title(title)
            gaps.set_xlabel("nats per datum")
        grid[0, 1].set_xlim(*data.top)
        for axes in grid[1]:
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.ticklabel_format(axis="x", useOffset=False)
        figure.suptitle(f"{data.title}; bars: ± {BAR:g} standard errors", fontsize=10)
    return figure


def _draw_rungs(axes: Axes, data: LadderPicture) -> None:
    for y, (mean, error, kind) in enumerate(zip(data.means, data.errors, data.kinds, strict=True)):
        marker, colour = MARKS[kind]
        bar = BAR * error if np.isfinite(error) else None
        axes.errorbar(mean, y, xerr=bar, color=colour, marker=marker, markersize=6, capsize=3, elinewidth=1.4)
    exact = _decimals(float(data.errors[data.errors > 0].min(initial=1.0)))
    labels = [
        f"{name}\n" + (_with_error(mean, error) if error > 0 else typeset(f"{mean:.{exact}f}"))
        for name, mean, error in zip(data.names, data.means, data.errors, strict=True)
    ]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(-0.6, len(labels) - 0.4)
    if "exact" in data.kinds:
        axes.axvline(data.means[data.kinds.index("exact")], color=GREEN, linewidth=0.8, linestyle="--", zorder=0)
    axes.grid(True)


def _draw_gaps(axes: Axes, data: LadderPicture) -> None:
    for y, (_, start, end, _) in enumerate(data.gaps):
        axes.plot([start, end], [y, y], color=GREY, linewidth=5, solid_capstyle="butt")
        axes.plot([start, end], [y, y], color="black", linewidth=0, marker="|", markersize=9)
    labels = [f"{name}\n{_with_error(end - start, error)}" for name, start, end, error in data.gaps]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(True)


def _with_error(value: float, error: float) -> str:
    """A number with the decimals that its standard error, given to two digits, has.

    >>> _with_error(-11.22344, 0.00096), _with_error(-102.3, 12.0)
    ('−11.22344 ± 0.00096', '−102 ± 12')
    """
    if not np.isfinite(error):
        return typeset(f"{value:.3f}") + " ± unknown"
    decimals = _decimals(error)
    return typeset(f"{value:.{decimals}f}") + f" ± {error:.{decimals}f}"


def _decimals(error: float) -> int:
    return int(np.clip(1 - np.floor(np.log10(error)), 0, 8)) if error > 0 else 3
