"""Posts a job's chunks to the platform in order; a chunk is delivered or the job fails. Replaces the SDK's posting.

The SDK gives a chunk up after one 4xx or three 5xx and goes on with the next, so that text is missing and
nobody is told; and a result that is given up leaves a job that never ends. Here a POST is repeated until it
is taken. Meanwhile the job's stream accumulates (`stream.Relay`), and neither engine nor other jobs wait.

A POST whose answer is lost may have been taken, and is repeated too: at least once. Each carries its chunk's
number in a header, by which a platform can tell (`coldsnap serve` does), and a native chunk says that it is a repeat.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any
from urllib.parse import quote

import aiohttp
import orjson

from coldsnap.errors import JobError
from coldsnap.jobs.job import Chunk
from coldsnap.jobs.post import Poster, Unsent

_FIRST_WAIT = 0.05
_LONGEST_WAIT = 2.0
_GIVE_UP_SECONDS = 600.0
"""For how long one POST is offered again to a platform that fails or throttles: what it gives a job by default."""
_REFUSED_SECONDS = 30.0
"""The same for one that is refused: a proxy or a restart may answer so for a moment."""
_HEADERS = {"Content-Type": "application/x-www-form-urlencoded", "charset": "utf-8"}
"""The headers that the SDK sends, whatever the body: the platform is known to read JSON under them."""
_CHUNK_BYTES = 1_000_000
"""The platform takes a streamed chunk of at most 1 MB, and a result of 10 or 20."""
_TOO_LARGE = 413
_PASSING = frozenset({408, 425, 429})
"""Refusals that say themselves that they pass."""
_UNKNOWN = frozenset({502, 504})
"""A proxy's words about an answer that it did not get."""


class _Undelivered(Exception):
    """The platform would not take a chunk or a result; `perhaps` it has, and the answer was lost."""

    def __init__(self, complaint: str, *, perhaps: bool = False) -> None:
        super().__init__(complaint)
        self.perhaps = perhaps


class Egress:
    """Posts a job's chunks and its result. `handle_job` has the signature of the SDK's function of that name."""

    def __init__(
        self,
        handler: Callable[[dict[str, Any]], AsyncGenerator[Chunk, None]],
        stream_url: str,
        done_url: str,
        log: Callable[[str, str], None],
        worker_is_dead: Callable[[], bool] = lambda: False,
    ) -> None:
        self._handler = handler
        self._stream_url = stream_url
        self._done_url = done_url
        self._log = log
        self._worker_is_dead = worker_is_dead
        self._poster = Poster()
        self.posts = 0
        """How many chunks and results the platform has taken."""

    async def handle_job(self, session: aiohttp.ClientSession, _config: object, job: dict[str, Any]) -> None:
        """Run one job and post everything that it yields, then its result. Of the session only headers are used."""
        result: dict[str, Any] = {"output": []}
        posted = 0
        name = quote(job["id"])
        fields = session.headers.copy()
        fields.update(_HEADERS, **{"X-Request-ID": name})
        headers = "".join(f"{field}: {value}\r\n" for field, value in fields.items())
        stream = self._stream_url.replace("$ID", name) + "&isStream=false"
        try:
            async with contextlib.aclosing(self._handler(job)) as chunks:
                async for chunk in chunks:
                    if isinstance(chunk, dict) and "error" in chunk:
                        if self._worker_is_dead() and not posted:
                            self._log("the worker ends and nothing of the job is out: another may run it", job["id"])
                            return
                        result = {"error": chunk["error"]}
                        break
                    result["output"].append(chunk)
                    body = _json({"output": chunk})
                    # An answer that is not streamed may be larger than a chunk: then only the result carries it.
                    if isinstance(chunk, str) or len(body) <= _CHUNK_BYTES:
                        await self._post(
                            stream, headers, body, b"X-Chunk-Number: %d\r\n" % posted, _repeat(chunk, posted)
                        )
                        posted += 1
        except _Undelivered as error:
            self._log(f"a chunk was not delivered: {error}", job["id"])
            result = _failed(f"a chunk could not be delivered: {error}")
        except Exception as error:  # noqa: BLE001 -- whatever it was, a job without a result never ends
            self._log(f"{type(error).__name__}: {error}", job["id"])
            result = _failed(f"{type(error).__name__}: {error}")
        done = self._done_url.replace("$ID", name) + "&isStream=true"
        try:
            await self._end(done, headers, _json(result))
        except _Undelivered as error:
            self._log(f"the result was not delivered: {error}", job["id"])

    async def _end(self, url: str, headers: str, body: bytes) -> None:
        """Post a result. Where it is refused a short failure goes instead, or the job would never end."""
        try:
            await self._post(url, headers, body)
        except _Undelivered as error:
            if error.perhaps:
                raise  # a result that was taken must not become a failure
            failure = _failed(f"the result, {len(body)} bytes, could not be delivered: {error}")
            await self._post(url, headers, _json(failure))

    async def _post(
        self, url: str, headers: str, body: bytes, line: bytes = b"", repeat: dict[str, Any] | None = None
    ) -> None:
        """Offer a body until it is taken; `repeat` goes instead once it may have been taken and the answer lost."""
        now = time.monotonic()
        deadline, refused, wait, perhaps = now + _GIVE_UP_SECONDS, 0.0, _FIRST_WAIT, False
        while True:
            until = deadline
            try:
                status = await self._poster.post(url, headers, body, line)
                if status < 300:  # noqa: PLR2004 -- HTTP
                    self.posts += 1
                    return
                complaint = f"HTTP {status}"
                unknown = status in _UNKNOWN
                if status < 500 and status not in _PASSING:  # noqa: PLR2004 -- HTTP
                    refused = refused or time.monotonic()
                    until = 0.0 if status == _TOO_LARGE else min(deadline, refused + _REFUSED_SECONDS)
                else:
                    refused = 0.0
            except OSError as error:
                complaint = f"{type(error).__name__}: {error}"
                refused = 0.0
                unknown = not isinstance(error, Unsent)
            if unknown:
                perhaps, body = True, _json(repeat) if repeat else body
            if time.monotonic() + wait > until:
                raise _Undelivered(complaint, perhaps=perhaps)
            await asyncio.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)


def _repeat(chunk: Chunk, number: int) -> dict[str, Any] | None:
    """Return what to post if a chunk may have been taken before; an OpenAI answer or event has no place to say so."""
    if isinstance(chunk, dict) and "text" in chunk:
        return {"output": {**chunk, "repeat": number}}
    return None


def _json(content: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(content)
    except orjson.JSONEncodeError as error:
        raise _Undelivered(f"not JSON: {error}") from error


def _failed(message: str) -> dict[str, Any]:
    return {"error": orjson.dumps(JobError(message).body()).decode()}
