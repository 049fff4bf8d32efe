"""Starts jobs when they arrive instead of every 100 ms: the part of the SDK's scaler that this worker replaces.

The SDK wakes every 100 ms to start jobs, counts the queue and the running jobs twice when it asks for more,
is deaf to cancels for a second after each idle poll, and drains without a deadline. Here a job starts when it
arrives, intake goes on while others run, and SIGTERM gives running jobs a fixed time.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

_TAKE_SECONDS = 90.0
"""How long one job-take may be held open, as in the SDK."""
_TOO_MANY_SECONDS = 5.0
"""The SDK's own pause after a 429."""
_LEAST_POLL_SECONDS = 0.1
"""Least time between two polls of the stop channel, should its answers come at once."""
_EARLY_STOP_SECONDS = 1.0
"""How long a cancel may be ahead of its job: they come over two connections."""
_LAST_POSTS_SECONDS = 5.0
"""How long jobs that a drain has ended may take for their last POSTs."""


class Worker(Protocol):
    """What the scaler asks of the process around it."""

    concurrency: int
    drain_seconds: float

    def weigh(self, job: dict[str, Any]) -> int:
        """Return how many of `concurrency` a job takes up."""

    handle_job: Callable[[Any, Any, dict[str, Any]], Awaitable[None]]
    """Runs one job and posts what comes of it."""

    def attach(self, scaler: Any) -> None:
        """Remember the scaler, whose `kill_worker` begins the drain."""

    async def ready(self) -> None:
        """Prepare for jobs, in the event loop that will run them; no job is taken before this returns."""

    async def watch(self) -> None:
        """Run beside the jobs until cancelled."""

    def draining(self) -> None:
        """Called when SIGTERM has come and the running jobs are waited for."""

    def stop_jobs(self) -> None:
        """End every running job with an error."""


def differs(scaler: type) -> str | None:
    """Return how the SDK's scaler differs from the one that this module was written for, or None."""
    needed = ("run", "handle_job", "stop_job", "kill_worker")
    missing = [name for name in needed if not callable(getattr(scaler, name, None))]
    return f"JobScaler has no {', '.join(missing)}" if missing else None


def event_driven(sdk: Any, worker: Worker) -> type:
    """Return `sdk.JobScaler` with its polling replaced; `worker.handle_job` runs and posts a job."""
    return type("EventDrivenScaler", (_EventDriven, sdk.JobScaler), {"sdk": sdk, "worker": worker})


class _EventDriven:
    sdk: Any
    worker: Worker
    jobs_queue: asyncio.Queue[dict[str, Any]]

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)  # type: ignore[call-arg] # JobScaler's
        self.jobs_queue = asyncio.Queue()
        self.jobs_handler = self.worker.handle_job
        self._running: dict[asyncio.Task[None], int] = {}
        self._stopped_early: dict[str, float] = {}
        self.worker.attach(self)

    async def run(self: Any) -> None:
        """Replace the SDK's three loops; ends when the drain after SIGTERM has ended."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.kill_worker)
        async with self.sdk.AsyncClientSession() as session:
            await self.worker.ready()
            take = asyncio.create_task(self._take(session))
            others = [asyncio.create_task(self.worker.watch())]
            if self.sdk._job_stop_url() is not None:  # noqa: SLF001 -- how the SDK itself asks
                others.append(asyncio.create_task(self.monitor_stop_signals(session)))
            await self._shutdown_event.wait()
            self.worker.draining()
            await self._drain(take)
            others += self._running
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def monitor_stop_signals(self: Any, session: Any) -> None:
        """Poll the stop channel without a pause."""
        loop = asyncio.get_running_loop()
        while True:
            begun = loop.time()
            try:
                for job_id in await self.stop_signals_fetcher(session):
                    await self.stop_job(job_id)
            except Exception as error:  # noqa: BLE001 -- whatever the request raises, the channel stays open
                await self._request_failed("poll the stop channel", error)
            else:
                await asyncio.sleep(max(0.0, _LEAST_POLL_SECONDS - (loop.time() - begun)))

    async def stop_job(self, job_id: str) -> bool:
        """Stop a running job, or one that is about to arrive."""
        now = asyncio.get_running_loop().time()
        if await super().stop_job(job_id):  # type: ignore[misc] # JobScaler's
            return True
        self._stopped_early = {job: until for job, until in self._stopped_early.items() if until > now}
        self._stopped_early[job_id] = now + _EARLY_STOP_SECONDS
        return False

    async def _take(self: Any, session: Any) -> None:
        """Take jobs until cancelled: also while draining, because the open request may still deliver."""
        while True:
            while (free := self.worker.concurrency - sum(self._running.values())) <= 0:
                await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
            fetch = asyncio.ensure_future(self.jobs_fetcher(session, free))
            try:
                await asyncio.wait([fetch], timeout=_TAKE_SECONDS)
            finally:
                if fetch.done() and not fetch.cancelled() and fetch.exception() is None:
                    for job in fetch.result() or ():
                        self._begin(session, job)
                fetch.cancel()
            if fetch.done() and not fetch.cancelled() and (error := fetch.exception()) is not None:
                await self._request_failed("take a job", error)

    def _begin(self: Any, session: Any, job: dict[str, Any]) -> None:
        if self._stopped_early.pop(job["id"], 0.0) > asyncio.get_running_loop().time():
            return  # for the platform it has ended
        if (task := self.jobs_tasks.get(job["id"])) is not None and not task.done():
            message = f"job {job['id']} was delivered again while it runs; it is not started a second time"
            self.sdk.log.error(message)
            return
        self.jobs_queue.put_nowait(job)  # handle_job ends with task_done(), which counts
        self.jobs_queue.get_nowait()
        self.job_progress.add(job)
        task = asyncio.create_task(self.handle_job(session, job))
        self.jobs_tasks[job["id"]] = task  # where the stop channel looks
        self._running[task] = self.worker.weigh(job)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        if not task.cancelled():
            task.exception()  # handle_job has logged it

    async def _drain(self, take: asyncio.Task[None]) -> None:
        deadline = time.monotonic() + self.worker.drain_seconds  # a loop's own clock may lag behind, under load
        while self._running and (left := deadline - time.monotonic()) > 0:
            await asyncio.wait(self._running, timeout=left)
        take.cancel()
        await asyncio.wait([take])
        if self._running:
            self.worker.stop_jobs()
            await asyncio.wait(self._running, timeout=_LAST_POSTS_SECONDS)

    async def _request_failed(self, what: str, error: BaseException) -> None:
        if isinstance(error, self.sdk.TooManyRequests):
            await asyncio.sleep(_TOO_MANY_SECONDS)
            return
        message = f"Failed to {what}: {type(error).__name__}: {error}"
        self.sdk.log.error(message)
        await asyncio.sleep(1)
