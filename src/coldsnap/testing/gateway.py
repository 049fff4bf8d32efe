"""The platform's OpenAI proxy before a `ControlPlane`, on a port of its own. Any bearer key is accepted."""

from __future__ import annotations

import contextlib
import socket
from types import TracebackType
from typing import Self

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coldsnap.desk.serve import gateway
from coldsnap.desk.serve.control_plane import ControlPlane
from coldsnap.desk.serve.server import served
from coldsnap.desk.serve.submission import parse
from coldsnap.errors import Refused


class Gateway:
    """Serves the OpenAI API on a free port of 127.0.0.1 while the context is open; see `platform.gateway`."""

    def __init__(self, plane: ControlPlane, *, timeout: float = 120.0) -> None:
        self.base_url = ""
        self._plane = plane
        self._gateway = gateway.Gateway(lambda given: plane.submit(given, sync=True), plane.cancel, timeout)
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        listener = socket.create_server(("127.0.0.1", 0))
        self.base_url = f"http://127.0.0.1:{listener.getsockname()[1]}/v2/{self._plane.endpoint_id}/openai/v1"
        route = Route("/v2/{endpoint}/openai/v1/{route:path}", self._answer, methods=["GET", "POST"])
        await self._stack.enter_async_context(served(Starlette(routes=[route]), listener))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _answer(self, request: Request) -> Response:
        try:
            body = parse(await request.body()) if request.method == "POST" else {}
        except Refused as refused:
            return gateway.error(refused.status, refused.message, refused.type)
        return await self._gateway.answer(request, body)
