"""Keeps a worker's books from the start of its process to its end, as the platform bills it, and writes them down."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from coldsnap import timeline
from coldsnap.boot import Booted
from coldsnap.cost import prices
from coldsnap.cost.books import Books
from coldsnap.cost.revival import Clocks, Watch
from coldsnap.engine import Usage
from coldsnap.records.schema import ColdStart, Worker, origin, stamps
from coldsnap.records.sink import Sink

TICK_SECONDS = 1.0
"""How far apart the calls of `tick` are."""
_EVERY_SECONDS = 10.0
_IDLE_SECONDS = 60.0
"""How often the running totals are written while requests run, and while none do."""


class Life:
    """Writes the cold start when the worker is ready, then its running totals, and the last at the end."""

    def __init__(
        self,
        booted: Booted,
        sink: Sink,
        clock: Callable[[], float] = time.monotonic,
        clocks: Callable[[], Clocks] = Clocks.now,
    ) -> None:
        self._booted = booted
        self._sink = sink
        self.price = prices.of(booted.engine.info.gpu, booted.settings.gpu_price_per_second)
        self._clock = clock
        self._started = clock() - timeline.process_age()
        self._books: Books | None = None
        self._clocks = clocks
        self._watch = Watch(clocks(), TICK_SECONDS)
        sink.on_job = self._look
        self._written = 0.0
        self._steps = 0
        self._at_ready = Usage()

    def ready(self) -> ColdStart:
        """Write the cold start and open the books: what has run so far was part of it."""
        record = self._booted.cold_start()
        self._sink.write(record)
        self._written = self._clock()
        ready = self._started + self._booted.timeline.total
        self._at_ready = self._booted.engine.usage()
        self._books = Books(self._started, ready, self._at_ready)
        self._watch.look(self._clocks())
        return record

    def drain(self) -> None:
        """Count seconds without a running step as drain from now on, not as idle."""
        if self._books is not None:
            self._books.drain(self._clock(), self._booted.engine.usage())

    def tick(self) -> None:
        """Write the running totals if it is time to, and a revival if there was one."""
        self._look()
        now = self._clock()
        if self._books is None or now - self._written < _EVERY_SECONDS:
            return
        if self._booted.engine.usage().steps != self._steps or now - self._written >= _IDLE_SECONDS:
            self._write(self._books, now, final=False)

    def _look(self) -> None:
        revival = self._watch.look(self._clocks())
        if self._books is None or revival is None:
            return
        self._books.away(revival.counted)
        record = self._booted.cold_start()
        none = {"seconds": 0.0, "phases": {}, "beside": {}}
        fields = {"boot": "revived", "revival": revival.cause, "away_seconds": round(revival.away, 3)}
        self._sink.write(record.model_copy(update=none | fields | stamps()))

    def end(self) -> None:
        """Write the last totals."""
        if self._books is not None:
            self._write(self._books, self._clock(), final=True)

    def totals(self) -> Worker | None:
        """Return the running totals as a record that is not written; None before the worker is ready."""
        if self._books is None:
            return None
        return self._totals(self._books, self._clock(), self._booted.engine.usage(), final=False)

    def _write(self, books: Books, now: float, *, final: bool) -> None:
        usage = self._booted.engine.usage()
        self._written, self._steps = now, usage.steps
        self._sink.write(self._totals(books, now, usage, final=final))

    def _totals(self, books: Books, now: float, usage: Usage, *, final: bool) -> Worker:
        engine, settings = self._booted.engine, self._booted.settings
        totals = books.totals(now, usage)
        gpus, tally = engine.info.gpu_count, self._sink.tally

        def gpu_seconds(seconds: float) -> float:
            return round(seconds * gpus, 6)

        headings: dict[str, Any] = {
            f"{name}_gpu_seconds": gpu_seconds(each) for name, each in totals.headings.by_name().items()
        }
        return Worker(
            **origin(settings, engine.info),
            final=final,
            gpu_seconds=gpu_seconds(totals.total),
            **headings,
            overhead_causes={cause: gpu_seconds(each) for cause, each in totals.causes.items()},
            joules=_since(self._at_ready.joules, usage.joules),
            request_joules=_since(self._at_ready.request_joules, usage.request_joules),
            billed_seconds=totals.billed,
            usd=self.price.usd(totals.billed * gpus),
            price_per_second=self.price.per_second,
            requests=tally.requests,
            prompt_tokens=tally.prompt_tokens,
            cached_tokens=tally.cached_tokens,
            completion_tokens=tally.completion_tokens,
            steps=usage.steps,
            lost_steps=usage.lost_steps,
            metering_seconds=round(usage.metering, 6),
            unwritten_records=tally.unwritten,
            unsent_records=tally.unsent,
            failed_uploads=tally.failed_uploads,
            estimated=usage.estimated is not None,
            estimated_because=usage.estimated,
            fit=usage.fit,
        )


def _since(before: float | None, now: float | None) -> float | None:
    return None if now is None else round(now - (before or 0.0), 6)
