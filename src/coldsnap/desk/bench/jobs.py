"""An endpoint by the platform's job API: a request is `run`, its answer is read from `stream` until it is final.

The platform allows 2,000 stream requests in 10 seconds for all jobs together. Polls keep to that: where more jobs
run than it suffices for, their chunks come later and larger, to any client. A job's first poll does not wait its
turn, so the time to the first token is seen as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from http import HTTPStatus
from typing import Any

import orjson

from coldsnap.desk.bench.answer import Answer, Events, Failed, failure
from coldsnap.desk.bench.dialect import Dialect
from coldsnap.desk.bench.endpoint import Address, Endpoint, foreign, refused
from coldsnap.foundation.plural import plural

_FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"}
_POLLS_PER_SECOND = 180.0
_POLLS_AT_ONCE = 150
_QUICK_SECONDS = 0.05
"""An endpoint that answers sooner, with nothing, does not hold the request until there is news."""
_CANCEL_SECONDS = 5.0


class Polls:
    """Limits polls to a rate, with a few in reserve."""

    def __init__(self, rate: float = _POLLS_PER_SECOND, burst: int = _POLLS_AT_ONCE) -> None:
        self._step = 1 / rate
        self._ahead = burst / rate
        self._next = 0.0
        self.seconds = 0.0
        """How long polls have waited in all."""

    def due(self, now: float) -> float:
        """Take a turn; return when it is."""
        self._next = max(self._next, now - self._ahead) + self._step
        return self._next

    def first(self) -> None:
        """Count a poll that does not wait."""
        self.due(time.monotonic())

    async def turn(self) -> None:
        """Wait until there may be one more."""
        now = time.monotonic()
        wait = self.due(now) - now
        if wait > 0:
            self.seconds += wait
            await asyncio.sleep(wait)


class Jobs(Endpoint):
    """Sends native jobs, or OpenAI requests as jobs."""

    def __init__(self, address: Address, key: str | None, dialect: Dialect) -> None:
        super().__init__(address, key, dialect)
        self.polls = Polls()
        self.slowed = 0
        """Polls that the endpoint answered with 429."""

    def note(self) -> str | None:
        """Say what the rate of polls did to the figures."""
        if self.slowed:
            return f"The endpoint answered {plural(self.slowed, 'poll')} of streams with 429, too many at its rate."
        if self.polls.seconds:
            return (
                f"Polls of streams waited {self.polls.seconds:.1f} s in all to keep to the platform's rate: chunks "
                "came later and larger than they left the worker, and ITL and gap say how this client saw them."
            )
        return None

    async def models(self) -> None:
        """Check address and key; the job API tells no models."""
        await self._call("GET", f"{self.address.jobs}/health")

    async def ask(self, body: dict[str, Any], answer: Answer) -> None:
        """Run a job and read its stream. One that is left before its end is cancelled."""
        submitted = await self._call("POST", f"{self.address.jobs}/run", {"input": self.dialect.job(body)})
        job = submitted.get("id") if isinstance(submitted, dict) else None
        if not isinstance(job, str):
            raise Failed("not understood", "/run did not answer with the id of a job")
        ended = False
        try:
            await self._read(job, answer)
            ended = True
        except _JobEnded as failed:
            ended = True
            raise failed.why from None
        finally:
            if not ended:
                await asyncio.shield(self._cancel(job))

    async def _read(self, job: str, answer: Answer) -> None:
        events = Events()
        self.polls.first()
        while True:
            poll_started = time.monotonic()
            state, chunks, error = await self._poll(job)
            now = time.perf_counter()
            for chunk in chunks:
                output = chunk.get("output") if isinstance(chunk, dict) else None
                if isinstance(output, str):
                    for event in events.feed(output.encode()):
                        answer.take(event, now)
                else:
                    answer.take(output, now)
            if state in _FINAL and (answer.finished or not chunks):
                if state != "COMPLETED":
                    raise _JobEnded(_why(state, error))
                return
            if not chunks and time.monotonic() - poll_started < _QUICK_SECONDS:
                await asyncio.sleep(_QUICK_SECONDS)
            await self.polls.turn()

    async def _poll(self, job: str) -> tuple[str, list[Any], Any]:
        """Return the job's state, its new chunks, and its error."""
        while True:
            with foreign():
                async with self._http.get(f"{self.address.jobs}/stream/{job}") as response:
                    if response.status == HTTPStatus.TOO_MANY_REQUESTS:
                        self.slowed += 1
                        wait = response.headers.get("Retry-After", "1")
                    elif response.status != HTTPStatus.OK:
                        raise await refused(response)
                    else:
                        status = orjson.loads(await response.read())
                        return str(status.get("status")), status.get("stream") or [], status.get("error")
            await asyncio.sleep(float(wait) if wait.isdigit() else 1.0)

    async def _cancel(self, job: str) -> None:
        """End a job that nobody waits for: it would go on at the endpoint's cost."""
        with contextlib.suppress(Failed, TimeoutError):
            async with asyncio.timeout(_CANCEL_SECONDS):
                await self._call("POST", f"{self.address.jobs}/cancel/{job}")


class _JobEnded(Exception):
    """The job is over, and not well."""

    def __init__(self, why: Failed) -> None:
        super().__init__(str(why))
        self.why = why


def _why(state: str, error: Any) -> Failed:
    if error is None:
        return Failed(f"job {state}")
    inner = failure(error)
    return Failed(f"job {state}", inner.detail, inner.status)
