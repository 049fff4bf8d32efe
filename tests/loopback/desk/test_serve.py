"""`coldsnap serve` with small handlers behind the unmodified SDK: limits, crashes, restarts, scaling."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coldsnap.desk.serve import server
from coldsnap.desk.serve.api import Api
from coldsnap.desk.serve.boots import reason
from coldsnap.desk.serve.control_plane import ControlPlane
from coldsnap.desk.serve.endpoint import Endpoint, status
from coldsnap.desk.serve.fleet import Fleet
from coldsnap.desk.serve.gateway import _Events
from coldsnap.desk.serve.job import Job, JobState, Terms
from coldsnap.desk.serve.scaler import Scaling
from coldsnap.desk.serve.server import served
from coldsnap.desk.serve.store import Store
from coldsnap.desk.serve.submission import Submission
from coldsnap.desk.serve.throttle import Rate, Throttle
from coldsnap.errors import Refused, ServeError
from tests.loopback.desk.serving import KEY, ROOT, Serve, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

HANDLER = r"""
import asyncio, os, runpod

async def handler(job):
    given = job["input"].get("openai_input", job["input"])
    for number in range(given.get("chunks", 1)):
        if given.get("stream"):
            yield f"data: {number}\n\n"
            await asyncio.sleep(given["pause"])
            continue
        yield {"number": number, "attempt_of": os.environ["RUNPOD_POD_ID"], "s3": "s3Config" in job}
    if given.get("progress"):
        runpod.serverless.progress_update(job, "half")
    await asyncio.sleep(given.get("seconds", 0))
    while not os.path.exists(given.get("until", "/")):
        await asyncio.sleep(0.05)
    if given.get("die"):
        os._exit(3)

