"""A thin OpenAI gateway before a `ControlPlane`: `/v2/{endpoint}/openai/v1/*` becomes a job and its answer.

It stands in for the platform's proxy, so that the official `openai` client drives a worker through the
unmodified SDK. Any bearer key is accepted, none is checked. A GET becomes a job with an empty `openai_input`;
its query string is dropped. It does not know which routes a worker has, nor reads more of a request than
`stream`.
"""

from __future__ import annotations

import contextlib
import json
from types import TracebackType
from typing import Any, Self

import orjson
from aiohttp import web

from coldsnap.testing.control_plane import ControlPlane
from coldsnap.testing.job import Job, JobFailed


class Gateway:
    """Serves the OpenAI API on a free port of 127.0.0.1 while the context is open.

    A plain answer, or a stream's first chunk, that takes longer than `timeout` seconds becomes a 504 and its
    job is cancelled. A client that goes away cancels its job.
    """

    def __init__(self, plane: ControlPlane, *, timeout: float = 120.0) -> None:
        self.base_url = ""
        self._plane = plane
        self._timeout = timeout

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=32_000_000)
        for method in ("GET", "POST"):
            app.router.add_route(method, "/v2/{endpoint}/openai/v1/{route:.+}", self._answer)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, backlog=1024).start()
        port = self._runner.addresses[0][1]
        self.base_url = f"http://127.0.0.1:{port}/v2/{self._plane.endpoint_id}/openai/v1"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body: Any = {}
        if request.method == "POST":
            try:  # not orjson: it refuses lone surrogates, and a worker must meet them
                body = json.loads(await request.read())
            except ValueError as error:
                return _error(400, f"the body is not JSON: {error}", "invalid_request_error")
        route = f"/v1/{request.match_info['route']}"
        job = self._plane.submit({"openai_route": route, "openai_input": body}, sync=True)
        streaming = isinstance(body, dict) and body.get("stream") is True
        try:
            return await (self._stream(request, job) if streaming else self._single(job))
        except TimeoutError:
            return _error(504, f"no answer within {self._timeout:g} s", "timeout_error")
        except JobFailed as failure:
            status, error_body = _error_body(failure.error)
            return web.Response(status=status, body=error_body, content_type="application/json")
        finally:
            self._plane.cancel(job.id)  # nothing, once it has ended

    async def _single(self, job: Job) -> web.Response:
        result = await job.result(self._timeout)
        if isinstance(result, list):  # of chunks: what a generator's plain answer comes as
            if len(result) != 1:
                return _error(500, f"the worker yielded {len(result)} outputs instead of 1", "worker_error")
            result = result[0]
        body = result.encode() if isinstance(result, str) else orjson.dumps(result)
        return web.Response(body=body, content_type="application/json")

    async def _stream(self, request: web.Request, job: Job) -> web.StreamResponse:
        """Pass SSE text on as it comes; an error before the first chunk still has a status of its own."""
        await job.started(self._timeout)
        if not job.chunks or not isinstance(job.chunks[0], str):
            return await self._single(job)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionResetError):  # the client left: _answer cancels the job
            try:
                async for chunk in job.stream():
                    if not isinstance(chunk, str):
                        raise JobFailed(f"the worker yielded a {type(chunk).__name__} amid SSE text")
                    await response.write(chunk.encode())
            except JobFailed as failure:
                await response.write(b"data: %b\n\n" % _error_body(failure.error)[1])
            await response.write_eof()
        return response


def _error_body(error: str) -> tuple[int, bytes]:
    """Return the status and body of the OpenAI error that a worker reported, or wrap what is none."""
    try:
        code = orjson.loads(error)["error"].get("code")
    except (ValueError, TypeError, KeyError, AttributeError):
        body = {"error": {"message": error, "type": "worker_error", "param": None, "code": 500}}
        return 500, orjson.dumps(body)
    return code if type(code) is int and 400 <= code <= 599 else 500, error.encode()


def _error(status: int, message: str, kind: str) -> web.Response:
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return web.Response(status=status, body=orjson.dumps(body), content_type="application/json")
