"""Streams through everything that a POST can meet, counted: what is lost, doubled, out of order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import aiohttp
import pytest

from coldsnap.jobs import egress, post
from coldsnap.jobs.egress import Egress
from coldsnap.testing import ControlPlane, Faults, JobState

CHUNKS = [{"text": str(number)} for number in range(20)]


async def test_streams_are_delivered_once_where_posts_are_refused_lost_and_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(egress, "_FIRST_WAIT", 0.005)
    monkeypatch.setattr(
        post, "_SECONDS", 0.3
    )  # some answers come later than that, some POSTs arrive after their repeat
    faults = Faults(
        jitter=0.35,
        stream_5xx=0.05,
        stream_429=0.05,
        stream_lost=0.1,
        done_5xx=0.05,
        done_429=0.05,
        done_lost=0.1,
        seed=7,
    )

    async def handler(_: dict[str, Any]) -> AsyncGenerator[Any, None]:
        for chunk in CHUNKS:
            yield chunk

    logged: list[str] = []
    async with ControlPlane(faults=faults) as plane, aiohttp.ClientSession() as session:
        urls = plane.environment("w1")
        stream, done = (
            urls[f"RUNPOD_WEBHOOK_POST_{kind}"].replace("$RUNPOD_POD_ID", "w1") for kind in ("STREAM", "OUTPUT")
        )
        target = Egress(handler, stream, done, lambda text, _: logged.append(text))
        jobs = [plane.submit({}) for _ in range(100)]
        plane.take(plane.see("w1"), len(jobs))
        await asyncio.gather(*(target.handle_job(session, {}, {"id": job.id}) for job in jobs))
        assert logged == []
        assert {job.state for job in jobs} == {JobState.COMPLETED}
        texts = [[chunk["text"] for chunk in job.chunks] for job in jobs]
        assert texts == [[chunk["text"] for chunk in CHUNKS]] * len(jobs)
        assert all(job.output == CHUNKS for job in jobs)
        assert sum(job.posts for job in jobs) > len(jobs) * (len(CHUNKS) + 1)
        assert plane.violations == []
