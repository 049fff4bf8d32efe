"""The control plane and the gateway, driven by the real SDK's unmodified loop in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import aiohttp
import openai
import pytest
import pytest_asyncio

from coldsnap.desk.serve.worker_http import Response, Server
from coldsnap.errors import EngineDead
from coldsnap.testing import (
    NO_INPUT,
    ControlPlane,
    Faults,
    Gateway,
    Job,
    JobCancelled,
    JobFailed,
    JobState,
    Violation,
    WorkerUnhealthy,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

EMOJI = ["naïve ", "日本語 ", "👩‍🚀", "🇫🇷 \u0000 end"]
HANDLER = r"""
import asyncio, json, os, sys
import runpod

def sse(text):
    delta = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [delta]}
    return "data: " + json.dumps(chunk, ensure_ascii=False) + "\n\n"

def completion(text):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}

async def openai_job(route, body):
    if route == "/v1/models":
        assert body == {}, body
        yield {"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "us"}]}
        return
    prompt = body["messages"][0]["content"]
    if body["model"] != "m":
        error = {"message": "no such model", "type": "NotFoundError", "param": "model", "code": 404}
        yield {"error": json.dumps({"error": error})}
    elif not body.get("stream"):
        yield completion(prompt)
    else:
        for word in prompt.split("|"):
            if word == "BREAK":
                yield {"error": "broke half-way"}
            if word == "WAIT":
                await asyncio.sleep(60)
            yield sse(word)
        yield "data: [DONE]\n\n"

async def native_job(job, do, **rest):
    match do:
        case "count":
            for i in range(rest["n"]):
                yield {"i": i}
        case "echo":
            for chunk in rest["chunks"]:
                yield chunk
        case "ords":
            yield [ord(character) for character in rest["text"]]
        case "big":
            for chunk in ("before", "x" * rest["bytes"], "after"):
                yield chunk
        case "raise":
            yield "first"
            raise RuntimeError("the handler broke")
        case "sleep":
            await asyncio.sleep(rest["seconds"])
            yield "slept"
        case "progress":
            runpod.serverless.progress_update(job, "half")
            while not os.path.exists(rest["until"]):
                await asyncio.sleep(0.05)
            yield "whole"
        case "wait":
            try:
                yield "started"
                print("handler waits", job["id"], flush=True)
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                print("handler cancelled", job["id"], flush=True)
                raise

async def generator(job):
    job_input = job.get("input", {"do": "echo", "chunks": ["no input"]})
    if "openai_route" in job_input:
        chunks = openai_job(job_input["openai_route"], job_input["openai_input"])
    else:
        chunks = native_job(job, **job_input)
    async for chunk in chunks:
        yield chunk

async def coroutine(job):
    return {"got": job["input"]}

runpod.serverless.start({
    "handler": coroutine if "coroutine" in sys.argv else generator,
    "return_aggregate_stream": "aggregate" in sys.argv,
    "concurrency_modifier": lambda current: 16,
})
"""


@pytest.fixture(scope="module")
def handler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sdk") / "handler.py"
    path.write_text(HANDLER)
    return path


@contextlib.contextmanager
def worker(plane: ControlPlane, handler: Path, *args: str, **extra: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the SDK. Its ping process survives a SIGKILL of the worker, so the whole group is killed."""
    environment = os.environ | plane.environment("w1") | {"RUNPOD_LOG_LEVEL": "INFO"} | extra
    with handler.with_suffix(".log").open("ab") as log:
        command = [sys.executable, str(handler), *args]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(handler: Path) -> AsyncIterator[ControlPlane]:
    async with ControlPlane() as plane:
        with worker(plane, handler):
            await plane.wait_for_worker(60)
            yield plane


@pytest.fixture
def plane(served: ControlPlane) -> Iterator[ControlPlane]:
    """A plane with a worker; a test that expects a violation takes it away."""
    yield served
    left, served.violations = served.violations, []
    assert left == []


@pytest_asyncio.fixture(loop_scope="module")
async def client(plane: ControlPlane) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        Gateway(plane) as gateway,
        openai.AsyncOpenAI(base_url=gateway.base_url, api_key="any", max_retries=0) as client,
    ):
        yield client


async def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.02)


# Jobs through the SDK's loop.


