"""Notices an engine that has requests to run and runs none: stopped, or waiting for what will never come.

A dead process is seen at once; a hung one only by what it no longer does.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from coldsnap.errors import EngineStalled

_MOST_SECONDS = 2.0
"""Time between two looks that counts at most: in the rest this process stood still itself, as a frozen one does."""


class Watchdog:
    """Counts the seconds for which a busy engine has made no step. It does not know what a step is."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._looked = clock()
        self._steps = -1
        self._stalled = 0.0

    def look(self, steps: int, *, busy: bool) -> None:
        """Raise `EngineStalled` if a `busy` engine has been at the same number of steps for too long."""
        now = self._clock()
        since, self._looked = min(now - self._looked, _MOST_SECONDS), now
        if steps != self._steps or not busy:
            self._steps, self._stalled = steps, 0.0
            return
        self._stalled += since
        if self._stalled >= self._seconds:
            raise EngineStalled(
                f"the engine has requests and has made no step for ENGINE_STALL_SECONDS={self._seconds:g}; "
                "this worker ends, send the request again"
            )
