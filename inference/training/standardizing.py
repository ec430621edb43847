r"""Standardised data: each dimension less its training mean, in units of its training standard deviation.

    y_i = (x_i - center_i) / spread_i,        log p(x) = log p(y) - sum_i log spread_i

A program of y is a program of x by this change of variables: bounds and evidence of y are those of x but for one constant,
`Standardization.log_density_offset`, which is added by whoever compares densities in the data's own units.

The one constraint: the statistics are those of the training part, made once and recorded with a run; held-out data, and other
data looked at with that run, are standardised by the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inference.training.scaling import DataError

if TYPE_CHECKING:
    from inference.training.data_set import DataSet

__all__ = ["Standardization", "size_hint"]

_SMALLEST = 1e-150  # whose square float64 still holds; what varies by less is taken for rounding
LARGE = 30.0  # a ratio of spreads, and a value, beyond which networks of usual initial weights begin far off


@dataclass(frozen=True, eq=False)
class Standardization:
    """The change of variables: ``center`` and ``spread`` > 0, float64 of the shape of one datum.

    Example:
        >>> x = torch.tensor([[0.0, 100.0], [2.0, 300.0]])
        >>> own = Standardization.of(x)
        >>> own(x).tolist(), bool((own.inverse(own(x)) == x).all())
        ([[-1.0, -1.0], [1.0, 1.0]], True)
        >>> round(own.log_density_offset, 4)  # -log 1 - log 100
        -4.6052
    """

    center: Tensor
    spread: Tensor

    @classmethod
    def of(cls, train: Tensor, names: Sequence[str] | None = None) -> Standardization:
        """The training data's own, ``[N, *data_shape]``, N >= 2; ``names`` are those of columns, for messages.

        Raises:
            DataError: a dimension that does not vary, by its index.
        """
        x = train.detach().double()
        center, spread = x.mean(0), x.std(0, correction=0)
        if not bool((center.isfinite() & spread.isfinite() & spread.square().isfinite()).all()):
            raise DataError(
                "train: expected values whose squares float64 can hold with scaling 'standard'; rescale the data"
            )
        flat = ((x.amax(0) == x.amin(0)) | (spread < _SMALLEST)).nonzero()
        if len(flat):
            place = f" in dimension {[int(i) for i in flat[0]]}" if flat.shape[1] else ""
            out = f"leave {'it' if len(flat) == 1 else f'these {len(flat)} dimensions'} out"
            if names is not None:
                constant = ", ".join(repr(names[int(i)]) for i in flat[:8, 0]) + (", ..." if len(flat) > 8 else "")
                place = f" in column{'s' if len(flat) > 1 else ''} {constant}"
                out = "name the others with columns (--columns)"
            raise DataError(
                f"train: expected values that vary with scaling 'standard', got the same in all {len(x)} data{place}; {out}"
            )
        return cls(center.cpu(), spread.cpu())

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Standardization:
        """The inverse of :meth:`describe`."""
        return cls(*(torch.tensor(description[name], dtype=torch.float64) for name in ("center", "spread")))

    def __call__(self, x: Tensor) -> Tensor:
        """Data in their own units ``[*batch, *data_shape]`` -> standardised, in the same dtype.

        Raises:
            DataError: data of another shape.
        """
        n = self.center.dim()
        if x.dim() < n or x.shape[x.dim() - n :] != self.center.shape:
            raise DataError(
                f"expected data of shape [..., {', '.join(map(str, self.center.shape))}] as were standardised, got "
                f"{list(x.shape)}; reshape them"
            )
        return ((x.double() - self.center.to(x.device)) / self.spread.to(x.device)).to(x.dtype)

    def inverse(self, y: Tensor) -> Tensor:
        """Standardised data -> in their own units, in the same dtype."""
        return (y.double() * self.spread.to(y.device) + self.center.to(y.device)).to(y.dtype)

    @property
    def log_density_offset(self) -> float:
        """-sum_i log spread_i, nats: log p(x) of a datum in its own units less log p(y) of the standardised one."""
        return -float(self.spread.log().sum())

    def describe(self) -> dict[str, Any]:
        """Plain numbers, for a run's record."""
        return {"center": self.center.tolist(), "spread": self.spread.tolist()}


def size_hint(data: DataSet) -> str:
    """A sentence where continuous data are of sizes that networks do not take well, and nobody had them standardised.

    Example:
        >>> import torch
        >>> from inference.training.datasets import as_dataset
        >>> size_hint(as_dataset(torch.randn(9, 2) * torch.tensor([1.0, 1e5]), scaling="none"))  # doctest: +ELLIPSIS
        "the data's dimensions vary by ...: scaling 'standard' takes each in standard deviations"
    """
    if data.scaling != "none" or data.levels is not None or not isinstance(data.train, Tensor) or len(data.train) < 2:
        return ""
    x = data.train.double()
    spread = x.std(0, correction=0)
    varying = spread[spread > 0]
    if not varying.numel():
        return ""
    low, high, far = float(varying.min()), float(varying.max()), float(x.abs().max())
    if high <= LARGE * low and far <= LARGE:
        return ""
    return (
        f"the data's dimensions vary by {low:.0e} to {high:.0e}, with values up to {far:.0e}: scaling 'standard' takes each in "
        "standard deviations"
    )
