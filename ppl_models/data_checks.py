"""What data a likelihood refuses, each in one sentence: the tensor, its first bad entry, what was expected, the remedy."""

from __future__ import annotations

import math

from torch import Tensor


def refuse_where(x: Tensor, bad: Tensor, name: str, expected: str, remedy: str) -> None:
    """Raises ValueError on the first entry where ``bad`` is True."""
    if bad.any():
        index = bad.nonzero()[0].tolist()
        where = f"{name}{index}" if index else name
        raise ValueError(f"{name}: expected {expected}, but {where} is {x[tuple(index)].item():.9g}; {remedy}")


def refuse_other_than_tensor(x: Tensor, name: str) -> None:
    """Raises TypeError unless x is a tensor."""
    if not isinstance(x, Tensor):
        got = type(x).__name__
        raise TypeError(
            f"{name}: expected a tensor, got {got}; convert with torch.as_tensor, to the dtype of the parameters"
        )


def refuse_other_than_floats(x: Tensor, name: str) -> None:
    """Raises unless x holds finite floating-point values."""
    refuse_other_than_tensor(x, name)
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected floating-point values, got {x.dtype}; convert with .float()")
    refuse_where(x, ~x.isfinite(), name, "finite values", "remove or fill in what is missing")


def refuse_grey_levels(x: Tensor, name: str, expected: str, remedy: str) -> None:
    """Whole numbers from 0 to more than 1 are grey levels that nobody scaled: the most common slip, so it is named."""
    refuse_other_than_tensor(x, name)
    if not x.is_complex() and ((x >= 0) & (x < math.inf) & (x.frac() == 0 if x.is_floating_point() else True)).all():
        refuse_where(x, x > 1, name, expected, f"these look like integer grey levels 0..255: {remedy}")
