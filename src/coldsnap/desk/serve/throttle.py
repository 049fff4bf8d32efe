"""How many requests an operation takes: the platform's documented rates."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from coldsnap.errors import Refused

_WINDOW_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Rate:
    """Requests in any 10 seconds, and requests at the same time."""

    requests: int
    at_once: int | None


RATES: Mapping[str, Rate] = {
    "run": Rate(1000, 200),
    "runsync": Rate(2000, 400),
    "status": Rate(2000, 400),
    "stream": Rate(2000, 400),
    "cancel": Rate(100, 20),
    "purge-queue": Rate(2, None),
    "openai": Rate(2000, 400),
}
"""Operations that are not named here are not limited."""


class Throttle:
    """Counts the requests of each operation."""

    def __init__(self, rates: Mapping[str, Rate] = RATES) -> None:
        self._rates = rates
        self._begun: dict[str, deque[float]] = {name: deque() for name in rates}
        self._open = dict.fromkeys(rates, 0)

    @contextlib.contextmanager
    def admitted(self, operation: str) -> Iterator[None]:
        """Count a request while it runs; raise where there are too many."""
        if (rate := self._rates.get(operation)) is None:
            yield
            return
        now, begun = time.monotonic(), self._begun[operation]
        while begun and begun[0] <= now - _WINDOW_SECONDS:
            begun.popleft()
        if len(begun) >= rate.requests:
            wait = math.ceil(begun[0] + _WINDOW_SECONDS - now)
            message = f"/{operation} takes {rate.requests} requests in {_WINDOW_SECONDS:g} seconds"
            raise Refused(429, message, retry_after=max(1, wait))
        if rate.at_once is not None and self._open[operation] >= rate.at_once:
            raise Refused(429, f"/{operation} takes {rate.at_once} requests at the same time", retry_after=1)
        begun.append(now)
        self._open[operation] += 1
        try:
            yield
        finally:
            self._open[operation] -= 1
