"""More jobs than the engine runs: the worker leaves them where they are, and none waits longer than it may."""

from __future__ import annotations

import asyncio

import openai
import pytest

from coldsnap.testing import JobFailed, JobState

from .conftest import Boot
from .worker import CORPUS, EMOJI_ONLY, LONG, MODEL, PATIENCE, STEADY, eventually, text

pytestmark = pytest.mark.asyncio(loop_scope="session")

QUESTION = "What is a cold start?"


async def test_a_worker_takes_max_queue_jobs_beyond_the_engine_s_and_none_waits_past_max_queue_seconds(
    new_worker: Boot,
) -> None:
    async with new_worker(MAX_NUM_SEQS="1", MAX_QUEUE="3", MAX_QUEUE_SECONDS="0.2") as worker:
        steady = {"prompt": QUESTION, **STEADY}
        first = worker.ask(QUESTION, sampling_params=STEADY)
        await first.started(PATIENCE)
        waiting = [
            worker.ask(QUESTION, sampling_params=STEADY),
            worker.ask(QUESTION, stream=False, sampling_params=STEADY),
            worker.openai("/v1/completions", steady | {"stream": True}),
        ]
        beyond = [worker.ask(EMOJI_ONLY) for _ in range(3)]
        await eventually(lambda: all(job.state is JobState.IN_PROGRESS for job in waiting))
        assert {job.state for job in beyond} == {JobState.IN_QUEUE}  # another worker may have them
        for job in waiting:
            with pytest.raises(JobFailed, match=r"MAX_QUEUE_SECONDS=0\.2; jobs in this worker: [234]") as caught:
                await job.result(PATIENCE)
            assert '"type":"TooManyRequestsError"' in caught.value.error
            assert '"code":429' in caught.value.error
            assert (await worker.record(job))["error"] == "TooManyRequestsError"
        assert not first.done  # nobody waited for its end
        chunks = await first.result(PATIENCE)
        assert chunks[-1]["usage"]["completion_tokens"] == LONG
        await asyncio.gather(*(job.ended(PATIENCE) for job in beyond))
        hold = worker.ask(QUESTION, sampling_params=STEADY)
        await hold.started(PATIENCE)
        async with openai.AsyncOpenAI(base_url=worker.gateway.base_url, api_key="any", max_retries=0) as client:
            with pytest.raises(openai.RateLimitError, match="MAX_QUEUE_SECONDS"):
                await client.completions.create(model=MODEL, prompt=QUESTION, max_tokens=8)
        worker.plane.cancel(hold.id)
        assert text(await worker.ask(EMOJI_ONLY).result(PATIENCE)) == CORPUS[EMOJI_ONLY]
        assert worker.plane.violations == []