async def test_chunks_arrive_in_order_while_the_job_runs(plane: ControlPlane) -> None:
    job = plane.submit({"do": "count", "n": 40})
    states = []
    async for chunk in job.stream():
        states.append(job.state)
        assert chunk == {"i": len(states) - 1}
    assert states[0] is JobState.IN_PROGRESS
    assert job.state is JobState.COMPLETED
    assert (job.posts, job.output, job.error) == (41, [], None)  # the SDK sends no aggregate unless asked
    assert await job.result() == [{"i": i} for i in range(40)] == [chunk async for chunk in job.stream()]
    times = job.timestamps
    assert times.taken is not None
    assert times.done is not None
    assert times.first_chunk == times.chunks[0]
    turns = [times.submitted, times.taken, *times.chunks, times.done]
    assert turns == sorted(turns)


async def test_text_arrives_as_the_handler_yielded_it(plane: ControlPlane) -> None:
    assert await plane.submit({"do": "echo", "chunks": EMOJI}).result(60) == EMOJI


async def test_input_that_json_carries_and_orjson_refuses_reaches_the_handler(plane: ControlPlane) -> None:
    job = plane.submit({"do": "ords", "text": "\ud800a", "unused": 2**70})
    assert await job.result(60) == [[0xD800, 0x61]]


async def test_a_job_without_input_reaches_the_handler(plane: ControlPlane) -> None:
    assert await plane.submit(NO_INPUT).result(60) == ["no input"]


async def test_an_exception_in_the_handler_fails_the_job_after_its_chunks(plane: ControlPlane) -> None:
    job = plane.submit({"do": "raise"})
    seen = []
    with pytest.raises(JobFailed, match="the handler broke"):
        async for chunk in job.stream():
            seen.append(chunk)  # noqa: PERF401 -- what came before the error is kept
    assert seen == ["first"]
    assert job.state is JobState.FAILED
    with pytest.raises(JobFailed, match="the handler broke"):
        await job.result()


async def test_cancel_reaches_the_handler_and_only_that_job(plane: ControlPlane, handler: Path) -> None:
    def said() -> str:
        return handler.with_suffix(".log").read_text()

    job, other = plane.submit({"do": "wait"}), plane.submit({"do": "sleep", "seconds": 1})
    seen = []
    with pytest.raises(JobCancelled):
        async for chunk in job.stream():
            seen.append(chunk)
            # A cancel that lands in the SDK's POST never reaches the handler.
            await eventually(lambda: f"handler waits {job.id}" in said())
            assert plane.cancel(job.id)
    assert seen == ["started"]
    assert job.state is JobState.CANCELLED
    await eventually(lambda: f"handler cancelled {job.id}" in said())
    assert await other.result(60) == ["slept"]
    assert not plane.cancel(job.id)
    assert not plane.cancel(other.id)


async def test_jobs_are_taken_in_a_batch_and_run_side_by_side(plane: ControlPlane) -> None:
    jobs = [plane.submit({"do": "sleep", "seconds": 1}) for _ in range(12)]
    await asyncio.gather(*(job.result(60) for job in jobs))
    taken = [job.timestamps.taken or 0 for job in jobs]
    assert max(taken) - min(taken) < 0.5
    assert max(taken) < min(job.timestamps.done or 0 for job in jobs)


async def test_a_chunk_over_the_limit_is_recorded_and_lost(plane: ControlPlane) -> None:
    job = plane.submit({"do": "big", "bytes": 1_000_001})
    assert await job.result(60) == ["before", "after"]
    violation = plane.violations.pop()
    assert (violation.kind, violation.job_id) == ("chunk too large", job.id)
    assert await plane.submit({"do": "big", "bytes": 900_000}).result(60) == [
        "before",
        "x" * 900_000,
        "after",
    ]


async def test_a_progress_update_does_not_end_the_job(plane: ControlPlane, tmp_path: Path) -> None:
    job = plane.submit({"do": "progress", "until": str(tmp_path / "end")})
    await eventually(lambda: job.progress == ["half"])
    (tmp_path / "end").touch()
    assert await job.result(60) == ["whole"]
    assert job.progress == ["half"]


async def test_pings_and_polls_are_seen(plane: ControlPlane) -> None:
    seen = await plane.wait_for_worker(60, "w1")
    await eventually(lambda: seen.pings > 0)
    assert seen.taken > 0
    assert seen.unhealthy is None


# Other workers, other planes.


async def test_an_aggregate_is_the_result_where_the_worker_returns_one(handler: Path) -> None:
    async with ControlPlane() as plane:
        with worker(plane, handler, "aggregate"):
            job = plane.submit({"do": "count", "n": 3})
            assert await job.result(60) == job.output == [{"i": 0}, {"i": 1}, {"i": 2}]
        assert plane.violations == []


