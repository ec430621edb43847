"""A diffusion in pictures and as a table: its bound by t, and film strips of x_t and of the predicted x_0 on the way down.

What is drawn is apart from how: :func:`bound_by_t` and :func:`film_strip` make arrays, the ``draw_`` functions figures. Rows
of the table and parts of the bar add up to the bound.

Source: lecture notes 003 (L_VLB) and 004 ("Interpretation of DDPM's sampling": x_{t-1} is an interpolation of x_t and x_0-hat).
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from inference.ancestral import Interpolation, Trajectory, ancestral_trajectory, interpolation
from inference.views.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILION,
    draw_mosaic,
    draw_points,
    finish_plane,
    mosaic_inches,
    style,
    typeset,
)
from inference.views.images import Array, Range, is_image, to_rgb
from inference.views.plot_data import to_array
from inference.views.projection import principal_plane
from inference.views.tables import text_table
from ppl_models.ddpm import DDPM

if TYPE_CHECKING:
    from inference.bounds.diffusion_terms import DiffusionDecomposition
    from ppl_models.diffusion import Diffusion

BAND = 2.0  # standard errors each way
FAR_BELOW = 1e-3  # of the smallest L_t between: where L_T and L_0 leave the picture
FILM_COLUMNS = 9  # and the data
FILM_ROWS, FILM_POINTS = 4, 300
RANGES = 8  # rows of the table between L_0 and L_T


@dataclass(frozen=True)
class BoundByT:
    """L_t averaged over data, bits per dimension.

    Attributes:
        t: 0..T, rising.
        loss: L_t, ``[T + 1]``.
        std_error: what the draws leave.
        total: -ELBO, and its standard error.
        num_data: what was averaged over.
    """

    t: Array
    loss: Array
    std_error: Array
    total: tuple[float, float]
    num_data: int

    @property
    def parts(self) -> dict[str, float]:
        """L_0, the sum of the terms between, and L_T: they add up to ``total``."""
        return {"L_0": self.loss[0], "between": self.loss[1:-1].sum(), "L_T": self.loss[-1]}


@dataclass(frozen=True)
class FilmStrip:
    """States and predictions on the way down.

    Attributes:
        t: which t, falling.
        states: x_t, ``[len(t), N, *data_shape]``.
        predictions: x_0-hat(x_t, t), the same shape; NaN at t = 0.
        law: what the samples were drawn from, in a sentence.
        weights: A_t and B_t of x_{t-1} = A_t x_t + B_t x_0-hat + noise, ``[len(t), 2]``, NaN at t = 0; or None.
    """

    t: tuple[int, ...]
    states: Array
    predictions: Array
    law: str
    weights: Array | None = None


def bound_by_t(d: DiffusionDecomposition) -> BoundByT:
    """The curve of a decomposition.

    Raises:
        ValueError: some terms were not asked for.
    """
    if d.is_partial:
        raise ValueError(f"expected all {d.num_timesteps + 1} terms, got {len(d)}: call it without timesteps")
    curve = d.curve()
    return BoundByT(
        to_array(curve.t)[::-1],
        to_array(curve.loss_bits_per_dim)[::-1],
        to_array(curve.std_error_bits_per_dim)[::-1],
        d.bits_per_dim(),
        len(d.elbo),
    )


def film_strip(trajectory: Trajectory, count: int = 4, weights: Interpolation | None = None) -> FilmStrip:
    """The first ``count`` samples of a trajectory at the t that it kept.

    Args:
        trajectory: from :func:`inference.ancestral.ancestral_trajectory`, with ``keep``.
        count: how many samples.
        weights: from :func:`inference.ancestral.interpolation`, to be written below the columns; of all steps.

    Raises:
        ValueError: nothing was kept, or weights are given that are not those of the steps taken.
    """
    if not trajectory.states:
        raise ValueError("expected a trajectory with states, got none: pass keep=[...] to ancestral_trajectory")
    t = tuple(sorted(trajectory.states, reverse=True))
    states = [to_array(trajectory.states[step][:count]) for step in t]
    unknown = np.full_like(states[0], np.nan, dtype=np.float64)
    predictions = [
        to_array(trajectory.predictions[step][:count]) if step in trajectory.predictions else unknown for step in t
    ]
    shown = None
    if weights is not None:
        if trajectory.timesteps != (*weights.t.flip(0).tolist(), 0):
            raise ValueError(
                "expected weights of the steps taken, got others: leave them out for a respaced trajectory"
            )
        table = np.stack([to_array(weights.x_t), to_array(weights.x_0)], 1)
        shown = np.concatenate([np.full((1, 2), np.nan), table])[list(t)]
    return FilmStrip(t, np.stack(states), np.stack(predictions), trajectory.law, shown)


def draw_film(
    pair: Diffusion,
    steps: int | None = None,
    eta: float = 1.0,
    clip: tuple[float, float] | None = None,
    seed: int | None = None,
    value_range: Range | None = None,
) -> Figure:
    """A film strip of fresh samples: :data:`FILM_ROWS` images or :data:`FILM_POINTS` points, at even places of the chain.

    Args:
        pair: a diffusion; where it is a DDPM and the law its own, the weights of each step are written below.
        steps: see :func:`inference.ancestral.ancestral_trajectory`.
        eta: see there.
        clip: see there.
        seed: see there.
        value_range: of images; None for points.
    """
    visited = np.linspace(pair.num_timesteps, 1, steps or pair.num_timesteps).round().astype(int).tolist()
    kept = {visited[i] for i in np.linspace(0, len(visited) - 1, FILM_COLUMNS).round().astype(int)}
    count = FILM_ROWS if value_range is not None else FILM_POINTS
    trajectory = ancestral_trajectory(
        pair.in_turn(count), count, None if steps is None else visited, eta=eta, clip=clip, keep=[*kept, 0], seed=seed
    )
    own = steps is None and eta == 1 and clip is None and isinstance(pair, DDPM)
    return draw_film_strip(film_strip(trajectory, count, interpolation(pair.process) if own else None), value_range)  # type: ignore[arg-type]


def diffusion_table(d: DiffusionDecomposition) -> str:
    """The terms as text: L_T, sums of L_t over ranges of t, L_0; then rate, distortion and -ELBO. The rows add up."""
    unit = d.data_dim * math.log(2)
    curve = d.curve()
    loss, square = to_array(curve.loss), to_array(curve.std_error) ** 2
    where = {t: i for i, t in enumerate(d.timesteps)}
    inner = [t for t in d.timesteps if 0 < t < d.num_timesteps]
    groups = [list(part) for part in np.array_split(inner, min(RANGES, len(inner)))] if inner else []
    rows = []

    def row(name: str, steps: list[int], what: str) -> None:
        index = [where[t] for t in steps]
        value, error = loss[index].sum(), math.sqrt(square[index].sum())
        rows.append([name, f"{value:.4f}", f"{error:.4f}", f"{value / unit:.5f}", what])

    if d.num_timesteps in where:
        row(f"x_{d.num_timesteps}", [d.num_timesteps], "prior matching KL, exact")
    for group in groups:
        name = f"x_{group[0]}" + (f" .. x_{group[-1]}" if len(group) > 1 else "")
        row(name, group, _what(d, group))
    if 0 in where:
        row("x_0", [0], "-log p(x_0 | x_1), drawn: the distortion")
    if not d.is_partial:
        row("rate", [t for t in where if t > 0], "L_1 + ... + L_T")
        row("-ELBO", list(where), "rate + distortion")
    title = f"L_t of a diffusion with T = {d.num_timesteps}, mean over {len(d.elbo)} data; {d.num_particles} particles a term"
    return f"{title}\n{text_table(['site', 'nats', '+- SE', 'bits/dim', 'what it is'], rows)}\n  ({d.note})"


def _what(d: DiffusionDecomposition, steps: list[int]) -> str:
    """What the terms of these inner steps are."""
    plural = "s" if len(steps) > 1 else ""
    if all(d[f"x_{t}"].analytic is not None for t in steps):
        return f"{len(steps)} KL{plural}, closed form given x_(t+1)"
    return f"{len(steps)} term{plural} log q - log p, drawn: {d[f'x_{steps[0]}'].reason}"


def draw_bound_by_t(data: BoundByT) -> Figure:
    """L_t against t with its error band, and how L_T, the sum between and L_0 add up to the bound."""
    with style():
        figure = Figure(figsize=(7.2, 5.0), layout="constrained")
        curve, sums = figure.subplots(2, 1, height_ratios=(2.6, 1))
        inner = slice(1, len(data.t) - 1)
        t, loss = data.t[inner], data.loss[inner]
        band = BAND * np.where(np.isfinite(data.std_error[inner]), data.std_error[inner], 0.0)  # one draw has no error
        if len(t):
            marker = "." if len(t) <= 50 else None
            curve.plot(t, loss, color=BLUE, linewidth=1.3, marker=marker, label="$L_t$, 1 ≤ t < T")
            curve.fill_between(t, np.maximum(loss - band, 0.01 * loss), loss + band, color=BLUE, alpha=0.3, linewidth=0)
        for i, marker, colour, label in ((0, "o", VERMILION, "$L_0$"), (-1, "s", GREEN, "$L_T$")):
            value, error = data.loss[i], BAND * data.std_error[i]
            if 0 < value < FAR_BELOW * loss.min(initial=np.inf) and len(t):  # it would flatten the curve
                curve.plot(
                    [], [], color=colour, marker=marker, linewidth=0, label=f"{label} = {value:.1g}, below the axis"
                )
            elif value > 0:
                bars = error if 0 < error < value else None
                curve.errorbar(
                    data.t[i], value, bars, color=colour, marker=marker, linewidth=0, elinewidth=1, label=label
                )
            else:  # the density of continuous data may exceed one
                curve.plot([], [], color=colour, marker=marker, linewidth=0, label=f"{label} ≤ 0: see below")
        curve.set_yscale("log")
        low, high = curve.get_ylim()
        if high < 30 * low:  # few powers of ten, or none, to read a value from
            curve.yaxis.set_major_locator(
                LogLocator(subs=[1.0, 2.0, 5.0] if high > 3 * low else [float(k) for k in range(1, 10)])
            )
            curve.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            curve.yaxis.set_minor_formatter(NullFormatter())
        curve.xaxis.set_major_locator(MaxNLocator(integer=True))
        curve.set(xlabel="t", ylabel="bits per dimension")
        curve.grid(True)
        curve.legend(loc="best")
        _draw_parts(sums, data)
        value, error = data.total
        spread = f" ± {error:.4f}" if math.isfinite(error) else ""
        total = typeset(f"{value:.4f}")
        curve.set_title(
            f"-ELBO = {total}{spread} bits per dimension, mean over {data.num_data} data\nband: ± {BAND:g} standard errors"
        )
    return figure


def _draw_parts(axes: Axes, data: BoundByT) -> None:
    """One bar per part, each starting where the one above it ends, and the sum."""
    left, names = 0.0, []
    symbols = {"L_T": "$L_T$", "between": "$L_1 + \\ldots + L_{T-1}$", "L_0": "$L_0$"}
    parts = [(symbols[name], data.parts[name]) for name in symbols]
    colours = (GREEN, BLUE, VERMILION)
    for row, ((name, value), colour) in enumerate(zip(parts, colours, strict=True)):
        axes.barh(row, value, left=left, color=colour, height=0.7)
        left += value
        names.append(f"{name} = {typeset(f'{value:.4g}')}")
    axes.barh(3, left, color=GREY, height=0.7)
    axes.set_yticks(range(4), [*names, f"-ELBO = {typeset(f'{left:.4g}')}"])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="bits per dimension")
    axes.margins(x=0.03)
    axes.grid(True, axis="x")


def draw_film_strip(data: FilmStrip, value_range: Range | None = None) -> Figure:
    """Columns by t, from noise to data; rows: x_t, and below it the x_0 that the network predicts from it."""
    with style():
        if is_image(data.states.shape[2:]):
            return _image_strip(data, value_range)
        return _point_strip(data)


def _image_strip(data: FilmStrip, value_range: Range | None) -> Figure:
    steps, count = data.states.shape[:2]
    rows = []
    for n in range(count):
        rows.append(to_rgb(data.states[:, n], value_range))
        known = ~np.isnan(data.predictions[:, n]).reshape(steps, -1).any(1)
        tiles = np.ones_like(rows[0])
        tiles[known] = to_rgb(data.predictions[known, n], value_range)
        rows.append(tiles)
    width, height = mosaic_inches(2 * count, steps, rows[0].shape[1:3])
    figure = Figure(figsize=(max(width + 0.9, 4.6), height + 0.9), layout="constrained")
    axes = figure.add_subplot()
    mosaic = draw_mosaic(axes, np.concatenate(rows), steps)
    axes.set_xticks(mosaic.x, _column_names(data))
    axes.set_yticks(mosaic.y, ["$x_t$", "$\\hat{x}_0$"] * count)
    axes.set_xlabel(_update(data))
    figure.suptitle(_strip_title(data, figure), fontsize=10)
    return figure


def _column_names(data: FilmStrip) -> list[str]:
    """t, and the two weights of the step down from it."""
    if data.weights is None:
        return [f"t = {t}" for t in data.t]
    return [
        f"t = {t}" + ("" if np.isnan(a) else f"\nA {a:.2f}\nB {b:.2f}")
        for t, (a, b) in zip(data.t, data.weights, strict=True)
    ]


def _update(data: FilmStrip) -> str:
    return "" if data.weights is None else "$x_{t-1} = A\\, x_t + B\\, \\hat{x}_0 + $noise"


def _strip_title(data: FilmStrip, figure: Figure) -> str:
    law = textwrap.fill(data.law, int(13 * figure.get_figwidth()))
    return f"noisy $x_t$ and predicted $x_0$, by t\n{law}"


def _point_strip(data: FilmStrip) -> Figure:
    steps, count = data.states.shape[:2]
    flat = data.states.reshape(steps, count, -1)
    predicted = data.predictions.reshape(steps, count, -1)
    plane = principal_plane(flat[-1], "x")
    states = plane(flat.reshape(steps * count, -1)).reshape(steps, count, 2)
    figure = Figure(figsize=(1.75 * steps + 0.6, 4.3), layout="constrained")
    grid = figure.subplots(2, steps, squeeze=False, sharex=True, sharey=True)
    for j, name in enumerate(_column_names(data)):
        draw_points(grid[0, j], states[j], color=GREY, s=4)
        grid[0, j].set_title(name, fontsize=8)
        if not np.isnan(predicted[j]).any():
            draw_points(grid[1, j], plane(predicted[j]), color=ORANGE, s=4)
        else:
            grid[1, j].text(
                0.5, 0.5, "$x_0$ is drawn", transform=grid[1, j].transAxes, ha="center", va="center", color=GREY
            )
    for axes in grid.flat:
        finish_plane(axes, ("", ""), states.reshape(-1, 2))
    grid[0, 0].set_ylabel("$x_t$")
    grid[1, 0].set_ylabel("$\\hat{x}_0(x_t, t)$")
    where = f"{plane.labels[0]} across, {plane.labels[1]} up"
    figure.supxlabel("      ".join(filter(None, (_update(data), where))), fontsize=9)
    figure.suptitle(_strip_title(data, figure), fontsize=10)
    return figure
