"""`coldsnap bench` against servers on loopback that do what they are told, good and bad."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from coldsnap.cli import main
from tests.loopback.desk.serving import ROOT

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
IDS = list(range(100, 140))
KEY = "sk-right"


LAST = {"text": "b", "finish_reason": "length", "usage": {"prompt_tokens": 9, "completion_tokens": 2}}
JOB: list[Any] = [
    {"status": "IN_QUEUE", "stream": []},
    {"status": "IN_PROGRESS", "stream": [{"output": {"text": "a"}}]},
    {"status": "COMPLETED", "stream": [{"output": LAST | {"cost": {"gpu_seconds": 0.5}}}]},
]


class Server:
    """An OpenAI server in a thread. `answers` are what the requests get, in turn; the last one goes on."""

    def __init__(self) -> None:
        self.answers: list[Handler] = [tokens()]
        self.bodies: list[dict[str, Any]] = []
        self.tokenizer = True
        self.models: list[str] = ["m1", "m2"]
        self.polls: list[list[Any]] = [JOB]
        self.jobs: dict[str, list[Any]] = {}
        self.cancelled: list[str] = []
        self.output: Any = None
        """What a job of /runsync gives, when its status is asked for."""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(60)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/v1/completions", self._answer)
        app.router.add_get("/v2/e/health", self._models)
        app.router.add_post("/v2/e/run", self._run)
        app.router.add_post("/v2/e/runsync", self._runsync)
        app.router.add_get("/v2/e/status/late", self._status)
        app.router.add_get("/v2/e/stream/{job}", self._poll)
        app.router.add_post("/v2/e/cancel/{job}", self._cancel)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{port}/v1"
        self.endpoint = f"http://127.0.0.1:{port}/v2/e"
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization", f"Bearer {KEY}") != f"Bearer {KEY}":
            return web.json_response({"error": {"message": "no such key", "type": "auth"}}, status=401)
        return web.json_response({"data": [{"id": name} for name in self.models]})

    async def _tokenize(self, _: web.Request) -> web.Response:
        if not self.tokenizer:
            return web.json_response({"detail": "Not Found"}, status=404)
        return web.json_response({"count": len(IDS), "tokens": IDS})

    # The platform's job API: a job is what its polls are answered with, in turn.

    async def _run(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.json())
        job = str(len(self.jobs))
        self.jobs[job] = list(self.polls.pop(0) if len(self.polls) > 1 else self.polls[0])
        return web.json_response({"id": job, "status": "IN_QUEUE"})

    async def _runsync(self, _: web.Request) -> web.Response:
        if self.output is None:
            return web.json_response({"detail": "Not Found"}, status=404)
        return web.json_response({"id": "late", "status": "IN_QUEUE"})

    async def _status(self, _: web.Request) -> web.Response:
        return web.json_response({"id": "late", "status": "COMPLETED", "output": self.output})

    async def _poll(self, request: web.Request) -> web.Response:
        left = self.jobs[request.match_info["job"]]
        if (answer := left.pop(0) if left else None) is None:
            await asyncio.sleep(60)
        if isinstance(answer, int):
            return web.json_response({"error": "too many"}, status=answer, headers={"Retry-After": "0"})
        return web.json_response(answer)

    async def _cancel(self, request: web.Request) -> web.Response:
        self.cancelled.append(request.match_info["job"])
        return web.json_response({"status": "CANCELLED"})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return await answer(request)


async def stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    return response


def tokens(wait: float = 0.0, *, usage: bool = True, end: bool = True, text: str = "a", **more: Any) -> Handler:
    """Answer with as many tokens as are asked for, after `wait` seconds; `end` is whether the answer ends well."""

    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = body["prompt"]
        await asyncio.sleep(wait)
        response = await stream(request)
        for number in range(body["max_tokens"]):
            last = end and number == body["max_tokens"] - 1
            event = {"choices": [{"text": text, "finish_reason": "length" if last else None}]}
            await response.write(b"data: %b\n\n" % json.dumps(event).encode())
        count = len(prompt) if isinstance(prompt, list) else 3 * len(prompt.split()) + 4
        if usage:
            used = {"prompt_tokens": count, "completion_tokens": body["max_tokens"]}
            await response.write(b"data: %b\n\n" % json.dumps({"choices": [], "usage": used, **more}).encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    return answer


def status(code: int, message: str) -> Handler:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"error": {"message": message, "type": "T", "code": code}}, status=code)

    return answer


async def hang_up(request: web.Request) -> web.StreamResponse:
    response = await stream(request)
    await response.write(b'data: {"choices": [{"text": "a"}]}\n\n')
    assert request.transport is not None
    request.transport.abort()
    return response


async def error_amid_the_stream(request: web.Request) -> web.StreamResponse:
    response = await stream(request)
    await response.write(b'data: {"error": {"message": "engine died", "type": "EngineDeadError", "code": 500}}\n\n')
    return response


async def page_of_a_proxy(_: web.Request) -> web.Response:
    return web.Response(text="<html><h1>Bad gateway</h1></html>", status=502, content_type="text/html")


async def plain(_: web.Request) -> web.Response:
    return web.json_response({"choices": [{"text": "not streamed"}]})


async def never(_: web.Request) -> web.Response:
    await asyncio.sleep(60)
    raise AssertionError


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def bench(server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Return a way to run it: its exit code, output, errors and, if it got that far, its JSON."""

    def run(*options: str, url: str | None = None) -> dict[str, Any]:
        found = tmp_path / "found.json"
        code = main(["bench", url or server.url, "--warmup", "0", "--json", str(found), *options])
        out, err = capfd.readouterr()
        told = json.loads(found.read_text("utf-8")) if found.exists() else None
        return {"code": code, "out": out, "err": err, "json": told}

    return run