runpod.serverless.start({
    "handler": handler, "return_aggregate_stream": True, "concurrency_modifier": lambda current: 8,
})
"""


@pytest.fixture(scope="module")
def handler(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("handler") / "handler.py"
    path.write_text(HANDLER)
    return str(path)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serve(tmp_path_factory: pytest.TempPathFactory, handler: str) -> AsyncIterator[Serve]:
    async with Serve(tmp_path_factory.mktemp("serve"), "--handler", handler) as serve:
        await serve.says("worker-1 takes jobs")
        yield serve


async def test_a_job_is_run_its_status_kept_and_its_stream_given_once(serve: Serve) -> None:
    job_id = await serve.run({"chunks": 3}, s3Config={"bucketName": "b"})
    status = await serve.ended(job_id)
    assert (status["id"], status["status"], status["workerId"]) == (job_id, "COMPLETED", "worker-1")
    assert [chunk["number"] for chunk in status["output"]] == [0, 1, 2]
    assert status["output"][0]["s3"]
    assert status["delayTime"] >= 0
    assert status["executionTime"] >= 0
    first, second = await serve.get(f"stream/{job_id}"), await serve.get(f"stream/{job_id}")
    assert first == {"status": "COMPLETED", "stream": [{"output": chunk} for chunk in status["output"]]}
    assert second == {"status": "COMPLETED", "stream": []}


async def test_runsync_answers_with_the_output_or_after_its_wait_with_the_state(serve: Serve, tmp_path: Path) -> None:
    answer = await serve.post("runsync", {"input": {}})
    assert (answer["status"], answer["id"][:5]) == ("COMPLETED", "sync-")
    end = tmp_path / "end"
    answer = await serve.post("runsync?wait=1000", {"input": {"until": str(end)}})
    assert answer["status"] in {"IN_QUEUE", "IN_PROGRESS"}
    end.touch()
    assert (await serve.ended(answer["id"]))["status"] == "COMPLETED"


async def test_a_progress_update_is_the_output_of_a_running_job(serve: Serve, tmp_path: Path) -> None:
    end = tmp_path / "end"
    job_id = await serve.run({"progress": True, "until": str(end)})
    while (await serve.get(f"status/{job_id}")).get("output") != "half":
        await asyncio.sleep(0.05)
    end.touch()
    assert (await serve.ended(job_id))["status"] == "COMPLETED"


async def test_a_job_that_its_client_has_left_is_found_and_cancelled(serve: Serve) -> None:
    client = asyncio.create_task(serve.post("runsync", {"input": {"seconds": 600}}))
    while not (found := (await serve.get("requests"))["requests"]):
        await asyncio.sleep(0.05)
    client.cancel()
    (left,) = found
    assert left["status"] in {"IN_QUEUE", "IN_PROGRESS"}
    assert (await serve.post(f"cancel/{left['id']}"))["status"] == "CANCELLED"
    assert await serve.get("requests") == {"requests": []}


async def test_a_cancelled_job_stays_cancelled_and_an_ended_one_as_it_is(serve: Serve) -> None:
    job_id = await serve.run({"seconds": 60})
    assert await serve.post(f"cancel/{job_id}") == {"id": job_id, "status": "CANCELLED"}
    assert await serve.post(f"cancel/{job_id}") == {"id": job_id, "status": "CANCELLED"}
    done = await serve.run({})
    await serve.ended(done)
    assert await serve.post(f"cancel/{done}") == {"id": done, "status": "COMPLETED"}
    code, answer = await serve.call("POST", f"retry/{done}")
    assert (code, "only a FAILED or TIMED_OUT one" in answer["error"]) == (400, True)


async def test_a_job_s_policy_ends_it_and_a_result_goes_when_its_client_says_so(serve: Serve) -> None:
    job_id = await serve.run({"seconds": 60}, policy={"executionTimeout": 5001})
    ended = await serve.ended(job_id)
    assert ended["status"] == "TIMED_OUT"
    assert ended["error"] == "the job ran longer than its execution timeout of 5.001 s"
    assert await serve.get(f"status/{job_id}?ttl=0") == ended
    while (found := await serve.call("GET", f"status/{job_id}"))[0] == 200:
        await asyncio.sleep(0.05)
    code, answer = found
    assert (code, "no longer kept" in answer["error"]) == (404, True)


LONG = b'{"input": "' + b"x" * 10_000_000 + b'"}'
REFUSED: dict[str, tuple[str, str, bytes | None, int, str]] = {
    "no JSON": ("POST", "run", b'{"input": ', 400, "line 1 column 11"),
    "no text": ("POST", "run", b"\xff\xfe", 400, "not JSON"),
    "not a number": ("POST", "run", b'{"input": NaN}', 400, "NaN is no JSON"),
    "nested": ("POST", "run", b"[" * 200_000, 400, "too deeply nested"),
    "a list": ("POST", "run", b"[1]", 400, "a JSON list"),
    "no input": ("POST", "run", b"{}", 400, "input: missing"),
    "policy": ("POST", "run", b'{"input": 1, "policy": {"ttl": 5}}', 400, "policy.ttl: 5; milliseconds from 10000"),
    "policy's timeout": ("POST", "run", b'{"input": 1, "policy": {"executionTimeout": true}}', 400, "executionTimeout"),
    "priority": ("POST", "run", b'{"input": 1, "policy": {"lowPriority": 1}}', 400, "policy.lowPriority"),
    "webhook": ("POST", "run", b'{"input": 1, "webhook": "ftp://a"}', 400, "webhook"),
    "webhook with a line's end": ("POST", "run", b'{"input": 1, "webhook": "http://a/\\r\\nX: 1"}', 400, "webhook"),
    "a number beyond all": ("POST", "run", b'{"input": 1e999}', 400, "1e999 is larger than any number"),
    "wait of 5,000 digits": ("POST", "runsync?wait=" + "9" * 5000, b'{"input": 1}', 400, "wait: '999"),
    "wait": ("POST", "runsync?wait=1", b'{"input": 1}', 400, "wait: '1'; milliseconds from 1000 to 300000"),
    "too long": ("POST", "run", LONG, 413, "10000000 bytes at most, found 10000013"),
    "unknown job": ("GET", "status/nope", None, 404, "there is no job 'nope'"),
    "unknown job's stream": ("GET", "stream/nope", None, 404, "there is no job"),
    "unknown job to cancel": ("POST", "cancel/nope", None, 404, "there is no job"),
    "unknown route": ("GET", "nope", None, 404, "there is no route '/v2/local/nope'"),
    "method": ("GET", "run", None, 405, "does not take GET"),
    "endpoint": ("GET", "../other/health", None, 404, "there is no endpoint 'other'"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_is_wrong_is_refused_with_its_status_and_why(serve: Serve, case: str) -> None:
    method, path, body, code, message = REFUSED[case]
    async with serve.http.request(method, f"{serve.url}/{path}", data=body) as response:
        assert response.status == code
        assert message in (await response.json())["error"]


async def test_a_body_without_a_length_is_read_no_further_than_allowed(serve: Serve) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(LONG), 65_536):
            yield LONG[start : start + 65_536]

    async with serve.http.post(f"{serve.url}/run", data=pieces()) as response:
        assert response.status == 413


@pytest.mark.parametrize("path", ["health", "openai/v1/models"])
@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic cnBhOg==", "Bearer ключ"])
async def test_without_the_key_there_is_nothing(serve: Serve, path: str, header: str | None) -> None:
    async with aiohttp.ClientSession() as stranger:
        headers = {} if header is None else {"Authorization": header}
        async with stranger.get(f"{serve.url}/{path}", headers=headers) as response:
            assert response.status == 401
            assert "Authorization: Bearer" in await response.text()
        # The platform's own examples send the bare key, and Anthropic's clients know no other header than theirs.
        for own in ({"Authorization": KEY}, {"x-api-key": KEY}):
            async with stranger.get(f"{serve.url}/health", headers=own) as response:
                assert response.status == 200


async def test_too_many_requests_are_told_when_to_come_back(serve: Serve) -> None:
    codes = []
    for _ in range(3):
        async with serve.http.post(f"{serve.url}/purge-queue") as response:
            codes.append(response.status)
            after = response.headers.get("Retry-After")
    assert codes == [200, 200, 429]
    assert 1 <= int(after or 0) <= 10


async def test_a_job_whose_workers_die_is_tried_twice_then_fails_and_can_be_retried(
    tmp_path: Path, handler: str
) -> None:
    async with Serve(tmp_path, "--handler", handler, "--workers", "1") as serve:
        job_id = await serve.run({"die": True})
        ended = await serve.ended(job_id)
        assert ended["status"] == "FAILED"
        assert ended["error"] == "worker-2 ended with exit code 3 while it ran the job; it was tried 2 times"
        assert (await serve.get("health"))["jobs"] == {
            "completed": 0, "failed": 1, "inProgress": 0, "inQueue": 0, "retried": 1,
        }  # fmt: skip
        assert await serve.post(f"retry/{job_id}") == {"id": job_id, "status": "IN_QUEUE"}
        assert (await serve.ended(job_id))["status"] == "FAILED"
        read = tmp_path / "read"
        half = await serve.run({"chunks": 2, "until": str(read), "die": True})
        while not (await serve.get(f"stream/{half}"))["stream"]:
            await asyncio.sleep(0.05)
        read.touch()
        ended = await serve.ended(half)
        assert "some of its output had been delivered, so it was not tried again" in ended["error"]
        assert (await serve.post("runsync", {"input": {}}))["status"] == "COMPLETED"


async def test_a_restart_after_sigkill_loses_no_job_and_leaves_no_worker(tmp_path: Path, handler: str) -> None:
    async with Serve(tmp_path, "--handler", handler) as first:
        await first.says("worker-1 takes jobs")
        done = await first.run({"chunks": 2})
        before = await first.ended(done)
        jobs = [await first.run({"seconds": 0.5}) for _ in range(20)]  # 8 of them run
        first.process.send_signal(signal.SIGKILL)
        await first.process.wait()
        await until(lambda: first.processes() == [], 60)
    async with Serve(tmp_path, "--handler", handler) as second:
        assert await second.get(f"status/{done}") == before
        assert len((await second.get(f"stream/{done}"))["stream"]) == 2
        states = [(await second.ended(job))["status"] for job in jobs]
        assert states == ["COMPLETED"] * 20


async def test_ctrl_c_ends_it_and_keeps_what_waits_and_what_runs(tmp_path: Path, handler: str) -> None:
    async with Serve(tmp_path, "--handler", handler) as first:
        await first.says("worker-1 takes jobs")
        end = tmp_path / "end"
        ends, outlasts = await first.run({"until": str(end)}), await first.run({"seconds": 60})
        while (await first.get("health"))["jobs"]["inProgress"] < 2:
            await asyncio.sleep(0.05)
        first.process.send_signal(signal.SIGINT)
        await first.says("2 jobs may run on for 10 s")
        end.touch()
        code, answer = await first.call("POST", "run", {"input": {}})
        assert (code, answer) == (503, {"error": "this endpoint is about to stop"})
        assert (await first.ended(ends))["status"] == "COMPLETED"
        assert await first.end() == 0  # at the second Ctrl-C
        assert "for the next start: 1 job\n" in first.log
        assert first.processes() == []
    async with Serve(tmp_path, "--handler", handler, "--workers", "0") as second:
        assert (await second.get(f"status/{ends}"))["status"] == "COMPLETED"
        assert (await second.get(f"status/{outlasts}"))["status"] in {"IN_QUEUE", "IN_PROGRESS"}
        assert (await second.post(f"cancel/{outlasts}"))["status"] == "CANCELLED"


async def test_who_waits_on_a_connection_at_a_forced_stop_is_told_so(tmp_path: Path, handler: str) -> None:
    async with Serve(tmp_path, "--handler", handler) as serve:
        await serve.says("worker-1 takes jobs")
        streamed = await serve.run({"chunks": 1, "seconds": 60})
        while not (await serve.get(f"stream/{streamed}"))["stream"]:
            await asyncio.sleep(0.05)

        async def stream() -> list[tuple[int, str]]:
            seen = []
            while serve.process.returncode is None:
                with contextlib.suppress(aiohttp.ClientConnectionError):
                    code, answer = await serve.call("GET", f"stream/{streamed}")
                    seen.append((code, answer["status"]))
            return seen

        running = [
            asyncio.create_task(serve.call("POST", "runsync", {"input": {"seconds": 60}})),
            asyncio.create_task(serve.call("POST", "openai/v1/chat/completions", {"seconds": 60})),
        ]
        streaming = asyncio.create_task(stream())
        while (await serve.get("health"))["jobs"]["inProgress"] < 3:
            await asyncio.sleep(0.05)
        serve.process.send_signal(signal.SIGINT)
        await serve.says("3 jobs may run on")
        assert await serve.end() == 0
        (code, answer), refused = [await task for task in running]
        assert code == 503
        assert re.fullmatch(
            r"this endpoint is about to stop; job sync-\S+ is run after its next start", answer["error"]
        )
        error = {"message": "this endpoint is about to stop", "type": "ServiceUnavailableError"}
        assert refused == (503, {"error": error | {"param": None, "code": 503}})
        states = await streaming
        assert {code for code, _ in states} == {200}
        assert states[-1] == (200, "FAILED")
        assert "Traceback" not in serve.log
    async with Serve(tmp_path, "--handler", handler, "--workers", "0") as serve:
        status = await serve.get(f"status/{streamed}")
        assert status["status"] == "FAILED"
        assert status["error"].startswith("worker-1 was stopped while it ran the job; some of its output")
        sync = re.search(r"sync-\S+", answer["error"])
        assert sync is not None
        assert (await serve.get(f"status/{sync[0]}"))["status"] in {"IN_QUEUE", "IN_PROGRESS"}
        await serve.post(f"cancel/{sync[0]}")


async def streamed(
    serve: Serve, body: dict[str, Any], leave_after: int = 0, events: list[str] | None = None
) -> list[str]:
    """Return the events of an OpenAI stream, the first ones if the client leaves; `events` has them as they come."""
    events = [] if events is None else events
    async with serve.http.post(f"{serve.url}/openai/v1/chat/completions", json=body | {"stream": True}) as response:
        assert response.status == 200
        async for line in response.content:
            events += [line.decode().strip()] if line.strip() else []
            if len(events) == leave_after:
                break
    return events


async def test_two_hundred_openai_streams_at_once_come_whole_or_end_with_why(tmp_path: Path, handler: str) -> None:
    async with Serve(tmp_path, "--handler", handler, "--max-workers", "2") as serve:
        await serve.says("worker-1 takes jobs")
        await serve.http.close()
        connector = aiohttp.TCPConnector(limit=0)
        serve.http = aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}, connector=connector)
        body = {"chunks": 5, "pause": 0.01}
        streams = await asyncio.gather(*[streamed(serve, body) for _ in range(200)])
        assert streams == [[f"data: {number}" for number in range(5)]] * 200

        forever = {"chunks": 10_000, "pause": 0.05}
        assert await streamed(serve, forever, leave_after=2) == ["data: 0", "data: 1"]
        while (await serve.get("health"))["jobs"]["inProgress"]:
            await asyncio.sleep(0.05)  # the job ends with its client

        seen: list[list[str]] = [[] for _ in range(4)]
        streams = [asyncio.create_task(streamed(serve, forever, events=events)) for events in seen]
        await until(lambda: all(len(events) > 2 for events in seen))
        for leader in serve.workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(leader, signal.SIGKILL)
        for stream in streams:
            *events, last = await stream
            assert events == [f"data: {number}" for number in range(len(events))] != []
            error = json.loads(last.removeprefix("data: "))["error"]
            assert error["code"] == 500
            assert "was ended by SIGKILL while it ran the job; some of its output" in error["message"]


async def test_a_stream_that_ended_long_ago_is_cancelled_nowhere() -> None:
    job, cancelled, sent = Job("one", 0, b""), [], []
    job.add_chunk("data: 1\n\n")
    job.end(JobState.COMPLETED)

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.Event().wait()

    await _Events(job, cancelled.append)({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)
    assert [message.get("body") for message in sent] == [None, b"data: 1\n\n", b""]
    assert cancelled == []


async def test_workers_come_from_zero_as_requests_do_and_go_when_idle(tmp_path: Path, handler: str) -> None:
    scaling = ["--workers", "0", "--max-workers", "2", "--idle-timeout", "0.5"]
    rule = ["--scaler", "request-count", "--scaler-value", "1"]
    async with Serve(tmp_path, "--handler", handler, *scaling, *rule) as serve:
        assert (await serve.get("health"))["workers"]["ready"] == serve.workers.__len__() == 0
        await serve.run({"seconds": 0.1}, policy={"lowPriority": True})
        await asyncio.sleep(0.5)
        assert serve.workers == []
        jobs = [await serve.run({"seconds": 0.1}) for _ in range(6)]
        for job in jobs:
            assert (await serve.ended(job))["status"] == "COMPLETED"
        assert len(serve.workers) == 2
        await until(lambda: serve.log.count("was idle for 0.5 s and is stopped") == 2)
        await until(lambda: serve.processes() == [])
        assert (await serve.get("health"))["workers"]["ready"] == 0


async def test_by_queue_delay_workers_come_one_by_one_up_to_the_most_and_all_go(tmp_path: Path, handler: str) -> None:
    scaling = ["--workers", "0", "--max-workers", "2", "--idle-timeout", "0.5", "--scaler-value", "0.3"]
    async with Serve(tmp_path, "--handler", handler, *scaling) as serve:
        both = tmp_path / "both"
        jobs = [await serve.run({"until": str(both)}) for _ in range(48)]  # a worker runs 8 at a time
        await serve.says("worker-2 takes jobs")
        both.touch()
        ended = [await serve.ended(job) for job in jobs]
        assert {status["status"] for status in ended} == {"COMPLETED"}
        assert {status["workerId"] for status in ended} == {"worker-1", "worker-2"}
        order = ["worker-1 starts", "worker-1 takes jobs", "worker-2 starts", "worker-2 takes jobs"]
        assert sorted(order, key=serve.log.index) == order
        await until(lambda: serve.log.count("was idle for 0.5 s and is stopped") == 2)
        await until(lambda: serve.processes() == [])
        assert len(serve.workers) == 2  # never more, whatever waited
        again = await serve.run({})
        assert (await serve.ended(again))["workerId"] == "worker-3"


async def test_a_handler_that_does_not_start_is_said_and_not_started_again_at_once(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no model here')")
    async with Serve(tmp_path, "--handler", str(broken)) as serve:
        await serve.says("worker-2 ended with exit code 1; the end of its log:\n    no model here")
        assert len(serve.workers) == 2
        assert (await serve.get("health"))["workers"]["unhealthy"] == 1


BOOTS_WHEN_MENDED = """
import pathlib, sys, runpod

