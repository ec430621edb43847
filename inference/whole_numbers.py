"""Whole numbers that a caller gives: refused in one sentence where they are something else, never truncated."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

__all__ = ["seed_number", "whole_count", "whole_number", "whole_numbers"]


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


def whole_count(name: str, value: Any) -> int:
    """``value`` as an int of at least one, of numpy or torch, too.

    Raises:
        ValueError: anything else.

    Example:
        >>> whole_count("num_samples", 3)
        3
    """
    try:
        number = whole_number(name, value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"expected a whole {name} >= 1, got {value!r}")
    return number


def seed_number(value: Any) -> int:
    """A seed as an int >= 0, of numpy or torch, too.

    Raises:
        TypeError: no whole number.
        ValueError: one below zero.

    Example:
        >>> seed_number(7)
        7
    """
    number = whole_number("seed", value)
    if number < 0:
        raise ValueError(f"expected a seed >= 0, got {number}")
    return number
