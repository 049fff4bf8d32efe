"""A job: what it was submitted with, its state, and its output as a stream of chunks or as one result.

It knows what was posted and when, not who posted it or whether the platform would have taken it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import orjson

MEGABYTE: Final = 1_000_000
RUN_LIMIT: Final = 10 * MEGABYTE
RUNSYNC_LIMIT: Final = 20 * MEGABYTE


class JobFailed(Exception):
    """The job did not complete; `error` says why, as the worker posted it. Raised on the client's side of a job."""

    def __init__(self, error: str) -> None:
        super().__init__(error)
        self.error = error


class JobCancelled(JobFailed):
    """The job was cancelled before it ended."""


class JobState(StrEnum):
    """The platform's names."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"


@dataclass(frozen=True, slots=True)
class Terms:
    """What a job was submitted under: the platform's documented limits unless its policy says otherwise. Seconds."""

    limit: int = RUN_LIMIT
    """Bytes of the request, and of the result."""
    retention: float = 1800.0
    """How long the result is kept after the end."""
    execution_timeout: float = 600.0
    ttl: float = 86_400.0
    """How long the job may live, waiting or running."""
    low_priority: bool = False
    """The job starts no worker."""
    webhook: str | None = None
    durable: bool = False
    """Whether the job outlives the platform's process. Nobody would read one whose client waits on a connection."""


RUN: Final = Terms()
RUNSYNC: Final = Terms(limit=RUNSYNC_LIMIT, retention=60.0)


@dataclass(slots=True)
class Timestamps:
    """`time.monotonic()` at each turn of a job's life; `chunks` has one entry for each of `Job.chunks`."""

    submitted: float
    taken: float | None = None
    chunks: list[float] = field(default_factory=list)
    done: float | None = None

    @property
    def first_chunk(self) -> float | None:
        return self.chunks[0] if self.chunks else None


class Bell:
    """Wakes whoever waits. Ringing costs nothing while nobody does."""

    def __init__(self) -> None:
        self._waiters: list[asyncio.Future[None]] = []

    def ring(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, seconds: float | None = None) -> None:
        """Return when rung or after `seconds`; the caller looks which."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await asyncio.wait((waiter,), timeout=seconds)
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)


class Job:
    """The client's handle on a submitted job.

    `posts` counts every POST of the worker for this job, refused ones too; `late_posts` those after its end.
    `output` is what job-done carried: for a stream an empty list unless the worker returns the aggregate.
    `attempts` counts how often a worker took it.
    """

    def __init__(self, job_id: str, number: int, payload: bytes, terms: Terms = RUN) -> None:
        self.id = job_id
        self.number = number
        self.payload = payload
        self.terms = terms
        self.state = JobState.IN_QUEUE
        self.error: str | None = None
        self.output: Any = None
        self.chunks: list[Any] = []
        self.progress: list[Any] = []
        self.posts = 0
        self.late_posts = 0
        self.posted: bytes | None = None
        """The body with which its worker ended it: the same again is a repeat."""
        self.attempts = 0
        self.read = 0
        """How many of the chunks a client has been given: with one of them the job cannot start again unnoticed."""
        self.worker_id: str | None = None
        self.held = False
        """Whether a client waits for it on an open connection."""
        self.deferred = False
        """The platform ends before the job can: it goes on after the next start."""
        self.timestamps = Timestamps(submitted=time.monotonic())
        self._changed = Bell()

    @property
    def done(self) -> bool:
        return self.timestamps.done is not None

    async def started(self, timeout: float | None = None) -> None:
        """Return at the first chunk or at the end; raise the error of a job that ended without a chunk."""
        async with asyncio.timeout(timeout):
            while not self.chunks and not self.done:
                await self._changed.wait()
        if not self.chunks:
            self._raise_error()

    async def stream(self) -> AsyncIterator[Any]:
        """Yield every chunk's output in order of arrival, from the first; then raise the job's error."""
        position = 0
        while position < len(self.chunks) or not self.done:
            if position == len(self.chunks):
                await self._changed.wait()
            else:
                position += 1
                self.read = max(self.read, position)
                yield self.chunks[position - 1]
        self._raise_error()

    def unread(self) -> list[Any]:
        """Return the chunks that no client has been given yet, and count them as given."""
        chunks = self.chunks[self.read :]
        self.read = len(self.chunks)
        return chunks

    async def news(self, seconds: float) -> None:
        """Return when there are unread chunks, when the job has ended, or after `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.read == len(self.chunks) and not self.done:
                    await self._changed.wait()

    async def ended(self, seconds: float) -> bool:
        """Return whether the job ends within `seconds`; at once if it is deferred."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.done and not self.deferred:
                    await self._changed.wait()
        return self.done

    async def result(self, timeout: float | None = None) -> Any:
        """Return the job's output, or the list of its chunks where the worker did not aggregate them."""
        async with asyncio.timeout(timeout):
            while not self.done:
                await self._changed.wait()
        self._raise_error()
        return self.output if self.output or not self.chunks else self.chunks

    def _raise_error(self) -> None:
        if self.error is not None:
            raise (JobCancelled if self.state is JobState.CANCELLED else JobFailed)(self.error)

    # What the control plane does with it.

    def add_chunk(self, output: Any) -> None:
        self.chunks.append(output)
        self.timestamps.chunks.append(time.monotonic())
        self._changed.ring()

    def take(self, worker_id: str) -> None:
        self.state, self.worker_id, self.timestamps.taken = JobState.IN_PROGRESS, worker_id, time.monotonic()
        self.attempts += 1

    def restart(self) -> None:
        """Forget all that a worker did: the job waits again."""
        self.state, self.worker_id = JobState.IN_QUEUE, None
        self.output, self.error, self.posted, self.read = None, None, None, 0
        self.chunks, self.progress = [], []
        self.timestamps = Timestamps(submitted=self.timestamps.submitted)

    def defer(self) -> None:
        self.deferred = True
        self._changed.ring()

    def end(self, state: JobState, *, output: Any = None, error: str | None = None) -> None:
        self.state, self.output, self.error = state, output, error
        self.timestamps.done = time.monotonic()
        self._changed.ring()


def encode(fields: dict[str, Any]) -> bytes:
    """Return JSON."""
    try:
        return orjson.dumps(fields)
    except TypeError:  # a lone surrogate, a large integer: JSON can carry them, so a client can send them
        return json.dumps(fields).encode()