Bench = Callable[..., dict[str, Any]]


def test_a_closed_loop_sends_exact_prompts_and_counts_what_the_server_counted(server: Server, bench: Bench) -> None:
    server.answers = [tokens(cost={"gpu_seconds": 0.25, "decode_gpu_seconds": 0.2, "usd": 0.001})]
    options = ("--prompt-tokens", "uniform:5:9", "--output-tokens", "4", "--slo", "e2e=60s", "--seed", "3")
    found = bench("--concurrency", "4", "--requests", "20", *options)
    assert found["code"] == 0
    summary = found["json"]["summary"]
    assert (summary["succeeded"], summary["failed"], summary["most_in_flight"]) == (20, 0, 4)
    assert summary["tokens"]["output"] == 80
    assert summary["tokens"]["prompt"] == summary["tokens"]["wished_prompt"]
    assert summary["good"]["share"] == 1.0
    assert summary["cost"]["usd"] == pytest.approx(0.02)
    assert "250 ms of GPU, $0.00100" in found["out"]
    load = server.bodies[1:]  # the first one greets
    assert len(load) == 20
    assert all(5 <= len(body["prompt"]) <= 9 and set(body["prompt"]) <= set(IDS) for body in load)
    assert all(body["ignore_eos"] and body["model"] == "m1" and body["max_tokens"] == 4 for body in load)
    rows = found["json"]["requests"]
    assert all(row["due"] <= row["sent"] <= row["first"] <= row["last"] <= row["end"] for row in rows)


def test_words_are_calibrated_where_there_is_no_tokenizer(server: Server, bench: Bench) -> None:
    server.tokenizer = False
    found = bench("--concurrency", "2", "--requests", "6", "--prompt-tokens", "304", "--model", "m2")
    assert found["json"]["prompts"] == "words"
    assert found["json"]["summary"]["tokens"]["prompt"] == 6 * 304  # 100 words of 3 tokens, and 4
    assert "prompts are made of words" in found["err"]
    assert {body["model"] for body in server.bodies} == {"m2"}


