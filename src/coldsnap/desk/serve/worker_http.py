"""HTTP/1.1 for the control plane: so little work a request that the plane is not what a benchmark measures.

A request that names another host is refused: a page in a browser whose name leads here must not talk to this port.
A connection that sends nothing, or half a request, is closed. It knows no TLS, no routing and no streaming; a request
is handed over once its whole body is there.
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

    def __init__(self, handler: Handler, idle_seconds: float = 75.0) -> None:
        """`idle_seconds` is how long a client may take for its next request to be there as a whole."""
        self.port = 0
        self._idle_seconds = idle_seconds
        self._handler = handler
        self._open: set[_Connection] = set()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self._answer, self._open, self._idle_seconds), "127.0.0.1", 0, backlog=1024
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        tasks = [connection.close() for connection in tuple(self._open)]
        await asyncio.gather(*filter(None, tasks), return_exceptions=True)

    def _answer(self, request: Request) -> Response | Coroutine[Any, Any, Response]:
        if request.headers.get("host") not in {f"127.0.0.1:{self.port}", f"localhost:{self.port}"}:
            return Response(HTTPStatus.MISDIRECTED_REQUEST)
        return self._handler(request)


class _Connection(asyncio.Protocol):
    """Requests of one client, one after the other."""

    def __init__(self, handler: Handler, among: set[_Connection], idle_seconds: float) -> None:
        self._handler = handler
        self._among = among
        self._idle_seconds = idle_seconds
        self._timer: asyncio.TimerHandle | None = None
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
        self._wait()

    def connection_lost(self, _: Exception | None) -> None:
        self._among.discard(self)
        self._stop_waiting()
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
        self._stop_waiting()
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
        self._wait()
        if not self._parser.should_keep_alive():
            self._transport.close()

    def _wait(self) -> None:
        """Close the connection unless a whole request comes in time."""
        self._stop_waiting()
        self._timer = asyncio.get_running_loop().call_later(self._idle_seconds, self._transport.abort)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
