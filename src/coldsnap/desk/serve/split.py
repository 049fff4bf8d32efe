"""A worker's GPU-seconds under the five headings of its books, at any moment of its life.

A worker writes its books every 10 s while it works, every 60 s while it does not, and at its end. In between they
are carried on: what its requests' records say, and the time in which it has had jobs, is busy; the rest is idle. The
next record puts that right. A worker that was killed wrote no last one: its books stay as they were carried on.
"""

from __future__ import annotations

import math

from coldsnap.cost.books import Headings
from coldsnap.records.schema import ColdStart, Request, Worker


class Account:
    """What the records of one worker say, in the order of its log."""

    def __init__(self) -> None:
        self.cold_start: ColdStart | None = None
        self.totals: Worker | None = None
        self._busy = 0.0
        """GPU-seconds of all requests that have ended."""
        self._last_end = 0.0

    def add(self, record: ColdStart | Request | Worker) -> None:
        """Take in one record."""
        if isinstance(record, ColdStart):
            if record.boot == "fresh":
                self.cold_start = record
        elif isinstance(record, Worker):
            self.totals = record
        else:
            self._busy += record.gpu_seconds
            self._last_end = record.monotonic

    @property
    def gpus(self) -> int:
        """How many GPUs the worker has; 1 until it has said so."""
        return 1 if self.cold_start is None else self.cold_start.gpu_count

    def split(self, begun: float, now: float, jobs_since: float | None) -> Headings:
        """Return where the GPU-seconds went from `begun` to `now`, `time.monotonic()` of this machine.

        `now` is the worker's end, if it has ended. It has had jobs since `jobs_since`, None if it has none.
        """
        if self.cold_start is None:
            return Headings(cold=now - begun)
        if (books := self.totals) is None:
            split = Headings(cold=self.cold_start.seconds * self.gpus)
            since = self.cold_start.monotonic
        else:
            split = books.headings()
            since = books.monotonic
        tail = 0.0 if books and books.final else max(0.0, now - since) * self.gpus
        busy = max(0.0, self._busy - split.busy)
        if jobs_since is not None:
            busy += max(0.0, now - max(since, self._last_end, jobs_since)) * self.gpus
        busy = min(busy, tail)
        return split + Headings(busy=busy, idle=tail - busy)

    def billed(self, begun: float, now: float) -> int:
        """Return the GPU-seconds that the platform would bill: a worker's life, rounded up to the second."""
        return math.ceil(now - begun) * self.gpus
