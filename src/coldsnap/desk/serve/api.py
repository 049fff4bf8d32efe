"""The public API of an endpoint, as its clients know it: jobs under /v2/{endpoint}, OpenAI under /openai/v1.

A refusal is `{"error": "…"}` with its status; before the OpenAI routes it has the shape that OpenAI clients parse.
"""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from coldsnap.desk.serve import gateway
from coldsnap.desk.serve.control_plane import ControlPlane
from coldsnap.desk.serve.endpoint import Endpoint, status
from coldsnap.desk.serve.fleet import Fleet
from coldsnap.desk.serve.job import RUN, RUNSYNC, Job, JobState, Terms
from coldsnap.desk.serve.submission import Submission, milliseconds, parse, too_large
from coldsnap.desk.serve.throttle import Throttle
from coldsnap.errors import Refused

_WAIT_SECONDS = 90.0
_WAIT = (1_000, 300_000)
_STREAM_SECONDS = 1.0
"""How long /stream is held while nothing has come, for clients that ask again without a pause."""
_OPENAI_SECONDS = 300.0
_READ_AT_MOST = 100_000_000
"""Bytes of a body that is refused: above this its connection breaks."""

Operation = Callable[[Request], Awaitable[Response]]


class _Counted:
    """A route whose request counts, as the platform's limits do, until the last byte of its answer: streams too."""

    def __init__(self, answer: Callable[[Request, contextlib.ExitStack], Awaitable[Response]]) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.ExitStack() as counted:
            response = await self._answer(Request(scope, receive, send), counted)
            await response(scope, receive, send)


