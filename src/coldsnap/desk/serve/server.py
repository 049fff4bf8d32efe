"""An ASGI application on a socket, in this process's loop, for as long as a context is open.

uvicorn waits without end for a client's first byte, its headers and its body: here it has a time for each.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Generator

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_LAST_ANSWERS_SECONDS = 2
"""For open requests when the context ends. The longest is a /stream that is held for a second."""


_HEADER_SECONDS = 30.0
"""From the connection, or a request's first byte, to the end of its headers. uvicorn's own 5 s are between requests."""
_BODY_SECONDS = 120.0
"""From there to the end of the body: 20 MB over 1.4 Mbit/s."""


class _Protocol(HttpToolsProtocol):
    """Cuts off a client that sends half a request, or nothing."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # uvicorn's own
        super().connection_made(transport)
        self._allow(_HEADER_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._allow(None)
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._allow(_HEADER_SECONDS)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._allow(_BODY_SECONDS)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._allow(None)
        super().on_message_complete()

    def _allow(self, seconds: float | None) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield  # signals are the process's, which has workers to stop first


@contextlib.asynccontextmanager
async def served(app: ASGIApp, listener: socket.socket) -> AsyncIterator[None]:
    """Serve `app` on a bound socket, which is closed in the end."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=_LAST_ANSWERS_SECONDS,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started and not serving.done():  # noqa: ASYNC110 -- uvicorn has no event for it
            await asyncio.sleep(0.01)
        yield
    finally:
        # What is cut off after that would be logged as a failure of the application, traceback and all.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        server.should_exit = True
        await serving
