"""The endpoint: a control plane with the platform's clock. Jobs time out, results expire, webhooks are called.

It does not know HTTP, and not who starts workers: `fleet` tells it how many there may be.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import aiohttp
import orjson

from coldsnap.desk.serve.boots import Boots
from coldsnap.desk.serve.control_plane import ControlPlane
from coldsnap.desk.serve.job import Job, JobState
from coldsnap.desk.serve.scaler import Load, Scaling
from coldsnap.desk.serve.store import Store
from coldsnap.desk.serve.submission import Submission
from coldsnap.desk.serve.webhook import PublicOnly, refuse_private
from coldsnap.errors import Overloaded, Refused

_SWEEP_SECONDS = 0.25
_QUEUE_ALWAYS = 50
_QUEUE_PER_WORKER = 500
"""Jobs in the queue, for each worker that there may be, above which no more are taken."""
_WEBHOOK_TRIES = 3
_WEBHOOK_SECONDS = 10.0
_VIOLATIONS_KEPT = 1000
_STOPS = "this endpoint is about to stop"


class Endpoint:
    """Takes submissions, and keeps the time of every job while the context is open."""

    def __init__(
        self,
        plane: ControlPlane,
        store: Store,
        scaling: Scaling,
        say: Callable[[str], None],
        *,
        private_webhooks: bool = False,
        max_queue: int | None = None,
        max_queue_seconds: float | None = None,
    ) -> None:
        self.plane = plane
        self.scaling = scaling
        self.stopping = False
        """New jobs are refused: the process is about to end."""
        self.boots = Boots()
        self._store = store
        self._say = say
        self._private_webhooks = private_webhooks
        self._max_queue = max_queue
        self._max_queue_seconds = max_queue_seconds or math.inf
        self._called: set[str] = set()
        self._calls: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self.plane.adopt(self._store.jobs(), self._store.counts())
        self._called = {job.id for job in self.plane.jobs.values() if job.done}
        resolver = None if self._private_webhooks else PublicOnly()
        connector = aiohttp.TCPConnector(resolver=resolver)
        self._http = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=30))
        self._keeper = asyncio.create_task(self._keep())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [self._keeper, *self._calls]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.close()

    def stop(self) -> None:
        """Take no more jobs, and answer who waits for one that waits itself. To be called again without workers."""
        self.stopping = True
        for job in list(self.plane.queue):
            if job.terms.durable:
                job.defer()
            else:
                self._turn_away(job, _STOPS)

    def submit(self, submission: Submission, *, sync: bool) -> Job:
        """Queue a job, or refuse it. With `sync` a client waits for it, as long as it is `held`."""
        if self.stopping:
            raise Refused(503, _STOPS, retry_after=10)
        if sync and self.boots.trouble and self.boots.pause and not self._served:
            raise Refused(503, self.boots.trouble, retry_after=math.ceil(self.boots.pause))
        self._refuse_one_too_many()
        job = self.plane.submit(submission.input, sync=sync, terms=submission.terms, **submission.more)
        job.held = sync
        return job

    def _refuse_one_too_many(self) -> None:
        waiting = len(self.plane.queue)
        if self._max_queue is not None:
            if waiting >= self._max_queue:
                raise Refused(
                    429, f"{waiting} jobs wait, MAX_QUEUE={self._max_queue}; send it again later", retry_after=1
                )
            return
        most = max(_QUEUE_ALWAYS, _QUEUE_PER_WORKER * self.scaling.most)
        if waiting > most:
            message = f"{waiting} jobs wait; with {self.scaling.most} workers at most no more than {most} may"
            raise Refused(429, message, retry_after=10)

    def boot_failed(self, why: str) -> None:
        """Learn that a worker ended before it took jobs. Once that is no chance, nobody is left waiting for the first.

        Jobs that no connection waits for stay in the queue as long as they live: a boot may succeed before.
        """
        self.boots.fail(why)
        if self.boots.trouble is not None and not self._served:
            for job in [job for job in self.plane.queue if job.held]:
                self._turn_away(job, self.boots.trouble)

    @property
    def _served(self) -> bool:
        """Whether a worker takes jobs, however the boots of others end."""
        return any(each.first_poll is not None and not each.retired for each in self.plane.workers.values())

    def _turn_away(self, job: Job, why: str) -> None:
        # An OpenAI client gets the status that such an error has.
        error = why if job.terms.durable else orjson.dumps(Refused(503, why).body()).decode()
        self.plane.stop(job, JobState.FAILED, error)

    def find(self, job_id: str) -> Job:
        """Return a job whose result is still kept."""
        if (job := self.plane.jobs.get(job_id)) is None:
            raise Refused(404, f"there is no job {job_id!r:.100}: it never was, or its result is no longer kept")
        return job

    def retry(self, job: Job) -> None:
        """Queue a job again that failed or timed out."""
        if job.state not in {JobState.FAILED, JobState.TIMED_OUT}:
            raise Refused(400, f"job {job.id} is {job.state}; only a FAILED or TIMED_OUT one can be retried")
        self._called.discard(job.id)
        self.plane.retry(job)

    def expire(self, job: Job, seconds: float) -> None:
        """Keep the job's result no longer than this from now, or from its end."""
        since = 0.0 if job.timestamps.done is None else time.monotonic() - job.timestamps.done
        job.terms = replace(job.terms, retention=min(job.terms.retention, since + seconds))

    def load(self, workers: int, starting: int) -> Load:
        """Return what the scaler looks at."""
        waiting = [job for job in self.plane.queue if not job.terms.low_priority]
        now = time.monotonic()
        return Load(
            queued=len(waiting),
            oldest=max((now - job.timestamps.submitted for job in waiting), default=0.0),
            running=sum(len(worker.running) for worker in self.plane.workers.values()),
            workers=workers,
            starting=starting,
        )

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            now = time.monotonic()
            for job in list(self.plane.jobs.values()):
                self._look_at(job, now)
            del self.plane.violations[:-_VIOLATIONS_KEPT]

    def _look_at(self, job: Job, now: float) -> None:
        times, terms = job.timestamps, job.terms
        if times.done is not None:
            if terms.webhook and job.id not in self._called:
                self._called.add(job.id)
                call = asyncio.create_task(self._call(terms.webhook, orjson.dumps(status(job)), job.id))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)
            if now - times.done > terms.retention:
                self._called.discard(job.id)
                self.plane.forget(job)
                if terms.durable:
                    self._store.forget(job)
        elif times.taken is not None and now - times.taken > terms.execution_timeout:
            why = f"the job ran longer than its execution timeout of {terms.execution_timeout:g} s"
            self.plane.stop(job, JobState.TIMED_OUT, why)
        elif not job.attempts and now - times.submitted > self._max_queue_seconds:
            why = f"no worker took the job within MAX_QUEUE_SECONDS={self._max_queue_seconds:g}; send it again later"
            self.plane.stop(job, JobState.FAILED, orjson.dumps(Overloaded(why).body()).decode())
        elif now - times.submitted > terms.ttl:
            self.plane.stop(job, JobState.TIMED_OUT, f"the job did not end within its time to live of {terms.ttl:g} s")

    async def _call(self, address: str, body: bytes, job_id: str) -> None:
        complaint = ""
        for again in range(_WEBHOOK_TRIES):
            await asyncio.sleep(_WEBHOOK_SECONDS if again else 0)
            try:
                if not self._private_webhooks:
                    refuse_private(address)
                async with self._http.post(
                    address, data=body, headers={"Content-Type": "application/json"}, allow_redirects=False
                ) as response:
                    if response.ok and response.status < 300:  # a redirect may lead anywhere
                        return
                    complaint = f"HTTP {response.status}"
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                complaint = f"{type(error).__name__}: {getattr(error, 'os_error', error)}"
        self._say(f"{job_id}: webhook {address} was called {_WEBHOOK_TRIES} times: {complaint}")


def status(job: Job) -> dict[str, Any]:
    """Return what /status says of a job; times are milliseconds."""
    times = job.timestamps
    answer: dict[str, Any] = {"id": job.id, "status": job.state}
    if times.taken is not None:
        answer["delayTime"] = round(1000 * (times.taken - times.submitted))
        answer["workerId"] = job.worker_id
        if times.done is not None:
            answer["executionTime"] = round(1000 * (times.done - times.taken))
    if job.output is not None:
        answer["output"] = job.output
    elif not job.done and job.progress:
        answer["output"] = job.progress[-1]
    if job.error is not None:
        answer["error"] = job.error
    if job.attempts > 1:
        answer["retries"] = job.attempts - 1
    return answer
