"""Posts a job's chunks to the platform in order; a chunk is delivered or the job fails. Replaces the SDK's posting.

The SDK gives a chunk up after one 4xx or three 5xx and goes on with the next, so that text is missing and
nobody is told; and a result that is given up leaves a job that never ends. Here a POST is repeated until it
is taken. Meanwhile the job's stream accumulates (`stream.Relay`), and neither engine nor other jobs wait.
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
from coldsnap.jobs.post import Poster

_FIRST_WAIT = 0.05
_LONGEST_WAIT = 2.0
_GIVE_UP_SECONDS = 60.0
"""For how long one chunk is offered again to a platform that fails or throttles."""
_HEADERS = {"Content-Type": "application/x-www-form-urlencoded", "charset": "utf-8"}
"""The headers that the SDK sends, whatever the body: the platform is known to read JSON under them."""
_CHUNK_BYTES = 1_000_000
"""The platform takes a streamed chunk of at most 1 MB, and a result of 10 or 20."""
_TOO_MANY = 429


class _Undelivered(Exception):
    """The platform would not take a chunk."""


class Egress:
    """Posts a job's chunks and its result. `handle_job` has the signature of the SDK's function of that name."""

    def __init__(
        self,
        handler: Callable[[dict[str, Any]], AsyncGenerator[Chunk, None]],
        stream_url: str,
        done_url: str,
        log: Callable[[str, str], None],
    ) -> None:
        self._handler = handler
        self._stream_url = stream_url
        self._done_url = done_url
        self._log = log
        self._poster = Poster()
        self.posts = 0
        """How many chunks and results the platform has taken."""

    async def handle_job(self, session: aiohttp.ClientSession, _config: object, job: dict[str, Any]) -> None:
        """Run one job and post everything that it yields, then its result. Of the session only headers are used."""
        result: dict[str, Any] = {"output": []}
        name = quote(job["id"])
        fields = session.headers.copy()
        fields.update(_HEADERS, **{"X-Request-ID": name})
        headers = "".join(f"{field}: {value}\r\n" for field, value in fields.items())
        stream = self._stream_url.replace("$ID", name) + "&isStream=false"
        try:
            async with contextlib.aclosing(self._handler(job)) as chunks:
                async for chunk in chunks:
                    if isinstance(chunk, dict) and "error" in chunk:
                        result = {"error": chunk["error"]}
                        break
                    result["output"].append(chunk)
                    # An answer that is not streamed may be larger than a chunk: then only the result carries it.
                    await self._post(stream, headers, {"output": chunk}, optional=not isinstance(chunk, str))
        except _Undelivered as error:
            self._log(f"a chunk was not delivered: {error}", job["id"])
            result = _failed(f"a chunk could not be delivered: {error}")
        except Exception as error:  # noqa: BLE001 -- whatever it was, a job without a result never ends
            self._log(f"{type(error).__name__}: {error}", job["id"])
            result = _failed(f"{type(error).__name__}: {error}")
        done = self._done_url.replace("$ID", name) + "&isStream=true"
        try:
            await self._post(done, headers, result)
        except _Undelivered as error:
            self._log(f"the result was not delivered: {error}", job["id"])

    async def _post(self, url: str, headers: str, content: dict[str, Any], *, optional: bool = False) -> None:
        try:
            body = orjson.dumps(content)
        except orjson.JSONEncodeError as error:
            raise _Undelivered(f"not JSON: {error}") from error
        if optional and len(body) > _CHUNK_BYTES:
            return
        deadline, wait = time.monotonic() + _GIVE_UP_SECONDS, _FIRST_WAIT
        while True:
            try:
                status = await self._poster.post(url, headers, body)
                if status < 300:  # noqa: PLR2004 -- HTTP
                    self.posts += 1
                    return
                complaint = f"HTTP {status}"
                if status < 500 and status != _TOO_MANY:  # noqa: PLR2004 -- the same body will not be taken later
                    raise _Undelivered(complaint)
            except OSError as error:
                complaint = f"{type(error).__name__}: {error}"
            if time.monotonic() + wait > deadline:
                raise _Undelivered(complaint)
            await asyncio.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)


def _failed(message: str) -> dict[str, Any]:
    return {"error": orjson.dumps(JobError(message).body()).decode()}
