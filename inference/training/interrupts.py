"""SIGTERM and Ctrl-C while training: noted at once, acted on at the next safe place.

A signal may come in the middle of anything. Its handler only notes it; the loop asks between steps, saves, and leaves with
status 143 after SIGTERM and with ``KeyboardInterrupt`` after Ctrl-C. A second Ctrl-C interrupts whatever is going on.

The one constraint: Python handles signals in the main thread only; in another thread nothing is changed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

TERMINATED = 143  # the exit status of a process ended by SIGTERM: 128 + 15


class StopRequest:
    """Whether the process has been asked to end, and by which signal.

    Args:
        on_signal: called at each signal, in the handler.

    Example:
        >>> stop = StopRequest()
        >>> with stop.listening():
        ...     signal.raise_signal(signal.SIGTERM)
        >>> stop.asked
        True
    """

    def __init__(self, on_signal: Callable[[], None] = lambda: None) -> None:
        self.number: int | None = None
        self._on_signal = on_signal

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    def leave(self) -> NoReturn:
        """Ends the program as the signal would have.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            SystemExit: otherwise, with status 143.
        """
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(TERMINATED)

    @contextmanager
    def listening(self, enabled: bool = True) -> Iterator[None]:
        """Handles SIGTERM and Ctrl-C inside the context; the handlers before are put back."""
        if not enabled or threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        self._on_signal()
