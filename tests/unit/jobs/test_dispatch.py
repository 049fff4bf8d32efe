"""The check that the SDK is the one that the dispatcher was written for."""

from __future__ import annotations

import asyncio
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


async def test_a_cancel_that_overtakes_its_job_stops_it_and_an_old_one_does_not() -> None:
    begun: list[str] = []

    async def handle_job(_session: Any, _config: Any, job: dict[str, Any]) -> None:
        begun.append(job["id"])

    class JobScaler:
        def __init__(self, config: dict[str, Any]) -> None:
            self.jobs_tasks: dict[str, asyncio.Task[None]] = {}
            self.job_progress: set[str] = SimpleNamespace(add=lambda _: None)  # type: ignore[assignment]

        async def stop_job(self, job_id: str) -> bool:
            return job_id in self.jobs_tasks

        async def handle_job(self, session: Any, job: dict[str, Any]) -> None:
            await handle_job(session, None, job)

    worker = SimpleNamespace(handle_job=handle_job, attach=lambda _: None)
    scaler = dispatch.event_driven(SimpleNamespace(JobScaler=JobScaler), worker)({})  # type: ignore[arg-type]
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
