"""The pace of every stream, kept where it saves most: in vLLM's queue between its output loop and a request.

vLLM merges what a request's consumer has not fetched yet. So the consumer is woken for the first output at once,
afterwards when its stream is due, and at once for the end or an error: what lies between costs a merge, no wake-up,
no event, no POST. Nothing here imports vLLM.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

_STREAM_SECONDS = 0.001
"""What the pace grows by with each stream: a chunk of each in turn, at most one a millisecond."""
_WIDEST_SECONDS = 0.035
"""The pace never gets wider by load than this: with a step of the engine and a POST on top, 50 ms."""
_SWEEP_SECONDS = 0.01


class Pace:
    """The clock of all streams. `least` is the least time between two chunks of a stream, in seconds."""

    def __init__(self, least: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._least = least
        self._open = 0
        self._held: set[PacedQueue] = set()
        self._sweeping = False

    def begin(self) -> None:
        """Count a stream that begins."""
        self._open += 1

    def end(self, queue: PacedQueue) -> None:
        """Forget a stream that has ended."""
        self._open -= 1
        self._held.discard(queue)

    def due(self) -> float:
        """Return when a stream whose chunk leaves now has its next: later while many jobs stream."""
        return self.clock() + max(self._least, min(_WIDEST_SECONDS, self._open * _STREAM_SECONDS))

    def hold(self, queue: PacedQueue) -> None:
        """Let a stream go when it is due, should no further output do that: an engine may be long at a step."""
        self._held.add(queue)
        if not self._sweeping:
            self._sweeping = True
            asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)

    def _sweep(self) -> None:
        now = self.clock()
        for queue in [queue for queue in self._held if queue.due <= now]:
            self._held.discard(queue)
            queue.release()
        self._sweeping = bool(self._held)
        if self._sweeping:
            asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)


class PacedQueue:
    """Put before vLLM's `RequestOutputCollector` in a class of both, which an existing queue is given.

    `output` is the collector's: what its consumer has not fetched.
    """

    output: Any

    def begin(self, pace: Pace) -> None:
        """Take the place of the collector's own put and get."""
        self.due = 0.0
        self._pace = pace
        self._free = self.output is not None
        self._error: Exception | None = None
        """One that came while an output was waiting."""
        self._consumer: asyncio.Future[None] | None = None
        pace.begin()

    def put(self, output: Any) -> None:
        """Take an output, or the error that ends the request."""
        error = isinstance(output, Exception)
        if self.output is None:
            self.output = output
        elif error:
            self._error = output
        else:
            super().put(output)  # type: ignore[misc] # which merges
        if error or output.finished or self.due <= self._pace.clock():
            self.release()
        elif not self._free:
            self._pace.hold(self)

    def release(self) -> None:
        """Let the consumer have what is there."""
        if self.output is not None:
            self._free = True
            if self._consumer is not None and not self._consumer.done():
                self._consumer.set_result(None)

    def get_nowait(self) -> Any:
        """Return what has accumulated if it is due, else None. An error comes after what was there before it."""
        if not self._free:
            return None
        self.due = self._pace.due()
        output, self.output, self._error = self.output, self._error, None
        self._free = self.output is not None
        if isinstance(output, Exception):
            raise output
        return output

    async def get(self) -> Any:
        """Wait until something is due and return it."""
        if not self._free:
            self._consumer = asyncio.get_running_loop().create_future()
            await self._consumer
        return self.get_nowait()

    def close(self) -> None:
        """Forget the request."""
        self._pace.end(self)
        super().close()  # type: ignore[misc]
