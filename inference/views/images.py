"""Arrays of data as pictures: grey or RGB, any value range, many tiles in one array.

An image datum has shape (H, W), (C, H, W) or (H, W, C) with C = 1 or 3; where both ends could be channels, the first
is. Data of fewer dims are points. The constraint: a value range (low, high) is always stated, never read off the data,
so that black and white mean the same in every tile; values beyond it are shown as its ends (a Normal's mean may
overshoot), and only shown so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Range = tuple[float, float]

CHANNELS = (1, 3)


def is_image(data_shape: Sequence[int]) -> bool:
    """Whether data of this shape are images; otherwise they are points.

    Raises:
        ValueError: three dims or more, but not those of a grey or RGB image.

    Example:
        >>> is_image((8, 8)), is_image((3, 32, 32)), is_image((2,))
        (True, True, False)
    """
    shape = tuple(data_shape)
    if (len(shape) == 3 and shape[0] not in CHANNELS and shape[-1] not in CHANNELS) or len(shape) > 3:
        raise ValueError(
            f"expected data of shape (H, W), (C, H, W) or (H, W, C) with C = 1 or 3, or points, got {shape}: "
            "choose the channels to show, or flatten each datum to a point"
        )
    return len(shape) >= 2


def value_range_of(scaling: str, levels: int | None) -> Range:
    """The value range that a stated scaling of quantised data implies.

    Args:
        scaling: "unit", "symmetric", "none" or "classes", as in :mod:`inference.training.scaling`.
        levels: number of levels; needed for "none" and "classes", whose values are counts 0..levels-1.

    Raises:
        ValueError: an unknown scaling, or counts without their number of levels.

    Example:
        >>> value_range_of("symmetric", 256), value_range_of("none", 17)
        ((-1.0, 1.0), (0.0, 16.0))
    """
    ranges: dict[str, Range] = {"unit": (0.0, 1.0), "symmetric": (-1.0, 1.0)}
    if levels is not None:
        ranges |= {"none": (0.0, levels - 1.0), "classes": (0.0, levels - 1.0)}
    if scaling not in ranges:
        raise ValueError(
            f"expected a scaling among {', '.join(ranges)}, got {scaling!r} with levels={levels}: "
            "state the number of levels, or pass value_range=(low, high) yourself"
        )
    return ranges[scaling]


def to_rgb(values: Array, value_range: Range | None) -> Array:
    """Image data as RGB in [0, 1].

    Args:
        values: ``[..., *data_shape]`` with exactly one leading dim, ``[N, *data_shape]``.
        value_range: (low, high): what is black and what is white.

    Returns:
        ``[N, H, W, 3]``.

    Raises:
        ValueError: no value range, or one that is not increasing; data that are not images; values that are not finite.

    Example:
        >>> to_rgb(np.array([[[-1.0, 1.0]]]), (-1, 1))[0, 0].tolist()
        [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """
    if value_range is None or not value_range[0] < value_range[1]:
        raise ValueError(
            f"expected value_range=(low, high) with low < high for images, got {value_range}: "
            "pass the data's range, such as (0, 1)"
        )
    if not is_image(values.shape[1:]):
        raise ValueError(f"expected images, got data of shape {values.shape[1:]}")
    if not np.isfinite(values).all():
        raise ValueError("expected finite pixel values, got NaN or infinity: look at the decoder's output")
    low, high = value_range
    shown = np.clip((values - low) / (high - low), 0.0, 1.0)
    if shown.ndim == 3:
        shown = shown[..., None]
    elif shown.shape[1] in CHANNELS:
        shown = np.moveaxis(shown, 1, -1)
    return np.repeat(shown, 3 // shown.shape[-1], axis=-1)


@dataclass(frozen=True)
class Mosaic:
    """Tiles of one size in rows and columns, with white between them.

    Attributes:
        pixels: ``[rows*H + gaps, columns*W + gaps, 3]``.
        x: horizontal centre of each column, in pixels as ``imshow`` counts them.
        y: vertical centre of each row.
    """

    pixels: Array
    x: Array
    y: Array

    @classmethod
    def of(cls, tiles: Array, columns: int) -> Mosaic:
        """Tiles ``[N, H, W, 3]`` row by row; the last row is filled up with white.

        Example:
            >>> m = Mosaic.of(np.zeros((3, 8, 8, 3)), columns=2)
            >>> m.pixels.shape, m.x.tolist()
            ((17, 17, 3), [3.5, 12.5])
        """
        count, height, width, _ = tiles.shape
        rows, gap = -(-count // columns), max(1, round(max(height, width) / 14))
        pixels = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, 3))
        for i, tile in enumerate(tiles):
            top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
            pixels[top : top + height, left : left + width] = tile
        x = np.arange(columns) * (width + gap) + (width - 1) / 2
        y = np.arange(rows) * (height + gap) + (height - 1) / 2
        return cls(pixels, x, y)
