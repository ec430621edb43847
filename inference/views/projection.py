"""A plane to look at vectors in, with axes that say what they are.

Two coordinates are themselves; one is drawn against its row number; more are seen along two chosen axes or along the
two principal components, v -> (v - centre) B with B the two leading right singular vectors of the centred reference
(Pearson 1901; Bishop 2006, section 12.1), each with its largest entry positive so that the picture is the same each time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Plane:
    """An affine map from ``[N, D]`` to the plane.

    Attributes:
        centre: ``[D]``.
        basis: B, ``[D, 2]``; ``[D, 1]`` stands for one coordinate against the row number.
        labels: what the two axes show.
    """

    centre: Array
    basis: Array
    labels: tuple[str, str]

    def __call__(self, vectors: Array) -> Array:
        """Vectors ``[N, D]`` in the plane, ``[N, 2]``."""
        seen = (vectors - self.centre) @ self.basis
        return seen if seen.shape[1] == 2 else np.column_stack([seen[:, 0], np.arange(len(seen))])


def principal_plane(reference: Array, symbol: str) -> Plane:
    """The plane that shows most of the reference's variance; the coordinates themselves for D <= 2.

    Args:
        reference: ``[N, D]``.
        symbol: name of the vector, for the axis labels.

    Example:
        >>> principal_plane(np.zeros((5, 2)), "x").labels
        ('x[0]', 'x[1]')
        >>> line = np.arange(5.0)[:, None] * np.array([3.0, 0.0, 4.0])
        >>> plane = principal_plane(line, "x")
        >>> plane.labels[0], plane(line)[4].round(6).tolist()
        ('x: PC 1 (100 % of variance)', [10.0, 0.0])
    """
    dims = reference.shape[1]
    if dims <= 2:
        return coordinate_plane(dims, (0, dims - 1), symbol)
    centre = reference.mean(0)
    _, singular, rows = np.linalg.svd(reference - centre, full_matrices=True)
    basis = rows[:2].T
    basis = basis * np.where(basis[np.abs(basis).argmax(0), [0, 1]] < 0, -1.0, 1.0)
    power = np.zeros(max(2, len(singular)))
    power[: len(singular)] = singular**2
    share = 100 * power / (power.sum() or 1.0)
    first, second = (f"{symbol}: PC {k + 1} ({share[k]:.0f} % of variance)" for k in range(2))
    return Plane(centre, basis, (first, second))


def coordinate_plane(dims: int, axes: tuple[int, int], symbol: str) -> Plane:
    """The plane of two coordinates of D; of one against the row number where D = 1.

    Example:
        >>> coordinate_plane(3, (2, 0), "z")(np.array([[1.0, 2.0, 3.0]])).tolist()
        [[3.0, 1.0]]
    """
    chosen = [0] if dims == 1 else list(axes)
    first, second = (f"{symbol}[{i}]" for i in axes)
    return Plane(np.zeros(dims), np.eye(dims)[:, chosen], (first, "row" if dims == 1 else second))
