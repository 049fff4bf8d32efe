"""Splits the engine's busy seconds equally among the requests inside it, where its steps cannot be metered.

While n requests are in the engine each of them is charged 1/n of every second. The sum of all shares is
therefore exactly the time during which the engine had work. This knows nothing of tokens or steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class EqualSplit:
    """Processor sharing by virtual time: V grows by dt/n, and a request's share is V(leave) - V(enter).

    The virtual clock of generalised processor sharing (Parekh and Gallager, 1993); O(1) an event.
    All times are seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()
        self._virtual = 0.0
        self._inside = 0
        self.busy_seconds = 0.0

    def enter(self) -> float:
        """Count a request in; return its mark for `leave`."""
        self._advance()
        self._inside += 1
        return self._virtual

    def leave(self, mark: float) -> float:
        """Count the request out; return its share of the busy time, in seconds."""
        self._advance()
        self._inside -= 1
        return self._virtual - mark

    def look(self) -> tuple[float, float]:
        """Return the virtual time and the busy seconds, as of now."""
        self._advance()
        return self._virtual, self.busy_seconds

    def _advance(self) -> None:
        now = self._clock()
        if self._inside:
            self.busy_seconds += now - self._last
            self._virtual += (now - self._last) / self._inside
        self._last = now
