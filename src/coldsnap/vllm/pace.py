"""Spaces a stream's chunks out inside vLLM, where it saves most: before an output is even built.

A request's first output is made at once, afterwards one when its stream is due, and at once for the end or an error.
What lies between stays with vLLM as tokens and text, as it does with its own `stream_interval`, which counts tokens
and not time: no output is built, nothing is merged, nobody is woken, no event, no POST. Nothing here imports vLLM.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

_STREAM_SECONDS = 0.001
"""How much wider the pace gets with each stream, so that all streams together send a chunk a millisecond."""
_WIDEST_SECONDS = 0.035
"""The pace never gets wider by load than this: with a step of the engine and a POST on top, 50 ms."""
_SWEEP_SECONDS = 0.004


class Pace:
    """The clock of all streams. `least` is the least time between two chunks of a stream, in seconds."""

    def __init__(self, least: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._least = least
        self._open = 0
        self._held: set[PacedRequest] = set()
        self._sweeping = False

    def begin(self) -> None:
        """Count a stream that begins."""
        self._open += 1

    def end(self) -> None:
        """Forget a stream that has ended."""
        self._open -= 1

    def due(self) -> float:
        """Return when a stream that sends a chunk now may send its next one: later while many jobs stream."""
        return self.clock() + max(self._least, min(_WIDEST_SECONDS, self._open * _STREAM_SECONDS))

    def hold(self, request: PacedRequest) -> None:
        """Release a held request when it is due, even if no further token comes: a step may be long."""
        self._held.add(request)
        if not self._sweeping:
            self._sweeping = True
            asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)

    def let_go(self, request: PacedRequest) -> None:
        """Forget a request that was held."""
        self._held.discard(request)

    def release(self, queue: PacedQueue) -> None:
        """Hand a stream's consumer everything that is held back for it."""
        for request in [request for request in self._held if request.queue is queue]:
            request.release()

    def _sweep(self) -> None:
        now = self.clock()
        for request in [request for request in self._held if request.queue.due <= now]:
            request.release()
        self._sweeping = bool(self._held)
        if self._sweeping:
            asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)


class PacedQueue:
    """Put before vLLM's `RequestOutputCollector` in a class of both, which an existing queue is given.

    `output` is the collector's: what its consumer has not fetched.
    """

    output: Any
    due = 0.0
    """When the consumer may have more output, by the pace's clock."""
    ended = False

    def begin(self, pace: Pace) -> None:
        """Count as a stream, until closed."""
        self.pace = pace
        self._error: Exception | None = None
        """An error that came while an output was waiting to be fetched."""
        pace.begin()

    def put(self, output: Any) -> None:
        """Take an output, or the error that ends the request. It does not replace what was there before it."""
        if isinstance(output, Exception):
            self.due = 0.0
            self.pace.release(self)
            if self.output is not None:
                self._error = output
                return
        super().put(output)  # type: ignore[misc] # the collector's, which merges

    def get_nowait(self) -> Any:
        """Return what is there, or None. An error comes last."""
        output = super().get_nowait()  # type: ignore[misc] # the collector's
        if output is not None:
            self._fetched()
        return output

    async def get(self) -> Any:
        """Wait until something is there and return it."""
        output = await super().get()  # type: ignore[misc] # the collector's
        self._fetched()
        return output

    def close(self) -> None:
        """Forget the request."""
        self.ended = True
        self.pace.end()
        super().close()  # type: ignore[misc] # the collector's

    def _fetched(self) -> None:
        self.due = self.pace.due()
        if self._error is not None:
            super().put(self._error)  # type: ignore[misc] # the collector's


class PacedRequest:
    """Put before vLLM's `RequestState` in a class of both, which an existing state is given. It has a paced queue.

    With `n` above 1 there are several to a queue.
    """

    queue: PacedQueue
    detokenizer: Any
    stream_interval: int
    sent_tokens_offset: int
    """How many tokens were in outputs before. vLLM itself counts them only if its `stream_interval` is above 1."""

    def make_request_output(
        self, new_token_ids: list[int], pooling_output: Any, finish_reason: Any, *more: Any, **named: Any
    ) -> Any:
        """Return an output of all tokens that were in none before, or None if it is too early."""
        queue = self.queue
        if finish_reason is None and queue.due > queue.pace.clock():
            queue.pace.hold(self)
            return None
        queue.pace.let_go(self)
        if self.stream_interval == 1:
            new_token_ids = self.detokenizer.output_token_ids[self.sent_tokens_offset :]
            self.sent_tokens_offset = self.detokenizer.num_output_tokens()
        return super().make_request_output(  # type: ignore[misc] # vLLM's
            new_token_ids, pooling_output, finish_reason, *more, **named
        )

    def release(self) -> None:
        """Hand the consumer what was held back."""
        self.queue.pace.let_go(self)
        if not self.queue.ended and (output := self.make_request_output([], None, None, None)) is not None:
            self.queue.put(output)
