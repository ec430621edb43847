"""The pictures: plot data in, a matplotlib ``Figure`` out.

One function per dataclass of :mod:`inference.views.plot_data` and :mod:`inference.views.latent_data`. Images are drawn as
tiles and need ``value_range=(low, high)``; data of one dim are points, drawn in their plane (two principal components if
they have more than two coordinates). Every axis says what it shows and in which unit. Save with :func:`save_figure`.
"""

from __future__ import annotations

import math
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from inference.views.drawing import (
    BLUE,
    CLASS_COLOURS,
    CLASS_MARKERS,
    GREY,
    ORANGE,
    VERMILION,
    draw_mosaic,
    draw_points,
    figure_bytes,
    finish_plane,
    mosaic_inches,
    plane_height,
    save_figure,
    style,
    typeset,
)
from inference.views.images import Array, Range, is_image, to_rgb
from inference.views.latent_data import LatentMap, Traversal
from inference.views.plot_data import BoundTerms, LearningCurve, Reconstructions, Samples
from inference.views.projection import principal_plane

__all__ = [
    "draw_bound_terms",
    "draw_latent_map",
    "draw_learning_curve",
    "draw_reconstructions",
    "draw_samples",
    "draw_traversal",
    "figure_bytes",
    "save_figure",
]

TITLE_WIDTH = 40  # characters of a panel's title


