"""Cancel and concurrency: the stop channel ends a request in the engine within a second, whatever the SDK does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from coldsnap.testing import JobCancelled, JobState

from .worker import CORPUS, LONG, PATIENCE, STEADY, Worker, eventually, text, user

pytestmark = pytest.mark.asyncio(loop_scope="session")

QUESTION = "What is a cold start?"
CHAT = {"messages": [user(QUESTION)], **STEADY}
SHAPES: dict[str, dict[str, Any]] = {
    "native stream": {"messages": [user(QUESTION)], "stream": True, "sampling_params": STEADY},
    "native": {"messages": [user(QUESTION)], "sampling_params": STEADY},
    "native choices": {"prompt": QUESTION, "stream": True, "sampling_params": STEADY | {"n": 3, "temperature": 1}},
    "OpenAI stream": {"openai_route": "/v1/chat/completions", "openai_input": CHAT | {"stream": True}},
    "OpenAI": {"openai_route": "/v1/chat/completions", "openai_input": CHAT},
    "generic": {"route": "/v1/completions", "body": {"prompt": QUESTION, **STEADY}},
}


RUNNING = 0.3
"""Processor seconds of the engine's core: a tenth of what the whole of STEADY takes."""


async def runs(worker: Worker) -> None:
    """Return when the engine has worked for a while."""
    before = worker.core_cpu_seconds()
    await eventually(lambda: worker.core_cpu_seconds() > before + RUNNING)


async def assert_engine_falls_idle(worker: Worker) -> None:
    """A request that went on unseen would keep the core busy for far longer than it was until now."""
    begun, used = worker.core_cpu_seconds(), 1.0
    while used > 0.03:
        before = worker.core_cpu_seconds()
        assert before - begun < RUNNING
        await asyncio.sleep(0.2)
        used = worker.core_cpu_seconds() - before


@pytest.fixture
def gate(worker: Worker) -> Iterator[asyncio.Event]:
    """Let POSTs hang until the gate is set."""
    worker.plane.gate = gate = asyncio.Event()
    yield gate
    gate.set()
    worker.plane.gate = None


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_cancelled_job_is_aborted_in_the_engine_within_a_second(worker: Worker, shape: str) -> None:
    job = worker.plane.submit(SHAPES[shape])
    await eventually(lambda: job.state is JobState.IN_PROGRESS)
    await runs(worker)
    assert worker.plane.cancel(job.id)
    record = await worker.record(job)
    posts = job.posts
    assert record["error"] == "cancelled"
    assert record["finish_reason"] is None
    # vLLM's application tells the tokens of an answer that is not streamed only at its end: these are the steps' own.
    assert 1 <= record["completion_tokens"] < 0.75 * LONG
    assert record["prompt_tokens"] + record["cached_tokens"] > 0
    assert 0 < record["gpu_seconds"] <= record["duration_seconds"]
    await assert_engine_falls_idle(worker)
    with pytest.raises(JobCancelled):
        await job.result(PATIENCE)
    assert job.posts == posts


async def test_a_cancel_reaches_a_job_whose_post_hangs(worker: Worker, gate: asyncio.Event) -> None:
    for shape in ("native stream", "OpenAI stream"):
        job = worker.plane.submit(SHAPES[shape])
        await eventually(lambda job=job: job.posts == 1)  # type: ignore[misc]
        await runs(worker)
        assert job.chunks == []
        worker.plane.cancel(job.id)
        record = await worker.record(job)
        assert record["error"] == "cancelled"
        assert 0 < record["completion_tokens"] < 0.75 * LONG
        await assert_engine_falls_idle(worker)


async def test_a_hanging_post_holds_up_neither_the_engine_nor_other_jobs(worker: Worker, gate: asyncio.Event) -> None:
    slow = worker.ask(QUESTION)
    await eventually(lambda: slow.posts == 1)
    worker.plane.gate = None
    questions = list(CORPUS)[:8]
    for question, job in [(question, worker.ask(question)) for question in questions]:
        assert text(await job.result(PATIENCE)) == CORPUS[question]
    record = await worker.record(slow)  # the engine is done with it
    assert record["finish_reason"] == "stop"
    assert (slow.posts, slow.chunks) == (1, [])
    gate.set()
    chunks = await slow.result(PATIENCE)
    assert text(chunks) == CORPUS[QUESTION]
    assert len(chunks) <= 3  # the first, what had accumulated, and the end


async def test_a_cancel_does_not_disturb_the_jobs_beside_it(worker: Worker) -> None:
    doomed = [worker.plane.submit(SHAPES["native stream"]) for _ in range(3)]
    others = {question: worker.ask(question) for question in list(CORPUS)[:12]}
    longer = worker.ask(QUESTION, sampling_params={"max_tokens": 1000, "ignore_eos": True})
    await asyncio.gather(*(job.started(PATIENCE) for job in (*doomed, longer)))
    for job in doomed:
        assert worker.plane.cancel(job.id)
    cancelled = time.monotonic()
    for job in doomed:
        assert (await worker.record(job))["error"] == "cancelled"
    for question, job in others.items():
        assert text(await job.result(PATIENCE)) == CORPUS[question]
    chunks = await longer.result(PATIENCE)
    assert longer.timestamps.done
    assert longer.timestamps.done > cancelled
    assert chunks[-1]["usage"]["completion_tokens"] == 1000
    assert text(chunks).startswith(CORPUS[QUESTION])


async def test_jobs_beyond_max_concurrency_wait_and_all_end_right(worker: Worker) -> None:
    questions = (list(CORPUS) * 2)[:100]
    jobs = [(question, worker.ask(question, stream=number % 2 == 0)) for number, question in enumerate(questions)]
    for question, job in jobs:
        assert text(await job.result(PATIENCE)) == CORPUS[question]
    turns = sorted(
        turn for _, job in jobs for turn in ((job.timestamps.taken or 0.0, 1), (job.timestamps.done or 0.0, -1))
    )
    running, most = 0, 0
    for _, change in turns:
        running += change
        most = max(most, running)
    # At the plane a job ends while its POST is being answered, so that one more may seem to run.
    assert 20 <= most <= 25  # MAX_CONCURRENCY=24
