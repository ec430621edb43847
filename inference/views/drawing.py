"""What all pictures share: one style, colours that survive colour blindness, tiles, scatters, and saving.

Only matplotlib's object-oriented interface is used: a ``Figure`` is made, returned and owned by the caller; no pyplot, no
display, no lasting change of ``rcParams``. :func:`style` holds for the time of one drawing or saving and puts everything
back. A saved file has no date and no random identifiers, so equal figures give equal bytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from inference.training.storage import write_atomic
from inference.views.images import Array, Mosaic

# Okabe and Ito's palette, tellable apart with any colour vision (jfly.uni-koeln.de/color).
BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
GREY = "#8C8C8C"
# Ten classes: Paul Tol's "muted" set and grey, each with a marker of its own (personal.sron.nl/~pault).
CLASS_COLOURS = [
    "#332288",
    "#CC6677",
    "#117733",
    "#DDAA33",
    "#88CCEE",
    "#882255",
    "#44AA99",
    "#999933",
    "#AA4499",
    "#777777",
]
CLASS_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")

TILE_INCHES = 0.62
POINT_SIZE = 8

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "ppl-models",
    "pdf.fonttype": 42,
}

_UNDATED: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}


def style() -> AbstractContextManager[None]:
    """The one style, for the time of a ``with`` block: matplotlib's defaults with a few changes, whatever was set before.

    Example:
        >>> before = mpl.rcParams["font.size"]
        >>> with style():
        ...     inside = mpl.rcParams["font.size"]
        >>> inside, mpl.rcParams["font.size"] == before
        (9.0, True)
    """
    defaults = {key: value for key, value in mpl.rcParamsDefault.items() if not key.startswith("backend")}
    return mpl.rc_context(defaults | _STYLE)


def figure_bytes(figure: Figure, suffix: str) -> bytes:
    """The figure as a PNG, SVG or PDF file; the same bytes for the same figure.

    Args:
        figure: any matplotlib figure.
        suffix: ".png", ".svg" or ".pdf".

    Raises:
        ValueError: another suffix.
    """
    if suffix not in _UNDATED:
        raise ValueError(f"expected a file name ending in .png, .svg or .pdf, got {suffix!r}: choose one of them")
    buffer = io.BytesIO()
    with style():
        # Axes of equal units leave the layout's bounds; what is drawn is cut nowhere.
        figure.savefig(
            buffer, format=suffix[1:], dpi=200, metadata=_UNDATED[suffix], bbox_inches="tight", pad_inches=0.08
        )
    return buffer.getvalue()


def save_figure(figure: Figure, path: str | Path, *, overwrite: bool = False) -> Path:
    """Writes a figure as PNG, SVG or PDF by its suffix: whole or not at all, the same bytes for the same figure.

    Args:
        figure: any matplotlib figure.
        path: where to; the folder must exist.
        overwrite: whether an existing file may be replaced.

    Returns:
        The path.

    Raises:
        ValueError: another suffix.
        FileNotFoundError: no such folder.
        FileExistsError: the file exists and ``overwrite`` is False.
        StorageError: the file system refused.
    """
    path = Path(path)
    content = figure_bytes(figure, path.suffix.lower())
    if not path.parent.is_dir():
        raise FileNotFoundError(f"expected an existing folder for the figure, got {path.parent}: make it first")
    if path.exists() and not overwrite:
        raise FileExistsError(f"expected a new file, but {path} exists: choose another name or pass overwrite=True")
    write_atomic(path, content)
    return path


def draw_mosaic(axes: Axes, tiles: Array, columns: int) -> Mosaic:
    """Image tiles ``[N, H, W, 3]`` in RGB on axes without ticks; their positions are returned for labels."""
    mosaic = Mosaic.of(tiles, columns)
    axes.imshow(mosaic.pixels, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return mosaic


def mosaic_inches(rows: int, columns: int, tile_shape: Sequence[int]) -> tuple[float, float]:
    """Width and height for a mosaic whose tiles ``(H, W)`` have a longer side of :data:`TILE_INCHES`."""
    height, width = (TILE_INCHES * side / max(tile_shape) for side in tile_shape)
    return columns * width, rows * height


def draw_points(axes: Axes, points: Array, **kwargs: Any) -> PathCollection:
    """Points ``[N, 2]``, without outlines."""
    return axes.scatter(points[:, 0], points[:, 1], **({"s": POINT_SIZE, "linewidths": 0} | kwargs))


def plane_height(points: Array, width: float) -> float:
    """Inches of height at which axes show the points ``[n, 2]`` at equal scale; at least 2.4, at most 1.2 widths."""
    across, up = np.ptp(points, axis=0)
    return float(np.clip(width * up / across if across > 0 else width, 2.4, 1.2 * width))


def typeset(number: str) -> str:
    """A formatted number with a true minus sign, as matplotlib's own ticks have.

    Example:
        >>> typeset("-1.5")
        '−1.5'
    """
    return number.replace("-", "−")


def finish_plane(axes: Axes, labels: tuple[str, str], reference: Array) -> None:
    """Axis labels and limits of a plane of points: those of the reference with a margin, at equal scale if they allow it."""
    axes.set(xlabel=labels[0], ylabel=labels[1])
    low, high = reference.min(0), reference.max(0)
    pad = 0.06 * np.where(high > low, high - low, 1.0)
    axes.set(xlim=(low[0] - pad[0], high[0] + pad[0]), ylim=(low[1] - pad[1], high[1] + pad[1]))
    extent = high - low + 2 * pad
    if 0.4 < extent[0] / extent[1] < 2.5:
        axes.set_aspect("equal")
    axes.grid(True)
