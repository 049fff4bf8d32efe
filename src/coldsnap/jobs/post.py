"""An HTTP client for POSTs alone, over kept connections: aiohttp's took half of a busy worker's processor time.

httptools (llhttp) reads the answers. What this does not know: redirects, proxies, cookies, compression.
"""

from __future__ import annotations

import asyncio
import ssl
from functools import cache, lru_cache
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import httptools

_SECONDS = 60.0
"""How long connecting may take, and an answer: a platform that needs 30 s for each is slow and not gone."""
_KEPT_SECONDS = 15.0
"""How long an idle connection is trusted, as in aiohttp: many servers close one after a minute or less."""
_CONTINUE = 200
_PORTS = {"http": 80, "https": 443}


class _Origin(NamedTuple):
    scheme: str
    host: str
    port: int


class Unsent(OSError):
    """There was no connection, so the POST had no effect."""


class Poster:
    """Posts from one event loop; as many at once as are asked for, each on a connection of its own."""

    def __init__(self) -> None:
        self._idle: dict[_Origin, list[_Connection]] = {}

    async def post(self, url: str, headers: str, body: bytes, line: bytes = b"") -> int:
        """Return the status of the answer; `headers` and `line`, one more, are whole lines, each with its CRLF.

        Raises OSError (TimeoutError included) when none came; unless it is `Unsent`, the POST may have had its effect.
        """
        origin, head = _head(url, headers)
        connection = self._kept(origin)
        if connection is None:
            try:
                async with asyncio.timeout(_SECONDS):
                    connection = await _connect(origin)
            except OSError as error:
                raise Unsent(f"{type(error).__name__}: {error}") from error
        request = b"%b%bContent-Length: %d\r\n\r\n%b" % (head, line, len(body), body)
        status = await connection.exchange(request)
        if connection.usable:
            self._idle.setdefault(origin, []).append(connection)
        return status

    def _kept(self, origin: _Origin) -> _Connection | None:
        idle = self._idle.get(origin, [])
        now = asyncio.get_running_loop().time()
        while idle:
            connection = idle.pop()
            if connection.usable and now - connection.since < _KEPT_SECONDS:
                return connection
            connection.abort()
        return None


class _Connection(asyncio.Protocol):
    """One connection, used for one exchange after the other."""

    def __init__(self) -> None:
        self.usable = True
        self.since = 0.0
        """When the last answer was complete, by the loop's clock."""
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport
        self._answer: asyncio.Future[int] | None = None

    async def exchange(self, request: bytes) -> int:
        """Send a request and return the status of its answer. A connection on which that fails is not used again."""
        self._answer = self._loop.create_future()
        timer = self._loop.call_later(_SECONDS, self._fail, TimeoutError(f"no answer within {_SECONDS:g} s"))
        self._transport.write(request)
        try:
            return await self._answer
        except BaseException:
            self.abort()  # an answer that is still to come must not be taken for the next one's
            raise
        finally:
            timer.cancel()

    def abort(self) -> None:
        self.usable = False
        self._transport.abort()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not derive from it

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"an answer that is not HTTP: {error}"))
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        self._fail(ConnectionResetError(str(error or "the server has closed the connection")))

    def _fail(self, error: OSError) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)

    # What the parser calls.

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < _CONTINUE or self._answer is None or self._answer.done():
            return
        self.usable = self.usable and self._parser.should_keep_alive()
        self.since = self._loop.time()
        self._answer.set_result(status)


async def _connect(origin: _Origin) -> _Connection:
    loop = asyncio.get_running_loop()
    tls = trust() if origin.scheme == "https" else None
    _, connection = await loop.create_connection(_Connection, origin.host, origin.port, ssl=tls)
    return connection


@lru_cache(maxsize=1024)
def _head(url: str, headers: str) -> tuple[_Origin, bytes]:
    """Return where a POST goes and how it begins: the same for all chunks of a job."""
    parts = urlsplit(url)
    origin = _Origin(parts.scheme, parts.hostname or "", parts.port or _PORTS[parts.scheme])
    target = f"{parts.path}?{parts.query}" if parts.query else parts.path
    return origin, f"POST {target} HTTP/1.1\r\nHost: {parts.netloc}\r\n{headers}".encode()


@cache
def trust() -> ssl.SSLContext:
    """Return the TLS settings. The first call reads the system's certificates, some 30 ms: make it early."""
    return ssl.create_default_context()
