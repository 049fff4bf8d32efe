"""The platform's OpenAI proxy: a request becomes a job, and the job's output the answer.

A GET becomes a job with an empty `openai_input`; its query string is dropped. The proxy does not know which
routes a worker has, nor reads more of a request than `stream`. A client that goes away cancels its job.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from coldsnap.desk.serve.job import Job, JobFailed

_Result = TypeVar("_Result")


class Gateway:
    """Answers OpenAI requests with jobs.

    An answer, or a stream's first chunk, that takes longer than `seconds` becomes a 504 and its job is cancelled.
    """

    def __init__(self, submit: Callable[[Any], Job], cancel: Callable[[str], object], seconds: float) -> None:
        self._submit = submit
        self._cancel = cancel
        self._seconds = seconds

    async def answer(self, request: Request, body: Any) -> Response:
        """Run a request for the route in its path as a job; `body` is its JSON."""
        job = self._submit({"openai_route": f"/v1/{request.path_params['route']}", "openai_input": body})
        streaming = isinstance(body, dict) and body.get("stream") is True
        response: Response | None = None
        try:
            if streaming:
                await _unless_gone(request, job.started(self._seconds))
                if job.chunks and isinstance(job.chunks[0], str):
                    response = _Events(job, self._cancel)
                    return response
            return _single(await _unless_gone(request, job.result(self._seconds)))
        except TimeoutError:
            return error(504, f"no answer within {self._seconds:g} s", "timeout_error")
        except JobFailed as failure:
            status, text = _error_body(failure.error)
            return Response(text, status, media_type="application/json")
        except _Gone:
            return Response(status_code=499)  # nobody reads it
        finally:
            if response is None and not job.done:
                self._cancel(job.id)


class _Gone(Exception):
    """The client has closed its connection."""


class _Events(StreamingResponse):
    """SSE text passed on as it comes. It ends with its job, or its job with it."""

    def __init__(self, job: Job, cancel: Callable[[str], object]) -> None:
        job.read = 1  # from here on it cannot start again unnoticed
        self._job = job
        self._cancel = cancel
        super().__init__(_events(job), media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self._job.done:  # its client may have read so slowly that it is not even known any more
                self._cancel(self._job.id)


async def _events(job: Job) -> AsyncIterator[bytes]:
    whole = False
    try:
        async for chunk in job.stream():
            if not isinstance(chunk, str):
                raise JobFailed(f"the worker yielded a {type(chunk).__name__} amid SSE text")  # noqa: TRY301
            yield chunk.encode()
            whole = chunk.endswith("data: [DONE]\n\n")
    except JobFailed as failure:
        if not whole:  # its worker may end between its last chunk and its result
            yield b"data: %b\n\n" % _error_body(failure.error)[1]


def error(status: int, message: str, kind: str) -> Response:
    """Return an error as OpenAI clients parse it."""
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return Response(orjson.dumps(body), status, media_type="application/json")


def _single(result: Any) -> Response:
    if isinstance(result, list):  # of chunks: what a generator's plain answer comes as
        if len(result) != 1:
            return error(500, f"the worker yielded {len(result)} outputs instead of 1", "worker_error")
        result = result[0]
    body = result.encode() if isinstance(result, str) else orjson.dumps(result)
    return Response(body, media_type="application/json")


async def _unless_gone(request: Request, work: Awaitable[_Result]) -> _Result:
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _Gone
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error_body(text: str) -> tuple[int, bytes]:
    """Return the status and body of the OpenAI error that a worker reported, or wrap what is none."""
    try:
        code = json.loads(text)["error"].get("code")
    except (ValueError, TypeError, KeyError, AttributeError):
        body = {"error": {"message": text, "type": "worker_error", "param": None, "code": 500}}
        return 500, orjson.dumps(body)
    return code if type(code) is int and 400 <= code <= 599 else 500, text.encode()