class Api:
    """The routes of one endpoint."""

    def __init__(self, endpoint: Endpoint, fleet: Fleet, key: str, throttle: Throttle) -> None:
        self._endpoint = endpoint
        self._plane: ControlPlane = endpoint.plane
        self._fleet = fleet
        self._key = key.encode()
        self._throttle = throttle
        self._gateway = gateway.Gateway(self._submit_openai, self._plane.cancel, _OPENAI_SECONDS)

    def application(self, *more: Route) -> Starlette:
        """Return the ASGI application, with `more` routes beside the endpoint's."""
        routes = [
            self._route("run", self._run, "POST"),
            self._route("runsync", self._runsync, "POST"),
            self._route("status", self._status, "GET", "POST", path="/{job}"),
            self._route("stream", self._stream, "GET", "POST", path="/{job}"),
            self._route("cancel", self._cancel, "POST", path="/{job}"),
            self._route("retry", self._retry, "POST", path="/{job}"),
            self._route("purge-queue", self._purge, "POST"),
            self._route("requests", self._requests, "GET"),
            self._route("health", self._health, "GET"),
            self._route("openai", self._openai, "GET", "POST", path="/v1/{route:path}"),
        ]
        return Starlette(routes=[*routes, *more], exception_handlers={HTTPException: _no_route})

    def _route(self, name: str, operation: Operation, *methods: str, path: str = "") -> Route:
        async def answer(request: Request, counted: contextlib.ExitStack) -> Response:
            try:
                self._admit(request)
                counted.enter_context(self._throttle.admitted(name))
                return await operation(request)
            except Refused as refused:
                return _refusal(refused, openai=name == "openai")
            except ClientDisconnect:
                return Response(status_code=499)  # nobody reads it

        return Route(f"/v2/{{endpoint}}/{name}{path}", _Counted(answer), methods=list(methods))

    def authorize(self, request: Request) -> None:
        """Refuse a request without the key, which Anthropic's clients send as `x-api-key`."""
        header = request.headers.get("Authorization", "") or request.headers.get("x-api-key", "")
        scheme, _, token = header.partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else header  # the platform takes a bare key too
        if not hmac.compare_digest(key.encode(), self._key):
            problem = "is not the key of this endpoint" if header else "is missing"
            raise Refused(401, f"the Authorization header {problem}; send `Authorization: Bearer <key>`")

    def _admit(self, request: Request) -> None:
        self.authorize(request)
        if (name := request.path_params["endpoint"]) != self._plane.endpoint_id:
            raise Refused(404, f"there is no endpoint {name!r:.100} here, only {self._plane.endpoint_id!r}")

    # Jobs.

    async def _run(self, request: Request) -> Response:
        job = await self._submit(request, RUN, sync=False)
        return _json({"id": job.id, "status": job.state})

    async def _runsync(self, request: Request) -> Response:
        parameter = request.query_params.get("wait")
        wait = _WAIT_SECONDS if parameter is None else milliseconds(parameter, "wait", *_WAIT)
        retention = max(RUNSYNC.retention, 0.0 if parameter is None else wait)
        job = await self._submit(request, RUNSYNC, sync=True, retention=retention)
        try:
            await job.ended(wait)
        finally:
            job.held = False
        if job.deferred:
            raise Refused(503, f"this endpoint is about to stop; job {job.id} is run after its next start")
        return _json(status(job))

    async def _submit(self, request: Request, terms: Terms, *, sync: bool, retention: float | None = None) -> Job:
        submission = Submission.read(await _body(request, terms.limit), terms)
        return self._endpoint.submit(submission.durable(retention or terms.retention), sync=sync)

    async def _status(self, request: Request) -> Response:
        job = self._job(request)
        if (ttl := request.query_params.get("ttl")) is not None:
            self._endpoint.expire(job, milliseconds(ttl, "ttl", 0, 7 * 86_400_000))
        return _json(status(job))

    async def _stream(self, request: Request) -> Response:
        job = self._job(request)
        await job.news(_STREAM_SECONDS)
        chunks = job.unread()
        if chunks:
            self._plane.note(job)
        answer = {"status": job.state, "stream": [{"output": chunk} for chunk in chunks]}
        return _json(answer if job.error is None else {**answer, "error": job.error})

    async def _cancel(self, request: Request) -> Response:
        job = self._job(request)
        self._plane.cancel(job.id)
        return _json({"id": job.id, "status": job.state})

    async def _retry(self, request: Request) -> Response:
        job = self._job(request)
        self._endpoint.retry(job)
        return _json({"id": job.id, "status": job.state})

    async def _purge(self, _: Request) -> Response:
        return _json({"removed": self._plane.purge(), "status": "completed"})

    async def _requests(self, _: Request) -> Response:
        """List what waits and runs, also what its client has left, for `cancel`. The platform shows it on a page."""
        return _json({"requests": [status(job) for job in self._plane.jobs.values() if not job.done]})

    async def _health(self, _: Request) -> Response:
        counts = self._plane.counts
        jobs = {
            "completed": counts[JobState.COMPLETED],
            "failed": counts[JobState.FAILED] + counts[JobState.TIMED_OUT],
            "inProgress": sum(len(worker.running) for worker in self._plane.workers.values()),
            "inQueue": len(self._plane.queue),
            "retried": counts["retried"],
        }
        trouble = self._endpoint.boots.trouble
        answer = {"jobs": jobs, "workers": self._fleet.count()}
        return _json(answer if trouble is None else {**answer, "error": trouble})

    async def _openai(self, request: Request) -> Response:
        content = await _body(request, RUNSYNC.limit) if request.method == "POST" else b""
        body = parse(content) if content else {}  # an operation such as `cancel` needs none
        return await self._gateway.answer(request, body)

    def _submit_openai(self, job_input: Any) -> Job:
        return self._endpoint.submit(Submission(job_input, {}, RUNSYNC), sync=True)

    def _job(self, request: Request) -> Job:
        return self._endpoint.find(request.path_params["job"])


async def _body(request: Request, limit: int) -> bytes:
    """Read the body, as far as it may be long. The rest is read and dropped: its sender reads no answer before."""
    body, size = bytearray(), 0
    async for piece in request.stream():
        size += len(piece)
        if size <= limit:
            body += piece
        elif size > _READ_AT_MOST:
            raise too_large(None, limit)
    if size > limit:
        raise too_large(size, limit)
    return bytes(body)


def _json(content: dict[str, Any], code: int = 200) -> Response:
    return Response(orjson.dumps(content), code, media_type="application/json")


def _refusal(refused: Refused, *, openai: bool) -> Response:
    if openai:
        response = gateway.error(refused.status, refused.message, refused.type)
    else:
        response = _json({"error": refused.message}, refused.status)
    if refused.retry_after is not None:
        response.headers["Retry-After"] = str(refused.retry_after)
    return response


async def _no_route(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    path = request.url.path
    if problem.status_code == 405:
        message = f"{path} does not take {request.method}"
    else:
        message = f"there is no route {path!r:.200}"
    response = _json({"error": message}, problem.status_code)
    response.headers.update(problem.headers or {})
    return response
