"""The phases of a boot: consecutive, so that they add up to the whole, counted from the process's start.

The start is the kernel's, not that of the first Python line: an interpreter with a large environment has
spent a noticeable time before it runs anything of ours.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


def process_age() -> float:
    """Return the seconds since the kernel started this process, from /proc/self/stat (proc(5), field 22)."""
    stat = Path("/proc/self/stat").read_text(encoding="utf-8")
    ticks = int(stat.rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class Timeline:
    """Seconds spent in each phase since the process started. `mark` ends the current phase under its name."""

    def __init__(self, age: Callable[[], float] = process_age) -> None:
        self._age = age
        self._last = 0.0
        self.phases: dict[str, float] = {}
        self.beside: dict[str, float] = {}
        """Work that ran beside the phases, such as hashing the snapshot; not part of the sum."""

    def mark(self, phase: str) -> None:
        """End the phase that has been running since the last mark; one name may be marked more than once."""
        now = self._age()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds from the process's start to the last mark: the sum of the phases."""
        return self._last