def test_in_an_open_loop_the_wait_for_room_is_a_requests_own(server: Server, bench: Bench) -> None:
    """A client that times requests from when they leave it would report 0.1 s for each of them."""
    server.answers = [tokens(0.1)]
    found = bench("--rate", "200", "--concurrency", "1", "--requests", "10", "--output-tokens", "1")
    rows = sorted(found["json"]["requests"], key=lambda row: row["number"])
    times = [row["first"] - row["due"] for row in rows]
    behind = [0.1 * (place + 1) - rows[place]["due"] for place in range(10)]
    assert all(time >= least - 0.001 for time, least in zip(times, behind, strict=True))
    assert found["json"]["summary"]["ttft"]["p50"] > 0.3
    assert "ms late or more" in found["out"]


def test_a_trace_is_replayed_with_its_lengths(server: Server, bench: Bench, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lengths = [(7, 1), (3, 2), (9, 3)]
    lines = [{"timestamp": 400 * n, "input_length": p, "output_length": o} for n, (p, o) in enumerate(lengths)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    found = bench("--trace", str(trace), "--speed", "4", "--warmup", "2")
    rows = sorted(found["json"]["requests"], key=lambda row: row["number"])
    assert [(row["prompt_tokens"], row["output_tokens"]) for row in rows] == lengths
    assert [row["due"] for row in rows] == pytest.approx([0.0, 0.1, 0.2])
    assert all(row["sent"] >= row["due"] for row in rows)
    assert len(server.bodies) == 1 + 2 + 3


def test_a_trace_that_is_wrong_at_its_end_is_found_before_anything_is_sent(
    server: Server, bench: Bench, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"time": 0, "prompt_tokens": 1, "output_tokens": 1}\n{"time": 1}\n')
    found = bench("--trace", str(trace))
    assert found["code"] == 1
    assert found["err"] == (
        f"coldsnap: {trace}, line 2: prompt_tokens: expected a whole number of at least 1, found no such field\n"
    )
    assert server.bodies == []


def test_a_duration_ends_the_load(server: Server, bench: Bench) -> None:
    server.answers = [tokens(0.02)]
    found = bench("--concurrency", "2", "--duration", "0.5")
    rows = found["json"]["requests"]
    assert 2 <= len(rows) <= 60
    assert all(row["due"] <= 0.5 for row in rows)


def test_errors_are_counted_by_kind_and_are_in_no_percentile(server: Server, bench: Bench) -> None:
    bad = [
        status(429, "slow down"), status(429, "slow down"), status(500, "oh"), hang_up, error_amid_the_stream,
        page_of_a_proxy, plain, tokens(end=False),
    ]  # fmt: skip
    server.answers = [tokens(), *bad, tokens(0.01)]
    found = bench("--concurrency", "1", "--requests", "12", "--html", str(Path(os.devnull)))
    assert found["code"] == 0
    summary = found["json"]["summary"]
    assert {each["kind"]: each["count"] for each in summary["failures"]} == {
        "HTTP 429 Too Many Requests": 2, "HTTP 500 Internal Server Error": 1, "connection lost": 1,
        "EngineDeadError": 1, "HTTP 502 Bad Gateway": 1, "not a stream": 1, "cut off": 1,
    }  # fmt: skip
    assert (summary["succeeded"], summary["failed"], summary["ttft"]["count"]) == (4, 8, 4)
    assert {each["kind"]: each["example"] for each in summary["failures"]}["HTTP 502 Bad Gateway"] == "Bad gateway"
    assert "slow down" in found["out"]


def test_a_request_without_an_end_times_out(server: Server, bench: Bench) -> None:
    server.answers = [tokens(), never, tokens()]
    found = bench("--concurrency", "2", "--requests", "4", "--timeout", "0.5")
    assert [(each["kind"], each["count"]) for each in found["json"]["summary"]["failures"]] == [("timeout", 1)]


def test_when_every_request_fails_so_does_the_command(server: Server, bench: Bench) -> None:
    server.answers = [tokens(), status(503, "no room")]
    found = bench("--rate", "100", "--requests", "5")
    assert found["code"] == 1
    assert found["json"]["summary"]["ttft"] is None
    assert "503" in found["out"]


def test_answers_without_text_or_usage_are_said(server: Server, bench: Bench) -> None:
    server.answers = [tokens(), tokens(text=""), tokens(usage=False), tokens(text="")]
    found = bench("--concurrency", "1", "--requests", "4", "--output-tokens", "3")
    notes = "\n".join(found["json"]["summary"]["notes"])
    assert "3 answers without any text" in notes
    assert "1 answer without usage" in notes
    assert found["json"]["summary"]["ttft"]["count"] == 4


class TestJobs:
    def test_a_native_job_is_run_and_its_stream_read(self, server: Server, bench: Bench) -> None:
        found = bench("--concurrency", "2", "--requests", "4", "--output-tokens", "2", url=server.endpoint)
        summary = found["json"]["summary"]
        assert (found["code"], summary["succeeded"], summary["tokens"]["output"]) == (0, 4, 8)
        assert summary["cost"]["gpu_seconds"] == 2.0
        assert found["json"]["transport"] == "jobs"
        job = server.bodies[-1]["input"]
        assert job["sampling_params"] == {"max_tokens": 2, "ignore_eos": True}
        assert isinstance(job["prompt"], str)
        assert server.cancelled == []

    def test_an_openai_request_is_a_job_whose_events_may_be_cut_anywhere(self, server: Server, bench: Bench) -> None:
        events = "".join(f"data: {json.dumps(event)}\n\n" for event in (
            {"choices": [{"text": "é", "finish_reason": "length"}]}, {"choices": [], "usage": LAST["usage"]},
        ))  # fmt: skip
        outputs = [{"output": events[:30]}, {"output": events[30:]}]
        server.polls = [[{"status": "COMPLETED", "stream": outputs}]]
        found = bench("--concurrency", "1", "--requests", "1", "--api", "completions", url=server.endpoint)
        assert (found["code"], found["json"]["summary"]["tokens"]["output"]) == (0, 2)
        assert server.bodies[-1]["input"]["openai_route"] == "/v1/completions"

    def test_a_poll_that_is_one_too_many_is_sent_again_and_said(self, server: Server, bench: Bench) -> None:
        server.polls = [JOB, JOB, [429, *JOB], JOB]
        found = bench("--concurrency", "1", "--requests", "3", "--output-tokens", "2", url=server.endpoint)
        assert found["json"]["summary"]["succeeded"] == 3
        assert "answered 1 poll of streams with 429" in "\n".join(found["json"]["summary"]["notes"])

    def test_a_job_that_fails_is_counted_by_its_state_with_its_reason(self, server: Server, bench: Bench) -> None:
        body = json.dumps({"error": {"message": "too long", "type": "BadRequestError", "code": 400}})
        failed = [{"status": "FAILED", "stream": [], "error": body}]
        server.polls = [JOB, JOB, failed, [{"status": "TIMED_OUT", "stream": []}], JOB]
        found = bench("--concurrency", "1", "--requests", "3", url=server.endpoint)
        failures = {each["kind"]: each["example"] for each in found["json"]["summary"]["failures"]}
        assert failures == {"job FAILED": "too long", "job TIMED_OUT": ""}
        assert server.cancelled == []

    def test_a_job_that_is_given_up_is_cancelled(self, server: Server, bench: Bench) -> None:
        server.polls = [JOB, JOB, JOB[:1], JOB]
        found = bench("--concurrency", "1", "--requests", "2", "--timeout", "0.5", url=server.endpoint)
        assert [each["kind"] for each in found["json"]["summary"]["failures"]] == ["timeout"]
        assert server.cancelled == ["2"]

    def test_a_model_that_is_not_served_is_an_error_of_the_option(self, server: Server, bench: Bench) -> None:
        body = json.dumps({"error": {"message": "model: 'x' is not served here", "type": "NotFoundError", "code": 404}})
        server.polls = [[{"status": "FAILED", "stream": [], "error": body}]]
        found = bench("--rate", "1", "--model", "x", url=server.endpoint)
        assert found["code"] == 1
        assert found["err"] == "coldsnap: --model: model: 'x' is not served here\n"


class TestWrong:
    def test_key(self, server: Server, bench: Bench) -> None:
        found = bench("--rate", "1", "--key", "wrong")
        assert found["code"] == 1
        assert "--key: 127.0.0.1" in found["err"]
        assert "refuses the key (HTTP 401 Unauthorized: no such key)" in found["err"]
        assert server.bodies == []

    def test_model(self, server: Server, bench: Bench) -> None:
        found = bench("--rate", "1", "--model", "other")
        assert found["code"] == 1
        assert "--model: 'other' is not served by" in found["err"]
        assert "served: m1, m2" in found["err"]

    def test_port(self, bench: Bench) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        found = bench("--rate", "1", url=f"http://127.0.0.1:{port}/v1")
        assert found["code"] == 1
        assert f"URL: 127.0.0.1:{port} takes no connection (Connection refused)" in found["err"]

    def test_host(self, bench: Bench) -> None:
        found = bench("--rate", "1", url="http://nowhere.invalid/v1")
        assert found["code"] == 1
        assert "URL: the host of http://nowhere.invalid/v1 is not known" in found["err"]

    def test_scheme(self, server: Server, bench: Bench) -> None:
        found = bench("--rate", "1", url=server.url.replace("http:", "https:"))
        assert found["code"] == 1
        assert "cannot be reached by https://" in found["err"]

    def test_path(self, server: Server, bench: Bench) -> None:
        found = bench("--rate", "1", url=server.url.replace("/v1", "/v2/local"))
        assert found["code"] == 1
        assert "is not there (HTTP 404" in found["err"]
        assert "expected https://api.runpod.ai/v2/<endpoint>" in found["err"]

    def test_server_that_hangs(self, server: Server, bench: Bench) -> None:
        server.answers = [never]
        found = bench("--rate", "1", "--timeout", "0.3")
        assert found["code"] == 1
        assert "--timeout: 127.0.0.1" in found["err"]

    def test_server_that_refuses_what_is_asked(self, server: Server, bench: Bench) -> None:
        server.answers = [status(400, "ignore_eos: unknown field")]
        found = bench("--rate", "1")
        assert found["code"] == 1
        assert "the first request to" in found["err"]
        assert "ignore_eos: unknown field" in found["err"]

    @pytest.mark.parametrize("option", ["--json", "--html"])
    def test_file_is_said_before_anything_is_sent(
        self, server: Server, bench: Bench, tmp_path: Path, option: str
    ) -> None:
        found = bench("--rate", "1", option, str(tmp_path / "none" / "file"))
        assert found["code"] == 1
        assert f"{option}: {tmp_path}/none/file cannot be written (No such file or directory)" in found["err"]
        found = bench("--rate", "1", option, str(tmp_path))
        assert f"{option}: {tmp_path} cannot be written (Is a directory)" in found["err"]
        assert server.bodies == []


def test_ctrl_c_shows_what_was_measured_so_far(server: Server, tmp_path: Path) -> None:
    server.answers = [*[tokens() for _ in range(8)], never]
    found = tmp_path / "found.json"
    code = "import sys; from coldsnap.cli import main; sys.exit(main())"
    options = ["--concurrency", "2", "--warmup", "0", "--json", str(found), "--html", str(tmp_path / "page.html")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "bench", server.url, *options], text=True, process_group=0,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while len(server.bodies) < 10:  # one greets, seven are answered, two hang
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    summary = json.loads(found.read_text("utf-8"))["summary"]
    assert (summary["succeeded"], summary["failed"], summary["unfinished"]) == (7, 0, 2)
    assert "7 of 7" in out
    assert "The load was stopped with 2 requests in flight, in no figure." in out
    assert (tmp_path / "page.html").read_text("utf-8").startswith("<!doctype html>")
