"""HTTP/1.1 for the control plane: so little work a request that the plane is not what a benchmark measures.

It knows no TLS, no routing and no streaming; a request is handed over once its whole body is there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Protocol, Self, cast
from urllib.parse import parse_qsl

import httptools


@dataclass(slots=True)
class Request:
    """What came. Names of headers are in lower case."""

    method: str = ""
    path: str = ""
    query: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Response:
    """What goes back."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"

    def encode(self) -> bytes:
        phrase = HTTPStatus(self.status).phrase
        if self.status == HTTPStatus.NO_CONTENT:
            return f"HTTP/1.1 {self.status} {phrase}\r\n\r\n".encode()
        head = f"HTTP/1.1 {self.status} {phrase}\r\nContent-Type: {self.content_type}\r\n"
        return f"{head}Content-Length: {len(self.body)}\r\n\r\n".encode() + self.body


class Handler(Protocol):
    """Answers a request: at once, or in a task that is cancelled when the client hangs up."""

    def __call__(self, request: Request) -> Response | Coroutine[Any, Any, Response]: ...


class Server:
    """Serves `handler` on a free port of 127.0.0.1 while the context is open."""

    def __init__(self, handler: Handler) -> None:
        self.port = 0
        self._handler = handler
        self._open: set[_Connection] = set()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self._handler, self._open), "127.0.0.1", 0, backlog=1024
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        tasks = [connection.close() for connection in tuple(self._open)]
        await asyncio.gather(*filter(None, tasks), return_exceptions=True)


class _Connection(asyncio.Protocol):
    """Requests of one client, one after the other."""

    def __init__(self, handler: Handler, among: set[_Connection]) -> None:
        self._handler = handler
        self._among = among
        self._parser = httptools.HttpRequestParser(self)
        self._request = Request()
        self._body: list[bytes] = []
        self._task: asyncio.Task[Response] | None = None
        self._transport: asyncio.Transport

    def close(self) -> asyncio.Task[Response] | None:
        self._transport.close()
        if self._task is not None:
            self._task.cancel()
        return self._task

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not derive from it
        self._among.add(self)

    def connection_lost(self, _: Exception | None) -> None:
        self._among.discard(self)
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.write(Response(400).encode())
            self._transport.close()

    # What the parser calls.

    def on_message_begin(self) -> None:
        self._request, self._body = Request(), []

    def on_url(self, url: bytes) -> None:
        parts = httptools.parse_url(url)
        self._request.path = parts.path.decode()
        self._request.query = dict(parse_qsl((parts.query or b"").decode()))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._request.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        self._request.method = self._parser.get_method().decode()
        self._request.body = b"".join(self._body)
        answer = self._handler(self._request)
        if isinstance(answer, Response):
            self._answer(answer)
        else:
            self._task = asyncio.get_running_loop().create_task(answer)
            self._task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Response]) -> None:
        self._task = None
        if not task.cancelled():
            self._answer(task.result())

    def _answer(self, response: Response) -> None:
        self._transport.write(response.encode())
        if not self._parser.should_keep_alive():
            self._transport.close()
