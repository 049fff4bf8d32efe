"""The client's side of a job: submitted to the control plane, read as a stream of chunks or as one result.

It knows what was posted and when, not who posted it or whether the platform would have taken it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import orjson


class JobFailed(Exception):
    """The worker reported an error; `error` is the string it posted. Raised on the client's side of a job."""

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

    `posts` counts every POST of the worker for this job, refused ones too; `late_posts` those after a cancel.
    `output` is what job-done carried: for a stream an empty list unless the worker returns the aggregate.
    """

    def __init__(self, job_id: str, number: int, fields: dict[str, object], result_limit: int) -> None:
        self.id = job_id
        self.number = number
        self.state = JobState.IN_QUEUE
        self.error: str | None = None
        self.output: Any = None
        self.chunks: list[Any] = []
        self.progress: list[Any] = []
        self.posts = 0
        self.late_posts = 0
        self.worker_id: str | None = None
        self.timestamps = Timestamps(submitted=time.monotonic())
        self.payload = _encode(fields)
        self.result_limit = result_limit
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
        seen = 0
        while seen < len(self.chunks) or not self.done:
            if seen == len(self.chunks):
                await self._changed.wait()
            else:
                seen += 1
                yield self.chunks[seen - 1]
        self._raise_error()

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

    def end(self, state: JobState, *, output: Any = None, error: str | None = None) -> None:
        self.state, self.output, self.error = state, output, error
        self.timestamps.done = time.monotonic()
        self._changed.ring()


def _encode(fields: dict[str, object]) -> bytes:
    try:
        return orjson.dumps(fields)
    except TypeError:  # a lone surrogate, a large integer: JSON can carry them, so a client can send them
        return json.dumps(fields).encode()
