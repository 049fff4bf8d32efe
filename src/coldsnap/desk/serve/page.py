"""The endpoint's live page: `/`, which anybody may load, and `/live`, its data, which need the key.

The page is one file and holds nothing of the endpoint. It gets the key behind the `#` of its address, which browsers
send to nobody, and passes it on as an API key. What it may load, run or speak to is what its policy names: itself.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator, Callable
from importlib import resources
from urllib.parse import quote

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from coldsnap.desk.serve.view import View
from coldsnap.errors import Refused

_LOOK_SECONDS = 0.25
_LOOKS = 4
"""After so many without news the page is told that there are none."""


def link(host: str, port: int, key: str) -> str:
    """Return the page's address, with the key where no request carries it."""
    return f"http://{host}:{port}/#key={quote(key, safe='')}"


class Page:
    """Its two routes. While nobody has the page open, nothing runs."""

    def __init__(self, view: View, authorize: Callable[[Request], None]) -> None:
        self._view = view
        self._authorize = authorize
        self._closed = False
        text = resources.files(__package__).joinpath("page.html").read_text("utf-8")
        self._page = Response(text, media_type="text/html", headers=_headers(text))

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [Route("/", self._show), Route("/live", self._live)]

    def close(self) -> None:
        """End the streams: the process is about to."""
        self._closed = True

    async def _show(self, _: Request) -> Response:
        return self._page

    async def _live(self, request: Request) -> Response:
        try:
            self._authorize(request)
        except Refused as refused:
            body = orjson.dumps({"error": refused.message})
            return Response(body, refused.status, media_type="application/json")
        headers = {"Cache-Control": "no-store"}
        return StreamingResponse(self._events(), media_type="text/event-stream", headers=headers)

    async def _events(self) -> AsyncIterator[bytes]:
        last_stir: object = None
        quiet = _LOOKS
        while not self._closed:
            stir = self._view.stir()
            quiet = 0 if stir != last_stir else quiet + 1
            if quiet in {0, _LOOKS}:
                last_stir, quiet = stir, 0
                yield b"data: %b\n\n" % self._view.answer()
            await asyncio.sleep(_LOOK_SECONDS)


def _headers(text: str) -> dict[str, str]:
    """Return what the browser is to hold the page to; its one script and one style sheet are named by their hashes."""

    def source(element: str) -> str:
        (content,) = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {source('script')}; style-src {source('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