if not pathlib.Path(__file__).with_name("mended").exists():
    print("coldsnap: MAX_MODEL_LEN: 4 is too short", file=sys.stderr)
    print("[a last word of something else]")
    sys.exit(1)

async def handler(job):
    yield job["input"]

runpod.serverless.start({"handler": handler, "return_aggregate_stream": True})
"""


async def test_while_no_worker_boots_who_waits_is_told_why_and_what_is_queued_runs_when_it_is_mended(
    tmp_path: Path,
) -> None:
    path = tmp_path / "handler.py"
    path.write_text(BOOTS_WHEN_MENDED)
    async with Serve(tmp_path, "--handler", str(path), "--workers", "0", "--max-workers", "2") as serve:
        body = {"input": 1}
        queued, openai, sync = await asyncio.gather(
            serve.run(1), serve.call("POST", "openai/v1/chat/completions", body), serve.post("runsync", body)
        )
        why = "workers do not start: 3 boots in a row failed, the last with: MAX_MODEL_LEN: 4 is too short"
        error = {"message": why, "type": "ServiceUnavailableError", "param": None, "code": 503}
        assert openai == (503, {"error": error})
        assert (sync["status"], sync["error"]) == ("FAILED", why)
        log = serve.state.parent / "workers" / "worker-3.log"
        assert f"coldsnap: {why} ({log}); the next in 4 s; waiting for one: 1 job\n" in serve.log
        health = await serve.get("health")
        assert (health["workers"]["unhealthy"], health["workers"]["initializing"], health["error"]) == (1, 0, why)
        async with serve.http.post(f"{serve.url}/runsync", json=body) as response:
            assert (response.status, await response.json()) == (503, {"error": why})
            assert 1 <= int(response.headers["Retry-After"]) <= 4
        assert (await serve.get(f"status/{queued}"))["status"] == "IN_QUEUE"
        (tmp_path / "mended").touch()
        assert (await serve.ended(queued))["output"] == [1]
        health = await serve.get("health")
        assert (health["workers"]["unhealthy"], health["workers"]["ready"], "error" in health) == (0, 1, False)


async def test_a_worker_that_runs_goes_on_while_others_do_not_boot(tmp_path: Path) -> None:
    path = tmp_path / "handler.py"
    path.write_text('import os\nassert os.environ["RUNPOD_POD_ID"] == "worker-1", "no room"\n' + HANDLER)
    async with Serve(tmp_path, "--handler", str(path), "--workers", "2") as serve:
        await serve.says("workers do not start: 3 boots in a row failed, the last with: AssertionError: no room")
        assert (await serve.post("runsync", {"input": {}}))["status"] == "COMPLETED"
        health = (await serve.get("health"))["workers"]
        assert (health["unhealthy"], health["ready"]) == (1, 1)


async def test_of_boots_that_failed_the_newest_logs_are_kept(tmp_path: Path) -> None:
    logs, said = tmp_path / "workers", []
    logs.mkdir()
    for number in range(1, 31):
        (logs / f"worker-{number}.log").touch()
        os.utime(logs / f"worker-{number}.log", (number, number))
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no model here')")
    async with keeping(tmp_path / "db") as endpoint:
        fleet = Fleet(endpoint, broken, os.environ, logs, said.append)
        endpoint.stopping = True
        await fleet.run()
        kept = {log.name for log in logs.iterdir()}
        assert kept == {f"worker-{number}.log" for number in range(21, 31)}
        endpoint.stopping = False
        for _ in range(12):
            await fleet._start()
        await asyncio.gather(*fleet._watches)
    assert len({log.name for log in logs.iterdir()} - kept) == 10
    assert "12 boots in a row failed, the last with: no model here" in said[-1]


async def test_a_worker_that_ends_on_a_full_disk_and_can_say_nothing_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, said = tmp_path / "silent.py", []
    silent.write_text("raise SystemExit(1)")
    monkeypatch.setattr("coldsnap.desk.serve.fleet._LOG_ROOM", float("inf"))
    async with keeping(tmp_path / "db") as endpoint:
        fleet = Fleet(endpoint, silent, os.environ, tmp_path / "logs", said.append)
        await fleet._start()
        await asyncio.gather(*fleet._watches)
    why = rf"worker-1 ended with exit code 1, and the disk of its log, {tmp_path}/logs, has \d+ bytes left"
    assert re.fullmatch(f"{why}; its log is empty", said[-1])
    assert re.fullmatch(why, endpoint.boots.why)


async def test_a_worker_s_reason_is_its_own_sentence_or_its_last_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    cases = {
        b"coldsnap: a warning\ncoldsnap: WHY: because\nINFO more\n\n": "WHY: because",
        b"Traceback (most recent call last):\n  File\nValueError: x\n": "ValueError: x",
        b"\xff\n": "\ufffd",
        b"\n \n": None,
    }
    for text, expected in cases.items():
        log.write_bytes(text)
        assert reason(log) == expected
    assert reason(tmp_path / "removed") is None


async def test_wrong_options_are_one_line(tmp_path: Path, serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = {
            ("--port", port): f"coldsnap: --host 127.0.0.1 --port {port}: Address already in use\n",
            ("--port", "0", "--state", str(serve.state)): f"coldsnap: --state {serve.state}: in use by another "
            "`coldsnap serve`; name another file\n",
            ("--workers", "2", "--max-workers", "1"): "coldsnap: --max-workers 1: fewer than --workers 2\n",
            ("--handler", "nowhere.py"): "coldsnap: --handler nowhere.py: there is no such file\n",
            ("--handler", "/tmp"): "coldsnap: --handler /tmp: that is not a file\n",
            ("--host", "nowhere.invalid"): "coldsnap: --host nowhere.invalid --port 8000: ",
            (
                "--scaler=request-count",
                "--scaler-value",
                "0",
            ): "coldsnap: --scaler-value 0: at least 1 request for each",
            ("--endpoint", "a/b"): "coldsnap: --endpoint 'a/b': letters, digits and - are expected\n",
        }
        for options, message in cases.items():
            given = ["serve", "--state", str(tmp_path / "x.db"), *options]
            command = [sys.executable, "-c", "import sys; from coldsnap.cli import main; sys.exit(main())", *given]
            environ = os.environ | {"PYTHONPATH": str(ROOT / "src")}
            ended = await asyncio.to_thread(subprocess.run, command, env=environ, capture_output=True, text=True)
            assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
            assert ended.stderr.startswith(message)
            assert "rror -" not in ended.stderr


def foreign(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE job (name)")


def newer(path: Path) -> None:
    Store(path, print).__exit__()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 99")


def of_another_release(path: Path) -> None:
    with Store(path, print) as store:
        store.add(Job("one", 0, b"{}"))
        store._db.execute("""UPDATE job SET terms = '{"colour": 1}'""")


def damaged(path: Path) -> None:
    with Store(path, print) as store:
        for number in range(50):
            store.add(Job(f"job-{number}", number, b"x" * 500))
    data = bytearray(path.read_bytes())
    data[4096:8192] = b"?" * 4096
    path.write_bytes(data)


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda path: path.write_text("some text\n" * 100), "cannot be used: file is not a database; name another"),
    "foreign": (foreign, "the database of another program; name another file"),
    "newer": (newer, "made by a newer coldsnap; name another file"),
    "damaged": (damaged, "the file is damaged"),
    "of another release": (of_another_release, "job one cannot be read (Terms.__init__() got an unexpected keyword"),
    "a folder": (Path.mkdir, "that is not a file; name one, which need not be there"),
    "below a file": (lambda path: path.parent.touch(), "cannot be used: {parent}: File exists"),
}


@pytest.mark.parametrize("case", UNUSABLE)
async def test_a_state_file_that_is_none_is_said_and_left_as_it_is(tmp_path: Path, case: str) -> None:
    make, why = UNUSABLE[case]
    path = tmp_path / "sub" / "serve.db"
    if case != "below a file":
        path.parent.mkdir()
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(ServeError) as refused, Store(path, print) as store:
        store.jobs()
    assert str(refused.value).startswith(f"--state {path}: {why.format(parent=path.parent)}")
    assert before == (path.read_bytes() if path.is_file() else None)


async def test_a_new_folder_for_the_state_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    for _ in range(2):
        Store(tmp_path / "new" / "one" / "serve.db", said.append).__exit__()
    assert said == [f"made the folder {tmp_path}/new/one for --state"]


async def test_logs_that_cannot_be_written_are_a_boot_that_failed(tmp_path: Path, handler: str) -> None:
    (tmp_path / "workers").touch()
    async with Serve(tmp_path, "--handler", handler) as serve:
        await serve.says("worker-1 could not be started: .*File exists: '.*/workers'; the next in 1 s")
        (tmp_path / "workers").unlink()
        assert (await serve.post("runsync", {"input": {}}))["status"] == "COMPLETED"


# The clock, in this process.


@contextlib.asynccontextmanager
async def keeping(
    path: Path,
    scaling: Scaling = Scaling(),  # noqa: B008
    *,
    private_webhooks: bool = False,
    **queue: Any,
) -> AsyncIterator[Endpoint]:
    said: list[str] = []
    with Store(path, said.append) as store:
        async with (
            ControlPlane(journal=store) as plane,
            Endpoint(plane, store, scaling, said.append, private_webhooks=private_webhooks, **queue) as endpoint,
        ):
            yield endpoint
    assert said == []


async def test_a_job_that_nobody_takes_times_out_and_its_result_expires_everywhere(tmp_path: Path) -> None:
    async with keeping(tmp_path / "db") as endpoint:
        job = endpoint.plane.submit(1, terms=Terms(ttl=0.3, retention=0.3, durable=True))
        assert await job.ended(60)
        assert status(job) == {
            "id": job.id, "status": "TIMED_OUT", "error": "the job did not end within its time to live of 0.3 s",
        }  # fmt: skip
        await until(lambda: job.id not in endpoint.plane.jobs)
    async with keeping(tmp_path / "db") as endpoint:
        assert endpoint.plane.jobs == {}


async def test_a_webhook_hears_what_status_says_and_is_called_again_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coldsnap.desk.serve.endpoint._WEBHOOK_SECONDS", 0.1)
    heard: list[Any] = []

    async def hear(request: web.BaseRequest) -> web.Response:
        heard.append(json.loads(await request.read()))
        return web.Response(status=500 if len(heard) == 1 else 200)

    runner = web.ServerRunner(web.Server(hear))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with keeping(tmp_path / "db", private_webhooks=True) as endpoint:
        address = f"http://127.0.0.1:{runner.addresses[0][1]}/"
        job = endpoint.plane.submit(1, terms=Terms(webhook=address, durable=True))
        endpoint.plane.cancel(job.id)
        await until(lambda: len(heard) == 2)
        assert heard == [{"id": job.id, "status": "CANCELLED", "error": "the job was cancelled"}] * 2
    async with keeping(tmp_path / "db"):
        await asyncio.sleep(0.6)  # a restart does not call again
    assert len(heard) == 2
    await runner.cleanup()


async def test_a_webhook_leads_to_no_private_address_and_follows_no_redirect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coldsnap.desk.serve.endpoint._WEBHOOK_SECONDS", 0.01)
    heard: list[str] = []

    async def hear(request: web.BaseRequest) -> web.Response:
        heard.append(request.path)
        return web.Response(status=307, headers={"Location": "/secret"})

    runner = web.ServerRunner(web.Server(hear))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    said: list[str] = []

    async def call(host: str, *, private: bool = False) -> str:
        said.clear()
        with Store(tmp_path / "db", said.append) as store:
            async with (
                ControlPlane(journal=store) as plane,
                Endpoint(plane, store, Scaling(), said.append, private_webhooks=private),
            ):
                plane.cancel(plane.submit(1, terms=Terms(webhook=f"http://{host}:{port}/hook")).id)
                await until(lambda: bool(said))
        return said[0]

    for host in ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "127.1", "169.254.169.254"):
        assert "not public" in await call(host), host
    assert heard == []
    assert "HTTP 307" in await call("127.0.0.1", private=True)
    assert heard == ["/hook"] * 3
    await runner.cleanup()


async def test_after_a_restart_what_ran_waits_again_unless_a_client_has_a_part_of_it(tmp_path: Path) -> None:
    async with keeping(tmp_path / "db", Scaling(most=1)) as endpoint:
        jobs = [endpoint.plane.submit(n, terms=Terms(durable=True)) for n in range(3)]
        jobs[1].take("w")
        jobs[1].add_chunk("a")
        jobs[1].unread()
        endpoint.plane.note(jobs[1])
        jobs[2].take("w")
        endpoint.plane.note(jobs[2])
    async with keeping(tmp_path / "db") as endpoint:
        again = [endpoint.plane.jobs[job.id] for job in jobs]
        assert [job.state for job in again] == [JobState.IN_QUEUE, JobState.FAILED, JobState.IN_QUEUE]
        assert "some of its output had been delivered" in (again[1].error or "")
        assert [job.id for job in endpoint.plane.queue] == [jobs[0].id, jobs[2].id]
        assert json.loads(again[2].payload) == {"id": jobs[2].id, "input": 2}


async def test_counts_of_jobs_outlive_the_process(tmp_path: Path) -> None:
    async with keeping(tmp_path / "db") as endpoint:
        for durable in (True, False):
            endpoint.plane.cancel(endpoint.plane.submit(1, terms=Terms(durable=durable)).id)
        failed = endpoint.plane.submit(1, terms=Terms(durable=True))
        endpoint.plane.stop(failed, JobState.TIMED_OUT, "it took too long")
        endpoint.retry(failed)
        before = dict(endpoint.plane.counts)
    assert before == {"CANCELLED": 2, "TIMED_OUT": 1, "retried": 1}
    async with keeping(tmp_path / "db") as endpoint:
        assert endpoint.plane.counts == before
        endpoint.plane.cancel(failed.id)
        assert endpoint.plane.counts["CANCELLED"] == 3


async def test_a_stream_counts_as_a_request_until_its_end(tmp_path: Path) -> None:
    throttle = Throttle({"openai": Rate(100, 1)})
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v2/local/openai/v1/completions"
    async with contextlib.AsyncExitStack() as stack:
        endpoint = await stack.enter_async_context(keeping(tmp_path / "db"))
        fleet = Fleet(endpoint, tmp_path / "handler.py", {}, tmp_path, print)
        await stack.enter_async_context(served(Api(endpoint, fleet, KEY, throttle).application(), listener))
        wait, headers = aiohttp.ClientTimeout(total=20), {"Authorization": f"Bearer {KEY}"}
        http = await stack.enter_async_context(aiohttp.ClientSession(headers=headers, timeout=wait))
        worker = endpoint.plane.see("w")

        async def began() -> Job:
            await until(lambda: len(endpoint.plane.queue) == 1)
            (job,) = endpoint.plane.take(worker, 1)
            job.add_chunk("data: 1\n\n")
            return job

        for ends in (True, False):
            asking = asyncio.create_task(http.post(url, json={"stream": True}))
            job = await began()
            async with await asking as first:
                assert await first.content.readline() == b"data: 1\n"
                async with http.post(url, json={"stream": True}) as second:
                    assert (second.status, second.headers["Retry-After"]) == (429, "1")
                    assert "/openai takes 1 requests at the same time" in await second.text()
                if ends:
                    endpoint.plane.end(job, JobState.COMPLETED)
                    assert await first.read() == b"\n"
                else:
                    first.close()  # its client goes away
            await until(lambda job=job: job.done)
        asking = asyncio.create_task(http.post(url, json={}))
        endpoint.plane.end(await began(), JobState.COMPLETED, output=["{}"])
        async with await asking as last:
            assert last.status == 200


async def test_a_full_queue_takes_no_more(tmp_path: Path) -> None:
    async with keeping(tmp_path / "db", Scaling(most=1)) as endpoint:
        submission = Submission(None, {}, Terms())
        for _ in range(501):
            endpoint.submit(submission, sync=False)
        with pytest.raises(Refused, match="501 jobs wait; with 1 workers at most no more than 500 may") as refused:
            endpoint.submit(submission, sync=False)
        assert (refused.value.status, refused.value.retry_after) == (429, 10)


async def test_a_queue_is_as_long_as_max_queue_says_and_a_job_waits_max_queue_seconds_at_most(tmp_path: Path) -> None:
    async with keeping(tmp_path / "db", max_queue=2, max_queue_seconds=0.5) as endpoint:
        submission = Submission(None, {}, Terms())
        jobs = [endpoint.submit(submission, sync=False) for _ in range(2)]
        with pytest.raises(Refused, match="2 jobs wait, MAX_QUEUE=2; send it again later") as refused:
            endpoint.submit(submission, sync=False)
        assert (refused.value.status, refused.value.type) == (429, "TooManyRequestsError")
        endpoint.plane.take(endpoint.plane.see("worker-1"), 1)
        assert await jobs[1].ended(60)
        error = json.loads(jobs[1].error or "")["error"]
        assert (error["code"], error["type"]) == (429, "TooManyRequestsError")
        assert "MAX_QUEUE_SECONDS=0.5" in error["message"]
        assert jobs[0].state is JobState.IN_PROGRESS  # one that runs may run
        endpoint.plane.again(jobs[0], "its worker died")
        await asyncio.sleep(1)
        assert jobs[0].state is JobState.IN_QUEUE  # it has waited its turn


async def test_who_waits_too_long_or_is_one_too_many_gets_429_from_serve(tmp_path: Path) -> None:
    (tmp_path / "handler.py").write_text("import time\ntime.sleep(600)\n")  # a long cold start
    environ = dict(os.environ) | {"MAX_QUEUE": "1", "MAX_QUEUE_SECONDS": "1.5"}
    async with Serve(tmp_path, "--handler", str(tmp_path / "handler.py"), environ=environ) as serve:
        waits = asyncio.create_task(serve.call("POST", "openai/v1/chat/completions", {"messages": []}))
        while (await serve.get("health"))["jobs"]["inQueue"] == 0:
            await asyncio.sleep(0.02)
        async with serve.http.post(f"{serve.url}/run", json={"input": {}}) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
            assert "MAX_QUEUE=1" in (await answer.json())["error"]
        code, body = await waits
        assert (code, body["error"]["code"], body["error"]["type"]) == (429, 429, "TooManyRequestsError")
        assert "MAX_QUEUE_SECONDS=1.5" in body["error"]["message"]
        job = await serve.run({})  # there is room again
        assert (await serve.ended(job))["status"] == "FAILED"


async def test_a_client_that_sends_nothing_or_half_a_request_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_HEADER_SECONDS", 0.1)
    monkeypatch.setattr(server, "_BODY_SECONDS", 0.2)

    async def echo(request: Request) -> Response:
        return Response(await request.body())

    listener = socket.create_server(("127.0.0.1", 0))
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n"
    async with server.served(Starlette(routes=[Route("/", echo, methods=["POST"])]), listener):
        for sent in (b"", head, head + b"\r\n1"):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(sent)
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.wait_for(reader.read(), 30) == b""
            writer.close()
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(head + b"\r\n12")
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        writer.close()