def draw_traversal(data: Traversal, value_range: Range | None = None) -> Figure:
    """A row of images per latent dimension, most active on top; for points a curve per dimension over the data."""
    few = len(data.dims) < data.num_dims
    which = f"the {len(data.dims)} most active of {data.num_dims} dimensions" if few else "each dimension"
    title = f"E[x | {data.site}] along {which} of {data.site}\nthe others at {data.centre}"
    position = f"position on the prior of {data.site}[i] (standard deviations)"
    rows, columns = data.means.shape[:2]
    with style():
        if is_image(data.means.shape[2:]):
            tiles = to_rgb(data.means.reshape(-1, *data.means.shape[2:]), value_range)
            width, height = mosaic_inches(rows, columns, tiles.shape[1:3])
            figure = Figure(figsize=(max(width + 1.8, 4.2), max(height + 1.1, 2.4)), layout="constrained")
            axes = figure.add_subplot()
            mosaic = draw_mosaic(axes, tiles, columns)
            names = [f"{data.site}[{d}]  {a:.2f}" for d, a in zip(data.dims, data.activity, strict=True)]
            axes.set_xticks(mosaic.x, [typeset(f"{t:+.3g}") if t else "0" for t in data.positions])
            axes.set_yticks(mosaic.y, names)
            axes.set(xlabel=position, ylabel="dimension and its\nactivity Var(E[z | x])")
        else:
            figure = Figure(layout="constrained")
            axes = figure.add_subplot()
            seen = _draw_curves(axes, data)
            figure.set_size_inches(6.0, plane_height(seen, 4.4) + 1.1 + 0.2 * -(-len(data.dims) // 2))
            figure.legend(loc="outside lower center", ncols=2)
            scale = ScalarMappable(Normalize(data.positions[0], data.positions[-1]), "viridis")
            figure.colorbar(scale, ax=axes, label=position)
        axes.set_title(title)
    return figure


def _draw_curves(axes: Axes, data: Traversal) -> Array:
    """One curve per dimension over the data; returns all points that are seen, ``[n, 2]``."""
    reference = data.data.reshape(len(data.data), -1)
    plane = principal_plane(reference, "x")
    seen = plane(reference)
    draw_points(axes, seen, color="#CCCCCC", label="data")
    lines = ("-", "--", ":", "-.")
    for row, (dim, active) in enumerate(zip(data.dims, data.activity, strict=True)):
        curve = plane(data.means[row].reshape(len(data.positions), -1))
        label = f"{data.site}[{dim}], activity {active:.2f}"
        axes.plot(*curve.T, color=GREY, linewidth=1.2, linestyle=lines[row % 4], zorder=2, label=label)
        marks = {"c": data.positions, "cmap": "viridis", "s": 26, "marker": CLASS_MARKERS[row % 10], "zorder": 3}
        draw_points(axes, curve, **marks)
        seen = np.concatenate([seen, curve])
    finish_plane(axes, plane.labels, seen)
    return seen


def draw_reconstructions(data: Reconstructions, value_range: Range | None = None) -> Figure:
    """Originals over their reconstructions with each ELBO below; for points, arrows from one to the other."""
    count = len(data.elbo)
    title = "x and its reconstruction E[x | z = E[z | x]]"
    error = f"(Monte Carlo standard error at most {data.std_error.max():.1g})"
    with style():
        if is_image(data.originals.shape[1:]):
            columns = min(count, 10)
            rows = -(-count // columns)
            originals, means = (to_rgb(values, value_range) for values in (data.originals, data.means))
            width, height = mosaic_inches(2, columns, originals.shape[1:3])
            figure = Figure(figsize=(max(width + 0.9, 4.2), rows * (height + 0.26) + 0.6), layout="constrained")
            grid = figure.subplots(rows, 1, squeeze=False)[:, 0]
            blank = np.ones_like(originals[:1])
            for row, axes in enumerate(grid):
                part = slice(row * columns, (row + 1) * columns)
                fill = [blank] * (columns - len(originals[part]))
                mosaic = draw_mosaic(axes, np.concatenate([originals[part], *fill, means[part], *fill]), columns)
                shown = data.elbo[part]
                axes.set_xticks(mosaic.x[: len(shown)], [typeset(f"{value:.1f}") for value in shown])
                axes.set_yticks(mosaic.y, ["x", "E[x | z]"])
            grid[-1].set_xlabel(f"ELBO(x), nats {error}")
            figure.suptitle(title, fontsize=10)
        else:
            originals, means = (values.reshape(count, -1) for values in (data.originals, data.means))
            plane = principal_plane(originals, "x")
            start, end = plane(originals), plane(means)
            seen, shift = np.concatenate([start, end]), end - start
            figure = Figure(figsize=(6.0, plane_height(seen, 4.2) + 0.9), layout="constrained")
            axes = figure.add_subplot()
            arrow = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.003, "color": GREY}
            axes.quiver(*start.T, *shift.T, **arrow, zorder=1)
            dots = draw_points(axes, start, c=data.elbo, cmap="viridis", s=22, zorder=2)
            figure.colorbar(dots, ax=axes, label=f"ELBO(x), nats\n{error}")
            finish_plane(axes, plane.labels, seen)
            axes.set_title(f"{title}\ndots: x; arrows lead to the reconstruction")
    return figure


def draw_samples(data: Samples, value_range: Range | None = None) -> Figure:
    """Draws from the model, beside data if there are any; images also with the means at the same latents."""
    count = len(data.draws)
    drawn = textwrap.fill(f"samples {data.law}", TITLE_WIDTH)
    panels = {drawn: data.draws}
    if data.data is not None:
        panels = {"data": data.data[:count] if is_image(data.draws.shape[1:]) else data.data} | panels
    with style():
        if is_image(data.draws.shape[1:]):
            if data.means is not None:
                panels["their means E[x | z]"] = data.means
            columns = len(data.columns) or math.ceil(math.sqrt(count))
            tiles = {name: to_rgb(values, value_range) for name, values in panels.items()}
            shape = tiles[drawn].shape[1:3]
            width, height = mosaic_inches(-(-count // columns), columns, shape)
            size = (
                len(tiles) * max(width * 0.7 + 0.2, 2.8),
                max(height * 0.7, 0.8) + 0.35 + 0.15 * (1 + drawn.count("\n")),
            )
            figure = Figure(figsize=size, layout="constrained")
            for axes, (name, values) in zip(
                figure.subplots(1, len(tiles), squeeze=False)[0], tiles.items(), strict=True
            ):
                mosaic = draw_mosaic(axes, values, columns)
                if data.columns:
                    axes.set_xticks(mosaic.x[: len(data.columns)], data.columns)
                axes.set_title(name)
        else:
            flat = {name: values.reshape(len(values), -1) for name, values in panels.items()}
            plane = principal_plane(next(iter(flat.values())), "x")
            seen = np.concatenate([plane(values) for values in flat.values()])
            size = (3.6 * len(flat) + 0.4, plane_height(seen, 3.2) + 0.7)
            figure = Figure(figsize=size, layout="constrained")
            for i, (axes, (name, values)) in enumerate(
                zip(figure.subplots(1, len(flat), squeeze=False)[0], flat.items(), strict=True)
            ):
                draw_points(axes, plane(values), color=BLUE if name.startswith("samples") else GREY, alpha=0.6)
                finish_plane(axes, plane.labels if i == 0 else (plane.labels[0], ""), seen)
                axes.set_title(f"{name} ({len(values)})")
    return figure


def draw_learning_curve(data: LearningCurve) -> Figure:
    """Left: -ELBO by epoch. Right: the path in the rate-distortion plane, on which -ELBO is constant along the diagonals."""
    parts = (
        ("train", BLUE, "o", data.train_elbo, data.train_rate, data.train_distortion),
        (data.validated_on, VERMILION, "s", data.validation_elbo, data.validation_rate, data.validation_distortion),
    )
    with style():
        figure = Figure(figsize=(8.0, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        few = len(data.epoch) <= 30
        for name, colour, marker, elbo, rate, distortion in parts:
            if np.isfinite(elbo).any():
                left.plot(data.epoch, -elbo, color=colour, marker=marker if few else None, markersize=3, label=name)
            here = np.isfinite(rate) & np.isfinite(distortion)
            if here.any():
                r, d = rate[here], distortion[here]
                right.plot(r, d, color=colour, marker=marker, markersize=3 if few else 1.5, linewidth=1, label=name)
                right.plot(r[-1], d[-1], color=colour, marker=marker, markersize=8, markeredgecolor="black")
        left.set(xlabel="epoch", ylabel="−ELBO (nats per datum)", title="The bound by epoch\n")
        right.set(xlabel="rate: KL(q || p) (nats per datum)", ylabel="distortion: −log p(x | z) (nats per datum)")
        right.set_title("Its split by epoch\nlarge mark: the last epoch; dotted: equal ELBO")
        for axes in (left, right):
            axes.grid(True)
        if left.lines:
            left.legend()
        left.xaxis.get_major_locator().set_params(integer=True)
        _draw_levels(right)
    return figure


def _draw_levels(axes: Axes) -> None:
    """Faint lines of equal rate + distortion, with the view left as it is."""
    if not axes.lines:
        return
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for level in np.linspace(left + bottom, right + top, 9)[1:-1]:
        axes.plot([left, right], [level - left, level - right], color=GREY, linewidth=0.5, linestyle=":", zorder=0)
    axes.set(xlim=(left, right), ylim=(bottom, top))


def _label_name(data: LatentMap, label: float) -> str:
    names = data.label_names
    return f"{label:g}" if names is None else names[int(label)]


def draw_latent_map(data: LatentMap) -> Figure:
    """Guide means in the latent plane; up to ten labels by colour and marker, more by a colour scale."""
    with style():
        figure = Figure(figsize=(5.6, 4.4), layout="constrained")
        axes = figure.add_subplot()
        classes = None if data.labels is None else np.unique(data.labels)
        if classes is None:
            draw_points(axes, data.coordinates, color=BLUE, alpha=0.7)
        elif len(classes) <= len(CLASS_COLOURS):
            for i, label in enumerate(classes):
                mark = {"color": CLASS_COLOURS[i], "marker": CLASS_MARKERS[i], "s": 14, "alpha": 0.85}
                draw_points(axes, data.coordinates[data.labels == label], **mark, label=_label_name(data, label))
            axes.legend(title="label", loc="center left", bbox_to_anchor=(1.01, 0.5), markerscale=1.6)
        else:
            shown = draw_points(axes, data.coordinates, c=data.labels, cmap="viridis")
            figure.colorbar(shown, ax=axes, label="label")
        finish_plane(axes, data.axes, data.coordinates)
        axes.set_title(f"Where the guide puts each datum: mean of {data.site}")
    return figure


def draw_bound_terms(data: BoundTerms) -> Figure:
    """Two bars per site, closed form and Monte Carlo with its standard error, and their sum, the ELBO, last."""
    count = len(data.names)
    place = np.arange(count)
    with style():
        figure = Figure(figsize=(7.0, min(1.3 + 0.62 * count, 12.0)), layout="constrained")
        axes = figure.add_subplot()
        series = (
            ("closed form, or half of one (ELBO: sum of the terms used)", data.best, data.best_error, BLUE, -0.19, ""),
            ("Monte Carlo, ± standard error", data.monte_carlo, data.monte_carlo_error, ORANGE, 0.19, "///"),
        )
        for name, value, error, colour, shift, hatch in series:
            known = np.isfinite(value)
            axes.barh(
                place[known] + shift,
                value[known],
                height=0.34,
                xerr=error[known],
                color=colour,
                edgecolor="white" if hatch else colour,
                hatch=hatch,
                error_kw={"elinewidth": 1.2, "capsize": 2.5, "ecolor": "black"},
                label=name,
            )
            if count <= 20:
                for y, v, e in zip(place[known] + shift, value[known], error[known], strict=True):
                    text = f" {v:.3f} ± {e:.2g} " if e > 0 else f" {v:.3f} "
                    axes.text(0, y, typeset(text), va="center", ha="left" if v <= 0 else "right", fontsize=7)
        step = -(-count // 40)
        axes.set_yticks(place[::-1][::step], data.names[::-1][::step])
        axes.set_ylim(count - 0.4, -0.6)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(xlabel=f"E_q[log p − log q] ({data.per})", title=f"Terms of the ELBO, {data.num_particles} particles")
        _leave_room_at_zero(axes)
        axes.grid(True, axis="x")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _leave_room_at_zero(axes: Axes) -> None:
    """Widens the view beyond zero, where the numbers of bars on its other side are written."""
    low, high = axes.dataLim.x0, axes.dataLim.x1
    room = 0.32 * (max(high, 0) - min(low, 0) or 1.0)
    axes.set_xlim(min(low, -room if high > 0 else low) * 1.03, max(high, room if low < 0 else high) * 1.03)
