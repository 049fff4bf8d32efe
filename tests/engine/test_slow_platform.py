"""A platform that is slow, uneven and fails now and then: what arrives is complete and in order."""

from __future__ import annotations

import asyncio
import json

import pytest

from coldsnap.testing import Faults, Job

from .conftest import Boot
from .worker import CORPUS, PATIENCE, STEADY, Worker, text, user

pytestmark = pytest.mark.asyncio(loop_scope="session")

QUESTION = "What happens on a cold worker before the first token?"
"""The one with the longest answer."""


def said(job: Job) -> str:
    """Return the text of a chat's stream, whose events must all be whole."""
    events = [event for chunk in job.chunks for event in chunk.split("\n\n") if event]
    assert events.pop() == "data: [DONE]"
    bodies = [json.loads(event.removeprefix("data: ")) for event in events]
    return "".join(choice["delta"].get("content") or "" for body in bodies for choice in body["choices"])


async def test_streams_are_complete_and_in_order_whatever_their_posts_meet(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        worker.plane,
        "faults",
        Faults(0.02, 0.2, stream_5xx=0.1, stream_429=0.05, stream_lost=0.1, done_5xx=0.1, done_lost=0.1),
    )
    chat = {"messages": [user(QUESTION)], "stream": True}
    native = [worker.ask(QUESTION) for _ in range(12)]
    openai = [worker.openai("/v1/chat/completions", chat) for _ in range(12)]
    await asyncio.gather(*(job.result(PATIENCE) for job in native + openai))
    assert {text(job.chunks) for job in native} == {said(job) for job in openai} == {CORPUS[QUESTION]}
    assert all(job.output == job.chunks for job in native + openai)
    assert sum(job.posts for job in native + openai) > sum(len(job.chunks) + 1 for job in native + openai)


async def test_the_first_token_and_the_end_wait_for_no_pace(new_worker: Boot) -> None:
    async with new_worker(CHUNK_INTERVAL_MS="1000") as worker:
        job = worker.ask("Hi", sampling_params=STEADY | {"max_tokens": 400})
        first, *_, last = await job.result(PATIENCE)
        assert 0 < len(first["text"]) < 400
        assert last["finish_reason"] == "length"
        begun, *paced = job.timestamps.chunks
        assert len(paced) - 1 <= paced[-1] - begun  # at most one a second between the first and the last
