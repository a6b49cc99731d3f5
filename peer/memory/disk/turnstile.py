"""A door for threads: any number of them inside at once, or one alone.

Owns: who waits. Must not know: what they do inside. `store.py` lets transfers in together and a commit alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition


class Turnstile:
    """Nobody starves: who wants to be alone goes before those who come later, and whoever waited meanwhile before the
    next one who wants to be alone."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._num_inside = 0
        self._num_waiting = 0  # to be inside with others
        self._num_owed = 0  # of those: they go before the next one alone
        self._is_taken = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Be inside with others. Must not be nested: one who waits to be alone would stop the inner one for ever."""
        with self._changed:
            self._num_waiting += 1
            try:
                self._changed.wait_for(lambda: not self._is_taken)
                self._num_inside += 1
            finally:
                self._num_waiting -= 1
                self._num_owed = max(0, self._num_owed - 1)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._num_inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until everybody else is out, and keep them out."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_taken and not self._num_owed)
            self._is_taken = True
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._num_inside == 0)
            yield
        finally:
            with self._changed:
                self._is_taken = False
                self._num_owed = self._num_waiting
                self._changed.notify_all()
