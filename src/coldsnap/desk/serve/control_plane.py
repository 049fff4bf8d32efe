"""A local control plane: the platform's half of the HTTP protocol that the Runpod SDK's worker loop speaks.

`coldsnap serve`, tests and benchmarks submit jobs here and read their streams; a worker is a process that runs
the unmodified SDK with `ControlPlane.environment()` in its environment. A submitted job goes at once to the first
worker that asks. Jobs and workers themselves are on its `board`.

A worker has a key of its own. What the plane does not know: who starts workers (`fleet`), when time is up (`endpoint`).
Where the platform's behaviour is not documented it takes the strict side: an oversized chunk is answered with
413 and lost, an oversized result with 413, and 1 MB is 1,000,000 bytes of POST body. What a worker posts
after its job was cancelled or timed out is answered with 200, counted and dropped.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self

import orjson

from coldsnap.desk.serve.board import Board, Journal, Worker
from coldsnap.desk.serve.job import MEGABYTE, Bell, Job, JobState
from coldsnap.desk.serve.worker_http import Request, Response, Server
from coldsnap.errors import EngineDead, EngineStalled

CHUNK_LIMIT: Final = MEGABYTE

_TURNS = 4
"""Turns of the loop in which the end of a connection is seen: after this process stood still, what it reads first are
polls whose workers have long given them up."""
_RETIRED_POLL_SECONDS = 0.5
_GONE: Final = 410
LOST: Final = 504
"""A fault that refuses a POST which has been taken."""

PostKind = Literal["stream", "done"]
ViolationKind = Literal[
    "chunk too large", "result too large", "malformed body", "unknown job", "wrong worker", "after end"
]


class Draws(Protocol):
    """What goes wrong with POSTs, for tests: `coldsnap.testing.Faults`."""

    def draw(self, kind: PostKind, job_number: int, post_number: int, /) -> tuple[float, int | None]:
        """Return the delay of one POST and the status that refuses it, if any."""


class WorkerUnhealthy(Exception):
    """The worker reported a failed fitness check with its last ping; the SDK has ended its process."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that a worker did and the platform would not take."""

    kind: ViolationKind
    job_id: str
    detail: str


