"""The check that the SDK is the one that the dispatcher was written for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

from runpod.serverless.modules import rp_scale

from coldsnap.jobs import dispatch


def test_the_installed_scaler_has_what_is_overridden() -> None:
    assert dispatch.differs(rp_scale.JobScaler) is None


def test_a_scaler_without_what_is_overridden_is_left_alone() -> None:
    class JobScaler:
        def run(self) -> None: ...

    complaint = dispatch.differs(JobScaler)
    assert complaint == "JobScaler has no handle_job, stop_job, kill_worker"


def scaler_of(handle_job: Callable[..., Awaitable[None]], said: list[str]) -> Any:
    class JobScaler:
        def __init__(self, config: dict[str, Any]) -> None:
            self.jobs_tasks: dict[str, asyncio.Task[None]] = {}
            self.job_progress: set[str] = SimpleNamespace(add=lambda _: None)  # type: ignore[assignment]

        async def stop_job(self, job_id: str) -> bool:
            return job_id in self.jobs_tasks

        async def handle_job(self, session: Any, job: dict[str, Any]) -> None:
            await handle_job(session, None, job)

    sdk = SimpleNamespace(JobScaler=JobScaler, log=SimpleNamespace(error=said.append))
    worker = SimpleNamespace(handle_job=handle_job, attach=lambda _: None, weigh=lambda _: 1)
    return dispatch.event_driven(sdk, worker)({})  # type: ignore[arg-type]


async def test_a_job_that_is_delivered_again_while_it_runs_runs_once_and_again_after_its_end() -> None:
    begun: list[str] = []
    said: list[str] = []
    end = asyncio.Event()

    async def handle_job(_session: Any, _config: Any, job: dict[str, Any]) -> None:
        begun.append(job["id"])
        await end.wait()

    scaler = scaler_of(handle_job, said)
    for _ in range(2):
        scaler._begin(None, {"id": "same"})
    await asyncio.sleep(0)
    assert begun == ["same"]
    assert said == ["job same was delivered again while it runs; it is not started a second time"]
    end.set()
    await scaler.jobs_tasks["same"]
    scaler._begin(None, {"id": "same"})  # the platform tries it again
    await asyncio.sleep(0)
    assert begun == ["same", "same"]


async def test_a_cancel_that_overtakes_its_job_stops_it_and_an_old_one_does_not() -> None:
    begun: list[str] = []

    async def handle_job(_session: Any, _config: Any, job: dict[str, Any]) -> None:
        begun.append(job["id"])

    scaler = scaler_of(handle_job, [])
    assert not await scaler.stop_job("early")
    scaler._begin(None, {"id": "early"})
    scaler._begin(None, {"id": "other"})
    await asyncio.sleep(0)
    assert begun == ["other"]
    assert await scaler.stop_job("other")
    await scaler.stop_job("again")
    await asyncio.sleep(2)
    scaler._begin(None, {"id": "again"})  # a retried job keeps its id
    await asyncio.sleep(0)
    assert begun == ["other", "again"]


async def test_a_job_counts_as_the_completions_that_it_asks_for() -> None:
    asked: list[int] = []
    ends: dict[str, asyncio.Event] = {name: asyncio.Event() for name in ("heavy", "light")}
    deliveries = [[{"id": "heavy", "input": {}}], [{"id": "light", "input": {}}]]

    async def handle_job(_session: Any, _config: Any, job: dict[str, Any]) -> None:
        await ends[job["id"]].wait()

    class JobScaler:
        def __init__(self, config: dict[str, Any]) -> None:
            self.jobs_tasks: dict[str, asyncio.Task[None]] = {}
            self.job_progress: set[str] = SimpleNamespace(add=lambda _: None)  # type: ignore[assignment]

        async def handle_job(self, session: Any, job: dict[str, Any]) -> None:
            await handle_job(session, None, job)

        async def jobs_fetcher(self, _session: Any, free: int) -> list[dict[str, Any]]:
            asked.append(free)
            await asyncio.sleep(0 if deliveries else 3600)
            return deliveries.pop(0)

    worker = SimpleNamespace(
        handle_job=handle_job, attach=lambda _: None, concurrency=9, weigh=lambda job: 8 if job["id"] == "heavy" else 1
    )
    scaler = dispatch.event_driven(SimpleNamespace(JobScaler=JobScaler), worker)({})  # type: ignore[arg-type]
    taking = asyncio.create_task(scaler._take(None))
    await asyncio.sleep(0.05)
    assert asked == [9, 1]  # and none while all nine are taken
    ends["heavy"].set()
    await asyncio.sleep(0.05)
    assert asked == [9, 1, 8]
    ends["light"].set()
    taking.cancel()
