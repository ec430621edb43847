"""Methods that are shortcuts for others, and give way where a subclass has its own of those.

A shortcut computes in fewer operations what a general method finds from a law. It belongs to the law that it was written for: a
class that overrides what it stands for, itself or by a mixin before it, would train and sample another model than its programs
state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["give_way", "is_overridden"]


def give_way(cls: type, name: str, general: Callable[..., Any], stands_for: Iterable[str]) -> None:
    """Gives ``cls`` the general method for the shortcut ``name``, where one that it stands for is overridden.

    Args:
        cls: the class; called in ``__init_subclass__``.
        name: of the shortcut.
        general: what it is a shortcut of.
        stands_for: names of the methods whose results it knows without calling them.

    Example:
        >>> class Square:
        ...     def side(self): return 2
        ...     def area(self): return 4
        ...     def __init_subclass__(cls): give_way(cls, "area", lambda self: self.side() ** 2, ["side"])
        >>> class Large(Square):
        ...     def side(self): return 3
        >>> Square().area(), Large().area()
        (4, 9)
    """
    place = _place(cls, name)
    if any(_place(cls, other) < place for other in stands_for):
        setattr(cls, name, general)


def is_overridden(cls: type, names: Iterable[str], base: type) -> bool:
    """Whether a class before ``base`` in the order of resolution has one of these of its own.

    Example:
        >>> class Base:
        ...     def law(self): ...
        >>> class Own(Base):
        ...     def law(self): ...
        >>> is_overridden(Own, ["law"], Base), is_overridden(Base, ["law"], Base)
        (True, False)
    """
    return any(_place(cls, name) < cls.__mro__.index(base) for name in names)


def _place(cls: type, name: str) -> int:
    """Of the class that ``name`` is taken from, in the order of resolution."""
    return next((i for i, each in enumerate(cls.__mro__) if name in vars(each)), len(cls.__mro__))
