"""Whether this process was away: frozen with its container, suspended with its machine, or restored from a checkpoint.

A platform may revive a worker instead of booting one. Nobody tells the process; its clocks do.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, Self

_FROZEN_SECONDS = 10.0
"""A loop that looks every second is never that late without computing; a shorter freeze is not told from a stall."""
_SUSPENDED_SECONDS = 1.0
_RESTORED_SECONDS = 5.0
"""By how much the time of day may jump: it is also set by hand and by NTP, in a boot's first minutes."""


@dataclass(frozen=True, slots=True)
class Clocks:
    """What the clocks say at one moment, in seconds."""

    monotonic: float
    """Stands still while the machine is suspended."""
    boottime: float
    """Goes on while the machine is suspended."""
    wall: float
    """The only clock that goes on while a process lies on a disk as a checkpoint."""
    processor: float
    """What this process has computed, in all its threads: nothing, while it is frozen."""

    @classmethod
    def now(cls) -> Self:
        """Read them."""
        boottime = time.clock_gettime(time.CLOCK_BOOTTIME)
        return cls(time.monotonic(), boottime, time.time(), time.process_time())


@dataclass(frozen=True, slots=True)
class Revival:
    """How this process was away, and for how many seconds of the time of day."""

    cause: Literal["frozen", "suspended", "restored"]
    away: float
    counted: float
    """How many of them the monotonic clock has counted all the same."""


class Watch:
    """Compares the clocks with those of the last look; `every` is how many seconds apart looks are."""

    def __init__(self, clocks: Clocks, every: float) -> None:
        self._last = clocks
        self._every = every

    def look(self, clocks: Clocks) -> Revival | None:
        """Return the revival since the last look, if there was one."""
        last, self._last = self._last, clocks
        monotonic = clocks.monotonic - last.monotonic
        suspended = clocks.boottime - last.boottime - monotonic
        jumped = clocks.wall - last.wall - monotonic
        if suspended > _SUSPENDED_SECONDS:
            return Revival("suspended", max(suspended, jumped), 0.0)
        if jumped > _RESTORED_SECONDS:
            return Revival("restored", jumped, 0.0)
        computed = clocks.processor - last.processor
        if (late := monotonic - self._every - computed) > _FROZEN_SECONDS:
            return Revival("frozen", late, late)
        return None
