"""Calling an application in-process: a real Starlette app, and bare ones for what Starlette would not do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from coldsnap.engine import HttpRequest
from coldsnap.errors import JobError
from coldsnap.vllm import asgi

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}


def now() -> float:
    return round(asyncio.get_running_loop().time(), 6)


def body(content: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}


class App:
    """A Starlette application that notes what happens to it."""

    def __init__(self) -> None:
        self.given = 0
        self.ended: list[tuple[float, str]] = []
        routes = [
            Route("/echo", self.echo, methods=["GET", "POST", "DELETE"]),
            Route("/tokens", self.tokens),
            Route("/fast", self.fast),
            Route("/idle", self.idle),
            Route("/broken", self.broken),
            Route("/breaks", self.breaks),
            Route("/slow", self.slow),
            Route("/nothing", self.nothing),
        ]
        self.app = Starlette(routes=routes)

    async def echo(self, request: Request) -> Response:
        said = {"method": request.method, "query": request.query_params._list, "body": await request.json()}
        return JSONResponse(said, status_code=201)

    async def nothing(self, request: Request) -> Response:
        return Response(status_code=204)

    async def tokens(self, request: Request) -> Response:
        async def events() -> AsyncIterator[bytes]:
            for i in range(3):
                yield b"data: %d\n\n" % i
                await asyncio.sleep(1)

        return StreamingResponse(events(), media_type="text/event-stream")

    async def fast(self, request: Request) -> Response:
        async def events() -> AsyncIterator[bytes]:
            try:
                for i in range(1000):
                    self.given = i + 1
                    yield b"%d\n" % i
                self.ended.append((now(), "complete"))
            except asyncio.CancelledError:
                self.ended.append((now(), "cancelled"))
                raise

        return StreamingResponse(events())

    async def idle(self, request: Request) -> Response:
        async def events() -> AsyncIterator[bytes]:
            try:
                yield b"first"
                await asyncio.sleep(3600)
            finally:
                self.ended.append((now(), "left"))

        return StreamingResponse(events())

    async def slow(self, request: Request) -> Response:
        """Work until the client disconnects, as vLLM's endpoints do."""
        await request.body()
        message = await request.receive()
        self.ended.append((now(), message["type"]))
        return Response()

    async def broken(self, request: Request) -> Response:
        raise RuntimeError("before the headers")

    async def breaks(self, request: Request) -> Response:
        async def events() -> AsyncIterator[bytes]:
            yield b"one"
            yield b"two"
            raise RuntimeError("after the headers")

        return StreamingResponse(events())


@pytest.fixture
def app() -> App:
    return App()


def call(path: str, method: str = "GET", query: str = "", content: bytes = b"") -> HttpRequest:
    return HttpRequest(method, path, query, content)


async def whole(application: Any, request: HttpRequest) -> tuple[int, str, bytes]:
    async with asgi.request(application, request) as response:
        return response.status, response.content_type, b"".join([chunk async for chunk in response.chunks])


async def test_request_and_response_go_through_unchanged(app: App) -> None:
    text = orjson.dumps({"text": "日本 \n\0 end"})
    status, content_type, content = await whole(app.app, call("/echo", "DELETE", "a=1&b=%C3%BC&a=2", text))
    assert (status, content_type) == (201, "application/json")
    assert orjson.loads(content) == {
        "method": "DELETE",
        "query": [["a", "1"], ["b", "ü"], ["a", "2"]],
        "body": orjson.loads(text),
    }


async def test_a_body_of_megabytes_arrives_whole(app: App) -> None:
    text = orjson.dumps("x" * 10_000_000)
    _, _, content = await whole(app.app, call("/echo", "POST", content=text))
    assert len(orjson.loads(content)["body"]) == 10_000_000


@pytest.mark.parametrize(
    ("request_", "status"), [(call("/unknown"), 404), (call("/tokens", "POST"), 405), (call("/nothing"), 204)]
)
async def test_every_status_is_handed_on(app: App, request_: HttpRequest, status: int) -> None:
    assert (await whole(app.app, request_))[0] == status


