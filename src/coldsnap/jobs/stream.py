"""Hands a stream on to a slower reader: a piece leaves at once, and what comes while it is on its way leaves together.

The source runs in a task of its own, so that a slow consumer (a POST under way, a platform that retries)
never holds up the engine, and so that a cancelled job can be stopped while its consumer is stuck.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from typing import Generic, TypeVar

from coldsnap.errors import ColdsnapError

Piece = TypeVar("Piece")
Chunk = TypeVar("Chunk")


class Relay(Generic[Piece, Chunk]):
    """Chunks of a stream of pieces, one at a time.

    `join` makes the chunks out of the pieces that have accumulated. When the source raises, what it gave
    before leaves first, then its error is raised.
    """

    def __init__(self, source: AsyncGenerator[Piece, None], join: Callable[[list[Piece]], Iterable[Chunk]]) -> None:
        self._join = join
        self._pieces: list[Piece] = []
        self._some = asyncio.Event()
        self._reason: ColdsnapError | None = None
        self._task = asyncio.create_task(self._pull(source))
        self._task.add_done_callback(self._ended)

    @property
    def reason(self) -> ColdsnapError | None:
        """Why the source was stopped, if it was and a reason was given."""
        return self._reason

    def stop(self, reason: ColdsnapError | None = None) -> None:
        """Cancel the source; its clean-up runs in its own task, and a reader gets `reason` if there is one.

        Does nothing once the source has ended. Call it from the event loop's thread.
        """
        if not self._task.done():
            self._reason = self._reason or reason
            if not self._task.cancelling():  # a second cancel would interrupt the clean-up
                self._task.cancel()

    async def chunks(self) -> AsyncIterator[Chunk]:
        """Yield the chunks in order. Ends early, without an error, when stopped without a reason."""
        while self._pieces or not self._task.done():
            await self._some.wait()
            if not self._task.done():
                self._some.clear()
            pieces, self._pieces = self._pieces, []
            for chunk in self._join(pieces):
                yield chunk
        if self._reason is not None:
            raise self._reason
        if not self._task.cancelled():
            self._task.result()

    async def _pull(self, source: AsyncGenerator[Piece, None]) -> None:
        async with contextlib.aclosing(source):
            async for piece in source:
                self._pieces.append(piece)
                self._some.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._some.set()
        if not task.cancelled():
            task.exception()  # asyncio logs one that nobody asked for; the reader may be gone