async def test_a_plain_handler_and_flashboot_and_an_end_by_sigterm(handler: Path) -> None:
    async with ControlPlane(flashboot=True, poll_seconds=60) as plane:
        with worker(plane, handler, "coroutine") as process:
            job = plane.submit({"a": 1}, sync=True)
            assert await job.result(60) == job.output == {"got": {"a": 1}}
            assert job.chunks == []
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            assert process.poll() is None  # it waits its polls out
            plane.release_polls()
            await eventually(lambda: process.poll() is not None)
            assert process.returncode == 0
        assert plane.violations == []


async def test_refused_posts_are_retried_and_slow_ones_waited_for(handler: Path) -> None:
    faults = Faults(delay=0.02, jitter=0.02, stream_5xx=0.15, done_5xx=0.15, seed=3)
    async with ControlPlane(faults=faults) as plane:
        with worker(plane, handler):
            await plane.wait_for_worker(60)
            jobs = [plane.submit({"do": "count", "n": 4}) for _ in range(8)]
            for job in jobs:
                assert await job.result(60) == [{"i": i} for i in range(4)]
        assert sum(job.posts for job in jobs) > 8 * 5
        assert plane.violations == []


async def test_a_worker_that_fails_a_fitness_check_is_reported_at_once(handler: Path) -> None:
    unfit = {"RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "false", "RUNPOD_MIN_MEMORY_GB": "1e9"}
    async with ControlPlane() as plane:
        with worker(plane, handler, **unfit), pytest.raises(WorkerUnhealthy, match="Insufficient memory"):
            await plane.wait_for_worker(60)


# The protocol alone.


@pytest_asyncio.fixture(loop_scope="module")
async def bare() -> AsyncIterator[tuple[ControlPlane, aiohttp.ClientSession]]:
    async with (
        Keyed(poll_seconds=0.1) as plane,
        aiohttp.ClientSession(f"{plane.url}/v2/{plane.endpoint_id}/") as session,
    ):
        plane.key("w1")
        plane.key("w2")
        yield plane, session


KEY = "of-a-test"


class Keyed(ControlPlane):
    """Its workers have a key that a test knows."""

    def key(self, worker_id: str) -> str:
        return self._keys.setdefault(worker_id, KEY)


async def take(session: aiohttp.ClientSession, batch_size: int = 1) -> object:
    batch = f"&batch_size={batch_size}" if batch_size > 1 else ""
    path = f"job-take{'-batch' if batch else ''}/w1?key={KEY}{batch}"
    async with session.get(path) as response:
        return await response.json() if response.status == 200 else response.status


async def post(
    session: aiohttp.ClientSession, kind: str, job: Job | str, body: object, by: str = "w1", **headers: str
) -> int:
    data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
    job_id = job if isinstance(job, str) else job.id
    form = {"Content-Type": "application/x-www-form-urlencoded", **headers}
    async with session.post(f"job-{kind}/{by}/{job_id}?key={KEY}&isStream=true", data=data, headers=form) as response:
        return response.status


async def test_a_worker_that_has_not_its_own_key_gets_and_gives_nothing(
    bare: tuple[ControlPlane, aiohttp.ClientSession],
) -> None:
    plane, session = bare
    other = plane.environment("w3")["RUNPOD_WEBHOOK_GET_JOB"].partition("key=")[2]
    job = plane.submit({})
    for call in ("job-take/w1", f"job-take/w1?key={other[:-1]}", "job-take/stranger?key=", "job-stop/w1", "ping/w1"):
        async with session.get(call) as response:
            assert (call, response.status) == (call, 401)
    async with session.post(f"job-done/w1/{job.id}", json={"output": 1}) as response:
        assert response.status == 401
    assert job.state is JobState.IN_QUEUE
    assert plane.workers == {}


async def test_a_request_under_another_name_is_refused(bare: tuple[ControlPlane, aiohttp.ClientSession]) -> None:
    _, session = bare
    async with session.get(f"ping/w1?key={KEY}", headers={"Host": "rebound.example"}) as response:
        assert response.status == 421


async def test_a_client_that_sends_nothing_or_half_a_request_is_cut_off() -> None:
    async def answer() -> Response:
        await asyncio.sleep(0.3)  # longer than a client may take
        return Response()

    async with Server(lambda _: answer(), idle_seconds=0.1) as server:
        whole = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode()
        for sent, status in ((b"", b""), (whole[:-2], b""), (whole, b"HTTP/1.1 200")):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(sent)
            try:
                got = await asyncio.wait_for(reader.read(), 30)
            except ConnectionResetError:
                got = b""
            assert got.startswith(status)
            assert bool(got) == bool(status)
            writer.close()


async def test_a_poll_that_was_given_up_while_the_plane_stood_still_takes_no_job(
    bare: tuple[ControlPlane, aiohttp.ClientSession],
) -> None:
    plane, _ = bare
    job = plane.submit({})
    port = int(plane.environment()["RUNPOD_WEBHOOK_GET_JOB"].split(":")[2].split("/")[0])
    poll = f"GET /v2/local/job-take-batch/w1?key={KEY}&batch_size=5 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n"
    for _ in range(20):  # all within one turn of the loop
        with socket.create_connection(("127.0.0.1", port)) as given_up:
            given_up.sendall(poll.encode())
    await asyncio.sleep(0.1)
    assert job.state is JobState.IN_QUEUE


async def test_takes_are_in_order_and_no_larger_than_asked(
    bare: tuple[ControlPlane, aiohttp.ClientSession],
) -> None:
    plane, session = bare
    assert await take(session) == await take(session, 2) == 204
    first, *others = [plane.submit({"n": n}) for n in range(4)]
    assert plane.cancel(others.pop().id)
    assert await take(session) == {"id": first.id, "input": {"n": 0}}
    assert await take(session, 9) == [{"id": job.id, "input": {"n": job.number}} for job in others]
    assert await take(session, 9) == 204


async def test_a_poll_whose_worker_went_away_takes_nothing() -> None:
    async with Keyed(poll_seconds=20) as plane:
        plane.key("w1")
        url = f"{plane.url}/v2/{plane.endpoint_id}/"
        async with aiohttp.ClientSession(url) as gone:
            poll = asyncio.create_task(take(gone))
            await plane.wait_for_worker(60)
            poll.cancel()
        await asyncio.sleep(0.1)
        job = plane.submit("kept")
        await asyncio.sleep(0.1)
        assert job.state is JobState.IN_QUEUE
        async with aiohttp.ClientSession(url) as session:
            assert await take(session) == {"id": job.id, "input": "kept"}


async def test_what_the_platform_would_not_take_is_recorded(
    bare: tuple[ControlPlane, aiohttp.ClientSession],
) -> None:
    plane, session = bare
    job, large, cancelled = (plane.submit({}) for _ in range(3))
    await take(session, 3)
    assert await post(session, "stream", "nobody", {"output": 1}) == 404
    assert await post(session, "stream", job, {"output": 1}, by="w2") == 400
    assert await post(session, "stream", job, b'{"output": NaN}') == 400
    assert await post(session, "stream", job, {"outputs": 1}) == 400
    assert await post(session, "done", job, [1]) == 400
    assert await post(session, "done", job, {"error": {"code": 1}}) == 200
    assert await post(session, "done", job, {"output": 1}) == 400
    assert await post(session, "done", large, {"output": "x" * 10_000_000}) == 413
    assert not large.done  # a worker has to say so itself
    assert await post(session, "done", large, {"error": "too large"}) == 200
    plane.cancel(cancelled.id)
    assert await post(session, "stream", cancelled, {"output": 1}) == 200
    assert [violation.kind for violation in plane.violations] == [
        "unknown job",
        "wrong worker",
        "malformed body",
        "malformed body",
        "malformed body",
        "after end",
        "result too large",
    ]
    assert plane.violations[0] == Violation("unknown job", "nobody", "stream from w1")
    assert (job.error, job.chunks, large.state) == ('{"code":1}', [], JobState.FAILED)
    assert (cancelled.late_posts, cancelled.chunks) == (1, [])


async def test_what_is_posted_again_because_its_answer_was_lost_counts_once(
    bare: tuple[ControlPlane, aiohttp.ClientSession],
) -> None:
    plane, session = bare
    job = plane.submit({})
    await take(session)
    for number, text in enumerate("abc"):
        for _ in range(2):
            assert await post(session, "stream", job, {"output": text}, **{"X-Chunk-Number": str(number)}) == 200
    assert await post(session, "stream", job, {"output": "a"}, **{"X-Chunk-Number": "0"}) == 200  # late
    for _ in range(2):
        assert await post(session, "done", job, {"output": ["a", "b", "c"]}) == 200
    assert (job.chunks, job.output, job.state) == (["a", "b", "c"], ["a", "b", "c"], JobState.COMPLETED)
    assert plane.violations == []


async def test_a_job_whose_engine_died_waits_again_unless_a_client_has_some_of_it(
    bare: tuple[ControlPlane, aiohttp.ClientSession],
) -> None:
    plane, session = bare
    unread, was_read = plane.submit({}), plane.submit({})
    await take(session, 2)
    error = {"error": json.dumps(EngineDead("the engine process is gone").body())}
    for job in (unread, was_read):
        assert await post(session, "stream", job, {"output": "a"}) == 200
    assert was_read.unread() == ["a"]
    for job in (unread, was_read):
        assert await post(session, "done", job, error) == 200
    assert (unread.state, unread.chunks, was_read.state) == (JobState.IN_QUEUE, [], JobState.FAILED)
    assert plane.workers["w1"].retired  # it gets neither of them
    assert plane.violations == []


async def test_faults_repeat_by_seed_and_refuse_nonsense() -> None:
    faults = Faults(delay=1, jitter=0.5, stream_5xx=0.25, stream_429=0.25)
    draws = [faults.draw("stream", 0, number) for number in range(1000)]
    assert draws == [faults.draw("stream", 0, number) for number in range(1000)]
    assert all(1 <= delay <= 1.5 for delay, _ in draws)
    for status in (500, 429):
        assert 200 < [status for _, status in draws].count(status) < 300
    assert faults.draw("done", 0, 0)[1] is None
    with pytest.raises(ValueError, match="done_5xx and done_429 and done_lost"):
        Faults(done_5xx=0.6, done_429=0.6)
    with pytest.raises(ValueError, match="not negative"):
        Faults(jitter=-1)
    with pytest.raises(ValueError, match="below 90"):
        ControlPlane(poll_seconds=90)


# The official OpenAI client through the gateway.


async def test_gateway_answers_plainly(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in await client.models.list()] == ["m"]
    text = "".join(EMOJI)
    answer = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": text}])
    assert answer.choices[0].message.content == text


async def test_gateway_streams(client: openai.AsyncOpenAI) -> None:
    messages = [{"role": "user", "content": "|".join(EMOJI)}]
    stream = await client.chat.completions.create(model="m", messages=messages, stream=True)
    assert [chunk.choices[0].delta.content async for chunk in stream] == EMOJI


@pytest.mark.parametrize("stream", [False, True])
async def test_gateway_answers_an_openai_error_with_its_own_status(client: openai.AsyncOpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="other", messages=[{"role": "user", "content": "hi"}], stream=stream)
    assert caught.value.body == {
        "message": "no such model",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }


async def test_gateway_ends_a_stream_that_breaks_with_an_error_event(client: openai.AsyncOpenAI) -> None:
    messages = [{"role": "user", "content": "one|BREAK"}]
    seen = []
    with pytest.raises(openai.APIError, match="broke half-way"):
        async for chunk in await client.chat.completions.create(model="m", messages=messages, stream=True):
            seen.append(chunk.choices[0].delta.content)  # noqa: PERF401 -- what came before the error is kept
    assert seen == ["one"]


async def test_gateway_adds_nothing_to_a_stream_that_is_whole_though_its_worker_dies() -> None:
    async with (
        ControlPlane() as plane,
        Gateway(plane) as gateway,
        aiohttp.ClientSession(f"{gateway.base_url}/") as session,
    ):
        asking = asyncio.create_task(session.post("chat/completions", json={"stream": True}))
        while not plane.queue:
            await asyncio.sleep(0.01)
        (job,) = plane.take(plane.see("worker"), 1)
        job.add_chunk("data: {}\n\ndata: [DONE]\n\n")
        async with await asking as answer:
            plane.lose("worker", "it died")
            assert await answer.text() == "data: {}\n\ndata: [DONE]\n\n"
        assert job.state is JobState.FAILED


async def test_gateway_cancels_the_job_of_a_client_that_leaves(plane: ControlPlane, client: openai.AsyncOpenAI) -> None:
    messages = [{"role": "user", "content": "one|WAIT|two"}]
    stream = await client.chat.completions.create(model="m", messages=messages, stream=True)
    assert (await anext(aiter(stream))).choices[0].delta.content == "one"
    await stream.close()
    job = list(plane.jobs.values())[-1]
    await eventually(lambda: job.state is JobState.CANCELLED)


async def test_gateway_refuses_what_is_no_json_and_does_not_wait_for_ever() -> None:
    async with ControlPlane() as plane, Gateway(plane, timeout=0.2) as gateway:
        async with aiohttp.ClientSession(f"{gateway.base_url}/") as session:
            async with session.post("completions", data=b'{"a": ') as response:
                assert response.status == 400
                assert "line 1 column 7" in (await response.json())["error"]["message"]
            assert plane.jobs == {}
            for stream in (True, False):
                async with session.post("completions", json={"stream": stream}) as response:
                    assert response.status == 504
                    assert (await response.json())["error"]["type"] == "timeout_error"
            async with session.delete("models/m") as response:
                assert response.status == 405
        assert [job.state for job in plane.jobs.values()] == [JobState.CANCELLED] * 2