async def test_a_response_without_a_body_has_no_chunks(app: App) -> None:
    assert (await whole(app.app, call("/nothing")))[2] == b""


async def test_chunks_come_when_the_application_sends_them(app: App) -> None:
    async with asgi.request(app.app, call("/tokens")) as response:
        assert response.content_type.startswith("text/event-stream")
        chunks = [(now(), chunk) async for chunk in response.chunks]
    assert chunks == [(0.0, b"data: 0\n\n"), (1.0, b"data: 1\n\n"), (2.0, b"data: 2\n\n")]
    assert now() == 3.0  # the application was let finish


async def test_the_response_is_there_as_soon_as_its_headers_are() -> None:
    async def late_body(scope: Any, receive: Receive, send: Send) -> None:
        await send(START)
        await asyncio.sleep(1)
        await send(body(b"late"))

    async with asgi.request(late_body, call("/")) as response:
        assert now() == 0.0
        assert [chunk async for chunk in response.chunks] == [b"late"]
    assert now() == 1.0


async def test_requests_do_not_disturb_each_other(app: App) -> None:
    answers = await asyncio.gather(
        *(whole(app.app, call("/echo", "POST", content=b"%d" % i)) for i in range(50)),
        whole(app.app, call("/tokens")),
    )
    assert [orjson.loads(content)["body"] for _, _, content in answers[:50]] == list(range(50))
    assert answers[50][2].count(b"data:") == 3


class TestBackPressure:
    async def test_an_application_that_nobody_reads_is_held_back(self, app: App) -> None:
        async with asgi.request(app.app, call("/fast")) as response:
            await asyncio.sleep(60)
            assert 10 <= app.given <= 40
            chunks = [chunk async for chunk in response.chunks]
        assert chunks == [b"%d\n" % i for i in range(1000)]
        assert app.ended == [(60.0, "complete")]

    async def test_it_advances_as_far_as_it_is_read(self, app: App) -> None:
        async with asgi.request(app.app, call("/fast")) as response:
            await asyncio.sleep(1)
            before = app.given
            for _ in range(10):
                await anext(response.chunks)
            await asyncio.sleep(1)
            assert app.given == before + 10

    async def test_leaving_sets_a_held_back_application_free(self, app: App) -> None:
        async with asgi.request(app.app, call("/fast")):
            await asyncio.sleep(1)
        assert now() == 1.0
        assert app.given < 50
        assert [how for _, how in app.ended] != ["complete"]


