"""Numbers and shapes that a caller gives: refused in one sentence where they are something else, never truncated."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

__all__ = ["positive_number", "seed_number", "sizes", "whole_count", "whole_number", "whole_numbers"]


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


def sizes(name: str, values: Any) -> list[int]:
    """A shape or widths as a list of ints, each of at least one.

    Raises:
        TypeError: no sequence of whole numbers.
        ValueError: one below one.

    Example:
        >>> sizes("data_shape", (8, 8))
        [8, 8]
    """
    if not isinstance(values, Iterable) or isinstance(values, str):
        example = f"({values},)" if isinstance(values, int) else "(8, 8)"
        raise TypeError(f"expected {name} as a sequence of sizes such as {example}, got {values!r}")
    found = [whole_number(name, value) for value in values]
    if any(size < 1 for size in found):
        raise ValueError(f"expected sizes >= 1 as {name}, got {found}")
    return found


def positive_number(name: str, value: Any) -> float:
    """``value`` as a float, positive and finite; a bool or text is none.

    Raises:
        ValueError: anything else.

    Example:
        >>> positive_number("temperature", 1)
        1.0
    """
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"expected {name} to be a positive finite number, got {value!r}")
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
