"""Functions that ``torch.compile`` leaves alone: files, clocks, random states and numbers that change from call to call."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = ["left_alone"]

P = ParamSpec("P")
R = TypeVar("R")


def left_alone(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which ``torch.compile`` runs as Python does, with all that it calls.

    As ``torch.compiler.disable``, but without its second of import time where nothing is compiled.

    Example:
        >>> @left_alone
        ... def double(x):
        ...     return 2 * x
        >>> double(3)
        6
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    # a code object of its own: the compiler gives up on one that it has compiled for too many functions
    alone: Any = call
    alone.__code__ = alone.__code__.replace(co_name=function.__name__)
    return call