class TestDisconnect:
    async def test_leaving_a_stream_early_ends_its_generator_at_once(self, app: App) -> None:
        async with asgi.request(app.app, call("/idle")) as response:
            assert await anext(response.chunks) == b"first"
            await asyncio.sleep(1)
        assert app.ended == [(1.0, "left")]
        assert now() == 1.0

    async def test_leaving_before_the_headers_is_a_disconnect_too(self, app: App) -> None:
        task = asyncio.create_task(whole(app.app, call("/slow")))
        await asyncio.sleep(2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert app.ended == [(2.0, "http.disconnect")]
        assert now() == 2.0

    async def test_a_cancelled_reader_takes_the_application_with_it(self, app: App) -> None:
        task = asyncio.create_task(whole(app.app, call("/idle")))
        await asyncio.sleep(2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert app.ended == [(2.0, "left")]

    async def test_an_error_of_the_reader_does_so_and_is_the_one_that_is_raised(self, app: App) -> None:
        with pytest.raises(ValueError, match="mine"):
            async with asgi.request(app.app, call("/idle")):
                raise ValueError("mine")
        assert [how for _, how in app.ended] == ["left"]

    async def test_an_application_that_does_not_notice_is_cancelled_after_five_seconds(self) -> None:
        ended = []

        async def deaf(scope: Any, receive: Receive, send: Send) -> None:
            await send(START)
            try:
                await asyncio.sleep(3600)
            finally:
                ended.append(now())

        async with asgi.request(deaf, call("/")):
            pass
        await asyncio.sleep(0)
        assert ended == [5.0]

    async def test_an_application_that_sends_on_finds_the_client_gone(self) -> None:
        raised = []

        async def stubborn(scope: Any, receive: Receive, send: Send) -> None:
            await send(START)
            try:
                while True:
                    await send(body(b"x", more=True))
                    await asyncio.sleep(0.3)
            except OSError as error:
                raised.append((now(), str(error)))
                raise

        async with asgi.request(stubborn, call("/")):
            await asyncio.sleep(1)
        assert raised == [(1.2, "client disconnected")]

    async def test_the_body_of_the_request_comes_once_then_only_the_disconnect(self) -> None:
        received = []

        async def listener(scope: Any, receive: Receive, send: Send) -> None:
            await send(START)
            for _ in range(3):
                message = await receive()
                received.append((now(), message))

        async with asgi.request(listener, call("/", content=b"body")):
            await asyncio.sleep(1)
        assert received == [
            (0.0, {"type": "http.request", "body": b"body", "more_body": False}),
            (1.0, {"type": "http.disconnect"}),
            (1.0, {"type": "http.disconnect"}),
        ]


class TestErrors:
    async def test_starlette_answers_500_for_an_error_before_the_headers(self, app: App) -> None:
        status, _, content = await whole(app.app, call("/broken"))
        assert (status, content) == (500, b"Internal Server Error")

    async def test_an_error_before_the_headers_is_raised_on_entry(self) -> None:
        async def broken(scope: Any, receive: Receive, send: Send) -> None:
            raise RuntimeError("before the headers")

        with pytest.raises(RuntimeError, match="before the headers"):
            async with asgi.request(broken, call("/")):
                pytest.fail("there is no response")

    async def test_an_error_in_mid_stream_comes_after_what_was_sent(self, app: App) -> None:
        chunks = []
        with pytest.raises(RuntimeError, match="after the headers"):
            async with asgi.request(app.app, call("/breaks")) as response:
                async for chunk in response.chunks:
                    chunks.append(chunk)  # noqa: PERF401 -- kept when the error comes
        assert chunks == [b"one", b"two"]

    async def test_an_error_after_the_response_does_not_spoil_it(self) -> None:
        async def untidy(scope: Any, receive: Receive, send: Send) -> None:
            await send(START)
            await send(body(b"all"))
            raise RuntimeError("too late")

        assert await whole(untidy, call("/")) == (200, "text/plain", b"all")

    async def test_an_application_that_returns_silently_is_an_error(self) -> None:
        async def silent(scope: Any, receive: Receive, send: Send) -> None:
            return

        with pytest.raises(JobError, match="the application ended before its response did"):
            await whole(silent, call("/"))

    async def test_a_response_that_stops_half_way_is_not_taken_for_a_whole_one(self) -> None:
        async def halting(scope: Any, receive: Receive, send: Send) -> None:
            await send(START)
            await send(body(b'{"text": "half', more=True))

        with pytest.raises(JobError, match="the application ended before its response did"):
            await whole(halting, call("/"))

    @pytest.mark.parametrize("sent", [[], [START], [START, body(b"half", more=True)]])
    async def test_an_application_cancelled_from_within_does_not_hang_its_reader(
        self, sent: list[dict[str, Any]]
    ) -> None:
        async def cancelled(scope: Any, receive: Receive, send: Send) -> None:
            for message in sent:
                await send(message)
            raise asyncio.CancelledError

        with pytest.raises(JobError, match="the application ended before its response did"):
            await whole(cancelled, call("/"))

    async def test_a_response_without_headers_has_no_content_type(self) -> None:
        async def bare(scope: Any, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200})
            await send({"type": "http.response.body"})

        assert await whole(bare, call("/")) == (200, "", b"")
