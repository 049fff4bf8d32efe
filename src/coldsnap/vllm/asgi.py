"""Call an ASGI application in-process, streaming: no socket, no second copy of the body.

The HTTP libraries' ASGI transports collect the whole response before they return it; this one hands each
body message on as it comes, and holds the application back when nobody reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from coldsnap.engine import HttpRequest, HttpResponse
from coldsnap.errors import JobError

_Message = dict[str, Any]
_App = Callable[..., Awaitable[None]]

_READ_AHEAD = 32
"""Body messages kept before the application's `send` waits."""
_CLOSE_SECONDS = 5.0
"""How long the application may take to notice that its client is gone."""


@asynccontextmanager
async def request(app: _App, call: HttpRequest) -> AsyncIterator[HttpResponse]:
    """Send `call` to `app` and yield its response as soon as the headers are there.

    Leaving the context before the body has ended is a client's disconnect: the application receives
    `http.disconnect`, and is cancelled if it has not stopped five seconds later. An exception that the
    application raises is raised here, or from `chunks` if the response had begun.
    """
    client = _Client(call.body)
    task = asyncio.create_task(client.run(app, _scope(call)))
    try:
        start = await client.next()
        headers = dict(start.get("headers", ()))
        content_type = headers.get(b"content-type", b"").decode("latin-1")
        yield HttpResponse(start["status"], content_type, client.chunks())
    finally:
        client.disconnect()
        done, _ = await asyncio.wait([task], timeout=_CLOSE_SECONDS)
        if not done:
            task.cancel()


class _Client:
    """The client's end of a call: what the application receives, and what it has sent and nobody has read yet."""

    def __init__(self, body: bytes) -> None:
        self._request: _Message | None = {"type": "http.request", "body": body, "more_body": False}
        self._messages: asyncio.Queue[_Message | Exception] = asyncio.Queue(_READ_AHEAD)
        self._gone = asyncio.Event()

    async def run(self, app: _App, scope: _Message) -> None:
        end: Exception = JobError("the application ended before its response did")
        try:
            await app(scope, self._receive, self._send)
        except Exception as error:  # noqa: BLE001 -- raised by whoever reads the response
            end = error
        except asyncio.CancelledError:
            if self._gone.is_set():
                raise
        await self._messages.put(end)  # also if it was cancelled from within: nobody must wait for ever

    async def next(self) -> _Message:
        message = await self._messages.get()
        if isinstance(message, Exception):
            raise message
        return message

    async def chunks(self) -> AsyncIterator[bytes]:
        while True:
            message = await self.next()
            if body := message.get("body"):
                yield body
            if message["type"] == "http.response.body" and not message.get("more_body"):
                return

    def disconnect(self) -> None:
        self._gone.set()
        while not self._messages.empty():
            self._messages.get_nowait()

    async def _receive(self) -> _Message:
        if (message := self._request) is not None:
            self._request = None
            return message
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: _Message) -> None:
        if self._gone.is_set():
            raise OSError("client disconnected")
        await self._messages.put(message)


def _scope(call: HttpRequest) -> _Message:
    return {
        "type": "http",
        # From 2.4 on Starlette notices a disconnect only when it next sends.
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "root_path": "",
        "query_string": call.query.encode(),
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "server": ("localhost", 80),
        "client": ("localhost", 0),
    }