class ControlPlane(Board):
    """Serves the worker protocol on a free port of 127.0.0.1 while the context is open.

    `poll_seconds` is how long an idle job-take or job-stop is held. An idle worker ends only that
    long after SIGTERM (see `release_polls`); after a job-stop that ran out the SDK is deaf for 1 s.
    `flashboot` answers an idle job-take with 400 instead of 204.
    """

    def __init__(
        self,
        *,
        faults: Draws | None = None,
        poll_seconds: float = 10.0,
        flashboot: bool = False,
        endpoint_id: str = "local",
        journal: Journal | None = None,
    ) -> None:
        if not 0 < poll_seconds < 90:
            raise ValueError("poll_seconds is above 0 and below 90, where the SDK gives its poll up")
        super().__init__(journal)
        self.violations: list[Violation] = []
        self.endpoint_id = endpoint_id
        self.url = ""
        self.faults = faults
        """May be changed at any time."""
        self.gate: asyncio.Event | None = None
        """What POSTs that come from now on wait for."""
        self._poll_seconds = poll_seconds
        self._idle_status = 400 if flashboot else 204
        self._arrived = Bell()
        self._releases = 0
        self._keys: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        self._server = await Server(self._serve).__aenter__()
        self.url = f"http://127.0.0.1:{self._server.port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release_polls()
        await self._server.__aexit__(kind, error, trace)

    # What a test or a benchmark does.

    def environment(self, worker_id: str = "worker-1") -> dict[str, str]:
        """Return the variables that the platform sets, and three that let a worker run here, offline."""
        base, key = f"{self.url}/v2/{self.endpoint_id}", self.key(worker_id)
        return {
            "RUNPOD_ENDPOINT_ID": self.endpoint_id,
            "RUNPOD_POD_ID": worker_id,
            "RUNPOD_POD_HOSTNAME": f"{worker_id}-host",
            "RUNPOD_AI_API_KEY": "local-key",
            "RUNPOD_PING_INTERVAL": "10000",
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=local&key={key}",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=local&key={key}",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=local&key={key}",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?key={key}",
            # The SDK's own checks end the process without 8.8.8.8:53, 4 GB of memory and 10% of the disk.
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
            "NO_PROXY": "127.0.0.1,localhost",  # the SDK's pings heed a proxy, its other requests do not
        }

    def key(self, worker_id: str) -> str:
        """Return a worker's secret. It is in its URLs, as the platform's: the SDK may send a user's own as a header."""
        return self._keys.setdefault(worker_id, secrets.token_urlsafe(24))

    async def wait_for_worker(self, timeout: float, worker_id: str | None = None) -> Worker:
        """Return the worker (or any) once it has asked for jobs."""
        async with asyncio.timeout(timeout):
            while True:
                for worker in self.workers.values():
                    if worker_id not in (None, worker.id):
                        continue
                    if worker.unhealthy is not None:
                        raise WorkerUnhealthy(f"{worker.id}: {worker.unhealthy}")
                    if worker.first_poll is not None:
                        return worker
                await self._arrived.wait()

    def release_polls(self) -> None:
        """Answer every open poll as idle now: a worker that has had SIGTERM need not wait them out."""
        self._releases += 1
        for bell in (self._queued, *(worker.stopped for worker in self.workers.values())):
            bell.ring()

    # What a worker does.

    def _serve(self, request: Request) -> Response | Coroutine[Any, Any, Response]:
        called = request.path.split("/")[3:]
        key = self._keys.get(called[1]) if called[1:] else None
        if key is None or not hmac.compare_digest(request.query.get("key", "").encode(), key.encode()):
            return Response(status=401)
        if called[1] in self.lost:
            return Response(status=_GONE)
        match request.method, called:
            case "POST", ["job-stream", worker_id, job_id]:
                return self._post(request, "stream", worker_id, job_id)
            case "POST", ["job-done", worker_id, job_id]:
                return self._post(request, "done", worker_id, job_id)
            case "GET", ["job-take", worker_id]:
                return self._take(self.see(worker_id), None)
            case "GET", ["job-take-batch", worker_id]:
                return self._take(self.see(worker_id), int(request.query["batch_size"]))
            case "GET", ["job-stop", worker_id]:
                return self._stop(self.see(worker_id))
            case "GET", ["ping", worker_id]:
                return self._ping(self.see(worker_id), request)
        return Response(status=404)

    async def _take(self, worker: Worker, batch_size: int | None) -> Response:
        if worker.first_poll is None:
            worker.first_poll = worker.idle_since = time.monotonic()
            self._arrived.ring()
        if not await self._held(self._queued, self.queue, worker) or worker.retired:
            return Response(status=self._idle_status)
        jobs = self.take(worker, batch_size or 1)
        body = b",".join(job.payload for job in jobs)
        body = body if batch_size is None else b"[%b]" % body
        return Response(body=body)

    async def _stop(self, worker: Worker) -> Response:
        if not await self._held(worker.stopped, worker.stops, worker):
            return Response(status=204)
        body = orjson.dumps({"jobsToStop": worker.stops})
        worker.stops.clear()
        return Response(body=body)

    async def _held(self, bell: Bell, pending: Collection[object], worker: Worker) -> bool:
        """Hold a poll until something is pending. A worker that goes away cancels this and takes nothing."""
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        if worker.retired:
            await asyncio.sleep(_RETIRED_POLL_SECONDS)
        deadline, releases = time.monotonic() + self._poll_seconds, self._releases
        while (
            not pending
            and self._releases == releases
            and not worker.retired
            and (left := deadline - time.monotonic()) > 0
        ):
            await bell.wait(left)
        return bool(pending)

    def _ping(self, worker: Worker, request: Request) -> Response:
        worker.pings += 1
        if request.query.get("status") == "unhealthy":
            worker.unhealthy = f"{request.query.get('check')}: {request.query.get('reason')}"
            self._arrived.ring()
        return Response()

    def _post(
        self, request: Request, kind: PostKind, worker_id: str, job_id: str
    ) -> Response | Coroutine[Any, Any, Response]:
        job = self.jobs.get(job_id)
        if job is None:
            return Response(self._violated(404, "unknown job", job_id, f"{kind} from {worker_id}"))
        job.posts += 1
        delay, status = self.faults.draw(kind, job.number, job.posts) if self.faults else (0.0, None)

        def taken() -> int:
            if status is not None and status != LOST:
                return status
            done = self._record(kind, worker_id, job, request)
            return status or done

        return self._delayed(delay, taken) if delay or self.gate else Response(taken())

    async def _delayed(self, delay: float, taken: Callable[[], int]) -> Response:
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(delay / 2)
        status = taken()
        await asyncio.sleep(delay / 2)
        return Response(status)

    def _record(self, kind: PostKind, worker_id: str, job: Job, request: Request) -> int:
        """Apply one POST to its job and return the answer's status."""
        body = request.body
        if worker_id != job.worker_id:
            return self._violated(400, "wrong worker", job.id, f"{worker_id}, taken by {job.worker_id}")
        if job.state in {JobState.CANCELLED, JobState.TIMED_OUT}:
            job.late_posts += 1
            return 200
        if job.done and kind == "done" and body == job.posted:
            return 200  # the answer to the first one was lost
        if job.done:
            return self._violated(400, "after end", job.id, f"{kind} after the job was {job.state}")
        try:
            post = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            return self._violated(400, "malformed body", job.id, f"{kind}: {error}")
        if not isinstance(post, dict) or (kind == "stream" and "output" not in post):
            return self._violated(400, "malformed body", job.id, f"{kind}: no object with an output")
        return (self._record_chunk if kind == "stream" else self._record_result)(worker_id, job, request, post)

    def _record_chunk(self, _worker_id: str, job: Job, request: Request, post: dict[str, Any]) -> int:
        if len(request.body) > CHUNK_LIMIT:
            detail = f"{len(request.body)} bytes, {CHUNK_LIMIT} allowed"
            return self._violated(413, "chunk too large", job.id, detail)
        # A repeat, whose answer was lost, is told by its number.
        if int(request.headers.get("x-chunk-number", len(job.chunks))) == len(job.chunks):
            job.add_chunk(post["output"])
        return 200

    def _record_result(self, worker_id: str, job: Job, request: Request, post: dict[str, Any]) -> int:
        size, limit = len(request.body), job.terms.limit
        if post.get("status") == "IN_PROGRESS":
            job.progress.append(post.get("output"))
            return 200
        if size > limit:
            return self._violated(413, "result too large", job.id, f"{size} bytes, {limit} allowed")
        reported = post.get("error")
        text = reported if isinstance(reported, str | None) else orjson.dumps(reported).decode()
        if text and _ends_its_worker(text) and not job.read:
            self.retire(worker_id)
            self.again(job, f"the engine of {worker_id} died")
            return 200
        job.posted = request.body
        state = JobState.COMPLETED if text is None else JobState.FAILED
        self.end(job, state, output=post.get("output"), error=text)
        return 200

    def _violated(self, status: int, kind: ViolationKind, job_id: str, detail: str) -> int:
        self.violations.append(Violation(kind, job_id, detail))
        return status


def _ends_its_worker(error: str) -> bool:
    """Return whether a worker says with a job's error that it ends itself: its other jobs are tried again too."""
    try:
        body = orjson.loads(error)
        return body["error"]["type"] in {EngineDead.type, EngineStalled.type}
    except (orjson.JSONDecodeError, KeyError, TypeError):  # another handler's words
        return False
