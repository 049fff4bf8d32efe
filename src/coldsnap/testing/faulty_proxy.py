"""A line to an HTTP server that fails as it is told to: errors, answers cut off, answers that crawl."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "server", "date"}
_PIECE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Fault:
    """What becomes of one answer: `status` 0 lets the server answer.

    `cut_after` bytes of the body the connection is closed; `bytes_per_second` is how fast the body comes.
    """

    status: int = 0
    cut_after: int | None = None
    bytes_per_second: float | None = None


@dataclass(slots=True)
class Exchange:
    """A request that came through, in the order of arrival from 1, and the body's bytes that went back."""

    number: int
    method: str
    path: str
    status: int = 0
    sent: int = 0


class FaultyProxy:
    """A context: HTTP/1.1 from `url` to `server`, with what `faults` says about each request; None is no fault."""

    def __init__(self, server: str, faults: Callable[[Exchange], Fault | None]) -> None:
        self.faults = faults
        self.exchanges: list[Exchange] = []
        self._target = urlsplit(server).netloc
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), name="faulty-proxy")
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def fetched(self, part: str = "") -> int:
        """Return the bytes of bodies that answered a GET with `part` in its path."""
        return sum(each.sent for each in self.exchanges if each.method == "GET" and part in each.path)

    def _seen(self, method: str, path: str) -> Exchange:
        with self._lock:
            exchange = Exchange(len(self.exchanges) + 1, method, path)
            self.exchanges.append(exchange)
        return exchange

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 60

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:  # the client is gone
                    self.close_connection = True

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                exchange = proxy._seen(self.command, self.path)
                fault = proxy.faults(exchange) or Fault()
                if fault.status:
                    self._answer(exchange, fault, fault.status, {}, b"<Error><Code>InternalError</Code></Error>")
                    return
                connection = http.client.HTTPConnection(proxy._target, timeout=60)
                try:
                    connection.request(self.command, self.path, body, dict(self.headers))
                    answer = connection.getresponse()
                    self._answer(exchange, fault, answer.status, dict(answer.getheaders()), answer.read())
                finally:
                    connection.close()

            def _answer(
                self, exchange: Exchange, fault: Fault, status: int, headers: dict[str, str], body: bytes
            ) -> None:
                exchange.status = status
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in _HOP:
                        self.send_header(name, value)
                length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command == "HEAD":
                    return
                whole = body if fault.cut_after is None else body[: fault.cut_after]
                rate = fault.bytes_per_second
                size = _PIECE_BYTES if rate is None else max(1, min(_PIECE_BYTES, int(rate / 20)))
                for start in range(0, len(whole), size):
                    piece = whole[start : start + size]
                    self.wfile.write(piece)
                    exchange.sent += len(piece)
                    if rate is not None:
                        time.sleep(len(piece) / rate)
                self.close_connection = self.close_connection or len(whole) < len(body)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Say nothing."""

        return Handler
