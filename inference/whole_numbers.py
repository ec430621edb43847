"""Whole numbers that a caller gives: refused in one sentence where they are something else, never truncated."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

__all__ = ["whole_number", "whole_numbers"]


def whole_number(name: str, value: Any) -> int:
    """``value`` as an int, of numpy or torch, too; a bool is none.

    Raises:
        TypeError: anything else.

    Example:
        >>> import torch
        >>> whole_number("steps", torch.tensor(3))
        3
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"expected whole numbers as {name}, got {value!r}: give ints") from None


def whole_numbers(name: str, values: Any) -> list[int]:
    """A list of them.

    Raises:
        TypeError: no sequence, or one with anything else in it.

    Example:
        >>> whole_numbers("timesteps", range(1, 4))
        [1, 2, 3]
    """
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise TypeError(f"expected a sequence of whole numbers as {name}, got {values!r}: give a list")
    return [whole_number(name, value) for value in values]
