"""`coldsnap serve` with real workers: the official clients, and a worker that is killed amid a thousand jobs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest
import pytest_asyncio
import runpod
from runpod.endpoint import runner

from tests.loopback.desk.serving import KEY, Serve, until

from .worker import CORPUS, EMOJI_ONLY, MODEL, ROOT, STEADY, environment, text, user

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUESTION = "What is a cold start?"
JOBS = 1000


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serve(tmp_path_factory: pytest.TempPathFactory, home: Path) -> AsyncIterator[Serve]:
    folder = tmp_path_factory.mktemp("serve")
    environ = environment(home, folder / "ledger", ENABLE_AUTO_TOOL_CHOICE="true", TOOL_CALL_PARSER="hermes")
    async with Serve(folder, "--workers", "1", "--max-workers", "2", environ=environ) as serve:
        await serve.says("worker-1 takes jobs")
        yield serve


@pytest_asyncio.fixture(loop_scope="module")
async def client(serve: Serve) -> AsyncIterator[openai.AsyncOpenAI]:
    base_url = f"{serve.url}/openai/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key=KEY, max_retries=0) as client:
        yield client


async def test_the_official_openai_client_gets_a_chat_a_stream_and_the_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in await client.models.list()] == [MODEL]
    messages = [user(QUESTION)]
    answer = await client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    assert answer.choices[0].message.content == CORPUS[QUESTION]
    stream = await client.chat.completions.create(model=MODEL, messages=messages, temperature=0, stream=True)
    deltas = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    assert "".join(deltas) == CORPUS[QUESTION]
    assert len(deltas) > 2


async def test_the_official_openai_client_gets_logprobs_two_choices_a_schema_and_a_tool_call(
    client: openai.AsyncOpenAI,
) -> None:
    messages = [user(QUESTION)]
    answer = await client.chat.completions.create(
        model=MODEL, messages=messages, n=2, logprobs=True, top_logprobs=2, max_tokens=8, temperature=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    schema = {"type": "object", "properties": {"kind": {"enum": ["cold", "warm"]}}, "required": ["kind"]}
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=messages,
        max_tokens=64,
        response_format={"type": "json_schema", "json_schema": {"name": "start", "schema": schema}},
    )
    assert json.loads(answer.choices[0].message.content or "")["kind"] in {"cold", "warm"}
    conversation = json.loads((ROOT / "builder" / "demo_tool_chat.json").read_text("utf-8"))
    answer = await client.chat.completions.create(
        model=MODEL, messages=conversation["messages"][:1], tools=conversation["tools"], temperature=0
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    json.loads(call.function.arguments)


async def test_the_official_openai_client_gets_errors_with_their_own_status(
    serve: Serve, client: openai.AsyncOpenAI
) -> None:
    with pytest.raises(openai.NotFoundError):
        await client.embeddings.create(model=MODEL, input="a text")
    with pytest.raises(openai.NotFoundError, match="other"):
        await client.chat.completions.create(model="other", messages=[user("hi")], stream=True)
    stranger = client.with_options(api_key="not the key")
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer"):
        await stranger.models.list()


async def test_the_sdk_s_own_client_runs_streams_and_cancels(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runpod, "endpoint_url_base", serve.base)
    endpoint = runner.Endpoint("local", api_key=KEY)
    job_input = {"messages": [user(QUESTION)], "sampling_params": {"temperature": 0}, "stream": True}

    def use() -> tuple[list[object], str, list[object], object, dict[str, object]]:
        job = endpoint.run(job_input)
        chunks = list(job.stream())
        waiting = endpoint.run(job_input | {"sampling_params": STEADY})
        cancelled = waiting.cancel()
        return chunks, job.status(), endpoint.run_sync(job_input), cancelled["status"], endpoint.health()

    chunks, state, whole, cancelled, health = await asyncio.to_thread(use)
    assert text(chunks) == text(whole) == CORPUS[QUESTION]  # type: ignore[arg-type]
    assert (state, cancelled) == ("COMPLETED", "CANCELLED")
    assert health["workers"]["ready"] == 1  # type: ignore[index,call-overload]


async def test_of_a_thousand_jobs_none_is_lost_or_ends_twice_when_a_worker_is_killed(
    tmp_path: Path, home: Path
) -> None:
    environ = environment(home, tmp_path / "ledger", MAX_CONCURRENCY="32")
    async with Serve(tmp_path, "--workers", "2", environ=environ) as serve:
        await serve.says("worker-1 takes jobs")
        await serve.says("worker-2 takes jobs")
        job_input = {"messages": [user(EMOJI_ONLY)], "sampling_params": {"temperature": 0}}
        room = asyncio.Semaphore(100)

        async def submit() -> str:
            async with room:
                return await serve.run(job_input)

        ids = [asyncio.create_task(submit()) for _ in range(JOBS)]
        health = {"completed": 0}
        while health["completed"] < JOBS // 2:
            await asyncio.sleep(0.02)
            health = (await serve.get("health"))["jobs"]
        os.kill(serve.workers[0], signal.SIGKILL)
        await serve.says("worker-1 was ended by SIGKILL")
        accepted = {}
        for task in ids:
            accepted[await task] = await serve.ended(await task)
        assert len(accepted) == JOBS
        assert Counter(status["status"] for status in accepted.values()) == {"COMPLETED": JOBS}
        assert {text(status["output"]) for status in accepted.values()} == {CORPUS[EMOJI_ONLY]}
        again = [status for status in accepted.values() if status.get("retries")]
        assert again  # it was killed with jobs in hand
        assert all(status["workerId"] != "worker-1" for status in again)
        health = (await serve.get("health"))["jobs"]
        assert health == {"completed": JOBS, "failed": 0, "inProgress": 0, "inQueue": 0, "retried": len(again)}
        await until(lambda: len(serve.workers) == 3)  # another is started in its place
        ledger = (tmp_path / "ledger" / "ledger.jsonl").read_text("utf-8").splitlines()
        ran = Counter(record["job_id"] for record in map(json.loads, ledger) if record["record"] == "request")
        assert accepted.keys() <= ran.keys()
        twice = {job_id for job_id, times in ran.items() if times > 1}
        assert twice <= {status["id"] for status in again}  # at most what had no result when the worker was killed
