"""Results that print as their table: at a prompt, in a notebook and by ``print``, where a dataclass would list its tensors."""

from __future__ import annotations

from abc import abstractmethod


class Printed:
    """A result with a :meth:`table`; a dataclass of this kind is declared with ``repr=False``.

    Example:
        >>> class Two(Printed):
        ...     def table(self):
        ...         return "two  2"
        >>> Two()
        two  2
    """

    @abstractmethod
    def table(self) -> str:
        """The result as text, for people."""

    def __repr__(self) -> str:
        return self.table()
