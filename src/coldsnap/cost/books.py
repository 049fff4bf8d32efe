"""A worker's seconds under five headings, which add up to its life. Pure: no clock, no I/O."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from coldsnap.engine import Usage


@dataclass(frozen=True, slots=True)
class Headings:
    """What a worker's seconds, or its GPU-seconds, went into."""

    cold: float = 0.0
    """From the start of the process to ready."""
    busy: float = 0.0
    """Requests' shares of the engine's steps."""
    overhead: float = 0.0
    """Steps that were nobody's."""
    idle: float = 0.0
    """Waiting for requests."""
    drain: float = 0.0
    """Waiting after SIGTERM."""

    @property
    def total(self) -> float:
        return sum(self.by_name().values())

    def __add__(self, other: Headings) -> Headings:
        mine, others = self.by_name(), other.by_name()
        return Headings(**{name: mine[name] + others[name] for name in HEADINGS})

    def by_name(self) -> dict[str, float]:
        """Return the seconds by the heading's name, in order."""
        return asdict(self)


HEADINGS = tuple(field.name for field in fields(Headings))
"""Whatever else has to know the headings has them from here; a test names those that cannot, such as SQL."""


@dataclass(frozen=True, slots=True)
class Totals:
    """A worker's life so far, in seconds: `total` is the sum of the headings."""

    total: float
    headings: Headings
    causes: Mapping[str, float]
    """The overhead by cause."""

    @property
    def billed(self) -> int:
        """The platform rounds a worker's life up to the second."""
        return math.ceil(self.total)


class Books:
    """Puts each second of a worker under one heading. Times are seconds of the monotonic clock.

    Up to `ready` is cold start, whatever ran. Afterwards a second is busy or overhead if the engine ran in
    it, else idle, or drain once `drain` was called.
    """

    def __init__(self, started: float, ready: float, usage: Usage) -> None:
        self._started = started
        self._ready = ready
        self._at_ready = usage
        self._draining: tuple[float, Usage] | None = None

    def drain(self, now: float, usage: Usage) -> None:
        """Begin the drain; only the first call counts."""
        self._draining = self._draining or (now, usage)

    def away(self, seconds: float) -> None:
        """Leave out seconds that have just passed on the clock, but not in this process: it was frozen."""
        self._started += seconds
        self._ready += seconds
        if self._draining is not None:
            since, usage = self._draining
            self._draining = since + seconds, usage

    def totals(self, now: float, usage: Usage) -> Totals:
        """Close the books at `now`."""
        before = self._at_ready
        total, cold = now - self._started, self._ready - self._started
        busy = usage.busy - before.busy
        causes = {cause: each - before.overhead.get(cause, 0.0) for cause, each in usage.overhead.items()}
        overhead = sum(causes.values())
        drain = 0.0
        if self._draining is not None:
            since, at_drain = self._draining
            drain = max(0.0, now - since - (usage.spent - at_drain.spent))
        idle = total - cold - busy - overhead - drain
        return Totals(total, Headings(cold, busy, overhead, idle, drain), causes)
