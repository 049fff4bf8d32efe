"""Chunks against a platform that refuses, fails and hangs up: real HTTP on loopback."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web

from coldsnap.jobs import egress
from coldsnap.jobs.egress import Egress

JOB = {"id": "job-1", "input": {}}


class Platform:
    """Answers POSTs with the statuses it is given, then with 200; keeps what it took."""

    def __init__(self, *statuses: int, refuse_results_over: int = 1_000_000, with_status: int = 413) -> None:
        self._statuses = list(statuses)
        self._most = refuse_results_over
        self._refusal = with_status
        self.numbers: list[str | None] = []
        self.url = ""
        self.posts = 0
        self.chunks: list[Any] = []
        self.result: dict[str, Any] | None = None

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        content = orjson.loads(await request.read())
        self.posts += 1
        assert request.headers["X-Request-ID"] == JOB["id"]
        self.numbers.append(request.headers.get("X-Chunk-Number"))
        status = self._statuses.pop(0) if self._statuses else 200
        if (
            status == 200
            and "/done/" in request.path
            and "error" not in content
            and len(orjson.dumps(content)) > self._most
        ):
            status = self._refusal
        if status == 0:
            assert request.transport is not None
            request.transport.close()
        elif status == 200 and "/stream/" in request.path:
            self.chunks.append(content["output"])
        elif status == 200:
            self.result = content
        return web.Response(status=status or 500)


@contextlib.asynccontextmanager
async def running(platform: Platform) -> AsyncIterator[Platform]:
    runner = web.ServerRunner(web.Server(platform.answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    platform.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield platform
    await runner.cleanup()


async def run(platform: Platform, *chunks: Any, dead: bool = False) -> list[str]:
    """Run a job that yields `chunks`; return what was logged. An exception among them is raised."""
    logged: list[str] = []

    async def handler(_: dict[str, Any]) -> AsyncGenerator[Any, None]:
        for chunk in chunks:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    async with running(platform), aiohttp.ClientSession() as session:
        target = Egress(
            handler,
            f"{platform.url}/stream/$ID?x=1",
            f"{platform.url}/done/$ID?x=1",
            lambda text, _: logged.append(text),
            lambda: dead,
        )
        await target.handle_job(session, {}, JOB)
    return logged


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(egress, "_GIVE_UP_SECONDS", 0.3)
    monkeypatch.setattr(egress, "_REFUSED_SECONDS", 0.15)


def message(result: dict[str, Any] | None) -> str:
    assert result is not None
    return str(orjson.loads(result["error"])["error"]["message"])


async def test_chunks_and_result_arrive_once_and_in_order() -> None:
    platform = Platform()
    assert await run(platform, {"text": "a"}, {"text": "é 🚀"}, "data: x\n\n") == []
    assert platform.chunks == [{"text": "a"}, {"text": "é 🚀"}, "data: x\n\n"]
    assert platform.result == {"output": platform.chunks}
    assert platform.posts == 4


@pytest.mark.parametrize("status", [403, 404, 408, 429, 500, 503, 0])
async def test_a_chunk_that_is_not_taken_is_offered_again_before_the_next(status: int) -> None:
    platform = Platform(200, status, status, 200, status)
    assert await run(platform, {"text": "a"}, {"text": "b"}, {"text": "c"}) == []
    assert [chunk["text"] for chunk in platform.chunks] == ["a", "b", "c"]
    assert platform.result == {"output": [{"text": "a"}, {"text": "b"}, {"text": "c"}]}
    assert platform.posts == 4 + 3


async def test_a_chunk_that_will_never_be_taken_fails_the_job_at_once() -> None:
    platform = Platform(200, 413)
    logged = await run(platform, {"text": "a"}, {"text": "b"}, {"text": "c"})
    assert platform.chunks == [{"text": "a"}]
    assert message(platform.result) == "a chunk could not be delivered: HTTP 413"
    assert logged == ["a chunk was not delivered: HTTP 413"]


async def test_every_post_has_its_chunks_number_and_a_repeat_says_so_where_there_is_a_place_for_it() -> None:
    platform = Platform(0, 200, 504, 200, 0, 200, 502)
    answer = {"object": "chat.completion"}
    assert await run(platform, {"text": "a"}, "data: b\n\n", answer) == []
    assert platform.chunks == [{"text": "a", "repeat": 0}, "data: b\n\n", answer]
    assert platform.numbers == ["0", "0", "1", "1", "2", "2", None, None]
    assert platform.result == {"output": [{"text": "a"}, "data: b\n\n", answer]}


@pytest.mark.parametrize("status", [403, 404, 413])
async def test_a_result_that_is_refused_is_answered_with_a_short_failure(status: int) -> None:
    platform = Platform(200, refuse_results_over=60, with_status=status)
    await run(platform, {"text": "a" * 100})
    assert message(platform.result).startswith("the result, ")
    assert message(platform.result).endswith(f"could not be delivered: HTTP {status}")


async def test_a_result_that_may_have_been_taken_never_becomes_a_failure() -> None:
    platform = Platform(200, 0, *[400] * 100)
    logged = await run(platform, {"text": "a"})
    assert platform.result is None
    assert logged == ["the result was not delivered: HTTP 400"]


async def test_a_job_whose_worker_ends_has_no_result_unless_a_chunk_of_it_is_out() -> None:
    nothing, something = Platform(), Platform()
    await run(nothing, {"error": "why"}, dead=True)
    await run(something, {"text": "a"}, {"error": "why"}, dead=True)
    assert (nothing.posts, something.result) == (0, {"error": "why"})


async def test_a_platform_that_fails_for_long_fails_the_job() -> None:
    platform = Platform(*[500] * 6)
    logged = await run(platform, {"text": "a"}, {"text": "b"})
    assert platform.chunks == []
    assert "HTTP 500" in logged[0]


async def test_an_error_of_the_job_is_its_result() -> None:
    platform = Platform()
    await run(platform, {"text": "a"}, {"error": "why"}, {"text": "never"})
    assert platform.chunks == [{"text": "a"}]
    assert platform.result == {"error": "why"}


async def test_a_handler_that_breaks_still_ends_its_job() -> None:
    platform = Platform()
    logged = await run(platform, {"text": "a"}, BrokenPipeError("stdout is closed"))
    assert message(platform.result) == "BrokenPipeError: stdout is closed"
    assert logged == ["BrokenPipeError: stdout is closed"]


async def test_a_chunk_that_is_no_json_fails_the_job() -> None:
    platform = Platform()
    await run(platform, {"text": object()})
    assert "not JSON" in message(platform.result)
